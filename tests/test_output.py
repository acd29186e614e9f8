"""The output folder: refused early, made aside, whole or not there, with everything that loaders want beside the tensors."""

from __future__ import annotations

import collections
import dataclasses
import json
import os
import re
from pathlib import Path
from typing import Any

import families
import pytest
import torch
import yaml
from families import Family

from pcb_ray import Recipe, RequestError, output
from pcb_ray.files.checkpoint import open_checkpoint
from pcb_ray.output import State, asked_of, check_out, model_card, side_files
from pcb_ray.planning import Plan, plan


def planned(family: Family, *, max_shard_bytes: int = 10**9, **changes: Any) -> Plan:
    return plan(Recipe.from_dict(family.recipe(**changes)), max_shard_bytes=max_shard_bytes)


def state_of(out: Path, made: Plan, *, resume: bool = False) -> State:
    return State(out, asked_of(made, "a-1"), resume=resume)


def beside(out: Path) -> Path:
    return out.parent / f".{out.name}.pcb-ray"


def fill(state: State, text: str = "new") -> None:
    (state.staging / "file").write_text(text)


# --- before anything is computed ------------------------------------------------------------------------------------------------------


def problems_of(out: Path, made: Plan, *, overwrite: bool = False, resume: bool = False) -> tuple[str, ...]:
    try:
        check_out(out, made, overwrite=overwrite, resume=resume)
    except RequestError as error:
        return error.problems
    return ()


def test_a_free_name_is_taken_even_where_folders_are_missing(family, tmp_path):
    made = planned(family(1))
    assert problems_of(tmp_path / "out", made) == ()
    assert problems_of(tmp_path / "a" / "b" / "out", made) == ()
    assert not (tmp_path / "a").exists()


def test_an_existing_output_is_refused_unless_it_is_to_be_replaced(family, tmp_path):
    made, out = planned(family(1)), tmp_path / "out"
    out.mkdir()
    assert "--overwrite" in problems_of(out, made)[0]
    assert problems_of(out, made, overwrite=True) == ()
    (tmp_path / "file").touch()
    assert "not a directory" in problems_of(tmp_path / "file", made, overwrite=True)[0]
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    assert "exists" in problems_of(tmp_path / "dangling", made)[0]


@pytest.mark.parametrize("where", ["base", "base/out", "model0/deep/er", "."])
def test_an_output_inside_or_around_an_input_is_refused_also_with_overwrite(family, where):
    one = family(1)
    assert any("inside or around the input" in p for p in problems_of(one.folder / where, planned(one), overwrite=True))


def into_subfolders(model: Path) -> None:
    """Move the shards of a model to folders below it, to which its index leads."""
    index = model / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    places = {f: f"shards/{k // 2}/{f}" for k, f in enumerate(sorted({*content["weight_map"].values()}))}
    for file, place in places.items():
        (model / place).parent.mkdir(parents=True, exist_ok=True)
        (model / file).rename(model / place)
    index.write_text(json.dumps(content | {"weight_map": {name: places[file] for name, file in content["weight_map"].items()}}))


@pytest.mark.parametrize("where", ["base", "base/out", "base/shards/0/out", "model0/out", "."])
def test_an_output_inside_or_around_an_input_with_shards_in_subfolders_is_refused(family, where):
    one = family(1, shards=3)
    for name in ("base", "model0"):
        into_subfolders(one.folder / name)
    assert any("inside or around the input" in p for p in problems_of(one.folder / where, planned(one), overwrite=True))
    assert problems_of(one.folder / "out", planned(one)) == ()


def test_where_the_shards_of_the_inputs_lie_does_not_show_in_the_output(family):
    one = family(1, shards=3)
    flat = families.merge_locally(planned(one, max_shard_bytes=5000), one.folder / "flat").files
    sides_of_flat = sides(one, max_shard_bytes=5000)
    for name in ("base", "model0"):
        into_subfolders(one.folder / name)
    assert families.merge_locally(planned(one, max_shard_bytes=5000), one.folder / "nested").files == flat
    assert sides(one, max_shard_bytes=5000) == sides_of_flat
    assert "model.safetensors.index.json" in sides_of_flat


