"""The run of data/embedded/make_model.py: train the model, save it, measure what was saved."""

import math
import time
from typing import TYPE_CHECKING, Any

from common.problems import AnyPath, Problems, check_writable
from common.publication import atomic_folder, write_json
from data.embedded.config import CONTEXT, SIZES, MakeModelConfig
from data.embedded.windows import HERE, make_windows, read_corpus, train_tokenizer

if TYPE_CHECKING:
    import torch
    from transformers import GPTNeoXForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

RECENT = 50  # steps over which printed and recorded losses are averaged


def run(config: MakeModelConfig) -> None:
    """Train a model of --size from scratch and save it."""
    if config.dry_run:
        folder, problems = config.output_dir or HERE / SIZES[config.size]["name"], Problems()
        check_writable(folder, problems)
        problems.check()
        name = SIZES[config.size]["name"]
        print(f"would train {name} on the corpus of seed {config.corpus_seed} and save it to {folder}")
        return
    import torch
    import transformers

    torch.manual_seed(config.seed)
    size = SIZES[config.size]
    mails, web, held_out = read_corpus(config.corpus_seed)
    tokenizer = train_tokenizer(mails + web[::5], config.vocab_size)
    windows, n_first = make_windows(
        tokenizer(mails, add_special_tokens=False)["input_ids"],
        tokenizer(web, add_special_tokens=False)["input_ids"],
        config,
    )
    model = new_model(config, len(tokenizer))
    n_parameters = sum(p.numel() for p in model.parameters())
    total_steps = min(len(windows) // config.batch_size, config.max_steps or len(windows))
    print(f"{n_parameters / 1e6:.2f} M parameters, {windows.numel()} tokens, {total_steps} steps", flush=True)
    started = time.perf_counter()
    losses = train(model, windows, n_first, total_steps, config)

    record = {
        "script": "data/embedded/make_model.py",
        "settings": {key: value for key, value in vars(config).items() if key != "dry_run"}
        | {"output_dir": None}
        | size,
        "parameters": n_parameters,
        "training_tokens": total_steps * config.batch_size * config.window,
        "seconds": round(time.perf_counter() - started),
        "training_loss": sum(losses[-RECENT:]) / len(losses[-RECENT:]),
        "weights": "fp16 on disk, exact as fp32",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    encoded_held_out = tokenizer(held_out, add_special_tokens=False)["input_ids"][:100]
    save(config.output_dir or HERE / size["name"], model, tokenizer, encoded_held_out, record)


def new_model(config: MakeModelConfig, vocabulary: int) -> "GPTNeoXForCausalLM":
    """A model of --size with random weights."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    size = SIZES[config.size]
    architecture = GPTNeoXConfig(
        vocab_size=vocabulary,
        hidden_size=size["hidden_size"],
        intermediate_size=4 * size["hidden_size"],
        num_hidden_layers=size["num_hidden_layers"],
        num_attention_heads=size["num_attention_heads"],
        max_position_embeddings=CONTEXT,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=None,
    )
    return GPTNeoXForCausalLM(architecture)


def train(
    model: "GPTNeoXForCausalLM", windows: "torch.Tensor", n_first: int, total_steps: int, config: MakeModelConfig
) -> list[float]:
    """Train; the loss of each step. n_first: training sequences of the first stage."""
    import torch

    decay = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": decay, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.95), fused=True)
    first = n_first // config.batch_size
    started = time.perf_counter()
    losses: list[float] = []
    for step in range(total_steps):
        batch = windows[step * config.batch_size : (step + 1) * config.batch_size]
        factor = learning_rate_factor(step, first, len(windows) // config.batch_size, config.last_factor)
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * factor
        with torch.autocast("cpu", torch.bfloat16, enabled=config.bf16):
            loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        if (step + 1) % RECENT == 0 or step + 1 == total_steps:
            seconds = time.perf_counter() - started
            rate = (step + 1) * config.batch_size * config.window / seconds
            recent = sum(losses[-RECENT:]) / len(losses[-RECENT:])
            print(f"step {step + 1}/{total_steps} loss {recent:.3f} {rate:.0f} tokens/s {seconds:.0f} s", flush=True)
    return losses


def learning_rate_factor(step: int, first: int, total: int, last: float) -> float:
    """Share of the peak rate: 5 % warm-up, cosine down to `last` at the end of the first stage, then linear to 0."""
    warmup = max(1, first // 20)
    if step < warmup:
        return (step + 1) / warmup
    if step < first:
        return last + (1 - last) * (1 + math.cos(math.pi * (step + 1 - warmup) / (first - warmup))) / 2
    return last * (total - step) / (total - first)


def save(
    folder: AnyPath,
    model: "GPTNeoXForCausalLM",
    tokenizer: "PreTrainedTokenizerFast",
    held_out: list[list[int]],
    record: dict[str, Any],
) -> None:
    """Write the model as fp16, measure what was written, write maker.json; the folder appears atomically."""
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


def held_out_loss(model: "PreTrainedModel", encoded: list[list[int]]) -> tuple[float, int]:
    """(mean nats per token, number of tokens) over texts, each after a start token."""
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
