"""Code that a recipe or an output names: which is run, and which is refused before any of it is run."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from families import Family, MakeFamily, merged_to

import pcb_ray as package
from pcb_ray import Recipe, RequestError, verify
from pcb_ray.cli import main, parser
from pcb_ray.files.room import Room
from pcb_ray.grid import points_of
from pcb_ray.many import _How, _opened, _recipes
from pcb_ray.nodes import Pool
from pcb_ray.planning import plan
from pcb_ray.searching.evaluators import check_evaluator
from pcb_ray.searching.nearby import Material
from pcb_ray.searching.request import Search, Space
from pcb_ray.searching.scorer import Arm, Job
from pcb_ray.submitting import command_line, gather

RAN = "ran"
# Whoever runs it leaves a mark in the folder that RAN names.
CODE = """
import os, pathlib
from pcb_ray.methods import Method
pathlib.Path(os.environ["RAN"], "ran").touch()
own = Method(name="own", linear=True, parameters={}, merge=lambda block, known, settings: block.theta)

class Accuracy:
    def load(self, model_dir):
        import torch
        return torch.nn.Linear(1, 1)

    def score(self, split):
        return {"accuracy": 0.5}
"""


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for recipes, `recipes`, with code in it, beside it, and in it by links alone."""
    monkeypatch.setenv("RAN", str(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path / "installed"))
    for place in ("recipes/own.py", "recipes/below/own.py", "elsewhere/own.py", "installed/allowed_code_pack/__init__.py"):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).write_text(CODE)
    (tmp_path / "recipes" / "linked.py").symlink_to(tmp_path / "elsewhere" / "own.py")
    (tmp_path / "recipes" / "folder").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "recipes" / "inner.py").symlink_to("below/own.py")
    return tmp_path


def has_run(places: Path) -> bool:
    return (places / RAN).exists()


def recipe_in(places: Path, family: Family, **changes: Any) -> Path:
    path = places / "recipes" / "recipe.yaml"
    path.write_text(json.dumps(family.recipe(**changes)))
    return path


def searching(evaluator: Any) -> dict[str, Any]:
    return {"search": {"evaluator": evaluator, "metric": "accuracy", "budget": 8}, "sweep": {"lambda": [0.5, 1.0]}}


ELSEWHERE = ["{}/elsewhere/own.py", "../elsewhere/own.py", "below/../../elsewhere/own.py", "linked.py", "folder/own.py",
             "allowed_code_pack"]  # fmt: skip
HERE = ["own.py", "./own.py", "below/own.py", "inner.py", "{}/recipes/own.py", "../recipes/own.py"]


