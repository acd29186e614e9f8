"""The output folder: refused early, made aside, whole or not there, and never in the place of another."""

from __future__ import annotations

import collections
import dataclasses
import errno
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from families import Family

from pcb_ray import Recipe, RequestError, RunError
from pcb_ray.output import folder
from pcb_ray.output.folder import Folder
from pcb_ray.output.state import State, asked_of, differences_of
from pcb_ray.planning import Plan, plan


def planned(family: Family, *, max_shard_bytes: int = 10**9, **changes: Any) -> Plan:
    return plan(Recipe.from_dict(family.recipe(**changes)), max_shard_bytes=max_shard_bytes)


def state_of(out: Path, made: Plan, *, resume: bool = False, overwrite: bool = False) -> State[Folder]:
    return State(Folder(out, overwrite=overwrite), asked_of(made, "a-1", made.stamps), made.stamps, resume=resume)


def beside(out: Path) -> Path:
    return out.parent / f".{out.name}.pcb-ray"


def fill(state: State[Folder], text: str = "new") -> None:
    (state.place.staging / "file").write_text(text)


# --- before anything is computed --------------------------------------------------------------------------------------------------


def problems_of(out: Path, made: Plan, *, overwrite: bool = False, resume: bool = False) -> tuple[str, ...]:
    try:
        Folder(out, overwrite=overwrite).check(made, resume=resume)
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
    for file, below in places.items():
        (model / below).parent.mkdir(parents=True, exist_ok=True)
        (model / file).rename(model / below)
    index.write_text(json.dumps(content | {"weight_map": {name: places[file] for name, file in content["weight_map"].items()}}))


@pytest.mark.parametrize("where", ["base", "base/out", "base/shards/0/out", "model0/out", "."])
def test_an_output_inside_or_around_an_input_with_shards_in_subfolders_is_refused(family, where):
    one = family(1, shards=3)
    for name in ("base", "model0"):
        into_subfolders(one.folder / name)
    assert any("inside or around the input" in p for p in problems_of(one.folder / where, planned(one), overwrite=True))
    assert problems_of(one.folder / "out", planned(one)) == ()


def test_an_output_inside_a_snapshot_of_the_hub_is_refused(family, tmp_path):
    one = family(1)
    snapshot, blob = tmp_path / "hub" / "snapshots" / "abc123", tmp_path / "hub" / "blobs" / "0"
    (snapshot / "deep").mkdir(parents=True)
    blob.parent.mkdir()
    blob.touch()
    (snapshot / "deep" / "m.safetensors").symlink_to(blob)
    made = planned(one)
    file = dataclasses.replace(made.inputs[0].files[0], path=str(snapshot / "deep" / "m.safetensors"))
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
    monkeypatch.setattr(folder.shutil, "disk_usage", lambda _: usage(10**6, 10**6 - 1000, 1000))
    found = problems_of(out, made)
    assert len(found) == 3
    assert "exists" in found[0]
    assert "inside or around" in found[1]
    assert f"needs {made.written_bytes + sum(f.size for f in made.along):,} bytes" in found[2]
    assert "1,000 free" in found[2]


def test_a_mount_point_is_told_with_a_folder_below_it_before_anything_is_computed(family):
    made, mount = planned(family(1)), Path("/dev/shm")
    assert mount.is_mount()
    (problem,) = problems_of(mount, made, overwrite=True)
    assert "found a mount point, which stays where it is. Fix: name a folder below it, such as /dev/shm/merged" in problem
    assert "--resume" not in problem
    assert problems_of(mount / "merged", made) == ()


def test_a_name_too_long_for_the_state_beside_it_is_told(family, tmp_path):
    made = planned(family(1))
    assert problems_of(tmp_path / ("x" * 246), made) == ()
    (problem,) = problems_of(tmp_path / ("x" * 247), made)
    assert "has at most 255 bytes, found 256. Fix: choose a shorter name" in problem
    assert len(problems_of(tmp_path / ("x" * 300), made)) == 1


def test_what_a_resumed_run_has_on_disk_counts_as_room(family, tmp_path, monkeypatch):
    made, out = planned(family(2)), tmp_path / "out"
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(folder.shutil, "disk_usage", lambda _: usage(10**6, 0, 4096))
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


# --- the state --------------------------------------------------------------------------------------------------------------------


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
        (state.place.staging / "model.safetensors").write_bytes(b"half")
        state.found["thresholds"] = {"low": [0.1]}
        state.save()
        state.wrote({"3": "aa", "4": "bb"})
        state.wrote({"copy 0 0": "cc"})
    with (beside(out) / "journal.jsonl").open("a") as journal:
        journal.write('{"5": "d')  # a crash while it was written
    with state_of(out, made, resume=True) as again:
        assert again.found == {"thresholds": {"low": [0.1]}}
        assert again.journal == {"3": "aa", "4": "bb", "copy 0 0": "cc"}
        assert (again.place.staging / "model.safetensors").read_bytes() == b"half"
    with state_of(out, made) as fresh:
        assert fresh.found == fresh.journal == {}
        assert not list(fresh.place.staging.iterdir())


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
        State(Folder(out), asked_of(planned(one), "a-2", {}), {}, resume=True)


