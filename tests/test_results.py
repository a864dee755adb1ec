"""common/{locks,publication}.py: locks, leftovers, publications; with real kills and simultaneous starts."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from common import locks, publication, results
from common.problems import UserError

ROOT = Path(__file__).resolve().parents[1]
HOLDER = """
import sys, time
from common import locks
from common.process import entry
def main():
    with locks.{lock}(sys.argv[1]):
        print("held", flush=True)
        time.sleep(float(sys.argv[2]))
sys.exit(entry(main))
"""


def hold(lock: str, place: Path, seconds: float) -> subprocess.Popen:
    code = HOLDER.format(root=str(ROOT), lock=lock)
    return subprocess.Popen(
        [sys.executable, "-c", code, str(place), str(seconds)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def in_child(work) -> int:
    """Exit status of `work()` in a forked process: 0 done, 1 an exception, 9 a death by `die_at`."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def die_at(number: int, names=("fsync", "replace", "rename", "mkdir", "unlink", "rmdir")) -> None:
    """End this process, as kill -9 would, instead of file operation `number`."""
    left = [number]

    def dying(real):
        def call(*words, **more):
            left[0] -= 1
            if left[0] < 0:
                os._exit(9)
            return real(*words, **more)

        return call

    for name in names:
        setattr(os, name, dying(getattr(os, name)))


# ---------------------------------------------------------------- locks


@pytest.mark.parametrize("lock", ["output_folder", "output_file"])
def test_a_second_run_is_refused_and_the_holder_named(tmp_path, lock):
    place = tmp_path / "new" / "place"
    first = hold(lock, place, 60)
    assert first.stdout.readline() == "held\n"
    second = hold(lock, place, 0)
    out, err = second.communicate(timeout=60)
    assert (second.returncode, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert err.startswith(f"{place}: in use by another run (process {first.pid} on ")
    assert first.poll() is None
    first.kill()
    first.wait()
    third = hold(lock, place, 0)  # a lock ends with its process
    assert third.communicate(timeout=60) == ("held\n", "")
    assert third.returncode == 0
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    fourth = hold(lock, tmp_path / "other" / "place", 0)
    assert fourth.communicate(timeout=60) == ("held\n", "")
    assert not (tmp_path / "other").exists()  # nothing was written into it


def test_of_many_that_start_at_once_one_wins(tmp_path):
    runs = [hold("output_folder", tmp_path / "run", 3) for _ in range(6)]
    assert sorted(run.communicate(timeout=60)[0] for run in runs) == [""] * 5 + ["held\n"]
    assert sorted(run.returncode for run in runs) == [0] + [2] * 5


def test_runs_of_other_scripts_may_write_to_the_same_folder(tmp_path):
    """evaluate and mia both write to the checkpoints of a tree, at once where there are two GPUs."""
    with locks.output_folder(tmp_path, key="purified") as place:
        pid = os.fork()
        if pid == 0:
            status = 1
            with locks.output_folder(tmp_path, key="mia"):
                status = 0
            try:
                with locks.output_folder(tmp_path, key="purified"):
                    os._exit(3)
            except UserError as error:
                os._exit(status if str(error).startswith(f"{tmp_path}: in use by another run (process") else 2)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert place.journal == tmp_path / ".purified.publish"
    assert not list(tmp_path.iterdir())


def test_a_worker_that_outlives_its_run_does_not_keep_the_lock(tmp_path):
    read, write = os.pipe()

    def run():
        with locks.output_folder(tmp_path):
            if os.fork() == 0:
                os.read(read, 1)  # an orphan, until the test ends
                os._exit(0)
            os._exit(0)

    assert in_child(run) == 0
    with locks.output_folder(tmp_path):
        assert (tmp_path / ".lock").exists()
    os.write(write, b"x")
    assert not list(tmp_path.iterdir())


def test_a_run_may_lock_its_place_again(tmp_path):
    with locks.output_folder(tmp_path), locks.output_folder(tmp_path):
        pass
    assert not (tmp_path / ".lock").exists()


def test_dry_runs_other_ranks_and_bad_places_lock_nothing(tmp_path, monkeypatch):
    with locks.output_folder(tmp_path / "new", dry_run=True):
        assert not (tmp_path / "new").exists()
    (tmp_path / "file").write_text("x")
    with locks.output_folder(tmp_path / "file"):  # the script's own check names it
        pass
    monkeypatch.setenv("RANK", "1")
    with locks.output_file(tmp_path / "new" / "a.jsonl"):
        assert not (tmp_path / "new").exists()


# ---------------------------------------------------------------- leftovers


def test_leftovers_of_dead_runs_go_those_of_live_ones_stay(tmp_path):
    def leave():
        with publication.atomic(tmp_path / "a.jsonl") as file, publication.atomic_folder(tmp_path / "m") as folder:
            (folder / "weights").write_text("x")
            file.write("x")
            with publication.temporary_folder(tmp_path, "work") as work:
                (work / "db").write_text("x")
                os._exit(9)

    assert in_child(leave) == 9
    (tmp_path / ".bashrc").write_text("x")
    (tmp_path / ".notes.tmp").write_text("x")  # not of the form that we write
    assert len(list(tmp_path.iterdir())) == 5
    with publication.atomic(tmp_path / "b.jsonl") as file, publication.atomic_folder(tmp_path / "n") as folder:
        pid = os.fork()
        if pid == 0:
            with locks.output_folder(tmp_path):
                os._exit(0)
        os.waitpid(pid, 0)
        file.write("alive")
        (folder / "weights").write_text("alive")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".bashrc", ".lock", ".notes.tmp", "b.jsonl", "n"]


