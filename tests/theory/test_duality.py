"""The dual bound's parts: singular pairs, feasibility, and where squares or exponentials leave the range."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ufm.model.problem import Params, balanced, imbalanced, init
from ufm.theory.certificate import Verdict, certify
from ufm.theory.duality import dual_value, norm_rounding, top_singular_pair
from ufm.theory.optimum import balanced_value

EPS = np.finfo(float).eps
pair = jax.jit(top_singular_pair)


@pytest.mark.parametrize("scale", [1.0, 1e-160, 1e-300, 1e150])
def test_top_singular_pair_is_that_of_the_svd_at_any_scale(scale):
    G = scale * np.random.default_rng(0).normal(size=(4, 9))
    sigma, u, v = (np.asarray(a) for a in pair(jnp.asarray(G)))
    exact = np.linalg.norm(G / scale, 2)
    assert abs(sigma / scale - exact) <= float(norm_rounding(jnp.asarray(G), jnp.asarray(sigma))) * exact
    assert sigma / scale == pytest.approx(exact, rel=32 * EPS)
    np.testing.assert_allclose((G / scale) @ v, exact * u, atol=64 * EPS)
    np.testing.assert_allclose([u @ u, v @ v], 1, rtol=64 * EPS)


@pytest.mark.parametrize("K", [2, 3, 6])
def test_of_equal_singular_values_the_vector_depends_on_the_matrix_alone(K):
    """I − 11ᵀ/K has K − 1 of them; rows of zeros and an isometry of the columns leave u where it was."""
    G = np.eye(K) - 1 / K
    sigma, u, v = pair(jnp.asarray(G))
    assert float(sigma) == pytest.approx(1, rel=16 * EPS)
    np.testing.assert_allclose([u @ u, v @ v, u @ G @ v], 1, rtol=64 * EPS)
    Q = np.linalg.qr(np.random.default_rng(K).normal(size=(9, 9)))[0]
    other = pair(jnp.asarray(np.pad(G, ((0, 7 - K), (0, 9 - K))) @ Q))[1]
    np.testing.assert_allclose(other, np.pad(u, (0, 7 - K)), atol=64 * EPS)


def test_singular_pair_of_zero_is_zero():
    sigma, _, v = pair(jnp.zeros((4, 9)))
    assert float(sigma) == 0
    assert not np.any(v)


@pytest.mark.parametrize("mode", ["free", "regularised", "absent"])
@pytest.mark.parametrize("scale", [1e3, 1e10, 1e18, 1e100])
def test_huge_logits_leave_the_bound_finite_and_sound(mode, scale):
    lam_b = 1e-2 if mode == "regularised" else 0.0
    problem = balanced(3, 2, 4, lam_W=1e-3, lam_H=1e-3, lam_b=lam_b, use_bias=mode != "absent")
    for seed in range(4):
        c = certify(problem, init(problem, jax.random.key(seed), scale=scale))
        assert np.isfinite([float(c.value), float(c.gap), float(c.rounding)]).all()
        assert float(c.gap + c.rounding) >= float(c.value - balanced_value(problem))
        assert float(c.rounding) <= 1e-12 * float(c.value)  # also where a free bias is far from its best
        assert c.verdict == Verdict.NOT_CRITICAL


def test_weights_too_small_to_square_do_not_hide_an_infeasible_dual_point():
    """K = 2, λ = 1e-24 in float32: ‖∇_Z g‖₂ ≈ 1e-22 exceeds s = 1e-24, though its square is zero there."""
    with jax.enable_x64(False):
        problem = balanced(2, 1, 1, lam_W=1e-24, lam_H=1e-24, use_bias=False)
        W = jnp.array([[5.0], [-5.0]])
        c = certify(problem, Params(W, W.T, jnp.zeros(2)))
        least = float(balanced_value(problem))
    assert float(c.dual_norm) > float(c.threshold)
    assert float(c.gap) + float(c.rounding) >= float(c.value) - least > 0
    assert c.verdict != Verdict.GLOBAL


@pytest.mark.parametrize("counts", [(2, 2, 2), (5, 2, 1)])
def test_every_point_bounds_every_other(counts):
    """D at any point is below f at any other."""
    problem = imbalanced(counts, 3, lam_W=2e-2, lam_H=1e-2)
    bound = jax.jit(lambda x: dual_value(problem, x))
    points = [init(problem, jax.random.key(i), scale=10.0 ** (i % 5 - 3)) for i in range(20)]
    highest = max(float(bound(x)[0]) - float(bound(x)[1]) for x in points)
    assert highest <= min(float(certify(problem, x).value) for x in points)


def test_the_bound_depends_on_logits_alone():
    problem = imbalanced((5, 2, 1), 3, lam_W=2e-2, lam_H=1e-2)
    x = init(problem, jax.random.key(0))
    M = jnp.array([[2.0, 1.0, 0.0], [0.0, 1.0, 3.0], [0.0, 0.0, 0.5]])
    other = Params(x.W @ M, jnp.linalg.solve(M, x.H), x.b + jnp.array([3.0, -1, 0]))  # the bias is optimised over
    assert float(dual_value(problem, x)[0]) == pytest.approx(float(dual_value(problem, other)[0]), rel=1e-12)
