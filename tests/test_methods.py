"""Methods are records: those of pcb_ray are named nowhere else, and one of the user's own goes wherever they go."""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import json
import os
import pickle
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import families
import numpy as np
import pytest
import torch
from clusters import await_that, digests, pcb_ray, ray_address, receipt_of, running, state_of
from families import Family, merge_locally, small_engine

import pcb_ray as package
from pcb_ray import Recipe, RequestError
from pcb_ray.methods import METHODS, Method, Ranks, names, own_method, variants_of
from pcb_ray.output.folder import Folder
from pcb_ray.output.state import State, asked_of
from pcb_ray.planning import Plan, plan
from pcb_ray.questions import CompareParts
from pcb_ray.recipe import Model

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "examples" / "trimmed_mean.py"
FULL_NAMES = [method.full_name for method in METHODS]

# --- the records ------------------------------------------------------------------------------------------------------------------


def constants(tree: ast.AST) -> Iterator[ast.Constant]:
    """The constants of a module; strings that stand by themselves only explain."""
    explains = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    return (node for node in ast.walk(tree) if isinstance(node, ast.Constant) and id(node) not in explains)


def test_no_module_but_the_records_names_a_method() -> None:
    named = {name for method in METHODS for name in (method.name, method.variant, method.full_name) if name}
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}: {node.value!r}"
        for path in sorted((ROOT / "pcb_ray").rglob("*.py"))
        if "methods" not in path.parts
        for node in constants(ast.parse(path.read_text()))
        if isinstance(node.value, str) and node.value in named
    ]
    assert not found, "\n".join(found)


def test_the_table_of_the_readme_is_what_the_records_say() -> None:
    rows = ["| `merge_method` | `variant` | formula |", "| --- | --- | --- |"]
    for name in names():
        for number, (variant, method) in enumerate(variants_of(name).items()):
            shown = f" `{variant}`{' (default)' if number == 0 else ''} " if variant else " "
            rows.append(f"| `{name}` |{shown}| {method.formula} |")
    readme = (ROOT / "README.md").read_text()
    table = readme.split("<!-- methods -->\n")[1].split("\n<!-- /methods -->")[0]
    assert table.splitlines() == rows, "README.md: between <!-- methods --> and <!-- /methods --> must stand\n" + "\n".join(rows)


def test_every_record_has_a_name_of_its_own_a_formula_and_a_source() -> None:
    assert len(set(FULL_NAMES)) == len(METHODS)
    assert all(method.formula and method.source for method in METHODS)
    for name in names():
        variants = variants_of(name)
        assert "" not in list(variants)[1:], f"{name}: but for the default, each has a variant"
        assert len({tuple(method.parameters) for method in variants.values()}) == 1, (
            f"{name}: a change of variant keeps the parameters"
        )


@pytest.mark.parametrize("method", METHODS, ids=FULL_NAMES)
def test_parameters_have_sound_defaults_and_ranges(method: Method) -> None:
    for name, parameter in method.parameters.items():
        problems: list[str] = []
        assert parameter.check(parameter.default, name, problems) == parameter.default
        assert parameter.check("nonsense", name, problems) is not None
        assert len(problems) == 1, "the default is right, nonsense is not"
        assert parameter.help
        lower, upper = parameter.range
        if parameter.searched:
            assert lower < upper
            assert lower <= parameter.default <= upper
            for bound in (lower, upper):
                parameter.check(bound, name, problems)
            assert len(problems) == 1, "the search stays among right values"
        else:
            assert (lower, upper) == (0.0, 0.0)
    searched = [parameter.searched for parameter in method.parameters.values() if parameter.searched]
    assert len(searched) == len(set(searched)), "a search knows one parameter of each kind"
    assert method.linear or not method.scored
    assert method.has_base or not method.linear


@pytest.mark.parametrize("method", METHODS, ids=FULL_NAMES)
def test_what_is_searched_by_share_is_decided_by_a_rank(method: Method) -> None:
    shares = [name for name, parameter in method.parameters.items() if parameter.searched == "share"]
    assert shares == ([] if method.scored is None else [method.scored.share])
    if method.scored is not None:
        (ranks,) = [one for one in method.passes if isinstance(one, Ranks) and method.scored.threshold in one.places]
        assert ranks.quantity == method.scored.scores


@pytest.mark.parametrize("method", METHODS, ids=FULL_NAMES)
def test_ranks_lie_within_the_model_for_any_parameters(method: Method) -> None:
    found = [
        (D, own, place(D, own))
        for one in method.passes
        if isinstance(one, Ranks)
        for place in one.places.values()
        for D in (101, 10_000, 70_000_000_000)
        for share in (1e-12, 0.1, 0.5, 1.0)
        if (own := {name: share if p.searched == "share" or p.per_model else p.default for name, p in method.parameters.items()})
    ]
    assert [case for case in found if not 0 <= case[2] < case[0]] == []


# --- a method of one's own, against numpy -----------------------------------------------------------------------------------------

HEAD = """
import torch
from pcb_ray.methods import *
"""

