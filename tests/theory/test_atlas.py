"""Coarse ETFs: critical everywhere, and the known points at both ends."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ufm.model.problem import balanced, imbalanced, logits, objective
from ufm.theory.atlas import coarse_etf
from ufm.theory.optimum import balanced_minimiser


@pytest.mark.parametrize("m", [1, 2, 3, 6])
@pytest.mark.parametrize("use_bias", [True, False])
def test_gradient_vanishes_and_successive_classes_are_merged(m, use_bias):
    problem = balanced(6, 2, 5, lam_W=5e-3, lam_H=2e-3, lam_b=1e-2, use_bias=use_bias)
    x = coarse_etf(problem, m)
    grad = jax.grad(functools.partial(objective, problem))(x)
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(grad)) < 1e-15
    g = 6 // m
    t = np.log(1 / (g * np.sqrt(2) * np.sqrt(5e-3 * 2e-3)) - m + 1)
    expected = t * np.kron(np.eye(m) - 1 / m, np.ones((g, g))) @ problem.Y
    np.testing.assert_allclose(logits(problem, x), expected, atol=1e-13)


def test_the_finest_partition_is_the_optimum_and_the_coarsest_the_origin():
    problem = balanced(6, 2, 5, lam_W=5e-3, lam_H=2e-3)
    finest, optimum = coarse_etf(problem, 6), balanced_minimiser(problem)
    for left, right in zip(jax.tree.leaves(finest), jax.tree.leaves(optimum), strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-14)
    assert not np.any(coarse_etf(problem, 1).W)


@pytest.mark.parametrize(("m", "match"), [(4, "^m must divide the K = 6 classes"), (0, "^m must"), (7, "^m must")])
def test_partitions_into_unequal_groups_are_refused(m, match):
    with pytest.raises(ValueError, match=match):
        coarse_etf(balanced(6, 2, 5, lam_W=5e-3, lam_H=2e-3), m)


def test_unequal_counts_are_refused():
    with pytest.raises(ValueError, match=r"^counts must be equal"):
        coarse_etf(imbalanced([2, 1], 2, lam_W=5e-3, lam_H=2e-3), 2)
