"""The output has the layout of its base: what loads the inputs loads the output."""

from __future__ import annotations

import contextlib
import json
import random
import shutil
from pathlib import Path

import families
import pytest
import torch
from families import Family, merged_to
from junk import mutate_bytes, mutate_json
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


def pipeline(one: Family, part: str = "unet", **parts: object) -> Family:
    """The family in the layout of a pipeline: what is merged in one part, beside a text encoder with weights of its own."""
    renamed(one, "diffusion_pytorch_model.safetensors")
    for name in NAMES:
        folder = one.folder / name
        folder.rename(one.folder / "aside")
        folder.mkdir()
        (one.folder / "aside").rename(folder / part)
        (folder / part / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"old")
        families.write(folder / "text_encoder", {"w": torch.full((4, 4), 2.0)}, config={"model_type": "clip_text_model"})
        (folder / "scheduler").mkdir()
        (folder / "scheduler" / "scheduler_config.json").write_text("{}")
        (folder / "v1-5-pruned.safetensors").write_bytes(b"another form of all of it")
        index = {
            "_class_name": "P",
            part: ["diffusers", "M"],
            "text_encoder": ["transformers", "C"],
            "scheduler": ["diffusers", "S"],
        }
        (folder / "model_index.json").write_text(json.dumps(index | {"safety_checker": [None, None]} | parts))
    return one


IN_A_PIPELINE = {
    *("model_index.json", "scheduler/scheduler_config.json", "text_encoder/config.json", "text_encoder/model.safetensors"),
}


@pytest.mark.parametrize("part", ["unet", "transformer"])
@pytest.mark.parametrize("max_shard_bytes", [20_000, 5 * 10**9])
def test_of_a_pipeline_the_part_that_is_trained_is_merged_and_the_rest_stays(
    tmp_path: Path, part: str, max_shard_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = pipeline(family(tmp_path, DIFFUSERS), part)
    asked = recipe(one)
    made = plan_of(asked, open_inputs(asked), max_shard_bytes=max_shard_bytes)
    assert "text_encoder/model.safetensors goes along as the base has it: it is not merged" in made.notes
    stays = {f.name for f in made.left_out}
    assert {f"{part}/diffusion_pytorch_model.fp16.safetensors", "v1-5-pruned.safetensors"} <= stays
    monkeypatch.setattr("families.plan_of", lambda asked, inputs: plan_of(asked, inputs, max_shard_bytes=max_shard_bytes))
    out = merged_to(tmp_path / "out", asked)
    stem = f"{part}/diffusion_pytorch_model"
    count = len(made.files)
    shards = {f"{stem}-{k + 1:05d}-of-{count:05d}.safetensors" for k in range(count)} | {f"{stem}.safetensors.index.json"}
    tensors = {f"{stem}.safetensors"} if count == 1 else shards
    assert files_in(out) == IN_A_PIPELINE | tensors | {f"{part}/config.json"}
    assert (count > 1) == (max_shard_bytes == 20_000)
    again = open_checkpoint(str(out))  # its index included
    assert again.inner == f"{part}/"
    assert again.tensors.keys() == one.base.keys()
    plain = merged_to(tmp_path / "plain", recipe(family(tmp_path / "f", DIFFUSERS)))
    assert {n: t.tolist() for n, t in families.load(out / part).items()} == {n: t.tolist() for n, t in families.load(plain).items()}


def test_a_part_may_be_named_by_itself_on_either_side(tmp_path: Path) -> None:
    one = pipeline(family(tmp_path, DIFFUSERS))
    models = [str(one.folder / f"model{k}/unet") for k in range(2)]
    out = merged_to(tmp_path / "out", recipe(one, models=models))
    assert files_in(out) == IN_A_PIPELINE | {"unet/diffusion_pytorch_model.safetensors", "unet/config.json"}
    assert verify(out, quiet=True).ok
    alone = merged_to(tmp_path / "alone", recipe(one, base_model=str(one.folder / "base/unet")))
    assert files_in(alone) == {"diffusion_pytorch_model.safetensors", "config.json"}
    assert families.load(alone).keys() == families.load(out / "unet").keys()


def test_another_text_encoder_that_a_model_trained_is_told_as_lost(tmp_path: Path) -> None:
    one = pipeline(family(tmp_path, DIFFUSERS))
    families.write(one.folder / "model1/text_encoder", {"w": torch.full((4, 4), 3.0)}, config=None)
    notes = plan_of(recipe(one), open_inputs(recipe(one))).notes
    lost = f"{one.folder}/model1: has another 'text_encoder/model.safetensors', which is not merged: what it trained there is lost"
    assert [note for note in notes if "has another" in note] == [lost]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (
            {"transformer_2": ["diffusers", "T"]},
            "wanted a pipeline with one `unet` or `transformer`, found 'unet', 'transformer_2'",
        ),
        ({"unet": [None, None]}, "found none ('text_encoder', 'scheduler'). Fix: name the folder of the part"),
        ({"../../etc": ["diffusers", "T"]}, "model_index.json: wanted names of folders in it, found '../../etc'"),
        ({"a/b": ["diffusers", "T"]}, "wanted names of folders in it, found 'a/b'"),
    ],
)
def test_a_pipeline_that_leaves_open_what_to_merge_is_refused(tmp_path: Path, change: dict[str, object], problem: str) -> None:
    one = pipeline(family(tmp_path, DIFFUSERS), **change)
    with pytest.raises(RequestError) as caught:
        open_inputs(recipe(one))
    assert problem in str(caught.value)


