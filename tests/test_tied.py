"""What is one tensor under several names counts once, whoever saved it how often; what was trained apart is merged apart."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import families
import numpy as np
import oracle
import pytest
import torch
from families import Family, StateDict, merge_locally, merged_to
from safetensors.torch import load_file, save_file
from test_evaluators import EVALUATORS, job_of

import pcb_ray
from pcb_ray import Recipe, RequestError
from pcb_ray.analysis import analyse
from pcb_ray.errors import InputError
from pcb_ray.files.checkpoint import Checkpoint, Tensor
from pcb_ray.files.store import LocalStore, MemoryStore
from pcb_ray.local import LocalOwners
from pcb_ray.matching import match
from pcb_ray.merging import Kept
from pcb_ray.output.folder import Folder
from pcb_ray.output.state import State
from pcb_ray.planning import Plan, open_inputs, plan_of
from pcb_ray.searching.run import check_follows
from pcb_ray.searching.scorer import Scorer
from pcb_ray.session import Session
from pcb_ray.tied import HEADS, Samples

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
SHAPES = {EMBED: (64, 16), "model.layers.0.q.weight": (16, 16), "model.layers.0.k.weight": (16, 16), "model.norm.weight": (16,)}
SILENT: dict[str, Any] = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
T5 = {"shared.weight": (64, 16), "encoder.q.weight": (16, 16), "encoder.k.weight": (16, 16), "encoder.norm.weight": (16,)}
COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")


def states(n: int = 2, shapes: dict[str, tuple[int, ...]] = SHAPES) -> list[StateDict]:
    base, models = families.fine_tuned(n, shapes=shapes)
    return [base, *models]


def with_copies(state: StateDict, *names: str, of: str = EMBED) -> StateDict:
    return state | {name: state[of].clone() for name in names}


def trained(state: StateDict, name: str, of: str = EMBED) -> StateDict:
    """The model with this copy trained apart."""
    noise = torch.randn(state[of].shape, generator=torch.Generator().manual_seed(5)) * 0.01
    return state | {name: (state[of].float() + noise).to(state[of].dtype)}


def family(folder: Path, models: list[StateDict], *configs: dict[str, Any] | None) -> Family:
    """The family with these configs, or one for all."""
    made = Family(folder, models[0], models[1:], config=configs[0])
    for path, config in zip(("base", "model0", "model1"), configs, strict=False):
        if config is not None:
            (made.folder / path / "config.json").write_text(json.dumps(config))
    return made


def recipe(one: Family, **changes: Any) -> Recipe:
    return Recipe.from_dict(one.recipe(**{"merge_method": "pcb", "parameters": {"density": 0.3}, **changes}))


def planned(one: Family, **changes: Any) -> Plan:
    asked = recipe(one, **changes)
    return plan_of(asked, open_inputs(asked))


def check_merge(one: Family, out: Path, tied: dict[str, str], models: list[StateDict] | None = None, **changes: Any) -> StateDict:
    """The merge is that of the oracle, in which copies count once."""
    found = families.load(merged_to(out, recipe(one, **changes)))
    base, *others = models or [one.base, *one.models]
    expected = oracle.merge_state_dicts(base, others, "pcb", density=0.3, tied=tied, exclude=changes.get("exclude", ()))
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-3)
    for name, original in tied.items():
        assert torch.equal(found[name], found[original])
    return found


# --- the same copies, stored as often as anybody likes ----------------------------------------------------------------------------


def test_equal_copies_are_found_whatever_their_names_and_the_config(tmp_path: Path) -> None:
    models = [with_copies(one, "odd.name") for one in states()]
    for k, config in enumerate((None, SILENT, SILENT | {"tie_word_embeddings": False})):
        one = family(tmp_path / str(k), models, config)
        made = planned(one)
        assert sum(t.numel() for t in states()[0].values()) == made.D
        assert [(w.name, made.tensors[w.tensor].name) for w in made.again] == [("odd.name", EMBED)]
        assert made.notes == ()
        check_merge(one, tmp_path / f"out{k}", {"odd.name": EMBED})


@pytest.mark.parametrize("stored", [("base",), ("base", "model0"), ("model1",), ("model0", "model1")])
def test_a_model_that_stores_fewer_or_more_copies_is_no_mismatch(tmp_path: Path, stored: tuple[str, ...]) -> None:
    names = ("base", "model0", "model1")
    models = states(2, T5)
    for k, name in enumerate(names):
        models[k] = with_copies(models[k], *(COPIES if name in stored else ()), of="shared.weight")
    one = family(tmp_path / "f", models, {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]})
    made = planned(one)
    assert sum(t.numel() for t in states(0, T5)[0].values()) == made.D
    assert all("which is one tensor with" in note for note in made.notes)
    tied = dict.fromkeys(COPIES, "shared.weight") if "base" in stored else {}
    full = [with_copies({name: state[name] for name in T5}, *tied, of="shared.weight") for state in models]
    check_merge(one, tmp_path / "out", tied, full)


def test_a_model_may_store_the_copy_alone(tmp_path: Path) -> None:
    base, *models = states()
    base = with_copies(base, HEAD)
    models[0] = {HEAD if name == EMBED else name: tensor for name, tensor in models[0].items()}
    one = family(tmp_path / "f", [base, *models], SILENT)
    full = [base, with_copies({EMBED: models[0][HEAD], **models[0]}, HEAD), with_copies(models[1], HEAD)]
    check_merge(one, tmp_path / "out", {HEAD: EMBED}, full)


def test_one_of_several_of_a_shape_is_a_copy_where_a_model_lacks_it(tmp_path: Path) -> None:
    """The head of T5 1.1 is its own and of the embedding's shape, so the class of that shape is not all one."""
    base, *models = (trained(one, HEAD, of="shared.weight") for one in states(2, T5))
    base = with_copies(base, *COPIES, of="shared.weight")
    one = family(tmp_path / "f", [base, *models], {"model_type": "t5", "tie_word_embeddings": False})
    tied = dict.fromkeys(COPIES, "shared.weight")
    check_merge(one, tmp_path / "out", tied, [base, *(with_copies(m, *COPIES, of="shared.weight") for m in models)])


