"""Methods on whole matrices against dense oracles by numpy's SVD, and the linear algebra below them against its definitions."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
import spectral_oracle as oracle
from hypothesis import given, settings
from hypothesis import strategies as st

from pcb_ray.methods import dense
from pcb_ray.methods.iso import iso_c, iso_cts
from pcb_ray.methods.spectra import spectrum
from pcb_ray.methods.svc import calibrated
from pcb_ray.methods.tsv_m import tsv_m
from pcb_ray.methods.wudi import wudi

pytestmark = pytest.mark.skipif(importlib.util.find_spec("pcb_ray.methods._dense") is None, reason="installed without a C compiler")

SHAPES = [(1, 1), (1, 7), (7, 1), (12, 12), (40, 9), (9, 40), (130, 70), (70, 131)]


def tasks_of(shape, n=3, seed=0, kind="dense"):
    rng = np.random.default_rng(seed)
    shared = rng.standard_normal(shape)
    found = [(0.01 * (0.5 * shared + rng.standard_normal(shape))).astype(np.float32) for _ in range(n)]
    if kind == "deficient":
        found = [(t[:, :2] @ rng.standard_normal((t[:, :2].shape[1], shape[1]))).astype(np.float32) for t in found]
    elif kind == "one is zero":
        found[0] = np.zeros(shape, dtype=np.float32)
    elif kind == "equal":
        found = [found[0]] * n
    return found


def sum_of(tasks):
    return sum(task.astype(np.float64) for task in tasks).astype(np.float32)


METHODS = {
    "iso_c": (lambda t: iso_c(sum_of(t)), oracle.iso_c),
    "iso_cts": (lambda t: iso_cts(sum_of(t), lambda: t, len(t), 0.8), oracle.iso_cts),
    "tsv_m": (lambda t: tsv_m(t, len(t), t[0].shape), oracle.tsv_m),
    "wudi": (lambda t: wudi(t, t[0].shape, 0.1), oracle.wudi),
    "svc": (lambda t: calibrated(sum_of(t), t), lambda t: oracle.svc(sum_of(t), t)),
}


@pytest.mark.parametrize("kind", ["dense", "one is zero", "equal"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_what_its_formula_says(name, shape, kind):
    ours, theirs = METHODS[name]
    tasks = tasks_of(shape, kind=kind)
    if name == "tsv_m" and min(shape) < len(tasks):
        pytest.skip("such a matrix takes the path of the rest")
    wanted = theirs(tasks)
    np.testing.assert_allclose(ours(tasks), wanted, rtol=0, atol=2e-6 * abs(wanted).max())


@pytest.mark.parametrize("name", METHODS)
def test_one_model_alone_and_many(name):
    ours, theirs = METHODS[name]
    for n in (1, 2, 9):
        tasks = tasks_of((24, 31), n=n, seed=n)
        wanted = theirs(tasks)
        np.testing.assert_allclose(ours(tasks), wanted, rtol=0, atol=2e-6 * abs(wanted).max())


@pytest.mark.parametrize("name", METHODS)
def test_of_nothing_comes_nothing(name):
    assert not METHODS[name][0]([np.zeros((8, 5), dtype=np.float32)] * 2).any()


@pytest.mark.parametrize("name", ["iso_c", "wudi", "tsv_m", "svc"])
def test_of_rank_deficient_tasks_comes_a_number(name):
    """As experts merged from low-rank adapters are."""
    ours, theirs = METHODS[name]
    tasks = tasks_of((60, 41), kind="deficient")
    wanted = theirs(tasks)
    np.testing.assert_allclose(ours(tasks), wanted, rtol=0, atol=1e-4 * abs(wanted).max())


@pytest.mark.parametrize("name", METHODS)
def test_the_order_of_models_does_not_matter_but_for_rounding(name):
    tasks = tasks_of((33, 20), n=4)
    first = METHODS[name][0](tasks)
    np.testing.assert_allclose(METHODS[name][0](tasks[::-1]), first, rtol=0, atol=1e-6 * abs(first).max())


@pytest.mark.parametrize("name", METHODS)
def test_scaling_all_tasks_by_a_power_of_two_scales_the_result_exactly(name):
    tasks = tasks_of((33, 20))
    first, scaled = METHODS[name][0](tasks), METHODS[name][0]([task * np.float32(0.25) for task in tasks])
    assert (scaled == np.float32(0.25) * first).all()


@pytest.mark.parametrize("name", ["iso_c", "tsv_m"])
def test_the_other_way_round_these_give_the_same(name):
    tasks = tasks_of((33, 20))
    first = METHODS[name][0](tasks)
    turned = METHODS[name][0]([np.ascontiguousarray(task.T) for task in tasks])
    np.testing.assert_allclose(turned.T, first, rtol=0, atol=2e-6 * abs(first).max())


def test_svc_of_equal_models_gives_one_of_them():
    """The sum counts each direction N times: s_ki = N, and sigma is divided by it."""
    (task, *_) = tasks = tasks_of((30, 22), n=4, kind="equal")
    np.testing.assert_allclose(calibrated(sum_of(tasks), tasks), task, rtol=0, atol=1e-6 * abs(task).max())


def test_svc_treats_equal_singular_values_as_one_space():
    """The projector on it is known, the vectors in it are not: two tasks that turn it about give the same scale to all of it."""
    q = np.linalg.qr(np.random.default_rng(0).standard_normal((16, 16)))[0].astype(np.float32)
    tasks = [q, -0.5 * q]
    found = calibrated((q - 0.5 * q).astype(np.float32), tasks)
    share = (0.5 * 16) / 16, (-0.25 * 16) / (0.25 * 16)
    gamma = 2 / sum(max(0.5, s) for s in share)
    np.testing.assert_allclose(found, gamma * 0.5 * q, rtol=0, atol=1e-6)


# --- linear algebra ---------------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(m=st.integers(1, 40), n=st.integers(1, 40), k=st.integers(0, 600), seed=st.integers(0, 9), doubles=st.booleans())
def test_a_product_adds_one_term_after_another(m, n, k, seed, doubles):
    rng = np.random.default_rng(seed)
    dtype = np.float64 if doubles else np.float32
    a, b = rng.standard_normal((m, k)).astype(dtype), rng.standard_normal((k, n)).astype(dtype)
    wanted = np.zeros((m, n))
    for t in range(k):
        wanted += a[:, t : t + 1].astype(np.float64) * b[t].astype(np.float64)
    assert (dense.product(a, b) == wanted).all()
    assert (dense.product(np.asfortranarray(a), np.asfortranarray(b)) == wanted).all()


@pytest.mark.parametrize("n", [1, 2, 5, 95, 97, 200])
def test_a_gram_matrix_is_a_product_and_symmetric(n):
    x = np.random.default_rng(n).standard_normal((300, n)).astype(np.float32)
    assert (dense.gram(x) == dense.product(x.T, x)).all()


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 80), rank=st.integers(0, 80), seed=st.integers(0, 99), exponent=st.sampled_from([-900, -30, 0, 30, 900]))
def test_eigenvalues_and_vectors(n, rank, seed, exponent):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, rank))
    a = np.ldexp(x @ x.T if rank else np.zeros((n, n)), exponent)
    a = (a + a.T) / 2
    values, vectors = dense.eigen(a)
    norm = np.linalg.norm(np.ldexp(a, -exponent), 2)
    assert (np.diff(values) <= 0).all()
    np.testing.assert_allclose(
        np.ldexp(values, -exponent), np.linalg.eigvalsh(np.ldexp(a, -exponent))[::-1], rtol=0, atol=1e-13 * norm * n + 1e-300
    )
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(n), rtol=0, atol=1e-13 * n)
    made = (vectors * np.ldexp(values, -exponent)) @ vectors.T
    np.testing.assert_allclose(made, np.ldexp(a, -exponent), rtol=0, atol=1e-13 * norm * n + 1e-300)
    assert (dense.eigenvalues(a) == values).all()


@pytest.mark.parametrize(
    "a",
    [np.eye(50), np.diag(np.arange(40.0)), np.ones((33, 33)), np.diag([1.0] * 20 + [0.0] * 20), np.full((1, 1), -3.0)],
    ids=["unit", "diagonal", "rank one", "two values", "one by one"],
)
def test_eigenvalues_of_special_matrices(a):
    values, vectors = dense.eigen(a)
    np.testing.assert_allclose((vectors * values) @ vectors.T, a, rtol=0, atol=1e-12)
    np.testing.assert_allclose(values, np.linalg.eigvalsh(a)[::-1], rtol=0, atol=1e-12)


@pytest.mark.parametrize(("n", "m"), [(1, 1), (63, 5), (64, 64), (130, 200)])
def test_a_positive_definite_system_is_solved(n, m):
    rng = np.random.default_rng(n)
    x, b = rng.standard_normal((n, n + 10)), rng.standard_normal((n, m))
    a = x @ x.T
    np.testing.assert_allclose(a @ dense.solve(a, b), b, rtol=0, atol=1e-9)


def test_spectra_of_wide_and_tall_matrices_are_present_directions_only():
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((50, 4)) @ rng.standard_normal((4, 80))).astype(np.float32)
    for one in (x, x.T):
        u, sigma, v = spectrum(one)
        assert len(sigma) == 4
        np.testing.assert_allclose((u * sigma) @ v.T, one, rtol=0, atol=1e-5)
        np.testing.assert_allclose(sigma, np.linalg.svd(one.astype(float), compute_uv=False)[:4], rtol=1e-9)
