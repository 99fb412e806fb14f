"""The reduction by symmetry: exact on symmetric points, and the four-scalar function of THEORY 3.5 for two groups."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

from ufm.lab.optimum import optimal_value
from ufm.model.problem import class_mean_problem, imbalanced, logits, objective, tie_features
from ufm.theory.orbits import (
    Orbit,
    balanced_factors,
    class_logits,
    initial_orbit,
    orbit_objective,
    point_of_logits,
    tie_classes,
)

EPS = np.finfo(float).eps
COUNTS = (3, 5, 3, 1, 5, 3)  # three sizes, shuffled


def random_orbit(seed, m):
    keys = jax.random.split(jax.random.key(seed), 4)
    u, b = jax.random.normal(keys[0], (m,)), jax.random.normal(keys[1], (m,))
    return Orbit(u, jax.random.normal(keys[2], (m, m)), jax.random.normal(keys[3], (m, m)), b)


def test_groups_are_the_distinct_sizes():
    tied = tie_classes(imbalanced(COUNTS, 5, lam_W=0.1, lam_H=0.1))
    np.testing.assert_array_equal(tied.counts, [1, 3, 5])
    np.testing.assert_array_equal(tied.sizes, [1, 3, 2])
    np.testing.assert_array_equal(tied.counts[tied.kind], COUNTS)
    assert tied.representatives.Y.shape == (6, 3)
    assert float(tied.representatives.total) == sum(COUNTS)


def test_class_logits_are_invariant_under_swapping_classes_of_equal_size():
    tied = tie_classes(imbalanced(COUNTS, 5, lam_W=1e-2, lam_H=2e-2))
    Z = np.asarray(class_logits(tied, random_orbit(0, 3)))
    for i, j in ((0, 2), (0, 5), (1, 4)):
        swap = np.eye(6)[[{i: j, j: i}.get(k, k) for k in range(6)]]
        np.testing.assert_allclose(swap @ Z @ swap.T, Z, atol=64 * EPS * np.abs(Z).max())


def test_nuclear_norm_splits_over_the_groups():
    tied = tie_classes(imbalanced(COUNTS, 5, lam_W=1e-2, lam_H=2e-2))
    p = tied.representatives
    for seed in range(5):
        orbit = random_orbit(seed, 3)
        Z = np.asarray(class_logits(tied, orbit)) * np.sqrt(COUNTS)
        within = np.sum((tied.sizes - 1) * np.asarray(orbit.u) ** 2) / float(p.s)
        between = np.linalg.norm(np.asarray(orbit.W @ orbit.H), "nuc") / float(p.s)
        assert np.linalg.norm(Z, "nuc") == pytest.approx(within + between, rel=1e-13)


@pytest.mark.parametrize("use_bias", [True, False])
def test_orbit_objective_is_the_objective_of_the_balanced_factors(use_bias):
    """Where WH is already balanced and 1ᵀZ = 0, both are f at the same point."""
    problem = imbalanced(COUNTS, 5, lam_W=1e-2, lam_H=2e-2, lam_b=3e-2, use_bias=use_bias)
    tied, means = tie_classes(problem), tie_features(problem)
    k = np.sqrt(tied.sizes)
    for seed in range(3):
        orbit = random_orbit(seed, 3)
        W = orbit.W - jnp.outer(k, k @ orbit.W) / problem.K  # 1ᵀZ = 0
        orbit = Orbit(orbit.u, *balanced_factors(W @ orbit.H), orbit.b)
        x = point_of_logits(means, class_logits(tied, orbit), orbit.b[tied.kind])
        np.testing.assert_allclose(x.W @ x.H, class_logits(tied, orbit), atol=1e-12 / float(problem.s))
        assert float(objective(means, x)) == pytest.approx(float(orbit_objective(tied, orbit)), rel=1e-12)


def test_initial_orbit_is_the_simplex_at_its_balanced_margin():
    problem = imbalanced(COUNTS, 5, lam_W=1e-2, lam_H=2e-3)
    tied = tie_classes(problem)
    q = np.sqrt(5 * 1e-2 * 2e-3)
    expected = np.log(1 / q - 5) * (np.eye(6) - 1 / 6)
    np.testing.assert_allclose(class_logits(tied, initial_orbit(tied)), expected, atol=1e-12)


@pytest.mark.parametrize("shape", [(3, 5), (5, 3), (4, 4)])
def test_balanced_factors_have_the_least_norm_of_their_product(shape):
    C = np.random.default_rng(0).normal(size=shape)
    W, H = balanced_factors(jnp.asarray(C))
    np.testing.assert_allclose(W @ H, C, atol=1e-14)
    np.testing.assert_allclose(W.T @ W, H @ H.T, atol=1e-14)
    assert float(jnp.sum(W**2) + jnp.sum(H**2)) / 2 == pytest.approx(np.linalg.norm(C, "nuc"), rel=1e-14)


def test_point_of_logits_fits_in_k_minus_1_dimensions():
    problem = class_mean_problem([5, 2, 1], 2, lam_W=1e-2, lam_H=3e-4)
    Z = np.random.default_rng(0).normal(size=(3, 3))
    Z = jnp.asarray(Z - Z.mean(0))
    x = point_of_logits(problem, Z, jnp.arange(3.0))
    np.testing.assert_allclose(logits(problem, x) - x.b[:, None], Z, atol=1e-14)
    penalty = problem.lam_W * jnp.sum(x.W**2) / 2 + problem.lam_H * jnp.sum(problem.counts * x.H**2) / 2
    nuclear = np.linalg.norm(Z * np.sqrt([5, 2, 1]), "nuc")
    assert float(penalty) == pytest.approx(float(problem.s) * nuclear, rel=1e-13)


# Two groups: THEORY 3.5


def four_scalars(k, n, use_bias, x, s, lam_b):
    """f of (a_A, a_B, δ_A, δ_B, β) as THEORY 3.5 writes it."""
    a_A, a_B, d_A, d_B, beta = x
    beta = beta if use_bias else 0.0
    (k_A, k_B), (n_A, n_B), K, N = k, n, sum(k), k[0] * n[0] + k[1] * n[1]
    b_BA, b_AB = -(a_A + k_A * d_A) / K, -(a_B + k_B * d_B) / K
    loss_A = jnp.log1p((k_A - 1) * jnp.exp(-a_A) + k_B * jnp.exp(-a_A - d_A - beta))
    loss_B = jnp.log1p((k_B - 1) * jnp.exp(-a_B) + k_A * jnp.exp(-a_B - d_B + beta))
    within = (k_A - 1) * jnp.sqrt(n_A) * a_A + (k_B - 1) * jnp.sqrt(n_B) * a_B
    between = jnp.sqrt(K * (k_B * n_A * b_BA**2 + k_A * n_B * b_AB**2))
    fit = (k_A * n_A * loss_A + k_B * n_B * loss_B) / N
    return fit + s * (within + between) + lam_b / 2 * beta**2 * k_A * k_B / K


@pytest.mark.parametrize("mode", ["free", "regularised", "absent"])
@pytest.mark.parametrize(("k", "n"), [((3, 2), (10, 1)), ((2, 4), (50, 5))])
def test_two_groups_are_the_four_scalars_of_theory_3_5(k, n, mode):
    lam_b, use_bias = (1e-2 if mode == "regularised" else 0.0), mode != "absent"
    N, counts = k[0] * n[0] + k[1] * n[1], [n[0]] * k[0] + [n[1]] * k[1]
    thresholds = np.sqrt(n[1]) / N  # of minority collapse
    f = jax.jit(jax.value_and_grad(functools.partial(four_scalars, k, n, use_bias)))
    for s in (1e-4, 0.5 * thresholds, 0.99 * thresholds, 1.2 * thresholds):
        found = scipy.optimize.minimize(
            f, [4.0, 2.0, 1.0, 1.0, 0.1], args=(s, lam_b), jac=True, method="L-BFGS-B",
            bounds=[(0, None), (0, None), (None, None), (None, None), (None, None)],
            options={"ftol": 0, "gtol": 1e-12, "maxiter": 2000},
        )  # fmt: skip
        problem = class_mean_problem(counts, sum(k), lam_W=2 * s, lam_H=s / 2, lam_b=lam_b, use_bias=use_bias)
        assert float(optimal_value(problem)) == pytest.approx(found.fun, rel=1e-11)
        assert (found.x[1] < 1e-9) == (s > thresholds)