@pytest.mark.parametrize("what", ["constant", "one of the layers", "a mask"])
def test_what_may_be_equal_by_chance_is_no_copy(tmp_path: Path, what: str) -> None:
    models = states()
    for state in models:
        if what == "constant":
            state |= {"a.weight": torch.ones(5, 7), "b.weight": torch.ones(5, 7)}
        elif what == "one of the layers":
            state["model.layers.0.v.weight"] = state["model.layers.0.q.weight"].clone()
        else:
            mask = torch.tril(torch.ones(1, 1, 8, 8))
            state |= {"h.0.attn.bias": mask, "h.1.attn.bias": mask.clone()}
    made = planned(family(tmp_path, models, SILENT))
    assert sum(t.numel() for t in models[0].values()) == made.D
    assert made.again == made.tied == ()


def test_copies_of_one_storage_stay_copies_where_no_config_ties_them(tmp_path: Path) -> None:
    """A loader that knows no ties would miss the names that are left out."""
    models = states()
    for k, state in enumerate(models):
        (tmp_path / f"{k}").mkdir()
        torch.save(state | {"head.weight": state[EMBED]}, tmp_path / f"{k}" / "model.bin")
    bare = {"merge_method": "pcb", "base_model": "0/model.bin", "models": [{"model": "1/model.bin"}, {"model": "2/model.bin"}]}
    asked = Recipe.from_dict({**bare, "parameters": {"density": 0.3}}, folder=tmp_path)
    found = families.load(merged_to(tmp_path / "out", asked))
    assert torch.equal(found["head.weight"], found[EMBED])
    assert set(found) == {*SHAPES, "head.weight"}


@pytest.mark.parametrize("dtype", [None, "float32"])
@pytest.mark.parametrize("method", ["pcb", "ties", "task_arithmetic", "linear"])
def test_all_methods_write_copies_and_read_what_they_announce(tmp_path: Path, method: str, dtype: str | None) -> None:
    one = family(tmp_path / "f", [with_copies(state, *COPIES) for state in states()], SILENT)
    with families.small_engine():
        made = planned(one, merge_method=method, parameters={}, dtype=dtype)
        merge_locally(made, tmp_path / "out")
    found = families.load(tmp_path / "out")
    plain = planned(family(tmp_path / "g", states(), SILENT), merge_method=method, parameters={}, dtype=dtype)
    merge_locally(plain, tmp_path / "plain")
    expected = families.load(tmp_path / "plain")
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor)
    assert all(torch.equal(found[name], expected[EMBED]) for name in COPIES)


