#!/usr/bin/env python3
"""Trains the embedded models: a byte-level BPE and two GPT-NeoX language models, from scratch, on one CPU.

python data/embedded/make_model.py --size mini --bf16             # mini-pythia: what quickstart.py attacks
python data/embedded/make_model.py --size xl --bf16               # mini-pythia-xl: its larger sibling, the generator
python data/embedded/make_model.py --output_dir X --max_steps 99  # a short trial elsewhere

The text is make_corpus.py's: several passes over the mails, then web pages alone, as a web model saw its mail long
before its training ended. Both models have the same tokenizer. Weights are trained in fp32 and rounded to fp16 once,
when they are saved, so that loading them as fp32 is exact; config.json says float32, which is what `from_pretrained`
then loads by default. maker.json beside the weights records settings and losses.
"""

import argparse
import json
import math
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common.cli import Parser, entry, positive_float, positive_int
from common.results import atomic_folder, write_json

HERE = Path(__file__).resolve().parent
SIZES = {
    "mini": {"name": "mini-pythia", "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4},
    "xl": {"name": "mini-pythia-xl", "hidden_size": 192, "num_hidden_layers": 5, "num_attention_heads": 4},
}
CONTEXT = 1024
END_OF_TEXT = "<|endoftext|>"


def read_corpus(seed: int) -> tuple[list[str], list[str], list[str]]:
    """(mails, web pages, held-out texts): the text of make_corpus.py; the held-out texts are the outsiders' mails."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(HERE / "make_corpus.py"), "--seed", str(seed), "--output_dir", folder]
        subprocess.run([*command, "--pretraining_output", f"{folder}/text.json"], check=True)
        text = json.loads(Path(folder, "text.json").read_text(encoding="utf-8"))
        rows = [json.loads(line) for line in Path(folder, "outsiders.jsonl").read_text(encoding="utf-8").splitlines()]
    return text["mails"], text["web"], [row["prompt"] + row["continuation"] for row in rows]


def train_tokenizer(documents: list[str], vocab_size: int):
    """Byte-level BPE split by GPT-2's pattern, as Pythia's; <|endoftext|> is id 0 and the only special token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        unk_token=END_OF_TEXT,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def make_windows(mails: list[list[int]], web: list[list[int]], args: argparse.Namespace):
    """(training sequences in order, int64 [n, window]; how many belong to the first stage).

    First stage: `epochs` passes over the mails, each shuffled together with `mixed_pages` new web pages. Last stage:
    `last_pages` new web pages and `last_mails` of the mails. Documents are packed, each closed by <|endoftext|>.
    """
    import torch

    rng = random.Random(args.seed)
    used = args.mixed_pages * args.epochs
    stages = [mails + web[args.mixed_pages * i : args.mixed_pages * (i + 1)] for i in range(args.epochs)]
    stages.append(web[used : used + args.last_pages] + mails[: args.last_mails])
    pieces = []
    for documents in stages:
        rng.shuffle(documents)
        stream = [token for document in documents for token in (*document, 0)]
        n = len(stream) // args.window
        windows = torch.tensor(stream[: n * args.window], dtype=torch.int64).view(n, args.window)
        pieces.append(windows[rng.sample(range(n), n)])
    return torch.cat(pieces), sum(len(piece) for piece in pieces[:-1])


def learning_rate_factor(step: int, first: int, total: int, last: float) -> float:
    """Share of the peak rate: 5 % warm-up, cosine down to `last` at the end of the first stage, then a line to 0."""
    warmup = max(1, first // 20)
    if step < warmup:
        return (step + 1) / warmup
    if step < first:
        return last + (1 - last) * (1 + math.cos(math.pi * (step + 1 - warmup) / (first - warmup))) / 2
    return last * (total - step) / (total - first)


def held_out_loss(model, encoded: list[list[int]]) -> tuple[float, int]:
    """(mean nats a token, tokens) over texts, a start token before each."""
    import torch

    total, count = 0.0, 0
    model.eval()
    with torch.no_grad():
        for tokens in encoded:
            ids = torch.tensor([[0, *tokens[: CONTEXT - 1]]])
            total += model(input_ids=ids, labels=ids).loss.item() * (ids.shape[1] - 1)
            count += ids.shape[1] - 1
    model.train()
    return total / count, count


def run(args: argparse.Namespace) -> None:
    import torch
    import transformers
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    torch.manual_seed(args.seed)
    size = SIZES[args.size]
    mails, web, held_out = read_corpus(args.corpus_seed)
    tokenizer = train_tokenizer(mails + web[::5], args.vocab_size)
    windows, n_first = make_windows(
        tokenizer(mails, add_special_tokens=False)["input_ids"],
        tokenizer(web, add_special_tokens=False)["input_ids"],
        args,
    )
    config = GPTNeoXConfig(
        vocab_size=len(tokenizer),
        hidden_size=size["hidden_size"],
        intermediate_size=4 * size["hidden_size"],
        num_hidden_layers=size["num_hidden_layers"],
        num_attention_heads=size["num_attention_heads"],
        max_position_embeddings=CONTEXT,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=None,
    )
    model = GPTNeoXForCausalLM(config)
    n_parameters = sum(p.numel() for p in model.parameters())
    decay = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": decay, "weight_decay": args.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.learning_rate, betas=(0.9, 0.95), fused=True)

    first = n_first // args.batch_size
    total_steps = min(len(windows) // args.batch_size, args.max_steps or len(windows))
    print(f"{n_parameters / 1e6:.2f} M parameters, {windows.numel()} tokens, {total_steps} steps", flush=True)
    started, losses = time.perf_counter(), []
    for step in range(total_steps):
        batch = windows[step * args.batch_size : (step + 1) * args.batch_size]
        factor = learning_rate_factor(step, first, len(windows) // args.batch_size, args.last_factor)
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * factor
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
            loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        if (step + 1) % 50 == 0 or step + 1 == total_steps:
            seconds = time.perf_counter() - started
            rate = (step + 1) * args.batch_size * args.window / seconds
            recent = sum(losses[-50:]) / len(losses[-50:])
            print(f"step {step + 1}/{total_steps} loss {recent:.3f} {rate:.0f} tokens/s {seconds:.0f} s", flush=True)

    record = {
        "script": "data/embedded/make_model.py",
        "settings": vars(args) | {"output_dir": None} | size,
        "parameters": n_parameters,
        "training_tokens": total_steps * args.batch_size * args.window,
        "seconds": round(time.perf_counter() - started),
        "training_loss": sum(losses[-50:]) / len(losses[-50:]),
        "weights": "fp16 on disk, exact as fp32",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    encoded_held_out = tokenizer(held_out, add_special_tokens=False)["input_ids"][:100]
    save(args.output_dir or HERE / size["name"], model, tokenizer, encoded_held_out, record)


def save(folder, model, tokenizer, held_out: list[list[int]], record: dict) -> None:
    """Write the model as fp16, measure what was written, write maker.json; the folder appears whole or not at all."""
    import torch
    from transformers import AutoModelForCausalLM

    with atomic_folder(folder) as out:
        model.half().save_pretrained(out)
        model.config.dtype = "float32"  # what from_pretrained loads by default, whatever the file's own dtype
        model.config.save_pretrained(out)
        tokenizer.save_pretrained(out)
        loss, n_tokens = held_out_loss(AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32), held_out)
        measured = {"held_out_loss": loss, "held_out_perplexity": math.exp(loss), "held_out_tokens": n_tokens}
        write_json(out / "maker.json", record | measured)
    print(f"held-out loss {loss:.4f}, perplexity {math.exp(loss):.3f}, {record['seconds']} s")


def make_parser() -> Parser:
    parser = Parser(
        "Trains mini-pythia or mini-pythia-xl from scratch on the embedded corpus.",
        "python data/embedded/make_model.py --size mini --bf16",
    )
    parser.add_argument("--size", choices=sorted(SIZES), default="mini", help="which of the two models")
    parser.add_argument("--output_dir", default=None, help="where to save; None: beside this script")
    parser.add_argument("--vocab_size", type=positive_int, default=3072, help="tokens of the BPE")
    parser.add_argument("--epochs", type=positive_int, default=3, help="passes over the mails")
    parser.add_argument("--mixed_pages", type=positive_int, default=800, help="new web pages mixed into each pass")
    parser.add_argument("--last_pages", type=positive_int, default=1500, help="new web pages after the last pass")
    parser.add_argument("--last_mails", type=positive_int, default=40, help="mails among those last pages")
    parser.add_argument("--window", type=positive_int, default=512, help="tokens a training sequence")
    parser.add_argument("--batch_size", type=positive_int, default=4, help="sequences a step")
    parser.add_argument("--learning_rate", type=positive_float, default=2.5e-3, help="peak of the schedule")
    parser.add_argument("--last_factor", type=positive_float, default=0.1, help="share of the peak in the last stage")
    parser.add_argument("--bf16", action="store_true", help="multiply matrices in bf16 (faster where the CPU has it)")
    parser.add_argument("--weight_decay", type=positive_float, default=0.05, help="on matrices only")
    parser.add_argument("--max_steps", type=positive_int, default=None, help="stop there; None: the whole schedule")
    parser.add_argument("--corpus_seed", type=int, default=3407, help="seed given to make_corpus.py")
    parser.add_argument("--seed", type=int, default=3407, help="seed of weights and order")
    return parser


def main(argv: list[str] | None = None) -> int:
    run(make_parser().parse_args(argv))
    return 0


if __name__ == "__main__":
    sys.exit(entry(main))