# Every kind of pass, in one method.
ALL_PASSES = (
    HEAD
    + """
def energy(block, known, settings):
    return block.tau * block.tau

def kept(block, known):
    return energy(block, known, None) <= column(known["limit"], block.tau)

def merge(block, known, settings):
    tau = block.tau
    width = column(known["most"], tau) - column(known["least"], tau)
    share = column(block.of_tensor(known["of_tensor"], settings), tau) / column(known["whole"], tau)
    scaled = torch.where(kept(block, known), tau * share, tau / column(known["top"], tau)) / width
    total = torch.zeros_like(block.theta)
    for row, weight in zip(scaled, block.weights, strict=True):
        total += row * weight
    return block.theta + total * settings.lambda_

every = Method(
    name="every",
    merge=merge,
    parameters={"keep": Parameter(0.9, fraction, "the share that is kept", per_model=True), "lambda": lambda_parameter()},
    passes=(
        Ranks(Quantity("energy", energy), {"limit": lambda D, own: int(D * own["keep"]) - 1}, largest="top"),
        Extrema("range of tau", lambda block, known, settings: block.tau.double(), "least", "most"),
        Sums("kept energy", lambda block, known, settings: torch.where(kept(block, known), block.tau, 0.0).double() ** 2,
             {"whole": lambda n: slice(0, n)}),
        Sums("energy by tensor", lambda block, known, settings: torch.cat([block.tau.double().abs(), block.tau.double() ** 2]),
             {"size": lambda n: slice(0, n), "of_tensor": lambda n: slice(n, None)}, per="tensor"),
    ),
)
"""
)

# What a block may know: its tensor and its first element.
SEEDED = (
    HEAD
    + """
def merge(block, known, settings):
    at = block.first + torch.arange(len(block.theta))
    mask = (at * 2654435761 & 0xFFFFFFFF) >= settings["drop"] * 2**32
    rows = block.tensor.shape[0] if block.tensor.shape else 1
    place = (block.tensor.start + torch.arange(len(block.theta))).float() / rows + len(block.tensor.name)
    total = torch.zeros_like(block.theta)
    for row, weight in zip(block.tau, block.weights, strict=True):
        total += torch.where(mask, row * weight, 0.0)
    return block.theta + total * place + block.tensor.index

seeded = Method(
    name="seeded",
    merge=merge,
    parameters={"drop": Parameter(0.5, number, "the share that is dropped")},
    linear=False,
)
"""
)

# A whole tensor at a time: the threshold is the tensor's own.
WHOLE_TENSORS = (
    HEAD
    + """
def merge(block, known, settings):
    assert block.tensor.start == 0 and len(block.theta) == torch.Size(block.tensor.shape).numel()
    middle = block.tau.abs().sort(dim=1).values[:, block.tau.shape[1] // 2, None]
    far = column(known["far"], block.tau)
    kept = torch.where((block.tau.abs() >= middle) & (block.tau.abs() < far), block.tau, 0.0)
    total = torch.zeros_like(block.theta)
    for row, weight in zip(kept, block.weights, strict=True):
        total += row * weight
    return block.theta + total

whole = Method(name="whole", merge=merge, unit="tensor", passes=(Ranks(MAGNITUDE, {"far": lambda D, own: D - 10}),))
"""
)

# Element by element: it is told nothing of where they lie.
ELEMENTS = (
    HEAD
    + """
def merge(block, known, settings):
    assert block.tensor is None and block.first == -1
    low = column(known["low"], block.tau)
    total = torch.zeros_like(block.theta)
    for row, weight in zip(torch.where(block.tau < low, 0.0, block.tau), block.weights, strict=True):
        total += row * weight
    return block.theta + total

signed = Method(
    name="signed",
    merge=merge,
    unit="element",
    passes=(
        Ranks(Quantity("signed tau", lambda block, known, settings: block.tau.double(), bits=64), {"low": lambda D, own: D // 3}),
    ),
)
"""
)


def on_a_grid(n: int = 3, seed: int = 0) -> tuple[families.StateDict, list[families.StateDict]]:
    """Models whose task vectors are small multiples of 1/1024, so that no sum rounds; with a scalar and a tensor of odd length."""
    generator = torch.Generator().manual_seed(seed)
    shapes = families.SHAPES | {"a.odd": (12_345,), "z.scalar": ()}

    def integers(shape: tuple[int, ...], most: int) -> torch.Tensor:
        return torch.randint(-most, most + 1, shape, generator=generator) / 1024

    base = {name: integers(shape, 500) for name, shape in shapes.items()}
    return base, [{name: theta + integers(theta.shape, 30 + 5 * k) for name, theta in base.items()} for k in range(n)]


class Dense:
    """The same models as numpy has them: all elements in the order of the merge."""

    def __init__(self, base: families.StateDict, models: list[families.StateDict]) -> None:
        self.shapes = {name: tuple(base[name].shape) for name in sorted(base)}
        self.theta_D = np.concatenate([base[name].float().numpy().ravel() for name in self.shapes])
        models_ND = [np.concatenate([model[name].float().numpy().ravel() for name in self.shapes]) for model in models]
        self.tau_ND = np.stack(models_ND) - self.theta_D
        self.N, self.D = self.tau_ND.shape
        sizes = [int(np.prod(shape)) for shape in self.shapes.values()]
        self.starts = np.cumsum([0, *sizes])
        self.tensor_D = np.repeat(np.arange(len(sizes)), sizes)

    def by_name(self, merged_D: np.ndarray) -> dict[str, np.ndarray]:
        assert merged_D.dtype == np.float32
        spans = zip(self.shapes.items(), self.starts, self.starts[1:], strict=False)
        return {name: merged_D[start:stop].reshape(shape) for (name, shape), start, stop in spans}