def test_an_output_inside_a_snapshot_of_the_hub_is_refused(family, tmp_path):
    one = family(1)
    snapshot, blob = tmp_path / "hub" / "snapshots" / "abc123", tmp_path / "hub" / "blobs" / "0"
    (snapshot / "deep").mkdir(parents=True)
    blob.parent.mkdir()
    blob.touch()
    (snapshot / "deep" / "m.safetensors").symlink_to(blob)
    made = planned(one)
    file = made.inputs[0].files[0]._replace(path=str(snapshot / "deep" / "m.safetensors"))
    made = dataclasses.replace(made, inputs=(dataclasses.replace(made.inputs[0], commit="abc123", files=(file,)), made.inputs[1]))
    for where in (snapshot / "out", snapshot / "deep", tmp_path / "hub" / "blobs", tmp_path / "hub"):
        assert any("inside or around the input" in p for p in problems_of(where, made, overwrite=True)), where
    assert problems_of(tmp_path / "out", made) == ()


def test_an_output_beside_a_model_that_is_one_file_is_welcome(family, tmp_path):
    one = family(1)
    files = [str(one.folder / name / "model.safetensors") for name in ("base", "model0")]
    flat = [tmp_path / "models" / f"{k}.safetensors" for k in range(2)]
    flat[0].parent.mkdir()
    for there, file in zip(flat, files, strict=True):
        os.link(file, there)
    made = plan(Recipe.from_dict({"merge_method": "pcb", "base_model": str(flat[0]), "models": [{"model": str(flat[1])}]}))
    assert problems_of(tmp_path / "models" / "merged", made) == ()
    assert problems_of(tmp_path / "models", made, overwrite=True) != ()
    assert problems_of(flat[0], made, overwrite=True) != ()


def test_all_that_is_in_the_way_is_told_at_once(family, monkeypatch):
    one = family(1)
    made, out = planned(one), one.folder / "base"
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(output.shutil, "disk_usage", lambda _: usage(10**6, 10**6 - 1000, 1000))
    found = problems_of(out, made)
    assert len(found) == 3
    assert "exists" in found[0]
    assert "inside or around" in found[1]
    assert f"needs {made.written_bytes:,} bytes" in found[2]
    assert "1,000 free" in found[2]


def test_what_a_resumed_run_has_on_disk_counts_as_room(family, tmp_path, monkeypatch):
    made, out = planned(family(2)), tmp_path / "out"
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(output.shutil, "disk_usage", lambda _: usage(10**6, 0, 4096))
    (beside(out) / "out").mkdir(parents=True)
    (beside(out) / "out" / "model.safetensors").write_bytes(b"x" * made.written_bytes)
    assert len(problems_of(out, made)) == 1
    assert problems_of(out, made, resume=True) == ()


def test_an_unfinished_merge_is_continued_or_forgotten_on_request_only(family, tmp_path):
    made, out = planned(family(1)), tmp_path / "out"
    state_of(out, made).close()
    (problem,) = problems_of(out, made)
    assert "--resume" in problem
    assert "--overwrite" in problem
    assert problems_of(out, made, resume=True) == problems_of(out, made, overwrite=True) == ()


# --- the state ------------------------------------------------------------------------------------------------------------------------


def test_two_merges_cannot_write_one_output_at_once(family, tmp_path):
    made, out = planned(family(1)), tmp_path / "out"
    with state_of(out, made) as first:
        first.wrote({"0": "aa"})
        with pytest.raises(RequestError, match="another merge is writing it now"):
            state_of(out, made)
        with state_of(tmp_path / "other", made):
            pass
    with state_of(out, made, resume=True) as second:
        assert second.journal == {"0": "aa"}


