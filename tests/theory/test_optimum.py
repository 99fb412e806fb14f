"""The balanced optimum of THEORY 1.2 against derivatives and algebra, and the thresholds of THEORY 1.5."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from scipy.special import softmax

from ufm.model.losses import CrossEntropy
from ufm.model.problem import Params, balanced, imbalanced, init, logits, objective
from ufm.theory.optimum import (
    balanced_minimiser,
    balanced_value,
    collapse_threshold,
    is_balanced,
    margin,
    nonnegative_minimiser,
    wrong_class_probability,
)

EPS = np.finfo(float).eps
SHAPES = [(2, 1, 1), (3, 2, 4), (4, 5, 3), (10, 3, 9)]  # K, n, d: d = K − 1 and above


def lambdas(K, n, size=200, seed=0):
    """λ_W and λ_H from 1e-12 to 1, a quarter of them near the threshold, where some exceed 1."""
    rng = np.random.default_rng(seed)
    lam_W, lam_H = 10 ** rng.uniform(-12, 0, (2, size))
    near = (1 + rng.choice([-1, 1], size // 4) * 10 ** rng.uniform(-15, -1, size // 4)) / (K * np.sqrt(n))
    lam_H[: size // 4] = near**2 / lam_W[: size // 4]
    return lam_W, lam_H


class Loss(CrossEntropy):
    """Another loss than cross-entropy."""

    __eq__ = None


def test_worked_example_of_theory_1_2():
    problem = balanced(4, 5, 6, lam_W=5e-3, lam_H=2e-3)
    x = balanced_minimiser(problem)
    p = jax.nn.softmax(logits(problem, x), axis=0)
    t, q = margin(4, wrong_class_probability(5, problem.s)), p[1, 0]
    assert float(q) == pytest.approx(0.00707107, abs=5e-9)
    assert float(t) == pytest.approx(4.93030234, abs=5e-9)
    assert float(p[0, 0]) == pytest.approx(0.97878680, abs=5e-9)
    assert float(jnp.sum(x.W[0] ** 2)) == pytest.approx(5.22937533, abs=5e-9)
    assert float(jnp.sum(x.H[:, 0] ** 2)) == pytest.approx(2.61468766, abs=5e-9)
    assert float(balanced_value(problem)) == pytest.approx(0.126028943439, abs=5e-13)


@pytest.mark.parametrize(("K", "n", "d"), SHAPES)
@pytest.mark.parametrize("use_bias", [True, False])
def test_gradient_vanishes_and_f_is_the_stated_value_for_all_lambdas(K, n, d, use_bias):
    def measure(lam_W, lam_H, lam_b):
        problem = balanced(K, n, d, lam_W=lam_W, lam_H=lam_H, lam_b=lam_b, use_bias=use_bias)
        x = balanced_minimiser(problem)
        f, grad = jax.value_and_grad(functools.partial(objective, problem))(x)
        sizes = lam_W * jnp.linalg.norm(x.W), lam_H * jnp.linalg.norm(x.H)
        return f, balanced_value(problem), grad, sizes, x, margin(K, jnp.sqrt(n) * problem.s)

    lam_W, lam_H = lambdas(K, n)
    f, value, grad, (W_size, H_size), x, t = jax.jit(jax.vmap(measure))(lam_W, lam_H, np.linspace(0, 1, len(lam_W)))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((f, value, grad, x)))
    tolerance = 16 * EPS * (1 + np.asarray(t))  # p = e^{−t} q-wise, so eps t of relative error in the residual
    np.testing.assert_allclose(f, value, rtol=K * 8 * EPS)
    assert (np.linalg.norm(grad.W, axis=(1, 2)) <= tolerance * K * W_size).all()
    assert (np.linalg.norm(grad.H, axis=(1, 2)) <= tolerance * K * H_size).all()
    assert (np.linalg.norm(grad.b, axis=1) <= K * 4 * EPS).all()


@pytest.mark.parametrize(("K", "n", "d"), SHAPES)
def test_geometry_of_theory_1_2(K, n, d):
    lam_W, lam_H = 3e-4, 2e-5
    problem = balanced(K, n, d, lam_W=lam_W, lam_H=lam_H)
    x = balanced_minimiser(problem)
    q, c = np.sqrt(n * lam_W * lam_H), np.sqrt(lam_W / (n * lam_H))
    t = np.log(1 / q - K + 1)
    Z, P = np.asarray(x.W @ x.H), np.eye(K) - 1 / K
    close = functools.partial(np.testing.assert_allclose, rtol=1e-13, atol=1e-13)
    close(Z, t * P @ problem.Y)
    close(x.W @ x.W.T, t * np.sqrt(n * lam_H / lam_W) * P)
    close(np.sum(x.W**2, axis=1), (K - 1) / (K * c) * t)
    close(x.H, c * x.W.T @ problem.Y)
    close(np.linalg.norm(Z, "nuc"), (K - 1) * t * np.sqrt(n))
    close(lam_W * x.W.T @ x.W, lam_H * x.H @ x.H.T)
    probabilities = softmax(Z, axis=0)
    close(probabilities[~problem.Y.astype(bool)], q)
    singular = np.linalg.svd((probabilities - problem.Y) / (K * n), compute_uv=False)
    close(singular[: K - 1], problem.s)
    close(singular[K - 1 :], 0)


def test_value_needs_no_features_and_depends_on_n_lambda_w_lambda_h_alone():
    a = balanced(5, 8, 4, lam_W=1e-3, lam_H=1e-3)
    b = balanced(5, 2, 9, lam_W=4e-2, lam_H=1e-4, use_bias=False)
    assert float(balanced_value(a)) == pytest.approx(float(balanced_value(b)), rel=8 * EPS)


@pytest.mark.parametrize(("K", "n"), [(2, 1), (4, 4), (8, 1), (2, 64)])  # where 1/(K√n) is exact in binary
def test_threshold_separates_zero_from_the_simplex(K, n):
    exact = 1 / (K * np.sqrt(n))
    for factor in (1.0, 1 + 4 * EPS, 2.0):
        problem = balanced(K, n, K, lam_W=factor * exact, lam_H=exact)
        x = balanced_minimiser(problem)
        assert not np.any(x.W)
        assert not np.any(x.H)
        assert float(balanced_value(problem)) == pytest.approx(np.log(K), rel=4 * EPS)
    below = balanced(K, n, K, lam_W=exact * (1 - 1e-12), lam_H=exact)
    assert np.any(balanced_minimiser(below).W)
    t = float(margin(K, np.sqrt(n) * below.s))
    assert t == pytest.approx(K * 5e-13, rel=1e-3)  # log1p((1 − Kq)/q) with Kq = 1 − 5e-13, known to eps/5e-13


@pytest.mark.parametrize(("K", "n", "d"), SHAPES[:3])
def test_slopes_of_the_value_are_those_of_the_objective_at_the_minimiser(K, n, d):
    lams = {"lam_W": jnp.asarray(2e-3), "lam_H": jnp.asarray(7e-4), "lam_b": jnp.asarray(1e-2)}
    slopes = jax.grad(lambda lams: balanced_value(balanced(K, n, d, **lams)))(lams)
    x = balanced_minimiser(balanced(K, n, d, **lams))
    assert float(slopes["lam_W"]) == pytest.approx(float(jnp.sum(x.W**2)) / 2, rel=1e-13)
    assert float(slopes["lam_H"]) == pytest.approx(float(jnp.sum(x.H**2)) / 2, rel=1e-13)
    assert float(slopes["lam_b"]) == 0


@pytest.mark.parametrize("mode", ["free", "regularised", "absent"])
@pytest.mark.parametrize(("K", "n", "d"), [(2, 1, 1), (3, 2, 3)])
def test_scipy_finds_nothing_lower_and_the_same_gram(K, n, d, mode):
    lam_b = 1e-2 if mode == "regularised" else 0.0
    problem = balanced(K, n, d, lam_W=2e-2, lam_H=3e-2, lam_b=lam_b, use_bias=mode != "absent")
    start, unravel = jax.flatten_util.ravel_pytree(init(problem, jax.random.key(0)))
    f = jax.jit(jax.value_and_grad(lambda flat: objective(problem, unravel(flat))))
    found = [
        scipy.optimize.minimize(f, (seed + 1) * np.roll(start, seed), jac=True, method="L-BFGS-B",
                                options={"ftol": 0, "gtol": 1e-10, "maxiter": 5000})
        for seed in range(3)
    ]  # fmt: skip
    closed = balanced_minimiser(problem)
    for result in found:
        x = unravel(jnp.asarray(result.x))
        assert -4 * EPS <= result.fun - float(balanced_value(problem)) <= 1e-12
        for left, right in ((x.W @ x.W.T, closed.W @ closed.W.T), (x.H.T @ x.H, closed.H.T @ closed.H)):
            # f − f* ≤ 1e-12 where curvature is at least 4θλ_Wλ_H/(λ_W+λ_H)(1+θ), about 5e-3: √(2e-12/5e-3) = 2e-5
            np.testing.assert_allclose(left, right, atol=1e-4)


def test_a_thousand_classes_in_the_smallest_space():
    problem = balanced(1000, 1, 999, lam_W=1e-5, lam_H=1e-5)
    x = balanced_minimiser(problem)
    assert float(objective(problem, x)) == pytest.approx(float(balanced_value(problem)), rel=1e-12)


# Thresholds


def closed_form_threshold(counts, use_bias):
    """THEORY 1.5, by dense linear algebra."""
    n = np.asarray(counts, float)
    N, K, D = n.sum(), n.size, np.diag(n)
    if not use_bias:
        P = np.eye(K) - 1 / K
        return np.sqrt(np.linalg.eigvalsh(P @ D @ P)[-1]) / N
    return np.linalg.norm((np.outer(n / N, np.ones(K)) - np.eye(K)) @ np.sqrt(D), 2) / N


COUNTS = [(3, 3, 3), (2, 2), (5, 2, 1), (1, 1000), (100, 10, 1, 1)]


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("use_bias", [True, False])
def test_collapse_threshold_is_theory_1_5(counts, use_bias):
    problem = imbalanced(counts, len(counts), lam_W=1e-3, lam_H=1e-3, use_bias=use_bias)
    assert float(collapse_threshold(problem)) == pytest.approx(closed_form_threshold(counts, use_bias), rel=1e-12)
    if is_balanced(problem):
        K, n = len(counts), counts[0]
        assert float(collapse_threshold(problem)) == pytest.approx(1 / (K * np.sqrt(n)), rel=1e-13)


@pytest.mark.parametrize("counts", COUNTS[2:5])
@pytest.mark.parametrize("lam_b", [1e-6, 1e-2, 1.0])
def test_collapse_threshold_with_a_regularised_bias_is_the_residual_at_the_best_bias(counts, lam_b):
    n = np.asarray(counts, float)
    f = lambda b: np.log(np.sum(np.exp(b))) - n @ b / n.sum() + lam_b / 2 * b @ b  # noqa: E731
    slope = lambda b: softmax(b) - n / n.sum() + lam_b * b  # noqa: E731
    curve = lambda b: np.diag(softmax(b) + lam_b) - np.outer(softmax(b), softmax(b))  # noqa: E731
    b = scipy.optimize.minimize(f, np.zeros(n.size), jac=slope, hess=curve, method="trust-exact", tol=1e-13).x
    residual = (softmax(b)[:, None] - np.eye(n.size)) * np.sqrt(n) / n.sum()
    problem = imbalanced(counts, len(counts), lam_W=1e-3, lam_H=1e-3, lam_b=lam_b)
    assert float(collapse_threshold(problem)) == pytest.approx(np.linalg.norm(residual, 2), rel=1e-9)


# Bad input


@pytest.mark.parametrize("call", [balanced_minimiser, balanced_value])
@pytest.mark.parametrize(
    ("problem", "match"),
    [
        (balanced(4, 2, 2, lam_W=0.1, lam_H=0.1), "^d must be at least K - 1 = 3 for the global optimum, got 2$"),
        (imbalanced([2, 1], 2, lam_W=0.1, lam_H=0.1), r"^counts must be equal .*, got \[2.0, 1.0\]$"),
    ],
)
def test_no_closed_form_without_equal_counts_and_room_for_a_simplex(call, problem, match):
    with pytest.raises(ValueError, match=match):
        call(problem)


def test_traced_counts_are_taken_to_be_equal_where_they_only_enter_and_refused_where_they_decide():
    problem = balanced(3, 2, 3, lam_W=0.1, lam_H=0.1)
    assert float(jax.jit(balanced_value)(problem)) == pytest.approx(float(balanced_value(problem)), rel=4 * EPS)
    for call in (is_balanced, nonnegative_minimiser):
        with pytest.raises(ValueError, match=r"^Y is traced"):
            jax.jit(call)(problem)


def test_minimiser_returns_a_point_of_the_problems_shapes():
    x = balanced_minimiser(balanced(3, 2, 5, lam_W=0.1, lam_H=0.1))
    assert isinstance(x, Params)
    assert (x.W.shape, x.H.shape, x.b.shape) == ((3, 5), (5, 6), (3,))


# Features that cannot be negative


@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("load", [0.05, 0.6, 1.0])
def test_scipy_with_bounds_finds_nothing_below_the_nonnegative_minimiser(load, use_bias):
    """THEORY 3.7 for equal counts: q = √(nK/(K−1)) s, f* = log(1 + (K−1)e^{−t}) + K √((K−1)/K) √n s t."""
    K, n, d = 3, 2, 3
    s = load * np.sqrt((K - 1) / K) / (K * np.sqrt(n))  # load 1 is the threshold K q = 1
    problem = balanced(K, n, d, lam_W=2 * s, lam_H=s / 2, use_bias=use_bias)
    x = nonnegative_minimiser(problem)
    t = max(0, np.log(1 / (np.sqrt(n * K / (K - 1)) * s) - K + 1))
    stated = np.log1p((K - 1) * np.exp(-t)) + np.sqrt(K * (K - 1) * n) * s * t
    least = float(objective(problem, x))
    assert least == pytest.approx(stated, rel=1e-14)
    assert (x.H >= 0).all()
    np.testing.assert_allclose(x.H.T @ x.H * (1 - problem.Y.T @ problem.Y), 0, atol=1e-15)  # orthogonal means
    start = init(problem, jax.random.key(0))
    unravel = jax.flatten_util.ravel_pytree(start)[1]
    f = jax.jit(jax.value_and_grad(lambda flat, problem: objective(problem, unravel(flat))))
    bounds = [(None, None)] * (K * d) + [(0, None)] * (d * K * n) + [(None, None)] * K
    found = []
    for seed in range(4):
        flat = jax.flatten_util.ravel_pytree(init(problem, jax.random.key(seed)))[0]
        flat = flat.at[K * d : -K].set(jnp.abs(flat[K * d : -K]))
        options = {"ftol": 0, "gtol": 1e-9, "maxiter": 5000}
        found.append(scipy.optimize.minimize(f, flat, args=(problem,), jac=True, bounds=bounds, options=options).fun)
    assert min(found) >= least - 1e-13
    assert min(found) <= least + 1e-9


def test_no_room_for_orthogonal_means_is_refused():
    with pytest.raises(ValueError, match=r"^d must be at least K = 4 for orthogonal class means, got 3$"):
        nonnegative_minimiser(balanced(4, 2, 3, lam_W=0.1, lam_H=0.1))