def test_state_dicts_in_memory_are_tied_alike() -> None:
    models = [with_copies(one, HEAD) for one in states()]
    merged = pcb_ray.merge_state_dicts(models[0], models[1:], density=0.3)
    plain = pcb_ray.merge_state_dicts(states()[0], states()[1:], density=0.3)
    assert torch.equal(merged[HEAD], plain[EMBED])
    assert torch.equal(merged[EMBED], plain[EMBED])
    assert merged[HEAD].data_ptr() != merged[EMBED].data_ptr()


# --- trained apart ----------------------------------------------------------------------------------------------------------------


def test_a_head_that_was_trained_apart_is_merged_untied(tmp_path: Path) -> None:
    base, first, second = states()
    tied, free = SILENT | {"tie_word_embeddings": True}, SILENT | {"tie_word_embeddings": False}
    second = trained(second, HEAD)
    one = family(tmp_path / "f", [base, first, second], tied, tied, free)
    made = planned(one)
    assert made.untied == (HEAD,)
    (note,) = made.notes
    assert f"model1: {HEAD} was trained apart from {EMBED}, to which others tie it: they are merged apart" in note
    assert f"{EMBED} standing for {HEAD} in {one.folder}/base, {one.folder}/model0" in note
    check_merge(one, tmp_path / "out", {}, [with_copies(base, HEAD), with_copies(first, HEAD), second])
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    assert pcb_ray.verify(tmp_path / "out", quiet=True).ok


@pytest.mark.parametrize("stored", [True, False])
def test_exclude_keeps_a_trained_head_tied(tmp_path: Path, stored: bool) -> None:
    base, first, second = states()
    base = with_copies(base, HEAD) if stored else base
    one = family(tmp_path / "f", [base, first, trained(second, HEAD)], SILENT)
    made = planned(one, exclude=[HEAD])
    assert made.untied == ()
    assert sum(t.numel() for t in states()[0].values()) == made.D
    found = families.load(merged_to(tmp_path / "out", recipe(one, exclude=[HEAD])))
    assert (HEAD in found) == stored
    assert not stored or (torch.equal(found[HEAD], found[EMBED]) and not torch.equal(found[HEAD], base[HEAD]))
    assert any("follows" in note for note in made.notes) == stored


def test_a_copy_of_an_excluded_tensor_stays_as_it_is_too(tmp_path: Path) -> None:
    models = [with_copies(one, HEAD) for one in states()]
    found = families.load(merged_to(tmp_path / "out", recipe(family(tmp_path / "f", models, SILENT), exclude=[EMBED])))
    assert torch.equal(found[EMBED], models[0][EMBED])
    assert torch.equal(found[HEAD], models[0][EMBED])


def test_to_exclude_the_embedding_does_not_lose_a_trained_head(tmp_path: Path) -> None:
    base, first, second = (with_copies(one, HEAD) for one in states())
    made = planned(family(tmp_path / "f", [base, first, trained(second, HEAD)], SILENT), exclude=[EMBED])
    assert HEAD in {t.name for t in made.tensors}


def test_what_the_class_ties_by_itself_is_known_where_the_config_says_nothing(tmp_path: Path) -> None:
    base, first, second = states()
    gemma = {"model_type": "gemma2", "architectures": ["Gemma2ForCausalLM"]}
    one = family(tmp_path / "f", [base, first, trained(second, HEAD)], gemma)
    assert planned(one).untied == (HEAD,)
    check_merge(one, tmp_path / "out", {}, [with_copies(base, HEAD), with_copies(first, HEAD), trained(second, HEAD)])


def test_where_the_base_says_nothing_a_head_that_it_lacks_is_refused_and_the_advice_works(tmp_path: Path) -> None:
    base, first, second = states()
    one = family(tmp_path / "f", [base, first, trained(second, HEAD)], SILENT)
    with pytest.raises(RequestError, match="has trained lm_head.weight apart") as caught:
        planned(one)
    assert "exclude:" not in str(caught.value)
    (one.folder / "base" / "config.json").write_text(json.dumps(SILENT | {"tie_word_embeddings": True}))
    assert planned(one).untied == (HEAD,)


