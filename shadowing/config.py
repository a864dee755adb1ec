"""The configuration of mia/shadow.py."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ShadowConfig:
    """How a shadow is trained is not configured here: as the target was."""

    like: str
    shadows: int = 8
    members: str | None = None  # None: the file in the target's run.json
    nonmembers: str | None = None  # None: the held-out head of `members`
    base_model: str | None = None  # None: as the adapter says
    output_dir: str = "./shadows"
    dry_run: bool = False
    seed: int = 3407