def testdifferences_of_name_the_place_and_both_values():
    old = {"a": 1, "b": {"c": [1, 2]}, "text": "x: 1\ny: 2", "gone": 0}
    new = {"a": 1, "b": {"c": [1, 3]}, "text": "x: 1\ny: 5", "here": 0}
    assert list(differences_of(old, new)) == [
        "b.c[1] was '2', now '3'",
        "gone was '0', now 'None'",
        "here was 'None', now '0'",
        "text was 'y: 2', now 'y: 5'",
    ]
    assert list(differences_of(old, old)) == []
    assert len(list(differences_of({"text": "a\nb"}, {"text": "a\nb\nc"}))) == 1
    assert list(differences_of({"l": [1]}, {"l": [1, 2]})) == ["l was '[1]', now '[1, 2]'"]


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


# --- commit -----------------------------------------------------------------------------------------------------------------------


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
    with state_of(out, made, overwrite=True) as state:
        fill(state)
        assert (out / "file").read_text() == "old"
        state.commit()
    assert (out / "file").read_text() == "new"
    assert not beside(out).exists()


def crash_at_the_second_rename(calls: list[Path] | None = None) -> Callable[[Path, Path], Path]:
    rename, calls = Path.rename, [] if calls is None else calls

    def renamed(path: Path, target: Path) -> Path:
        calls.append(path)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return rename(path, target)

    return renamed


@pytest.mark.parametrize("resume", [False, True])
def test_a_crash_between_the_two_renames_loses_neither_output(family, tmp_path, monkeypatch, resume):
    made, out = planned(family(1)), tmp_path / "out"
    out.mkdir()
    (out / "file").write_text("old")
    calls: list[Path] = []
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt), state_of(out, made, overwrite=True) as state:
        fill(state)
        patch.setattr(Path, "rename", crash_at_the_second_rename(calls))
        state.commit()
    assert calls == [out, beside(out) / "out"]
    assert not out.exists()
    with state_of(out, made, resume=resume, overwrite=True) as again:
        assert (out / "file").read_text() == "old", "restored first"
        if resume:
            assert (again.place.staging / "file").read_text() == "new"
        else:
            fill(again)
        again.commit()
    assert (out / "file").read_text() == "new"


def place_a_folder(out: Path) -> None:
    out.mkdir()
    (out / "file").write_text("theirs")


def place_a_file(out: Path) -> None:
    out.write_text("theirs")


def place_a_link(out: Path) -> None:
    place_a_folder(out.with_name("elsewhere"))
    out.symlink_to(out.with_name("elsewhere"))


PLACED = {"a folder": place_a_folder, "a file": place_a_file, "a link": place_a_link}


def contents(path: Path) -> dict[str, str]:
    return {str(p.relative_to(path)): p.read_text() for p in [path, *path.rglob("*")] if p.is_file()}


@pytest.mark.parametrize("kind", PLACED)
def test_an_output_that_appears_during_the_run_is_not_touched_and_the_work_is_kept(family, tmp_path, kind):
    made, out = planned(family(1)), tmp_path / "out"
    told_all = rf"wanted a free name .*, found {kind} that appeared .*move it away and finish with --resume"
    with pytest.raises(RunError, match=told_all) as told, state_of(out, made) as state:
        fill(state)
        PLACED[kind](out)
        before = contents(out)
        state.commit()
    assert contents(out) == before
    assert out.is_symlink() == (kind == "a link")
    assert (beside(out) / "out" / "file").read_text() == "new"

    out.rename(tmp_path / "moved")  # the advice, followed
    assert problems_of(out, made, resume=True) == ()
    with state_of(out, made, resume=True) as again:
        assert (again.place.staging / "file").read_text() == "new"
        again.commit()
    assert contents(out) == {"file": "new"}
    assert contents(tmp_path / "moved") == before
    assert not beside(out).exists()
    assert ("--resume --overwrite" in str(told.value)) == (kind == "a folder"), "--overwrite replaces folders only"


def test_a_folder_that_appeared_during_the_run_is_replaced_if_that_is_asked_for(family, tmp_path):
    made, out = planned(family(1)), tmp_path / "out"
    with pytest.raises(RunError, match="replace it with --resume --overwrite"), state_of(out, made) as state:
        fill(state)
        place_a_folder(out)
        state.commit()
    (problem,) = problems_of(out, made, resume=True)
    assert "--resume --overwrite; the unfinished run goes on" in problem
    with pytest.raises(RequestError, match="the unfinished run goes on"):
        state_of(out, made, resume=True)
    assert problems_of(out, made, resume=True, overwrite=True) == ()
    with state_of(out, made, resume=True, overwrite=True) as again:
        assert (again.place.staging / "file").read_text() == "new"
        again.commit()
    assert contents(out) == {"file": "new"}
    assert not beside(out).exists()


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_empty_folder_that_appears_during_the_run_gives_way(family, tmp_path, overwrite):
    made, out = planned(family(1)), tmp_path / "out"
    with state_of(out, made, overwrite=overwrite) as state:
        fill(state)
        out.mkdir()
        state.commit()
    assert contents(out) == {"file": "new"}