def test_a_folder_that_was_being_replaced_is_brought_back(tmp_path):
    for version in "12":
        for number in range(100):

            def replace(version=version, number=number):
                die_at(number)
                with publication.atomic_folder(tmp_path / "m") as folder:
                    (folder / "weights").write_text(version)

            status = in_child(replace)
            with locks.output_folder(tmp_path):
                pass
            found = [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")]
            if version == "2" or found:
                assert sorted(found) == ["m", "m/weights"]
            if status == 0:
                break
        assert number >= 3
        assert (tmp_path / "m/weights").read_text() == version


# ---------------------------------------------------------------- several files as one


def publish(folder: Path, text: str) -> None:
    with locks.output_file(folder / "a.jsonl", folder / "keys" / "k.jsonl") as output:
        args = SimpleNamespace(seed=1)
        with results.Run(folder / "run_x.json", args, output=output) as run:
            run.files.write_jsonl(folder / "a.jsonl", [{"text": text}])
            run.files.write_jsonl(folder / "keys" / "k.jsonl", [{"key": text}], permissions=0o600)
            run.files.write_json(folder / "a.jsonl.meta.json", {"of": text})
            run.files.remove(folder / ".a.jsonl.partial")


def state(folder: Path) -> dict:
    files = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    texts = {name: path.read_text() for name, path in files.items()}
    if "run_x.json" in texts:
        texts["run_x.json"] = json.loads(texts["run_x.json"])["status"]
    return texts


@pytest.mark.parametrize("earlier", [None, "old"])
def test_a_publication_killed_anywhere_is_whole_or_absent_at_the_next_start(tmp_path, earlier):
    seen, status = set(), 9
    for number in range(200):
        folder = tmp_path / str(number)
        folder.mkdir()
        if earlier:
            publish(folder, earlier)
        before = {name: text for name, text in state(folder).items() if name != "run_x.json"}
        (folder / ".a.jsonl.partial").write_text("lines")

        def run(folder=folder, number=number):
            die_at(number)
            publish(folder, "new")

        status = in_child(run)
        if (folder / "a.jsonl").exists() and (folder / "a.jsonl.meta.json").exists():
            manifest = json.loads((folder / "a.jsonl.meta.json").read_text())
            seen.add(manifest["of"] in (folder / "a.jsonl").read_text())
        with locks.output_file(folder / "a.jsonl", folder / "keys" / "k.jsonl"):
            pass
        found = state(folder)
        record = found.pop("run_x.json", None)
        if ".a.jsonl.partial" in found:
            assert found == before | {".a.jsonl.partial": "lines"}
        else:
            assert record == "ok"
            assert sorted(found) == ["a.jsonl", "a.jsonl.meta.json", "keys/k.jsonl"]
            assert all("new" in text for text in found.values())
        if status == 0:
            break
    assert status == 0 and number > 15
    if earlier:
        assert seen == {True, False}  # between two renames the manifest is not that of the data file


def test_an_exception_publishes_nothing(tmp_path):
    with pytest.raises(RuntimeError), locks.output_folder(tmp_path) as output:
        with results.Run(tmp_path / "run_x.json", SimpleNamespace(), output=output) as run:
            run.files.write_json(tmp_path / "a.json", {})
            raise RuntimeError("no")
    assert state(tmp_path) == {"run_x.json": "failed"}


@pytest.mark.parametrize(
    "content",
    [
        {"rename": [["../.a.jsonl.12345678.tmp", "../a.jsonl.meta.json"]], "remove": []},
        {"rename": [["x", "a.jsonl"]], "remove": []},
        {"rename": [], "remove": ["../.bashrc"]},
        {"rename": [], "remove": ["a.jsonl"]},
        {"rename": 3},
    ],
)
def test_a_foreign_journal_is_refused(tmp_path, content):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".publish").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"\.publish: .*; remove it"), locks.output_folder(tmp_path / "out"):
        pass


# ---------------------------------------------------------------- modes


@pytest.mark.parametrize(("umask", "file", "folder"), [(0o022, 0o644, 0o755), (0o077, 0o600, 0o700), (0, 0o644, 0o777)])
def test_the_umask_is_respected(tmp_path, umask, file, folder):
    before = os.umask(umask)
    try:
        publication.write_json(tmp_path / "a.json", {})
        publication.write_jsonl(tmp_path / "b.jsonl", [], permissions=0o600)
        with publication.atomic_folder(tmp_path / "m") as made:
            (made / "weights").write_text("x")
            os.chmod(made / "weights", 0o600)
    finally:
        os.umask(before)
    modes = {str(path.relative_to(tmp_path)): path.stat().st_mode & 0o777 for path in tmp_path.rglob("*")}
    assert modes == {"a.json": file, "b.jsonl": 0o600, "m": folder, "m/weights": 0o600}


def test_a_signal_to_end_is_no_kill(tmp_path):
    run = hold("output_folder", tmp_path / "run", 60)
    assert run.stdout.readline() == "held\n"
    run.send_signal(signal.SIGTERM)
    assert run.communicate(timeout=60)[1] == "terminated\n"
    assert run.returncode == 143
    assert not list(tmp_path.iterdir())
