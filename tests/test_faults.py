"""Whatever is killed, interrupted or filled up: the same bytes in the end, nothing under OUT before, and nothing left behind."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import families
import psutil
import pytest
from clusters import (
    Run,
    await_end,
    await_that,
    descendants,
    flip,
    owners_under,
    pcb_ray,
    ray_address,
    receipt_of,
    running,
    state_of,
    title,
    working,
)
from families import Family

import pcb_ray as package
from pcb_ray.cluster import MAX_TMPDIR
from pcb_ray.planning import Copied, Plan, plan
from pcb_ray.recipe import Recipe

# Ray closes its own sockets and log files late.
pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.filterwarnings("ignore::ResourceWarning")]

SWEEPS = ("sample of |tau|", "ranks of |tau|", "sample of beta", "ranks of beta", "write")
INTERRUPTED = 130


@pytest.fixture(autouse=True)
def nobody_left() -> None:
    """The owners of an earlier test are gone: a test that looks for its own must not find one of those."""
    await_end(owners_under(os.getpid()))


class Job(NamedTuple):
    family: Family
    recipe: Path
    plan: Plan
    expected: bytes  # of model.safetensors, made in one process without Ray


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """A merge of 5.7 M elements in 87 chunks: every sweep takes a good part of a second. Two tensors are copied."""
    folder = tmp_path_factory.mktemp("job")
    family = Family(folder / "family", *families.fine_tuned(3, scale=280))
    recipe = family.recipe_file(
        parameters={"density": 0.2}, exclude=["model.norm.weight", "model.layers.1.self_attn.o_proj.weight"]
    )
    made = plan(Recipe.from_file(recipe))
    local = families.merge_locally(made, folder / "local")
    return Job(family, recipe, made, local.files["model.safetensors"])


def assert_whole(out: Path, job: Job) -> None:
    """OUT is just what an undisturbed merge makes, and its state is gone."""
    assert (out / "model.safetensors").read_bytes() == job.expected
    assert {p.name for p in out.iterdir()} == {
        "model.safetensors",
        "config.json",
        "pcb_recipe.yaml",
        "pcb_receipt.json",
        "README.md",
    }
    assert package.verify(out, sample=2, quiet=True).ok
    assert not state_of(out).exists()


def bytes_read_for(made: Plan, number: int) -> int:
    """Of the inputs, for a part of the output: bfloat16 of the base and of three models, or what is copied."""
    return sum((s.stop - s.start) * (1 if isinstance(s, Copied) else 2 * 4) for s in made.parts[number].segments)


def joined(*arguments: object) -> tuple[object, ...]:
    """Arguments of a merge on the Ray that all tests share."""
    return ("merge", *arguments, "--address", ray_address())


def leftovers(run: Run) -> list[psutil.Process]:
    """All processes that this run started, on its own Ray or on the shared one."""
    return [*descendants(run.pid), *owners_under(os.getpid())]


# --- owners ---------------------------------------------------------------------------------------------------------------------


def test_an_owner_killed_in_each_sweep_changes_no_byte(job: Job, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with running(*joined(job.recipe, out, "--workers", 2)) as run:
        for sweep in SWEEPS:
            run.wait_for(f"{sweep}: ")
            with run.stopped():
                victim = next(p for p in owners_under(os.getpid()) if not title(p).startswith("ray::_Actor.use"))
                victim.kill()
        assert run.finish() == 0, run.text
    for sweep in SWEEPS:  # each death was met in its sweep: between the first line of the sweep and its last
        lines = [k for k, line in enumerate(run.lines) if line.startswith(f"{sweep}: ")]
        assert any(re.match(r"worker \d+ \(pid \d+ on \S+\) died", line) for line in run.lines[lines[0] : lines[-1]]), (
            sweep,
            run.text,
        )
    receipt = receipt_of(out)
    assert receipt["workers_lost"] == len(SWEEPS)
    assert receipt["full_sweeps"] == 3
    assert_whole(out, job)


@pytest.mark.very_slow
def test_a_part_of_the_model_that_keeps_killing_owners_ends_the_run_with_advice(tmp_path: Path) -> None:
    # One chunk, and so one part, with so many pairs of models that an owner works on it for long enough to be caught.
    family, out = Family(tmp_path / "family", *families.fine_tuned(40, scale=3)), tmp_path / "out"
    recipe = family.recipe_file(parameters={"density": 0.2, "variant": "paper"})
    with running(*joined(recipe, out, "--workers", 1)) as run:
        for _ in range(3):
            await_that("an owner starts", lambda: owners_under(os.getpid()))
            (owner,) = owners_under(os.getpid())
            await_that("it is at work", lambda owner=owner: working(owner))
            owner.kill()
            run.wait_for("its part is done again")
        assert run.finish() == 1, run.text
    assert re.search(r"^pcb-ray: 3 workers died, 3 of them on the same part .*--workers.*--resume", run.text, flags=re.MULTILINE), (
        run.text
    )
    assert "Traceback" not in run.text
    assert not out.exists()


def test_owners_that_all_die_at_their_start_end_the_run(job: Job, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with running(*joined(job.recipe, out, "--workers", 1)) as run:
        for _ in range(4):
            await_that("an owner starts", lambda: owners_under(os.getpid()))
            owners_under(os.getpid())[0].kill()
            run.wait_for("its part is done again")
        assert run.finish() == 1, run.text
    assert re.search(r"^pcb-ray: 4 workers died", run.text, flags=re.MULTILINE), run.text
    assert "Traceback" not in run.text
    assert not out.exists()


def test_without_a_cluster_to_join_there_is_advice_and_no_state(job: Job, tmp_path: Path) -> None:
    # The cluster wants a token, which Ray sends to a given address only if it is told to.
    run = pcb_ray(*joined(job.recipe, tmp_path / "out"), env={"RAY_AUTH_MODE": "disabled", "RAY_NUM_REDIS_GET_RETRIES": "1"})
    assert run.process.returncode == 1, run.text
    assert re.search(
        r"^pcb-ray: --address .*: wanted a Ray cluster, found none: .*RAY_AUTH_MODE=token", run.text, flags=re.MULTILINE
    ), run.text
    assert "Traceback" not in run.text
    assert list(tmp_path.iterdir()) == []


@pytest.mark.very_slow
def test_a_temporary_folder_too_long_for_sockets_is_told_before_anything_and_the_advice_helps(job: Job, tmp_path: Path) -> None:
    out = tmp_path / "out"

    def folder(length: int) -> str:
        """A path of so many bytes that is not below the test's own, which may be long itself."""
        path = Path(tempfile.mkdtemp(prefix="x", dir="/tmp"))
        path /= "y" * (length - len(str(path)) - 1)
        path.mkdir()
        return str(path)

    long, limit = folder(MAX_TMPDIR + 1), folder(MAX_TMPDIR)
    try:
        run = pcb_ray("merge", job.recipe, out, env={"TMPDIR": long})
        assert run.process.returncode == 2, run.text
        assert f"TMPDIR: wanted a path of at most {MAX_TMPDIR} bytes" in run.text
        assert "Fix: set RAY_TMPDIR to a short path, such as RAY_TMPDIR=/tmp." in run.text
        assert "--resume" not in run.text
        assert list(tmp_path.iterdir()) == []
        for name, env in (("advice", {"TMPDIR": long, "RAY_TMPDIR": "/tmp"}), ("limit", {"TMPDIR": limit})):
            run = pcb_ray("merge", job.recipe, tmp_path / name, "--workers", 1, env=env)
            assert run.process.returncode == 0, (name, run.text)
    finally:
        for path in (long, limit):
            shutil.rmtree(Path(path).parent)


