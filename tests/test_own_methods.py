"""What a method of one's own can't do: spoil what it is given, hide what is wrong with an input, or pass for another one when an
output is verified or an analysis is shared."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from families import Family, merge_locally, merged_to, small_engine
from torch import Tensor

from pcb_ray import Recipe, RequestError, merge_state_dicts, verify
from pcb_ray.analysis import analyse
from pcb_ray.budget import MIN_BLOCK
from pcb_ray.files.store import LocalStore
from pcb_ray.kernels.reference import TorchKernel
from pcb_ray.local import LocalOwners
from pcb_ray.methods import METHODS, Settings
from pcb_ray.owner import Owner
from pcb_ray.planning import open_inputs, plan, plan_of
from pcb_ray.progress import readable_bytes
from pcb_ray.searching.building import CheckLinear
from pcb_ray.searching.run import LINEAR_WITHIN
from pcb_ray.session import Session

HEAD = "import torch\nfrom pcb_ray.methods import *\n"
ROOT = Path(__file__).parent.parent


def method_in(folder: Path, text: str) -> str:
    """The file that defines `own`, as `merge_method` names it."""
    (folder / "own.py").write_text(f"{HEAD}\n{text}\n")
    return f"{folder}/own.py:own"


def merged_by(
    folder: Path, text: str, base: families.StateDict, models: list[families.StateDict], **asked: Any
) -> families.StateDict:
    return merge_state_dicts(base, models, method=method_in(folder, text), **asked)


# --- it spoils nothing ------------------------------------------------------------------------------------------------------------

PURE = """
def total(block):
    return sum_over_tasks(block.tau * column(block.weights, block.tau))