# --- recipes ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ELSEWHERE)
def test_code_elsewhere_is_refused_before_it_is_run(
    places: Path, family: MakeFamily, source: str, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    one, named, out = family(2), source.format(places), str(places / "out")
    of_method = str(recipe_in(places, one, merge_method=f"{named}:own", parameters={"normalize": True}))
    for command in (
        ["plan", of_method],
        ["merge", of_method, out],
        ["merge", of_method, "--into", out],
        ["merge", of_method, out, "--resume"],
    ):
        assert main(command) == 2
        told = capsys.readouterr().err + caplog.text
        caplog.clear()
        assert "merge_method: wanted code in a file in or below the recipe's folder" in told
        assert "give --allow-code" in told
    of_evaluator = str(recipe_in(places, one, **searching(f"{named}:Accuracy")))
    for command in (["plan", of_evaluator], ["search", of_evaluator, out], ["sweep", of_evaluator, out]):
        assert main(command) == 2
        assert "search.evaluator: wanted code in a file in or below the recipe's folder" in capsys.readouterr().err
    with pytest.raises(RequestError, match="allow_code=True in Python"):
        package.search(of_evaluator, out)
    assert not has_run(places)
    assert not Path(out).exists()

    assert main(["plan", of_evaluator, "--allow-code"]) == 0, "the fix works"
    assert not has_run(places), "what would score is not needed for a plan"
    recipe_in(places, one, merge_method=f"{named}:own")
    assert main(["plan", of_method, "--allow-code"]) == 0
    assert has_run(places) or source == "allowed_code_pack"  # a module is run once in a process


@pytest.mark.parametrize("source", HERE)
def test_code_in_or_below_the_folder_is_run_and_announced_with_its_path_and_digest(
    places: Path, family: MakeFamily, source: str, capsys: pytest.CaptureFixture[str]
) -> None:
    named = source.format(places)
    changes = {"merge_method": f"{named}:own", **searching(f"{named}:Accuracy")} | {"sweep": None}
    assert main(["plan", str(recipe_in(places, family(2), **changes))]) == 0
    told = capsys.readouterr().out
    digest = hashlib.sha256(CODE.encode()).hexdigest()
    for what in ("merge_method", "search.evaluator"):
        (line,) = [line for line in told.splitlines() if line.startswith(f"note: {what} runs code of ")]
        assert os.path.samefile(line.split()[5], places / "recipes" / "own.py") or "below" in line or "inner" in line
        assert line.endswith(f"(sha256 {digest}).")


def test_a_shell_command_is_announced(places: Path, family: MakeFamily, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(recipe_in(places, family(2), **searching({"command": {"run": "sh eval.sh {model}"}})))]) == 0
    assert "note: search.evaluator runs a shell command: 'sh eval.sh {model}'." in capsys.readouterr().out


def test_what_python_code_gives_may_name_what_it_likes(places: Path, family: MakeFamily, monkeypatch: pytest.MonkeyPatch) -> None:
    one, elsewhere = family(2), f"{places}/elsewhere/own.py:own"
    assert plan(one.recipe(merge_method=elsewhere)).method.name == "own"
    assert plan(Recipe.from_dict(one.recipe(merge_method=elsewhere))).method.name == "own"
    for name, recipe in points_of({**one.recipe(), "grid": {"method": ["linear", elsewhere]}}).items():
        assert isinstance(recipe, Recipe), name
    path = recipe_in(places, one, merge_method=elsewhere)
    with pytest.raises(RequestError, match="--allow-code"):
        Recipe.from_file(path)
    with pytest.raises(RequestError, match="--allow-code"):
        Recipe.from_yaml(path.read_text(), path.parent)
    assert plan(path, allow_code=True).method.name == "own"
    read = Recipe.from_file(recipe_in(places, one, **searching("../elsewhere/own.py:Accuracy")))
    with pytest.raises(RequestError, match=r"search.evaluator: .*--allow-code"):
        package.sweep(read, places / "out")


def test_the_methods_of_a_grid_are_held_to_the_same(places: Path, family: MakeFamily) -> None:
    found = points_of(recipe_in(places, family(2), grid={"method": ["own.py:own", "linked.py:own", "folder/own.py:Accuracy"]}))
    assert isinstance(found["method=own.py:own"], Recipe)
    assert "--allow-code" in str(found["method=linked.py:own"])
    assert "--allow-code" in str(found["method=own.py:Accuracy"])


def test_tasks_elsewhere_may_bring_code_and_are_refused(places: Path) -> None:
    """A task of lm_eval may name a function in a file beside it."""
    folder, options = places / "recipes", {"tasks": {"val": ["word"]}, "include_path": "folder"}
    with pytest.raises(RequestError, match=r"search.evaluator.lm_eval.include_path: .*elsewhere.*--allow-code"):
        check_evaluator("lm_eval", options, folder, {}, allow_code=False)
    assert check_evaluator("lm_eval", options, folder, {}, allow_code=True) is None
    assert check_evaluator("lm_eval", options | {"include_path": "below"}, folder, {}, allow_code=False) is None


# --- workers ----------------------------------------------------------------------------------------------------------------------


