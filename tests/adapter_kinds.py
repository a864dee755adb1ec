"""The kinds of adapters of peft that the tests train and measure; docs/models.md has their table.

PYTHONPATH=. python tests/adapter_kinds.py          prints that table
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

PROMPTS = 5  # virtual tokens


@dataclass(frozen=True)
class Kind:
    """adapter: how to make its configuration from peft's module. merged: None if merge_peft.py refuses it.

    measured: by default, on a float32 base. rows: of the embeddings it was trained with, if they were resized.
    """

    words: str
    adapter: Callable[[Any], Any]
    measured: str = "attached"
    merges: bool = True
    tied: bool = False
    rows: int | None = None


LM: dict[str, Any] = {"task_type": "CAUSAL_LM"}
QV: dict[str, Any] = {"target_modules": ["q_proj", "v_proj"], **LM}
Q: dict[str, Any] = {"r": 4, "target_modules": ["q_proj"], **LM}
IN_FULL = "merged"

KINDS = {
    "lora": Kind("LoRA", lambda peft: peft.LoraConfig(r=4, **QV), IN_FULL),
    "rslora": Kind("LoRA with `use_rslora`", lambda peft: peft.LoraConfig(r=4, use_rslora=True, **QV), IN_FULL),
    "dora": Kind("DoRA", lambda peft: peft.LoraConfig(r=4, use_dora=True, **QV), IN_FULL),
    "pattern": Kind(
        "LoRA on a pattern of layers",
        lambda peft: peft.LoraConfig(r=4, target_modules=r".*\.(q_proj|v_proj)", **LM),
        IN_FULL,
    ),
    "bias": Kind("LoRA with `bias`", lambda peft: peft.LoraConfig(bias="lora_only", **Q), IN_FULL),
    "lora_bias": Kind(
        "LoRA with `lora_bias`, on layers without a bias",
        lambda peft: peft.LoraConfig(lora_bias=True, **Q),
        merges=False,
    ),
    "head": Kind(
        "LoRA with `modules_to_save` (embeddings, head, a block)",
        lambda peft: peft.LoraConfig(modules_to_save=["embed_tokens", "lm_head", "mlp"], **Q),
        IN_FULL,
    ),
    "one end": Kind(
        "LoRA with `modules_to_save` of one of two tied ends",
        lambda peft: peft.LoraConfig(modules_to_save=["lm_head"], **Q),
        IN_FULL,
        tied=True,
    ),
    "tokens": Kind(
        "LoRA with `trainable_token_indices`", lambda peft: peft.LoraConfig(trainable_token_indices=[5, 6, 9], **Q)
    ),
    "tied tokens": Kind(
        "LoRA with `trainable_token_indices`, tied ends",
        lambda peft: peft.LoraConfig(trainable_token_indices=[5, 6, 9], **Q),
        tied=True,
    ),
    "embeddings": Kind(
        "LoRA on `embed_tokens` or `lm_head`",
        lambda peft: peft.LoraConfig(r=4, target_modules=["embed_tokens", "lm_head"], **LM),
        IN_FULL,
    ),
    "tied embeddings": Kind(
        "LoRA on `embed_tokens` or `lm_head`, tied",
        lambda peft: peft.LoraConfig(r=4, target_modules=["embed_tokens"], **LM),
        merges=False,
        tied=True,
    ),
    "resized": Kind("LoRA with resized embeddings", lambda peft: peft.LoraConfig(**Q), IN_FULL, rows=410),
    "resized, tied": Kind(
        "LoRA with resized embeddings, tied", lambda peft: peft.LoraConfig(**Q), IN_FULL, tied=True, rows=410
    ),
    "new tokens": Kind(
        "LoRA with new tokens in `trainable_token_indices`",
        lambda peft: peft.LoraConfig(trainable_token_indices=[401, 405], **Q),
        rows=410,
    ),
    "ia3": Kind(
        "IA³",
        lambda peft: peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], **LM),
    ),
    "vera": Kind("VeRA", lambda peft: peft.VeraConfig(r=8, **QV)),
    "vera, no projection": Kind(
        "VeRA without its projections (`save_projection=False`)",
        lambda peft: peft.VeraConfig(r=8, save_projection=False, **QV),
    ),
    "oft": Kind("OFT", lambda peft: peft.OFTConfig(oft_block_size=4, **QV)),
    "boft": Kind("BOFT", lambda peft: peft.BOFTConfig(boft_block_size=4, **QV)),
    "loha": Kind("LoHa", lambda peft: peft.LoHaConfig(r=4, **QV)),
    "lokr": Kind("LoKr", lambda peft: peft.LoKrConfig(r=4, **QV)),
    "adalora": Kind(
        "AdaLoRA",
        lambda peft: peft.AdaLoraConfig(init_r=4, target_r=2, total_step=100, tinit=1, tfinal=10, **QV),
    ),
    "ln": Kind("LN tuning", lambda peft: peft.LNTuningConfig(**LM)),
    "prompt": Kind(
        "Prompt tuning", lambda peft: peft.PromptTuningConfig(num_virtual_tokens=PROMPTS, **LM), merges=False
    ),
    "p-tuning": Kind(
        "P-tuning",
        lambda peft: peft.PromptEncoderConfig(num_virtual_tokens=PROMPTS, encoder_hidden_size=16, **LM),
        merges=False,
    ),
    "prefix": Kind(
        "Prefix tuning", lambda peft: peft.PrefixTuningConfig(num_virtual_tokens=PROMPTS, **LM), merges=False
    ),
    "prefix, projected": Kind(
        "Prefix tuning with `prefix_projection`",
        lambda peft: peft.PrefixTuningConfig(
            num_virtual_tokens=PROMPTS, prefix_projection=True, encoder_hidden_size=16, **LM
        ),
        merges=False,
    ),
    "cartridge": Kind("Cartridges", lambda peft: peft.CartridgeConfig(num_virtual_tokens=PROMPTS, **LM), merges=False),
}


def table() -> list[str]:
    """The lines of the table in docs/models.md."""
    lines = ["| adapter | measured on a float32 base | on another | merge_peft.py |", "|---|---|---|---|"]
    for kind in KINDS.values():
        lines.append(f"| {kind.words} | {kind.measured} | attached | {'merges' if kind.merges else 'refuses'} |")
    return lines


if __name__ == "__main__":
    print("\n".join(table()))
