"""How a process ends: its exit status, signals, and leaving a process group."""

import atexit
import errno
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import NoReturn

from common.problems import UserError, one_line

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # no space for a script's output


def end_with_parent() -> None:
    """For workers: make this process exit within a second of its parent's death, however the parent died."""
    from multiprocessing import parent_process

    spawned_by = parent_process()  # may already be dead
    parent = spawned_by.pid if spawned_by else os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class Interrupted(Exception):
    """SIGTERM arrived and the state is saved: exit status 143."""


class Terminated(KeyboardInterrupt):
    """SIGTERM: handled like Ctrl-C, so that workers end and temporaries are removed on the way out."""


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a second SIGTERM kills at once
    raise Terminated("SIGTERM")


_left_group = False  # whether the current main() has left a process group


def entry(main: Callable[[], int | None]) -> int:
    """Run `main()`. A UserError prints one stderr line per problem and gives status 2, as does a full disk (on any
    rank); Ctrl-C prints one line and gives 130, SIGTERM 143.

    Other exceptions keep their traceback. Under torchrun, workers end with torchrun. A process that left its process
    group in `main` ends here instead of returning (see leave). With several processes, SIGTERM kills each at once: one
    that waits for a dead rank would never get to handle it.
    """
    global _left_group
    _left_group = False
    status = _run(main)
    if _left_group:
        leave(status)
    return status


def leave_after_main() -> None:
    """Make entry() end the process: it has left a process group."""
    global _left_group
    _left_group = True


def leave(status: int) -> NoReturn:
    """End this process with `status`, without taking the interpreter apart.

    A thread of gloo may still hold the last tensor of a collective. If it lets go of it while the interpreter is being
    finalized, it waits for the GIL, is ended by Python, and aborts the process ("terminate called without an active
    exception"): a finished run would end with -6, once in about a hundred.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _run(main: Callable[[], int | None]) -> int:
    """The status of `main()`. See entry."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_parent()
    if os.environ.get("WORLD_SIZE", "1") == "1":
        signal.signal(signal.SIGTERM, _terminate)
    try:
        return main() or 0
    except UserError as error:
        if int(os.environ.get("RANK", 0)) == 0:
            for line in error.problems:
                print(one_line(line), file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno not in FULL:
            raise
        file = error.filename if isinstance(error.filename, str | bytes) else "a file"
        print(one_line(f"{os.fsdecode(file)}: {error.strerror}; free some space and start again"), file=sys.stderr)
        return 2
    except Interrupted as reason:
        print(reason, file=sys.stderr)
        return 143
    except KeyboardInterrupt as reason:
        print("terminated" if isinstance(reason, Terminated) else "interrupted", file=sys.stderr)
        return 143 if isinstance(reason, Terminated) else 130
