"""An input that is edited while it is merged ends the run; many files need few descriptors; several recipes share one analysis."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import families
import pytest
from clusters import DEADLINE_S, await_that, digests, pcb_ray, ray_address, running, state_of
from evaluators_of_tests import edit_and_hide
from families import Family

import pcb_ray as package
from pcb_ray.analysis import analyse
from pcb_ray.cluster import ACCELERATORS, AUTH_MODE, cluster
from pcb_ray.files.stores import open_store
from pcb_ray.output.folder import Folder
from pcb_ray.output.state import State
from pcb_ray.planning import open_inputs, plan_of
from pcb_ray.recipe import Recipe
from pcb_ray.steps import placed, write

EVALUATORS = Path(__file__).with_name("evaluators_of_tests.py")


def replace(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(path.read_bytes())
    os.replace(other, path)


def cut_short(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.ray
@pytest.mark.parametrize(
    ("sweep", "edit", "told"),
    [
        pytest.param(
            "ranks of beta", edit_and_hide, "wanted the bytes that the first sweep read, found others", id="a bit, hidden"
        ),
        pytest.param("write", replace, "wanted the file as it was when the run began", id="replaced"),
        pytest.param(
            *("sample of beta", os.utime, "wanted the file as it was when the run began"), id="touched", marks=pytest.mark.very_slow
        ),
        pytest.param(
            *("ranks of beta", cut_short, "it was changed during the run"),
            id="cut short",
            marks=pytest.mark.very_slow,
        ),
    ],
)
def test_an_input_that_is_edited_during_the_run_ends_it_and_leaves_nothing(
    tmp_path: Path, sweep: str, edit: Callable[[Path], None], told: str
) -> None:
    family, out = Family(tmp_path / "family", *families.fine_tuned(3, scale=280)), tmp_path / "out"
    arguments = ("merge", family.recipe_file(), out, "--address", ray_address(), "--workers", 2)
    with running(*arguments) as run:
        run.wait_for(f"{sweep}: ")
        with run.stopped():
            edit(family.folder / "model1" / "model.safetensors")
        assert run.finish() == 2, run.text
    assert "model1" in run.text
    assert told in run.text
    assert "let nothing write to" in run.text
    assert "--resume" not in run.text
    assert "Traceback" not in run.text
    assert not out.exists()
    assert not state_of(out).exists(), "thresholds of other models are worth nothing"


@pytest.mark.very_slow
@pytest.mark.ray
@pytest.mark.parametrize("killed_in", ["sample of beta", pytest.param("write", marks=pytest.mark.very_slow)])
def test_an_input_that_is_edited_between_two_runs_of_a_merge_ends_the_second(tmp_path: Path, killed_in: str) -> None:
    """Its size and times are as they were, so that --resume begins; the digests of the first run are held against the bytes."""
    family, out = Family(tmp_path / "family", *families.fine_tuned(3, scale=280)), tmp_path / "out"
    arguments = ("merge", family.recipe_file(), out, "--address", ray_address(), "--workers", 2)
    journal = state_of(out) / "journal.jsonl"
    with running(*arguments) as run:
        run.wait_for(f"{killed_in}: ")
        if killed_in == "write":
            await_that("some parts are written", lambda: journal.exists() and journal.stat().st_size)
        run.send(signal.SIGKILL)
        assert run.finish() == -signal.SIGKILL
    assert state_of(out).is_dir()
    edit_and_hide(family.folder / "model1" / "model.safetensors")
    again = pcb_ray(*arguments, "--resume")
    assert again.process.returncode == 2, again.text
    assert "ranks of |tau|" not in again.text, "the first run has found them"
    assert "model1: wanted the bytes that the first sweep read, found others" in again.text
    assert "--resume" not in again.text
    assert "Traceback" not in again.text
    assert not out.exists()
    assert not state_of(out).exists()


@pytest.mark.ray
@pytest.mark.parametrize(
    ("command", "trials", "hidden", "told"),
    [
        pytest.param(
            *("search", 8, True, "model1: wanted the bytes that the first sweep read, found others"),
            id="a bit, hidden",
            marks=pytest.mark.very_slow,
        ),
        pytest.param("sweep", 2, False, "wanted the file as it was when the run began", id="sweep", marks=pytest.mark.very_slow),
    ],
)
def test_an_input_that_is_edited_during_the_trials_makes_no_output_and_costs_no_trial(
    tmp_path: Path, command: str, trials: int, hidden: bool, told: str
) -> None:
    family, out = Family(tmp_path / "family", *families.fine_tuned(2)), tmp_path / "out"
    edited = family.folder / "model1" / "model.safetensors"
    options = {"target": str(family.folder / "model0" / "model.safetensors"), "path": str(edited), "hidden": hidden}
    search = {"evaluator": {f"{EVALUATORS}:Edits": options}, "metric": "near", "budget": 8, "population": 8, "concurrency": 1}
    recipe = family.recipe_file(search=search, sweep={"lambda": [0.5, 1.0]})
    run = pcb_ray(command, recipe, out, "--allow-code", "--address", ray_address(), "--workers", 1)
    assert run.process.returncode == 2, run.text
    assert "model1" in run.text
    assert told in run.text
    assert "what the trials found is kept in" in run.text
    assert "--resume" not in run.text
    assert "Traceback" not in run.text
    assert not out.exists()
    assert (state_of(out) / "journal.jsonl").read_text().count('"trial ') == trials


FEW = """
import os, resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (120, 120))
os.sched_getaffinity = lambda _pid: set(range(16))  # sixteen threads, however many cores there are
from pathlib import Path
import families
from pcb_ray import cli, merge_state_dicts
from pcb_ray.planning import plan
from pcb_ray.recipe import Recipe
recipe, out, again = map(Path, sys.argv[1:])
made = plan(Recipe.from_file(recipe), max_shard_bytes=1)
local = families.merge_locally(made, again)
print("threads", len(local.session.owners.states))
print("same", all((out / name).read_bytes() == data for name, data in local.files.items()))
base, *models = (families.load(recipe.parent / name) for name in ("base", "model0", "model1", "model2"))
found, wanted = merge_state_dicts(base, models), families.load(out)
print("same", all(found[name].equal(wanted[name]) for name in wanted))
print("verify", cli.main(["verify", str(out)]))
"""


@pytest.mark.very_slow
@pytest.mark.ray
def test_many_files_and_many_threads_need_few_descriptors(tmp_path: Path) -> None:
    """96 shards, 16 threads, and a limit of 120: merges in one process and `pcb-ray verify` read them all."""
    shapes = {f"layers.{k}.weight": (256, 257) for k in range(24)}
    family, out = Family(tmp_path / "family", *families.fine_tuned(3, shapes=shapes), shards=24), tmp_path / "out"
    ray_address()
    recipe = family.recipe_file()
    package.merge(recipe, out, workers=2, max_shard_bytes=1, quiet=True)
    assert len(list(out.glob("*.safetensors"))) == 24
    assert len(list(family.folder.glob("*/*.safetensors"))) == 96
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] > 120
    command = [sys.executable, "-c", FEW, str(recipe), str(out), str(tmp_path / "again")]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=DEADLINE_S, cwd=Path(families.__file__).parent
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[:3] == ["threads 16", "same True", "same True"]
    assert lines[-1] == "verify 0", done.stdout + done.stderr


@pytest.mark.ray
def test_a_merge_in_a_process_that_runs_ray_leaves_its_environment_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    address = ray_address()
    import ray

    for name in (AUTH_MODE, ACCELERATORS):  # what a merge sets to start a Ray of its own
        monkeypatch.delenv(name)
    family, before = Family(tmp_path / "family", *families.fine_tuned(2)), dict(os.environ)
    for k, given in enumerate((None, address)):
        package.merge(family.recipe(), tmp_path / f"out{k}", workers=1, address=given, quiet=True)
        assert dict(os.environ) == before
    assert ray.is_initialized()


@pytest.mark.very_slow
@pytest.mark.ray
def test_several_recipes_over_one_session_share_what_their_analyses_share(tmp_path: Path) -> None:
    """Ten lambdas and two densities are a loop: |tau| is ranked once, beta once for each density, and each output is that of a
    merge of its own."""
    family = Family(tmp_path / "family", *families.fine_tuned(3, scale=40))
    first = Recipe.from_dict(family.recipe(parameters={"density": 0.2}), tmp_path)
    inputs = open_inputs(first)
    recipes = [
        first.with_parameters({"density": density, "lambda": lambda_ / 10}) for density in (0.2, 0.1) for lambda_ in range(1, 11, 2)
    ]
    plans = [plan_of(recipe, inputs) for recipe in recipes]
    names: list[str] = []
    ray_address()
    with (
        State(Folder(tmp_path / "state"), {}, {}) as state,
        cluster(None),
        placed(plans, workers=2, writes_to=lambda: state.place, quiet=True) as session,
    ):
        for k, made in enumerate(plans):
            session.begin(made)
            known = analyse(session)
            folder = tmp_path / f"out{k}"
            folder.mkdir()
            write(session, open_store(), known, str(folder))
            names += [sweep.name for sweep in session.sweeps]
    assert names.count("ranks of |tau|") == 1
    assert names.count("ranks of beta") == 2
    assert names.count("write") == len(recipes)
    for k in (0, 3, 7):
        package.merge(recipes[k], tmp_path / f"alone{k}", workers=1, quiet=True)
        file = "model.safetensors"
        assert digests(tmp_path / f"out{k}")[file] == digests(tmp_path / f"alone{k}")[file]


@pytest.mark.ray
def test_a_receipt_that_does_not_belong_to_its_output_is_refused_with_what_is_wrong(tmp_path: Path) -> None:
    """Thresholds of another length would be read beyond their end by the native kernel."""
    family, out = Family(tmp_path / "family", *families.fine_tuned(3)), tmp_path / "out"
    ray_address()
    package.merge(family.recipe(), out, workers=1, quiet=True)
    whole = json.loads((out / "pcb_receipt.json").read_text())
    assert package.verify(out, quiet=True).ok
    for changes, told in (
        ({"thresholds": {k: v for k, v in whole["thresholds"].items() if k != "low"}}, "thresholds: wanted"),
        ({"thresholds": whole["thresholds"] | {"low": [0.1]}}, "thresholds: low: wanted 3 numbers, one for each model, found 1"),
        ({"N": 2, "inputs": whole["inputs"][:3]}, "N: wanted 3"),
        ({"D": 7}, "D: wanted"),
        ({"sizes": {"chunk_elements": 0}}, "sizes: wanted those of a plan"),
        ({"sizes": whole["sizes"] | {"copy_bytes": 0}}, "sizes: wanted those of a plan"),
        ({"method": "ties"}, "method: wanted"),
    ):
        (out / "pcb_receipt.json").write_text(json.dumps(whole | changes))
        with pytest.raises(package.RequestError, match=told):
            package.verify(out, quiet=True)
