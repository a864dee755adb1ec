"""One progress bar for every script: tqdm on a terminal, a log line every 30 seconds elsewhere, rank 0 only."""

import sys


def progress_bar(total: int, unit: str, world=None):
    """A tqdm bar with .update(n), usable as a context manager."""
    from tqdm import tqdm

    silent = world is not None and not world.main
    terminal = sys.stderr.isatty()
    return tqdm(
        total=total, unit=f" {unit}", disable=silent, mininterval=0.1 if terminal else 30, delay=0 if terminal else 30
    )
