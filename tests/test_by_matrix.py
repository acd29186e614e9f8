"""Matrices through the whole engine: merged and calibrated whole, whoever does it and however it is cut, the right way round."""

from __future__ import annotations

import importlib.util
import os
import signal
from pathlib import Path

import families
import numpy as np
import pytest
import spectral_oracle as oracle
import torch
from families import Family, MakeFamily

from pcb_ray import merge_state_dicts
from pcb_ray.budget import worker_bytes
from pcb_ray.errors import InputError, RequestError
from pcb_ray.matrices import View, layer_of, views_of
from pcb_ray.planning import plan

pytestmark = pytest.mark.skipif(importlib.util.find_spec("pcb_ray.methods._dense") is None, reason="installed without a C compiler")

METHODS = ("iso_c", "iso_cts", "tsv_m", "wudi")
GPT2 = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_layer": 1, "n_embd": 12, "n_head": 2, "vocab_size": 40}
GPT2_SHAPES = {
    "transformer.wte.weight": (40, 12),
    "transformer.h.0.attn.c_attn.weight": (12, 36),
    "transformer.h.0.attn.c_proj.weight": (12, 12),
    "transformer.h.0.mlp.c_fc.weight": (12, 48),
    "transformer.h.0.mlp.c_fc.bias": (48,),
}


def taus(family: Family, name: str) -> list[np.ndarray]:
    return [(model[name].float() - family.base[name].float()).numpy() for model in family.models]


def merged(family: Family, out: Path, **changes: object) -> families.StateDict:
    families.merge_locally(plan(family.recipe(**changes)), out)
    return families.load(out)


def assert_close(found: torch.Tensor, wanted: np.ndarray) -> None:
    np.testing.assert_allclose(found.float().numpy(), wanted, rtol=0, atol=3e-6 * max(1.0, abs(wanted).max()))


@pytest.mark.parametrize("method", METHODS)
def test_matrices_are_merged_whole_and_all_else_is_the_mean(family: MakeFamily, tmp_path: Path, method: str) -> None:
    one = family(3, dtype=torch.float32)
    found = merged(one, tmp_path / "out", merge_method=method, parameters={"lambda": 1.5})
    for name, theta in one.base.items():
        of_models = taus(one, name)
        if theta.ndim == 2 and name not in ("model.embed_tokens.weight", "lm_head.weight"):
            assert_close(found[name], theta.numpy() + 1.5 * getattr(oracle, method)(of_models))
        else:
            assert_close(found[name], theta.numpy() + sum(of_models) / 3)


@pytest.mark.parametrize("method", [*METHODS, "pcb", "ties"])
def test_the_same_bytes_however_it_is_cut(family: MakeFamily, tmp_path: Path, method: str) -> None:
    one = family(3, scale=3)
    calibrated = {} if method.startswith("iso") else {"parameters": {"calibrate": "svc"}}
    made = plan(one.recipe(merge_method=method, **calibrated))
    first = families.merge_locally(made, tmp_path / "first", threads=1).files
    assert families.merge_locally(made, tmp_path / "other", threads=2, block_elements=4096).files == first
    with families.small_engine():
        small = plan(one.recipe(merge_method=method, **calibrated))
        assert families.merge_locally(small, tmp_path / "small", threads=2).files == first


@pytest.mark.parametrize("method", ["pcb", "ties", "task_arithmetic", "wudi", "tsv_m"])
def test_svc_calibrates_what_the_method_makes_of_matrices_and_nothing_else(family: MakeFamily, tmp_path: Path, method: str) -> None:
    one = family(3, dtype=torch.float32)
    plain = merged(one, tmp_path / "plain", merge_method=method)
    found = merged(one, tmp_path / "out", merge_method=method, parameters={"calibrate": "svc", "lambda": 0.7})
    at_0_7 = merged(one, tmp_path / "weaker", merge_method=method, parameters={"lambda": 0.7})
    for name, theta in one.base.items():
        if theta.ndim == 2 and name not in ("model.embed_tokens.weight", "lm_head.weight"):
            delta = (plain[name] - theta).numpy()  # rounded once more than the engine's
            assert_close(found[name], theta.numpy() + 0.7 * oracle.svc(delta, taus(one, name)))
        else:
            assert torch.equal(found[name], at_0_7[name])


