"""The stores: local files and arrays in memory behave alike, whatever the number of threads and of descriptors."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import os
import random
import resource
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pcb_ray.errors import InputError, RunError
from pcb_ray.files.store import LocalStore, MemoryStore, Stamp, Store

MakeStore = Callable[[dict[str, bytes]], Store]


@pytest.fixture(params=["local", "memory"])
def make(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MakeStore:
    """Makes a store that holds these files, by plain names: the local one lies in the current folder."""
    monkeypatch.chdir(tmp_path)

    def made(files: dict[str, bytes]) -> Store:
        if request.param == "memory":
            return MemoryStore({name: np.frombuffer(data, dtype=np.uint8).copy() for name, data in files.items()})
        for name, data in files.items():
            Path(name).write_bytes(data)
        return LocalStore()

    return made


def read(store: Store, file: str, start: int, stop: int) -> bytes:
    out = memoryview(bytearray(stop - start))
    store.read(file, start, out)
    return bytes(out)


def whole(store: Store, file: str) -> bytes:
    return read(store, file, 0, store.stamp(file).size)


def open_files_in(folder: Path) -> int:
    """How many descriptors lead there; others in this process may come and go."""
    links = [os.path.realpath(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd")]
    return sum(link.startswith(f"{folder}/") for link in links)


@contextmanager
def at_most(files: int) -> Iterator[None]:
    """In here this process can open no more than so many files, beside those that are open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(int(name) for name in os.listdir("/proc/self/fd"))
    taken: list[int] = []
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 1 + files, hard))
        with contextlib.suppress(OSError):
            while True:
                taken.append(os.dup(0))
        for _ in range(files):
            os.close(taken.pop())
        yield
    finally:
        for descriptor in taken:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


# ---------------------------------------------------------------------------------------------------- both stores


def test_ranges_digests_and_stamps_are_those_of_the_bytes(make: MakeStore) -> None:
    data = random.Random(0).randbytes(3_000_000)
    store = make({"a": data, "empty": b""})
    assert read(store, "a", 5, 1_000_005) == data[5:1_000_005]
    assert read(store, "a", 7, 7) == b""
    assert whole(store, "empty") == b""
    assert store.sha256("a") == hashlib.sha256(data).hexdigest()
    assert store.sha256("empty") == hashlib.sha256(b"").hexdigest()
    assert store.stamp("a").size == len(data)
    assert store.stamp("a") == store.stamp("a")
    seen = store.view("a", 10, 20)
    assert seen is None or seen.tobytes() == data[10:20]
    assert isinstance(store, LocalStore) == (seen is None)


def test_a_file_that_is_not_there_is_an_error_of_the_system_that_names_it(make: MakeStore) -> None:
    store = make({})
    asked: list[Callable[[], Any]] = [
        lambda: store.stamp("none"),
        lambda: read(store, "none", 0, 1),
        lambda: store.sha256("none"),
        lambda: store.part("none", 0, 1).__enter__(),
    ]
    for ask in asked:
        with pytest.raises(FileNotFoundError) as caught:
            ask()
        assert caught.value.filename == "none"
        assert caught.value.errno == errno.ENOENT


def test_a_read_beyond_the_end_tells_where_the_file_ends(make: MakeStore) -> None:
    store = make({"a": bytes(10)})
    with pytest.raises(InputError, match=r"^a: wanted data up to byte 12, found its end at byte 10: .*\. Fix: "):
        read(store, "a", 4, 12)
    assert read(store, "a", 4, 10) == bytes(6)


def test_parts_make_up_the_file_whatever_is_written_first_and_in_whatever_pieces(make: MakeStore) -> None:
    store = make({})
    store.create("out", 30)
    numbers = np.arange(3, dtype=np.uint16)
    with store.part("out", 20, 30) as later:
        later.write(b"klmno")
        with store.part("out", 0, 20) as first:
            first.write(numbers.reshape(1, 3))
            first.write(np.empty((0, 4), dtype=np.float32))
            first.write(memoryview(b"abcdefghijklmn"))
        later.write(b"pqrst")
    store.sync()
    assert whole(store, "out") == numbers.tobytes() + b"abcdefghijklmnklmnopqrst"


