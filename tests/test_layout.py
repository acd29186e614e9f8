"""The output has the layout of its base: what loads the inputs loads the output."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import families
import pytest
import torch
from families import Family, merged_to
from safetensors.torch import load_file, save_file

from pcb_ray import Recipe, RequestError, verify
from pcb_ray.files.checkpoint import open_checkpoint
from pcb_ray.planning import open_inputs, plan_of

DIFFUSERS = {"_class_name": "UNet2DConditionModel", "_diffusers_version": "0.30.0", "in_channels": 4}
NAMES = ("base", "model0", "model1")


def family(folder: Path, config: dict[str, object] | None = None) -> Family:
    return Family(folder, *families.fine_tuned(2), config=config)


def renamed(one: Family, file: str) -> Family:
    """The same with files of tensors of this name."""
    for name in NAMES:
        (one.folder / name / "model.safetensors").rename(one.folder / name / file)
    return one


def recipe(one: Family, **changes: object) -> Recipe:
    return Recipe.from_dict(one.recipe(merge_method="task_arithmetic", **changes))


def files_in(out: Path) -> set[str]:
    return {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()} - {
        *("README.md", "pcb_receipt.json", "pcb_recipe.yaml"),
    }


@pytest.mark.parametrize("file", ["diffusion_pytorch_model.safetensors", "consolidated.safetensors", "flux1-dev.safetensors"])
def test_tensors_are_written_under_the_name_that_the_bases_loader_looks_for(tmp_path: Path, file: str) -> None:
    config = DIFFUSERS if file.startswith("diffusion") else None
    one = renamed(family(tmp_path, config), file)
    out = merged_to(tmp_path / "out", recipe(one))
    assert files_in(out) == {file, *(["config.json"] if config else [])}
    if config:
        assert (out / "config.json").read_bytes() == (one.folder / "base" / "config.json").read_bytes()
        assert "library_name: diffusers" in (out / "README.md").read_text()
    else:
        assert "library_name" not in (out / "README.md").read_text()
    assert verify(out, quiet=True).ok
    assert open_checkpoint(str(out)).tensors.keys() == one.base.keys()


@pytest.mark.parametrize(
    ("file", "is_sharded"),
    [("diffusion_pytorch_model.safetensors", True), ("consolidated.safetensors", True), ("flux1-dev.safetensors", False)],
)
def test_parts_are_numbered_as_the_loader_has_them_or_there_is_one_file(tmp_path: Path, file: str, is_sharded: bool) -> None:
    one = renamed(family(tmp_path), file)
    asked = recipe(one)
    made = plan_of(asked, open_inputs(asked), max_shard_bytes=20_000)
    names = [f.name for f in made.files]
    stem = file.removesuffix(".safetensors")
    wanted = [f"{stem}-{k + 1:05d}-of-{len(names):05d}.safetensors" for k in range(len(names))] if is_sharded else [file]
    assert names == wanted
    assert (len(names) > 1) == is_sharded


def test_shards_of_diffusers_are_read_by_their_index_and_written_so(tmp_path: Path) -> None:
    one = Family(tmp_path, *families.fine_tuned(1), shards=2, config=DIFFUSERS)
    for name in ("base", "model0"):
        folder = one.folder / name
        text = (folder / "model.safetensors.index.json").read_text().replace('"model-0', '"diffusion_pytorch_model-0')
        (folder / "model.safetensors.index.json").unlink()
        (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(text)
        for path in folder.glob("model-*.safetensors"):
            path.rename(folder / f"diffusion_pytorch_{path.name}")
    assert files_in(merged_to(tmp_path / "out", recipe(one))) == {"diffusion_pytorch_model.safetensors", "config.json"}


def test_a_pipeline_is_refused_with_the_folder_to_name_which_then_merges(tmp_path: Path) -> None:
    one = renamed(family(tmp_path, DIFFUSERS), "diffusion_pytorch_model.safetensors")
    for name in NAMES:
        folder = one.folder / name
        folder.rename(tmp_path / "aside")
        folder.mkdir()
        (tmp_path / "aside").rename(folder / "unet")
        (folder / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    with pytest.raises(
        RequestError, match=r"base: wanted a model, found a pipeline of diffusers\. Fix: name the folder of the part"
    ):
        open_inputs(recipe(one))
    parts = {"base_model": str(one.folder / "base/unet"), "models": [str(one.folder / f"model{k}/unet") for k in range(2)]}
    out = merged_to(tmp_path / "out", recipe(one, **parts))
    assert files_in(out) == {"diffusion_pytorch_model.safetensors", "config.json"}


def test_one_bare_file_gives_a_file_of_its_name(tmp_path: Path) -> None:
    one = family(tmp_path)
    paths = {name: str(one.folder / name / "model.safetensors") for name in NAMES}
    bare = shutil.copy(paths["base"], tmp_path / "sd15.safetensors")
    out = merged_to(tmp_path / "out", recipe(one, base_model=str(bare), models=[paths["model0"], paths["model1"]]))
    assert files_in(out) == {"sd15.safetensors"}


def test_a_nested_state_dict_of_a_training_is_read_weights_only_and_written_as_safetensors(tmp_path: Path) -> None:
    one = family(tmp_path)
    paths = []
    for name, state in zip(NAMES, (one.base, *one.models), strict=True):
        record = {"state_dict": state, "global_step": 840_000, "pytorch-lightning_version": "1.4", "callbacks": {"x": [1]}}
        torch.save(record, tmp_path / f"{name}.ckpt")
        paths.append(str(tmp_path / f"{name}.ckpt"))
    out = merged_to(tmp_path / "out", recipe(one, base_model=paths[0], models=paths[1:]))
    assert files_in(out) == {"base.safetensors"}
    folders = merged_to(tmp_path / "folders", recipe(one))
    assert {n: t.tolist() for n, t in load_file(out / "base.safetensors").items()} == {
        n: t.tolist() for n, t in load_file(folders / "model.safetensors").items()
    }


def test_of_two_layouts_in_one_folder_that_of_transformers_is_merged_and_the_other_stays_behind(tmp_path: Path) -> None:
    one = family(tmp_path, dict(families.CONFIG))
    for name in NAMES:
        save_file({"layers.0.w": torch.ones(2)}, one.folder / name / "consolidated.safetensors")
        (one.folder / name / "params.json").write_text(json.dumps({"dim": 32}))
    out = merged_to(tmp_path / "out", recipe(one))
    assert files_in(out) == {"model.safetensors", "config.json", "params.json"}


def test_a_stray_file_of_tensors_is_not_taken_for_the_model(tmp_path: Path) -> None:
    one = family(tmp_path, dict(families.CONFIG))
    for name, state in zip(NAMES, (one.base, *one.models), strict=True):
        folder = one.folder / name
        (folder / "model.safetensors").unlink()
        torch.save(state, folder / "pytorch_model.bin")
        save_file({"v_head.weight": torch.ones(2)}, folder / "value_head.safetensors")
    asked = recipe(one)
    made = plan_of(asked, open_inputs(asked))
    assert {t.name for t in made.tensors} == one.base.keys()
    assert [f.name for f in made.files] == ["model.safetensors"]
    assert any(note.startswith("value_head.safetensors does not go along") for note in made.notes)