def test_a_tied_model_over_a_base_with_a_head_of_its_own_has_its_embedding_for_it(tmp_path: Path) -> None:
    base, first, second = states()
    base, second = trained(base, HEAD), trained(second, HEAD)
    tied, free = SILENT | {"tie_word_embeddings": True}, SILENT | {"tie_word_embeddings": False}
    one = family(tmp_path / "f", [base, first, second], free, tied, free)
    made = planned(one)
    assert made.untied == ()
    assert f"{EMBED} standing for {HEAD} in {one.folder}/model0" in " ".join(made.notes)
    check_merge(one, tmp_path / "out", {}, [base, with_copies(first, HEAD), second])


def test_a_model_that_lost_its_head_is_refused(tmp_path: Path) -> None:
    base, first, second = states()
    one = family(tmp_path, [trained(base, HEAD), first, trained(second, HEAD)], SILENT | {"tie_word_embeddings": False})
    with pytest.raises(RequestError, match=r"lm_head\.weight: is in .*base with shape \[64, 16\] but not in .*model0"):
        planned(one)


def test_two_tensors_that_were_equal_only_in_the_base_are_an_ordinary_merge(tmp_path: Path) -> None:
    base, first, second = states()
    models = [with_copies(base, "twin.weight"), trained(first, "twin.weight"), trained(second, "twin.weight")]
    one = family(tmp_path / "f", models, SILENT)
    assert planned(one).notes == ()
    check_merge(one, tmp_path / "out", {})


def test_stored_copies_that_differ_although_the_config_ties_them_are_refused_by_the_plan(tmp_path: Path) -> None:
    base, first, second = (with_copies(one, HEAD) for one in states())
    second[HEAD][63, 15] += 1
    one = family(tmp_path, [base, first, second], SILENT | {"tie_word_embeddings": True})
    with pytest.raises(RequestError) as caught:
        planned(one)
    (problem,) = caught.value.problems
    assert problem.startswith(f"{one.folder / 'model1'}: wanted {HEAD} equal to {EMBED}, which config.json ties it to, found")
    planned(one, exclude=[HEAD])


# --- beyond the sample ------------------------------------------------------------------------------------------------------------

LARGE = {EMBED: (2048, 400), "model.layers.0.q.weight": (16, 16), "model.norm.weight": (16,)}


def beyond_the_sample(folder: Path, config: dict[str, Any]) -> Family:
    """One number of a copy differs, at a place that no range of the sample holds."""
    models = [with_copies(one, HEAD) for one in states(2, LARGE)]
    models[1][HEAD].view(-1)[40_000] += 1
    return family(folder, models, config)


def test_the_sample_holds_both_ends_and_most_of_nothing(tmp_path: Path) -> None:
    data = np.arange(8 << 20, dtype=np.uint8)
    samples = Samples(MemoryStore({"a": data}))
    places = samples._places(Tensor("a", "BF16", (4 << 20,), "a", 0))
    assert len(places) == 16
    assert (places[0], places[-1]) == (0, (8 << 20) - (64 << 10))
    small = Samples(MemoryStore({"a": data[:10]}))._places(Tensor("a", "BF16", (5,), "a", 0))
    assert small == [0]