WEIGHTS = (0.5, 1.0, 1.5)


def weighted(rows_ND: np.ndarray) -> np.ndarray:
    total_D = np.zeros(rows_ND.shape[1], dtype=np.float32)
    for row_D, weight in zip(rows_ND, WEIGHTS, strict=True):
        total_D += row_D * np.float32(weight)
    return total_D


def dense_every(m: Dense) -> np.ndarray:
    keep, lambda_ = np.array([0.8, 0.9, 0.6]), 0.25
    energy_ND = m.tau_ND * m.tau_ND
    ranks = [int(m.D * k) - 1 for k in keep]
    limit_N1 = np.array([[np.sort(e)[rank]] for e, rank in zip(energy_ND, ranks, strict=True)])
    kept_ND = energy_ND <= limit_N1
    squares_ND = m.tau_ND.astype(np.float64) ** 2
    whole_N1 = np.where(kept_ND, squares_ND, 0).sum(axis=1, keepdims=True).astype(np.float32)
    of_tensor_NT = np.add.reduceat(squares_ND, m.starts[:-1], axis=1).astype(np.float32)
    width_N1 = m.tau_ND.max(axis=1, keepdims=True) - m.tau_ND.min(axis=1, keepdims=True)
    share_ND = (of_tensor_NT / whole_N1)[:, m.tensor_D]
    scaled_ND = np.where(kept_ND, m.tau_ND * share_ND, m.tau_ND / energy_ND.max(axis=1, keepdims=True)) / width_N1
    return m.theta_D + weighted(scaled_ND) * np.float32(lambda_)


def dense_seeded(m: Dense) -> np.ndarray:
    mask_D = (np.arange(m.D, dtype=np.int64) * 2654435761 & 0xFFFFFFFF) >= 0.25 * 2**32
    rows = np.array([shape[0] if shape else 1 for shape in m.shapes.values()], dtype=np.float32)
    lengths = np.array([len(name) for name in m.shapes], dtype=np.float32)
    within_D = (np.arange(m.D) - m.starts[m.tensor_D]).astype(np.float32)
    place_D = within_D / rows[m.tensor_D] + lengths[m.tensor_D]
    total_D = weighted(np.where(mask_D, m.tau_ND, np.float32(0)))
    return m.theta_D + total_D * place_D + m.tensor_D.astype(np.float32)


