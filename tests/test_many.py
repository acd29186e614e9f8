"""Many merges in one job: each is what it would be alone, what costs is shared, and one that fails takes no other along."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
from collections import namedtuple
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import families
import pytest
import torch
import yaml
from clusters import digests, pcb_ray, ray_address, receipt_of, state_of
from families import Family, merged_to

from pcb_ray import Merged, Recipe, RequestError, RunError, cli, many, merge_many, merging, verify
from pcb_ray.files.store import LocalStore
from pcb_ray.local import LocalOwners
from pcb_ray.nodes import Needs
from pcb_ray.output.folder import Folder
from pcb_ray.output.state import Place, State
from pcb_ray.planning import Plan
from pcb_ray.questions import WriteParts
from pcb_ray.session import Session


class Pools(list[list[str]]):
    """The merges that each pool of owners was made for, by the values of lambda."""


@pytest.fixture
def pools(monkeypatch: pytest.MonkeyPatch) -> Pools:
    """All is as on Ray, but for the owners, which are threads."""
    made = Pools()

    @contextlib.contextmanager
    def placed(plans: Sequence[Plan], *, writes_to: Callable[[], Place], **_: Any) -> Iterator[Session]:
        made.append([f"{plan.recipe.parameters['lambda']:g}" for plan in plans])
        store = LocalStore()

        def owners_for(plan: Plan) -> LocalOwners:
            assert Path(writes_to().notes).is_dir()
            return LocalOwners(plan, store)

        yield Session(plans[0], owners_for, relate=True)

    monkeypatch.setattr(many, "placed", placed)
    monkeypatch.setattr(many, "cluster", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(many, "choose_device", lambda device, _pool: device)
    monkeypatch.setattr(many, "choose_workers", lambda *_: 1)
    monkeypatch.setattr(many, "autoscales", lambda: False)
    return made


def merged(recipes: Any, into: Path, **options: Any) -> dict[str, Merged]:
    return merge_many(recipes, into, quiet=True, **options)


def states(results: dict[str, Merged]) -> dict[str, str]:
    return {name: one.state for name, one in results.items()}


def sweeps(out: Path) -> list[str]:
    return [sweep["name"] for sweep in receipt_of(out)["sweeps"]]


GRID = {"lambda": [0.5, 1.0, 1.5]}
POINTS = ["A/lambda=0.5", "A/lambda=1", "A/lambda=1.5"]


# --- what is merged ---------------------------------------------------------------------------------------------------------------


def test_each_output_is_what_a_merge_of_its_recipe_alone_gives(family, pools, tmp_path):
    one = family(scale=20)
    a = one.recipe_file("A.yaml", grid={"method": ["pcb", "ties"], "density": [0.1, 0.3]})
    b = one.recipe_file("B.yaml", parameters={"variant": "paper"}, dtype="float32")
    results = merged([b, a], tmp_path / "into")
    alone = {
        **{
            f"A/density={d},method={method}": one.recipe(merge_method=method, parameters={"density": d})
            for d in (0.1, 0.3)
            for method in ("pcb", "ties")
        },
        "B": one.recipe(parameters={"variant": "paper"}, dtype="float32"),
    }
    assert list(results) == sorted(alone)
    for k, (name, recipe) in enumerate(alone.items()):
        out = tmp_path / "into" / name
        assert results[name].state == "done"
        assert digests(out) == digests(merged_to(tmp_path / f"alone{k}", Recipe.of(recipe)))
        assert verify(out, quiet=True).ok
        assert not state_of(out).exists()
    assert len(pools) == 1


def test_another_lambda_needs_no_analysis(family, pools, tmp_path):
    """And another density no new ranks of |tau|."""
    one = family(scale=60)
    merged(one.recipe_file("A.yaml", grid=GRID), tmp_path)
    first, *others = (tmp_path / name for name in POINTS)
    assert sweeps(first) == ["sample of |tau|", "ranks of |tau|", "sample of beta", "ranks of beta", "write"]
    assert all(sweeps(out) == ["write"] for out in others)
    written = receipt_of(first)["sweeps"][-1]["bytes"]
    assert [receipt_of(out)["bytes_read"] for out in others] == [written, written]
    assert all(receipt_of(out)["relation"] == receipt_of(first)["relation"] for out in others)
    assert all(receipt_of(out)["inputs"] == receipt_of(first)["inputs"] for out in others)
    merged(one.recipe_file("B.yaml", grid={"density": [0.1, 0.2]}), tmp_path)
    assert sweeps(tmp_path / "B" / "density=0.2") == ["sample of beta", "ranks of beta", "write"]


def test_merges_of_the_same_models_follow_each_other_whatever_their_names(family, pools, tmp_path):
    one, other = family(scale=20), family(scale=20, seed=1)
    recipes = {"a": one.recipe(), "b": other.recipe(), "c": one.recipe(parameters={"lambda": 2.0})}
    results = merged(recipes, tmp_path)
    assert list(results) == ["a", "b", "c"]
    assert sweeps(tmp_path / "a") == sweeps(tmp_path / "b") != ["write"]
    assert sweeps(tmp_path / "c") == ["write"]
    assert pools == [["1", "2", "1"]]


def test_models_are_opened_once_for_all_that_share_them(family, pools, tmp_path, monkeypatch):
    opened: list[str] = []
    original = merging.open_inputs
    monkeypatch.setattr(merging, "open_inputs", lambda recipe: opened.append("once") or original(recipe))
    merged(family().recipe_file("A.yaml", grid=GRID), tmp_path)
    assert opened == ["once"]


def test_notes_are_told_once(family, pools, tmp_path, caplog):
    merged(family().recipe_file("A.yaml", grid=GRID, parameters={"int8_mask": True}), tmp_path)
    assert [line for line in caplog.messages if "int8_mask" in line] == [
        "note: A/lambda=0.5: `int8_mask` has no effect: it saves memory in mergekit; memory is bounded here without it."
    ]


# --- what is wrong ----------------------------------------------------------------------------------------------------------------


def test_recipes_of_one_name_are_refused(family, pools, tmp_path):
    recipe = family().recipe_file("A.yaml")
    (tmp_path / "other").mkdir()
    other = (tmp_path / "other" / "A.yml").absolute()
    other.write_text(recipe.read_text())
    with pytest.raises(RequestError, match=r"^A: wanted recipes of different names, found 2 of 'A', .* Fix: rename a file"):
        merged([recipe, other], tmp_path / "into")
    for name in ("", "..", "a/b"):
        with pytest.raises(RequestError, match="wanted a name for a folder"):
            merged({name: {}}, tmp_path / "into")
    assert not (tmp_path / "into").exists()


def test_what_is_wrong_is_told_before_anything_is_computed_and_the_others_are_merged(family, pools, tmp_path, caplog, monkeypatch):
    one, into = family(), tmp_path / "into"
    (into / "C").mkdir(parents=True)
    told_before: list[str] = []
    monkeypatch.setattr(many, "cluster", lambda _: told_before.extend(caplog.messages) or contextlib.nullcontext())
    results = merged(
        [
            one.recipe_file("A.yaml", grid={"density": [0.1, 2.0, 3.0]}),
            one.recipe_file("B.yaml", models=[{"model": "nowhere"}, {"model": "not/here"}]),
            one.recipe_file("C.yaml"),
            one.recipe_file("D.yaml"),
            one.recipe_file("E.yaml", grid={"lambda": 3}),
        ],
        into,
    )
    assert states(results) == {
        "A/density=0.1": "done", "A/density=2": "wrong", "A/density=3": "wrong", "B": "wrong", "C": "wrong", "D": "done",
        "E": "wrong",
    }  # fmt: skip
    told = "\n".join(told_before)
    for part in ("A/density=2", "density: wanted a number in (0, 1], found 2.0", "nowhere", "not/here", "C: exists", "grid.lambda"):
        assert part in told, told
    assert results["B"].failure is not None
    assert len([line for line in caplog.messages if str(results["B"].failure) in line]) == 1
    assert sorted(path.name for path in into.iterdir()) == ["A", "C", "D"]
    assert [path.name for path in (into / "A").iterdir()] == ["density=0.1"]


def test_the_same_complaint_about_many_is_told_once(family, pools, tmp_path, caplog):
    results = merged(family().recipe_file("A.yaml", grid=GRID, models=[{"model": "nowhere"}]), tmp_path / "into")
    assert set(states(results).values()) == {"wrong"}
    (line,) = caplog.messages
    assert "'A/lambda=0.5', 'A/lambda=1', 'A/lambda=1.5'" in line
    assert not (tmp_path / "into").exists()


def test_so_many_merges_that_their_locks_would_be_too_many_files_are_refused(family, pools, tmp_path):
    one = family()
    recipes = [one.recipe_file(f"{name}.yaml", grid={"lambda": list(range(1, 302))}) for name in "AB"]
    with pytest.raises(RequestError, match="wanted at most 500 merges in one job, found 602. Fix: do it in several jobs"):
        merged(recipes, tmp_path / "into")


def test_all_together_must_fit_on_the_disk(family, pools, tmp_path, monkeypatch):
    one = family()
    size = merged_to(tmp_path / "one", Recipe.of(one.recipe())).joinpath("model.safetensors").stat().st_size
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage(10 * size, 0, 2 * size))
    with pytest.raises(RequestError, match=r"the 3 merges need [\d,]+ bytes, found [\d,]+ free in .* Fix: free some"):
        merged(one.recipe_file("A.yaml", grid=GRID), tmp_path / "into")
    assert not (tmp_path / "into").exists()


def test_what_the_cluster_has_no_room_for_is_told_and_the_others_are_merged(family, pools, tmp_path, monkeypatch):
    def choose(_workers: object, needs: Needs, _chunks: int) -> int:
        if needs.memory == largest:
            raise RequestError("the cluster: wanted room, found none. Fix: lower --memory.")
        return 1

    one = family()
    sizes: list[int] = []
    original = many.worker_bytes
    monkeypatch.setattr(many, "worker_bytes", lambda *a: sizes.append(original(*a)) or sizes[-1])
    largest = 0
    monkeypatch.setattr(many, "choose_workers", choose)
    recipes = {"a": one.recipe(), "b": one.recipe(models=one.recipe()["models"][:1])}
    merged(recipes, tmp_path / "first")
    largest = max(sizes)
    results = merged(recipes, tmp_path / "into")
    assert states(results) == {"a": "wrong", "b": "done"}
    assert [path.name for path in (tmp_path / "into").iterdir()] == ["b"]


def test_an_output_that_another_process_writes_is_told_and_the_others_are_merged(family, pools, tmp_path):
    recipe = family().recipe_file("A.yaml", grid=GRID)
    with State(Folder(tmp_path / POINTS[1]), {}, {}):
        results = merged(recipe, tmp_path, overwrite=True)
        assert states(results) == {POINTS[0]: "done", POINTS[1]: "wrong", POINTS[2]: "done"}
        assert "another merge is writing it now" in str(results[POINTS[1]].failure)


# --- what fails -------------------------------------------------------------------------------------------------------------------


def test_a_run_that_fails_takes_no_other_along_and_is_resumed(family, pools, tmp_path, monkeypatch):
    """The others get new owners, and what the analysis has found stays."""
    recipe = family(scale=20).recipe_file("A.yaml", grid=GRID)
    ask = LocalOwners.ask

    def failing(self: LocalOwners, question: Any, items: Sequence[int]) -> Any:
        for k, answer in enumerate(ask(self, question, items)):
            if isinstance(question, WriteParts) and "lambda=1.5" in question.folder and k == 1:
                raise RunError("the workers: wanted them alive, found them dead. Fix: go on with --resume")
            yield answer

    with monkeypatch.context() as patch:
        patch.setattr(LocalOwners, "ask", failing)
        results = merged(recipe, tmp_path)
    assert states(results) == {POINTS[0]: "done", POINTS[1]: "done", POINTS[2]: "failed"}
    assert state_of(tmp_path / POINTS[2]).exists()
    pools.clear()
    again = merged(recipe, tmp_path, resume=True)
    assert states(again) == {POINTS[0]: "done before", POINTS[1]: "done before", POINTS[2]: "done"}
    assert pools == [["1.5"]]
    assert receipt_of(tmp_path / POINTS[2])["resumed"]
    assert verify(tmp_path / POINTS[2], quiet=True).ok
    assert states(merged(recipe, tmp_path, resume=True)) == dict.fromkeys(POINTS, "done before")
    assert len(pools) == 1, "no owners for nothing"


def test_after_a_failure_the_others_share_what_was_found(family, pools, tmp_path, monkeypatch):
    recipe = family(scale=20).recipe_file("A.yaml", grid=GRID)
    store = many.merged

    def failing(session: Session, state: State, *more: Any) -> Any:
        if Path(state.place.out).name == "lambda=1":
            raise OSError(28, "No space left on device", state.place.files)
        return store(session, state, *more)

    monkeypatch.setattr(many, "merged", failing)
    results = merged(recipe, tmp_path)
    assert states(results) == {POINTS[0]: "done", POINTS[1]: "failed", POINTS[2]: "done"}
    assert re.search("No space left on device. Fix: .*--resume", str(results[POINTS[1]].failure))
    assert pools == [["0.5", "1", "1.5"], ["1.5"]]
    assert sweeps(tmp_path / POINTS[2]) == ["write"]


def test_owners_that_cannot_open_the_first_merge_are_no_fault_of_the_others(family, pools, tmp_path, monkeypatch):
    recipe = family(scale=20).recipe_file("A.yaml", grid=GRID)
    placed = many.placed

    @contextlib.contextmanager
    def strict(plans: Sequence[Plan], **options: Any) -> Iterator[Session]:
        if plans[0].recipe.parameters["lambda"] == 0.5:
            raise RequestError("base: wanted a file that node n can read, found none. Fix: put the models on a shared disk.")
        with placed(plans, **options) as session:
            yield session

    monkeypatch.setattr(many, "placed", strict)
    results = merged(recipe, tmp_path)
    assert states(results) == {POINTS[0]: "wrong", POINTS[1]: "done", POINTS[2]: "done"}
    assert not state_of(tmp_path / POINTS[0]).exists()


def test_an_input_that_cannot_be_merged_spoils_only_what_is_made_of_it(family, pools, tmp_path):
    one, other = family(scale=20), family(scale=20, seed=1)
    bad = {name: tensor.clone() for name, tensor in other.models[0].items()}
    bad["model.norm.weight"][3] = torch.nan
    families.write(other.folder / "model0", bad)
    results = merged({"a": other.recipe(), "b": one.recipe(), "c": other.recipe(parameters={"lambda": 2})}, tmp_path)
    assert states(results) == {"a": "wrong", "b": "done", "c": "wrong"}
    assert "model.norm.weight" in str(results["a"].failure)
    assert [path.name for path in tmp_path.iterdir() if path.name in ("a", "b", "c") or path.name.startswith(".")] == ["b"]


def test_an_input_that_changes_between_two_merges_is_told(family, pools, tmp_path, monkeypatch):
    one = family(scale=20)
    model, store = one.folder / "model1" / "model.safetensors", many.merged

    def changed_after(session: Session, state: State, *more: Any) -> Any:
        receipt = store(session, state, *more)
        if Path(state.place.out).name == "lambda=1":
            families.write(one.folder / "model1", families.fine_tuned(3, scale=20, seed=5)[1][1])
        return receipt

    monkeypatch.setattr(many, "merged", changed_after)
    results = merged(one.recipe_file("A.yaml", grid=GRID), tmp_path)
    assert states(results) == {POINTS[0]: "done", POINTS[1]: "done", POINTS[2]: "wrong"}
    assert f"{model}: wanted the file as it was when the run began" in str(results[POINTS[2]].failure)


def interrupted_in_its_first_write(recipe: Path, into: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job of this recipe that Ctrl-C ends as soon as a part is noted."""
    wrote = State.wrote

    def stopped(self: State, entries: Any) -> None:
        wrote(self, entries)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(State, "wrote", stopped)
        merged(recipe, into)