def test_copies_that_differ_after_all_are_merged_apart_and_said_to_be(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    one = beyond_the_sample(tmp_path / "f", SILENT)
    asked = recipe(one)
    inputs = open_inputs(asked)
    made = plan_of(asked, inputs)
    assert made.untied == ()
    with pytest.raises(InputError, match="found copies that differ elsewhere"):
        analyse(Session(made, lambda plan: LocalOwners(plan, LocalStore())))
    plans = []
    for _ in range(2):  # a run that is resumed remembers it
        session = Session(made, lambda plan: LocalOwners(plan, LocalStore()))
        with State(Folder(tmp_path / "out"), {}, {}, resume=True) as state:
            kept = Kept(state.found, session, 0.0)
            kept.settle(inputs, lambda inputs: plan_of(asked, inputs), state)
            assert (kept.spent().bytes_read > 0) == (not plans)
        plans.append(session.plan)
        assert "lm_head.weight differs from model.embed_tokens.weight after all: they are merged apart" in caplog.text
    assert plans[0] == plans[1]
    assert plans[0].untied == (HEAD,)
    assert len(plans[0].apart) == 1
    assert plans[0].D == 2 * made.D - 16 * 16 - 16


def test_a_state_dict_in_memory_is_compared_whole() -> None:
    models = [with_copies(one, HEAD) for one in states(2, LARGE)]
    models[0][HEAD].view(-1)[40_000] += 1
    found = pcb_ray.merge_state_dicts(models[0], models[1:], density=0.3)
    expected = oracle.merge_state_dicts(models[0], models[1:], "pcb", density=0.3)
    assert all(torch.allclose(found[name].float(), tensor.float(), atol=1e-3) for name, tensor in expected.items())
    assert torch.equal(pcb_ray.merge_state_dicts(models[0], models[1:], exclude=[HEAD])[HEAD], models[0][HEAD])


def test_a_plan_announces_what_is_read_for_copies(tmp_path: Path) -> None:
    one = family(tmp_path / "f", [with_copies(state, *COPIES) for state in states()], SILENT)
    made = planned(one, merge_method="task_arithmetic", parameters={})
    assert merge_locally(made, tmp_path / "out").bytes_read == made.summary()["bytes_read"]


@pytest.mark.parametrize("exclude", [[], [HEAD]])
def test_a_t5_is_not_untied_since_its_scale_would_change(tmp_path: Path, exclude: list[str]) -> None:
    config = {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}
    tied, free = config | {"tie_word_embeddings": True}, config | {"tie_word_embeddings": False}
    base, first, second = states(2, T5)
    one = family(tmp_path, [base, first, trained(second, HEAD, of="shared.weight")], tied, tied, free)
    if exclude:
        assert planned(one, exclude=exclude).untied == ()
        return
    with pytest.raises(RequestError, match="since t5 scales what it feeds to a tied head alone"):
        planned(one)


def test_no_config_is_promised_where_none_is_written(tmp_path: Path) -> None:
    base, first, second = (with_copies(one, HEAD) for one in states())
    one = family(tmp_path, [base, first, trained(second, HEAD)], None)
    assert not any("config.json" in note for note in planned(one).notes)


def test_a_head_that_the_base_stores_apart_is_not_untied(tmp_path: Path) -> None:
    base, first, second = states()
    models = [trained(base, HEAD), with_copies(first, HEAD), trained(second, HEAD)]
    assert planned(family(tmp_path, models, SILENT)).untied == ()


def test_where_nobody_tells_what_else_is_tied_an_untied_merge_is_refused(tmp_path: Path) -> None:
    base, first, second = states()
    config = {"model_type": "nobody's", "architectures": ["NobodyForCausalLM"], "tie_word_embeddings": True}
    one = family(tmp_path, [base, first, trained(second, HEAD)], config, config, config | {"tie_word_embeddings": False})
    with pytest.raises(RequestError, match="or transformers to tell what else .*base ties"):
        planned(one)
    assert planned(one, exclude=[HEAD]).untied == ()


def test_copies_that_differ_after_all_where_the_config_ties_them_are_refused(tmp_path: Path) -> None:
    made = planned(beyond_the_sample(tmp_path / "f", SILENT | {"tie_word_embeddings": True}))
    assert made.tied == ((HEAD, EMBED),)
    with pytest.raises(InputError, match=r"model0: wanted lm_head\.weight equal to model\.embed_tokens\.weight, which config"):
        analyse(Session(made, lambda plan: LocalOwners(plan, LocalStore())))


@pytest.mark.ray
@pytest.mark.very_slow
def test_a_merge_plans_anew_and_verify_knows_it(tmp_path: Path) -> None:
    one = beyond_the_sample(tmp_path / "f", SILENT)
    receipt = pcb_ray.merge(one.recipe_file(parameters={"density": 0.3}), tmp_path / "out", workers=2, quiet=True)
    assert [(a.input, a.copy, a.original) for a in receipt.apart] == [(1, HEAD, EMBED)]
    expected = oracle.merge_state_dicts(one.base, one.models, "pcb", density=0.3)
    for name, tensor in families.load(tmp_path / "out").items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-3)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    assert pcb_ray.verify(tmp_path / "out", quiet=True).ok