def dense_whole(m: Dense) -> np.ndarray:
    size_ND = np.abs(m.tau_ND)
    far_N1 = np.sort(size_ND, axis=1)[:, m.D - 10, None]
    middle_NT = np.stack(
        [np.sort(size_ND[:, a:b], axis=1)[:, (b - a) // 2] for a, b in zip(m.starts, m.starts[1:], strict=False)], 1
    )
    kept_ND = (size_ND >= middle_NT[:, m.tensor_D]) & (size_ND < far_N1)
    return m.theta_D + weighted(np.where(kept_ND, m.tau_ND, np.float32(0)))


def dense_signed(m: Dense) -> np.ndarray:
    low_N1 = np.sort(m.tau_ND, axis=1)[:, m.D // 3, None]
    return m.theta_D + weighted(np.where(m.tau_ND < low_N1, np.float32(0), m.tau_ND))


@dataclasses.dataclass(frozen=True)
class Own:
    """A method of one's own, what it is asked for, and the same in numpy."""

    name: str
    text: str
    parameters: dict[str, Any]
    of_model: dict[str, list[float]]
    dense: Callable[[Dense], np.ndarray]

    def write(self, folder: Path) -> str:
        """Its `merge_method`, from the folder's recipes."""
        (folder / f"{self.name}.py").write_text(self.text)
        return f"{self.name}.py:{self.name}"

    def recipe(self, family: Family) -> Recipe:
        models = tuple(
            Model(str(family.folder / f"model{k}"), ((None, weight),), {name: values[k] for name, values in self.of_model.items()})
            for k, weight in enumerate(WEIGHTS)
        )
        return Recipe(
            models,
            str(family.folder / "base"),
            merge_method=self.write(family.folder),
            parameters=self.parameters,
            folder=family.folder,
        )


OWN = (
    Own("every", ALL_PASSES, {"lambda": 0.25}, {"keep": [0.8, 0.9, 0.6]}, dense_every),
    Own("seeded", SEEDED, {"drop": 0.25}, {}, dense_seeded),
    Own("whole", WHOLE_TENSORS, {}, {}, dense_whole),
    Own("signed", ELEMENTS, {}, {}, dense_signed),
)
each_own = pytest.mark.parametrize("own", OWN, ids=lambda own: own.name)


@pytest.fixture
def grid(tmp_path: Path) -> Family:
    return Family(tmp_path / "family", *on_a_grid())


@each_own
def test_in_memory_it_gives_what_numpy_gives(own: Own, tmp_path: Path) -> None:
    base, models = on_a_grid()
    own.write(tmp_path)
    parameters = {name.replace("lambda", "lambda_"): value for name, value in (own.parameters | own.of_model).items()}
    merged = package.merge_state_dicts(base, models, method=f"{tmp_path / own.name}.py:{own.name}", weights=WEIGHTS, **parameters)
    m = Dense(base, models)
    for name, expected in m.by_name(own.dense(m)).items():
        assert np.array_equal(merged[name].numpy(), expected), name


@each_own
@pytest.mark.parametrize("chunk_elements", [1000, 5000, 1 << 16])
def test_bytes_do_not_depend_on_blocks_threads_or_chunks(own: Own, chunk_elements: int, grid: Family, tmp_path: Path) -> None:
    least = 16_384 if own.name == "whole" else 4096  # the largest tensor, or the smallest block
    expected = Dense(grid.base, grid.models).by_name(own.dense(Dense(grid.base, grid.models)))
    for number, (block, threads) in enumerate([(None, 1), (least, 3), (least * 2, 2)]):
        with small_engine(tally_entries=256, chunk_elements=chunk_elements):
            made = plan(own.recipe(grid))
        assert len(made.parts) > 1 or chunk_elements == 1 << 16
        out = tmp_path / f"out{number}"
        merge_locally(made, out, block_elements=block, threads=threads)
        for name, found in families.load(out).items():
            assert np.array_equal(found.numpy(), expected[name]), (name, block, threads)


def test_passes_find_exactly_what_numpy_finds(grid: Family, tmp_path: Path) -> None:
    with small_engine(chunk_elements=1000):
        made = plan(OWN[0].recipe(grid))
    known = merge_locally(made, tmp_path / "out").known
    m = Dense(grid.base, grid.models)
    tau_ND, energy_ND = m.tau_ND.astype(np.float64), np.sort(m.tau_ND**2, axis=1)
    assert known["limit"] == tuple(float(energy_ND[i, int(m.D * k) - 1]) for i, k in enumerate([0.8, 0.9, 0.6]))
    assert known["top"] == tuple(energy_ND[:, -1].tolist())
    assert (known["least"], known["most"]) == (tuple(tau_ND.min(axis=1).tolist()), tuple(tau_ND.max(axis=1).tolist()))
    assert known["size"] == tuple(np.add.reduceat(np.abs(tau_ND), m.starts[:-1], axis=1).T.ravel().tolist())
    assert made.method.sweeps == 5


# --- what is wrong with one -------------------------------------------------------------------------------------------------------

WRONG = (
    HEAD
    + """
def merge(block, known, settings):
    return MERGE

def quantity(block, known, settings):
    return QUANTITY

def rows(block, known, settings):
    return ROWS

wrong = Method(
    name="wrong",
    merge=merge,
    parameters={"keep": Parameter(0.9, CHECK, "the share that is kept")},
    passes=(
        Ranks(Quantity("worth", quantity), {"limit": lambda D, own: RANK}),
        Extrema("extremes of it", rows, "least", "most"),
        Sums("sums of it", rows, {"sums": lambda n: slice(0, n)}),
    ),
)
three = 3
"""
)
RIGHT = {"MERGE": "block.theta", "QUANTITY": "block.tau", "ROWS": "block.tau.double()", "RANK": "D // 2", "CHECK": "fraction"}


def merge_wrong(folder: Path, name: str = "wrong.py:wrong", parameters: dict[str, Any] | None = None, **wrong: str) -> None:
    text = WRONG
    for key, right in RIGHT.items():
        text = text.replace(key, wrong.get(key, right))
    (folder / "wrong.py").write_text(text)
    base, models = on_a_grid(2)
    package.merge_state_dicts(base, models, method=f"{folder}/{name}", **(parameters or {}))


def test_the_frame_of_the_wrong_ones_is_right(tmp_path: Path) -> None:
    merge_wrong(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "gone.py:it"}, r": wanted code that can be read, found .*gone.py:it: No such file .*Fix: write file.py:object"),
        ({"name": "wrong.py:lost"}, r": .*wrong.py:lost: wanted 'lost' in it, found no such name. Fix: check the name"),
        ({"name": "wrong.py:three"}, r": wanted a pcb_ray.methods.Method, found .*wrong.py:three to be a int. Fix: name a record"),
        ({"MERGE": "1 +"}, r": .*wrong.py:wrong: .*found that it raises SyntaxError: .*wrong.py, line 6.*Fix: mend the file"),
        ({"MERGE": "block.tau"}, r": merge of wrong: wanted the merged elements \[B\], here \[\d*\] of .*, "
         r"found \[2, \d+\] of .*Fix: return"),
        ({"MERGE": "block.theta.half()"}, r": merge of wrong: wanted .* of torch.float32, found .* of torch.float16. Fix: return"),
        ({"MERGE": "3.0"}, r": merge of wrong: wanted .*, found a float. Fix: return a tensor of that shape and dtype"),
        ({"MERGE": "1 / 0"}, r": merge of wrong raised ZeroDivisionError: division by zero \(wrong.py:6\). Fix: mend it"),
        ({"QUANTITY": "block.tau[0]"}, r": worth of wrong: wanted a value for each model and element "
         r"\[N, B\], .* found \[\d+\] of .*Fix: ret"),
        ({"QUANTITY": "block.tau.double()"}, r": worth of wrong: wanted .* torch.float32, found .* torch.float64. Fix: return"),
        ({"QUANTITY": "block.tau / block.tau"}, r": worth of wrong: wanted numbers, found NaN. Fix: a NaN has no rank"),
        ({"QUANTITY": "1 / block.tau"}, r": worth of wrong: wanted finite values, found an infinite one in tensor .*Fix: mend"),
        ({"QUANTITY": "known['limit']"}, r": worth of wrong raised KeyError: 'limit' \(wrong.py:9\). Fix: mend it"),
        ({"ROWS": "block.tau"}, r": extremes of it of wrong: wanted rows of values .* torch.float64, "
         r"found .* torch.float32. Fix: return"),
        ({"ROWS": "block.tau.double() / 0"}, r": extremes of it of wrong: wanted finite values, found .*Fix: mend"),
        ({"RANK": "D"}, r": the rank of limit of wrong: wanted a whole number from 0 to 31897, "
         r"found 31898 for models\[0\]. Fix: mend"),
        ({"RANK": "D * 0.5"}, r": the rank of limit of wrong: wanted a whole number from 0 to 31897, "
         r"found 15949.0 for models\[0\]"),
        ({"RANK": "own['part']"}, r": the rank of limit of wrong raised KeyError: 'part' \(wrong.py:19\). Fix: mend it"),
        ({"CHECK": "lambda raw, *_: raw['a']"}, r": the check of keep of wrong raised TypeError: "
         r".*subscriptable.* \(wrong.py:17\). Fix: mend"),
    ],
    ids=lambda value: "=".join(*value.items()) if isinstance(value, dict) else "",
)  # fmt: skip
def test_a_wrong_method_is_refused_with_the_place_and_a_fix(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=f"merge_method{message}"):
        merge_wrong(tmp_path, **changes)


