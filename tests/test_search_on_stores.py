"""Searches whose models and results lie in a store, on nodes that share no disk."""

from __future__ import annotations

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


def winner_of(text: bytes) -> dict[str, Any]:
    """What a best recipe says of coefficients."""
    recipe = yaml.safe_load(text)
    return {"parameters": recipe.get("parameters"), "weights": [model["parameters"] for model in recipe["models"]]}


def test_a_search_between_stores_gives_what_one_on_a_disk_gives_and_fetches_base_and_basis_once(
    server: ObjectServer, family: Family, tmp_path: Path
) -> None:
    at, out = put_all(server, family.folder, "models"), f"{server.uri}/found/out"
    recipe = recipe_of(family, at, tmp_path / "recipes", space={"density": {"lower": 0.05, "upper": 0.3}})
    local = tmp_path / "recipes" / "local.yaml"
    local.write_text(yaml.safe_dump(yaml.safe_load(recipe.read_text()) | family.recipe()))
    command = ("--workers", 1, "--cache", "30MB")
    on_disk = pcb_ray("search", local, tmp_path / "out", *command)
    assert on_disk.process.returncode == 0, on_disk.text
    with FaultProxy(server) as proxy:
        environment = server.through(proxy)
        busy = proxy.fail(answer(503, "SlowDown"), 5, step="put", key="basis")
        done = pcb_ray("search", recipe, out, *command, env=environment)
        assert done.process.returncode == 0, done.text
        assert busy.left == 0
        taken = proxy.fetched()
        checked = pcb_ray("verify", out, env=environment)
        assert checked.process.returncode == 0, checked.text
    there = held(server, "found/out")
    assert there["model.safetensors"] == (tmp_path / "out" / "model.safetensors").read_bytes()
    assert winner_of(there["best_recipe.yaml"]) == winner_of((tmp_path / "out" / "best_recipe.yaml").read_bytes())
    beside = {"report.html", "trials.parquet", "coefficients.png", "pcb_receipt.json", "config.json", "tokenizer.json"}
    assert beside <= there.keys()
    assert len([name for name in there if re.fullmatch(r"tune/trial_\w+/result.json", name)]) == 12
    assert not [name for name in there if ".pcb-ray" in name or name.endswith(".pkl")]
    assert server.uploads() == {}
    assert SECRET not in done.text
    assert not [name for name, data in there.items() if SECRET.encode() in data]
    # The analysis fetches each model once, and the winner's merge; trials fetch base and basis; experts are scored once each.
    sizes = server.list("models/")
    of_base, of_models = (sum(size for key, size in sizes.items() if f"/{name}" in key) for name in ("base", "model"))
    basis = {key: size for key, size in taken.items() if "basis" in key}
    assert basis
    assert set(taken) >= set(basis)
    fetched = {name: sum(size for key, size in taken.items() if f"models/{name}" in key) for name in ("base", "model")}
    assert fetched["base"] < 3.3 * of_base
    assert fetched["model"] < 3.3 * of_models


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
    assert winner_of(ours["best_recipe.yaml"]) == winner_of(theirs["best_recipe.yaml"])


def has_ended(run: Run) -> bool:
    return run.process.poll() is not None


def trials_noted(server: ObjectServer, under: str) -> int:
    journal = f"{under}/.out.pcb-ray/journal.jsonl"
    return server.get(journal).count(b'"trial ') if journal in server.list(journal) else 0
