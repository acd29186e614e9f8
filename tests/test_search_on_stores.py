"""Searches whose models and results lie in a store, on nodes that share no disk."""

from __future__ import annotations

import collections
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import families
import pytest
import yaml
from clusters import DEADLINE_S, Run, await_that, pcb_ray
from families import Family
from machines import SCRATCH, machines
from object_servers import FaultProxy, ObjectServer, answer, s3_server
from test_prefix import held
from test_remote import SECRET, put_all, remote_recipe

import pcb_ray as package
from pcb_ray.planning import plan

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

HIDDEN = [1.4, 0.3]


@pytest.fixture(scope="module")
def server() -> Iterator[ObjectServer]:
    with s3_server() as server:
        yield server


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    """Two models, and the merge with hidden coefficients beside them."""
    made = Family(tmp_path_factory.mktemp("stores") / "family", *families.fine_tuned(2, scale=60))
    families.write(made.folder / "hidden", package.merge_state_dicts(made.base, made.models, weights=HIDDEN))
    (made.folder / "base" / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0}}}')
    return made


def recipe_of(family: Family, at: str, folder: Path, **search: Any) -> Path:
    """A recipe in a folder of its own, its evaluator beside it, of models in a store."""
    folder.mkdir(exist_ok=True)
    shutil.copy(Path(__file__).with_name("evaluators_of_tests.py"), folder / "near.py")
    target = {"target": str(family.folder / "hidden" / "model.safetensors")}
    asked = {"evaluator": {"near.py:Near": target}, "metric": "near", "budget": 12, "population": 4} | search
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(remote_recipe(at, 2, search=asked, sweep={"lambda": [0.5, 1.0], "density": [0.1, 0.2]})))
    return recipe


def table_in(run: Run) -> list[str]:
    """What a search has printed at its end."""
    return [line for line in run.lines if line.startswith(("base ", "model", "start ", "winner "))]


@pytest.mark.very_slow
def test_a_search_between_stores_merges_what_it_has_scored_and_leaves_nothing_else(
    server: ObjectServer, family: Family, tmp_path: Path
) -> None:
    at, out = put_all(server, family.folder, "models"), f"{server.uri}/found/out"
    recipe = recipe_of(family, at, tmp_path / "recipes", space={"density": {"lower": 0.05, "upper": 0.3}})
    command = ("search", recipe, out, "--workers", 1, "--cache", "30MB")
    with FaultProxy(server) as proxy:
        environment = server.through(proxy)
        busy = proxy.fail(answer(503, "SlowDown"), 5, step="put", key="basis")
        done = pcb_ray(*command, env=environment)
        assert done.process.returncode == 0, done.text
        assert busy.left == 0
        about = proxy.about(step="get")
        again = pcb_ray(*command, "--resume", env=environment)
        assert again.process.returncode == 0, again.text
        assert f"{out}: is this very search already" in again.text
        assert table_in(again) == table_in(done)
    there = held(server, "found/out")
    best = yaml.safe_load(there["best_recipe.yaml"].decode().replace(at, str(family.folder)))
    wanted = families.merge_locally(plan(best), tmp_path / "wanted").files
    assert there["model.safetensors"] == wanted["model.safetensors"]
    beside = {"report.html", "trials.parquet", "coefficients.png", "pcb_receipt.json", "pcb_search.json", "config.json"}
    assert beside | {"tokenizer.json"} <= there.keys()
    assert len([name for name in there if re.fullmatch(r"tune/trial_\w+/result.json", name)]) == 12
    assert not [name for name in there if ".pcb-ray" in name or name.endswith(".pkl")]
    assert server.uploads() == {}
    assert SECRET not in done.text
    assert not [name for name, data in there.items() if SECRET.encode() in data]
    assert not list(Path(f"/dev/shm/pcb-ray-{os.getuid()}").glob("*"))
    # By the analysis, by the winner's merge, and for trials (the base) or to be scored (a model).
    sizes = server.list("models/")
    whole = collections.Counter(request.key for request in about if 2 * request.sent > sizes.get(request.key, 1 << 40) > 65536)
    assert whole == dict.fromkeys((f"models/{name}/model.safetensors" for name in ("base", "model0", "model1")), 3)
    asked = [request.key for request in about if request.key.endswith(".basis")]
    assert 1 < len(asked) == len(set(asked)), "each volume once"


@pytest.mark.very_slow
def test_a_sweep_between_stores_leaves_its_table_and_nothing_else(server: ObjectServer, family: Family, tmp_path: Path) -> None:
    at, out = put_all(server, family.folder, "models"), f"{server.uri}/swept/out"
    recipe = recipe_of(family, at, tmp_path / "recipes")
    done = pcb_ray("sweep", recipe, out, "--workers", 1, env=server.environment)
    assert done.process.returncode == 0, done.text
    there = held(server, "swept/out")
    assert {"report.html", "sweep.parquet", "sweep.png", "best_recipe.yaml"} <= there.keys()
    assert not [name for name in there if ".pcb-ray" in name or name.endswith((".pkl", ".safetensors"))]


@pytest.mark.very_slow
def test_a_search_loses_a_node_and_then_its_drivers_machine_and_is_resumed_from_another(
    server: ObjectServer, family: Family, tmp_path: Path
) -> None:
    """Nodes share no disk: what trials read, each has fetched for itself."""
    at, out = put_all(server, family.folder, "models"), f"{server.uri}/lost/out"
    recipe = recipe_of(family, at, tmp_path / "recipes", budget=16)
    calm = pcb_ray("search", recipe, f"{server.uri}/calm/out", "--workers", 1, env=server.environment)
    assert calm.process.returncode == 0, calm.text
    with FaultProxy(server) as proxy, machines(3, server.through(proxy)) as (address, (_, first, second, third)):
        command = ("search", recipe, out, "--workers", 1, "--address", address, "--cache", "1MB", "--scratch", SCRATCH)
        with first.running(*command) as run:
            await_that("five trials", lambda: trials_noted(server, "lost") >= 5 or has_ended(run), DEADLINE_S)
            assert not has_ended(run), run.text
            second.cut_power()
            lost = trials_noted(server, "lost")
            await_that("three trials more", lambda: trials_noted(server, "lost") >= lost + 3 or has_ended(run), DEADLINE_S)
            assert third.rooms, "base and basis lie on its scratch"
            first.cut_power()
            run.finish()
        assert "pcb_receipt.json" not in held(server, "lost/out")
        noted = trials_noted(server, "lost")
        again = third.pcb_ray(*command, "--resume")
        assert again.process.returncode == 0, again.text
        assert f"{noted} candidates were tried before" in again.text
        assert not third.rooms
    ours, theirs = held(server, "lost/out"), held(server, "calm/out")
    assert ours["model.safetensors"] == theirs["model.safetensors"]
    assert ours["best_recipe.yaml"] == theirs["best_recipe.yaml"]


def has_ended(run: Run) -> bool:
    return run.process.poll() is not None


def trials_noted(server: ObjectServer, under: str) -> int:
    journal = f"{under}/.out.pcb-ray/journal.jsonl"
    return server.get(journal).count(b'"trial ') if journal in server.list(journal) else 0
