"""Signs of the Hessian's eigenvalues by elimination, against dense eigenvalues and closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ufm.lab.dense import dense_eigenvalues
from ufm.model.problem import Params, balanced, class_mean_problem, imbalanced, init, tie_features
from ufm.theory import elimination as module
from ufm.theory.atlas import coarse_etf, successive_groups
from ufm.theory.elimination import inertia
from ufm.theory.spectrum import hessian_spectrum

BIAS = ({"use_bias": False}, {"lam_b": 0.0}, {"lam_b": 1e-2})


def dense_signs(problem, x):
    values = dense_eigenvalues(problem, x)
    zero = 1e-13 * np.abs(values).max()
    return (values < -zero).sum(), (np.abs(values) <= zero).sum(), (values > zero).sum()


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    st.sampled_from([([2, 1, 3], 2), ([1, 1], 1), ([2, 2, 2, 2], 5)]),
    st.floats(-1.5, 0.7), st.floats(-4, 0), st.sampled_from(BIAS), st.integers(0, 99),
)  # fmt: skip
def test_any_point_has_the_dense_signs(shape, scale, lam, kind, seed):
    problem = imbalanced(*shape, lam_W=10**lam, lam_H=10 ** (lam / 2), **kind)
    x = init(problem, jax.random.key(seed), scale=10**scale)
    assert inertia(problem, x)[:3] == dense_signs(problem, x)


@pytest.mark.parametrize("m", [1, 2, 3, 6])
@pytest.mark.parametrize("load", [1e-9, 1e-5, 1e-2, 0.5, 0.99, 1.2])
@pytest.mark.parametrize("kind", BIAS)
def test_saddles_have_the_signs_of_their_closed_form(m, load, kind):
    """Also where dense eigenvalues could not tell: the spectrum spans 1/load² there."""
    s = load / (6 * np.sqrt(2))
    problem = balanced(6, 2, 7, lam_W=4 * s, lam_H=s / 4, **kind)
    stated = hessian_spectrum(problem, successive_groups(6, m))
    found = inertia(problem, coarse_etf(problem, m))
    assert (found.negative, found.zero) == (stated.index, stated.nullity)
    assert sum(found[:3]) == sum(stated.multiplicities)
    assert found.margin > 10


def test_columns_that_agree_count_once_and_class_means_count_all_samples():
    options = {"lam_W": 5e-3, "lam_H": 2e-3, "lam_b": 1e-2}
    means, full = (f([3, 5], 4, **options) for f in (class_mean_problem, imbalanced))
    x = init(means, jax.random.key(1), scale=0.5)
    y = Params(x.W, x.H @ full.Y, x.b)
    assert inertia(means, x)[:3] == inertia(full, y)[:3] == dense_signs(full, y)


def test_batches_add_up(monkeypatch):
    problem = balanced(3, 40, 4, lam_W=5e-3, lam_H=2e-3)
    x = init(problem, jax.random.key(0))
    whole = inertia(problem, x)
    monkeypatch.setattr(module, "BATCH_BYTES", 1 << 13)
    parts = inertia(problem, x)
    assert parts[:3] == whole[:3]
    assert whole.margin / 10 < parts.margin <= whole.margin  # the bound on rounding adds up batch by batch


def test_tied_classes_split_the_schur_complement(monkeypatch):
    """Signs are the same without the reduction; the margin is not."""
    problem = balanced(6, 2, 7, lam_W=5e-4, lam_H=2e-4, lam_b=1e-2)
    x = coarse_etf(problem, 2)
    split = inertia(problem, x)
    monkeypatch.setattr(module, "_tied_classes", lambda problem, params, columns: np.arange(6))
    assert inertia(problem, x)[:3] == split[:3]


def test_a_perturbed_optimum_keeps_its_zeros_at_the_gradient_it_has():
    """Rotations' zeros move with ∇f; the counts at a nearly critical point do not."""
    problem = balanced(4, 2, 6, lam_W=5e-3, lam_H=2e-3)
    x = coarse_etf(problem, 4)
    for size in (1e-14, 1e-11, 1e-9):
        noise = init(tie_features(problem), jax.random.key(3), scale=size)
        moved = Params(x.W + noise.W, x.H + noise.H @ problem.Y, x.b + noise.b)
        found = inertia(problem, moved)
        assert (found.negative, found.zero) == (0, 13)
        assert found.relative_gradient < 1e-6


def test_says_that_a_point_is_not_critical():
    problem = balanced(4, 2, 6, lam_W=5e-3, lam_H=2e-3)
    assert inertia(problem, init(problem, jax.random.key(0))).relative_gradient > 0.1


def test_refuses_what_it_cannot_count(unchecked):
    problem = balanced(3, 2, 4, lam_W=5e-3, lam_H=2e-3)
    x = init(problem, jax.random.key(0))
    with pytest.raises(ValueError, match="W must be finite"):
        inertia(problem, Params(x.W * jnp.nan, x.H, x.b))
    with pytest.raises(ValueError, match="H must have shape"):
        inertia(problem, Params(x.W, x.H[:, 1:], x.b))
    with pytest.raises(ValueError, match="not traced"):
        jax.vmap(lambda W: inertia(problem, Params(W, x.H, x.b)))(x.W[None])