def test_a_merge_that_is_no_number_is_refused_with_its_place(tmp_path: Path) -> None:
    with pytest.raises(
        RequestError, match=r"the output: tensor .*, index .*: wanted a number, found NaN, which wrong gave .*Fix: mend"
    ):
        merge_wrong(tmp_path, MERGE="block.theta / 0 * 0")


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"kep": 0.5}, r"kep: wanted a parameter of wrong, found 0.5. Fix: write `keep`"),
        ({"keep": 3}, r"parameters.keep: wanted a number in \(0, 1\], found 3. Fix: write one number"),
        ({"keep": [0.5, 0.6]}, r"parameters.keep: wanted a number in \(0, 1\], found a value of type list. Fix: write one number"),
    ],
)
def test_wrong_parameters_of_a_right_method_are_refused(parameters: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=message):
        merge_wrong(tmp_path, parameters=parameters)


def test_a_wrong_method_is_told_beside_all_else_that_is_wrong_with_the_recipe() -> None:
    with pytest.raises(RequestError) as caught:
        Recipe((Model("a"), Model("a")), "base", merge_method="gone.py:it", dtype="int8")
    assert re.search(r"merge_method: .*gone.py.*\n.*models\[1\].*given twice.*\n.*dtype", str(caught.value))


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ("unit='blok'", "unit: wanted one of 'element', 'block', 'tensor', found 'blok'"),
        ("passes=(Sums('a', merge, {}, per='tensors'),)", "per: wanted one of 'model', 'tensor', found 'tensors'"),
        ("passes=(Ranks(Quantity('a', merge, bits=16), {}),)", "bits: wanted one of 32, 64, found 16"),
        (
            "passes=(Extrema('a', merge, 'x', 'y'), Sums('b', merge, {'y': slice}))",
            "passes: wanted a name of its own for each value, found y twice",
        ),
        (
            "parameters={'r': Parameter(1.0, fraction, '', searched='share')}",
            r'odd: wanted at most one parameter with `searched="share"`, the one that '
            r"`scored` names as its share, found .'r'.",
        ),
        (
            "parameters={'s': Parameter(1.0, number, '', searched='scale')}",
            r'odd: wanted at most one parameter with `searched="scale"`, lambda, found .s.',
        ),
    ],
)
def test_a_record_that_contradicts_itself_is_refused_with_its_line(record: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "odd.py").write_text(f"{HEAD}\ndef merge(*_): ...\n\nodd = Method(name='odd', merge=merge, {record})\n")
    with pytest.raises(
        RequestError,
        match=rf"merge_method: odd.py:odd: .*found that it raises .*{message} \(odd.py:7\). Fix: mend the file",
    ):
        Recipe((Model("a"),), "base", merge_method="odd.py:odd", folder=tmp_path)


def test_a_module_that_is_edited_after_python_ran_it_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The output would be that of the old code, and its receipt would name the new."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "edited_later.py").write_text(f"{HEAD}\nodd = Method(name='odd', merge=lambda b, k, s: b.theta)\n")
    asked: dict[str, Any] = {"merge_method": "edited_later:odd", "folder": tmp_path}
    Recipe((Model("a"),), "base", **asked)
    (tmp_path / "edited_later.py").write_text(f"{HEAD}\nodd = Method(name='odd', merge=lambda b, k, s: b.theta + 1)\n")
    with pytest.raises(
        RequestError, match=r"wanted the module as this process has imported it.*edited since. Fix: start Python anew"
    ):
        Recipe((Model("a"),), "base", **asked)


# --- its code is part of the request ----------------------------------------------------------------------------------------------


def planned_with(text: str, family: Family) -> Plan:
    return plan(dataclasses.replace(OWN[3], text=text).recipe(family))