# --- the search -------------------------------------------------------------------------------------------------------------------


def test_a_search_of_an_untied_merge_is_refused_with_the_lines_that_tie_it(tmp_path: Path) -> None:
    base, first, second = states()
    one = family(tmp_path / "f", [base, first, trained(second, HEAD)], SILENT | {"tie_word_embeddings": True}, SILENT, SILENT)
    with pytest.raises(RequestError, match=r'exclude:\n  - "lm_head.weight"'):
        check_follows(planned(one))
    check_follows(planned(one, exclude=[HEAD]))


def test_candidates_have_the_copies_of_what_is_merged(tmp_path: Path) -> None:
    one = family(tmp_path / "f", [with_copies(state, HEAD) for state in states()], SILENT)
    target = str(one.folder / "model0" / "model.safetensors")
    scorer = Scorer(job_of(one, {f"{EVALUATORS}:Near": {"target": target}}))
    assert scorer.score_input(1, "val")["near"] == 0.0


# --- models of transformers -------------------------------------------------------------------------------------------------------


def saved(folder: Path, model: Any) -> None:
    """A base and two tuned models as transformers saves them."""
    model.save_pretrained(folder / "base")
    for k in range(2):
        torch.manual_seed(k + 1)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape).to(parameter.dtype) * 0.02)
        model.save_pretrained(folder / f"model{k}")


def store_copy(folder: Path, copy: str, original: str) -> None:
    path = folder / "model.safetensors"
    state = load_file(path)
    save_file(state | {copy: state[original].clone()}, path, metadata={"format": "pt"})


@pytest.mark.parametrize("kind", ["t5", "whisper", "bert"])
@pytest.mark.parametrize("stored", ["base", "model1"])
def test_models_of_transformers_with_stored_copies_load_as_one(tmp_path: Path, kind: str, stored: str) -> None:
    import transformers as t

    torch.manual_seed(0)
    if kind == "t5":
        model: Any = t.T5ForConditionalGeneration(
            t.T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0)
        )
        copies = dict.fromkeys(COPIES, "shared.weight")
    elif kind == "whisper":
        model = t.WhisperForConditionalGeneration(
            t.WhisperConfig(
                vocab_size=64, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
                encoder_ffn_dim=32, decoder_ffn_dim=32, num_mel_bins=8, max_source_positions=12, max_target_positions=10,
                pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
            )
        )  # fmt: skip
        copies = {"proj_out.weight": "model.decoder.embed_tokens.weight"}
    else:
        model = t.BertForMaskedLM(
            t.BertConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
        )
        torch.nn.init.normal_(model.cls.predictions.bias)
        copies = {
            "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
            "cls.predictions.decoder.bias": "cls.predictions.bias",
        }
    saved(tmp_path, model)
    for copy, original in copies.items():
        store_copy(tmp_path / stored, copy, original)
    content = {"merge_method": "task_arithmetic", "base_model": "base", "models": [{"model": "model0"}, {"model": "model1"}]}
    out = merged_to(tmp_path / "out", Recipe.from_dict(content | {"parameters": {"lambda": 0.5}}, folder=tmp_path))
    loaded, info = type(model).from_pretrained(out, output_loading_info=True)
    assert not any(info.values())
    own = dict(loaded.named_parameters(remove_duplicate=False))
    for copy, original in copies.items():
        assert own[copy].data_ptr() == own[original].data_ptr()
        base, *tuned = (load_file(tmp_path / name / "model.safetensors")[original] for name in ("base", "model0", "model1"))
        torch.testing.assert_close(own[original].detach(), base + 0.5 * sum(one - base for one in tuned))


