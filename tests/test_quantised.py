"""Whether a model is quantised is what its tensors are, not what a config says."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from families import Family, StateDict, merged_to
from safetensors.torch import load_file, save_file

from pcb_ray import Recipe, RequestError
from pcb_ray.files.checkpoint import open_checkpoint
from pcb_ray.planning import open_inputs, plan_of

PACKED, SMALL = torch.zeros(64, 8, dtype=torch.uint8), torch.zeros(8)
INTS, EIGHT = torch.zeros(8, 64, dtype=torch.int32), torch.zeros(64, 64, dtype=torch.int8)

# As each of these libraries names its tensors: {tensor: content}, what its config says, what the message must say.
SCHEMES: list[tuple[dict[str, torch.Tensor], Any, tuple[str, ...]]] = [
    (
        {"l.weight": PACKED, "l.weight.absmax": SMALL, "l.weight.quant_state.bitsandbytes__nf4": PACKED[0]},
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        ("bitsandbytes (4 bit)", "dequantize()"),
    ),
    (  # quant_storage=bfloat16, as FSDP wants it
        {"l.weight": torch.zeros(64, 1).bfloat16(), "l.weight.quant_state.bitsandbytes__nf4": PACKED[0]},
        None,
        ("bitsandbytes (4 bit)",),
    ),
    ({"l.weight": EIGHT, "l.SCB": SMALL}, None, ("bitsandbytes (8 bit)", "dequantize()")),
    ({"l.qweight": INTS, "l.qzeros": INTS, "l.scales": SMALL, "l.g_idx": INTS[0]}, {"quant_method": "gptq"}, ("GPTQ,",)),
    ({"l.qweight": INTS, "l.qzeros": INTS, "l.scales": SMALL}, {"quant_method": "awq"}, ("AWQ,",)),
    ({"l.weight_packed": INTS, "l.weight_scale": SMALL}, None, ("compressed-tensors", "CompressedTensorsConfig(dequantize=True)")),
    ({"l.weight": EIGHT, "l.weight_scale": SMALL}, {"quant_method": "compressed-tensors"}, ("CompressedTensorsConfig",)),
    ({"e.gate_up_proj_blocks": PACKED, "e.gate_up_proj_scales": PACKED}, None, ("MXFP4", "Mxfp4Config(dequantize=True)")),
    ({"l.W_q": PACKED, "l.meta": SMALL}, None, ("HQQ",)),
    ({"l.weight._data": EIGHT, "l.weight._scale": SMALL}, None, ("quanto",)),
    ({"l.codes": INTS, "l.codebooks": SMALL}, None, ("AQLM",)),
    ({"l.q_weight": INTS, "l.q_scale": INTS}, None, ("EXL2",)),
    ({"l.weight": EIGHT, "l.weight_scales": SMALL}, None, ("EETQ",)),
    ({"l.weight": EIGHT}, {"quant_method": "newest"}, ("'newest', as its config says",)),
    ({"l.weight": PACKED}, None, ("a scheme that no config names",)),
    ({"l.weight": torch.zeros(4, 4).to(torch.float8_e4m3fn)}, None, ("F8_E4M3", "FineGrainedFP8Config(dequantize=True)")),
]


@pytest.mark.parametrize(("tensors", "config", "parts"), SCHEMES, ids=lambda value: value[0] if isinstance(value, tuple) else "")
def test_a_model_of_quantised_tensors_is_refused_by_the_name_of_its_scheme(
    tmp_path: Path, tensors: dict[str, torch.Tensor], config: object, parts: tuple[str, ...]
) -> None:
    save_file({"norm.weight": SMALL, **{k: v.clone() for k, v in tensors.items()}}, tmp_path / "model.safetensors")
    for said in (config, None):
        (tmp_path / "config.json").write_text(json.dumps({"quantization_config": said} if said else {}))
        with pytest.raises(RequestError) as caught:
            open_checkpoint(str(tmp_path))
        (problem,) = caught.value.problems
        if said == config:
            assert all(part in problem for part in parts), problem
            assert "which is not supported. Fix: " in problem


def fp8(folder: Path) -> StateDict:
    """A small Llama in blocks of 8-bit floats with their scales, as transformers reads it; what it stands for."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 256, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=False)).bfloat16().save_pretrained(folder)
    whole = load_file(folder / "model.safetensors")
    stored: StateDict = {}
    for name, tensor in whole.items():
        if "proj" not in name:
            stored[name] = tensor
            continue
        rows, columns = tensor.shape
        blocks = tensor.float().reshape(rows // 128, 128, columns // 128, 128)
        scale = blocks.abs().amax(dim=(1, 3)) / 448
        stored[name] = (blocks / scale[:, None, :, None]).reshape(rows, columns).to(torch.float8_e4m3fn)
        stored[name.replace(".weight", ".weight_scale_inv")] = scale
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    settings = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    return whole


def mxfp4(folder: Path) -> StateDict:
    """A small gpt-oss with its experts in 4-bit blocks and scales; the names and shapes that it stands for."""
    from transformers import GptOssConfig, GptOssForCausalLM

    sizes = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = GptOssConfig(**sizes, num_key_value_heads=2, head_dim=32, num_local_experts=2, num_experts_per_tok=1)
    GptOssForCausalLM(config).bfloat16().save_pretrained(folder)
    whole = load_file(folder / "model.safetensors")
    stored: StateDict = {}
    for name, tensor in whole.items():
        if name.endswith(("gate_up_proj", "down_proj")):
            experts, inner, outer = tensor.shape
            stored[f"{name}_blocks"] = torch.randint(0, 255, (experts, outer, inner // 32, 16), dtype=torch.uint8)
            stored[f"{name}_scales"] = torch.full((experts, outer, inner // 32), 120, dtype=torch.uint8)
        else:
            stored[name] = tensor
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    said = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(said | {"quantization_config": {"quant_method": "mxfp4"}}))
    return whole


@pytest.mark.very_slow
@pytest.mark.filterwarnings("ignore")  # transformers' own
@pytest.mark.parametrize("make", [fp8, mxfp4])
def test_the_advice_for_a_quantised_model_works_when_it_is_followed(tmp_path: Path, make: Callable[[Path], StateDict]) -> None:
    import transformers

    whole = make(tmp_path / "quantised")
    with pytest.raises(RequestError) as caught:
        open_checkpoint(str(tmp_path / "quantised"))
    asked = re.search(
        r"quantization_config=(\w+)\(dequantize=True\).* save_pretrained\(FOLDER, save_original_format=False\)", str(caught.value)
    )
    assert asked is not None
    settings = getattr(transformers, asked[1])(dequantize=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "quantised", quantization_config=settings, dtype=torch.bfloat16
    )
    model.save_pretrained(tmp_path / "whole", save_original_format=False)
    found = open_checkpoint(str(tmp_path / "whole"))
    assert {n: (t.dtype, t.shape) for n, t in found.tensors.items()} == {n: ("BF16", tuple(t.shape)) for n, t in whole.items()}
    assert found.notes == ()
    if make is fp8:
        saved = load_file(tmp_path / "whole" / "model.safetensors")
        for name, tensor in whole.items():
            assert (saved[name].float() - tensor.float()).abs().max() <= 0.07 * tensor.float().abs().max(), name


def test_masks_ids_and_counters_are_no_quantised_weights(tmp_path: Path) -> None:
    save_file(
        {
            "h.0.attn.bias": torch.ones(1, 1, 8, 8, dtype=torch.uint8),
            "h.0.mask": torch.ones(8, 8, dtype=torch.bool),
            "embeddings.position_ids": torch.arange(8)[None],
            "attn.relative_position_index": torch.zeros(8, 8, dtype=torch.int64),
            "vq.indices": torch.zeros(8, dtype=torch.int64),
            "bn.num_batches_tracked": torch.tensor(3),
            "down_blocks": SMALL.clone(),
            "w.weight": SMALL,
        },
        tmp_path / "model.safetensors",
    )
    assert open_checkpoint(str(tmp_path)).notes == ()


LEFT = {"quant_method": "bitsandbytes", "load_in_4bit": True}


@pytest.mark.parametrize(
    "config",
    [
        {"quantization_config": LEFT},
        {"compression_config": {"format": "x"}},
        {"text_config": {"quantization_config": LEFT, "n": 1}},
        {"llm_config": {"quantization_config": LEFT}},
        {"quantization_config": 8},
    ],
)
@pytest.mark.parametrize("of", ["base", "model1"])
def test_a_quantization_config_beside_bfloat16_tensors_is_a_note_and_not_in_the_output(
    tmp_path: Path, config: dict[str, Any], of: str
) -> None:
    one = Family(tmp_path, *families.fine_tuned(2))
    (one.folder / of / "config.json").write_text(json.dumps({**families.CONFIG, **config}))
    recipe = Recipe.from_dict(one.recipe())
    (note,) = plan_of(recipe, open_inputs(recipe)).notes
    assert "which no tensor is: it is taken as left over from a training" in note
    assert f"/{of}: config.json says" in note
    written = (merged_to(tmp_path / "out", recipe) / "config.json").read_text()
    assert "quantization" not in written
    assert "compression" not in written
    assert json.loads(written)["architectures"] == ["LlamaForCausalLM"]