def test_what_was_found_and_written_is_there_again_on_resume(family, tmp_path):
    made, out = planned(family(1)), tmp_path / "out"
    with state_of(out, made) as state:
        state.make_files(made)
        state.found["thresholds"] = {"low": [0.1]}
        state.save()
        state.wrote({"3": "aa", "4": "bb"})
        state.wrote({"copy 0 0": "cc"})
    with (beside(out) / "journal.jsonl").open("a") as journal:
        journal.write('{"5": "d')  # a crash while it was written
    with state_of(out, made, resume=True) as again:
        assert again.found == {"thresholds": {"low": [0.1]}}
        assert again.journal == {"3": "aa", "4": "bb", "copy 0 0": "cc"}
        path = again.staging / "model.safetensors"
        before = bytearray(path.read_bytes())
        before[-1] = 7
        path.write_bytes(before)
        again.make_files(made)
        assert path.read_bytes() == before, "what was written stays"
    with state_of(out, made) as fresh:
        assert fresh.found == fresh.journal == {}
        assert not list(fresh.staging.iterdir())


def test_a_journal_goes_on_after_a_line_that_was_cut_off(family, tmp_path):
    made, out = planned(family(1)), tmp_path / "out"
    with state_of(out, made) as state:
        state.wrote({"1": "aa"})
    with (beside(out) / "journal.jsonl").open("a") as journal:
        journal.write('{"2": "b')
    with state_of(out, made, resume=True) as state:
        state.wrote({"3": "cc"})
    with state_of(out, made, resume=True) as state:
        assert state.journal["1"] == "aa"
        assert "2" not in state.journal
        assert state.journal.get("3") == "cc", "one lost line must not take the next one along"


def test_a_resume_of_another_merge_tells_every_difference(family, tmp_path):
    one = family(2)
    out = tmp_path / "out"
    state_of(out, planned(one)).close()
    with pytest.raises(RequestError) as told:
        state_of(out, planned(one, parameters={"density": 0.25}, dtype="float32", exclude=["*norm*"]), resume=True)
    text = "\n".join(told.value.problems)
    assert "not the merge that was begun: recipe was" in text
    assert "output" in text
    assert told.value.problems[-1].startswith("Fix:")
    path = one.folder / "model1" / "model.safetensors"
    os.utime(path, ns=(1, 1))
    with pytest.raises(RequestError, match=re.escape(f"modified.{path} was")):
        state_of(out, planned(one), resume=True)
    with pytest.raises(RequestError, match="arithmetic was 'a-1', now 'a-2'"):
        State(out, asked_of(planned(one), "a-2"), resume=True)


def test_differences_name_the_place_and_both_values():
    old = {"a": 1, "b": {"c": [1, 2]}, "text": "x: 1\ny: 2", "gone": 0}
    new = {"a": 1, "b": {"c": [1, 3]}, "text": "x: 1\ny: 5", "here": 0}
    assert list(output._differences(old, new)) == [
        "b.c[1] was '2', now '3'",
        "gone was '0', now 'None'",
        "here was 'None', now '0'",
        "text was 'y: 2', now 'y: 5'",
    ]
    assert list(output._differences(old, old)) == []
    assert len(list(output._differences({"text": "a\nb"}, {"text": "a\nb\nc"}))) == 1
    assert list(output._differences({"l": [1]}, {"l": [1, 2]})) == ["l was '[1]', now '[1, 2]'"]


def test_an_unreadable_state_is_told(family, tmp_path):
    made, out = planned(family(1)), tmp_path / "out"
    state_of(out, made).close()
    (beside(out) / "state.json").write_text('{"asked": ')
    with pytest.raises(RequestError, match=r"state\.json: can't be read .*--overwrite"):
        state_of(out, made, resume=True)