own = Method(
    name="own", linear=True, parameters={"lambda": lambda_parameter()}, unit=UNIT,
    merge=lambda block, known, settings: block.theta + total(block) * settings.lambda_,
    passes=(
        Ranks(Quantity("size", lambda block, known, settings: block.theta + block.tau), {"middle": lambda D, own: D // 2}),
        Extrema("ends", lambda block, known, settings: (block.theta + block.tau).double(), "least", "most"),
        Sums("sums", lambda block, known, settings: (block.theta + block.tau).double(), {"sum": lambda n: slice(0, n)}),
    ),
)
"""
# The same, but every function writes into what it is given.
WRITING = """
def added(block):
    block.theta.mul_(1.0)
    block.tau.add_(block.theta)
    block.theta.zero_()
    return block.tau

def merge(block, known, settings):
    block.tau.mul_(column(block.weights, block.tau))
    return block.theta.add_(sum_over_tasks(block.tau).mul_(settings.lambda_))

own = Method(
    name="own", linear=True, parameters={"lambda": lambda_parameter()}, unit=UNIT, merge=merge,
    passes=(
        Ranks(Quantity("size", lambda block, known, settings: added(block)), {"middle": lambda D, own: D // 2}),
        Extrema("ends", lambda block, known, settings: added(block).double(), "least", "most"),
        Sums("sums", lambda block, known, settings: added(block).double(), {"sum": lambda n: slice(0, n)}),
    ),
)
"""


def copies(state: families.StateDict) -> families.StateDict:
    return {name: tensor.clone() for name, tensor in state.items()}


def assert_same(one: families.StateDict, other: families.StateDict) -> None:
    assert list(one) == list(other)
    for name in one:
        assert one[name].dtype == other[name].dtype
        assert torch.equal(one[name], other[name]), name


@pytest.mark.parametrize("unit", ["element", "block", "tensor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_functions_that_write_into_what_they_get_spoil_neither_inputs_nor_result(
    unit: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    base, models = families.fine_tuned(3, dtype=dtype)
    before = [copies(state) for state in (base, *models)]
    asked: dict[str, Any] = {"weights": [1.0, -0.5, 2.0], "lambda_": 0.7, "dtype": "float32"}
    expected = merged_by(tmp_path, PURE.replace("UNIT", repr(unit)), base, models, **asked)
    found = merged_by(tmp_path, WRITING.replace("UNIT", repr(unit)), base, models, **asked)
    for state, was in zip((base, *models), before, strict=True):
        assert_same(state, was)
    assert_same(found, expected)


def test_a_basis_is_that_of_the_method_even_if_its_merge_writes_into_what_it_gets(tmp_path: Path) -> None:
    family = Family(tmp_path / "family", *families.fine_tuned(3, dtype=torch.float32))
    found: list[Tensor] = []
    for text in (PURE, WRITING):
        made = plan(family.recipe(merge_method=method_in(tmp_path, text.replace("UNIT", "'block'"))))
        owner = Owner(made, LocalStore())
        loaded = owner.load(next(owner.blocks(0)))
        known = {name: (1.0, 1.0, 1.0) for wanted in made.method.passes for name in wanted.gives}
        C_NB, finite = owner.kernel.basis(loaded, known)
        assert finite
        assert owner.kernel.departure_from_linear(loaded, known) < 1e-6
        found.append(C_NB)
    assert torch.equal(found[0], found[1])


@pytest.mark.parametrize(
    "result",
    [
        pytest.param("torch.full((1,), 0.25).expand(len(block.theta))", id="expanded"),
        pytest.param("(block.theta[:, None] + block.tau.T).sort(dim=1).values[:, 1]", id="strided"),
        pytest.param("torch.stack([block.theta, block.tau[0]], dim=1)[:, 1]", id="a column"),
        pytest.param("block.tau[0].flip(0)", id="turned"),
        pytest.param("block.theta", id="what it was given"),
        pytest.param("block.theta * torch.nn.Parameter(torch.ones(()))", id="with a gradient"),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_merge_may_return_any_view(result: str, dtype: str, tmp_path: Path) -> None:
    base, models = families.fine_tuned(2, dtype=torch.float32)
    text = "own = Method(name='own', merge=lambda block, known, settings: {}, unit='tensor')"
    expected = merged_by(tmp_path, text.format(f"({result}).detach().clone().contiguous()"), base, models, dtype=dtype)
    assert_same(merged_by(tmp_path, text.format(result), base, models, dtype=dtype), expected)


def test_an_owner_refuses_blocks_that_would_cut_a_tensor_which_the_method_must_see_whole(tmp_path: Path) -> None:
    family = Family(tmp_path / "family", *families.fine_tuned(1))
    text = "own = Method(name='own', merge=lambda block, known, settings: block.theta, unit='tensor')"
    made = plan(family.recipe(merge_method=method_in(tmp_path, text)))
    largest = max(tensor.numel for tensor in made.tensors)
    assert largest == 2 * MIN_BLOCK
    Owner(made, LocalStore(), block_elements=largest)
    with pytest.raises(ValueError, match=f"{largest} are needed, so that no tensor is cut"):
        Owner(made, LocalStore(), block_elements=MIN_BLOCK)


# --- it hides nothing -------------------------------------------------------------------------------------------------------------

HIDING = {
    "the merge": "",
    "a quantity": "Ranks(Quantity('q', lambda block, known, settings: "
    "block.tau.nan_to_num(0, 0, 0)), {'x': lambda D, own: D // 2}),",
    "a larger quantity": "Ranks(Quantity('q', lambda block, known, settings: block.tau.double().isnan().double(), bits=64), "
    "{'x': lambda D, own: 0}),",
    "an extrema pass": "Extrema('e', lambda block, known, settings: block.tau.double().nan_to_num(0, 0, 0), 'x', 'y'),",
    "a sums pass": "Sums('s', lambda block, known, settings: "
    "block.tau.double().nan_to_num(0, 0, 0), {'x': lambda n: slice(0, n)}),",
}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("passes", HIDING.values(), ids=HIDING)
@pytest.mark.parametrize("source", ["base", "models[1]"])
def test_an_input_that_is_not_finite_is_named_though_the_method_looks_past_it(
    source: str, passes: str, value: float, tmp_path: Path
) -> None:
    base, models = families.fine_tuned(2)
    (base if source == "base" else models[1])["model.layers.1.mlp.up_proj.weight"][5, 7] = value
    merge = "(block.theta.nan_to_num(0, 0, 0) + block.tau[0].nan_to_num(0, 0, 0))"
    text = f"own = Method(name='own', merge=lambda block, known, settings: {merge}, passes=({passes}))"
    with pytest.raises(RequestError) as told:
        merged_by(tmp_path, text, base, models)
    (problem,) = told.value.problems
    assert problem.startswith(
        f"{source}: tensor model.layers.1.mlp.up_proj.weight: wanted finite numbers, found {value} at index [5, 7] (BF16)."
    )


def test_an_input_is_to_blame_before_a_method_that_hands_its_nan_on(tmp_path: Path) -> None:
    """Its pass saw nothing of it."""
    base, models = families.fine_tuned(2)
    models[1]["model.norm.weight"][3] = math.nan
    passes = "Ranks(Quantity('q', lambda block, known, settings: block.tau * 0 + 1), {'x': lambda D, own: 0}),"
    text = f"own = Method(name='own', merge=lambda block, known, settings: block.tau[1], passes=({passes}))"
    with pytest.raises(
        RequestError, match=r"models\[1\]: tensor model\.norm\.weight: wanted finite numbers, found nan at index \[3\]"
    ):
        merged_by(tmp_path, text, base, models)


@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("value", ["float('inf')", "-float('inf')"])
@pytest.mark.parametrize("magnitude", [False, True])
def test_an_infinite_quantity_of_either_sign_is_refused(value: str, bits: int, magnitude: bool, tmp_path: Path) -> None:
    base, models = families.fine_tuned(2)
    of = f"torch.where(block.tau > 0.003, {value}, block.tau){'.double()' if bits == 64 else ''}"
    quantity = f"Quantity('reach', lambda block, known, settings: {of}, bits={bits}, magnitude={magnitude})"
    text = f"own = Method(name='own', merge=lambda b, k, s: b.theta, passes=(Ranks({quantity}, {{'x': lambda D, own: D // 2}}),))"
    with pytest.raises(
        RequestError, match="reach of own: wanted finite values, found an infinite one in tensor .*Fix: mend the method"
    ):
        merged_by(tmp_path, text, base, models)


@pytest.mark.parametrize(
    ("passes", "message"),
    [
        (
            "Sums('energy', lambda block, *_: block.tau.double()[: 1 + block.tensor.index % 2], {'x': lambda n: slice(0, n)}),",
            "energy of own: wanted 1 rows, as of the block before, found 2. Fix: return the same rows for every block",
        ),
        (
            "Extrema('ends', lambda block, *_: block.tau.double()[: 1 + block.tensor.index % 2], 'x', 'y'),",
            "ends of own: wanted 1 rows, as of the block before, found 2. Fix: return the same rows for every block",
        ),
        (
            "Sums('energy', lambda block, *_: block.tau.double(), {'x': lambda n: slice(0, n) / 2}),",
            r"the rows of x of own raised TypeError: .* \(own.py:4\). Fix: mend it",
        ),
        (
            "Ranks(MAGNITUDE, {}, largest='x'),",
            r"own.py:own: .*raises ValueError: ranks of \|tau\|: wanted at least one place, found none.*Fix: mend the file",
        ),
        (
            "Ranks(Quantity('q', lambda block, *_: block.tau, parameters=('keep', 'rat')), {'x': lambda D, own: 0}),",
            r"own.py:own: .*raises ValueError: parameters of the pass `ranks of q`: wanted one of 'keep', found 'rat' "
            r"\(own.py:4\). Fix: mend the file",
        ),
    ],
    ids=["sums of odd rows", "extremes of odd rows", "rows that fail", "no place", "a parameter that is none"],
)
def test_a_pass_that_can_not_be_is_refused_with_its_reason(passes: str, message: str, tmp_path: Path) -> None:
    base, models = families.fine_tuned(2)
    parameters = "{'keep': Parameter(0.5, fraction, 'the share that is kept')}"
    text = f"own = Method(name='own', merge=lambda b, k, s: b.theta, parameters={parameters}, passes=({passes}))"
    with pytest.raises(RequestError, match=f"merge_method: .*{message}"):
        merged_by(tmp_path, text, base, models)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("impossible=lambda settings, names: None", "impossible of own: wanted a list, found a NoneType. Fix: mend it."),
        ("impossible=lambda settings, names: 'no'", "impossible of own: wanted a list, found a str. Fix: mend it."),
        ("warnings=lambda known, settings, names: None", "warnings of own: wanted a list, found a NoneType. Fix: mend it."),
        ("element_bytes=lambda n: 'a'", "element_bytes of own: wanted a int, found a str. Fix: mend it."),
        ("impossible=lambda *_: __import__('sys').exit(3)", "impossible of own raised SystemExit: 3 (own.py:4). Fix: mend it."),
        ("wrong_weights=lambda weights: None", "wrong_weights of own: wanted a str, found a NoneType. Fix: mend it."),
        (
            "passes=(Sums('s', lambda block, *_: block.tau.double(), {'x': lambda n: n}),)",
            "the rows of x of own: wanted a slice, found a int. Fix: mend it.",
        ),
        (
            "passes=(Extrema('e', lambda block, *_: block.tau.double(), 'x', 'y'),), refuse=lambda known, settings, names: None",
            "refuse of own: wanted a list, found a NoneType. Fix: mend it.",
        ),
    ],
)
def test_a_function_of_a_record_that_gives_something_else_is_named(given: str, message: str, tmp_path: Path) -> None:
    base, models = families.fine_tuned(2)
    text = f"own = Method(name='own', merge=lambda block, known, settings: block.theta, {given})"
    with pytest.raises(RequestError) as told:
        merged_by(tmp_path, text, base, models)
    assert told.value.problems == (f"merge_method: {message}",)


# --- its output can be verified ---------------------------------------------------------------------------------------------------

TRIMMED = """
def merge(block, known, settings):
    kept = torch.where(block.tau.abs() <= column(known["limit"], block.tau), block.tau, 0.0)
    return block.theta + sum_over_tasks(kept * column(block.weights, kept)) * NOISE

own = Method(
    name="own", merge=merge, tolerance=TOLERANCE,
    parameters={"keep": Parameter(0.9, fraction, "the share that is kept")},
    passes=(Ranks(MAGNITUDE, {"limit": lambda D, own: min(int(D * own["keep"]), D - 1)}),),
)
"""


def trimmed(noise: str = "1.0", tolerance: float = 0.0) -> str:
    return TRIMMED.replace("NOISE", noise).replace("TOLERANCE", str(tolerance))


def own_beside(out: Path) -> Path:
    """The code that made the output."""
    return out.parent / "own.py"


@pytest.fixture
def own_output(tmp_path: Path) -> Callable[[str], Path]:
    """Makes an output of the method in this text."""
    family = Family(tmp_path / "family", *families.fine_tuned(2, dtype=torch.float32))

    def make(text: str) -> Path:
        recipe = Recipe.from_dict(family.recipe(merge_method=method_in(tmp_path, text)), tmp_path)
        with small_engine(tally_entries=512, chunk_elements=4096):
            return merged_to(tmp_path / "out", recipe)

    return make


def test_an_output_is_right_until_the_code_or_the_file_is_another(own_output: Callable[[str], Path], tmp_path: Path) -> None:
    out = own_output(trimmed())
    own = tmp_path / "own.py"
    assert verify(out, method=own, quiet=True).problems == ()
    method_in(tmp_path, trimmed("1.5"))
    with pytest.raises(
        RequestError, match=r"--method .*own\.py: wanted the code that merged .*, with sha256 \w{64}, found \w{64}\. Fix"
    ):
        verify(out, method=own, quiet=True)
    own.unlink()
    with pytest.raises(RequestError, match=r"--method: wanted code that can be read, found .*own\.py:own: No such file"):
        verify(out, method=own, quiet=True)
    method_in(tmp_path, trimmed())
    assert verify(out, method=f"{own}:own", quiet=True).ok


def test_verify_shows_the_bytes_of_the_output_that_it_reads(
    own_output: Callable[[str], Path], capfd: pytest.CaptureFixture[str]
) -> None:
    out = own_output(trimmed())
    assert verify(out, method=own_beside(out)).ok
    size = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    assert f"read the output: done, {readable_bytes(size)} in" in capfd.readouterr().err


@pytest.mark.parametrize(("tolerance", "ok"), [(0.0, False), (1e-9, False), (1e-4, True)])
def test_a_method_is_verified_within_the_tolerance_that_it_states(
    tolerance: float, ok: bool, own_output: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It gives other values on other machines: here one in which a variable says so."""
    code = trimmed("(1.0 + float(__import__('os').environ.get('ANOTHER_MACHINE', '0')) * 1e-3)", tolerance)
    out = own_output(code)
    assert verify(out, method=own_beside(out), quiet=True).ok
    monkeypatch.setenv("ANOTHER_MACHINE", "1")
    assert verify(out, method=own_beside(out), quiet=True, sample=10**6).ok == ok


def test_the_tolerance_is_a_share_of_the_largest_value_of_the_whole_tensor(own_output: Callable[[str], Path]) -> None:
    """Whichever block of it is looked at, and however small its values are: the first elements of each tensor are far smaller."""
    text = """
def merge(block, known, settings):
    is_largest = block.tensor.name == "model.embed_tokens.weight"
    small = block.tensor.start + torch.arange(len(block.theta)) < 4096 if is_largest else False
    noise = float(__import__("os").environ.get("ANOTHER_MACHINE", "0"))
    return torch.where(torch.as_tensor(small), block.theta * 1e-6, block.theta) + noise * 1e-6

own = Method(name="own", merge=merge, tolerance=1e-4)
"""
    out = own_output(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ANOTHER_MACHINE", "1")
        assert verify(out, method=own_beside(out), quiet=True, sample=10**6).ok
        patch.setenv("ANOTHER_MACHINE", "1000")
        assert not verify(out, method=own_beside(out), quiet=True, sample=10**6).ok


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param(lambda r: {"outputs": []}, r"outputs: wanted \[\('model.safetensors', \d+\)\].*found \[\]", id="no outputs"),
        pytest.param(
            lambda r: {"thresholds": r["thresholds"] | {"limit": r["thresholds"]["limit"] * 2}},
            "thresholds: limit: wanted 2 numbers, one for each model, found 4. Fix: merge again",
            id="too many thresholds",
        ),
        pytest.param(lambda r: {"thresholds": r["thresholds"] | {"sum": []}}, "merge of trimmed raised IndexError", id="none"),
    ],
)
def test_a_receipt_that_was_damaged_ends_in_a_complaint(
    own_output: Callable[[str], Path], changes: Callable[[dict[str, Any]], dict[str, Any]], message: str
) -> None:
    text = (
        trimmed()
        .replace('name="own"', 'name="trimmed"')
        .replace("* NOISE", "* NOISE")
        .replace("D - 1)}),)", "D - 1)}), Sums('s', lambda block, *_: block.tau.double(), {'sum': lambda n: slice(0, n)}))")
        .replace("return block.theta", "return block.theta + 0 * known['sum'][0]")
    )
    out = own_output(text)
    assert verify(out, method=own_beside(out), quiet=True).ok
    whole = json.loads((out / "pcb_receipt.json").read_text())
    (out / "pcb_receipt.json").write_text(json.dumps(whole | changes(whole)))
    try:
        found = "\n".join(verify(out, method=own_beside(out), quiet=True).problems)
    except RequestError as error:
        found = str(error)
    assert re.search(message, found), found


def test_texts_and_lists_can_be_parameters_of_each_model(own_output: Callable[[str], Path]) -> None:
    """The model's card shows them."""
    out = own_output(
        "own = Method(name='own', merge=lambda block, known, settings: block.theta, parameters={"
        "'how': Parameter('a|b', lambda raw, *_: str(raw), '', per_model=True), "
        "'several': Parameter([1.5, 2.5], lambda raw, *_: list(raw), '', per_model=True)})"
    )
    assert "| model0 | model | weight 1, how a&#124;b, several [1.5, 2.5] |" in (out / "README.md").read_text()


VERIFYING = """
import sys, pcb_ray
print([__debug__, *(pcb_ray.verify(out, method=sys.argv[1], quiet=True, sample=10**6) for out in sys.argv[2:])])
"""


@pytest.mark.very_slow
def test_verify_finds_the_same_without_asserts(own_output: Callable[[str], Path], tmp_path: Path) -> None:
    out, damaged = own_output(trimmed()), tmp_path / "damaged"
    shutil.copytree(out, damaged)
    data = bytearray((damaged / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (damaged / "model.safetensors").write_bytes(data)
    found = [verify(folder, method=own_beside(out), quiet=True, sample=10**6) for folder in (out, damaged)]
    assert [len(one.problems) for one in found] == [0, 2]
    command = [sys.executable, "-O", "-c", VERIFYING, str(own_beside(out)), str(out), str(damaged)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == str([False, *found])


# --- an analysis is shared only where it is the same ------------------------------------------------------------------------------

SHARING = """
own = Method(
    name="own",
    parameters={
        "keep": Parameter(0.9, fraction, "", per_model=True), "power": Parameter(1.0, number, ""), "lambda": lambda_parameter()},
    merge=lambda block, known, settings: block.theta + settings.lambda_ * sum_over_tasks(
        torch.where(powered(block, known, settings) <= column(known["limit"], block.tau), block.tau, 0.0)),
    passes=(
        Ranks(MAGNITUDE, {"low": lambda D, own: D // 10}),
        Ranks(Quantity("power of tau", lambda *given: powered(*given), parameters=("power",)),
              {"limit": lambda D, own: min(int(D * own["keep"]), D - 1)}),
        Sums("large ones", lambda block, known, settings: (block.tau > column(known["limit"], block.tau)).double(),
             {"large": lambda n: slice(0, n)}, parameters=()),
    ),
)

def powered(block, known, settings):
    return (block.tau.abs() - column(known["low"], block.tau)) * settings["power"]
"""


def test_recipes_of_one_session_find_what_each_would_find_alone(tmp_path: Path) -> None:
    """All methods, and one of one's own whose quantity depends on a parameter, go through one session in turn; what they share is
    not read again, and nothing is shared that depends on what they don't."""
    family = Family(tmp_path / "family", *families.fine_tuned(2, dtype=torch.float32))
    recipes = []
    for method in METHODS:
        name, variant = {"merge_method": method.name}, {"variant": method.variant} if method.variant else {}
        densities = (0.1, 0.3) if "density" in method.parameters else (None,)
        for density in densities:
            parameters = variant | ({} if density is None else {"density": density})
            recipes.append(Recipe.from_dict(family.recipe(**name, parameters=parameters)))
    own = Recipe.from_dict(family.recipe(merge_method=method_in(tmp_path, SHARING)), tmp_path)
    changes: list[dict[str, Any]] = [
        {},
        {"lambda": 0.5},
        {"keep": 0.5},
        {"power": 2.0},
        {"power": 2.0, "keep": 0.5},
        {"lambda": 2.0},
    ]
    recipes += [own.with_parameters(change) for change in changes]
    inputs = open_inputs(recipes[0])
    with small_engine(tally_entries=512, chunk_elements=4096):
        plans = [plan_of(recipe, inputs) for recipe in recipes]
    session = Session(plans[0], lambda plan: LocalOwners(plan, LocalStore()))
    shared, passes = [], []
    for made in plans:
        session.begin(made)
        shared.append(analyse(session))
        passes.append([sweep.name for sweep in session.sweeps if not sweep.name.startswith("sample")])
    for made, known in zip(plans, shared, strict=True):
        assert known == merge_locally(made, tmp_path / "alone").known
    of_own = [list(dict.fromkeys(names)) for names in passes[-len(changes) :]]
    by_power, large = "ranks of power of tau", "large ones"
    assert of_own == [["ranks of |tau|", by_power, large], [], [by_power, large], [by_power, large], [by_power, large], []]


def test_methods_of_one_name_and_other_code_share_nothing(tmp_path: Path) -> None:
    family = Family(tmp_path / "family", *families.fine_tuned(2))
    found = []
    text = (
        "own = Method(name='own', merge=lambda b, k, s: b.theta, passes=(Ranks(Quantity('q', lambda b, k, s: b.tau * {}, "
        "parameters=()), {{'x': lambda D, own: D - 1}}),))"
    )
    first = plan(family.recipe(merge_method=method_in(tmp_path, text.format("1.0"))))
    session = Session(first, lambda plan: LocalOwners(plan, LocalStore()))
    for factor in ("1.0", "2.0"):
        session.begin(plan(family.recipe(merge_method=method_in(tmp_path, text.format(factor)))))
        found.append(analyse(session)["x"])
    assert found[1] == tuple(2 * x for x in found[0])


# --- without a base ---------------------------------------------------------------------------------------------------------------


def test_a_method_without_a_base_gets_the_models_themselves(tmp_path: Path) -> None:
    base, models = families.fine_tuned(3, dtype=torch.float32)
    text = "own = Method(name='own', has_base=False, merge=lambda b, k, s: b.tau.sort(dim=0).values[1] + b.theta)"
    found = merged_by(tmp_path, text, base, models)
    for name, merged in found.items():
        assert torch.equal(merged, torch.stack([model[name] for model in models]).median(dim=0).values)


def test_what_the_kernel_looks_at_is_the_users_alone() -> None:
    """Methods that come with pcb_ray are not slowed down by checks and copies."""
    for method in METHODS:
        parameters = {name: parameter.default for name, parameter in method.parameters.items()}
        settings = Settings(2, 10, 1, parameters, (parameters,) * 2)
        assert not TorchKernel(method, settings, torch.device("cpu"))._is_own
        assert TorchKernel(dataclasses.replace(method), settings, torch.device("cpu"))._is_own


SCORED = """
kept = lambda scores, known: scores > column(known["t"], scores)
size = Quantity("size", lambda block, known, settings: block.tau.abs(), parameters=())

own = Method(
    name="own", linear=True, parameters={"density": Parameter(0.2, fraction, "", searched="share"), "lambda": lambda_parameter()},
    passes=(Ranks(size, {"t": lambda D, own: int(D * (1 - own["density"]))}),),
    merge=lambda block, known, settings: block.theta + settings.lambda_ * sum_over_tasks(
        torch.where(kept(block.tau.abs(), known), block.tau, 0.0) * column(block.weights, block.tau)),
    scored=Scored(
        values=lambda block, known, settings: block.tau, scores=size, kept=kept, threshold="t", share="density",
        combine=lambda theta, values, scores, known, weights, lambda_: theta + lambda_ * sum_over_tasks(
            values * column(weights, values))),
)
"""


@pytest.mark.parametrize(
    ("was", "now", "message"),
    [
        ("", "", ""),
        ("combine=lambda theta, values, scores, known, weights, lambda_: theta +", "combine=lambda *a: a[0] +", "NameError"),
        ("theta + lambda_ * sum", "theta + 1.01 * lambda_ * sum", "departs"),
        ("kept=kept", "kept=lambda scores, known: scores < column(known['t'], scores)", "departs"),
        ("kept=kept", "kept=lambda scores, known: scores", r"scored.kept of own: wanted one for each model and element \[N, B\]"),
        (
            "values=lambda block, known, settings: block.tau",
            "values=lambda block, *_: block.tau[0]",
            "scored.values of own: wanted",
        ),
    ],
    ids=["right", "raises", "another factor", "other elements", "no mask", "no rows"],
)
def test_a_scored_basis_that_gives_another_merge_is_found(was: str, now: str, message: str, tmp_path: Path) -> None:
    family = Family(tmp_path / "family", *families.fine_tuned(3, dtype=torch.float32))
    text = "from pcb_ray.methods.method import Scored\n" + SCORED.replace(was, now)
    made = plan(family.recipe(merge_method=method_in(tmp_path, text)))
    session = Session(made, lambda plan: LocalOwners(plan, LocalStore()))
    known = analyse(session)
    if message in ("", "departs"):
        departures = [found for _, found in session.owners.ask(CheckLinear(known, scored=True), range(made.chunks))]
        assert (max(departures) > LINEAR_WITHIN) == bool(message)
        assert max(found for _, found in session.owners.ask(CheckLinear(known, scored=False), range(made.chunks))) < LINEAR_WITHIN
    else:
        with pytest.raises(RequestError, match=message):
            list(session.owners.ask(CheckLinear(known, scored=True), range(made.chunks)))


# --- its parameters ---------------------------------------------------------------------------------------------------------------


def recipe_with(folder: Path, check: str, default: str = "1.0", name: str = "x", **given: Any) -> Recipe:
    text = f"own = Method(name='own', merge=lambda b, k, s: b.theta, parameters={{{name!r}: Parameter({default}, {check}, '')}})"
    asked = {"merge_method": method_in(folder, text), "base_model": "b", "models": ["a"], "parameters": given}
    return Recipe.from_dict(asked, folder)


@pytest.mark.parametrize(
    "name", ["weight", "normalize", "int8_mask", "variant", "dtype", "weights", "exclude", "method", "lambda_", "base", "models"]
)
def test_a_parameter_that_has_another_use_in_recipes_or_calls_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=f"wanted a name that recipes and calls have no other use for, found {name!r}"):
        recipe_with(tmp_path, "number", name=name)


@pytest.mark.parametrize(
    "check",
    [
        pytest.param("lambda raw, *_: float(raw) / 180 * 3.14", id="converts anew each time"),
        pytest.param("lambda raw, *_: None", id="nothing"),
        pytest.param("lambda raw, *_: torch.tensor(raw)", id="can't be written"),
        pytest.param("lambda raw, *_: float('nan')", id="is not equal to itself"),
    ],
)
def test_a_check_whose_value_does_not_last_is_refused(check: str, tmp_path: Path) -> None:
    """A recipe is written with the value, and `verify` reads it from there."""
    with pytest.raises(
        RequestError, match=r"parameters\.x: wanted .* that the parameter's own check leaves as it is, found .*Fix: let"
    ):
        recipe_with(tmp_path, check, x=30)


@pytest.mark.parametrize(
    ("check", "default", "value"),
    [
        ("lambda raw, *_: float(str(raw).rstrip('%')) / 100 if str(raw).endswith('%') else float(raw)", "0.5", "30%"),
        ("lambda raw, *_: tuple(raw)", "(1, 2)", [3, 4]),
        ("lambda raw, *_: str(raw)", "'a'", "b"),
        ("lambda raw, *_: dict(raw)", "{}", {"attention": 0.5}),
        ("lambda raw, *_: bool(raw)", "False", True),
    ],
    ids=["a share", "a tuple", "text", "a table", "a truth"],
)
def test_a_value_of_any_plain_kind_comes_back_from_the_written_recipe(check: str, default: str, value: Any, tmp_path: Path) -> None:
    recipe = recipe_with(tmp_path, check, default, x=value)
    assert Recipe.from_yaml(recipe.to_yaml(), tmp_path) == recipe
    assert recipe.parameters["x"] != recipe_with(tmp_path, check, default).parameters["x"]


def test_a_parameter_may_be_a_list_where_a_pass_depends_on_it(tmp_path: Path) -> None:
    base, models = families.fine_tuned(2)
    quantity = "Quantity('q', lambda block, known, settings: block.tau * settings['x'][0])"
    text = (
        "own = Method(name='own', merge=lambda b, k, s: b.theta, parameters={'x': Parameter([2.0, 3.0], lambda raw, *_: raw, '')},"
        f" passes=(Ranks({quantity}, {{'limit': lambda D, own: 0}}),))"
    )
    assert_same(merged_by(tmp_path, text, base, models), base)
