"""Cross-entropy against 360-digit decimals, and the laws of convex conjugates."""

import decimal
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ufm.model.losses import CrossEntropy

decimal.getcontext().prec = 360  # e^−700 beside 1
EPS = np.finfo(float).eps
LOSS = CrossEntropy()
K = 4
EXTREMES = [0.0, 1.0, -1.0, 36.7, -36.7, 700.0, -700.0, 1e5, -1e5, 1e-9]


def exact(z, y):
    """log Σ_j exp(z_j − z_y) and its gradient, in decimals."""
    z = [decimal.Decimal(float(x)) for x in z]
    terms = [(x - z[y]).exp() for x in z]
    total = sum(terms)
    p = [t / total for t in terms]
    wrong = sum(q for j, q in enumerate(p) if j != y)
    return total.ln(), [-wrong if j == y else q for j, q in enumerate(p)]


def entropy(r, y):
    """Σ q log q of q = r + e_y, in decimals."""
    q = [decimal.Decimal(float(x)) for x in r]
    q[y] = 1 - sum(x for j, x in enumerate(q) if j != y)
    return sum(x * x.ln() for x in q if x > 0)


@pytest.fixture(scope="module")
def columns():
    """Logit columns: every pair of extremes on two classes, and random ones at many scales."""
    pairs = np.array([(a, b, 0.0, -2.0) for a, b in itertools.product(EXTREMES, repeat=2)]).T
    rng = np.random.default_rng(0)
    random = rng.normal(size=(K, 100)) * 10.0 ** rng.uniform(-9, 4, 100)
    Z = np.concatenate([pairs, random], axis=1)
    y = rng.integers(0, K, Z.shape[1])
    return jnp.asarray(Z), y, np.eye(K)[:, y]


def test_value_and_residual_keep_relative_accuracy_at_extreme_logits(columns):
    Z, y, Y = columns
    value, residual = np.asarray(LOSS(Z, Y)), np.asarray(LOSS.residual(Z, Y))
    for i, k in enumerate(y):
        f, r = exact(Z[:, i], k)
        size = 1 + np.abs(Z[:, i]).max()  # a logit gap is known to eps times its size, and so is exp of it
        tiny = 1e-307  # smaller results underflow
        np.testing.assert_allclose(value[i], float(f), rtol=8 * EPS * size, atol=tiny)
        np.testing.assert_allclose(residual[:, i], [float(x) for x in r], rtol=8 * EPS * size, atol=tiny)


def test_an_enormous_margin_of_either_sign_neither_overflows_nor_cancels():
    Z, Y = jnp.array([[1e300, -1e300, 800.0], [0.0, 0.0, 0.0]]), jnp.array([[1.0, 1, 1], [0, 0, 0]])
    np.testing.assert_array_equal(LOSS(Z, Y), [0, 1e300, 0])
    np.testing.assert_array_equal(LOSS.residual(Z, Y), [[0, -1, 0], [0, 1, 0]])
    small = float(LOSS(jnp.array([[40.0], [0.0]]), Y[:, :1])[0])
    assert small == pytest.approx(np.exp(-40), rel=1e-14)


def test_residual_columns_sum_to_zero_relatively(columns):
    Z, _, Y = columns
    R = np.asarray(LOSS.residual(Z, Y))
    assert (np.abs(R.sum(0)) <= K * EPS * np.abs(R).sum(0)).all()


def test_conjugate_is_the_negative_entropy(columns):
    Z, y, Y = columns
    R = LOSS.residual(Z, Y)
    values = np.asarray(LOSS.conjugate(R, Y))
    for i, k in enumerate(y):
        r = np.array(R[:, i])
        wrong = np.delete(r, k)
        r[k] = -wrong.sum()
        # 1 + r_y cancels when the sample is certainly wrong: an error of eps there costs eps (|log eps| + 1)
        np.testing.assert_allclose(values[i], float(entropy(r, k)), rtol=32 * EPS, atol=64 * EPS * wrong.sum())


def test_conjugate_at_the_corners_of_the_simplex_is_zero():
    Y = np.eye(K)
    for vertex in range(K):
        R = np.eye(K)[:, [vertex] * K] - Y
        np.testing.assert_array_equal(LOSS.conjugate(jnp.asarray(R), Y), np.zeros(K))


def test_fenchel_young_inequality_and_its_equality(columns):
    Z, _, Y = columns
    keep = np.abs(Z).max(0) < 100
    Z, Y = Z[:, keep], Y[:, keep]
    random = jnp.asarray(np.random.default_rng(1).dirichlet(np.full(K, 0.3), Z.shape[1]).T - Y)
    loss, inner = np.asarray(LOSS(Z, Y)), jnp.sum(random * Z, axis=0)
    assert (loss + np.asarray(LOSS.conjugate(random, Y)) >= inner - 1e-12).all()
    own = LOSS.residual(Z, Y)
    equal = loss + np.asarray(LOSS.conjugate(own, Y)) - jnp.sum(own * Z, axis=0)
    np.testing.assert_allclose(equal, 0, atol=64 * EPS * (1 + np.abs(Z).max()))


def test_conjugate_is_the_supremum():
    Y = np.eye(3)[:, :1]
    R = jnp.array([[-0.7], [0.5], [0.2]])
    best = jnp.log(jnp.array([[0.3], [0.5], [0.2]]))  # the supremum is where softmax = r + y
    attained = jnp.sum(R * best) - float(LOSS(best, Y)[0])
    assert float(LOSS.conjugate(R, Y)[0]) == pytest.approx(attained, abs=4 * EPS)
    moved = best + 0.1 * np.random.default_rng(0).normal(size=(50, 3, 1))
    assert all(jnp.sum(R * z) - float(LOSS(z, Y)[0]) <= attained for z in moved)


def test_mean_hessian_is_the_weighted_sum_of_dense_hessians():
    rng = np.random.default_rng(2)
    Z, Y, w = (
        jnp.asarray(rng.normal(size=(K, 7))),
        np.eye(K)[:, rng.integers(0, K, 7)],
        jnp.asarray(rng.uniform(0.1, 2, 7)),
    )
    dense = jax.hessian(lambda shift: LOSS(Z + shift[:, None], Y) @ w)(jnp.zeros(K))
    M = np.asarray(LOSS.mean_hessian(Z, Y, w))
    np.testing.assert_allclose(M, dense, atol=16 * EPS)
    np.testing.assert_allclose(M.sum(0), 0, atol=16 * EPS)
    assert np.linalg.eigvalsh(M)[0] > -16 * EPS


def test_value_is_convex_along_random_lines():
    rng = np.random.default_rng(3)
    A, B = jnp.asarray(rng.normal(size=(2, K, 200)) * 10.0 ** rng.uniform(-2, 3, 200))
    Y = np.eye(K)[:, rng.integers(0, K, 200)]
    middle, ends = np.asarray(LOSS((A + B) / 2, Y)), np.asarray(LOSS(A, Y) + LOSS(B, Y)) / 2
    assert (middle <= ends * (1 + 16 * EPS) + 64 * EPS * jnp.abs(A).max()).all()
