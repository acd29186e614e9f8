"""Recipes that lie in a store, and what they name beside themselves."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import families
import pytest
import yaml
from families import Family
from object_servers import FaultProxy, ObjectServer, answer, s3_server
from test_allowed_code import CODE, searching
from test_remote import put_all

from pcb_ray import Recipe, RequestError, many, merge, merge_many, merging, verify
from pcb_ray.cli import main, parser
from pcb_ray.files import remote
from pcb_ray.files.room import Room
from pcb_ray.files.stores import open_store
from pcb_ray.grid import points_of
from pcb_ray.local import LocalOwners
from pcb_ray.many import _recipes
from pcb_ray.output.place import folder_of, place_of
from pcb_ray.output.state import Place
from pcb_ray.planning import Plan, plan
from pcb_ray.recipe import MAX_TEXT_BYTES
from pcb_ray.searching.evaluators import check_evaluator
from pcb_ray.session import Session
from pcb_ray.submitting import command_line, gather
from pcb_ray.user_code import MAX_CODE_BYTES


@pytest.fixture(scope="module")
def server() -> Iterator[ObjectServer]:
    with s3_server() as server:
        yield server


@pytest.fixture
def proxy(server: ObjectServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    with FaultProxy(server) as proxy:
        for name, value in server.through(proxy).items():
            monkeypatch.setenv(name, value)
        yield proxy


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The commands run in a folder that has nothing to do with any of it."""
    monkeypatch.setenv("RAN", str(tmp_path))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return tmp_path / "elsewhere"


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Family:
    made = Family(tmp_path_factory.mktemp("family"), *families.fine_tuned(2, scale=16))
    (made.folder / "model0" / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0}}}')
    return made


@pytest.fixture
def code(tmp_path: Path) -> str:
    """Of each test another one, since a process runs the same only once."""
    return f"{CODE}\n# {tmp_path}\n"


@pytest.fixture
def at(one: Family, server: ObjectServer, proxy: FaultProxy, code: str) -> str:
    """The prefix that the family and its code lie below."""
    found = put_all(server, one.folder, "team/family")
    server.put("team/own.py", code.encode())
    server.put("team/family/own.py", code.encode())
    return found


def put_recipe(server: ObjectServer, key: str = "team/family/recipe.yaml", **changes: Any) -> str:
    models = [{"model": "./model0"}, {"model": "model1"}]
    server.put(key, yaml.safe_dump({"merge_method": "pcb", "base_model": "base", "models": models, **changes}).encode())
    return f"{server.uri}/{key}"


def sources(recipe: Recipe) -> list[str | None]:
    return [recipe.base_model, *(model.source for model in recipe.models)]