SMALL = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
BART = {
    **{"vocab_size": 64, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32},
    **{"encoder_attention_heads": 2, "decoder_attention_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    **{"decoder_start_token_id": 1, "forced_eos_token_id": 2},
}
TIED_CLASSES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", {**SMALL, "tie_word_embeddings": True}),
    "bart": ("BartForConditionalGeneration", "BartConfig", BART),
    "marian": ("MarianMTModel", "MarianConfig", BART),
    "bert": ("BertForMaskedLM", "BertConfig", SMALL),
    "roberta": ("RobertaForMaskedLM", "RobertaConfig", SMALL),
    "distilbert": (
        "DistilBertForMaskedLM", "DistilBertConfig", {"vocab_size": 64, "dim": 16, "hidden_dim": 32, "n_layers": 1, "n_heads": 2},
    ),
    "whisper": (
        "WhisperForConditionalGeneration", "WhisperConfig",
        {**BART, "num_mel_bins": 8, "max_source_positions": 12, "max_target_positions": 10},
    ),
    "t5": (
        "T5ForConditionalGeneration", "T5Config",
        {"vocab_size": 64, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2},
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", TIED_CLASSES)
def test_an_untied_merge_loads_with_all_that_its_class_would_tie(tmp_path: Path, kind: str) -> None:
    """Once its config says that nothing is tied, copies that no input stores must be in the output too, or they are made anew."""
    import transformers as t

    name, config_name, sizes = TIED_CLASSES[kind]
    torch.manual_seed(0)
    base = getattr(t, name)(getattr(t, config_name)(**sizes))
    keys = dict(base.all_tied_weights_keys)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.05)
    states_of = []
    for k, folder in enumerate(("base", "model0", "model1")):
        model = deepcopy(base)
        torch.manual_seed(k)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape) * 0.02 * bool(k))
        state = {n: p.detach().clone() for n, p in model.named_parameters(remove_duplicate=False)}
        model.save_pretrained(tmp_path / folder)
        states_of.append(state)
    heads = [target for target in keys if target.endswith((*HEADS, "vocab_projector.weight"))]
    head = heads[0]
    states_of[2][head] = states_of[2][head] + 0.03
    path = tmp_path / "model1" / "model.safetensors"
    save_file(load_file(path) | {head: states_of[2][head].contiguous()}, path, metadata={"format": "pt"})
    config = json.loads((tmp_path / "model1" / "config.json").read_text()) | {"tie_word_embeddings": False}
    (tmp_path / "model1" / "config.json").write_text(json.dumps(config))
    content = {
        "merge_method": "task_arithmetic",
        "base_model": "base",
        "models": ["model0", "model1"],
        "parameters": {"lambda": 0.5},
    }
    out = merged_to(tmp_path / "out", Recipe.from_dict(content, folder=tmp_path))
    loaded, info = type(base).from_pretrained(out, output_loading_info=True)
    assert not any(info.values())
    own = dict(loaded.named_parameters(remove_duplicate=False))
    in_files = {*load_file(tmp_path / "base" / "model.safetensors"), *keys}  # Marian makes its table of positions by itself
    for n, theta in ((n, theta) for n, theta in states_of[0].items() if n in in_files):
        torch.testing.assert_close(own[n].detach(), theta + 0.5 * sum(one[n] - theta for one in states_of[1:]), msg=n)
    assert not torch.equal(own[head], own[keys[head]])


def test_an_untied_merge_of_a_base_that_stores_a_copy_alone_loads_too(tmp_path: Path) -> None:
    import transformers as t

    torch.manual_seed(0)
    model = t.BartForConditionalGeneration(t.BartConfig(**BART))
    saved(tmp_path, model)
    path, copy, original = tmp_path / "base" / "model.safetensors", "model.encoder.embed_tokens.weight", "model.shared.weight"
    state = load_file(path)
    save_file({copy if name == original else name: tensor for name, tensor in state.items()}, path, metadata={"format": "pt"})
    one = load_file(tmp_path / "model1" / "model.safetensors")
    head = {"lm_head.weight": one[original] + 0.05}
    save_file(one | head, tmp_path / "model1" / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp_path / "model1" / "config.json").read_text()) | {"tie_word_embeddings": False}
    (tmp_path / "model1" / "config.json").write_text(json.dumps(config))
    content = {"merge_method": "linear", "base_model": "base", "models": ["model0", "model1"]}
    out = merged_to(tmp_path / "out", Recipe.from_dict(content, folder=tmp_path))
    loaded, info = type(model).from_pretrained(out, output_loading_info=True)
    assert not any(info.values())
    first = load_file(tmp_path / "model0" / "model.safetensors")[original]
    for name in (original, copy, "model.decoder.embed_tokens.weight"):
        own = dict(loaded.named_parameters(remove_duplicate=False))[name]
        torch.testing.assert_close(own.detach(), (first + one[original]) / 2)
    torch.testing.assert_close(loaded.lm_head.weight.detach(), (first + head["lm_head.weight"]) / 2)


