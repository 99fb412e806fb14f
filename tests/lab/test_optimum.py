"""The optimum for any class counts against SciPy, CVXPY, random starts and the laws of THEORY 1.5, 3.4 and 8.2."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from jax.flatten_util import ravel_pytree

from ufm.lab import optimum
from ufm.lab.optimum import global_minimiser, optimal_value
from ufm.model.problem import Params, balanced, class_mean_problem, imbalanced, init, logits, objective
from ufm.numerics.minimise import minimise
from ufm.theory.certificate import Verdict, certify
from ufm.theory.optimum import balanced_minimiser, balanced_value, collapse_threshold

pytestmark = pytest.mark.usefixtures("hastily")

EPS = np.finfo(float).eps
BIASES = {True: (0.0, 1e-2), False: (0.0,)}  # the λ_b's to try with and without a bias: free, regularised, absent
three_modes = pytest.mark.parametrize("use_bias", [True, False])


def bound(c):
    """What a certificate leaves of f − f*, of either sign."""
    return abs(float(c.gap)) + float(c.rounding)


# Equal counts: the closed form against random starts


@pytest.mark.parametrize(
    ("K", "n", "d", "use_bias"), [(2, 1, 1, False), (2, 3, 4, True), (3, 2, 2, False), (4, 4, 4, True), (6, 1, 5, True)]
)
def test_minimise_from_random_starts_reaches_the_closed_form_and_no_other_geometry(K, n, d, use_bias):
    loads = np.array([1e-6, 1e-3, 0.1, 0.5, 0.9, 0.999, 1.0, 1.0, 1.0, 1.001, 2.0])  # K√n s; 1 is the threshold
    s, ratio = loads / (K * np.sqrt(n)), np.linspace(0.5, 2, len(loads))
    lam_b = np.where(np.arange(len(loads)) % 2, 0, 1e-2)

    def solve(case):
        s, ratio, lam_b, key = case
        problem = balanced(K, n, d, lam_W=s * ratio, lam_H=s / ratio, lam_b=lam_b, use_bias=use_bias)
        found = minimise(functools.partial(objective, problem), init(problem, key), tol=1e-13)
        gram = lambda x: jnp.concatenate([x.W, x.H.T]) @ jnp.concatenate([x.W, x.H.T]).T  # noqa: E731
        return found.value - balanced_value(problem), gram(found.params), gram(balanced_minimiser(problem))

    keys = jax.random.split(jax.random.key(K), len(loads))
    excess, grams, closed = jax.jit(lambda cases: jax.lax.map(solve, cases))((s, ratio, lam_b, keys))
    assert np.abs(excess).max() <= 1e-12
    clear = np.abs(loads - 1) > 0.05  # near the threshold f is flat, and says little of the point
    difference = np.linalg.norm(grams - closed, axis=(1, 2))[clear]
    assert (difference <= 1e-5 * np.maximum(1, np.linalg.norm(closed, axis=(1, 2))[clear])).all()


@three_modes
def test_equal_counts_use_the_closed_form_exactly(use_bias):
    problem = balanced(4, 3, 5, lam_W=5e-3, lam_H=2e-3, use_bias=use_bias)
    assert jax.tree.all(jax.tree.map(np.array_equal, global_minimiser(problem), balanced_minimiser(problem)))
    assert float(optimal_value(problem)) == float(balanced_value(problem))


def test_the_optimum_is_continuous_in_the_counts_where_the_closed_form_ends():
    counts = ([10**6, 10**6, 10**6 + 1], [10**6] * 3)  # solved; in closed form
    values = [float(optimal_value(class_mean_problem(c, 3, lam_W=1e-4, lam_H=1e-10))) for c in counts]
    assert values[0] == pytest.approx(values[1], rel=1e-6)


def test_vmap_and_grad_go_through_the_balanced_value():
    f = lambda lam: optimal_value(balanced(3, 2, 4, lam_W=lam, lam_H=0.01))  # noqa: E731
    lams = jnp.array([1e-3, 1e-2, 1.0])
    np.testing.assert_allclose(jax.vmap(f)(lams), [float(f(lam)) for lam in lams], rtol=8 * EPS)
    slope = jnp.sum(global_minimiser(balanced(3, 2, 4, lam_W=1e-3, lam_H=0.01)).W ** 2) / 2
    assert float(jax.grad(f)(1e-3)) == pytest.approx(float(slope), rel=1e-12)


# Unequal counts against other solvers


@three_modes
@pytest.mark.parametrize("counts", [(2, 2, 2), (4, 2, 1)])
def test_cvxpy_finds_the_same_optimum_of_the_convex_problem(counts, use_bias):
    cvxpy = pytest.importorskip("cvxpy")
    K, N, lam_W, lam_H = 3, sum(counts), 3e-2, 1e-2
    Y = np.repeat(np.eye(K), counts, axis=1)
    for lam_b in BIASES[use_bias]:
        Z, b = cvxpy.Variable((K, N)), cvxpy.Variable((K, 1))
        shifted = Z + b @ np.ones((1, N)) if use_bias else Z
        fit = (cvxpy.sum(cvxpy.log_sum_exp(shifted, axis=0)) - cvxpy.sum(cvxpy.multiply(Y, shifted))) / N
        penalty = np.sqrt(lam_W * lam_H) * cvxpy.normNuc(Z) + lam_b / 2 * cvxpy.sum_squares(b)
        convex = cvxpy.Problem(cvxpy.Minimize(fit + penalty))
        convex.solve(solver=cvxpy.CLARABEL)
        problem = imbalanced(counts, 3, lam_W=lam_W, lam_H=lam_H, lam_b=lam_b, use_bias=use_bias)
        x = global_minimiser(problem)
        assert float(optimal_value(problem)) == pytest.approx(convex.value, abs=1e-7)  # Clarabel's 1e-8 of f ≈ 1
        np.testing.assert_allclose(x.W @ x.H, Z.value, atol=1e-3)  # √(that / curvature)


@pytest.mark.parametrize(("d", "use_bias"), [(2, True), (3, False)])
def test_scipy_from_random_starts_finds_nothing_lower(d, use_bias):
    unravel = ravel_pytree(init(imbalanced((5, 2, 1), d, lam_W=1, lam_H=1), jax.random.key(0)))[1]
    f = jax.jit(jax.value_and_grad(lambda flat, problem: objective(problem, unravel(flat))))
    for lam_b in BIASES[use_bias]:
        problem = imbalanced((5, 2, 1), d, lam_W=1e-2, lam_H=2e-2, lam_b=lam_b, use_bias=use_bias)
        least, x = float(optimal_value(problem)), global_minimiser(problem)
        for seed in range(3):
            start = ravel_pytree(init(problem, jax.random.key(seed)))[0]
            options = {"ftol": 0, "gtol": 1e-10, "maxiter": 10000}
            found = scipy.optimize.minimize(f, start, args=(problem,), jac=True, method="L-BFGS-B", options=options)
            y = unravel(jnp.asarray(found.x))
            assert -1e-14 <= found.fun - least <= 1e-11
            np.testing.assert_allclose(y.W @ y.W.T, x.W @ x.W.T, atol=1e-3)  # √(1e-11 / curvature)


# Certified, at any size and λ


@three_modes
def test_a_hundred_classes_from_one_to_a_thousand_samples_are_certified(use_bias):
    counts = np.round(np.geomspace(1, 1000, 100)).astype(int)
    for lam_b in BIASES[use_bias]:
        for lam in (1e-3, 1e-5, 1e-8):
            problem = class_mean_problem(counts, 99, lam_W=lam, lam_H=lam, lam_b=lam_b, use_bias=use_bias)
            c = certify(problem, global_minimiser(problem))
            assert c.verdict == Verdict.GLOBAL
            assert bound(c) <= 1e-9


def test_counts_like_a_fifth_of_imagenet_are_certified():
    """Nine classes in ten of 1300 samples, the others between 732 and 1299, in any order."""
    rng = np.random.default_rng(0)
    counts = rng.permutation(np.concatenate([np.full(179, 1300), rng.integers(732, 1300, 21)]))
    problem = class_mean_problem(counts, 199, lam_W=1e-6, lam_H=1e-5)
    c = certify(problem, global_minimiser(problem))
    assert c.verdict == Verdict.GLOBAL
    assert bound(c) <= 1e-9


@three_modes
def test_every_lambda_ratio_and_distance_to_a_threshold_is_certified(use_bias):
    rng = np.random.default_rng(0)
    counts = (1, 1, 30, 1000)
    close = 1 + rng.choice([-1, 1], 15) * 10 ** rng.uniform(-12, -1, 15)
    near = np.sqrt(rng.choice(counts, 15)) / sum(counts) * close
    for s in [*10 ** rng.uniform(-12, 0, 15), *near]:
        ratio, lam_b = 10 ** rng.uniform(-4, 4), 10 ** rng.uniform(-12, 0)
        problem = class_mean_problem(counts, 3, lam_W=s * ratio, lam_H=s / ratio, lam_b=lam_b, use_bias=use_bias)
        c = certify(problem, global_minimiser(problem))
        assert bound(c) <= 1e-10 * float(c.value)


@three_modes
def test_full_size_and_shuffled_classes_have_the_same_optimum(use_bias):
    counts, order = np.array([7, 1, 3, 1]), np.array([2, 0, 3, 1])
    for lam_b in BIASES[use_bias]:
        lams = {"lam_W": 2e-3, "lam_H": 5e-4, "lam_b": lam_b, "use_bias": use_bias}
        problem, shuffled = imbalanced(counts, 3, **lams), imbalanced(counts[order], 3, **lams)
        x, y, least = global_minimiser(problem), global_minimiser(shuffled), float(optimal_value(problem))
        assert float(optimal_value(shuffled)) == pytest.approx(least, rel=1e-14)
        assert float(optimal_value(class_mean_problem(counts, 3, **lams))) == pytest.approx(least, rel=1e-14)
        assert float(objective(problem, x)) == pytest.approx(least, rel=1e-13)
        assert certify(problem, x).verdict == Verdict.GLOBAL
        np.testing.assert_allclose(y.W @ y.W.T, (x.W @ x.W.T)[order][:, order], atol=1e-9)
        np.testing.assert_allclose(y.b, x.b[order], atol=1e-9)
        np.testing.assert_allclose(2e-3 * x.W.T @ x.W, 5e-4 * x.H @ x.H.T, atol=1e-15)  # balance
        assert max(np.ptp(np.asarray(x.H[:, row == 1]), axis=1).max() for row in problem.Y) == 0  # NC1
        if use_bias:
            assert float(jnp.mean(x.b)) == pytest.approx(0, abs=1e-13)
            assert np.any(x.b)


# Thresholds


@three_modes
@pytest.mark.parametrize(("counts", "pair"), [((10, 3, 1, 1), (2, 3)), ((30, 8, 8, 1), (1, 2))])
def test_classes_of_a_size_merge_exactly_from_their_threshold_on(counts, pair, use_bias):
    """THEORY 3.4: while apart, p_kk − p_kj = 1 − Ns/√n_B; from Ns = √n_B on they are the same."""
    i, j = pair
    N, n = sum(counts), counts[i]
    for factor in (0.3, 0.9, 0.99, 1.01, 1.5):
        for lam_b in BIASES[use_bias]:
            s = factor * np.sqrt(n) / N
            problem = class_mean_problem(counts, 3, lam_W=2 * s, lam_H=s / 2, lam_b=lam_b, use_bias=use_bias)
            x = global_minimiser(problem)
            excess, Z = bound(certify(problem, x)), logits(problem, x)
            p = jax.nn.softmax(Z, axis=0)
            if factor < 1:  # f is a smooth function of the gap a: |f′| ≤ √(2L excess), L ≤ n/N, and f′ in units of n/N
                assert float(p[i, i] - p[j, i]) == pytest.approx(1 - factor, abs=np.sqrt(2 * excess * N / n))
                assert float(jnp.linalg.norm(x.W[i] - x.W[j])) > 1e-2
            else:  # f rises at least linearly in a, by √n s (1 − 1/factor)
                assert abs(float(Z[i, i] - Z[j, i])) <= excess / (np.sqrt(n) * s * (1 - 1 / factor))


@three_modes
@pytest.mark.parametrize("counts", [(5, 2, 1), (10, 3, 1, 1)])
def test_everything_is_zero_exactly_from_the_collapse_threshold_on(counts, use_bias):
    K, frequency = len(counts), np.asarray(counts) / sum(counts)
    for lam_b in BIASES[use_bias]:
        make = lambda s: class_mean_problem(  # noqa: E731
            counts, K - 1, lam_W=3 * s, lam_H=s / 3, lam_b=lam_b, use_bias=use_bias  # noqa: B023
        )  # fmt: skip
        threshold = float(collapse_threshold(make(1.0)))
        for factor in (0.5, 0.99, 1.01, 2.0):
            problem = make(factor * threshold)
            x, least = global_minimiser(problem), float(optimal_value(problem))
            zero = Params(0 * x.W, 0 * x.H, x.b)
            if factor < 1:
                assert float(objective(problem, zero)) - least > 1e-7
                continue
            assert certify(problem, zero).verdict == Verdict.GLOBAL
            assert float(jnp.linalg.norm(x.W)) < 1e-6
            if lam_b == 0:
                guess = -np.sum(frequency * np.log(frequency)) if use_bias else np.log(K)
                assert least == pytest.approx(guess, rel=1e-12)


# Bad input


@pytest.mark.parametrize("call", [global_minimiser, optimal_value])
def test_what_is_not_covered_is_refused(call):
    with pytest.raises(ValueError, match=r"^d must be at least K - 1 = 3 for the global optimum, got 2$"):
        call(imbalanced([4, 3, 2, 1], 2, lam_W=0.1, lam_H=0.1))
    with pytest.raises(ValueError, match=r"^lam_W, lam_H or lam_b is traced"):
        jax.vmap(lambda lam: call(imbalanced([2, 1], 1, lam_W=lam, lam_H=0.1)))(jnp.ones(2))
    with pytest.raises(ValueError, match=r"^Y is traced"):
        jax.jit(call)(imbalanced([2, 1], 1, lam_W=0.1, lam_H=0.1))


def test_a_solver_that_leaves_the_finite_numbers_is_an_arithmetic_error(monkeypatch):
    lost = Params(jnp.full((3, 4), jnp.nan), jnp.zeros((4, 3)), jnp.zeros(3))
    monkeypatch.setattr(optimum, "solve_tied", lambda tied, problem: lost)
    with pytest.raises(ArithmeticError, match="left the finite numbers"):
        global_minimiser(imbalanced([3, 2, 1], 4, lam_W=1e-3, lam_H=1e-3))
