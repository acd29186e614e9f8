"""Models that are no fine-tunes of the base are refused before anything is computed; a later ancestor of all is named."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import families
import numpy as np
import pytest
import torch
from families import Family, StateDict
from junk import mutate_bytes

from pcb_ray import Recipe, RequestError, steps
from pcb_ray.cli import main
from pcb_ray.files.checkpoint import open_checkpoint
from pcb_ray.files.store import LocalStore
from pcb_ray.local import LocalOwners
from pcb_ray.planning import Plan, open_inputs, plan, plan_of
from pcb_ray.receipt import Receipt
from pcb_ray.relation import Relation, other_bases
from pcb_ray.session import Session

NAMES = ("base", "model0", "model1")


def noise(state: StateDict, scale: float, seed: int) -> StateDict:
    """Every tensor with noise of this share of its own spread."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (t.float() + scale * t.float().std() * torch.randn(t.shape, generator=generator)).to(t.dtype)
        for name, t in state.items()
    }


def planned(folder: Path, base: StateDict, models: list[StateDict], **changes: object) -> Plan:
    return plan(Recipe.from_dict(Family(folder, base, models).recipe(merge_method="task_arithmetic", **changes)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_the_numbers_are_those_of_the_weights(tmp_path: Path, dtype: torch.dtype) -> None:
    """The matrices are smaller than the sample, which then is all of them."""
    shapes = {"a.weight": (40, 100), "b.weight": (4, 1000), "norm.weight": (64,), "c": ()}
    base, models = families.fine_tuned(2, shapes=shapes, dtype=dtype)
    found = planned(tmp_path, base, models).relation
    assert found is not None
    theta, *others = (torch.cat([s[n].double().flatten() for n in ("a.weight", "b.weight")]).numpy() for s in (base, *models))
    tau = [other - theta for other in others]
    assert found.untouched == pytest.approx([float((t == 0).mean()) for t in tau])
    (_, cosine), (also, _) = found.cosines
    assert cosine == also
    assert cosine == pytest.approx(float(tau[0] @ tau[1] / (np.linalg.norm(tau[0]) * np.linalg.norm(tau[1]))))
    by_tensor = [(theta[:4000], [t[:4000] for t in tau]), (theta[4000:], [t[4000:] for t in tau])]
    for k in range(2):
        each = [float(np.linalg.norm(of[k]) / np.linalg.norm(base_part)) for base_part, of in by_tensor]
        assert found.change[k] == pytest.approx(float(np.median(each)))


def test_the_sample_of_a_large_model_is_small_and_near_the_truth(tmp_path: Path) -> None:
    base, _ = families.fine_tuned(1, shapes={"a.weight": (2000, 500), "b.weight": (500, 2000)})
    made = planned(tmp_path, base, [noise(base, 0.1, 1), noise(base, 0.2, 2)])
    assert made.relation is not None
    assert made.relation.change == pytest.approx((0.1, 0.2), rel=0.05)
    assert made.notes == ()


@pytest.mark.parametrize("which", [0, 1])
def test_an_unrelated_model_is_refused_unless_it_is_allowed(tmp_path: Path, which: int) -> None:
    base, models = families.fine_tuned(2)
    stranger, _ = families.fine_tuned(1, seed=77)
    models[which] = stranger
    with pytest.raises(RequestError) as caught:
        planned(tmp_path, base, models)
    (problem,) = caught.value.problems
    assert f"/model{which}: wanted a fine-tune of" in problem
    assert "times as long as the base's weights (unrelated models: 1.41)" in problem
    made = planned(tmp_path, base, models, allow_unrelated=True)
    assert Recipe.from_yaml(made.recipe.to_yaml()).allow_unrelated
    assert made.relation is not None
    assert made.relation.change[which] == pytest.approx(2**0.5, rel=0.1)
    assert "allow_unrelated: wanted true or false" in str(refusal(made.recipe.to_yaml().replace("true", "yes please")))


def refusal(text: str) -> RequestError:
    with pytest.raises(RequestError) as caught:
        Recipe.from_yaml(text)
    return caught.value


def test_a_plan_and_a_merge_say_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, _ = families.fine_tuned(1)
    one = Family(tmp_path, base, [families.fine_tuned(1, seed=9)[0]])
    recipe = one.recipe_file(merge_method="task_arithmetic")
    told = []
    for command in (["plan", str(recipe)], ["merge", str(recipe), str(tmp_path / "out")]):
        assert main(command) == 2
        told.append(capsys.readouterr().err)
    assert told[0] == told[1]
    assert not (tmp_path / "out").exists()


def test_models_that_share_a_later_ancestor_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As experts that were tuned from the -Instruct model, merged over the plain base."""
    base, _ = families.fine_tuned(1, dtype=torch.float32)
    instruct = noise(base, 0.2, 1)
    models = [noise(instruct, 0.03, seed) for seed in (2, 3)]
    (note,) = planned(tmp_path, base, models).notes
    assert "all task vectors point the same way (cosines of 0.9" in note
    assert "which should be `base_model`" in note
    assert planned(tmp_path / "right", instruct, models).notes == ()
    assert main(["plan", "--json", str(Family(tmp_path / "json", base, models).recipe_file())]) == 0
    assert json.loads(capsys.readouterr().out)["relation"]["cosines"][0][1] > 0.9


def test_a_base_of_zeros_constants_and_what_is_not_finite_decide_nothing(tmp_path: Path) -> None:
    base, models = families.fine_tuned(1)
    zeros = {name: torch.zeros_like(t) for name, t in base.items()}
    assert planned(tmp_path / "zeros", zeros, models).relation is None
    broken = {name: torch.full_like(t, float("nan")) for name, t in models[0].items()}
    assert planned(tmp_path / "nan", base, [broken]).relation is None, "whoever reads all of it tells the place"
    assert planned(tmp_path / "same", base, [dict(base)]).relation.change == (0.0,)
    linear = Recipe.from_dict(Family(tmp_path / "linear", base, models).recipe(merge_method="linear"))
    assert plan(linear).relation is None, "nothing is merged over a base"


def test_of_a_few_elements_nothing_is_concluded(tmp_path: Path) -> None:
    base, _ = families.fine_tuned(1, shapes={"w": (63, 65)})
    stranger, _ = families.fine_tuned(1, shapes={"w": (63, 65)}, seed=5)
    made = planned(tmp_path / "few", base, [stranger])
    assert made.relation is not None
    assert made.relation.elements == 4095
    assert made.relation.change[0] > 1.2
    base, _ = families.fine_tuned(1, shapes={"w": (64, 64)})
    stranger, _ = families.fine_tuned(1, shapes={"w": (64, 64)}, seed=5)
    with pytest.raises(RequestError, match="wanted a fine-tune of"):
        planned(tmp_path / "enough", base, [stranger])


# --- over all elements, by the first sweep ----------------------------------------------------------------------------------------


def numbers_of(base: StateDict, models: list[StateDict]) -> tuple[list[float], list[float], list[float], np.ndarray]:
    """change, cosine to the base, untouched share and cosines, in float64 over all elements."""
    theta, *others = (np.concatenate([t.double().flatten().numpy() for t in state.values()]) for state in (base, *models))
    tau = [other - theta for other in others]
    length = np.linalg.norm
    return (
        [float(length(t) / length(theta)) for t in tau],
        [float(o @ theta / (length(o) * length(theta))) for o in others],
        [float((t == 0).mean()) for t in tau],
        np.array([[t @ u / (length(t) * length(u)) for u in tau] for t in tau]),
    )


def assert_numbers(found: Relation | None, base: StateDict, models: list[StateDict]) -> None:
    change, to_base, untouched, cosines = numbers_of(base, models)
    assert found is not None
    assert found.elements == sum(t.numel() for t in base.values())
    assert found.change == pytest.approx(change, rel=1e-5)
    assert found.cosine_to_base == pytest.approx(to_base, rel=1e-5)
    assert found.untouched == pytest.approx(untouched)
    np.testing.assert_allclose(found.cosines, cosines, atol=1e-5)


@pytest.mark.parametrize(("method", "variant"), [("pcb", ""), ("pcb", "paper"), ("task_arithmetic", ""), ("ties", "")])
def test_a_receipt_has_the_numbers_of_all_elements(tmp_path: Path, method: str, variant: str) -> None:
    one = Family(tmp_path / "f", *families.fine_tuned(3, scale=3))
    own = {"parameters": {"variant": variant}} if variant else {}
    with families.small_engine(tally_entries=1 << 12, chunk_elements=4096):
        out = families.merged_to(tmp_path / "out", Recipe.from_dict(one.recipe(merge_method=method, **own)))
    assert_numbers(Receipt.of(out).relation, one.base, one.models)


def test_what_a_lost_owner_wrote_and_another_wrote_again_counts_once(tmp_path: Path) -> None:
    """As `Owners.store` may: what was not yet durable comes again."""
    one = Family(tmp_path / "f", *families.fine_tuned(2, scale=3))

    class Twice(LocalOwners):
        def store(self, question: Any, items: Any, chunks_of: Any = None, **options: Any) -> Any:
            for _ in range(2):
                yield from super().store(question, items, chunks_of, **options)

    made = plan(Recipe.from_dict(one.recipe(merge_method="task_arithmetic")))
    session = Session(made, lambda plan: Twice(plan, LocalStore()), relate=True)
    (tmp_path / "out").mkdir()
    steps.write(session, LocalStore(), {}, str(tmp_path / "out"))
    assert_numbers(session.relation, one.base, one.models)


def test_a_method_without_a_base_has_none(tmp_path: Path) -> None:
    one = Family(tmp_path / "f", *families.fine_tuned(2))
    out = families.merged_to(tmp_path / "out", Recipe.from_dict(one.recipe(merge_method="linear")))
    assert Receipt.of(out).relation is None


def test_a_model_equal_to_the_base_has_cosines_of_zero(tmp_path: Path) -> None:
    base, models = families.fine_tuned(2)
    one = Family(tmp_path / "f", base, [dict(base), models[1]])
    found = Receipt.of(families.merged_to(tmp_path / "out", Recipe.from_dict(one.recipe()))).relation
    assert found is not None
    assert (found.change[0], found.untouched[0], found.cosines[0]) == (0.0, 1.0, (0.0, 0.0))
    assert Relation.from_json(json.loads(json.dumps(dataclasses.asdict(found)))) == found


# --- what cards and configs say ---------------------------------------------------------------------------------------------------

CARD = "---\nlicense: mit\nbase_model: {}\ntags: [x]\n---\n\n# A model\n"


def lineage(folder: Path, card: str | None = None, config: dict[str, Any] | None = None, base: str = "base") -> list[str]:
    """The notes of a plan in which the first model has this card or config, and the base this name."""
    one = Family(folder, *families.fine_tuned(2))
    if card is not None:
        (one.folder / "model0" / "README.md").write_text(card)
    if config is not None:
        (one.folder / "model0" / "config.json").write_text(json.dumps({**families.CONFIG, **config}))
    (one.folder / "base").rename(one.folder / base)
    asked = Recipe.from_dict(one.recipe(merge_method="task_arithmetic", base_model=str(one.folder / base)))
    return [note for note in plan_of(asked, open_inputs(asked)).notes if "tuned from" in note]


@pytest.mark.parametrize("base", ["Llama-3-8B", "models--meta--Llama-3-8B"])
def test_a_card_or_config_that_names_another_base_is_a_note(tmp_path: Path, base: str) -> None:
    (note,) = lineage(tmp_path / "a", CARD.format("meta/Llama-3-8B-Instruct"), base=base)
    assert note == f"{tmp_path}/a/model0: card or config says that it was tuned from 'meta/Llama-3-8B-Instruct': is that " + str(
        tmp_path / "a" / f"{base}?"
    )
    assert lineage(tmp_path / "c", None, {"_name_or_path": "/data/Llama-3-8B-Instruct"}, base) != []


@pytest.mark.parametrize(
    "card",
    [*map(CARD.format, ("meta/Llama-3-8B", "[meta/llama-3-8b]", "me/model0", "null", "[1, {}]", "x" * 300, "!!python/object:o y")),
     "# none", "---\na: [\n---\n", "", "---\n- a\n---\n"],
)  # fmt: skip
def test_a_card_that_names_this_base_or_nothing_is_none(tmp_path: Path, card: str) -> None:
    assert lineage(tmp_path, card, base="Llama-3-8B") == []


def test_a_config_that_names_this_base_or_itself_is_none(tmp_path: Path) -> None:
    for k, name in enumerate(("/data/Llama-3-8B/", "./model0", ".", "", 3, None)):
        assert lineage(tmp_path / str(k), None, {"_name_or_path": name}, "Llama-3-8B") == []


@pytest.mark.parametrize("mutants", [500, pytest.param(10_000, marks=pytest.mark.very_slow)])
def test_mutated_cards_are_read_or_passed_over(tmp_path: Path, mutants: int) -> None:
    one = Family(tmp_path, *families.fine_tuned(1))
    rng, told = random.Random(mutants), 0
    base, model = open_checkpoint(str(tmp_path / "base")), tmp_path / "model0"
    raw = CARD.format("[meta/Llama, 'b', {c: d}]").encode()
    for _ in range(mutants):
        (model / "README.md").write_bytes(mutate_bytes(rng, raw, raw))
        told += bool(other_bases(base, [open_checkpoint(str(model))]))
    assert one.config is not None
    assert mutants / 20 < told < mutants