# --- the driver -----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def orphans() -> Iterator[list[psutil.Process]]:
    """Helpers of a killed Ray that notice it a minute later; they must end too, which is seen after the other tests."""
    processes: list[psutil.Process] = []
    yield processes
    await_end(processes, timeout_s=90)


def test_a_driver_killed_in_each_sweep_is_resumed_to_the_same_bytes(
    job: Job, tmp_path: Path, orphans: list[psutil.Process]
) -> None:
    out = tmp_path / "out"
    state = state_of(out)
    journal = state / "journal.jsonl"
    for sweep in SWEEPS:
        # The first one has a Ray of its own, which must go with it; the others are replaced by a run of another number of workers.
        arguments = (
            ("merge", job.recipe, out)
            if sweep == SWEEPS[0]
            else joined(job.recipe, out, "--resume", "--workers", SWEEPS.index(sweep))
        )
        with running(*arguments) as run:
            run.wait_for(f"{sweep}: ")
            if sweep == "write":
                await_that("some parts are written", lambda: journal.exists() and journal.stat().st_size)
            processes = leftovers(run)
            assert processes
            run.send(signal.SIGKILL)
            assert run.finish() == -signal.SIGKILL
            assert f"{sweep}: 100%" not in run.text
            assert ("|tau|" in run.text) == (sweep in SWEEPS[:3])  # what was found is not looked for again
            agents = [p for p in processes if title(p).startswith(("ray::DashboardAgent", "ray::RuntimeEnvAgent"))]
            orphans += agents
            await_end([p for p in processes if p not in agents])
        assert not out.exists()

    # Analysis done, part of the output written: the rest is done, and nothing but the rest.
    thresholds = json.loads((state / "state.json").read_text())["found"]["thresholds"]
    written = {k: v for line in filter(None, journal.read_text().splitlines()) for k, v in json.loads(line).items()}
    done = {int(name.removeprefix("part ")) for name in written}
    assert 0 < len(done) < len(job.plan.parts)
    corrupt = max(done)
    flip(state / "out" / "model.safetensors", job.plan.parts[corrupt].stop - 1)
    with journal.open("a") as file:
        file.write('{"part 86": "00')  # the line that a crash cut off
    run = pcb_ray(*joined(job.recipe, out, "--resume", "--workers", 3, "-v"))
    assert run.process.returncode == 0, run.text
    assert "ranks of" not in run.text
    assert f"{len(done)} of {len(job.plan.parts)} parts were written before" in run.text
    receipt = receipt_of(out)
    assert receipt["thresholds"] == thresholds
    assert [s["name"] for s in receipt["sweeps"]] == list(SWEEPS)
    assert receipt["full_sweeps"] == 3
    assert receipt["bytes_read"] > sum(s["bytes"] for s in receipt["sweeps"]), "also what earlier runs read"
    todo = set(range(len(job.plan.parts))) - done | {corrupt}
    assert receipt["sweeps"][-1]["bytes"] == sum(bytes_read_for(job.plan, number) for number in todo)
    assert_whole(out, job)