@pytest.mark.parametrize("kind", ["a file", "a link"])
def test_overwrite_replaces_no_file_or_link_that_appears_during_the_run(family, tmp_path, kind):
    made, out = planned(family(1)), tmp_path / "out"
    with pytest.raises(RunError, match=f"found {kind} that appeared"), state_of(out, made, overwrite=True) as state:
        fill(state)
        PLACED[kind](out)
        before = contents(out)
        state.commit()
    assert contents(out) == before
    out.unlink()
    with state_of(out, made, resume=True) as again:
        again.commit()
    assert contents(out) == {"file": "new"}


def test_an_output_that_appears_between_the_two_renames_is_not_touched(family, tmp_path, monkeypatch):
    made, out = planned(family(1)), tmp_path / "out"
    place_a_folder(out)
    rename = Path.rename

    def rename_and_place(path: Path, target: Path) -> Path:
        result = rename(path, target)
        if path == out:
            place_a_folder(out)
        return result

    with monkeypatch.context() as patch, pytest.raises(RunError, match="appeared"), state_of(out, made, overwrite=True) as state:
        fill(state)
        patch.setattr(Path, "rename", rename_and_place)
        state.commit()
    assert contents(out) == {"file": "theirs"}
    assert contents(beside(out) / "out") == {"file": "new"}
    with state_of(out, made, resume=True, overwrite=True) as again:
        again.commit()
    assert contents(out) == {"file": "new"}
    assert not beside(out).exists()


def test_a_rename_that_fails_leaves_the_old_output_where_it_was(family, tmp_path, monkeypatch):
    made, out = planned(family(1)), tmp_path / "out"
    place_a_folder(out)
    rename = Path.rename

    def fail_for_the_new(path: Path, target: Path) -> Path:
        if path == beside(out) / "out":
            raise OSError(errno.EIO, "broken", str(path))
        return rename(path, target)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="broken"), state_of(out, made, overwrite=True) as state:
        fill(state)
        patch.setattr(Path, "rename", fail_for_the_new)
        state.commit()
    assert contents(out) == {"file": "theirs"}
    with state_of(out, made, resume=True, overwrite=True) as again:
        again.commit()
    assert contents(out) == {"file": "new"}


def test_an_old_output_that_a_crash_set_aside_comes_back_and_is_replaced_on_request_only(family, tmp_path, monkeypatch):
    made, out = planned(family(1)), tmp_path / "out"
    place_a_folder(out)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt), state_of(out, made, overwrite=True) as state:
        fill(state)
        patch.setattr(Path, "rename", crash_at_the_second_rename())
        state.commit()
    assert not out.exists()
    with pytest.raises(RequestError, match="--resume --overwrite; the unfinished run goes on"):
        state_of(out, made, resume=True)
    assert contents(out) == {"file": "theirs"}
    with state_of(out, made, resume=True, overwrite=True) as again:
        again.commit()
    assert contents(out) == {"file": "new"}


def test_after_the_commit_there_is_nothing_to_resume_even_if_the_old_output_is_still_there(family, tmp_path, monkeypatch):
    made, out = planned(family(1)), tmp_path / "out"
    place_a_folder(out)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt), state_of(out, made, overwrite=True) as state:
        fill(state)
        patch.setattr(Folder, "_clear", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        state.commit()
    assert contents(out) == {"file": "new"}
    assert contents(beside(out) / "replaced") == {"file": "theirs"}
    out.rename(tmp_path / "published")
    with state_of(out, made) as again:
        fill(again)
        assert not out.exists(), "the old output was replaced, and stays so"
        again.commit()
    assert not beside(out).exists()
    assert contents(out) == {"file": "new"}


def test_a_state_that_ends_leaves_what_the_next_process_has_begun(family, tmp_path, monkeypatch):
    made, out = planned(family(1)), tmp_path / "out"
    followers: list[State] = []
    unlink = Path.unlink

    def unlink_and_follow(path: Path, missing_ok: bool = False) -> None:
        unlink(path, missing_ok=missing_ok)
        if path.name == "lock" and not followers:
            followers.append(state_of(tmp_path / "out", made, overwrite=True))

    with monkeypatch.context() as patch, state_of(out, made) as state:
        fill(state)
        patch.setattr(Path, "unlink", unlink_and_follow)
        state.commit()
    (follower,) = followers
    with follower:
        with pytest.raises(RequestError, match="another merge"):
            state_of(out, made, overwrite=True)
        fill(follower, "newer")
        follower.commit()
    assert contents(out) == {"file": "newer"}
