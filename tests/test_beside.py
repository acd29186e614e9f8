"""What lies beside the tensors goes along, but for what is named: the loaders of the inputs load the output."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import families
import pytest
import torch
from families import Family, merged_to
from junk import mutate_bytes, mutate_json
from safetensors.torch import load_file, save_file

from pcb_ray import Recipe, RequestError, verify
from pcb_ray.files import beside
from pcb_ray.files.checkpoint import open_checkpoint
from pcb_ray.files.foreign import is_inside
from pcb_ray.planning import open_inputs, plan_of

SUM = {"merge_method": "task_arithmetic", "parameters": {"lambda": 0.5}}

ALONG = (
    "config.json", "tokenizer.json", "spm.model", "source.spm", "tekken.json", "qwen.tiktoken", "normalizer.json", "vocab.bpe",
    "preprocessor_config.json", "video_preprocessor_config.json", "chat_template.jinja", "additional_chat_templates/tool_use.jinja",
    "modeling_toy.py", "nested/code/helper.py", "modules.json", "1_Pooling/config.json", "sentence_bert_config.json",
    "LICENSE", "NOTICE.txt", "USE_POLICY.md", "assets/picture.png", "speaker_embeddings/en.npy", "voices/one.pt", "model_head.pkl",
    "latest.txt", "results.json", "generation_config.json", "params.json", "1_Pooling/README.md",
)  # fmt: skip
LEFT_OUT = {
    "README.md": "the base's own card",
    "pcb_receipt.json": "a record of how the base was made",
    ".gitattributes": "hidden",
    "__pycache__/": "a cache",
    "helper.pyc": "a cache",
    "original/": "the original of another layout",
    "pytorch_model.bin": beside.OTHER_WEIGHTS,
    "consolidated.00.pth": beside.OTHER_WEIGHTS,
    "model.fp16.safetensors": beside.OTHER_WEIGHTS,
    "best.ckpt": beside.OTHER_WEIGHTS,
    "pytorch_model.bin.index.json": beside.OTHER_WEIGHTS,
    "other/": beside.OTHER_WEIGHTS,
    "optimizer.pt": "training state",
    "training_args.bin": "training state",
    "trainer_state.json": "training state",
    "rng_state_0.pth": "training state",
    "checkpoint-500/": "training state",
    "runs/": "training state",
    "tf_model.h5": "another framework's weights",
    "flax_model.msgpack": "another framework's weights",
    "model-q4.gguf": "another framework's weights",
    "onnx/": "another framework's weights",
    "adapter_config.json": "an adapter, which is not merged",
    "quantize_config.json": "settings of quantised weights, which the output has not",
}  # fmt: skip
BELOW = {
    "__pycache__/": "a.pyc", "original/": "params.json", "other/": "model.safetensors", "checkpoint-500/": "config.json",
    "runs/": "events", "onnx/": "config.json",
}  # fmt: skip


OF_BASE = {"of": "base", "model": {"type": "WordLevel", "vocab": {"a": 0}}}


def put(folder: Path, name: str, content: str = "{}") -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(content)


def fill(folder: Path) -> None:
    """Put all of these beside a model."""
    for name in ALONG:
        if name != "config.json":
            put(folder, name, "[]" if name == "modules.json" else f"of {name}")
    for name in LEFT_OUT:
        put(folder, name + BELOW.get(name, ""), "not wanted")


def merged_names(out: Path) -> set[str]:
    own = {"README.md", "pcb_receipt.json", "pcb_recipe.yaml", "model.safetensors"}
    return {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()} - own


# --- what goes along --------------------------------------------------------------------------------------------------------------


def test_all_goes_along_but_weights_training_state_and_what_is_said_of_the_base(tmp_path: Path) -> None:
    one = Family(tmp_path, *families.fine_tuned(2))
    fill(one.folder / "base")
    recipe = Recipe.from_dict(one.recipe(**SUM))
    out = merged_to(tmp_path / "out", recipe)
    assert merged_names(out) == {*ALONG}
    for name in {*ALONG} - {"config.json"}:
        assert (out / name).read_bytes() == (one.folder / "base" / name).read_bytes(), name
    assert "merged by task_arithmetic" in (out / "README.md").read_text()
    assert verify(out, quiet=True).ok
    plan = plan_of(recipe, open_inputs(recipe))
    assert {f.name: f.left_out for f in plan.left_out} == LEFT_OUT
    assert {f.name: f.size for f in plan.along} == {name: (one.folder / "base" / name).stat().st_size for name in ALONG}
    assert {f["name"] for f in plan.summary()["files_along"]} == {*ALONG}
    surprising = {"best.ckpt", "other/"}
    assert {name for name in LEFT_OUT if any(note.startswith(f"{name} does not go along") for note in plan.notes)} == surprising


def test_an_output_can_be_merged_again_and_its_records_stay_behind(tmp_path: Path) -> None:
    one = Family(tmp_path, *families.fine_tuned(2))
    fill(one.folder / "base")
    first = merged_to(tmp_path / "first", Recipe.from_dict(one.recipe(**SUM)))
    second = merged_to(tmp_path / "second", Recipe.from_dict(one.recipe(**SUM, base_model=str(first))))
    assert merged_names(second) == {*ALONG}
    assert (second / "pcb_recipe.yaml").read_bytes() != (first / "pcb_recipe.yaml").read_bytes()


def test_a_link_that_leads_out_of_the_folder_stays_behind_with_a_note(tmp_path: Path) -> None:
    one = Family(tmp_path, *families.fine_tuned(1))
    base = one.folder / "base"
    put(tmp_path, "secret.json")
    put(tmp_path, "elsewhere/more.json")
    put(base, "real.json")
    (base / "out.json").symlink_to(tmp_path / "secret.json")
    (base / "folder").symlink_to(tmp_path / "elsewhere")
    (base / "nowhere.json").symlink_to(tmp_path / "none")
    (base / "inside.json").symlink_to("real.json")
    blob = tmp_path / "models--org--name" / "blobs" / "0123"
    put(blob.parent, blob.name)
    (base / "cached.json").symlink_to(blob)
    (tmp_path / "link").symlink_to(base)
    for place in (base, tmp_path / "link"):
        recipe = Recipe.from_dict(one.recipe(**SUM, base_model=str(place)))
        plan = plan_of(recipe, open_inputs(recipe))
        assert {f.name for f in plan.along} == {"config.json", "real.json", "inside.json", "cached.json"}
        assert {f.name: f.left_out for f in plan.left_out} == {
            "out.json": beside.LEADS_OUT,
            "folder": beside.LEADS_OUT,
            "nowhere.json": "a link that leads nowhere",
        }
        assert len([note for note in plan.notes if "does not go along" in note]) == 3
    assert (merged_to(tmp_path / "out", recipe) / "inside.json").is_file()
    assert not (tmp_path / "out" / "inside.json").is_symlink()


@pytest.mark.parametrize("name", ["tokenizer.json", "modeling_toy.py", "chat_template.jinja", "spm.model"])
@pytest.mark.parametrize("where", ["out", "nowhere"])
def test_a_file_that_loaders_need_and_that_only_a_link_leads_to_is_asked_for(tmp_path: Path, name: str, where: str) -> None:
    one = Family(tmp_path, *families.fine_tuned(1))
    put(tmp_path, "elsewhere")
    (one.folder / "base" / name).symlink_to(tmp_path / ("elsewhere" if where == "out" else "none"))
    recipe = Recipe.from_dict(one.recipe(**SUM))
    with pytest.raises(
        RequestError, match=rf"base/{name}: wanted a file that can go along into the output.* Fix: put the file itself"
    ):
        plan_of(recipe, open_inputs(recipe))


def test_a_link_to_a_folder_of_the_model_is_one_of_its_folders(tmp_path: Path) -> None:
    one = Family(tmp_path, *families.fine_tuned(1))
    put(one.folder / "base", "pool/config.json", '{"pool": 1}')
    (one.folder / "base" / "1_Pooling").symlink_to("pool")
    (one.folder / "base" / "pool" / "up").symlink_to("..")  # for ever, if it were followed
    out = merged_to(tmp_path / "out", Recipe.from_dict(one.recipe(**SUM)))
    assert {"1_Pooling/config.json", "pool/config.json"} < merged_names(out)
    assert (out / "1_Pooling" / "config.json").read_text() == '{"pool": 1}'


def test_a_link_to_itself_hides_no_other_file(tmp_path: Path) -> None:
    one = Family(tmp_path, *families.fine_tuned(1))
    for name in ("a.json", "m.json", "z.json"):
        put(one.folder / "base", name)
    (one.folder / "base" / "loop").symlink_to("loop")
    recipe = Recipe.from_dict(one.recipe(**SUM))
    plan = plan_of(recipe, open_inputs(recipe))
    assert {f.name for f in plan.along} == {"config.json", "a.json", "m.json", "z.json"}
    assert "loop does not go along: a link that leads nowhere" in plan.notes


def test_a_folder_that_can_not_be_read_and_folders_left_out_of_any_size_stop_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = Family(tmp_path, *families.fine_tuned(1))
    monkeypatch.setattr(beside, "MAX_FILES", 20)
    for k in range(30):
        put(one.folder / "base" / "checkpoint-1", str(k))
    put(one.folder / "base", "lost+found/x")
    scandir = os.scandir

    def refusing(path: object) -> object:
        if str(path).endswith("lost+found"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)  # type: ignore[call-overload]

    monkeypatch.setattr(beside.os, "scandir", refusing)
    recipe = Recipe.from_dict(one.recipe(**SUM))
    assert (
        "lost+found/ does not go along: a folder that can't be read: Permission denied"
        in plan_of(recipe, open_inputs(recipe)).notes
    )


def test_what_is_so_large_that_nobody_can_have_meant_it_stays_behind_with_a_note(tmp_path: Path) -> None:
    one = Family(tmp_path, *families.fine_tuned(1))
    with (one.folder / "base" / "data.jsonl").open("wb") as file:
        file.truncate(beside.MAX_FILE_BYTES + 1)
    recipe = Recipe.from_dict(one.recipe(**SUM))
    plan = plan_of(recipe, open_inputs(recipe))
    assert "data.jsonl does not go along: larger than 268,435,456 bytes" in plan.notes


def test_a_folder_of_many_files_is_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = Family(tmp_path, *families.fine_tuned(1))
    monkeypatch.setattr(beside, "MAX_FILES", 20)
    for k in range(30):
        put(one.folder / "base" / ".git", str(k))
    open_checkpoint(str(one.folder / "base"))  # what is hidden counts once
    for k in range(30):
        put(one.folder / "base" / "data", str(k))
    with pytest.raises(RequestError, match=r"wanted the folder of one model, found more than 20 files in it\. Fix: give"):
        open_checkpoint(str(one.folder / "base"))


def test_a_pipe_among_the_files_is_not_read(tmp_path: Path) -> None:
    one = Family(tmp_path, *families.fine_tuned(1))
    os.mkfifo(one.folder / "base" / "pipe.json")
    assert merged_names(merged_to(tmp_path / "out", Recipe.from_dict(one.recipe(**SUM)))) == {"config.json"}


# --- the tokenizer's --------------------------------------------------------------------------------------------------------------


def test_the_tokenizers_files_are_taken_from_one_place_and_never_mixed(tmp_path: Path) -> None:
    one = Family(tmp_path, *families.fine_tuned(2))
    base, model = one.folder / "base", one.folder / "model1"
    for name in ("tokenizer.json", "added_tokens.json", "chat_template.jinja", "generation_config.json", "LICENSE"):
        put(base, name, json.dumps(OF_BASE if name == "tokenizer.json" else {"of": "base"}))
    for name in ("tokenizer.json", "tokenization_toy.py", "normalizer.json", "LICENSE", "extra.json", "optimizer.pt"):
        put(model, name, json.dumps(OF_BASE | {"of": "model1"} if name == "tokenizer.json" else {"of": "model1"}))
    recipe = Recipe.from_dict(one.recipe(**SUM, tokenizer_source=str(model)))
    out = merged_to(tmp_path / "out", recipe)
    assert merged_names(out) == {
        *("config.json", "tokenizer.json", "tokenization_toy.py", "normalizer.json", "generation_config.json", "LICENSE"),
    }
    assert "model1" in (out / "tokenizer.json").read_text()
    assert "base" in (out / "generation_config.json").read_text()
    assert "base" in (out / "LICENSE").read_text()
    left_out = {f.name: f.left_out for f in plan_of(recipe, open_inputs(recipe)).left_out}
    assert left_out == dict.fromkeys(
        ("tokenizer.json", "added_tokens.json", "chat_template.jinja"), f"the tokenizer is taken from {model}"
    )
    put(model, "generation_config.json", json.dumps({"of": "model1"}))
    assert "model1" in (merged_to(tmp_path / "again", recipe) / "generation_config.json").read_text()


def test_a_tokenizer_that_is_nowhere_is_told(tmp_path: Path) -> None:
    one = Family(tmp_path, *families.fine_tuned(2))
    put(one.folder / "model1", "generation_config.json")
    recipe = Recipe.from_dict(one.recipe(**SUM, tokenizer_source=str(one.folder / "model1")))
    with pytest.raises(RequestError, match="tokenizer_source: wanted a model with a tokenizer beside it, found no file of one in"):
        plan_of(recipe, open_inputs(recipe))
    put(one.folder / "model1", "tokenizer.json")
    recipe = Recipe.from_dict(one.recipe(**SUM))
    (note,) = plan_of(recipe, open_inputs(recipe)).notes
    assert f"`tokenizer_source: {one.folder / 'model1'}` takes that one's" in note


# --- loaders ----------------------------------------------------------------------------------------------------------------------

CONFIG = """
from transformers import PretrainedConfig
class ToyConfig(PretrainedConfig):
    model_type = "toy"
    def __init__(self, width=16, **kw):
        self.width = width
        super().__init__(**kw)
