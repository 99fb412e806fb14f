"""Closed-form Hessian spectra against dense eigenvalues, identities and the worked example."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq

from ufm.lab.dense import dense_eigenvalues
from ufm.model.problem import Params, balanced, class_mean_problem, imbalanced
from ufm.theory.atlas import coarse_etf, successive_groups
from ufm.theory.bias import optimal_bias
from ufm.theory.elimination import inertia
from ufm.theory.optimum import balanced_minimiser
from ufm.theory.spectrum import hessian_spectrum

pytestmark = pytest.mark.usefixtures("hastily")

CLOSE = 1e-12  # of the largest eigenvalue, asked for by the statement; the dense solver's error is about 1e-15
BIAS = ({"use_bias": False}, {"lam_b": 0.0}, {"lam_b": 1e-3}, {"lam_b": 10.0})


def difference(problem, spectrum, x):
    """The largest distance between the sorted spectra, relative to the largest eigenvalue."""
    dense = dense_eigenvalues(problem, x)
    stated = np.sort(np.repeat(np.asarray(spectrum.eigenvalues), spectrum.multiplicities))
    assert stated.shape == dense.shape
    return np.abs(stated - dense).max() / np.abs(dense).max()


def problem_of(K, n, d, load, ratio, kind):
    s = load / (K * np.sqrt(n))
    return balanced(K, n, d, lam_W=s * ratio, lam_H=s / ratio, **kind)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    st.sampled_from([(2, 1, 1), (2, 2, 3), (3, 1, 2), (4, 2, 3), (4, 2, 5), (6, 1, 5), (6, 2, 6)]),
    st.floats(-4, 0.3), st.floats(-1.5, 1.5), st.sampled_from(BIAS), st.randoms(use_true_random=False),
)  # fmt: skip
def test_every_equal_group_saddle_has_the_dense_spectrum(shape, load, ratio, kind, random):
    K, n, d = shape
    problem = problem_of(K, n, d, 10**load, 10**ratio, kind)
    m = random.choice([m for m in range(1, K + 1) if K % m == 0])
    classes = random.sample(range(K), K)
    partition = [classes[i : i + K // m] for i in range(0, K, K // m)]
    spectrum = hessian_spectrum(problem, partition)
    assert difference(problem, spectrum, coarse_etf(problem, partition)) <= CLOSE
    assert hessian_spectrum(problem, successive_groups(K, m)).levels() == spectrum.levels()


@pytest.mark.parametrize("kind", BIAS)
def test_optimum_and_origin_are_the_finest_and_the_coarsest_partition(kind):
    problem = problem_of(5, 2, 6, 0.2, 1.3, kind)
    x = balanced_minimiser(problem)
    assert difference(problem, hessian_spectrum(problem), x) <= CLOSE
    origin = jax.tree.map(jnp.zeros_like, x)
    assert difference(problem, hessian_spectrum(problem, "origin"), origin) <= CLOSE


@pytest.mark.parametrize("kind", BIAS)
@pytest.mark.parametrize("counts", [(5, 3, 2, 2), (1, 4)])
def test_origin_of_unequal_classes_has_the_dense_spectrum(counts, kind):
    K, d = len(counts), 3
    problem = imbalanced(counts, d, lam_W=1e-2, lam_H=3e-3, **kind)
    zero = jnp.zeros((K, sum(counts)))
    b = optimal_bias(problem, zero, zero[:, 0]) if problem.use_bias else zero[:, 0]
    x = Params(jnp.zeros((K, d)), jnp.zeros((d, sum(counts))), b)
    assert difference(problem, hessian_spectrum(problem, "origin"), x) <= CLOSE


def test_worked_spectrum():
    """The sixteen values of THEORY 1.3 with their multiplicities, found there by brute force."""
    stated = """0×12, .002×27, .0035206×3, .0044691×2, .0045953×16, .005×6, .0053271×3, .0054814×1, .007×9, .01×1,
                .0116145×2, .0122106×8, .0148231×3, .0160835×3, .0372557×1, .0381499×3"""
    found = {}
    for value, multiplicity, _ in hessian_spectrum(balanced(4, 3, 6, lam_W=5e-3, lam_H=2e-3, lam_b=1e-2)).levels():
        found[round(value, 7)] = found.get(round(value, 7), 0) + multiplicity
    pairs = (term.strip().split("×") for term in stated.split(","))
    assert found == {float(value): int(multiplicity) for value, multiplicity in pairs}


@pytest.mark.parametrize("m", [1, 2, 4, 8])
@pytest.mark.parametrize("kind", BIAS)
def test_trace_is_the_sum_of_the_diagonal(m, kind):
    """Σ mult·λ = tr ∇²f = λ's + (1/N) Σ_i tr(C_i)(‖h_i‖² + 1) + (1/N) Σ_i tr(WᵀC_iW), from the softmax alone."""
    problem = problem_of(8, 3, 9, 0.05, 0.4, kind)
    K, N, d = 8, 24, 9
    x = coarse_etf(problem, m)
    p = np.asarray(jax.nn.softmax(x.W @ x.H, axis=0))
    C = [np.diag(column) - np.outer(column, column) for column in p.T]
    W, H = np.asarray(x.W), np.asarray(x.H)
    trace = K * d * problem.lam_W + N * d * problem.lam_H + K * problem.lam_b * problem.use_bias
    for c, h in zip(C, H.T, strict=True):
        trace += (np.trace(c) * (h @ h + problem.use_bias) + np.trace(W.T @ c @ W)) / N
    spectrum = hessian_spectrum(problem, successive_groups(8, m))
    assert np.dot(spectrum.multiplicities, spectrum.eigenvalues) == pytest.approx(float(trace), rel=1e-13)
    assert sum(spectrum.multiplicities) == K * d + N * d + K * problem.use_bias


