"""The accelerate trackers selected by --report_to."""

from pathlib import Path
from typing import TYPE_CHECKING

from common import strict_json
from common.problems import Problems
from training.config import TrainConfig

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker


def tracker_classes(names: str) -> "list[type[GeneralTracker]]":
    """The accelerate tracker classes of a comma-separated --report_to. UserError for an unknown or missing one."""
    wanted = [name.strip() for name in names.split(",") if name.strip() not in ("", "none")]
    if not wanted:
        return []
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    problems, installed = Problems(), [str(name) for name in get_available_trackers()]
    for name in wanted:
        if name not in LOGGER_TYPE_TO_CLASS:
            problems.add(f"--report_to {name}: unknown; accelerate knows {', '.join(LOGGER_TYPE_TO_CLASS)}")
        elif name not in installed:
            problems.add(f"--report_to {name}: not installed; pip install it or drop it")
    problems.check()
    return [LOGGER_TYPE_TO_CLASS[name] for name in wanted]


def start_trackers(config: TrainConfig, folder: Path) -> "list[GeneralTracker]":
    """The accelerate trackers of --report_to; those that write files log below `folder`."""
    trackers = []
    for kind in tracker_classes(config.report_to):
        places = [folder] if kind.requires_logging_directory else []
        tracker = kind("run_peft", *places)
        tracker.start()
        values = strict_json.plain(vars(config))
        tracker.store_init_configuration(
            {key: item if isinstance(item, (int, float, str, bool)) else str(item) for key, item in values.items()}
        )
        trackers.append(tracker)
    return trackers