def test_a_job_that_is_killed_is_resumed_and_its_analysis_serves_those_that_had_no_turn(family, pools, tmp_path, monkeypatch):
    recipe = family(scale=20).recipe_file("A.yaml", grid=GRID)
    interrupted_in_its_first_write(recipe, tmp_path, monkeypatch)
    assert [state_of(tmp_path / name).exists() for name in POINTS] == [True, False, False]
    with pytest.raises(RequestError) as told:
        raise merged(recipe, tmp_path)[POINTS[0]].failure or AssertionError
    assert "an unfinished run" in str(told.value)
    for name in POINTS[1:]:
        assert (tmp_path / name).is_dir(), "the others did not wait for it"
    results = merged(recipe, tmp_path, overwrite=True, resume=True)
    assert states(results) == {POINTS[0]: "done", POINTS[1]: "done before", POINTS[2]: "done before"}
    assert receipt_of(tmp_path / POINTS[0])["resumed"]


def test_what_a_resumed_merge_knows_serves_the_others(family, pools, tmp_path, monkeypatch):
    recipe = family(scale=20).recipe_file("A.yaml", grid=GRID)
    interrupted_in_its_first_write(recipe, tmp_path, monkeypatch)
    results = merged(recipe, tmp_path, resume=True)
    assert states(results) == dict.fromkeys(POINTS, "done")
    assert sweeps(tmp_path / POINTS[0])[-2:] == ["ranks of beta", "write"]
    assert sweeps(tmp_path / POINTS[1]) == sweeps(tmp_path / POINTS[2]) == ["write"]
    assert verify(tmp_path / POINTS[1], quiet=True).ok


