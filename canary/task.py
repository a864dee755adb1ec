"""What to score: canaries, models and texts of each arm, all checked before a model is loaded."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from canary.canaries import Space
from canary.config import MeasureConfig
from canary.families import secret_tokens
from canary.key import Header, KeyLine, read_key
from canary.seen import Seen, text_trained_on
from common import distributed, manifests, models, provenance, results, reviews, trained
from common.models import ModelRef
from common.problems import Problems, check_writable

RESULTS, ROWS, RECORD = "results_canary.jsonl", "results_canary_rows.jsonl", "run_canary.json"
Privacy = dict[str, Any]  # the privacy budget spent in training, as in privacy.json


class Keyed(Protocol):
    """A configuration with a key file."""

    @property
    def canaries(self) -> str: ...


@dataclass(frozen=True)
class ModelArm:
    """A model to measure. seen: None if unknown."""

    ref: ModelRef
    tokenizer: Any
    privacy: Privacy | None
    seen: Seen | None


@dataclass(frozen=True)
class TextArm:
    """Generated rows; privacy and seen are those of their generator."""

    texts: list[str]
    privacy: Privacy | None
    seen: Seen | None


@dataclass(frozen=True)
class Task:
    """finished: the results exist already; weights: SHA-256 of each arm's model, and of --ref_model."""

    header: Header
    canaries: list[KeyLine]
    models: dict[str, ModelArm]
    texts: dict[str, TextArm]
    ref_model: ModelRef | None
    inputs: list[str]
    weights: dict[str, str | None]
    finished: bool

    @property
    def space(self) -> Space:
        """All secrets that a canary could have had."""
        return Space(self.header["secret"], tuple(self.header["words"]))

    @property
    def whole(self) -> bool:
        """Whether a chat template wrote the special tokens of the canaries' contexts."""
        return self.header.get("whole", False)

    @property
    def headline(self) -> str:
        """What the audit's score is taken over, fixed by the family: an unseen token alone, else the whole sentence."""
        return "secret" if self.header.get("family") == "new_token" else "whole"

    @property
    def audited(self) -> list[KeyLine]:
        """The audit canaries."""
        return [canary for canary in self.canaries if canary["kind"] == "audit"]


def prepare(config: MeasureConfig) -> Task:
    """Read and check everything. UserError with all problems."""
    problems = Problems()
    distributed.check_environment(problems, config.device_map, config.model_parallel, config.quantization)
    check_writable(config.output_dir, problems)
    if not (config.models or config.synthetic):
        problems.add("nothing to measure: give --models, --synthetic or both")
    header, canaries = problems.absorb(read_key, config.canaries) or (None, [])
    names = split_models(config, problems)
    files = reviews.split_arms(config.synthetic or (), (), problems)
    rows = {arm: problems.absorb(reviews.read_reviews, file, reviews.GENERATED) for arm, file in files.items()}
    refs: dict[str, ModelRef] = {}
    tokenizers: dict[str, Any] = {}
    for arm, name in names.items():
        ref, tokenizers[arm] = models.look_up(
            problems, name, config.revision, config.base_model, f"--models {arm}=", quantized=config.quantization
        )
        if ref:
            refs[arm] = ref
            check_tokens(f"--models {arm}={name}", tokenizers[arm], header, canaries, problems)
    ref_model = None
    if config.ref_model:
        given = (problems, config.ref_model, None, config.base_model, "--ref_model")
        ref_model, its_tokenizer = models.look_up(*given, quantized=config.quantization)
        check_tokens(f"--ref_model {config.ref_model}", its_tokenizer, header, canaries, problems)
    privacy = {arm: provenance.privacy(ref) for arm, ref in refs.items()}
    texts = {
        arm: read_texts(config, f"{arm}={file}", file, rows[arm] or [], privacy.get(arm), header, problems)
        for arm, file in files.items()
    }
    seen = {arm: seen_by(config, arm, ref, tokenizers[arm], header, problems) for arm, ref in refs.items() if header}
    if header and any(canary["kind"] == "audit" for canary in canaries):
        check_unit(config, header, privacy, problems)
        check_unit(config, header, {arm: text.privacy for arm, text in texts.items()}, problems)
    inputs = [config.canaries, *files.values()] if not problems.lines else []
    weights = {arm: provenance.weights_sha256(ref) for arm, ref in refs.items()}
    if ref_model:
        weights["--ref_model"] = provenance.weights_sha256(ref_model)
    folder = Path(config.output_dir)
    outputs = [folder / RESULTS, folder / ROWS]
    finished = problems.absorb(
        results.finished, folder / RECORD, outputs, config, inputs, config.overwrite, weights=weights
    )
    problems.check()
    assert header
    return Task(
        header=header,
        canaries=canaries,
        models={arm: ModelArm(ref, tokenizers[arm], privacy[arm], seen[arm]) for arm, ref in refs.items()},
        texts={arm: TextArm(text.texts, text.privacy, text.seen or seen.get(arm)) for arm, text in texts.items()},
        ref_model=ref_model,
        inputs=inputs,
        weights=weights,
        finished=bool(finished),
    )