def test_a_wrong_request_leaves_nothing_behind_unless_there_is_work_to_go_on_with(family, tmp_path):
    made, out = planned(family(1)), tmp_path / "out"
    with pytest.raises(RequestError), state_of(out, made):
        raise RequestError("late")
    assert not beside(out).exists()
    with state_of(out, made) as state:
        state.wrote({"0": "aa"})  # `linear` finds nothing before it writes
    with pytest.raises(RequestError), state_of(out, made, resume=True):
        raise RequestError("--workers 99: too many")
    with state_of(out, made, resume=True) as state:
        assert state.journal == {"0": "aa"}


# --- commit ---------------------------------------------------------------------------------------------------------------------------


def test_a_commit_gives_the_name_and_leaves_no_state(family, tmp_path):
    made, out = planned(family(1)), tmp_path / "deep" / "out"
    with state_of(out, made) as state:
        fill(state)
        assert not out.exists()
        state.commit()
    assert os.listdir(out) == ["file"]
    assert os.listdir(out.parent) == ["out"]


def test_the_old_output_stays_until_the_new_one_is_whole(family, tmp_path):
    made, out = planned(family(1)), tmp_path / "out"
    out.mkdir()
    (out / "file").write_text("old")
    with state_of(out, made) as state:
        fill(state)
        assert (out / "file").read_text() == "old"
        state.commit()
    assert (out / "file").read_text() == "new"
    assert not beside(out).exists()


@pytest.mark.parametrize("resume", [False, True])
def test_a_crash_between_the_two_renames_loses_neither_output(family, tmp_path, monkeypatch, resume):
    made, out = planned(family(1)), tmp_path / "out"
    out.mkdir()
    (out / "file").write_text("old")
    rename, calls = Path.rename, []

    def crash_at_the_second(path: Path, target: Path) -> Path:
        calls.append(path)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return rename(path, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt), state_of(out, made) as state:
        fill(state)
        patch.setattr(Path, "rename", crash_at_the_second)
        state.commit()
    assert calls == [out, beside(out) / "out"]
    assert not out.exists()
    with state_of(out, made, resume=resume) as again:
        assert (out / "file").read_text() == "old", "restored first"
        if resume:
            assert (again.staging / "file").read_text() == "new"
        else:
            fill(again)
        again.commit()
    assert (out / "file").read_text() == "new"


# --- the files beside the tensors -----------------------------------------------------------------------------------------------------


def sides(family: Family, tokenizer: str = "base", **changes: Any) -> dict[str, bytes]:
    shard = changes.pop("max_shard_bytes", 10**9)
    recipe = Recipe.from_dict(family.recipe(**changes))
    base = open_checkpoint(str(family.folder / "base"))
    other = base if tokenizer == "base" else open_checkpoint(str(family.folder / tokenizer))
    return side_files(recipe, plan(recipe, max_shard_bytes=shard), base, other)


def add_tokenizer(folder: Path, vocabulary: dict[str, int], added: str = "<s>") -> None:
    content = {"model": {"vocab": vocabulary}, "added_tokens": [{"content": added, "id": 9}]}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    (folder / "tokenizer_config.json").write_text(json.dumps({"from": folder.name}))
    (folder / "chat_template.jinja").write_text(f"template of {folder.name}")
    (folder / "additional_chat_templates").mkdir(exist_ok=True)
    (folder / "additional_chat_templates" / "tool.jinja").write_text("tool")
    (folder / "generation_config.json").write_text("{}")
    (folder / "preprocessor_config.json").write_text(json.dumps({"from": folder.name}))
    (folder / "modeling.py").write_text("print('never copied')")


def test_config_tokenizer_and_recipe_are_written_and_no_code(family):
    one = family(1)
    add_tokenizer(one.folder / "base", {"a": 0})
    files = sides(one)
    assert set(files) == {
        *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
        *("additional_chat_templates/tool.jinja", "preprocessor_config.json", "pcb_recipe.yaml"),
    }
    assert files["tokenizer.json"] == (one.folder / "base" / "tokenizer.json").read_bytes()
    assert Recipe.from_yaml(files["pcb_recipe.yaml"].decode(), Path("/")) == Recipe.from_dict(one.recipe())