def test_outputs_are_replaced_on_request_only(family, pools, tmp_path):
    one = family()
    recipe = one.recipe_file("A.yaml", grid=GRID)
    merged(recipe, tmp_path)
    assert set(states(merged(recipe, tmp_path)).values()) == {"wrong"}
    recipe = one.recipe_file("A.yaml", grid=GRID, dtype="float32")
    results = merged(recipe, tmp_path, resume=True)
    assert "is not this very merge" in str(results[POINTS[0]].failure)
    assert states(merged(recipe, tmp_path, overwrite=True)) == dict.fromkeys(POINTS, "done")
    assert "dtype: float32" in (tmp_path / POINTS[2] / "pcb_recipe.yaml").read_text()


# --- the command line -------------------------------------------------------------------------------------------------------------

WRONG, FAILED = RequestError(["density: wanted 1, found 2. Fix: x.", "lambda: wanted"]), RunError("a disk is full. Fix: mend it")


@pytest.mark.parametrize(
    ("results", "code"),
    [
        ({"a": Merged(before=True)}, 0),
        ({"a": Merged(), "b": Merged(failure=WRONG)}, 2),
        ({"a": Merged(failure=WRONG), "b": Merged(failure=FAILED)}, 1),
    ],
)
def test_the_exit_code_tells_whether_all_are_done(results, code, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(many, "merge_many", lambda *_, **__: results)
    assert cli.main(["merge", "a.yaml", "b.yaml", "--into", str(tmp_path)]) == code
    table = capsys.readouterr().out
    assert re.search(r"^merge  state +seconds +read$", table, flags=re.MULTILINE)
    assert (code == 1) == ("a disk is full" in table)


def test_recipes_and_options_of_the_command_line_are_those_of_the_function(tmp_path, monkeypatch):
    asked: dict[str, Any] = {}
    monkeypatch.setattr(many, "merge_many", lambda *given, **options: asked.update(options, given=given) or {})
    cli.main(["merge", "a.yaml", "b.yaml", "--into", str(tmp_path), "--resume", "--memory", "2GB", "--workers", "3"])
    assert asked["given"] == ([Path("a.yaml"), Path("b.yaml")], str(tmp_path))
    assert asked["resume"] is True
    assert (asked["memory"], asked["workers"], asked["overwrite"]) == (2 * 10**9, 3, False)


@pytest.mark.parametrize("names", [["a.yaml"], ["a.yaml", "b.yaml", "out"]])
def test_without_into_a_merge_wants_a_recipe_and_an_output(names, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["merge", *names])
    assert ended.value.code == 2
    told = capsys.readouterr().err
    assert "usage: pcb-ray merge RECIPE OUT" in told
    assert "wanted RECIPE and OUT, or --into DIR" in told


def test_one_merge_of_a_grid_is_refused_with_advice(family, capsys):
    one = family()
    assert cli.main(["merge", str(one.recipe_file(grid=GRID)), str(one.folder / "out")]) == 2
    assert "pcb-ray merge RECIPE --into DIR" in capsys.readouterr().err


@pytest.mark.ray
@pytest.mark.filterwarnings("ignore::ResourceWarning")  # Ray closes its own sockets and log files late
def test_many_merges_on_ray_are_those_that_are_merged_alone(family: Callable[..., Family], tmp_path: Path) -> None:
    one, other = family(scale=20), family(2, scale=20, seed=1)
    other.recipe_file("bad.yaml", models=[{"model": "nowhere"}])
    a = one.recipe_file("A.yaml", grid={"lambda": [0.5, 1.0], "method": ["pcb", "task_arithmetic"]})
    b = other.recipe_file("B.yaml", parameters={"variant": "released"})
    into = tmp_path / "into"
    command = ("merge", a, b, other.folder / "bad.yaml", "--into", into, "--workers", 2, "--address", ray_address())
    run = pcb_ray(*command)
    assert run.process.returncode == 2, run.text
    alone = {f"A/lambda={x:g},method={m}": one.recipe(merge_method=m, parameters={"lambda": x}) for x in (0.5, 1.0)
             for m in ("pcb", "task_arithmetic")}  # fmt: skip
    alone["B"] = other.recipe(parameters={"variant": "released"})
    for k, (name, recipe) in enumerate(alone.items()):
        assert digests(into / name) == digests(merged_to(tmp_path / f"alone{k}", Recipe.of(recipe))), name
        assert re.search(rf"^{re.escape(name)} +done +[\d.]+ ", run.text, flags=re.MULTILINE), run.text
    assert re.search(r"^bad +wrong ", run.text, flags=re.MULTILINE), run.text
    assert "5 of 6 merges done" in run.text
    assert sweeps(into / "A" / "lambda=1,method=pcb") == ["write"]
    again = pcb_ray(*command, "--resume")
    assert again.process.returncode == 2, again.text
    assert again.text.count("done before") == 5
    assert pcb_ray(*command[:3], *command[4:], "--resume").process.returncode == 0


def test_a_receipt_tells_of_a_merge_what_it_read_itself(family, pools, tmp_path):
    merged(family(scale=60).recipe_file("A.yaml", grid=GRID), tmp_path)
    receipts = [receipt_of(tmp_path / name) for name in POINTS]
    assert [receipt["full_sweeps"] for receipt in receipts] == [3, 1, 1]
    thresholds = [json.dumps(receipt["thresholds"]) for receipt in receipts]
    assert len(set(thresholds)) == 1
    assert {field.name for field in dataclasses.fields(Merged)} == {"receipt", "failure", "before", "elapsed_s", "bytes_read"}
    assert yaml.safe_load((tmp_path / POINTS[0] / "pcb_recipe.yaml").read_text())["parameters"]["lambda"] == 0.5