def split_models(config: MeasureConfig, problems: Problems) -> dict[str, str]:
    """{arm: model} from --models; problems name that flag."""
    own = Problems()
    names = reviews.split_arms(config.models or (), (), own)
    for line in own.lines:
        problems.add(line.replace("--synthetic", "--models"))
    return names


def check_tokens(flag: str, tokenizer: Any, header: Header | None, canaries: list[KeyLine], problems: Problems) -> None:
    """Add a problem if secrets that were made of tokens have other ones in a model's tokenizer."""
    if header is None or tokenizer is None:
        return
    whole = header.get("whole", False)
    made = [canary for canary in canaries if "tokens" in canary]
    if any(secret_tokens(tokenizer, canary["context"], canary, whole) != canary["tokens"] for canary in made):
        problems.add(
            f"{flag}: its tokenizer gives other tokens for the secrets, which were made with that of "
            f"{header.get('tokenizer')}"
        )


def read_texts(
    config: Keyed,
    flag: str,
    file: str,
    rows: list[dict[str, Any]],
    privacy: Privacy | None,
    header: Header | None,
    problems: Problems,
) -> TextArm:
    """An arm's generated rows, with what their manifest says about the generator.

    privacy: of the arm's model, used if the manifest has none.
    """
    manifest = (manifests.read_manifest(file) or {}) if rows else {}
    spent: Privacy | None = manifest.get("privacy") or privacy
    if not manifest and rows and spent is None:
        spent = {"unknown": f"{file} has no manifest: what its generator spent is unknown"}
    seen: Seen | None = None
    if model := (manifest.get("generator") or {}).get("model"):
        seen = None if problems.lines else problems.absorb(Seen.of, model, None)
    if header and problems.absorb(text_trained_on, manifest, header.get("training") or "") is False:
        problems.add(f"--synthetic {flag}: its generator was not trained on the file that {config.canaries} belongs to")
    return TextArm([row[reviews.GENERATED] for row in rows], spent, seen)


def seen_by(
    config: MeasureConfig, arm: str, ref: ModelRef, tokenizer: Any, header: Header, problems: Problems
) -> Seen | None:
    """The rows an arm's model was trained on; adds a problem if they are from a different file than the key's."""
    checkpoint = ref.adapter or ref.base
    seen: Seen | None = (
        None if problems.lines else problems.absorb(Seen.of, checkpoint, tokenizer, header.get("whole", False))
    )
    if problems.absorb(trained.trained_on, checkpoint, header.get("training") or "") is False:
        problems.add(f"--models {arm}={ref.name}: was not trained on the file that {config.canaries} belongs to")
    return seen


def check_unit(config: Keyed, header: Header, privacy: dict[str, Privacy | None], problems: Problems) -> None:
    """Add a problem for each arm whose ε has a different privacy unit than the audit."""
    for arm, spent in privacy.items():
        unit = (spent or {}).get("unit")
        if unit and unit != header["privacy_unit"]:
            problems.add(
                f"--canaries {config.canaries}: its audit adds or removes a {header['privacy_unit']}, but the privacy "
                f"unit of {arm} is the {unit}; inject with --privacy_unit {unit}"
            )