def test_a_t5_of_version_1_1_is_merged_as_transformers_saves_it(tmp_path: Path) -> None:
    """Its config.json says that it is tied, and by `scale_decoder_outputs` that it is not."""
    import transformers as t

    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "tie_word_embeddings": False}
    model = t.T5ForConditionalGeneration(t.T5Config(**sizes))
    model.lm_head.weight = torch.nn.Parameter(torch.randn(64, 16))
    saved(tmp_path, model)
    content = {"merge_method": "linear", "base_model": "base", "models": ["model0", "model1"]}
    out = merged_to(tmp_path / "out", Recipe.from_dict(content, folder=tmp_path))
    loaded, info = t.T5ForConditionalGeneration.from_pretrained(out, output_loading_info=True)
    assert not any(info.values())
    stored = [load_file(tmp_path / f"model{k}" / "model.safetensors")["lm_head.weight"] for k in range(2)]
    torch.testing.assert_close(loaded.lm_head.weight.detach(), (stored[0] + stored[1]) / 2)


def test_an_untied_model_of_transformers_loads_untied(tmp_path: Path) -> None:
    import transformers as t

    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    saved(tmp_path, t.LlamaForCausalLM(t.LlamaConfig(**sizes, tie_word_embeddings=True)))
    store_copy(tmp_path / "model1", HEAD, EMBED)
    state = load_file(tmp_path / "model1" / "model.safetensors")
    save_file(trained(state, HEAD), tmp_path / "model1" / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp_path / "model1" / "config.json").read_text()) | {"tie_word_embeddings": False}
    (tmp_path / "model1" / "config.json").write_text(json.dumps(config))
    content = {"merge_method": "task_arithmetic", "base_model": "base", "models": [{"model": "model0"}, {"model": "model1"}]}
    out = merged_to(tmp_path / "out", Recipe.from_dict(content, folder=tmp_path))
    loaded, info = t.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info.values())
    assert not torch.equal(loaded.lm_head.weight, loaded.model.embed_tokens.weight)


# --- on the Hub, before a download ------------------------------------------------------------------------------------------------


def on_the_hub(source: str, *names: str, config: dict[str, Any] | None = None) -> Checkpoint:
    tensors = {
        name: Tensor(name, "BF16", SHAPES.get(name, (64, 16)), f"hub://{source}@c0ffee/model.safetensors", 4096 * k)
        for k, name in enumerate(names)
    }
    return Checkpoint(source, None, tensors, {}, (), config, "c0ffee")


def test_what_can_not_be_read_yet_is_tied_only_where_a_name_is_missing() -> None:
    """A plan of models of the Hub reads no values; the merge, which has downloaded them, plans by these."""
    samples, with_head = Samples(LocalStore()), (*SHAPES, HEAD)
    apart = match([on_the_hub(name, *with_head) for name in "abc"], (), samples, (), [])
    assert HEAD in apart.merged
    one = match([on_the_hub("a", *with_head), on_the_hub("b", *SHAPES)], (), samples, (), [])
    assert one.ties.copies == {HEAD: EMBED}
    flan = (*SHAPES, HEAD, "encoder.embed_tokens.weight")
    several = match([on_the_hub("a", *flan), on_the_hub("b", *SHAPES, HEAD)], (), samples, (), [])
    assert set(several.ties.copies) == {"encoder.embed_tokens.weight"}


def test_a_file_that_vanishes_under_the_plan_is_told(tmp_path: Path) -> None:
    one = family(tmp_path, [with_copies(state, HEAD) for state in states()], SILENT)
    asked = recipe(one)
    inputs = open_inputs(asked)
    (one.folder / "base" / "model.safetensors").unlink()
    with pytest.raises(RequestError, match=r"base/model\.safetensors: wanted .*, found none"):
        plan_of(asked, inputs)
