"""One process at a time writes an output, whatever the file system can lock and whoever died before."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pcb_ray import RequestError
from pcb_ray.output import lock
from pcb_ray.output.folder import Folder
from pcb_ray.output.lock import FolderLock, Holder
from pcb_ray.output.state import State

NO_FLOCK = """
#include <errno.h>
int flock(int file, int operation) { (void)file; (void)operation; errno = %s; return -1; }
"""
HOLD = """
import sys
from pathlib import Path
from pcb_ray import RequestError
from pcb_ray.output.folder import Folder
from pcb_ray.output.state import State
sys.stdin.readline()
try:
    with State(Folder(Path(sys.argv[1])), {"a": 1}, {}, resume=True):
        print("held", flush=True)
        sys.stdin.readline()
except RequestError as error:
    print(error, flush=True)
"""


@pytest.fixture
def no_flock(tmp_path: Path) -> Callable[..., dict[str, str]]:
    """Makes an environment for processes to which flock fails with an error, as on some network file systems."""
    gcc = shutil.which("gcc")
    if gcc is None:
        pytest.skip("needs gcc")

    def environment(error: str = "ENOLCK") -> dict[str, str]:
        source, library = tmp_path / f"{error}.c", tmp_path / f"{error}.so"
        source.write_text(NO_FLOCK % error)
        subprocess.run([gcc, "-shared", "-fPIC", "-o", library, source], check=True)
        return {**os.environ, "LD_PRELOAD": str(library)}

    return environment


@contextlib.contextmanager
def process(out: Path, environment: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    """A process that takes the state of OUT after it is told, prints how that went, and ends when it is told again."""
    pipe = subprocess.PIPE
    one = subprocess.Popen([sys.executable, "-c", HOLD, str(out)], env=environment, stdin=pipe, stdout=pipe, text=True)
    try:
        yield one
    finally:
        one.kill()
        one.communicate()


def answer(one: subprocess.Popen[str]) -> str:
    tell(one)
    assert one.stdout is not None
    return one.stdout.readline()


def tell(one: subprocess.Popen[str]) -> None:
    assert one.stdin is not None
    one.stdin.write("\n")
    one.stdin.flush()


def end(one: subprocess.Popen[str]) -> None:
    tell(one)
    assert one.wait(60) == 0


@pytest.mark.parametrize("error", ["ENOLCK", "EOPNOTSUPP", "ENOSYS"])
def test_where_flock_fails_the_lock_is_a_file_that_tells_its_holder(tmp_path, no_flock, error):
    out, environment = tmp_path / "out", no_flock(error)
    with process(out, environment) as first, process(out, environment) as second, process(out, environment) as third:
        assert answer(first) == "held\n"
        refused = answer(second)
        assert "another merge is writing it now" in refused
        assert f"locked by process {first.pid} on {socket.gethostname()} since 20" in refused
        assert f"if it is known to be dead, remove {tmp_path}/.out.pcb-ray/holder" in refused
        end(first)
        assert not (tmp_path / ".out.pcb-ray" / "holder").exists()
        assert answer(third) == "held\n"


def test_where_flock_fails_exactly_one_process_takes_the_place_of_a_dead_one(tmp_path, no_flock):
    out, environment = tmp_path / "out", no_flock()
    with process(out, environment) as first:
        assert answer(first) == "held\n"
        first.send_signal(signal.SIGKILL)
        first.wait()
    with contextlib.ExitStack() as stack:
        rivals = [stack.enter_context(process(out, environment)) for _ in range(4)]
        for one in rivals:
            tell(one)
        told = [one.stdout.readline() for one in rivals if one.stdout is not None]
        assert told.count("held\n") == 1
        assert sum("another merge is writing it now" in text for text in told) == 3
        end(rivals[told.index("held\n")])
        assert not list((tmp_path / ".out.pcb-ray").glob("holder*"))


def flock_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_file: int, _operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", fail)


def test_a_process_of_the_dead_ones_number_is_not_taken_for_it(tmp_path, monkeypatch):
    flock_fails(monkeypatch)
    me = Holder.this_process()
    for change, taken in (
        ({"started": me.started - 1}, True),
        ({}, False),
        ({"system": "another"}, False),
        ({"system": ""}, False),
    ):
        folder = tmp_path / str(change)
        folder.mkdir()
        (folder / "holder").write_text(json.dumps(json.loads(me.to_json()) | change))
        if taken:
            FolderLock(folder, tmp_path / "out").release()
            assert not folder.exists()
        else:
            with pytest.raises(RequestError, match=f"process {me.pid} on .* remove {folder}/holder"):
                FolderLock(folder, tmp_path / "out")


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"pid": 1}', "\xff"])
def test_a_holder_that_cannot_be_read_is_alive(tmp_path, monkeypatch, text):
    flock_fails(monkeypatch)
    (tmp_path / "holder").write_bytes(text.encode("latin-1"))
    with pytest.raises(RequestError, match="a process that left no name"):
        FolderLock(tmp_path, tmp_path / "out")
    (tmp_path / "holder").unlink()  # the advice, followed
    FolderLock(tmp_path, tmp_path / "out").release()


def test_one_that_sees_a_dead_holder_too_late_does_not_push_its_successor_out(tmp_path, monkeypatch):
    flock_fails(monkeypatch)
    dead = json.dumps(json.loads(Holder.this_process().to_json()) | {"started": 1})
    (tmp_path / "holder").write_text(dead)
    read, successors = Path.read_text, list[FolderLock]()

    def read_late(path: Path, *args: Any, **options: Any) -> str:
        text = read(path, *args, **options)
        if path.name == "holder" and not successors:
            monkeypatch.setattr(Path, "read_text", read)
            successors.append(FolderLock(tmp_path, tmp_path / "out"))
        return text

    monkeypatch.setattr(Path, "read_text", read_late)
    with pytest.raises(RequestError, match="another merge"):
        FolderLock(tmp_path, tmp_path / "out")
    assert (tmp_path / "holder").read_text() != dead
    successors[0].release()


def test_a_place_that_is_just_being_taken_is_left_alone(tmp_path, monkeypatch):
    flock_fails(monkeypatch)
    dead = Holder.of(json.dumps(json.loads(Holder.this_process().to_json()) | {"started": 1}))
    assert dead is not None
    (tmp_path / "holder").write_text(dead.to_json())
    claim = tmp_path / f"holder-{dead.pid}-1"
    claim.touch()
    with pytest.raises(RequestError, match=f"remove {tmp_path}/holder and {claim}"):
        FolderLock(tmp_path, tmp_path / "out")
    for path in (tmp_path / "holder", claim):  # the advice, followed
        path.unlink()
    FolderLock(tmp_path, tmp_path / "out").release()


# --- with flock -------------------------------------------------------------------------------------------------------------------


def test_a_lock_tells_its_holder(tmp_path):
    with (
        State(Folder(tmp_path / "out"), {}, {}),
        pytest.raises(RequestError, match=f"another merge is writing it now: .* by process {os.getpid()} on"),
    ):
        State(Folder(tmp_path / "out"), {}, {})


def test_a_lock_file_that_is_replaced_before_it_is_locked_locks_nobody_out(tmp_path, monkeypatch):
    folder, real = tmp_path / "state", fcntl.flock
    files = list[int]()

    def replaced_before(file: int, operation: int) -> None:
        if not files:
            (folder / "lock").unlink()
            files.append(os.open(folder / "lock", os.O_RDWR | os.O_CREAT))
            real(files[0], fcntl.LOCK_EX)
        real(file, operation)

    monkeypatch.setattr(fcntl, "flock", replaced_before)
    with pytest.raises(RequestError, match="another merge is writing it now"):
        FolderLock(folder, tmp_path / "out")
    os.close(files[0])
    FolderLock(folder, tmp_path / "out").release()
    assert not folder.exists()


@pytest.mark.parametrize("when", ["before it is opened", "before it is locked"])
def test_a_folder_that_is_removed_meanwhile_is_made_again(tmp_path, monkeypatch, when):
    folder, flock, mkdir = tmp_path / "state", fcntl.flock, Path.mkdir
    removed = list[Path]()

    def remove() -> None:
        if not removed:
            removed.append(folder)
            shutil.rmtree(folder)

    def make_and_lose(path: Path, *args: Any, **options: Any) -> None:
        mkdir(path, *args, **options)
        remove()

    def lose_and_lock(file: int, operation: int) -> None:
        remove()
        flock(file, operation)

    if when == "before it is opened":
        monkeypatch.setattr(Path, "mkdir", make_and_lose)
    else:
        monkeypatch.setattr(fcntl, "flock", lose_and_lock)
    one = FolderLock(folder, tmp_path / "out")
    assert removed
    with pytest.raises(RequestError, match="another merge"):
        FolderLock(folder, tmp_path / "out")
    one.release()


def test_what_else_keeps_it_from_being_locked_is_told(tmp_path, monkeypatch):
    def fail(_file: int, _operation: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "flock", fail)
    with pytest.raises(RequestError, match=r"wanted to lock .*, found: Input/output error\. Fix: write to a folder"):
        FolderLock(tmp_path / "state", tmp_path / "out")


def test_a_folder_that_is_replaced_again_and_again_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "_is_at", lambda *_: False)
    with pytest.raises(RequestError, match="replaced 100 times"):
        FolderLock(tmp_path / "state", tmp_path / "out")


def test_releasing_twice_leaves_the_next_holder_alone(tmp_path, monkeypatch):
    for prepare in (lambda: None, lambda: flock_fails(monkeypatch)):
        prepare()
        first = FolderLock(tmp_path / "state", tmp_path / "out")
        first.release()
        second = FolderLock(tmp_path / "state", tmp_path / "out")
        first.release()
        with pytest.raises(RequestError, match="another merge"):
            FolderLock(tmp_path / "state", tmp_path / "out")
        second.release()
