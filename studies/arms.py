"""The training sets of System P, one per arm, and what they contain of the people who are evaluated."""

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from common import dataset, formats, json_files, manifests, publication
from common.checkpoints import find_checkpoints
from common.problems import AnyPath
from data.continuation import run as continuation
from data.continuation.config import ContinuationConfig
from data.continuation.text_statistics import address_counts
from data.embedded.config import InstructionsConfig
from data.replacing import run as replacing
from data.replacing.config import ReplaceConfig
from data.self_instruct import run as self_instruct
from data.self_instruct.config import SelfInstructConfig
from data.self_instruct.rounds import NoInstanceError
from studies.config import EMBEDDED, StudyConfig
from studies.steps import Record, build, device_of, train
from training.config import TrainConfig

DEFAULT = ("original", "generated", "replaced")
ARMS = (*DEFAULT, "self_instruct", "prompt_only", "generated_unseen")
GENERATOR = {"generated": "generator", "self_instruct": "generator", "generated_unseen": "unseen_generator"}
EMBEDDED_GENERATOR = str(EMBEDDED / "mini-pythia-xl")
ROWS, EMBEDDED_ROWS = SelfInstructConfig.num_rows, 300  # of the arm self_instruct
EMBEDDED_TOKENS = 80  # of a completion of self-instruct with the embedded generator
FORM_ROWS, FORM_RATE = 600, 2e-3  # tuning the embedded generator on the form of self-instruct's prompts


class TrainingSets(NamedTuple):
    """files: the data of each arm; notes: what is to be said about arms that were built or could not be."""

    files: dict[str, AnyPath]
    notes: dict[str, str]


def build_all(config: StudyConfig, out: Path, shared: Path) -> TrainingSets:
    """The training set of every arm; what does not exist yet is built. shared: for what does not depend on the seed."""
    sets = TrainingSets({}, {})
    for arm in config.arms:
        if arm == "original":
            sets.files[arm] = config.dataset
        elif arm in ("generated", "generated_unseen"):
            sets.files[arm] = continued(config, getattr(config, GENERATOR[arm]), out / arm / "data.arrow")
        elif arm == "replaced":
            output = str(out / arm / "replaced_data.arrow")
            replaced = ReplaceConfig(input=config.dataset, output=output, seed=config.seed)
            sets.files[arm] = build("data/replace_pii.py", replacing.run, replaced)
        elif arm == "prompt_only":
            sets.files[arm] = prompts(config.dataset, out / arm / "prompts.jsonl")
        else:
            add_self_instruct(config, out / arm, shared, sets)
    return sets


def continued(config: StudyConfig, generator: str, output: Path) -> Path:
    """The training prompts, continued by a generator."""
    asked = ContinuationConfig(
        model=generator,
        data_set=config.dataset,
        max_tokens=config.generated_tokens,
        output=str(output),
        seed=config.seed,
    )
    return build("data/continuation/generate.py", continuation.run, asked)


def prompts(data: str, file: Path) -> Path:
    """The prompts of the training rows, without what follows them: the part that the arms `original` and `generated`
    have in common. There is no end of text after a prompt."""
    rows = formats.read_rows(data)
    kept = dataset.split(rows, manifests.read_manifest(data)).train
    publication.write_jsonl(file, [{"text": rows[index]["prompt"], "row_id": index} for index in kept])
    return file


def add_self_instruct(config: StudyConfig, folder: Path, shared: Path, sets: TrainingSets) -> None:
    """Add the arm `self_instruct`, or the note that the generator wrote nothing that passes the filters."""
    assert config.generator  # quickstart.py reports a missing one
    generator, seed_tasks, max_tokens = config.generator, config.seed_tasks, SelfInstructConfig.max_tokens
    if seed_tasks is None and generator == EMBEDDED_GENERATOR:
        seed_tasks, generator = taught(config, shared / "instructions")
        max_tokens = EMBEDDED_TOKENS
    asked = SelfInstructConfig(
        model=generator,
        seed_tasks=seed_tasks or SelfInstructConfig.seed_tasks,
        output=str(folder / "data.jsonl"),
        format="text",
        num_rows=config.self_instruct_rows,
        max_tokens=max_tokens,
        seed=config.seed,
    )
    try:
        sets.files["self_instruct"] = build("data/self_instruct/generate.py", self_instruct.run, asked)
    except NoInstanceError as error:
        sets.notes["self_instruct"] = f"Arm self_instruct left out: {'; '.join(error.problems)}."
        return
    record = json_files.read_json(folder / "run_generate.json", f"remove {folder} and run again")
    counts = record["counts"]
    kept = [
        f"{counts.get(f'{kind}: kept', 0)} of {counts.get(f'{kind}: candidates', 0)} {kind}"
        for kind in ("instructions", "instances")
    ]
    sets.notes["self_instruct"] = f"Self-instruct: the filters kept {' and '.join(kept)}."


def taught(config: StudyConfig, folder: Path) -> tuple[str, str]:
    """(seed tasks, generator) for the embedded models: tasks in the words of their corpus, and the generator tuned on
    the form of self-instruct's prompts, which it is too small to pick up from a prompt."""
    from data.embedded.instructions import FORM, SEED_TASKS
    from data.embedded.instructions import run as make_instructions

    build(
        "data/embedded/make_instructions.py",
        make_instructions,
        InstructionsConfig(output=str(folder), form_rows=FORM_ROWS),
    )
    training = TrainConfig(
        model=EMBEDDED_GENERATOR,
        input=str(folder / FORM),
        output_root=str(folder),
        loss_on="completion",
        learning_rate=FORM_RATE,
        epochs=1,
        per_device_batch_size=8,
        gradient_accumulation_steps=1,
        logging_steps=10,
        lora_r=16,
        **device_of(config),
    )
    return str(folder / SEED_TASKS), str(find_checkpoints(train(training))[-1])


def evaluated_addresses(config: StudyConfig, files: dict[str, AnyPath]) -> Record:
    """{arm: how many evaluated addresses its training text contains, in how many rows, how often, of how many}."""
    rows = formats.read_rows(config.dataset)
    split = dataset.split(rows, manifests.read_manifest(config.dataset))
    wanted = {rows[index]["gt-email"].casefold() for index in split.head}
    return {arm: {**address_counts(texts_of(file), wanted), "evaluated": len(wanted)} for arm, file in files.items()}


def texts_of(file: AnyPath) -> Iterable[str]:
    """The texts of a file's training rows."""
    rows = formats.read_rows(file)
    enron = dataset.shape_of(rows[0]) == "enron"
    kept = dataset.split(rows, manifests.read_manifest(file)).train if enron else range(len(rows))
    return (dataset.row_text(rows[index])[0] for index in kept)