def test_an_evaluator_works_on_a_node_that_has_neither_the_file_nor_its_folder(family: MakeFamily, tmp_path: Path) -> None:
    one = family(2)
    folder = tmp_path / "recipes"
    folder.mkdir()
    shutil.copy(Path(__file__).with_name("evaluators_of_tests.py"), folder / "near.py")
    target = str(one.folder / "model0" / "model.safetensors")
    recipe = Recipe.from_dict(one.recipe(search={"evaluator": {"near.py:Near": {"target": target}}, "metric": "near"}), folder)
    made, search = plan(recipe), Search.of(recipe, has_evaluator=False)
    code = check_evaluator(search.evaluator, search.options, folder, {}, allow_code=False)
    space, base = Space.of(search, recipe, made), Material({}, str(one.folder / "base"))
    job = Job(search, space, {"pairwise": Arm(made, "", {})}, base, str(folder), code=code)
    (tmp_path / "job").write_bytes(pickle.dumps(job))
    shutil.rmtree(folder)
    script = (
        "import pickle, pathlib, sys\n"
        "from pcb_ray.searching.scorer import Scorer\n"
        "from pcb_ray.searching.trial import prepare_process\n"
        "job = pickle.loads(pathlib.Path(sys.argv[1]).read_bytes())\n"
        "prepare_process(job)\n"
        "print(Scorer(job).score_input(1, 'val')['near'])\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(package.__file__).parent.parent)}
    done = subprocess.run(
        [sys.executable, "-c", script, tmp_path / "job"], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.strip() == "-0.0", done.stderr


# --- verify -----------------------------------------------------------------------------------------------------------------------

METHOD = """
import os, pathlib
import helper_of_allowed_code
from pcb_ray.methods import Method
pathlib.Path(os.environ["RAN"], "ran").touch()
own = Method(name="own", merge=lambda block, known, settings: block.theta)
"""


@pytest.fixture
def output(places: Path, family: MakeFamily, caplog: pytest.LogCaptureFixture) -> Path:
    """A merge whose method lies in the output itself, with a module that the method imports."""
    caplog.set_level(logging.WARNING)
    (places / "mine").mkdir()
    (places / "mine" / "own.py").write_text(METHOD)
    (places / "mine" / "helper_of_allowed_code.py").write_text("")
    made = merged_to(places / "out", Recipe.from_dict(family(2).recipe(merge_method="own.py:own"), places / "mine"))
    for path in (made / "pcb_recipe.yaml", made / "pcb_receipt.json"):
        path.write_text(path.read_text().replace(f"{places}/mine/own.py", f"{made}/own.py"))
    receipt = json.loads((made / "pcb_receipt.json").read_text())
    digest = hashlib.sha256((made / "pcb_recipe.yaml").read_bytes()).hexdigest()
    receipt["files_sha256"]["pcb_recipe.yaml"] = digest
    (made / "pcb_receipt.json").write_text(json.dumps(receipt))
    shutil.copy(places / "mine" / "own.py", made / "own.py")
    (made / "helper_of_allowed_code.py").write_text("raise SystemExit('of the output')\n")
    for name in [name for name in sys.modules if "helper_of_allowed_code" in name or name.startswith("pcb_ray_user_own")]:
        del sys.modules[name]
    (places / RAN).unlink()
    return made


def test_verify_runs_no_code_of_an_output(output: Path, places: Path, capsys: pytest.CaptureFixture[str]) -> None:
    digest = hashlib.sha256(METHOD.encode()).hexdigest()
    assert main(["verify", str(output)]) == 2
    told = capsys.readouterr().err
    assert f"Fix: give the file with sha256 {digest} by --method FILE" in told
    changed = places / "changed.py"
    changed.write_text(METHOD + "# changed\n")
    assert main(["verify", str(output), "--method", str(changed)]) == 2
    assert f"wanted the code that merged {output}, with sha256 {digest}, found " in capsys.readouterr().err
    assert not has_run(places)


@pytest.mark.parametrize("name", ["", ":own"])
def test_verify_runs_the_same_code_that_is_given_beside_what_it_imports(output: Path, places: Path, name: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(package.__file__).parent.parent)}
    command = [sys.executable, "-m", "pcb_ray", "verify", output, "--method", f"{places / 'mine' / 'own.py'}{name}"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert has_run(places)


def test_a_method_for_an_output_that_needs_none_is_refused(family: MakeFamily, tmp_path: Path) -> None:
    out = merged_to(tmp_path / "out", Recipe.from_dict(family(2).recipe()))
    with pytest.raises(RequestError, match=r"--method: wanted none, since .* was merged by 'pcb', found own.py. Fix: remove it"):
        verify(out, method="own.py", quiet=True)
    receipt = json.loads((out / "pcb_receipt.json").read_text())
    (out / "pcb_receipt.json").write_text(json.dumps(receipt | {"code_sha256": "0" * 64}))
    with pytest.raises(RequestError, match="merge_method: wanted code with sha256 0{64}, as in the receipt, found 'pcb'"):
        verify(out, quiet=True)


# --- submit -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["../elsewhere/own.py", "linked.py", "folder/own.py"])
def test_code_elsewhere_is_not_sent_unless_that_is_asked_for(places: Path, source: str) -> None:
    recipe = places / "recipes" / "recipe.yaml"
    recipe.write_text(f"merge_method: {source}:own\n")
    with pytest.raises(RequestError, match="merge_method: wanted code in a file in or below .* give --allow-code"):
        gather([recipe])
    sent = set(gather([recipe], allow_code=True).files)
    assert any(name.endswith(Path(source).name) for name in sent)
    assert parser().parse_args(["submit", str(recipe), "/out", "--allow-code"]).submitted.allow_code


def test_a_grid_brings_its_methods_along(places: Path) -> None:
    recipe = places / "recipes" / "recipe.yaml"
    recipe.write_text("grid: {method: [pcb, own.py:own, below/own.py:own]}\n")
    assert set(gather([recipe]).files) == {"recipe.yaml", "own.py", "below/own.py"}


@pytest.mark.parametrize("form", ["--method {}", "--method={}", "--method {}:own", "--method={}:own"])
def test_verify_is_submitted_with_its_method(places: Path, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (places / "elsewhere" / "own.py").write_text("import helper\n")
    (places / "elsewhere" / "helper.py").touch()
    file = places / "elsewhere" / "own.py"
    words = ["verify", "/shared/out", *form.format(file).split()]
    sent: list[tuple[str, set[str]]] = []

    def run(words: list[str], package: Any, out: object, address: object, wait: bool) -> int:
        sent.append((command_line(words, package.names, out), set(package.files)))
        return 0

    monkeypatch.setattr("pcb_ray.submitting.run", run)  # a cluster would only get what is looked at here
    assert main(["submit", *words]) == 0
    assert sent == [(f"pcb-ray verify /shared/out {form.format('own.py')}", {"own.py", "helper.py"})]


def test_announced_once_for_many_merges(places: Path, family: MakeFamily, caplog: pytest.LogCaptureFixture) -> None:
    one = family(2)
    recipes = [recipe_in(places, one, merge_method="own.py:own")]
    recipes.append(Path(shutil.copy(recipes[0], places / "recipes" / "again.yaml")))
    caplog.set_level(logging.WARNING)
    how = _How(
        str(places / "outs"),
        10**9,
        None,
        "cpu",
        1,
        Pool(),
        Room.for_a_run(None, "", None),
        resume=False,
        overwrite=False,
        quiet=True,
    )
    assert len(_opened(_recipes(recipes, False, {}), how, {})) == 2
    assert sum("merge_method runs code of" in line for line in caplog.messages) == 1
