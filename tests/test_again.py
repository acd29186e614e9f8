"""`merge --resume` of what is merged already: nothing is done if it is this very merge, else it is refused with the reason."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import families
import pytest
from clusters import digests, flip, state_of
from families import Family, merged_to
from safetensors.torch import save_file

from pcb_ray import Recipe, RequestError, merging, verify
from pcb_ray.receipt import RECEIPT, Receipt


@pytest.fixture
def case(family, tmp_path: Path) -> tuple[Family, Path]:
    """A family, and its merge without Ray."""
    one = family(scale=20)
    return one, merged_to(tmp_path / "out", Recipe.of(one.recipe()))


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    """To start one fails the test."""

    def started(*_: object) -> Iterator[None]:
        raise AssertionError("a merge was begun")

    monkeypatch.setattr(merging, "cluster", started)


def merge(recipe: dict[str, Any] | Recipe, out: Path, **options: Any) -> Receipt:
    return merging.merge(recipe, out, resume=True, quiet=True, **options)


def refusal(recipe: dict[str, Any], out: Path, **options: Any) -> tuple[str, ...]:
    """Why `out` is not this very merge."""
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(RequestError) as told:
        merge(recipe, out, **options)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    exists, *reasons = told.value.problems
    assert "exists: wanted a free name" in exists
    assert "nothing to resume" in exists
    assert all(one.startswith(f"--resume: {out} is not this very merge: ") for one in reasons)
    assert all(re.search(r": wanted .* found .* Fix: .*\.$", one, flags=re.DOTALL) for one in reasons)
    return tuple(reasons)


def test_the_very_merge_that_is_there_is_not_merged_again(case, caplog):
    family, out = case
    before = digests(out)
    for options in ({}, {"overwrite": True}, {"memory": 10**10, "workers": 7}):
        assert merge(family.recipe(), out, **options) == Receipt.of(out)
        (line,) = caplog.messages
        assert line == f"{out}: is this very merge already, and nothing was done"
        caplog.clear()
    assert digests(out) == before
    assert not state_of(out).exists()


def test_without_resume_an_output_that_is_there_is_refused_as_ever(case):
    family, out = case
    with pytest.raises(RequestError, match="exists: wanted a free name, found a folder. Fix: choose another name"):
        merging.merge(family.recipe(), out, quiet=True)


def test_a_recipe_that_says_the_same_in_other_words_is_this_very_merge(case):
    family, out = case
    models = [{"model": f"model{k}", "parameters": {"weight": 1}} for k in range(3)]
    spelt = family.recipe_file("spelt.yaml", models=models, parameters={"density": 0.1, "variant": "pairwise"})
    assert merge(Recipe.of(spelt), out) == Receipt.of(out)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"parameters": {"density": 0.3}}, "density: 0.1.* was merged, .*density: 0.3.* is asked for"),
        ({"parameters": {"lambda": 0.5}}, "lambda: 0.5.* is asked for"),
        ({"parameters": {"variant": "paper"}}, "method: wanted pcb-paper, found pcb-pairwise"),
        ({"merge_method": "ties"}, "method: wanted ties"),
        ({"dtype": "float32"}, "outputs: wanted"),
        ({"exclude": ["model.norm.weight"]}, "D: wanted"),
    ],
)
def test_another_recipe_is_another_merge(case, changes, reason):
    family, out = case
    (found, *_) = refusal(family.recipe(**changes), out)
    assert re.search(reason, found), found


def test_other_models_are_another_merge(case, tmp_path):
    family, out = case
    (found,) = refusal(family.recipe(models=family.recipe()["models"][:2]), out)
    assert "N: wanted 2, found 3" in found
    shutil.copytree(family.folder / "model0", tmp_path / "same")
    models = [{"model": str(tmp_path / "same")}, *family.recipe()["models"][1:]]
    (found,) = refusal(family.recipe(models=models), out)
    assert "pcb_recipe.yaml: wanted the recipe that is asked for, found another" in found
    (found,) = refusal(family.recipe(), out, max_shard_bytes=10**6)
    assert "max_shard_bytes: wanted 1000000, found 5000000000" in found


def values_changed(family: Family, out: Path) -> None:
    flip(family.folder / "model1" / "model.safetensors", -1 + (family.folder / "model1" / "model.safetensors").stat().st_size)


def time_put_back(family: Family, out: Path) -> None:
    file = family.folder / "model1" / "model.safetensors"
    was = file.stat()
    values_changed(family, out)
    os.utime(file, ns=(was.st_atime_ns, was.st_mtime_ns))


def card_of_the_base_changed(family: Family, out: Path) -> None:
    (family.folder / "base" / "config.json").write_text(json.dumps({**families.CONFIG, "rope_theta": 7.0}))


def tokenizer_came(family: Family, out: Path) -> None:
    (family.folder / "base" / "special.txt").write_text("new")


def header_changed(family: Family, out: Path) -> None:
    save_file(family.models[1], family.folder / "model1" / "model.safetensors", metadata={"format": "pt", "of": "today"})


def output_cut_short(family: Family, out: Path) -> None:
    os.truncate(out / "model.safetensors", (out / "model.safetensors").stat().st_size - 1)


def file_gone(family: Family, out: Path) -> None:
    (out / "config.json").unlink()


def card_edited(family: Family, out: Path) -> None:
    (out / "README.md").write_text("better")


def receipt_gone(family: Family, out: Path) -> None:
    (out / RECEIPT).unlink()


def receipt_of_another_arithmetic(family: Family, out: Path) -> None:
    changed = json.loads((out / RECEIPT).read_text()) | {"arithmetic": "ieee-1"}
    (out / RECEIPT).write_text(json.dumps(changed))


def receipt_of_other_sizes(family: Family, out: Path) -> None:
    changed = json.loads((out / RECEIPT).read_text())
    changed["sizes"]["chunk_elements"] *= 2
    (out / RECEIPT).write_text(json.dumps(changed))


def first_part_changed(family: Family, out: Path) -> None:
    flip(out / "model.safetensors", 4096)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (values_changed, "model1/model.safetensors: wanted a file that nobody has changed since it was merged"),
        (time_put_back, "model1/model.safetensors: wanted a file that nobody has changed since it was merged"),
        (card_of_the_base_changed, "config.json: wanted what a merge would put there now"),
        (tokenizer_came, "special.txt: wanted what a merge would put there now"),
        (header_changed, "wanted the files that were merged"),
        (output_cut_short, "model.safetensors: wanted .* bytes, as in the receipt"),
        (file_gone, "config.json: wanted sha256"),
        (card_edited, "README.md: wanted sha256"),
        (receipt_gone, "wanted a receipt, found no file"),
        (receipt_of_another_arithmetic, "arithmetic: wanted ieee-2, found ieee-1"),
        (receipt_of_other_sizes, "sizes: wanted"),
        (first_part_changed, "wanted what its inputs give, found something else"),
    ],
)
def test_what_has_changed_since_is_told_and_nothing_is_touched(case, change, reason):
    family, out = case
    change(family, out)
    found = refusal(family.recipe(), out)
    assert re.search(reason, "\n".join(found)), found


def test_a_model_that_another_has_taken_the_place_of_is_noticed_by_what_it_gives(family, tmp_path):
    """Its files are older than the receipt, and have the same headers."""
    one = family(scale=20)
    other = families.write(one.folder / "other", families.fine_tuned(3, scale=20, seed=7)[1][1])
    out = merged_to(tmp_path / "out", Recipe.of(one.recipe()))
    (one.folder / "model1").rename(one.folder / "was")
    other.rename(one.folder / "model1")
    found = refusal(one.recipe(), out)
    assert re.search("wanted what its inputs give, found something else", found[0])


def test_what_is_no_merge_at_all_is_refused(family, tmp_path):
    one = family()
    for out in (tmp_path / "file", tmp_path / "folder", tmp_path / "link"):
        {"file": out.touch, "folder": out.mkdir, "link": lambda out=out: out.symlink_to("nowhere")}[out.name]()
        with pytest.raises(RequestError, match=r"exists: wanted a free name(.|\n)*wanted a receipt, found no file"):
            merge(one.recipe(), out)


def test_a_run_that_was_killed_after_its_output_had_its_name_is_done(case):
    family, out = case
    state_of(out).mkdir()
    (state_of(out) / "state.json").write_text("{}")
    assert merge(family.recipe(), out) == Receipt.of(out)
    assert not state_of(out).exists()
    (state_of(out) / "out").mkdir(parents=True)
    (state_of(out) / "state.json").write_text("{}")  # there is work of another run, which is to replace it
    with pytest.raises(RequestError, match="the unfinished run goes on"):
        merge(family.recipe(), out)


def test_what_is_verified_may_be_named_by_a_relative_path_also_in_a_job(case, monkeypatch):
    _, out = case
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    monkeypatch.chdir(out.parent)
    assert verify(out.name).ok
