"""The best bias: stationary, where SciPy finds it, and the exact one at zero logits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from scipy.special import logsumexp

from ufm.model.problem import class_mean_problem, imbalanced
from ufm.theory.bias import optimal_bias

EPS = np.finfo(float).eps


def value(problem, Z, lam_b, b):
    Z = Z + b[:, None]
    return np.mean(logsumexp(Z, axis=0) - np.sum(problem.Y * Z, axis=0)) + lam_b / 2 * b @ b


def slope(problem, Z, b):
    R = problem.loss.residual(Z + b[:, None], problem.Y)
    return R @ problem.multiplicity / problem.total + problem.lam_b * b


@pytest.mark.parametrize("lam_b", [0.0, 1e-6, 1e-2, 10.0])
def test_slope_vanishes_and_scipy_agrees(lam_b):
    problem = imbalanced([5, 2, 1], 3, lam_W=0.1, lam_H=0.1, lam_b=lam_b)
    solve = jax.jit(optimal_bias)
    for scale in (0.0, 0.3, 3.0, 10.0):
        Z = scale * jax.random.normal(jax.random.key(7), (3, 8))
        b = solve(problem, Z, jnp.zeros(3))
        assert float(jnp.linalg.norm(slope(problem, Z, b))) < 32 * EPS * (1 + lam_b * float(jnp.linalg.norm(b)))
        f = functools.partial(value, problem, np.asarray(Z), lam_b)
        other = scipy.optimize.minimize(f, np.zeros(3), method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-14})
        b = np.asarray(b)
        assert f(b) <= other.fun + 4 * EPS * (1 + other.fun)
        assert f(b) == pytest.approx(other.fun, rel=1e-9)


@pytest.mark.parametrize("counts", [(1, 1), (5, 2, 1), (1, 10**6)])
def test_free_bias_at_zero_logits_is_the_log_frequency(counts):
    K = len(counts)
    problem = class_mean_problem(counts, K, lam_W=0.1, lam_H=0.1)
    b = optimal_bias(problem, jnp.zeros((K, K)), jnp.zeros(K))
    expected = np.log(counts) - np.mean(np.log(counts))
    np.testing.assert_allclose(b, expected, atol=64 * EPS * (1 + np.abs(expected).max()) * max(counts) ** 0.5)


def test_the_common_shift_of_a_free_bias_stays():
    problem = class_mean_problem([5, 2, 1], 3, lam_W=0.1, lam_H=0.1)
    Z = jax.random.normal(jax.random.key(0), (3, 3))
    for shift in (0.0, 2.0, -50.0):
        b = optimal_bias(problem, Z, jnp.full(3, shift))
        assert float(jnp.mean(b)) == pytest.approx(shift, abs=1e-13 * (1 + abs(shift)))


def test_hopeless_logits_end_without_nan():
    problem = class_mean_problem([5, 2, 1], 3, lam_W=0.1, lam_H=0.1)
    for scale in (1e3, 1e8, 1e300):
        Z = scale * jax.random.normal(jax.random.key(1), (3, 3))
        assert np.isfinite(optimal_bias(problem, Z, jnp.zeros(3))).all()