@pytest.mark.parametrize("part", ["text_encoder", "unet", "scheduler"])
def test_a_part_that_is_a_link_out_of_the_folder_is_asked_for(tmp_path: Path, part: str) -> None:
    """As where several pipelines share one text encoder to save disk: without it the output would not load."""
    one = pipeline(family(tmp_path / "f", DIFFUSERS))
    (one.folder / "base" / part).rename(tmp_path / "shared")
    (one.folder / "base" / part).symlink_to(tmp_path / "shared")
    with pytest.raises(RequestError, match=rf"base/{part}: wanted a file that can go along into the output.*cp -rL"):
        plan_of(recipe(one), open_inputs(recipe(one)))


def test_a_list_of_modules_or_a_module_that_leads_out_is_asked_for(tmp_path: Path) -> None:
    one = family(tmp_path / "f", dict(families.CONFIG))
    base = one.folder / "base"
    (base / "modules.json").write_text(json.dumps([{"path": ""}, {"path": "1_Pooling"}]))
    (tmp_path / "shared").mkdir()
    (base / "1_Pooling").symlink_to(tmp_path / "shared")
    with pytest.raises(RequestError, match=r"base/1_Pooling: wanted a file that can go along"):
        plan_of(recipe(one), open_inputs(recipe(one)))


def test_a_variant_in_parts_is_told_as_that(tmp_path: Path) -> None:
    one = pipeline(Family(tmp_path, *families.fine_tuned(2), shards=1, config=DIFFUSERS))
    for name in NAMES:
        unet = one.folder / name / "unet"
        (unet / "diffusion_pytorch_model.fp16.safetensors").unlink()
        raw = (unet / "diffusion_pytorch_model.safetensors").read_bytes()
        (unet / "diffusion_pytorch_model.safetensors").unlink()
        for k in (1, 2):
            (unet / f"diffusion_pytorch_model.fp16-0000{k}-of-00002.safetensors").write_bytes(raw)
        (unet / "diffusion_pytorch_model.safetensors.index.fp16.json").write_text("{}")
    wanted = r"wanted diffusion_pytorch_model\.safetensors\.index\.json, found a variant in parts .* save it without a variant"
    with pytest.raises(RequestError, match=wanted):
        open_inputs(recipe(one))


@pytest.mark.parametrize("raw", [b"[]", b"{", b'"x"', b"\xff", b'{"unet": 3}', b'{"unet": ["a", "b", "c"]}'])
def test_a_list_of_parts_that_is_none_is_refused(tmp_path: Path, raw: bytes) -> None:
    one = pipeline(family(tmp_path, DIFFUSERS))
    (one.folder / "base" / "model_index.json").write_bytes(raw)
    with pytest.raises(RequestError, match=r"base"):
        open_inputs(recipe(one))


@pytest.mark.parametrize("mutants", [500, pytest.param(10_000, marks=pytest.mark.very_slow)])
def test_mutated_lists_of_parts_are_read_or_refused(tmp_path: Path, mutants: int) -> None:
    one = pipeline(family(tmp_path, DIFFUSERS))
    path = one.folder / "base" / "model_index.json"
    raw, rng, read = path.read_bytes(), random.Random(mutants), 0
    for number in range(mutants):
        value = json.loads(raw)
        path.write_bytes(mutate_bytes(rng, raw, raw) if number % 2 else json.dumps(mutate_json(rng, value)).encode())
        with contextlib.suppress(RequestError):
            assert open_checkpoint(str(one.folder / "base")).inner == "unet/"
            read += 1
    assert mutants / 50 < read < mutants


def test_settings_of_quantised_weights_that_are_left_over_are_in_no_config(tmp_path: Path) -> None:
    one = pipeline(family(tmp_path, DIFFUSERS | {"quantization_config": {"quant_method": "bitsandbytes"}}))
    out = merged_to(tmp_path / "out", recipe(one))
    assert json.loads((out / "unet/config.json").read_text()) == DIFFUSERS