"""
MODEL = """
import torch
from transformers import PreTrainedModel
from .configuration_toy import ToyConfig
class ToyModel(PreTrainedModel):
    config_class = ToyConfig
    def __init__(self, config):
        super().__init__(config)
        self.proj = torch.nn.Linear(config.width, config.width)
        self.post_init()
"""
LOAD = """
import sys, torch
from transformers import AutoModel
model = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)
print(type(model).__name__, float(model.proj.weight.sum()))
"""


def test_a_model_whose_code_lies_beside_it_is_loaded_by_that_code(tmp_path: Path) -> None:
    shapes = {"proj.weight": (16, 16), "proj.bias": (16,)}
    auto = {"AutoConfig": "configuration_toy.ToyConfig", "AutoModel": "modeling_toy.ToyModel"}
    config = {"model_type": "toy", "width": 16, "auto_map": auto, "architectures": ["ToyModel"]}
    one = Family(tmp_path, *families.fine_tuned(2, shapes=shapes, dtype=torch.float32), config=config)
    for name in ("base", "model0", "model1"):
        (one.folder / name / "configuration_toy.py").write_text(CONFIG)
        (one.folder / name / "modeling_toy.py").write_text(MODEL)
    out = merged_to(tmp_path / "out", Recipe.from_dict(one.recipe(**SUM)))
    home = {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(out)], env=os.environ | home, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    name, total = done.stdout.split()
    assert name == "ToyModel"
    assert float(total) == pytest.approx(float(load_file(out / "model.safetensors")["proj.weight"].sum()), abs=1e-4)


def test_the_other_modules_of_sentence_transformers_go_along_with_their_weights(tmp_path: Path) -> None:
    one = Family(tmp_path, *families.fine_tuned(2))
    base = one.folder / "base"
    modules = [{"idx": k, "name": str(k), "path": path, "type": "x"} for k, path in enumerate(("", "1_Pooling", "./2_Dense/"))]
    put(base, "modules.json", json.dumps(modules))
    put(base, "1_Pooling/config.json", '{"pooling_mode_cls_token": true}')
    (base / "2_Dense").mkdir()
    save_file({"linear.weight": torch.ones(4, 4)}, base / "2_Dense" / "model.safetensors")
    shutil.copytree(base / "2_Dense", base / "3_Unlisted")
    recipe = Recipe.from_dict(one.recipe(**SUM))
    notes = plan_of(recipe, open_inputs(recipe)).notes
    assert "2_Dense/model.safetensors goes along as the base has it: it is not merged" in notes
    assert f"3_Unlisted/ does not go along: {beside.OTHER_WEIGHTS}" in notes
    out = merged_to(tmp_path / "out", recipe)
    assert merged_names(out) == {"config.json", "modules.json", "1_Pooling/config.json", "2_Dense/model.safetensors"}
    assert torch.equal(load_file(out / "2_Dense" / "model.safetensors")["linear.weight"], torch.ones(4, 4))


@pytest.mark.parametrize("path", ["../other", "/etc", "a/../../b", "", None, 3, "a\\b", "x" * 300, "\x00"])
def test_the_paths_of_modules_lie_in_the_models_folder(tmp_path: Path, path: object) -> None:
    one = Family(tmp_path, *families.fine_tuned(1))
    put(one.folder / "base", "modules.json", json.dumps([{"path": path}]))
    if path == "":
        open_checkpoint(str(one.folder / "base"))
        return
    with pytest.raises(RequestError, match=r"modules\.json: wanted a list of modules, each with the `path` of its folder, found"):
        open_checkpoint(str(one.folder / "base"))


@pytest.mark.parametrize("mutants", [500, pytest.param(10_000, marks=pytest.mark.very_slow)])
def test_mutated_lists_of_modules_are_read_or_refused(tmp_path: Path, mutants: int) -> None:
    rng = random.Random(mutants)
    one = Family(tmp_path, *families.fine_tuned(0))
    base = one.folder / "base"
    right = [{"idx": k, "name": str(k), "path": path, "type": "x"} for k, path in enumerate(("", "1_Pooling", "./2_Dense/"))]
    put(base, "1_Pooling/config.json")
    put(base, "2_Dense/model.safetensors", "weights")
    read = 0
    for number in range(mutants):
        raw = json.dumps(mutate_json(rng, mutate_json(rng, right)) if number % 2 else right).encode()
        (base / "modules.json").write_bytes(raw if number % 2 else mutate_bytes(rng, raw, raw))
        with contextlib.suppress(RequestError):
            found = open_checkpoint(str(base)).beside
            assert all(f.left_out or is_inside(f.name) for f in found)
            read += 1
    assert mutants / 50 < read < mutants
