"""The search on Ray: what it finds, that a seed decides it, that failures cost their trials only, and that it reads no model
twice."""

from __future__ import annotations

import collections
import dataclasses
import json
import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

import families
import psutil
import pyarrow.parquet
import pytest
import torch
from clusters import DEADLINE_S, await_that, flip, pcb_ray, ray_address, receipt_of, running, state_of
from families import Family

import pcb_ray as package
from pcb_ray import Recipe, RequestError, RunError
from pcb_ray.output.state import State
from pcb_ray.planning import plan
from pcb_ray.searching.results import Found

pytestmark = [
    pytest.mark.ray,
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

TOKEN = "hf_" + "x9" * 17
HIDDEN = [1.4, 0.3, 0.8]
EVALUATORS = Path(__file__).parent / "evaluators_of_tests.py"


@pytest.fixture(scope="module", autouse=True)
def shared_ray() -> str:
    """Ray is running in this process: `search` uses it."""
    return ray_address()


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    """Three models, and the merge with hidden coefficients beside them."""
    made = Family(tmp_path_factory.mktemp("search") / "family", *families.fine_tuned(3, scale=4))
    families.write(made.folder / "hidden", package.merge_state_dicts(made.base, made.models, weights=HIDDEN))
    return made


def recipe_of(family: Family, name: str = "Near", options: dict[str, Any] | None = None, **search: Any) -> dict[str, Any]:
    given = {"target": str(family.folder / "hidden" / "model.safetensors")} | (options or {})
    return family.recipe(
        search={"evaluator": {f"{EVALUATORS}:{name}": given}, "metric": "near", "budget": 16, "population": 8, "concurrency": 1}
        | search
    )


def trials_of(out: Path) -> list[dict[str, Any]]:
    return list(pyarrow.parquet.read_table(out / "trials.parquet").to_pylist())


def coefficients(out: Path) -> list[dict[str, Any]]:
    return [
        {k: v for k, v in row.items() if k.startswith("weight") or k in ("lambda", "density", "variant")} for row in trials_of(out)
    ]


def searched(recipe: dict[str, Any], out: Path, **options: Any) -> Found:
    return package.search(recipe, out, workers=1, quiet=True, **options)


def written_in(out: Path) -> dict[Path, tuple[int, int]]:
    """When, and which file, each is."""
    return {path: ((found := path.stat()).st_mtime_ns, found.st_ino) for path in out.rglob("*")}


def near_of(out: Path, family: Family) -> float:
    """What `Near` says of the merged model in a folder."""
    hidden = families.load(family.folder / "hidden")
    return -sum(float(((t.float() - hidden[name].float()) ** 2).sum()) for name, t in families.load(out).items())


# --- what it finds ----------------------------------------------------------------------------------------------------------------


def test_a_search_finds_hidden_coefficients_and_merges_them(family, tmp_path):
    from ray import tune

    out, log = tmp_path / "out", tmp_path / "log"
    recipe = recipe_of(family, options={"log": str(log), "note": TOKEN}, budget=80, concurrency=2, loggers=["tensorboard"])
    found = searched(recipe, out)
    metric = {name: scores["val"]["near"] for name, scores in found.scores.items()}
    assert metric["winner"] > 0.05 * metric["start"], metric
    weights = [found.recipe.models[i].weight[0][1] for i in range(3)]
    assert weights == pytest.approx(HIDDEN, abs=0.15)

    rows = trials_of(out)
    assert [row["number"] for row in rows] == list(range(80))
    assert max(row["objective"] for row in rows) == metric["winner"]
    assert all(row["error"] == "" and row["seconds"] > 0 and row["node"] for row in rows)
    # The model is what the ordinary merge of best_recipe.yaml gives, and what was scored.
    again = tmp_path / "again"
    package.merge(out / "best_recipe.yaml", again, workers=1, quiet=True)
    assert (out / "model.safetensors").read_bytes() == (again / "model.safetensors").read_bytes()
    assert package.verify(out, quiet=True).ok
    assert near_of(out, family) == pytest.approx(metric["winner"], abs=2e-6)

    lines = log.read_text().splitlines()
    assert sum(line.startswith("load") for line in lines) <= 1 + 2 + 4, (
        "once for the dry score, per trial process, and per scorer of references"
    )
    assert lines.count("score test") == 1 + 3 + 1 + 1, "base, experts, start, winner"
    for name in ("report.html", "best_so_far.png", "coefficients.png", "parallel.png"):
        assert (out / name).stat().st_size > 1000, name
    assert "://" not in (out / "report.html").read_text(), "self-contained"
    assert not state_of(out).exists()
    assert [path for path in out.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()] == []

    # Tune's own tools and TensorBoard read the experiment.
    analysis = tune.ExperimentAnalysis(str(out / "tune"), default_metric="objective", default_mode="max")
    assert sorted(analysis.dataframe()["objective"]) == sorted(row["objective"] for row in rows)
    assert analysis.best_config["weight.model0"] == weights[0]
    assert len(list(out.glob("tune/*/events.out.tfevents*"))) == 80

    # To ask again for what is there does nothing; for anything else, or for what is not whole, is refused.
    before = written_in(out)
    again = searched(recipe, out, resume=True)
    assert again == dataclasses.replace(found, request=again.request)
    assert written_in(out) == before
    loads = len(log.read_text().splitlines())
    for change, complaint in (
        ({"budget": 88}, "budget was '80', now '88'"),
        ({"seed": 1}, "asked.search.seed was '0', now '1'"),
        ({"options": {"log": str(log), "note": "another"}}, "another evaluator has scored its candidates"),
    ):
        asked: dict[str, Any] = {"options": {"log": str(log), "note": TOKEN}, "budget": 80, "loggers": ["tensorboard"]}
        with pytest.raises(RequestError, match="exists") as caught:
            searched(recipe_of(family, **asked | {"concurrency": 2} | change), out, resume=True)
        assert complaint in str(caught.value)
    (out / "config.json").write_text("{}")
    with pytest.raises(RequestError, match="config.json: wanted sha256"):
        searched(recipe, out, resume=True)
    assert len(log.read_text().splitlines()) == loads


@pytest.mark.very_slow
def test_groups_lambda_density_and_variant_are_searched_and_the_recipe_reproduces_the_bytes(family, tmp_path):
    out = tmp_path / "out"
    space = {
        "groups": {"attention": "*self_attn*", "layers": 2},
        "lambda": {"lower": 0.5, "upper": 1.5},
        "density": {"lower": 0.02, "upper": 0.4},
        "variant": ["pairwise", "released"],
    }
    found = searched(recipe_of(family, space=space), out)
    rows = trials_of(out)
    assert {row["variant"] for row in rows} <= {"pairwise", "released"}
    assert all(0.02 <= row["density"] <= 0.4 and 0.5 <= row["lambda"] <= 1.5 for row in rows)
    assert len({row["density"] for row in rows}) > 8
    again = tmp_path / "again"
    package.merge(out / "best_recipe.yaml", again, workers=1, quiet=True)
    assert (out / "model.safetensors").read_bytes() == (again / "model.safetensors").read_bytes()
    thresholds = [receipt_of(folder)["thresholds"] for folder in (out, again)]
    assert thresholds[0] == thresholds[1]
    # The score that the search saw is that of the model in OUT, rounded as it is.
    assert near_of(out, family) == pytest.approx(found.scores["winner"]["val"]["near"], abs=2e-6)


@pytest.mark.very_slow
def test_an_evaluator_can_be_an_object_of_python(family, tmp_path):
    class Norm:
        """The smaller the model, the better. Pickled by value: it names nothing of the tests."""

        def load(self, model_dir: Path) -> torch.nn.Module:
            from safetensors.torch import load_file

            from pcb_ray.searching.evaluators import module_of

            self.module = module_of({name: t.float() for name, t in load_file(Path(model_dir) / "model.safetensors").items()})
            return self.module

        def score(self, split: str) -> dict[str, float]:
            return {"norm": sum(float((b**2).sum()) for b in self.module.buffers())}

    recipe = family.recipe(search={"metric": "norm", "mode": "min", "budget": 8, "concurrency": 1})
    found = searched(recipe, tmp_path / "out", evaluator=Norm())
    assert found.scores["winner"]["val"]["norm"] <= found.scores["start"]["val"]["norm"]


# --- a seed decides ---------------------------------------------------------------------------------------------------------------


def uneven(family: Family, concurrency: int) -> dict[str, Any]:
    """Trials of uneven length, and scores that tie often."""
    return recipe_of(family, options={"digits": 1, "uneven_s": 0.15}, budget=24, concurrency=concurrency, seed=3)


@pytest.fixture(scope="module")
def calm(family: Family, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What such a search gives in one trial process, when nothing happens to it."""
    out = tmp_path_factory.mktemp("calm") / "out"
    searched(uneven(family, 1), out)
    assert len({row["objective"] for row in trials_of(out)}) < 14, "the tests want ties"
    return out


def assert_same_search(one: Path, other: Path) -> None:
    assert coefficients(one) == coefficients(other)
    assert [row["objective"] for row in trials_of(one)] == [row["objective"] for row in trials_of(other)]
    assert (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()


@pytest.mark.very_slow
def test_a_seed_gives_the_same_candidates_whatever_finishes_first(family, calm, tmp_path):
    searched(uneven(family, 2), tmp_path / "two")
    assert_same_search(tmp_path / "two", calm)
    results = [json.loads(path.read_text()) for path in tmp_path.glob("two/tune/*/result.json")]
    processes = collections.Counter(result["pid"] for result in results)
    assert len(processes) == 2, "each keeps its model from the first generation to the last"
    assert min(processes.values()) >= 4, "trials shorter than the start of a process are run by both all the same"


@pytest.mark.very_slow
def test_a_search_that_is_killed_and_interrupted_is_resumed_with_the_same_candidates(family, calm, tmp_path):
    """`kill -9` in the middle of the trials, then Ctrl-C on the run that goes on, then one that ends."""
    recipe, out = tmp_path / "recipe.yaml", tmp_path / "out"
    recipe.write_text(json.dumps(uneven(family, 2)))
    journal = state_of(out) / "journal.jsonl"
    command = ("search", recipe, out, "--allow-code", "--workers", 1, "--address", ray_address())

    def trials() -> int:
        return journal.read_text().count('"trial ') if journal.exists() else 0

    with running(*command) as run:
        await_that("five trials", lambda: trials() >= 5, DEADLINE_S)
        os.killpg(run.process.pid, signal.SIGKILL)
        run.process.wait(DEADLINE_S)
    killed_at = trials()
    with running(*command, "--resume") as run:
        await_that("three trials more", lambda: trials() >= killed_at + 3, DEADLINE_S)
        os.killpg(run.process.pid, signal.SIGINT)
        assert run.process.wait(DEADLINE_S) == 130
    assert not out.exists()
    assert trials() < 24
    resumed = pcb_ray(*command, "--resume", "-v")
    assert not any("ranks of" in line for line in resumed.lines), "the analysis is kept"
    assert_same_search(out, calm)


@pytest.mark.very_slow
def test_a_trial_process_that_dies_while_it_idles_costs_no_trial(family, tmp_path):
    """Two processes and generations of three: one has its results and is held, the other is still at its first. The idle one is
    killed."""
    recipe, out, pids = tmp_path / "recipe.yaml", tmp_path / "out", tmp_path / "pids"
    pids.mkdir()
    asked = recipe_of(family, "SlowOnce", options={"folder": str(pids)}, budget=9, population=3, concurrency=2)
    recipe.write_text(json.dumps(asked))
    journal = state_of(out) / "journal.jsonl"
    with running("search", recipe, out, "--allow-code", "--workers", 1, "--address", ray_address()) as run:
        await_that("a trial of a quick process", lambda: journal.exists() and '"trial ' in journal.read_text(), DEADLINE_S)
        slow = os.readlink(pids / "slow")
        quick = next(p.name[4:] for p in pids.glob("pid-*") if p.name[4:] != slow)
        os.kill(int(quick), signal.SIGKILL)
        assert run.finish() == 0, run.text
    assert ", 2 running" in run.text
    rows = trials_of(out)
    assert [row["number"] for row in rows] == list(range(9))
    assert all(row["error"] == "" for row in rows)


@pytest.mark.very_slow
def test_a_lost_node_costs_no_trial_and_changes_no_candidate(family, calm, three_nodes, tmp_path):
    recipe, out = tmp_path / "recipe.yaml", tmp_path / "out"
    recipe.write_text(json.dumps(uneven(family, 3)))
    journal = state_of(out) / "journal.jsonl"
    with running("search", recipe, out, "--allow-code", "--workers", 1, "--address", three_nodes.address) as run:
        await_that("five trials", lambda: journal.exists() and journal.read_text().count('"trial ') >= 5, DEADLINE_S)
        three_nodes.remove_node(next(iter(three_nodes.worker_nodes)), allow_graceful=False)
        assert run.finish() == 0, run.text
    assert all(row["error"] == "" for row in trials_of(out))
    assert_same_search(out, calm)


# --- failures ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.very_slow
def test_a_trial_that_raises_hangs_dies_or_gives_nan_costs_itself_only(family, tmp_path):
    out = tmp_path / "out"
    ways = ["raise", "nan", "hang", "die", "", "", "", "", ""]
    recipe = recipe_of(family, "Sick", {"ways": ways}, budget=20, trial_timeout=0.5, concurrency=2)
    found = searched(recipe, out)
    errors = [row["error"] for row in trials_of(out)]
    assert len(errors) == 20
    for sign in ("ValueError: no score", "TimeoutError", "near is nan", "the trial process died"):
        assert any(sign in error for error in errors), (sign, errors)
    healthy = [row["objective"] for row in trials_of(out) if not row["error"]]
    assert healthy
    assert found.failed == sum(map(bool, errors))
    assert all(row["objective"] is None for row in trials_of(out) if row["error"])


@pytest.mark.very_slow
def test_a_trial_that_takes_the_memory_of_its_node_costs_itself_only(family, tmp_path, monkeypatch):
    """Ray ends its process when more than 3 GB above what is in use now are taken."""
    from ray.cluster_utils import Cluster

    memory = psutil.virtual_memory()
    monkeypatch.setenv("RAY_memory_usage_threshold", str((memory.total - memory.available + 3e9) / memory.total))
    monkeypatch.setenv("RAY_memory_monitor_refresh_ms", "100")
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False, "object_store_memory": 80 << 20}
    )
    recipe, out = tmp_path / "recipe.yaml", tmp_path / "out"
    recipe.write_text(json.dumps(recipe_of(family, "Sick", {"ways": ["hog", *[""] * 5]}, budget=8)))
    try:
        with running("search", recipe, out, "--allow-code", "--workers", 1, "--address", cluster.address) as run:
            assert run.finish() == 0, run.text
    finally:
        cluster.shutdown()
    errors = [row["error"] for row in trials_of(out)]
    assert len(errors) == 8
    assert 0 < sum("low on memory" in error for error in errors) == sum(map(bool, errors)) < 8, errors


@pytest.mark.very_slow
def test_a_scorer_of_the_references_that_dies_is_replaced(family, tmp_path, caplog):
    out, marker = tmp_path / "out", tmp_path / "marker"
    found = searched(recipe_of(family, "DiesOnce", {"marker": str(marker)}, budget=8), out)
    assert marker.exists()
    assert "has no score" not in caplog.text
    for name in ("base", "model0", "model1", "model2", "start", "winner"):
        assert set(found.scores[name]) == {"val", "test"}
        assert all("near" in metrics for metrics in found.scores[name].values())


@pytest.mark.very_slow
def test_a_search_that_fails_too_often_stops_with_the_reason_and_goes_on_when_its_evaluator_is_mended(family, tmp_path, caplog):
    out, mine = tmp_path / "out", tmp_path / "mine.py"
    mine.write_text(EVALUATORS.read_text())
    recipe = recipe_of(family)
    target = str(family.folder / "hidden" / "model.safetensors")
    recipe["search"]["evaluator"] = {f"{mine}:Sick": {"target": target, "ways": ["", *["raise"] * 9]}}
    with pytest.raises(RunError, match=r"more than a quarter of the 16 trials failed in a row.*no score for"):
        searched(recipe, out)
    assert not out.exists()
    lines = filter(None, (state_of(out) / "journal.jsonl").read_text().splitlines())
    before = [json.loads(text) for line in lines for key, text in json.loads(line).items() if key.startswith("trial ")]
    assert len(before) > 4
    scored = sum(not record["error"] for record in before)
    mine.write_text(EVALUATORS.read_text().replace('if way == "raise"', 'if way == "never"'))
    searched(recipe, out, resume=True)
    assert (f"{scored} candidates that were scored before count no more" in caplog.text) == (scored > 0)
    assert [row["error"] for row in trials_of(out)] == [""] * 16


@pytest.mark.parametrize(
    ("name", "search", "complaint"),
    [
        ("Nearest", {}, "wanted 'Nearest' in it, found no such name"),
        ("Near", {"metric": "nearness"}, "search.metric"),
        ("ValOnly", {}, "KeyError: 'test'"),
        ("NanBase", {}, "wanted a finite near of the base on val, found nan"),
        ("Near", {"resources_per_trial": {"cpu": 5}}, "wanted a node with 5 CPUs"),
        ("Near", {"resources_per_trial": {"gpu": 1}}, "wanted a node with 1 CPUs, 1 GPUs"),
        ("Near", {"resources_per_trial": {"memory": "9TB"}}, "and 9 TB of memory, found 4 CPUs"),
        ("Near", {"optimizer": "CMAs"}, "another of Nevergrad's, found 'CMAs'. Fix: write CMA."),
    ],
)
def test_a_wrong_evaluator_or_request_is_told_before_anything_is_computed(family, tmp_path, name, search, complaint):
    out = tmp_path / "out"
    recipe = recipe_of(family, name, **search)
    with pytest.raises(RequestError) as caught:
        searched(recipe, out)
    assert complaint in str(caught.value)
    assert "Fix:" in str(caught.value)
    assert not out.exists()
    assert not state_of(out).exists(), "nothing to resume"


def test_an_evaluator_that_cant_be_sent_to_trial_processes_is_told(family, tmp_path):
    import threading

    class Locked:
        def __init__(self) -> None:
            self.lock = threading.Lock()

        def load(self, model_dir: Path) -> torch.nn.Module: ...

        def score(self, split: str) -> dict[str, float]: ...

    recipe = family.recipe(search={"metric": "norm", "budget": 8})
    with pytest.raises(RequestError, match=r"sent to trial processes, found that Locked can't: TypeError.*lock.*Fix: open files"):
        searched(recipe, tmp_path / "out", evaluator=Locked())
    assert not state_of(tmp_path / "out").exists()


@pytest.mark.very_slow
def test_trial_processes_that_cant_load_lose_no_candidate(family, tmp_path):
    """The first three trial processes can't, as where a mount is missing; the base was scored before. The others score all that was
    asked."""
    out, tries = tmp_path / "out", tmp_path / "tries"
    tries.mkdir()
    found = searched(recipe_of(family, "LoadsLate", {"folder": str(tries)}, budget=12, population=4, concurrency=2), out)
    assert len(list(tries.iterdir())) >= 5, "the dry score, three that could not, one that could"
    assert found.failed == 0
    assert [row["error"] for row in trials_of(out)] == [""] * 12


@pytest.mark.very_slow
def test_a_search_whose_trial_processes_cant_load_ends_with_the_reason(family, tmp_path):
    tries = tmp_path / "tries"
    tries.mkdir()
    recipe = recipe_of(family, "LoadsLate", {"folder": str(tries), "failing": 99}, budget=12, population=4, concurrency=2)
    told = r"found \d+ trial processes after another that could not load; the last: .*FileNotFoundError: no mount \(evaluators_of"
    with pytest.raises(RunError, match=told):
        searched(recipe, tmp_path / "out")


@pytest.mark.very_slow
def test_the_process_of_the_caller_is_left_as_it_was(family, tmp_path, monkeypatch):
    """And an evaluator of the recipe opens what lies beside the recipe, also in trials, whose folders Tune would make the current
    one."""
    import logging

    import tensorboardX  # noqa: F401 - libraries of the search set variables when they are imported

    from pcb_ray.searching import report, tune  # noqa: F401

    before, level = dict(os.environ), logging.getLogger("ray.tune").level
    (tmp_path / "beside.txt").write_text("here")
    (tmp_path / "neighbour.py").write_text("from pathlib import Path\ndef read():\n    return Path('beside.txt').read_text()\n")
    (tmp_path / "mine.py").write_text(
        "import neighbour\nfrom evaluators_of_tests import Near\n"
        "class Reads(Near):\n    def score(self, split):\n        return super().score(split) | {'read': float(neighbour.read() "
        "== 'here')}\n"
    )
    (tmp_path / "evaluators_of_tests.py").write_text(EVALUATORS.read_text())
    asked = recipe_of(family, budget=8)
    asked["search"]["evaluator"] = {"mine.py:Reads": asked["search"]["evaluator"].popitem()[1]}
    (tmp_path / "recipe.yaml").write_text(json.dumps(asked))
    searched(tmp_path / "recipe.yaml", tmp_path / "out")
    assert {row["metric.read"] for row in trials_of(tmp_path / "out")} == {1.0}
    assert {k: v for k, v in os.environ.items() if before.get(k) != v} == {}
    assert logging.getLogger("ray.tune").level == level


@pytest.mark.very_slow
@pytest.mark.parametrize("method", ["pcb", "task_arithmetic"])
def test_a_search_interrupted_in_the_merge_of_its_winner_scores_nothing_again(family, tmp_path, monkeypatch, method):
    from pcb_ray.searching import run

    out, log = tmp_path / "out", tmp_path / "log"
    recipe = recipe_of(family, options={"log": str(log)}, budget=8) | {"merge_method": method}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(run, "publish", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        searched(recipe, out)
    scored = log.read_text().count("score")
    searched(recipe, out, resume=True)
    assert log.read_text().count("score") == scored
    assert package.verify(out, quiet=True).ok


@pytest.mark.very_slow
@pytest.mark.parametrize("what", ["search", "sweep"])
def test_an_output_that_appears_during_a_search_is_kept_and_no_score_is_lost(family, tmp_path, monkeypatch, what):
    out, log = tmp_path / "out", tmp_path / "log"
    recipe = recipe_of(family, options={"log": str(log)}, budget=8)
    go: Any = searched
    if what == "sweep":
        recipe, go = recipe | {"sweep": {"lambda": [0.8, 1.2]}}, partial(package.sweep, workers=1, quiet=True)
    commit = State.commit

    def late(state: State) -> None:
        if state.place.out == str(out):
            out.mkdir()
            (out / "precious").write_text("kept")
        commit(state)

    with monkeypatch.context() as patch, pytest.raises(RunError, match="appeared during the run.*finish with --resume"):
        patch.setattr(State, "commit", late)
        go(recipe, out)
    assert [p.name for p in out.iterdir()] == ["precious"]
    scored = log.read_text().count("score")
    out.rename(tmp_path / "moved")
    go(recipe, out, resume=True)
    assert (out / "best_recipe.yaml").is_file()
    assert (out / "tune").is_dir()
    assert log.read_text().count("score") == scored
    assert not state_of(out).exists()


@pytest.mark.very_slow
@pytest.mark.parametrize("what", ["search", "sweep"])
def test_a_model_that_was_changed_while_its_merges_were_scored_is_told(family, tmp_path, monkeypatch, what):
    from pcb_ray.searching import tune

    one, out, run_trials = Family(tmp_path / "family", family.base, family.models), tmp_path / "out", tune.run_trials

    def changed(*args: Any, **options: Any) -> Any:
        families.write(one.folder / "model1", family.models[0])
        return run_trials(*args, **options)

    monkeypatch.setattr(tune, "run_trials", changed)
    target = str(family.folder / "hidden" / "model.safetensors")
    recipe = recipe_of(one, options={"target": target}, budget=8) | ({"sweep": {"lambda": [0.8]}} if what == "sweep" else {})
    with pytest.raises(RequestError, match=r"model1.*it was changed during the run"):
        (package.sweep if what == "sweep" else package.search)(recipe, out, workers=1, quiet=True)
    assert not out.exists()


@pytest.mark.very_slow
def test_a_grid_of_lambda_does_not_take_the_basis_of_one_of_densities(family, tmp_path, monkeypatch):
    """An interrupted sweep is resumed with another grid of as many points: its basis is of the other kind."""
    from pcb_ray.searching import tune

    out, run_trials = tmp_path / "out", tune.run_trials
    monkeypatch.setattr(tune, "run_trials", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        package.sweep(recipe_of(family) | {"sweep": {"density": [0.05, 0.1]}}, out, workers=1, quiet=True)
    monkeypatch.setattr(tune, "run_trials", run_trials)
    found = package.sweep(recipe_of(family) | {"sweep": {"lambda": [0.8, 1.2]}}, out, workers=1, quiet=True, resume=True)
    for row in found.records:
        merged = package.merge_state_dicts(family.base, family.models, lambda_=row["config"]["lambda"])
        families.write(tmp_path / "merged", merged)
        assert row["objective"] == pytest.approx(near_of(tmp_path / "merged", family), abs=2e-6)


# --- methods of one's own ---------------------------------------------------------------------------------------------------------


EXAMPLE = Path(__file__).parent.parent / "examples" / "trimmed_mean.py"


def own_method(folder: Path, *replacements: tuple[str, str]) -> str:
    """The method of the example, changed, in a file of its own: what a recipe names it by."""
    text = EXAMPLE.read_text()
    for old, new in replacements:
        assert old in text
        text = text.replace(old, new)
    (folder / "own.py").write_text(text)
    return f"{folder / 'own.py'}:trimmed_mean"


@pytest.mark.very_slow
def test_a_method_of_ones_own_that_is_linear_is_searched_and_swept(family, tmp_path):
    own = {"merge_method": own_method(tmp_path), "parameters": {"keep": 0.9, "lambda": 0.7}}
    found = searched(recipe_of(family, space={"lambda": {"lower": 0.5, "upper": 2.0}}) | own, tmp_path / "out")
    assert set(found.best) == {"weight.model0", "weight.model1", "weight.model2", "lambda"}
    assert_own_winner(found, tmp_path, family)
    swept = package.sweep(recipe_of(family) | own | {"sweep": {"lambda": [0.4, 1.3]}}, tmp_path / "swept", workers=1, quiet=True)
    for row in swept.records:
        merged = tmp_path / f"merged{row['number']}"
        package.merge(family.recipe(**own | {"parameters": {"keep": 0.9} | row["config"]}), merged, workers=1, quiet=True)
        assert row["objective"] == pytest.approx(near_of(merged, family), abs=2e-6)


@pytest.mark.very_slow
def test_a_lambda_that_is_not_searched_is_that_of_the_recipe_in_all_candidates(family, tmp_path):
    """It may stand for anything, such as what the thresholds are made from: nothing is taken out of the basis for it."""
    changed = (
        ("fraction, lambda_parameter", "fraction, number"),
        ("lambda_parameter()", 'Parameter(1.0, number, "how far")'),
    )
    own = {"merge_method": own_method(tmp_path, *changed), "parameters": {"keep": 0.9, "lambda": 0.7}}
    found = searched(recipe_of(family) | own, tmp_path / "out")
    assert set(found.best) == {"weight.model0", "weight.model1", "weight.model2"}
    assert_own_winner(found, tmp_path, family)


def assert_own_winner(found: Found, folder: Path, family: Family) -> None:
    """What was scored is what is written, and what the ordinary merge gives."""
    out, again = folder / "out", folder / "again"
    assert near_of(out, family) == pytest.approx(found.scores["winner"]["val"]["near"], abs=2e-6)
    package.merge(out / "best_recipe.yaml", again, allow_code=True, workers=1, quiet=True)
    assert (out / "model.safetensors").read_bytes() == (again / "model.safetensors").read_bytes()
    assert package.verify(out, method=folder / "own.py", quiet=True).ok


@pytest.mark.parametrize("weight", ["weight * weight", "weight * (weight if block.first >= settings.D // 2 else 1)"])
def test_a_method_of_ones_own_that_is_not_linear_as_it_says_is_refused_before_any_trial(family, tmp_path, weight):
    """Also where it departs from that in a part of the model."""
    out, log = tmp_path / "out", tmp_path / "log"
    method = own_method(tmp_path, ("0.0) * weight", f"0.0) * {weight}"))
    with pytest.raises(RequestError, match=r"merge_method: wanted .*own.py:trimmed_mean linear.*departs.*Fix: set `linear=False`"):
        searched(recipe_of(family, options={"log": str(log)}) | {"merge_method": method}, out)
    assert log.read_text().count("score") == 2, "the base, on both splits"
    assert not state_of(out).exists()


def test_a_method_of_ones_own_that_does_not_say_it_is_linear_is_not_searched(family, tmp_path):
    method = own_method(tmp_path, ("linear=True", "linear=False"))
    for go, section in ((package.search, {}), (package.sweep, {"sweep": {"lambda": [1.0]}})):
        with pytest.raises(
            RequestError, match=r"merge_method: wanted a method with a base that says it is linear.*found .*own.py:"
        ):
            go(recipe_of(family) | {"merge_method": method} | section, tmp_path / "out", workers=1, quiet=True)
    assert not state_of(tmp_path / "out").exists()


# --- what is kept of an unfinished search -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Family:
    """Two models of 5.5 M elements, in 84 chunks."""
    made = Family(tmp_path_factory.mktemp("large") / "family", *families.fine_tuned(2, scale=280))
    families.write(made.folder / "hidden", package.merge_state_dicts(made.base, made.models, weights=HIDDEN[:2]))
    return made


@pytest.mark.very_slow
def test_the_merge_of_the_winner_that_was_killed_goes_on_where_it_was(large, tmp_path):
    recipe, out, log = tmp_path / "recipe.yaml", tmp_path / "out", tmp_path / "log"
    recipe.write_text(json.dumps(recipe_of(large, options={"log": str(log)}, budget=8)))
    journal = state_of(out) / "journal.jsonl"
    command = ("search", recipe, out, "--allow-code", "--workers", 1, "--address", ray_address())
    with running(*command) as run:
        await_that("a part of the winner", lambda: journal.exists() and '"winner ' in journal.read_text(), DEADLINE_S)
        os.killpg(run.process.pid, signal.SIGKILL)
        run.process.wait(DEADLINE_S)
    assert not out.exists()
    lines = filter(None, journal.read_text().splitlines())
    before = {int(key.split()[-1]) for line in lines for key in json.loads(line) if key.startswith("winner ")}
    scored = log.read_text().count("score")
    resumed = pcb_ray(*command, "--resume", "-v")
    assert not any("ranks of" in line for line in resumed.lines), "the analysis is kept"
    assert log.read_text().count("score") == scored
    made = plan(Recipe.from_file(out / "best_recipe.yaml"))
    assert 0 < len(before) < len(made.parts)
    assert f"{len(before)} of {len(made.parts)} parts were written before" in resumed.text
    left = sum(s.stop - s.start for k, part in enumerate(made.parts) if k not in before for s in part.segments)
    assert receipt_of(out)["sweeps"][-1]["bytes"] == 2 * (made.N + 1) * left, "no part that was written is written again"
    expected = families.merge_locally(made, tmp_path / "local").files["model.safetensors"]
    assert (out / "model.safetensors").read_bytes() == expected
    assert package.verify(out, quiet=True).ok


@pytest.mark.very_slow
def test_a_volume_of_the_basis_that_was_cut_short_or_changed_is_built_again(large, tmp_path, monkeypatch):
    from pcb_ray.searching import tune

    out = tmp_path / "out"
    monkeypatch.setattr(tune, "run_trials", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))

    def basis(resume: bool) -> list[tuple[bytes, int]]:
        """The bytes of all volumes once they are built, and what tells a file from one that takes its place."""
        with pytest.raises(KeyboardInterrupt):
            searched(recipe_of(large), out, resume=resume)
        (folder,) = state_of(out).glob("basis-*")
        return [(path.read_bytes(), path.stat().st_mtime_ns) for path in sorted(folder.iterdir())]

    built = basis(resume=False)
    volumes = sorted(next(state_of(out).glob("basis-*")).iterdir())
    assert len(volumes) == 84
    os.truncate(volumes[3], len(built[3][0]) // 2)
    flip(volumes[7], len(built[7][0]) // 2)
    volumes[20].unlink()
    again = basis(resume=True)
    assert [data for data, _ in again] == [data for data, _ in built]
    assert [k for k, (one, other) in enumerate(zip(built, again, strict=True)) if one != other] == [3, 7, 20]


def test_ray_client_is_refused_before_anything(family, tmp_path):
    with pytest.raises(RequestError, match=r"which is Ray Client. Fix: use `ray job submit`"):
        searched(recipe_of(family), tmp_path / "out", address="ray://127.0.0.1:10001")


@pytest.mark.very_slow
def test_a_winner_that_overflows_its_dtype_costs_no_trials(family, tmp_path, caplog):
    """Scored in float32, but written in float16: the merge is refused, what the trials found is kept."""
    out = tmp_path / "out"
    recipe = recipe_of(family, "Norm", {}, metric="norm", budget=8, space={"weight": {"lower": 0.0, "upper": 1e8, "init": 1e8}})
    with pytest.raises(RequestError, match=r"the output: tensor .* that F16 can hold, found one that overflows it"):
        searched(recipe | {"dtype": "float16"}, out)
    assert "what the trials found is kept in" in caplog.text
    assert not out.exists()
    assert (state_of(out) / "journal.jsonl").read_text().count('"trial ') == 8


# --- the grid ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.very_slow
def test_a_sweep_scores_the_merges_of_its_grid(family, tmp_path):
    out = tmp_path / "out"
    grid = {"density": [0.05, 0.2], "lambda": [0.8, 1.2], "variant": ["pairwise", "released"]}
    recipe = recipe_of(family, "ValOnly") | {"sweep": grid}  # nothing is reported on a split of its own
    found = package.sweep(recipe, out, workers=1, quiet=True)
    rows = pyarrow.parquet.read_table(out / "sweep.parquet").to_pylist()
    assert len(rows) == 8
    hidden = families.load(family.folder / "hidden")
    for row in rows:
        merged = package.merge_state_dicts(
            family.base, family.models, density=row["density"], variant=row["variant"], lambda_=row["lambda"]
        )
        distance = sum(float(((t.float() - hidden[name].float()) ** 2).sum()) for name, t in merged.items())
        assert row["objective"] == pytest.approx(-distance, abs=2e-6)
    assert found.best == {k: max(rows, key=lambda r: r["objective"])[k] for k in grid}
    assert (out / "sweep.png").stat().st_size > 1000
    again = package.merge(out / "best_recipe.yaml", tmp_path / "best", workers=1, quiet=True)
    assert again.thresholds
    assert not state_of(out).exists()
    before = written_in(out)
    once_more = package.sweep(recipe, out, workers=1, resume=True, quiet=True)
    assert once_more == dataclasses.replace(found, request=once_more.request)
    assert written_in(out) == before
    with pytest.raises(RequestError, match="is not this very search: points"):
        package.sweep(recipe | {"sweep": grid | {"lambda": [0.8, 1.3]}}, out, workers=1, resume=True, quiet=True)
    small = {"density": [0.05], "lambda": [0.8, 1.3]}
    (out / "pcb_search.json").write_text("{}")
    with pytest.raises(RequestError, match="pcb_search.json: can't be read as it was written"):
        package.sweep(recipe | {"sweep": small}, out, workers=1, resume=True, quiet=True)
    other = package.sweep(recipe | {"sweep": small}, out, workers=1, resume=True, overwrite=True, quiet=True)
    assert [record["config"] for record in other.records] == [{"density": 0.05, "lambda": lambda_} for lambda_ in (0.8, 1.3)]