@pytest.fixture
def owners(monkeypatch: pytest.MonkeyPatch) -> None:
    """Merges are as on Ray, but for the owners, which are threads."""

    @contextlib.contextmanager
    def placed(plans: Sequence[Plan], *, writes_to: Callable[[], Place], **_: Any) -> Iterator[Session]:
        store = open_store(plans[0].stamps, fence=writes_to().fence)
        yield Session(plans[0], lambda plan: LocalOwners(plan, store), relate=True)

    for module in (merging, many):
        monkeypatch.setattr(module, "placed", placed)
        monkeypatch.setattr(module, "cluster", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(many, "choose_device", lambda device, _: device)
    monkeypatch.setattr(many, "autoscales", lambda: True)


# --- models ----------------------------------------------------------------------------------------------------------------------


def test_models_lie_beside_the_recipe(at: str, server: ObjectServer) -> None:
    wanted = [f"{at}/base", f"{at}/model0", f"{at}/model1"]
    recipe = Recipe.from_file(put_recipe(server))
    assert sources(recipe) == wanted
    assert recipe.prefix == at
    assert plan(recipe).D == plan(put_recipe(server)).D > 0
    models = [{"model": "../family/model0", "parameters": {"weight": 0.5}}, {"model": {"path": "../family/model1/"}}]
    elsewhere = put_recipe(server, "team/recipes/recipe.yaml", base_model="../family/base", models=models)
    assert sources(Recipe.from_file(elsewhere)) == wanted
    assert Recipe.from_file(elsewhere).models[0].weight == ((None, 0.5),)
    top = put_recipe(
        server, "top.yaml", base_model="team/family/base", models=["/shared/a", f"{at}/model0", "../../team/family/model1"]
    )
    assert sources(Recipe.from_file(top)) == [f"{at}/base", "/shared/a", f"{at}/model0", f"{at}/model1"]
    named = put_recipe(server, tokenizer_source="./model1")
    assert Recipe.from_file(named).tokenizer_source == f"{at}/model1"


def test_two_words_are_a_model_beside_the_recipe_or_else_one_of_the_hub(
    at: str, server: ObjectServer, elsewhere: Path, proxy: FaultProxy
) -> None:
    named = put_recipe(
        server, "team/recipe.yaml", base_model="family/base", models=["org/expert@v1", "family/model1/model.safetensors"]
    )
    assert sources(Recipe.from_file(named)) == [f"{at}/base", "org/expert@v1", f"{at}/model1/model.safetensors"]
    (elsewhere / "org" / "expert@v1").mkdir(parents=True)
    with pytest.raises(
        RequestError, match="org/expert@v1: wanted a model below .*, or on the Hub, found 'neither, but a path of this"
    ):
        Recipe.from_file(named)


def test_the_storage_of_a_recipe_is_for_what_it_names(
    at: str, server: ObjectServer, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    with FaultProxy(server) as other:
        storage = {"s3": {"endpoint": other.endpoint}}
        named = put_recipe(server, "team/recipe.yaml", base_model="family/base", models=["./family/model0"], storage=storage)
        proxy.requests.clear()
        assert sources(Recipe.from_file(named)) == [f"{at}/base", f"{at}/model0"]
        assert {request.key for request in proxy.about()} == {"team/recipe.yaml"}
        assert other.about()


def test_what_is_wrong_with_the_uri_of_a_recipe_is_told(at: str, server: ObjectServer, proxy: FaultProxy, monkeypatch: Any) -> None:
    monkeypatch.setattr(remote, "LOOKING_PATIENCE_S", 0.5)
    for uri, told in (
        (f"{at}/none.yaml", f"recipe {at}/none.yaml: wanted to read it, found none. Fix: check the name."),
        ("s3://models", "wanted an object, found a bucket"),
        ("s3://models/a/../b.yaml", "wanted SCHEME://BUCKET/NAME"),
        ("s3://key:secret-word@models/a.yaml", "wanted a URI without credentials"),
        ("ftp://host/a.yaml", "wanted one that can be read, found another URI. Fix: name a file, or an object of s3://"),
    ):
        with pytest.raises(RequestError) as error:
            Recipe.from_file(uri)
        assert told in str(error.value)
        assert "secret-word" not in str(error.value)
    server.put("team/large.yaml", b"#" * (20 * MAX_TEXT_BYTES))
    with pytest.raises(RequestError, match=f"wanted at most {MAX_TEXT_BYTES} bytes"):
        Recipe.from_file(f"{server.uri}/team/large.yaml")
    assert proxy.fetched()["team/large.yaml"] <= 2 * MAX_TEXT_BYTES
    server.put("team/empty.yaml", b"")
    with pytest.raises(RequestError, match="start with `merge_method"):
        Recipe.from_file(f"{server.uri}/team/empty.yaml")
    proxy.fail(answer(503, "SlowDown"), None)
    with pytest.raises(RequestError, match=r"wanted to read it, found no answer in .* \(HTTP 503\). Fix: check the endpoint"):
        Recipe.from_file(f"{at}/recipe.yaml")


# --- code ------------------------------------------------------------------------------------------------------------------------


def test_code_that_a_recipe_in_a_store_names_is_run_only_if_it_is_allowed(
    at: str, server: ObjectServer, code: str, tmp_path: Path, elsewhere: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (elsewhere / "own.py").write_text(code)
    for name in ("own.py:own", "../own.py:own", f"{elsewhere}/own.py:own", "own:own"):
        named = put_recipe(server, merge_method=name)
        for command in (["plan", named], ["merge", named, "out"], ["merge", named, "--into", "out"]):
            assert main(command) == 2
    assert "--allow-code" in capsys.readouterr().err
    for evaluator in (
        "own.py:Accuracy",
        {"own.py:Accuracy": {}},
        {"command": {"run": "sh {model}"}},
        {"lm_eval": {"include_path": "x"}},
    ):
        with pytest.raises(RequestError, match="search.evaluator: wanted no code in a recipe that lies in a store.*--allow-code"):
            Recipe.from_file(put_recipe(server, **searching(evaluator)))
    with pytest.raises(RequestError, match="grid.method: wanted no code"):
        points_of(put_recipe(server, grid={"method": ["linear", "own.py:own"]}))
    local = tmp_path / "recipe.yaml"
    local.write_text(json.dumps({"merge_method": f"{at}/own.py:own", "base_model": "b", "models": ["m"]}))
    with pytest.raises(RequestError, match=f"wanted code in a file in or below the recipe's folder .*, found {at}/own.py"):
        Recipe.from_file(local)
    assert not (tmp_path / "ran").exists()
    assert Recipe.from_file(local, allow_code=True).method.name == "own"


def test_code_beside_the_recipe_is_read_there_and_announced(
    at: str, server: ObjectServer, code: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    digest = hashlib.sha256(code.encode()).hexdigest()
    changes = {"merge_method": "own.py:own", **searching("../own.py:Accuracy"), "sweep": None}
    assert main(["plan", put_recipe(server, **changes), "--allow-code"]) == 0
    told = capsys.readouterr().out
    assert f"merge_method runs code of {at}/own.py (sha256 {digest})." in told
    assert f"search.evaluator runs code of {server.uri}/team/own.py (sha256 {digest})." in told
    assert (tmp_path / "ran").exists()
    found = points_of(put_recipe(server, grid={"method": ["linear", "own.py:own"]}), allow_code=True)
    assert set(found) == {"method=linear", "method=own.py:own"}
    assert all(isinstance(recipe, Recipe) and recipe.prefix == at for recipe in found.values())


def test_code_that_is_not_there_or_too_large_is_told(at: str, server: ObjectServer) -> None:
    with pytest.raises(RequestError, match=f"merge_method: wanted code that can be read, found {at}/none.py:own: No such file"):
        Recipe.from_file(put_recipe(server, merge_method="none.py:own"), allow_code=True)
    server.put("team/family/large.py", b"#" * (MAX_CODE_BYTES + 1))
    with pytest.raises(RequestError, match="wanted at most 1,048,576 bytes of code"):
        Recipe.from_file(put_recipe(server, merge_method="large.py:own"), allow_code=True)


# --- commands --------------------------------------------------------------------------------------------------------------------


def test_a_merge_by_uri_is_that_by_path_and_verify_takes_its_code_by_uri(
    one: Family, at: str, server: ObjectServer, owners: None, tmp_path: Path
) -> None:
    wanted = merge(one.recipe(), tmp_path / "by-path", quiet=True).output_digest
    assert merge(put_recipe(server), f"{server.uri}/merged/by-uri", quiet=True).output_digest == wanted
    out = tmp_path / "own"
    merge(put_recipe(server, merge_method="own.py:own"), out, allow_code=True, quiet=True)
    for method in (f"{at}/own.py", f"{at}/own.py:own"):
        assert main(["verify", str(out), "--method", method]) == 0
    with pytest.raises(RequestError, match="wanted the code of .*family/own.py:own"):
        verify(out)


def test_the_state_of_a_run_to_the_hub_lies_beside_the_recipe(
    at: str, server: ObjectServer, one: Family, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    found = []

    def noted(*arguments: Any, **options: Any) -> Place:
        found.append(place_of(*arguments, **options))
        raise RequestError("enough")

    monkeypatch.setattr(merging, "place_of", noted)
    for recipe in (put_recipe(server), one.recipe_file()):
        with pytest.raises(RequestError, match="enough"):
            merge(recipe, "hf://org/merged")
    assert [place.notes for place in found] == [f"{place}/.hf-org-merged-main.pcb-ray" for place in (at, one.folder)]
    assert caplog.text.count("goes with the job") == 1, "only what lies in a folder of the job"


def test_commands_take_uris_of_recipes(at: str, server: ObjectServer, elsewhere: Path) -> None:
    named = put_recipe(server)
    assert parser().parse_args(["merge", named, "out"]).recipe == named
    (elsewhere / "a.yaml").write_text("merge_method: pcb")
    local = f"file://{elsewhere}/a.yaml"
    assert parser().parse_args(["plan", local]).recipe == elsewhere / "a.yaml"
    assert set(_recipes([named], False, {})) == {"recipe"}
    package = gather([elsewhere / "a.yaml"])
    assert command_line(["merge", local, named, "--into", "/x"], package.names) == f"pcb-ray merge a.yaml {named} --into /x"
    assert main(["plan", named]) == 0


# --- file:// ---------------------------------------------------------------------------------------------------------------------


def test_a_path_may_be_a_uri_wherever_one_is_taken(
    one: Family, owners: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spaced = tmp_path / "a b"
    spaced.mkdir()
    (spaced / "base").symlink_to(one.folder / "base")
    (spaced / "own.py").write_text(CODE)
    (spaced / "val.txt").write_text("words")
    at, there = f"file://{one.folder}", spaced.as_uri()
    assert "%20" in there
    recipe = spaced / "recipe.yaml"
    models = [{"model": f"{at}/model0"}, {"model": f"file://localhost{one.folder}/model1"}]
    made = {"base_model": f"{there}/base", "models": models, "tokenizer_source": f"{at}/model0"}
    recipe.write_text(yaml.safe_dump(made | {"merge_method": "pcb"}))
    named = recipe.as_uri()
    assert Recipe.from_file(named).base_model == f"{spaced}/base"
    room = ["--scratch", f"{there}/scratch"]
    assert main(["merge", named, f"{there}/out", *room]) == main(["merge", named, "--into", f"{there}/merges", *room]) == 0
    assert main(["merge", named, f"{there}/out", "--resume"]) == main(["verify", f"{there}/out"]) == 0
    assert {path.name for path in spaced.iterdir()} >= {"out", "merges"}
    assert (spaced / "merges" / "recipe").is_dir()
    with monkeypatch.context() as full:
        full.setattr(many, "shutil", SimpleNamespace(disk_usage=lambda _: SimpleNamespace(free=0)))
        with pytest.raises(RequestError, match="the 1 merges need .* bytes, found 0 free"):
            merge_many([named], f"{there}/more")
    assert Room.for_a_run(None, f"{there}/scratch", None).scratch == f"{spaced}/scratch"
    assert place_of("hf://org/merged", state=f"{there}/states").notes == f"{spaced}/states/.hf-org-merged-main.pcb-ray"
    assert folder_of(f"{there}/found") == spaced / "found", "of a search"
    own = Recipe.from_dict(made | {"merge_method": f"{there}/own.py:own"}, spaced, allow_code=False)
    assert own.method.name == "own"
    options = {"data": {"val": f"{there}/val.txt"}}
    assert check_evaluator("causal_lm", options, tmp_path, {"search.split": "val"}, allow_code=False) is None
    assert list(tmp_path.rglob("file:*")) == []


@pytest.mark.parametrize("scratch", ["s3://bucket/scratch", "file://host/scratch"])
def test_a_scratch_that_is_no_folder_of_a_machine_is_refused(one: Family, tmp_path: Path, scratch: str) -> None:
    with pytest.raises(RequestError, match=f"--scratch {scratch}: wanted a folder, found a URI"):
        merge(one.recipe(), tmp_path / "out", scratch=scratch)