@pytest.mark.parametrize("given", [b"", b"abc", b"abcde"])
def test_a_part_that_gets_too_few_or_too_many_bytes_is_an_error(make: MakeStore, given: bytes) -> None:
    store = make({"out": b"." * 10})
    told = rf"^out: wanted the 4 bytes of the part from byte 3 on, found {len(given)}$"
    with pytest.raises(ValueError, match=told), store.part("out", 3, 7) as part:
        part.write(given)
    assert whole(store, "out")[7:] == b"..."  # what belongs to the next part was never touched
    with store.part("out", 3, 7) as part:
        part.write(b"abcd")
    assert whole(store, "out") == b"...abcd..."


def test_an_error_in_a_part_is_told_rather_than_the_bytes_that_are_missing_for_it(make: MakeStore) -> None:
    store = make({"out": bytes(10)})
    with pytest.raises(KeyError, match="mine"), store.part("out", 0, 4) as part:
        part.write(b"a")
        raise KeyError("mine")


def test_a_part_lies_within_the_file_as_it_was_created(make: MakeStore) -> None:
    store = make({"out": bytes(10)})
    for start, stop in ((8, 11), (11, 11), (-1, 3), (5, 4)):
        with pytest.raises(RunError, match=rf"^out: wanted bytes {start} to {stop}, found .* of 10 bytes.* Fix: "):
            store.part("out", start, stop).__enter__()
    assert store.stamp("out").size == 10


def test_a_file_that_is_there_is_brought_to_its_size_and_keeps_what_it_holds(make: MakeStore) -> None:
    store = make({"out": b"0123456789"})
    store.create("out", 10)
    assert whole(store, "out") == b"0123456789"
    store.create("out", 14)
    assert whole(store, "out") == b"0123456789\0\0\0\0"
    store.create("out", 3)
    assert whole(store, "out") == b"012"
    store.create("new", 2)
    assert whole(store, "new") == b"\0\0"


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 2**32), st.lists(st.integers(0, 40), min_size=1, max_size=8), st.integers(1, 6), st.integers(1, 4))
def test_many_threads_write_and_read_many_files_through_few_descriptors(
    make: MakeStore, seed: int, sizes: list[int], threads: int, descriptors: int
) -> None:
    rng = random.Random(seed)
    files = {f"{number}": rng.randbytes(size * 100) for number, size in enumerate(sizes)}
    store = make({})
    if isinstance(store, LocalStore):
        store = LocalStore(max_open=descriptors)
    for file in files:
        store.create(file, len(files[file]))
    parts = []
    for file, data in files.items():
        cuts = sorted({0, len(data), *(rng.randint(0, len(data)) for _ in range(4))})
        parts += [(file, start, stop) for start, stop in itertools.pairwise(cuts)]
    rng.shuffle(parts)

    def write(place: tuple[str, int, int]) -> None:
        file, start, stop = place
        with store.part(file, start, stop) as part:
            middle = (start + stop) // 2
            part.write(files[file][start:middle])
            part.write(files[file][middle:stop])
        store.sync()

    def compare(place: tuple[str, int, int]) -> bool:
        file, start, stop = place
        return read(store, file, start, stop) == files[file][start:stop]

    with ThreadPoolExecutor(threads) as pool:
        assert list(pool.map(write, parts)) == [None] * len(parts)
        assert all(pool.map(compare, parts * 3))
    assert [store.sha256(file) for file in files] == [hashlib.sha256(data).hexdigest() for data in files.values()]
    assert open_files_in(Path.cwd()) <= descriptors
    store.close()
    assert open_files_in(Path.cwd()) == 0


# ---------------------------------------------------------------------------------------------------- local files


def test_16_threads_read_96_files_under_a_limit_of_40_open_files(tmp_path: Path) -> None:
    data = {str(tmp_path / f"{number:02}"): bytes([number]) * 5000 for number in range(96)}
    for file, content in data.items():
        Path(file).write_bytes(content)
    with at_most(40):
        store = LocalStore()
        start = threading.Barrier(16)

        def read_all(seed: int) -> bool:
            start.wait(60)
            files = sorted(data)
            random.Random(seed).shuffle(files)
            return all(read(store, file, 100, 4000) == data[file][100:4000] for file in files)

        with ThreadPoolExecutor(16) as pool:
            assert all(pool.map(read_all, range(16)))
        store.close()
        assert open_files_in(tmp_path) == 0


