"""A LoRA adapter by TRL's SFTTrainer on chat rows, and what the training took.

python bench/side_by_side/train.py --model base --data train.jsonl --output adapter     # with trl and peft installed

Everything that is no flag here is a default of SFTConfig or LoraConfig, but for float32 (SFTConfig asks for bfloat16)
and no gradient checkpointing, which changes the time and not the adapter.
"""

import argparse
import json
import time


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Train a LoRA adapter by TRL's SFTTrainer.")
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True, help="a .jsonl file of chat rows")
    parser.add_argument("--output", required=True)
    parser.add_argument("--epochs", type=float, default=2)
    parser.add_argument("--learning_rate", type=float, default=2e-4, help="ten times TRL's own default")
    parser.add_argument("--lora_r", type=int, default=16)
    parser.add_argument("--lora_alpha", type=int, default=32)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--assistant_only_loss", action="store_true", help="the loss on the assistant's turns alone")
    parser.add_argument("--chat_template_path", help="of SFTConfig: a model whose template and tokens are added")
    parser.add_argument("--tokens", help="also write the tokens of each training row to this .jsonl file")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    import peft
    import torch
    import transformers
    import trl
    from datasets import Dataset

    with open(args.data, encoding="utf-8") as lines:
        rows = Dataset.from_list([json.loads(line) for line in lines])
    config = trl.SFTConfig(
        output_dir=args.output,
        num_train_epochs=args.epochs,
        learning_rate=args.learning_rate,
        per_device_train_batch_size=args.batch_size,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        save_strategy="no",
        report_to="none",
        logging_steps=10,
        seed=args.seed,
        assistant_only_loss=args.assistant_only_loss,
        chat_template_path=args.chat_template_path,
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    lora = peft.LoraConfig(
        r=args.lora_r, lora_alpha=args.lora_alpha, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    trainer = trl.SFTTrainer(model=model, args=config, train_dataset=rows, peft_config=lora, processing_class=tokenizer)
    if args.tokens:
        with open(args.tokens, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(row["input_ids"]) + "\n" for row in trainer.train_dataset)
    start = time.perf_counter()
    trained = trainer.train()
    seconds = time.perf_counter() - start
    trainer.save_model(args.output)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    facts = {
        "rows": len(rows),
        "steps": trained.global_step,
        "seconds": seconds,
        "first_loss": losses[0] if losses else None,
        "last_loss": losses[-1] if losses else None,
        "versions": {module.__name__: module.__version__ for module in (trl, peft, transformers, torch)},
    }
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
