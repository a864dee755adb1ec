"""Kill a script before each of its file operations, run it again, compare with an uninterrupted run.

python tests/kill.py < job.json     {"root", "script", "words", "at": [numbers] or null for all}

`root`/start is what a run finds; it is copied to `root`/work, the folder that the words name, before each run. The
script runs in a forked process, so that torch is imported once. The answer, JSON on stdout: `operations` of an
uninterrupted run, and `faults`: what differed after a kill and a second run. Files may differ in times and speeds only.
"""

import builtins
import hashlib
import importlib.util
import io
import json
import os
import re
import shutil
import sys
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PATHS = ("replace", "rename", "mkdir", "unlink", "remove", "rmdir", "chmod", "link", "symlink", "truncate", "utime")
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
# of a run: its times and speeds, how many passes it took from the cache, and from where it was resumed
TIMES = re.compile(
    r"start|end|created|time|.*seconds|peak_.*|.*_per_s(_with_check)?|tokens_per_second|passes|resumed_from|commit"
)
CLOCK = re.compile(r"\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d(\+00:00| UTC)?|[\d.,]+ ?(s|tokens/s|MB|GB)\b")
QUOTED = re.compile(rf"(&#34;(?:{TIMES.pattern}|[cg]pu_bytes)&#34;: ).*")  # a record within a report
KILLED = 9


class Watch:
    """Counts a process's operations on files below `folder`, and ends it, as kill -9 would, instead of one of them."""

    def __init__(self, folder: Path, last: int | None):
        self.folder, self.last, self.seen = os.path.realpath(folder), last, []
        self.busy = False
        for name in PATHS:
            self.wrap(os, name, lambda words: [word for word in words[:2] if isinstance(word, (str, os.PathLike))])
        for name in ("fsync", "ftruncate"):
            self.wrap(os, name, lambda words: [f"/proc/self/fd/{words[0]}"])
        self.wrap(os, "open", lambda words: [words[0]] if words[1] & WRITES else [])
        for module in (builtins, io):
            self.wrap(
                module, "open", lambda words: [words[0]] if len(words) > 1 and set("wax+") & set(words[1]) else []
            )

    def wrap(self, module, name: str, paths_of) -> None:
        real = getattr(module, name)

        def watched(*words, **more):
            if name == "open" and "mode" in more:
                found = [words[0]] if set("wax+") & set(more["mode"]) else []
            else:
                found = paths_of(words)
            if not self.busy and any(self.below(path, more.get("dir_fd")) for path in found):
                if self.last is not None and len(self.seen) == self.last:
                    os._exit(KILLED)
                self.seen.append(f"{name} {os.fspath(found[-1])}")
            return real(*words, **more)

        setattr(module, name, watched)

    def below(self, path, folder: int | None = None) -> bool:
        if isinstance(path, int):  # an open descriptor gets a file object: counted when it was opened
            return False
        path = os.fsdecode(path)
        if folder is not None and not os.path.isabs(path):
            path = os.path.join(os.readlink(f"/proc/self/fd/{folder}"), path)
        if path.startswith("/proc/self/fd/"):
            path = os.readlink(path)
        return os.path.join(os.path.realpath(os.path.dirname(path)), "").startswith(os.path.join(self.folder, ""))


def run(script: Path, words: list[str], work: Path, last: int | None, log: Path) -> tuple[int, list[str]]:
    """(exit status, operations) of the script in a forked process that ends before operation `last`."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(out, 1)
            os.dup2(out, 2)
            sys.argv = [str(script), *words]
            from common.process import entry

            module = load(script)
            watch = Watch(work, last)
            status = entry(lambda: module.main(words))
            os.write(write, json.dumps(watch.seen).encode())
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        seen = pipe.read()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), json.loads(seen or b"[]")


def load(script: Path):
    name = ".".join(script.relative_to(ROOT).with_suffix("").parts) if script.is_relative_to(ROOT) else script.stem
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, script)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def timeless(item):
    """A JSON value without what may differ between two equal runs."""
    if isinstance(item, dict):
        return {key: timeless(value) for key, value in item.items() if not TIMES.fullmatch(key)}
    return [timeless(one) for one in item] if isinstance(item, list) else item


def snapshot(folder: Path) -> dict[str, str]:
    """{path below the folder: mode and content} of every file, without times."""
    found = {}
    for path in sorted(folder.rglob("*")):
        content = ""
        if path.is_file():
            raw = path.read_bytes()
            try:
                if path.suffix == ".json":
                    raw = json.dumps(timeless(json.loads(raw))).encode()
                elif path.suffix == ".jsonl":
                    raw = "\n".join(json.dumps(timeless(json.loads(line))) for line in raw.splitlines()).encode()
                elif path.suffix in (".html", ".md", ".csv"):
                    raw = CLOCK.sub("T", QUOTED.sub(r"\1*", raw.decode())).encode()
            except ValueError:
                pass
            content = hashlib.sha256(raw).hexdigest()
        found[str(path.relative_to(folder))] = f"{path.stat().st_mode & 0o7777:o} {content}"
    return found


def difference(whole: dict[str, str], found: dict[str, str]) -> list[str]:
    return [
        f"{'missing' if name not in found else 'left over' if name not in whole else 'differs'}: {name}"
        for name in sorted(whole.keys() | found.keys())
        if whole.get(name) != found.get(name)
    ]


def sweep(root: Path, script: str, words: list[str], at: list[float] | None) -> dict:
    """at: which operations, as shares of their number; None for all."""
    import torch  # noqa: F401 (imported before the forks)
    import transformers  # noqa: F401

    work, log, path = root / "work", root / "log.txt", ROOT / script

    def fresh() -> None:
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(root / "start", work, symlinks=True)

    fresh()
    status, operations = run(path, words, work, None, log)
    if status:
        return {"operations": operations, "faults": [f"uninterrupted: exit {status}\n{log.read_text()[-3000:]}"]}
    whole = snapshot(work)
    numbers = range(len(operations)) if at is None else sorted({int(share * (len(operations) - 1)) for share in at})
    faults, killed = [], 0
    for number in numbers:
        fresh()
        log.unlink()
        status, _ = run(path, words, work, number, log)
        killed += status == KILLED
        if status not in (0, KILLED):
            faults.append(
                f"before {number} {operations[number]}: exit {status} instead of a kill\n{log.read_text()[-2000:]}"
            )
            continue
        status, _ = run(path, words, work, None, log)
        differences = difference(whole, snapshot(work))
        if status or differences:
            tail = log.read_text()[-2000:] if status else ""
            faults.append(f"before {number} {operations[number]}: exit {status}; {differences}\n{tail}")
    return {"operations": operations, "killed": killed, "faults": faults}


if __name__ == "__main__":
    job = json.loads(sys.stdin.read())
    answer = sweep(Path(job["root"]), job["script"], job["words"], job["at"])
    print(json.dumps(answer))