def test_a_limit_that_others_use_up_leaves_the_store_with_one_file_at_a_time(tmp_path: Path) -> None:
    for name in "abc":
        (tmp_path / name).write_text(name)
    store = LocalStore(max_open=10)
    assert read(store, str(tmp_path / "a"), 0, 1) == b"a"
    with at_most(0):
        assert read(store, str(tmp_path / "b"), 0, 1) == b"b"  # in the place of a
        assert read(store, str(tmp_path / "c"), 0, 1) == b"c"
        store.close()
        taken = os.open(tmp_path / "a", os.O_RDONLY)
        for ask in (lambda: read(store, str(tmp_path / "a"), 0, 1), lambda: store.create(str(tmp_path / "d"), 1)):
            with pytest.raises(RunError, match=r"wanted one more open file, found all \d+ taken. Fix: raise the limit"):
                ask()
        os.close(taken)


def test_a_file_that_is_cut_short_while_it_is_read_is_told_with_its_new_end(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes(100_000))
    file, store = str(tmp_path / "a"), LocalStore()
    before = store.stamp(file)
    read(store, file, 0, 1000)
    os.truncate(file, 5000)
    with pytest.raises(InputError, match=r"found its end at byte 5000"):
        read(store, file, 4000, 6000)
    assert store.stamp(file) != before
    assert store.stamp(file) == Stamp(5000, os.stat(file).st_mtime_ns, os.stat(file).st_ctime_ns)


def test_a_reader_that_fails_to_open_its_file_lets_the_others_go_on(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"a" * 1000)
    store = LocalStore(max_open=1)

    def attempt(number: int) -> bool:
        try:
            return read(store, str(tmp_path / ("a" if number % 2 else "none")), 0, 1000) == b"a" * 1000
        except FileNotFoundError:
            return False

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(attempt, range(400), timeout=120)) == [number % 2 == 1 for number in range(400)]


def test_all_that_was_written_is_synced_before_its_descriptor_is_let_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    fsync = os.fsync

    def recorded(descriptor: int) -> None:
        synced.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", recorded)
    store = LocalStore(max_open=2)
    files = [str(tmp_path / f"{number}") for number in range(7)]
    for file in files:
        store.create(file, 4)
        for start in (0, 2):
            with store.part(file, start, start + 2) as part:
                part.write(b"ab")
    assert open_files_in(tmp_path) < 3
    store.sync()
    assert open_files_in(tmp_path) == 0
    assert {*map(os.path.basename, files), tmp_path.name} == {*synced}  # the folder has new entries
    synced.clear()
    store.sync()
    assert synced == []
    with pytest.raises(ValueError, match="wanted the 4 bytes"), store.part(files[0], 0, 4):
        pass
    with store.part(files[3], 0, 4) as part:
        part.write(b"abcd")
    store.sync()
    assert synced == ["3"]


def test_a_write_that_the_disk_lost_is_told_by_every_sync_that_follows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = LocalStore(max_open=1)  # so that leaving a part syncs at once
    file = str(tmp_path / "a")
    store.create(file, 1)

    def lost(descriptor: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lost)
        with store.part(file, 0, 1) as part:
            part.write(b"a")
    for _ in range(2):
        with pytest.raises(OSError, match="Input/output error") as caught:
            store.sync()
        assert caught.value.filename == file


def test_a_full_disk_is_told_with_the_file_s_name(tmp_path: Path) -> None:
    store, file = LocalStore(), str(tmp_path / "a")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    store.create(file, 50_000)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        for write in (lambda: store.create(str(tmp_path / "b"), 50_000), lambda: fill(store, file)):
            with pytest.raises(OSError, match="File too large") as caught:
                write()
            assert str(tmp_path) in str(caught.value.filename)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def fill(store: Store, file: str) -> None:
    with store.part(file, 0, 50_000) as part:
        part.write(bytes(50_000))


def test_the_store_loads_neither_torch_nor_ray() -> None:
    code = "import sys, pcb_ray.files.store; print(sorted({'torch', 'ray', 'huggingface_hub'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