def test_weights_and_zero_tasks_and_one_model(family: MakeFamily, tmp_path: Path) -> None:
    one = family(2, dtype=torch.float32)
    name = "model.layers.0.mlp.up_proj.weight"
    recipe = one.recipe(merge_method="iso_c", parameters={"lambda": 1.0})
    recipe["models"] = [dict(model, parameters={"weight": w}) for model, w in zip(recipe["models"], (0.5, -2.0), strict=True)]
    families.merge_locally(plan(recipe), tmp_path / "weighted")
    tasks = [np.float32(w) * t for w, t in zip((0.5, -2.0), taus(one, name), strict=True)]
    assert_close(families.load(tmp_path / "weighted")[name], one.base[name].numpy() + oracle.iso_c(tasks))
    same = {k: v.clone() for k, v in one.base.items()}
    for method in METHODS:
        found = merge_state_dicts(one.base, [same, same], method=method)
        assert all(torch.equal(found[k], one.base[k]) for k in found), "of nothing comes nothing"
        alone = merge_state_dicts(one.base, one.models[:1], method=method, lambda_=1.0)
        if method != "iso_c" and method != "iso_cts":
            assert_close(alone[name], one.models[0][name].numpy())


def test_a_conv1d_family_is_its_linear_twin_turned(tmp_path: Path) -> None:
    base, models = families.fine_tuned(3, shapes=GPT2_SHAPES, dtype=torch.float32)
    gpt2 = Family(tmp_path / "gpt2", base, models, config=GPT2)

    def turned(state: families.StateDict) -> families.StateDict:
        return {k: v.T.contiguous() if v.ndim == 2 and "wte" not in k else v for k, v in state.items()}

    twin = Family(tmp_path / "twin", turned(base), [turned(model) for model in models], config=None)
    for method in (*METHODS, "task_arithmetic"):
        changes = {"merge_method": method} | ({} if method.startswith("iso") else {"parameters": {"calibrate": "svc"}})
        found = merged(gpt2, tmp_path / f"{method}-gpt2", **changes)
        of_twin = merged(twin, tmp_path / f"{method}-twin", **changes)
        assert {k: v.numpy().tobytes() for k, v in turned(found).items()} == {k: v.numpy().tobytes() for k, v in of_twin.items()}
    unturned = merged(gpt2, tmp_path / "unturned", merge_method="wudi", transpose=["*.c_*.weight"])
    name = "transformer.h.0.mlp.c_fc.weight"
    assert_close(unturned[name], base[name].numpy() + oracle.wudi(taus(gpt2, name)))


def test_what_is_packed_is_merged_apart_if_it_is_split(tmp_path: Path) -> None:
    base, models = families.fine_tuned(3, shapes=GPT2_SHAPES, dtype=torch.float32)
    gpt2 = Family(tmp_path / "gpt2", base, models, config=GPT2)
    name = "transformer.h.0.attn.c_attn.weight"
    for split in ([12], [12, 12, 12]):
        found = merged(gpt2, tmp_path / f"out{len(split)}", merge_method="wudi", split={"*.c_attn.weight": split})
        for k in range(3):
            q = slice(12 * k, 12 * k + 12)
            tasks = [np.ascontiguousarray(task[:, q].T) for task in taus(gpt2, name)]
            assert_close(found[name][:, q], base[name][:, q].numpy() + oracle.wudi(tasks).T)
    with pytest.raises(RequestError, match=r"split: transformer.h.0.attn.c_attn.weight: wanted a number that divides its 36"):
        plan(gpt2.recipe(merge_method="wudi", split={"*.c_attn.weight": [12, 12]}))


def test_tensors_may_be_named_as_rest_and_small_ones_are(family: MakeFamily, tmp_path: Path) -> None:
    one = family(3, dtype=torch.float32, shapes={**families.SHAPES, "model.layers.0.mlp.gate.weight": (2, 32)})
    name, small = "model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.gate.weight"
    made = plan(one.recipe(merge_method="tsv_m", rest_tensors=["*up_proj*"], parameters={"rest": "base"}))
    assert any(small in note and "too small for tsv_m of 3 models" in note for note in made.notes)
    families.merge_locally(made, tmp_path / "out")
    found = families.load(tmp_path / "out")
    for kept in (name, small, "model.embed_tokens.weight", "model.norm.weight"):
        assert torch.equal(found[kept], one.base[kept])
    assert not torch.equal(found["model.layers.0.self_attn.q_proj.weight"], one.base["model.layers.0.self_attn.q_proj.weight"])


