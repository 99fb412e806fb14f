"""SELI against the numbers of THEORY 3.2, its margins against the law of THEORY 3.3, and the limit λ → 0 itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ufm.lab.optimum import global_minimiser
from ufm.model.geometry import geometry_distance
from ufm.model.problem import class_mean_problem, logits
from ufm.theory.imbalance import minority_threshold, ridge_margins, seli_grams

# THEORY 3.2, K = 10, half of the classes R times as large: ‖w‖², ‖h‖² (majority, minority), cosines of w and of h
# (within majority, within minority, across), cos(w, h) (majority, minority)
STEP = {
    1: [0.9, 0.9, 0.9, 0.9, *[-0.1111] * 6, 1, 1],
    10: [2.76434, 1.03452, 0.29562, 0.84264, -0.14395, 0.03337, -0.13868, -0.06970, -0.18675, -0.08543,
         0.99558, 0.96394],
    100: [8.71063, 1.51063, 0.09407, 0.81407, -0.14802, 0.33803, -0.19590, -0.06302, -0.22839, -0.05085,
          0.99423, 0.81158],
    1000: [27.53541, 3.03719, 0.02977, 0.80447, -0.14844, 0.67075, -0.24464, -0.06230, -0.24305, -0.02888,
           0.99408, 0.57577],
}  # fmt: skip


@pytest.mark.parametrize("R", STEP)
def test_seli_is_the_worked_table_of_theory_3_2(R):
    W, H = (np.asarray(G) for G in seli_grams(jnp.array([float(R)] * 5 + [1.0] * 5)))
    cos = lambda G: G / np.sqrt(np.outer(np.diag(G), np.diag(G)))  # noqa: E731
    self_dual = (1 - 1 / 10) / np.sqrt(np.diag(W) * np.diag(H))
    got = [W[0, 0], W[9, 9], H[0, 0], H[9, 9]]
    got += [c[i, j] for c in (cos(W), cos(H)) for i, j in ((0, 1), (8, 9), (0, 9))] + [self_dual[0], self_dual[9]]
    np.testing.assert_allclose(got, STEP[R], atol=6e-5 if R == 1 else 6e-6)


@pytest.mark.parametrize("counts", [(3, 3, 3), (100, 10, 1), (7, 1, 3, 1), tuple(range(1, 9))])
def test_seli_interpolates_the_centred_labels_with_the_least_norm(counts):
    n = jnp.asarray(counts, float)
    W, H = (np.asarray(G) for G in seli_grams(n))
    P = np.eye(len(counts)) - 1 / len(counts)
    np.testing.assert_allclose(W @ H, P, atol=1e-12)  # A^{1/2} A^{†/2}
    nuclear = np.linalg.norm(P * np.sqrt(counts), "nuc")
    assert np.trace(W) == pytest.approx(nuclear, rel=1e-13)
    assert np.sum(np.diag(H) * counts) == pytest.approx(nuclear, rel=1e-13)


def test_the_dual_certificate_of_seli_has_the_right_signs_for_any_counts():
    """Off-diagonal entries of A^{†/2} are at most 0: then margins of 1 cannot be had for less (THEORY 3.2)."""
    rng = np.random.default_rng(0)
    counts = np.round(10 ** rng.uniform(0, 4, (1000, 5)))
    G = np.asarray(jax.jit(jax.vmap(lambda n: seli_grams(n)[1]))(counts))
    off = G[:, ~np.eye(5, dtype=bool)]
    assert (off <= 1e-13).all()


def test_margins_follow_the_law_of_theory_3_3():
    counts, total = (10, 10, 1, 1), 22
    s = 1e-9 / total  # sum-CE with λ = 1e-9
    problem = class_mean_problem(counts, 3, lam_W=s, lam_H=s, use_bias=False)
    law = np.asarray(ridge_margins(problem))
    Z = np.asarray(logits(problem, global_minimiser(problem)))
    gaps = np.diag(Z) - Z
    entries = [(1, 0), (2, 0), (0, 2), (3, 2)]  # majority–majority, to a minority, from one, within
    np.testing.assert_allclose([law[e] for e in entries], [23.689, 22.962, 22.962, 21.656], atol=6e-4)
    np.testing.assert_allclose([gaps[e] for e in entries], [23.673, 22.970, 22.890, 21.676], atol=6e-4)


@pytest.mark.parametrize("mode", ["free", "regularised", "absent"])
def test_geometry_approaches_its_limit_logarithmically_and_margins_theirs(mode):
    counts = (100, 10, 1)
    n = jnp.asarray(counts, float)
    lam_b = 1.0 if mode == "regularised" else 0.0
    limit = seli_grams(n, free_bias=mode == "free")
    other = seli_grams(n, free_bias=mode != "free")
    distances, errors = [], []
    exponents = np.array([4, 8, 16])
    for s in 10.0**-exponents:
        problem = class_mean_problem(counts, 2, lam_W=s, lam_H=s, lam_b=lam_b, use_bias=mode != "absent")
        x = global_minimiser(problem)
        distances.append(
            [float(geometry_distance(x.W @ x.W.T, limit[0])), float(geometry_distance(x.H.T @ x.H, limit[1]))]
        )
        Z = np.asarray(logits(problem, x))
        errors.append(np.abs(np.diag(Z) - Z - ridge_margins(problem)).max())
    distances = np.asarray(distances)
    assert (np.diff(distances, axis=0) < 0).all()
    assert (distances[2] < 0.7 * distances[1]).all()  # 1/log: halves when the exponent doubles
    assert errors[2] < errors[1] < errors[0]
    assert float(geometry_distance(x.H.T @ x.H, other[1])) > 3 * distances[2, 1]


def test_equal_counts_have_one_limit_the_simplex():
    for free in (False, True):
        for G in seli_grams(jnp.full(4, 7.0), free_bias=free):
            assert float(geometry_distance(G, np.eye(4) - 1 / 4)) < 1e-14


def test_minority_threshold_is_per_class_and_equals_the_balanced_one():
    problem = class_mean_problem((9, 4, 4, 1), 3, lam_W=0.1, lam_H=0.1)
    np.testing.assert_allclose(minority_threshold(problem), np.array([3, 2, 2, 1]) / 18, rtol=1e-15)
    equal = class_mean_problem((4, 4, 4), 2, lam_W=0.1, lam_H=0.1)
    np.testing.assert_allclose(minority_threshold(equal), 1 / (3 * 2), rtol=1e-15)
