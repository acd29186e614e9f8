"""Inputs that change while they are read, in ways that their sizes and times don't tell."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import families
import pytest
from families import Family

from pcb_ray.analysis import analyse
from pcb_ray.errors import InputError
from pcb_ray.files.store import LocalStore
from pcb_ray.local import LocalOwners
from pcb_ray.merging import Kept
from pcb_ray.output.folder import Folder
from pcb_ray.output.state import State, asked_of
from pcb_ray.planning import Plan, fetched, open_inputs, plan
from pcb_ray.recipe import Recipe
from pcb_ray.searching.run import _with_basis
from pcb_ray.searching.scorer import Arm
from pcb_ray.session import Session
from pcb_ray.steps import ARITHMETIC, write_from


class Meddled(LocalStore):
    """Somebody changes something when so many bytes were read of a file."""

    def __init__(self, file: Path, after: int, change: Callable[[Path], None]) -> None:
        super().__init__()
        self.file, self.left, self.change = str(file), after, change

    def read(self, file: str, start: int, out: memoryview) -> None:
        super().read(file, start, out)
        if file == self.file:
            before, self.left = self.left, self.left - len(out)
            if before > 0 >= self.left:
                self.change(Path(file))


def flip(path: Path, at: int) -> None:
    """A bit changes, and the file's time is put back."""
    was = path.stat()
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))
    os.utime(path, ns=(was.st_atime_ns, was.st_mtime_ns))
    assert path.stat()[6] == was[6]
    assert path.stat().st_mtime_ns == was.st_mtime_ns


class Case(NamedTuple):
    made: Plan
    file: Path
    first: int
    """Where the model's first merged element lies in its file, and where the base's copied one."""
    copied: int
    base: Path


def case(tmp_path: Path, method: str) -> Case:
    with families.small_engine(chunk_elements=1024):
        family = Family(tmp_path / "family", *families.fine_tuned(2))
        made = plan(family.recipe(merge_method=method, exclude=["*embed_tokens*"]))
    file, base = (str(family.folder / name / "model.safetensors") for name in ("model1", "base"))
    (first,) = {t.start for one in made.tensors if one.first == 0 for t in one.sources if t is not None and t.file == file}
    (copied,) = (one.source.start for one in made.copies)
    return Case(made, Path(file), first, copied, Path(base))


def merged(one: Case, store: LocalStore, out: Path) -> None:
    out.mkdir()
    session = Session(one.made, lambda plan: LocalOwners(plan, store, threads=1))
    stamps = one.made.stamps
    write_from(stamps, session, store, analyse(session), str(out))


METHODS = ["linear", "task_arithmetic", "ties", "pcb"]


def late(one: Case, run: Callable[[LocalStore, str], object]) -> int:
    """When a run has read nearly all it reads of the model's file."""
    counted = Meddled(one.file, 1 << 40, lambda _: None)
    run(counted, "quiet")
    return (1 << 40) - counted.left - 8


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("what", ["merged", "copied"])
def test_a_bit_that_is_changed_behind_the_reader_is_told_though_the_time_was_put_back(
    tmp_path: Path, method: str, what: str
) -> None:
    one = case(tmp_path, method)
    after = late(one, lambda store, name: merged(one, store, tmp_path / name))
    file, at = (one.file, one.first) if what == "merged" else (one.base, one.copied)
    with pytest.raises(InputError, match=rf"{file.parent}.*wanted .*, found.* it was changed during the run") as told:
        merged(one, Meddled(one.file, after, lambda _: flip(file, at)), tmp_path / "out")
    assert "let nothing write to the models" in str(told.value)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "change", [lambda path: path.chmod(0o640), lambda path: os.link(path, path.with_name("backup"))], ids=["chmod", "link"]
)
def test_what_changes_no_byte_ends_no_merge(
    tmp_path: Path, method: str, change: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    """A backup that links the models, or a change of their mode, costs one more sweep."""
    one = case(tmp_path, method)
    after = late(one, lambda store, name: merged(one, store, tmp_path / name))
    assert caplog.messages == []
    merged(one, Meddled(one.file, after, change), tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (tmp_path / "quiet" / "model.safetensors").read_bytes()
    assert re.fullmatch(rf"{one.file}: touched during the run, .*", caplog.messages[-1])


@pytest.mark.parametrize("method", METHODS)
def test_a_bit_that_is_changed_between_two_runs_is_told_by_the_second(tmp_path: Path, method: str) -> None:
    one, out = case(tmp_path, method), tmp_path / "out"
    store = LocalStore()

    def run(*, resume: bool) -> None:
        stamps = one.made.stamps
        with State(Folder(out), asked_of(one.made, ARITHMETIC, stamps), stamps, resume=resume) as state:
            session = Session(one.made, lambda plan: LocalOwners(plan, store, threads=1))
            known = Kept(state.found, session, 0.0).analysed(state)
            write_from(state.stamps, session, store, known, state.place.files, state)

    run(resume=False)
    journal = Folder(out).folder / "journal.jsonl"
    lines = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join(lines[: len(lines) // 2]))  # as if it had been killed half-way
    flip(one.file, one.first)
    with pytest.raises(InputError, match=r"model1.*it was changed during the run"):
        run(resume=True)
    assert not Folder(out).is_unfinished


@pytest.mark.parametrize("method", ["task_arithmetic", "pcb"])
def test_a_bit_that_is_changed_while_a_basis_is_built_is_told(tmp_path: Path, method: str) -> None:
    one = case(tmp_path, method)

    def built(store: LocalStore, name: str) -> tuple[int, list[str]]:
        """How often the basis was built, and what is known of the inputs then."""
        (tmp_path / name).mkdir()
        with State(Folder(tmp_path / f"out-{name}"), {}, one.made.stamps) as state:
            session = Session(one.made, lambda plan: LocalOwners(plan, store, threads=1))
            _with_basis(Arm(one.made, str(tmp_path / name), {}), session, state, "", scored=False)
            return [sweep.name for sweep in session.sweeps].count("basis"), state.found["arms"][""]["inputs"]

    after = late(one, built)
    assert built(Meddled(one.file, after, lambda path: path.chmod(0o640)), "touched") == (2, built(LocalStore(), "again")[1])
    with pytest.raises(InputError, match=r"model1: wanted the bytes that the first sweep read, found others in the sweep `basis`"):
        built(Meddled(one.file, after, lambda path: flip(path, one.first)), "changed")


def test_a_local_model_that_is_replaced_while_others_are_downloaded_is_opened_again(tmp_path: Path) -> None:
    family = Family(tmp_path / "family", *families.fine_tuned(2))
    recipe = Recipe.from_dict(family.recipe())
    before = open_inputs(recipe)
    file = family.folder / "model1" / "model.safetensors"
    size = file.stat().st_size
    families.write(family.folder / "model1", dict(reversed(family.models[1].items())))  # the same size, another order
    raw = bytearray(file.read_bytes())
    header = raw[8 : 8 + int.from_bytes(raw[:8], "little")]
    raw[8 : 8 + len(header)] = header.replace(b'"format":"pt"', b'"format":"PT"')
    file.write_bytes(raw)
    assert file.stat().st_size == size
    after = fetched(recipe, before)
    assert after.base == before.base
    assert after.models[1].files[0].header_sha256 == hashlib.sha256(raw[: 8 + len(header)]).hexdigest()
    assert after.models[1].files != before.models[1].files
