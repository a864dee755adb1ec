"""Merge an adapter checkpoint into its base: a standalone model that loads without PEFT.

    python merge_peft.py --model pythia-1.4b/original-lora/0e+00_2e-06/checkpoint-276
    python merge_peft.py --model CHECKPOINT --save_dir merged --base_model EleutherAI/pythia-1.4b

The base is the one named in adapter_config.json; --base_model overrides it. The merge is computed in float32. Writes
the model (safetensors), its tokenizer, its generation config and run_merge_peft.json to --save_dir, atomically, and
prints ‖ΔW‖/‖W‖ over the adapted matrices.
"""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from common import adapter_files, adapters, cli, locks, models, provenance, publication, quantization, results
from common.problems import Problems, check_writable
from common.process import entry

if TYPE_CHECKING:
    import torch

RECORD = "run_merge_peft.json"


@dataclass(frozen=True, kw_only=True)
class MergeConfig(cli.QuantizedConfig):
    """The flags of merge_peft.py."""

    model: str
    save_dir: str = "./tempMerged"
    base_model: str | None = None
    is_opt: bool = False


def make_parser() -> cli.Parser:
    parser = cli.Parser(
        "Merge an adapter checkpoint into its base model. --dtype is the dtype of the saved weights; auto "
        "means float32 on every device, because half precision rounds small updates away.",
        "python merge_peft.py --model pythia-1.4b/original-lora/0e+00_2e-06/checkpoint-276 --save_dir merged",
        MergeConfig,
    )
    add = parser.add_argument
    add("--model", required=True, help="an adapter checkpoint (directory)")
    add("--save_dir", "--output_dir", help="directory for the model; an earlier merge there is replaced")
    add("--base_model", help="base model, overriding adapter_config.json")
    add(
        "--is_opt",
        action="store_true",
        help="guess an OPT base (else a Pythia one) from the path of an adapter whose config names none",
    )
    cli.add_model_flags(parser)
    return parser


def check(config: MergeConfig) -> tuple[models.ModelRef, Path]:
    """(the base and its adapter, the adapter's directory), from their files. UserError with every problem."""
    problems = Problems()
    target = Path(config.save_dir).expanduser()
    check_writable(target, problems, "--save_dir")
    if target.is_dir() and any(target.iterdir()) and not (target / RECORD).is_file():
        problems.add(
            f"--save_dir {config.save_dir}: contains something other than an earlier merge; choose an empty directory"
        )
    given = (problems, config.model, config.revision, config.base_model)
    ref, _ = models.look_up(*given, is_opt=config.is_opt, quantized=config.quantization)
    if ref and not ref.adapter:
        problems.add(f"--model {config.model}: has no adapter_config.json; it is already a full model")
    elif ref and not problems.lines:
        problems.absorb(adapters.check_mergeable, ref)
    problems.check()
    if not (ref and ref.adapter):
        raise RuntimeError(f"--model {config.model}: no adapter, but no check reported why")
    return ref, Path(ref.adapter)


def rounding(model: "torch.nn.Module", modules: list[str], dtype: "torch.dtype", change: float | None) -> float | None:
    """‖round(W′) − W′‖ / ‖ΔW‖ over the weights of `modules`: storage error of W′ in `dtype`, relative to the update.

    `change` is ‖ΔW‖/‖W‖. None if there is no update to compare with.
    """
    if not change:
        return None
    error = total = 0.0
    weights = [item for name in modules for item in model.get_submodule(name).parameters(recurse=False)]
    for weight in (item.detach().double() for item in weights if item.dim() > 1):
        error += float((weight.to(dtype).double() - weight).square().sum())
        total += float(weight.square().sum())
    return float((error / total) ** 0.5 / change)


def run(config: MergeConfig) -> Path:
    """Merge as `config` says; returns the directory of the merged model. UserError if the adapter does not fit."""
    ref, adapter = check(config)
    target = Path(config.save_dir).expanduser()
    print(f"adapter  {ref.adapter}\nbase     {ref.base}\nsave to  {target}", flush=True)
    if config.dry_run:
        return target
    import torch

    dtype = torch.float32 if config.dtype == "auto" else getattr(torch, config.dtype)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    inputs = [adapter / "adapter_model.safetensors"]
    with (
        locks.output_file(os.path.realpath(target)),  # whose start removes what a killed merge left
        publication.atomic_folder(target) as folder,
        results.Run(folder / RECORD, config, inputs) as record,
    ):
        base = models.load_base(ref, torch.float32, device, config.device_map)
        if quantization.is_quantised(base):
            base, words = quantization.dequantised(base)
            record["dequantised"] = words
            print(f"dequantised to float32: {words}", flush=True)
        elif how := (provenance.training_record(adapter) or {}).get("args", {}).get("quantization"):
            print(f"warning: trained on a base in {how}, merged into the unquantised one", file=sys.stderr)
        record["base"], record["base_commit"] = ref.base, getattr(base.config, "_commit_hash", None)
        with adapters.adapted(base, adapter, merge=True) as (merged, change):
            record["relative_change"] = change
            if change is not None:  # else no matrix was changed
                print(f"‖ΔW‖/‖W‖ {change:.4g}", flush=True)
            if dtype != torch.float32:
                known = dict(merged.named_modules())
                modules = sorted(
                    {adapter_files.module_of(tensor, known) for tensor in adapter_files.adapter_shapes(adapter)} - {""}
                )
                cost = record["rounding"] = rounding(merged, modules, dtype, change)
                if cost is not None:
                    words = f"saved as {config.dtype}, the adapted weights are rounded by {cost:.2g} times the update"
                    print(f"warning: {words}; float32 keeps it", file=sys.stderr)
            adapters.untie_if_different(merged)
            merged.to(dtype).save_pretrained(str(folder))  # type: ignore[arg-type]
        models.load_tokenizer(ref).save_pretrained(folder)
        if spent := provenance.privacy(ref):
            publication.write_json(folder / provenance.PRIVACY_FILE, spent)
            record["privacy"] = spent
    print(f"merged   {target}", flush=True)
    return target


def main(argv: Sequence[str] | None = None) -> int:
    run(make_parser().parse_args(argv))
    return 0


if __name__ == "__main__":
    sys.exit(entry(main))