def test_the_tokenizer_may_come_from_a_model_that_shares_the_vocabulary(family):
    one = family(2)
    add_tokenizer(one.folder / "base", {"a": 0, "b": 1})
    add_tokenizer(one.folder / "model1", {"a": 0, "b": 1})
    files = sides(one, "model1", tokenizer_source=str(one.folder / "model1"))
    assert json.loads(files["tokenizer_config.json"]) == {"from": "model1"}
    assert files["chat_template.jinja"] == b"template of model1"
    assert json.loads(files["preprocessor_config.json"]) == {"from": "base"}
    assert sides(one, chat_template="{{ own }}")["chat_template.jinja"] == b"{{ own }}"


@pytest.mark.parametrize(("vocabulary", "added"), [({"a": 0, "b": 2}, "<s>"), ({"a": 0, "b": 1}, "<x>")])
def test_a_tokenizer_of_another_vocabulary_is_refused(family, vocabulary, added):
    one = family(2)
    add_tokenizer(one.folder / "base", {"a": 0, "b": 1})
    add_tokenizer(one.folder / "model1", vocabulary, added)
    with pytest.raises(RequestError, match=r"vocabulary of .*model1 .* differs from the base's .* in tokenizer\.json"):
        sides(one, "model1", tokenizer_source=str(one.folder / "model1"))
    (one.folder / "model1" / "tokenizer.json").write_text("{")
    with pytest.raises(RequestError, match=r"model1/tokenizer\.json: is not JSON"):
        sides(one, "model1", tokenizer_source=str(one.folder / "model1"))


def test_the_config_names_the_dtype_of_the_output(family):
    config = families.CONFIG | {"torch_dtype": "bfloat16", "vision_config": {"dtype": "bfloat16", "n": 1}, "text_config": {"n": 2}}
    one = family(1, config=config)
    written = json.loads(sides(one, dtype="float16")["config.json"])
    assert written == config | {"torch_dtype": "float16", "vision_config": {"dtype": "float16", "n": 1}}
    assert json.loads(sides(one)["config.json"]) == config
    silent = family(1)
    assert json.loads(sides(silent)["config.json"])["dtype"] == "bfloat16"
    wide = family(1, dtype=torch.float64)
    assert json.loads(sides(wide)["config.json"])["dtype"] == "float32"


def test_shards_have_the_index_that_transformers_reads(family):
    one = family(1)
    one.base |= {"ids": torch.arange(3), "none": torch.empty(0, 2)}
    one.models[0]["none"] = torch.empty(0, 2)
    one = Family(one.folder, one.base, one.models)
    made = planned(one, max_shard_bytes=5000)
    index = json.loads(sides(one, max_shard_bytes=5000)["model.safetensors.index.json"])
    assert set(index["weight_map"]) == set(one.base), "every tensor, empty ones too"
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in one.base.values())
    assert set(index["weight_map"].values()) == {f.name for f in made.files}
    families.merge_locally(made, one.folder / "out")
    (one.folder / "out" / "model.safetensors.index.json").write_text(json.dumps(index))
    assert set(open_checkpoint(str(one.folder / "out")).tensors) == set(one.base)
    assert "model.safetensors.index.json" not in sides(one)


@pytest.mark.parametrize("method", ["pcb", "ties", "task_arithmetic", "linear"])
def test_the_model_card_begins_with_valid_metadata_and_names_all_models(family, method):
    one = family(2)
    made = planned(one, merge_method=method)
    text = model_card(made, {"versions": {"pcb_ray": "1.2.3"}}).decode()
    _, front, body = text.split("---\n", 2)
    metadata = yaml.safe_load(front)
    assert metadata["library_name"] == "transformers"
    assert "merge" in metadata["tags"]
    assert "base_model" not in metadata, "local paths are no Hub ids"
    for name in ("base", "model0", "model1"):
        assert str(one.folder / name) in body
    recipe = body.split("```yaml\n")[1].split("```")[0]
    assert Recipe.from_yaml(recipe, Path("/")) == made.recipe