def test_other_code_is_another_merge(grid: Family, tmp_path: Path) -> None:
    """... whose plan differs, and which a state refuses to go on with."""
    one, same, other = (planned_with(text, grid) for text in (ELEMENTS, ELEMENTS, ELEMENTS + "\n# changed"))
    assert one == same
    assert one.fingerprint() == same.fingerprint()
    assert one != other
    changed = {key for key, value in one.fingerprint().items() if other.fingerprint()[key] != value}
    assert changed == {"code_sha256"}
    with State(Folder(tmp_path / "out"), asked_of(one, "any", {}), {}) as state:
        state.wrote({"part 0": "0"})
    with pytest.raises(
        RequestError, match=r"--resume: .*code_sha256 was '[0-9a-f]{64}', now '[0-9a-f]{64}'\n.*Fix: ask for the same merge"
    ):
        State(Folder(tmp_path / "out"), asked_of(other, "any", {}), {}, resume=True)
    with State(Folder(tmp_path / "out"), asked_of(same, "any", {}), {}, resume=True) as state:
        assert state.journal == {"part 0": "0"}


def test_a_plan_carries_its_code_to_processes_that_do_not_have_the_file(grid: Family, tmp_path: Path) -> None:
    made = planned_with(ELEMENTS, grid)
    expected = merge_locally(made, tmp_path / "out").known
    (tmp_path / "plan").write_bytes(pickle.dumps(made))
    (grid.folder / "signed.py").unlink()
    script = (
        "import pickle, sys, pathlib, families\n"
        "plan = pickle.loads(pathlib.Path(sys.argv[1], 'plan').read_bytes())\n"
        "print(dict(families.merge_locally(plan, pathlib.Path(sys.argv[1], 'again')).known))\n"
    )
    path = os.pathsep.join([str(ROOT / "tests"), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-c", script, tmp_path], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=True
    )
    assert ast.literal_eval(done.stdout) == dict(expected)
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (tmp_path / "out" / "model.safetensors").read_bytes()


def test_a_method_can_be_an_object_of_a_module(grid: Family, tmp_path: Path) -> None:
    (grid.folder / "pack").mkdir()
    (grid.folder / "pack" / "__init__.py").write_text("")
    (grid.folder / "pack" / "own_methods.py").write_text(ELEMENTS + "\nclass Mine:\n    best = signed\n")
    recipe = dataclasses.replace(OWN[3].recipe(grid), merge_method="pack.own_methods:Mine.best", code=None)
    made = plan(recipe)
    assert made.fingerprint()["code_sha256"]
    merge_locally(made, tmp_path / "out")
    m = Dense(grid.base, grid.models)
    for name, expected in m.by_name(dense_signed(m)).items():
        assert np.array_equal(families.load(tmp_path / "out")[name].numpy(), expected)
    assert recipe.code is not None
    elsewhere = recipe.code._replace(sha256="0" * 64)  # as on a machine that has another version of the module
    with pytest.raises(
        RequestError, match=r"pack.own_methods:Mine.best: wanted a module with sha256 0{64}, .* on node .*Fix: install the"
    ):
        own_method(elsewhere)


def test_a_package_that_can_not_be_run_is_told_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "broken_pack").mkdir()
    (tmp_path / "broken_pack" / "__init__.py").write_text("\nlost\n")
    with pytest.raises(
        RequestError, match=r"merge_method: .*broken_pack.it:x: NameError: name 'lost' .*\(__init__.py:2\). Fix: write"
    ):
        Recipe((Model("a"),), "base", merge_method="broken_pack.it:x", folder=tmp_path)


def test_bits_that_differ_within_the_tolerance_of_a_record_are_verified(grid: Family, tmp_path: Path) -> None:
    text = ELEMENTS.replace("return block.theta + total", "return block.theta + total + 1e-5 * torch.rand(total.shape)")
    for tolerance, differ in (("1e-3", False), ("1e-9", True)):
        made = planned_with(text.replace('name="signed",', f'name="signed", tolerance={tolerance},'), grid)
        local = merge_locally(made, tmp_path / tolerance)
        parts = range(len(made.parts))
        answers = local.session.owners.ask(CompareParts(local.known, str(tmp_path / tolerance)), parts)
        assert any(answer for _, answer in answers) == differ


# --- the example ------------------------------------------------------------------------------------------------------------------


def test_the_example_is_short_and_gives_what_numpy_gives() -> None:
    assert len(EXAMPLE.read_text().splitlines()) < 25
    base, models = on_a_grid()
    merged = package.merge_state_dicts(base, models, method=f"{EXAMPLE}:trimmed_mean", weights=WEIGHTS, keep=0.8, lambda_=0.75)
    m = Dense(base, models)
    size_ND = np.abs(m.tau_ND)
    limit_N1 = np.sort(size_ND, axis=1)[:, int(m.D * 0.8), None]
    total_D = weighted(np.where(size_ND <= limit_N1, m.tau_ND, np.float32(0)))
    for name, expected in m.by_name(m.theta_D + total_D / np.float32(3) * np.float32(0.75)).items():
        assert np.array_equal(merged[name].numpy(), expected), name


# --- python -O --------------------------------------------------------------------------------------------------------------------

