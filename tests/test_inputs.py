"""An input that is edited while it is merged ends the run; many files need few descriptors; several recipes share one analysis."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import families
import pytest
from clusters import digests, ray_address, running, state_of
from families import Family

import pcb_ray as package
from pcb_ray.analysis import analyse
from pcb_ray.cluster import cluster
from pcb_ray.files.store import open_store
from pcb_ray.planning import open_inputs, plan_of
from pcb_ray.recipe import Recipe
from pcb_ray.steps import placed, write


def edit_and_hide(path: Path) -> None:
    """One bit of the last element, and the file's times as they were."""
    was = path.stat()
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([byte ^ 1]))
    os.utime(path, ns=(was.st_atime_ns, was.st_mtime_ns))


def replace(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(path.read_bytes())
    os.replace(other, path)


@pytest.mark.ray
@pytest.mark.parametrize(
    ("sweep", "edit", "told"),
    [
        pytest.param(
            "ranks of beta", edit_and_hide, "wanted the bytes that the first sweep read, found others", id="a bit, hidden"
        ),
        pytest.param("write", replace, "wanted the file as it was when the run began", id="replaced"),
        pytest.param("sample of beta", os.utime, "wanted the file as it was when the run began", id="touched"),
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
    assert "Fix: let nothing write to the models" in run.text
    assert "--resume" not in run.text
    assert "Traceback" not in run.text
    assert not out.exists()
    assert not state_of(out).exists(), "thresholds of other models are worth nothing"


FEW = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (120, 120))
import torch, pcb_ray
from pathlib import Path
from pcb_ray import local
from pcb_ray.files.store import LocalStore
import os
os.sched_getaffinity = lambda _pid: set(range(16))  # sixteen threads, however many cores there are
print(pcb_ray.verify(sys.argv[1], quiet=True).problems)
"""


@pytest.mark.ray
def test_many_files_and_many_threads_need_few_descriptors(tmp_path: Path) -> None:
    """96 shards, 16 threads, and a limit of 120: `verify` reads them all."""
    shapes = {f"layers.{k}.weight": (64, 257) for k in range(24)}
    base, models = families.fine_tuned(3, shapes=shapes)
    family, out = Family(tmp_path / "family", base, models, shards=24), tmp_path / "out"
    ray_address()
    package.merge(family.recipe(), out, workers=2, max_shard_bytes=1, quiet=True)
    assert len(list(out.glob("*.safetensors"))) == 24
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] > 120
    done = subprocess.run([sys.executable, "-c", FEW, str(out)], capture_output=True, text=True, check=False, timeout=150)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "()"


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
    with cluster(None), placed(plans, workers=2, writes_to=tmp_path, quiet=True) as session:
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
        ({"thresholds": whole["thresholds"] | {"low": [0.1]}}, "thresholds: low of .*: wanted 3 numbers, found 1"),
        ({"N": 2, "inputs": whole["inputs"][:3]}, "N: wanted 3"),
        ({"D": 7}, "D: wanted"),
        ({"sizes": {"chunk_elements": 0}}, "sizes: wanted those of a plan"),
        ({"sizes": whole["sizes"] | {"copy_bytes": 0}}, "sizes: wanted those of a plan"),
        ({"method": "ties"}, "method: wanted"),
    ):
        (out / "pcb_receipt.json").write_text(json.dumps(whole | changes))
        with pytest.raises(package.RequestError, match=told):
            package.verify(out, quiet=True)