# --- the loaders themselves -------------------------------------------------------------------------------------------------------


def perturbed(module: torch.nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["unet", "transformer"])
def test_diffusers_loads_the_pipeline(tmp_path: Path, kind: str) -> None:
    import diffusers

    torch.manual_seed(0)
    sizes = {"block_out_channels": (32, 32), "norm_num_groups": 8}
    if kind == "unet":
        blocks = {"down_block_types": ("DownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "UpBlock2D")}
        unet = diffusers.UNet2DModel(sample_size=8, in_channels=3, out_channels=3, layers_per_block=1, **sizes, **blocks)
        pipe = diffusers.DDPMPipeline(unet=unet, scheduler=diffusers.DDPMScheduler())
        trained: torch.nn.Module = unet
    else:
        trained = diffusers.DiTTransformer2DModel(
            num_attention_heads=2, attention_head_dim=8, in_channels=4, num_layers=1, sample_size=8, num_embeds_ada_norm=10,
            norm_num_groups=4,
        )  # fmt: skip
        ends = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
        vae = diffusers.AutoencoderKL(latent_channels=4, **sizes, **ends)
        pipe = diffusers.DiTPipeline(transformer=trained, vae=vae, scheduler=diffusers.DDIMScheduler())
    expected: dict[str, torch.Tensor] = {}
    for k, name in enumerate(NAMES):
        if k:
            perturbed(trained, k)
        pipe.save_pretrained(tmp_path / name)
        for key, tensor in trained.state_dict().items():
            expected[key] = expected.get(key, 0.0) + tensor.double() * (0.0, 0.5, 0.5)[k]
    asked = {"merge_method": "linear", "base_model": "base", "models": ["model0", "model1"]}
    out = merged_to(tmp_path / "out", Recipe.from_dict(asked, folder=tmp_path))
    loaded = type(pipe).from_pretrained(out)
    for key, tensor in getattr(loaded, kind).state_dict().items():
        torch.testing.assert_close(tensor.double(), expected[key], rtol=1e-6, atol=1e-6)
    if kind == "transformer":
        assert all(torch.equal(a, b) for a, b in zip(loaded.vae.parameters(), vae.parameters(), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["beside", "subfolder"])
def test_sentence_transformers_loads_the_model_with_its_pooling(tmp_path: Path, layout: str) -> None:
    import sentence_transformers
    import transformers
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    torch.manual_seed(0)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "merge", "of", "models"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    config = transformers.BertConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=16,
    )  # fmt: skip
    model = transformers.BertModel(config)
    for k, name in enumerate(NAMES):
        if k:
            perturbed(model, k)
        model.save_pretrained(tmp_path / f"bert{k}")
        transformers.BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / f"bert{k}")
        transformer = Transformer(str(tmp_path / f"bert{k}"))
        pooling = Pooling(16, "max")
        sentence_transformers.SentenceTransformer(modules=[transformer, pooling], device="cpu").save_pretrained(
            str(tmp_path / name)
        )
        if layout == "subfolder":  # as before version 2
            folder = tmp_path / name
            modules = json.loads((folder / "modules.json").read_text())
            assert [module["path"] for module in modules] == ["", "1_Pooling"]
            modules[0]["path"] = "0_Transformer"
            (folder / "modules.json").write_text(json.dumps(modules))
            (folder / "0_Transformer").mkdir()
            apart = {"modules.json", "README.md", "config_sentence_transformers.json"}
            for path in [path for path in folder.iterdir() if path.is_file() and path.name not in apart]:
                path.rename(folder / "0_Transformer" / path.name)
    asked = {"merge_method": "linear", "base_model": "base", "models": ["model0", "model1"], "tokenizer_source": "model1"}
    out = merged_to(tmp_path / "out", Recipe.from_dict(asked, folder=tmp_path))
    loaded = sentence_transformers.SentenceTransformer(str(out), device="cpu")
    assert "max" in str(loaded[1].get_config_dict()["pooling_mode"])  # by default it is the mean
    own = dict(loaded[0].auto_model.named_parameters())
    inner = "0_Transformer/" if layout == "subfolder" else ""
    assert (out / f"{inner}model.safetensors").is_file()
    stored = [load_file(tmp_path / name / f"{inner}model.safetensors") for name in NAMES[1:]]
    for key, tensor in stored[0].items():
        torch.testing.assert_close(own[key].detach(), (tensor + stored[1][key]) / 2)
    assert loaded.encode("a merge of models").shape == (16,)


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