@pytest.mark.parametrize("load", [1e-8, 1e-4, 0.3, 0.999])
def test_144_down_at_the_origin_and_99_flat_at_the_optimum(load):
    """K=10, d=16, n=50, below the threshold: by theory and by inertia; dense brute force is in the claims' full run."""
    problem = problem_of(10, 50, 16, load, 3.0, {"lam_b": 1e-2})
    optimum = balanced_minimiser(problem)
    origin = jax.tree.map(jnp.zeros_like, optimum)
    down, flat = hessian_spectrum(problem, "origin"), hessian_spectrum(problem)
    assert (down.index, down.nullity, inertia(problem, origin)[:2]) == (144, 0, (144, 0))
    assert (flat.index, flat.nullity, flat.orbit_dimension, inertia(problem, optimum)[:2]) == (0, 99, 99, (0, 99))


@pytest.mark.parametrize("m", [3, 4, 5, 10])
def test_row_space_directions_turn_up_at_the_stated_load(m):
    """Free bias: the index is d(K−m) below κ*(m) and (d−1)(K−m) above, u(m+u) = m(1+u) log(1+u), κ* = m/(m+u)."""
    u = brentq(lambda u: u * (m + u) - m * (1 + u) * np.log1p(u), 1e-3, 1e6)
    K, d = 2 * m, 2 * m + 1
    for factor, index in ((1 - 1e-6, d * (K - m)), (1 + 1e-6, (d - 1) * (K - m))):
        problem = problem_of(K, 2, d, factor * m / (m + u), 1.7, {"lam_b": 0.0})
        assert hessian_spectrum(problem, successive_groups(K, m)).index == index
        assert inertia(problem, coarse_etf(problem, m)).negative == index


def test_two_groups_keep_every_direction_down():
    for load in np.geomspace(1e-6, 0.9999, 25):
        problem = problem_of(4, 3, 5, load, 1.0, {"lam_b": 0.0})
        assert hessian_spectrum(problem, successive_groups(4, 2)).index == 5 * 2


def test_class_means_stand_for_all_samples():
    options = {"lam_W": 5e-3, "lam_H": 2e-3, "lam_b": 1e-2}
    for at in ("optimum", "origin", [[0, 3], [1, 2]]):
        means = hessian_spectrum(class_mean_problem([3] * 4, 6, **options), at)
        assert means.levels() == hessian_spectrum(balanced(4, 3, 6, **options), at).levels()


def test_condition_number_and_rate_under_vmap():
    def of(lam):
        return hessian_spectrum(balanced(4, 3, 6, lam_W=lam, lam_H=2e-3))

    lams = jnp.array([1e-4, 5e-3, 1.0, 100.0])
    numbers = jax.vmap(lambda lam: of(lam).condition_number)(lams)
    for lam, number in zip(lams.tolist(), numbers, strict=True):
        problem = balanced(4, 3, 6, lam_W=lam, lam_H=2e-3)
        dense = dense_eigenvalues(problem, balanced_minimiser(problem))
        across = dense[of(lam).orbit_dimension :]
        assert float(number) == pytest.approx(across[-1] / across[0], rel=1e-9)
        assert float(of(lam).descent_rate) == pytest.approx(1 - across[0] / across[-1], rel=1e-9)


def test_a_saddle_has_no_condition_number():
    assert hessian_spectrum(balanced(4, 3, 6, lam_W=1e-3, lam_H=2e-3), "origin").condition_number == np.inf


@pytest.mark.parametrize(
    ("options", "at", "said"),
    [
        ({}, "top", "at must be"),
        ({}, [[0, 1], [2]], "classes 0, ..., 3 once"),
        ({}, [[0, 1], [2, 3, 3]], "classes 0, ..., 3 once"),
        ({}, [[0], [1, 2, 3]], "equal size"),
        ({}, [0, 1, 2, 3], "sequence of groups"),
        ({}, [[0.5], [1, 2, 3]], "sequence of groups"),
        ({"d": 2}, "optimum", "d must be at least"),
        ({"d": 2}, [[0], [1], [2], [3]], "d must be at least"),
        ({"counts": [1, 2, 2, 2]}, "optimum", "counts must be equal"),
        ({"counts": [1, 2, 2, 2]}, [[0, 1], [2, 3]], "counts must be equal"),
    ],
)
def test_refuses_what_has_no_closed_form(options, at, said, unchecked):
    options = {"counts": [2] * 4, "d": 4} | options
    with pytest.raises(ValueError, match=said):
        hessian_spectrum(imbalanced(**options, lam_W=1e-2, lam_H=1e-2), at)
