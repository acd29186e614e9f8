"""Where the trials of a search run: on nodes with the labels that were asked for, several on one GPU, and on others when a node
goes."""

from __future__ import annotations

import collections
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import families
import pyarrow.parquet
import pytest
import yaml
from clusters import (
    BIN,
    DEADLINE_S,
    Head,
    await_that,
    can_be_apart,
    head_node,
    joining_node,
    node_apart,
    pcb_ray,
    running,
    state_of,
)
from families import Family
from test_nodes_on_ray import asked

import pcb_ray as package

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.very_slow,
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]

HIDDEN = [1.4, 0.3]


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    """Two models, and the merge with hidden coefficients beside them."""
    return made_in(tmp_path_factory.mktemp("nodes") / "family")


def made_in(folder: Path) -> Family:
    made = Family(folder, *families.fine_tuned(2, scale=4))
    families.write(made.folder / "hidden", package.merge_state_dicts(made.base, made.models, weights=HIDDEN))
    return made


def recipe_of(family: Family, folder: Path, name: str, options: dict[str, Any], **search: Any) -> Path:
    folder.mkdir(exist_ok=True)
    shutil.copy(Path(__file__).with_name("evaluators_of_tests.py"), folder / "near.py")
    given = {"target": str(family.folder / "hidden" / "model.safetensors")} | options
    asked_for = {"evaluator": {f"near.py:{name}": given}, "metric": "near", "budget": 12, "population": 4} | search
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(family.recipe(search=asked_for)))
    return recipe


def rows_of(out: Path) -> list[dict[str, Any]]:
    return list(pyarrow.parquet.read_table(out / "trials.parquet").to_pylist())


def test_trials_go_where_the_label_says_and_share_a_gpu(family: Family, tmp_path: Path) -> None:
    seen, out = tmp_path / "seen", tmp_path / "out"
    each = {"cpu": 0.5, "gpu": 0.5, "memory": "100MB"}
    recipe = recipe_of(family, tmp_path / "recipes", "SeesGpus", {"log": str(seen)}, resources_per_trial=each)
    with head_node(cpus=0) as head, ExitStack() as stack:
        stack.enter_context(joining_node(head, "score", "--labels", "pool=score", "--num-gpus", 1, cpus=2))
        stack.enter_context(joining_node(head, "other", "--labels", "pool=other", "--num-gpus", 1, cpus=2))
        command = ("search", recipe, out, "--workers", 1, "--address", head.address, "--label", "pool=score")
        done = pcb_ray(*command, env=head.environment)
        assert done.process.returncode == 0, done.text
        none = pcb_ray(*command[:-1], "pool=none", "--overwrite", env=head.environment)
    pids = dict(line.split() for line in seen.read_text().splitlines())
    assert set(pids.values()) == {"0"}
    rows = rows_of(out)
    assert all(row["error"] == "" for row in rows)
    assert none.process.returncode == 2, none.text
    assert "wanted a node with 0.5 CPUs, 0.5 GPUs and 100 MB of memory and --label pool=none, found" in none.text
    tried = collections.Counter(line.split()[0] for line in seen.read_text().splitlines())
    busiest = sorted(tried.values())[-2:]
    assert sum(busiest) == 12
    assert busiest[0] >= 3, "two processes tried candidates side by side"


def test_a_node_that_is_drained_costs_its_trials_only(family: Family, tmp_path: Path) -> None:
    options = {"uneven_s": 1.0, "digits": 1}
    recipe, out = recipe_of(family, tmp_path / "recipes", "Near", options, budget=20), tmp_path / "out"
    package.search(recipe, tmp_path / "calm", workers=1, address="local", quiet=True)
    journal = state_of(out) / "journal.jsonl"
    with head_node(cpus=0) as head, ExitStack() as stack:
        stack.enter_context(joining_node(head, "staying"))
        leaving = stack.enter_context(joining_node(head, "leaving", "--labels", "pool=leaving"))
        with running("search", recipe, out, "--workers", 1, "--address", head.address, env=head.environment) as run:
            await_that("five trials", lambda: journal.exists() and journal.read_text().count('"trial ') >= 5, DEADLINE_S)
            drain(head, "leaving")
            leaving.terminate()  # as its machine is, some seconds after the notice
            await_that("the node has ended", lambda: leaving.poll() is not None, DEADLINE_S)
            assert run.finish() == 0, run.text
    assert all(row["error"] == "" for row in rows_of(out))
    assert len(rows_of(out)) == 20
    configs = [{k: v for k, v in row.items() if k.startswith("weight")} for row in rows_of(out)]
    assert configs == [{k: v for k, v in row.items() if k.startswith("weight")} for row in rows_of(tmp_path / "calm")]
    assert (out / "best_recipe.yaml").read_bytes() == (tmp_path / "calm" / "best_recipe.yaml").read_bytes()


LABELLED = """
import json, sys
from pcb_ray.cluster import cluster
from pcb_ray.nodes import nodes
with cluster(sys.argv[1]):
    print(json.dumps({node.labels.get("pool", ""): node.id for node in nodes()}))
"""


def drain(head: Head, pool: str) -> None:
    """As a spot instance is, with little time left."""
    node = asked(head, LABELLED)[pool]
    command = [BIN / "ray", "drain-node", "--address", head.address, "--node-id", node]
    reason = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "test", "--deadline-remaining-seconds", "3"]
    subprocess.run([*command, *reason], env=head.environment, check=True, capture_output=True)


@pytest.fixture
def own_disk() -> Iterator[Path]:
    """A folder that other nodes don't see."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder)


@pytest.mark.skipif(not can_be_apart(), reason="no right to make namespaces here")
def test_a_node_that_does_not_see_the_base_is_named_before_anything_is_scored(own_disk: Path, tmp_path: Path) -> None:
    one, scored = made_in(own_disk / "family"), tmp_path / "scored"
    recipe = recipe_of(one, tmp_path / "recipes", "Near", {"log": str(scored)})
    with head_node(cpus=1) as head, node_apart(head, "elsewhere"):
        done = pcb_ray("search", recipe, tmp_path / "out", "--workers", 1, "--address", head.address, env=head.environment)
    assert done.process.returncode == 2, done.text
    base = one.folder / "base" / "model.safetensors"
    assert f"node elsewhere: {base}: wanted what trials read there, found: No such file or directory" in done.text
    assert not scored.exists()