def test_views_of_stacks_convolutions_and_the_rest() -> None:
    assert views_of((3, 4, 5), "row stack") == tuple(View(20 * k, 4, 5, 5, 1) for k in range(3))
    assert views_of((2, 4, 5), "column stack") == (View(0, 5, 4, 1, 5), View(20, 5, 4, 1, 5))
    assert views_of((6, 3, 2, 2), "rows") == (View(0, 6, 12, 12, 1),)
    assert views_of((4, 9), "columns", (6, 3)) == (View(0, 6, 4, 1, 9), View(6, 3, 4, 1, 9))
    assert views_of((4, 9), "rows", (2,)) == (View(0, 2, 9, 9, 1), View(18, 2, 9, 9, 1))
    assert views_of((7,), "rows") == views_of((3, 4), "none") == views_of((0, 4), "rows") == ()
    assert layer_of("x.embed_tokens.weight", (9, 4), None) == layer_of("x.proj.bias", (9, 4), None) == "none"
    assert layer_of("x.proj.weight", (9, 4), None) == "rows"
    assert layer_of("x.proj.weight", (9, 4), {"x.proj.weight": "columns"}) == "columns"


def test_a_stack_of_experts_is_a_matrix_for_each(tmp_path: Path) -> None:
    config = {"model_type": "gpt_oss", "architectures": ["GptOssForCausalLM"], "num_hidden_layers": 1, "num_local_experts": 3}
    name = "model.layers.0.mlp.experts.down_proj"
    base, models = families.fine_tuned(2, shapes={name: (3, 10, 6), "model.norm.weight": (6,)}, dtype=torch.float32)
    one = Family(tmp_path / "family", base, models, config=config)
    found = merged(one, tmp_path / "out", merge_method="wudi")
    for k in range(3):
        tasks = [np.ascontiguousarray(task[k].T) for task in taus(one, name)]
        assert_close(found[name][k], base[name][k].numpy() + oracle.wudi(tasks).T)


def test_what_is_not_finite_is_named(family: MakeFamily, tmp_path: Path) -> None:
    base, models = families.fine_tuned(2)
    models[1]["model.layers.1.mlp.up_proj.weight"][40, 3] = float("nan")
    one = Family(tmp_path / "family", base, models)
    for method in METHODS:
        with pytest.raises(InputError, match=r"model1: tensor model.layers.1.mlp.up_proj.weight: .*found nan at index \[40, 3\]"):
            families.merge_locally(plan(one.recipe(merge_method=method)), tmp_path / method)


def test_a_flat_spectrum_is_not_calibrated(family: MakeFamily) -> None:
    for method in ("iso_c", "iso_cts"):
        with pytest.raises(RequestError, match="wanted none with iso_c.*all singular values equal already"):
            plan(family().recipe(merge_method=method, parameters={"calibrate": "svc"}))
    with pytest.raises(RequestError, match="wanted none with linear, which has no task vectors"):
        plan(family().recipe(merge_method="linear", parameters={"calibrate": "svc"}))


def test_memory_does_not_grow_with_the_number_of_models(family: MakeFamily) -> None:
    few, many = (plan(family(n, scale=64).recipe(merge_method="iso_c")) for n in (2, 9))
    per_block = 4096 * 7 * 100  # what a block of more models takes
    assert worker_bytes(many, 4096) - worker_bytes(few, 4096) < per_block
    assert (
        worker_bytes(few, 4096) - worker_bytes(plan(family(2, scale=64).recipe(merge_method="task_arithmetic")), 4096)
        > 64 * 64 * 32 * 16
    )


@pytest.mark.ray
@pytest.mark.very_slow
@pytest.mark.parametrize("method", ["iso_c", "pcb"])
def test_a_worker_killed_among_matrices_and_a_resume_change_no_byte(tmp_path: Path, method: str) -> None:
    from clusters import owners_under, pcb_ray, ray_address, receipt_of, running

    base, models = families.fine_tuned(3, shapes={f"model.layers.{k}.mlp.up_proj.weight": (600, 512) for k in range(12)})
    one, out = Family(tmp_path / "family", base, models), tmp_path / "out"
    changes = {"merge_method": method} | ({"parameters": {"calibrate": "svc"}} if method == "pcb" else {})
    recipe = one.recipe_file(**changes)
    wanted = families.merge_locally(plan(one.recipe(**changes)), tmp_path / "wanted").files
    joined = ("--address", ray_address())
    with running("merge", recipe, out, "--workers", 2, *joined) as run:
        run.wait_for("write: ")
        with run.stopped():
            owners_under(os.getpid())[0].kill()
        run.wait_for("died")
        run.send(signal.SIGINT, group=True)
        run.finish()
    done = pcb_ray("merge", recipe, out, "--workers", 1, "--resume", *joined)
    assert done.process.returncode == 0, done.text
    assert {name: (out / name).read_bytes() for name in wanted} == wanted
    assert receipt_of(out)["method"].startswith(method)
    checked = pcb_ray("verify", out)
    assert checked.process.returncode == 0, checked.text