@pytest.mark.very_slow
def test_interrupts_leave_nothing_under_out_and_no_process(job: Job, tmp_path: Path) -> None:
    out = tmp_path / "out"

    def interrupt(run: Run, number: int, *, group: bool) -> None:
        processes = leftovers(run)
        assert processes
        run.send(number, group=group)
        assert run.finish() == INTERRUPTED, run.text
        assert "pcb-ray: interrupted" in run.text
        assert "Traceback" not in run.text
        assert not out.exists()
        await_end(processes)

    with running("merge", job.recipe, out, "--workers", 1) as run:
        run.wait_for("ranks of beta: ")
        interrupt(run, signal.SIGINT, group=True)  # as Ctrl-C does
    with running("merge", job.recipe, out, "--workers", 1, "--resume") as run:
        run.wait_for("write: ")
        interrupt(run, signal.SIGTERM, group=False)
    run = pcb_ray(*joined(job.recipe, out, "--resume"))
    assert run.process.returncode == 0, run.text
    assert "ranks of" not in run.text
    assert_whole(out, job)


def test_an_interrupt_while_ray_starts_leaves_no_process(job: Job, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with running("merge", job.recipe, out) as run:
        await_that("Ray starts", lambda: any("gcs_server" in title(p) for p in descendants(run.pid)))
        processes = descendants(run.pid)
        run.send(signal.SIGINT, group=True)
        assert run.finish() == INTERRUPTED, run.text
        assert "Traceback" not in run.text
        assert not out.exists()
        await_end(processes)


# --- the disk -------------------------------------------------------------------------------------------------------------------


def test_a_disk_that_fills_up_ends_the_run_and_resume_finishes_it(job: Job, small_disk: Path) -> None:
    out, filler = small_disk / "out", small_disk / "filler"
    with running(*joined(job.recipe, out, "--workers", 2)) as run:
        run.wait_for("write: ")
        with run.stopped(), filler.open("wb") as file:
            file.write(bytes(shutil.disk_usage(small_disk).free - (1 << 20)))
        assert run.finish() == 1, run.text
    assert "Traceback" not in run.text
    assert re.search(r"^pcb-ray: .*No space left on device.*--resume", run.text, flags=re.MULTILINE), run.text
    assert not out.exists()

    full = pcb_ray(*joined(job.recipe, out, "--resume"))  # still full: told at once
    assert full.process.returncode == 2, full.text
    assert "free" in full.text

    filler.unlink()
    again = pcb_ray(*joined(job.recipe, out, "--resume", "--workers", 1))
    assert again.process.returncode == 0, again.text
    assert "ranks of" not in again.text
    assert_whole(out, job)


@pytest.mark.very_slow
def test_an_output_that_appears_during_a_merge_is_kept_and_resume_finishes_it(job: Job, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with running(*joined(job.recipe, out, "--workers", 2)) as run:
        run.wait_for("sample of |tau|: ")
        with run.stopped():
            out.mkdir()
            (out / "precious").write_text("kept")
        assert run.finish() == 1, run.text
    assert "Traceback" not in run.text
    assert re.search(r"^pcb-ray: .*wanted a free name .* Fix: move it away and finish with --resume", run.text, flags=re.MULTILINE)
    assert [p.name for p in out.iterdir()] == ["precious"]

    out.rename(tmp_path / "moved")
    again = pcb_ray(*joined(job.recipe, out, "--resume", "--workers", 1))
    assert again.process.returncode == 0, again.text
    assert "ranks of" not in again.text
    assert_whole(out, job)
    assert (tmp_path / "moved" / "precious").read_text() == "kept"


# --- what is refused ------------------------------------------------------------------------------------------------------------


def refused(*arguments: object) -> str:
    """What the command line says to a wrong request; it takes seconds and exit code 2."""
    start = time.monotonic()
    run = pcb_ray("merge", *arguments)
    assert run.process.returncode == 2, run.text
    assert "Traceback" not in run.text
    assert time.monotonic() - start < 20
    return run.text


@pytest.fixture(scope="module")
def unfinished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Family, Path, Path]:
    """A small family, its recipe, and the OUT of a merge of it that was killed."""
    folder = tmp_path_factory.mktemp("unfinished")
    family = Family(folder / "family", *families.fine_tuned(2, scale=30))
    recipe, out = family.recipe_file(parameters={"density": 0.2}), folder / "out"
    with running(*joined(recipe, out, "--workers", 1)) as run:
        run.wait_for("ranks of |tau|: ")
        run.send(signal.SIGKILL)
        run.finish()
    assert state_of(out).is_dir()
    return family, recipe, out


def test_an_unfinished_merge_is_neither_forgotten_nor_continued_unasked(unfinished: tuple[Family, Path, Path]) -> None:
    _, recipe, out = unfinished
    before = {p: p.read_bytes() for p in state_of(out).rglob("*") if p.is_file()}
    told = refused(recipe, out)
    assert "--resume" in told
    assert "--overwrite" in told
    assert {p: p.read_bytes() for p in state_of(out).rglob("*") if p.is_file()} == before


def test_resume_refuses_another_recipe(unfinished: tuple[Family, Path, Path]) -> None:
    family, _, out = unfinished
    told = refused(family.recipe_file("other.yaml", parameters={"density": 0.3}), out, "--resume")
    assert "0.2" in told
    assert "0.3" in told
    assert "--overwrite" in told


@pytest.mark.very_slow
def test_resume_refuses_inputs_that_were_touched_or_changed(unfinished: tuple[Family, Path, Path]) -> None:
    family, recipe, out = unfinished
    path = family.folder / "model1" / "model.safetensors"
    was, data = path.stat(), path.read_bytes()
    os.utime(path, ns=(was.st_atime_ns, was.st_mtime_ns + 1_000_000_000))
    assert str(path) in refused(recipe, out, "--resume")

    families.write(path.parent, {n: t.float() for n, t in family.models[1].items()})
    told = refused(recipe, out, "--resume")
    assert "--resume: this is not the merge that was begun" in told
    assert str(len(data)) in told
    assert str(path.stat().st_size) in told

    path.write_bytes(data)
    os.utime(path, ns=(was.st_atime_ns, was.st_mtime_ns))
    run = pcb_ray(*joined(recipe, out, "--resume"))
    assert run.process.returncode == 0, run.text
    assert package.verify(out, quiet=True).ok


def test_a_request_that_proves_wrong_only_on_the_cluster_leaves_no_state(job: Job, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run = pcb_ray(*joined(job.recipe, out, "--workers", 99))
    assert run.process.returncode == 2, run.text
    assert "--workers: wanted 99, found a cluster with 4 CPUs" in run.text
    assert list(tmp_path.iterdir()) == []


def test_an_output_in_the_way_is_refused_within_seconds(job: Job, tmp_path: Path) -> None:
    there = tmp_path / "there"
    there.mkdir()
    (there / "precious").write_text("kept")
    assert "--overwrite" in refused(job.recipe, there)
    assert (there / "precious").read_text() == "kept"
    (tmp_path / "file").write_text("kept")
    assert "is not a directory" in refused(job.recipe, tmp_path / "file", "--overwrite")
    for out in (job.family.folder / "base", job.family.folder / "base" / "merged", job.family.folder):
        assert "input" in refused(job.recipe, out, "--overwrite")
    assert (job.family.folder / "base" / "model.safetensors").exists()


def test_a_folder_that_cannot_be_written_is_refused_within_seconds(job: Job, small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    assert "can't write" in refused(job.recipe, small_disk / "out")


@pytest.mark.very_slow
def test_two_merges_to_one_out_cannot_run_at_once(job: Job, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with running(*joined(job.recipe, out, "--workers", 2)) as run:
        run.wait_for("sample of |tau|: ")
        with run.stopped():
            refused(job.recipe, out)
            for option in ("--resume", "--overwrite"):
                assert "another merge is writing it now" in refused(job.recipe, out, option)
        assert run.finish() == 0, run.text
    assert_whole(out, job)