OPTIMISED = """
import hashlib, sys, families, pcb_ray
from pcb_ray.receipt import Receipt

base, models = families.fine_tuned(3)
digest = hashlib.sha256()
for method in ("pcb", "ties", sys.argv[1]):
    for tensor in pcb_ray.merge_state_dicts(base, models, method=method, dtype="float32").values():
        digest.update(tensor.numpy().tobytes())
print(digest.hexdigest())
for wrong in (b"{}", b"[1]", b'{"version": 2, "N": "many"}', b"\\xff"):
    try:
        Receipt.from_json(wrong)
    except pcb_ray.RequestError as error:
        print(error)
try:
    pcb_ray.merge_state_dicts(base, models, density=7)
except pcb_ray.RequestError as error:
    print(error)
"""


@pytest.mark.very_slow
def test_without_asserts_the_same_is_merged_and_refused() -> None:
    path = os.pathsep.join([str(ROOT / "tests"), str(ROOT)])
    plain, optimised = (
        subprocess.run(
            [sys.executable, *flags, "-c", OPTIMISED, f"{EXAMPLE}:trimmed_mean"],
            env={**os.environ, "PYTHONPATH": path},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for flags in ((), ("-O",))
    )
    assert plain == optimised
    assert plain.count("pcb_receipt.json") >= 4
    assert "parameters.density" in plain


# --- on Ray -----------------------------------------------------------------------------------------------------------------------

Test = TypeVar("Test", bound=Callable[..., None])
EVALUATORS = Path(__file__).parent / "evaluators_of_tests.py"
HIDDEN = [1.4, 0.3, 0.8]
CURVED = EXAMPLE.read_text().replace("* weight", "* weight ** 2")


def on_ray(test: Test) -> Test:
    """A test that needs Ray, which closes its own sockets and log files late."""
    marks = (
        pytest.mark.ray,
        pytest.mark.usefixtures("shared_ray"),
        pytest.mark.filterwarnings("ignore::ResourceWarning"),
        pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    )
    for mark in marks:
        test = mark(test)
    return test


@pytest.fixture(scope="module")
def shared_ray() -> str:
    """Ray is running in this process: `search` and `sweep` use it."""
    return ray_address()


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Family:
    """5.7 M elements in 87 chunks: a sweep lasts long enough to be killed in it."""
    return Family(tmp_path_factory.mktemp("large") / "family", *families.fine_tuned(3, scale=280))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Family:
    """A family with its merge by the example, with coefficients that a search is to find."""
    made = Family(tmp_path_factory.mktemp("small") / "family", *families.fine_tuned(3, scale=4))
    hidden = package.merge_state_dicts(made.base, made.models, method=f"{EXAMPLE}:trimmed_mean", weights=HIDDEN)
    families.write(made.folder / "hidden", hidden)
    return made


def with_example(family: Family, folder: Path, text: str = EXAMPLE.read_text(), **sections: Any) -> Path:
    """A recipe of the example, which lies beside it."""
    folder.mkdir(exist_ok=True)
    (folder / EXAMPLE.name).write_text(text)
    recipe = folder / "recipe.yaml"
    recipe.write_text(json.dumps(family.recipe(merge_method="trimmed_mean.py:trimmed_mean", **sections)))
    return recipe


def search_of(family: Family) -> dict[str, Any]:
    options = {"target": str(family.folder / "hidden" / "model.safetensors")}
    return {"evaluator": {f"{EVALUATORS}:Near": options}, "metric": "near", "budget": 16, "population": 8, "concurrency": 1}


def near_of(merged: families.StateDict, family: Family) -> float:
    """What the evaluator says of a merge."""
    hidden = families.load(family.folder / "hidden")
    return -sum(float(((t.float() - hidden[name].float()) ** 2).sum()) for name, t in merged.items())


@pytest.mark.very_slow
@on_ray
def test_the_example_gives_the_same_bytes_on_any_number_of_workers_and_is_verified(large: Family, tmp_path: Path) -> None:
    recipe = with_example(large, tmp_path / "recipes", parameters={"keep": 0.9})
    local = merge_locally(plan(recipe), tmp_path / "local")
    for workers in (1, 3):
        out = tmp_path / f"out{workers}"
        run = pcb_ray("merge", recipe, out, "--workers", workers, "--address", ray_address())
        assert run.process.returncode == 0, run.text
        assert "merge_method runs code of" in run.text
        assert (out / "model.safetensors").read_bytes() == local.files["model.safetensors"]
        receipt = receipt_of(out)
        assert receipt["thresholds"] == {"limit": list(local.known["limit"])}
        assert receipt["code_sha256"] == hashlib.sha256(EXAMPLE.read_bytes()).hexdigest()
    assert digests(tmp_path / "out1") == digests(tmp_path / "out3")

    code = tmp_path / "recipes" / EXAMPLE.name
    assert pcb_ray("verify", out, "--method", code).process.returncode == 0
    for text in (EXAMPLE.read_text() + "\n# changed\n", "trimmed_mean = 3\n"):
        code.write_text(text)
        run = pcb_ray("verify", out, "--method", code)
        assert run.process.returncode == 2, run.text
        assert re.search(r"trimmed_mean.py: wanted the code that merged .*, with sha256 \w{64}, found \w{64}", run.text)
    code.unlink()
    run = pcb_ray("verify", out, "--method", code)
    assert run.process.returncode == 2
    assert re.search(r"--method: wanted code that can be read, found .*trimmed_mean.py.*No such file.*Fix: ", run.text)


@pytest.mark.very_slow
@on_ray
def test_a_killed_merge_by_the_example_goes_on_with_the_same_code_alone(large: Family, tmp_path: Path) -> None:
    recipe, out = with_example(large, tmp_path / "recipes"), tmp_path / "out"
    expected = merge_locally(plan(recipe), tmp_path / "local").files["model.safetensors"]
    journal = state_of(out) / "journal.jsonl"
    with running("merge", recipe, out, "--workers", 1, "--address", ray_address()) as run:
        run.wait_for("write: ")
        await_that("some parts are written", lambda: journal.exists() and journal.stat().st_size)
        run.send(signal.SIGKILL)
        assert run.finish() == -signal.SIGKILL
    assert not out.exists()
    resume = ("merge", recipe, out, "--workers", 2, "--address", ray_address(), "--resume")

    with_example(large, tmp_path / "recipes", CURVED)
    run = pcb_ray(*resume)
    assert run.process.returncode == 2, run.text
    assert re.search(r"--resume: this is not the merge that was begun: code_sha256 was '\w{64}', now '\w{64}'", run.text)

    with_example(large, tmp_path / "recipes")
    run = pcb_ray(*resume)
    assert run.process.returncode == 0, run.text
    assert "ranks of" not in run.text, "what was found is not looked for again"
    assert (out / "model.safetensors").read_bytes() == expected
    assert package.verify(out, method=EXAMPLE, quiet=True).ok


@on_ray
def test_what_the_code_raises_on_a_worker_is_told_with_its_line(small: Family, tmp_path: Path) -> None:
    text = EXAMPLE.read_text().replace('known["limit"]', 'known["lost"]')
    line = next(number for number, one in enumerate(text.splitlines(), 1) if "lost" in one)
    run = pcb_ray("merge", with_example(small, tmp_path / "recipes", text), tmp_path / "out", "--address", ray_address())
    assert run.process.returncode == 2, run.text
    assert f"merge_method: merge of trimmed_mean raised KeyError: 'lost' (trimmed_mean.py:{line}). Fix: mend it." in run.text
    assert "Traceback" not in run.text
    assert not state_of(tmp_path / "out").exists()


@pytest.mark.very_slow
@on_ray
def test_a_search_by_the_example_scores_what_it_merges(small: Family, tmp_path: Path) -> None:
    space = {"lambda": {"lower": 0.5, "upper": 1.5}}
    recipe = with_example(small, tmp_path / "recipes", search=search_of(small) | {"space": space})
    found = package.search(recipe, tmp_path / "out", allow_code=True, workers=1, quiet=True)
    merged = families.load(tmp_path / "out")
    assert near_of(merged, small) == pytest.approx(found.scores["winner"]["val"]["near"], abs=2e-6)
    assert found.scores["winner"]["val"]["near"] > found.scores["start"]["val"]["near"]
    package.merge(tmp_path / "out" / "best_recipe.yaml", tmp_path / "again", allow_code=True, workers=1, quiet=True)
    again = (tmp_path / "again" / "model.safetensors").read_bytes()
    assert again == (tmp_path / "out" / "model.safetensors").read_bytes()
    assert package.verify(tmp_path / "out", method=EXAMPLE, quiet=True).ok


@pytest.mark.very_slow
@on_ray
def test_a_sweep_by_the_example_scores_the_merges_of_its_grid(small: Family, tmp_path: Path) -> None:
    recipe = with_example(small, tmp_path / "recipes", search=search_of(small), sweep={"lambda": [0.7, 1.0, 1.3]})
    found = package.sweep(recipe, tmp_path / "out", allow_code=True, workers=1, quiet=True)
    assert len(found.records) == 3
    for row in found.records:
        lambda_ = row["config"]["lambda"]
        merged = package.merge_state_dicts(small.base, small.models, method=f"{EXAMPLE}:trimmed_mean", lambda_=lambda_)
        assert row["objective"] == pytest.approx(near_of(merged, small), abs=2e-6)


@pytest.mark.very_slow
@on_ray
@pytest.mark.parametrize("what", [package.search, package.sweep])
def test_a_method_that_is_not_linear_as_it_says_is_not_searched(what: Any, small: Family, tmp_path: Path) -> None:
    recipe = with_example(small, tmp_path / "recipes", CURVED, search=search_of(small), sweep={"lambda": [0.7, 1.0]})
    with pytest.raises(
        RequestError,
        match=r"merge_method: wanted trimmed_mean.py:trimmed_mean linear in the weights, as "
        r"its record says, found .*Fix: set `linear=False`",
    ):
        what(recipe, tmp_path / "out", allow_code=True, workers=1, quiet=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["plan", "search", "sweep"])
def test_a_method_that_does_not_say_that_it_is_linear_is_not_searched(command: str, grid: Family, tmp_path: Path) -> None:
    """... which is told from the recipe alone, without Ray."""
    text = EXAMPLE.read_text().replace("linear=True", "linear=False")
    sections = {"search": search_of(grid)} | ({"sweep": {"lambda": [0.7, 1.0]}} if command == "sweep" else {})
    recipe = with_example(grid, tmp_path / "recipes", text, **sections)
    run = pcb_ray(command, recipe, *([] if command == "plan" else [tmp_path / "out"]))
    assert run.process.returncode == 2, run.text
    assert "wanted a method with a base that says it is linear in the weights, found trimmed_mean.py:trimmed_mean" in run.text
    assert "set `linear=True` in its record" in run.text
