"""The optimum for any class counts against SciPy, CVXPY, random starts and the laws of THEORY 1.5, 3.4 and 8.2."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from jax.flatten_util import ravel_pytree

from ufm.lab.optimum import global_minimiser, optimal_value
from ufm.model.losses import CrossEntropy
from ufm.model.problem import Params, balanced, class_mean_problem, imbalanced, init, logits, objective
from ufm.numerics.minimise import minimise
from ufm.theory.certificate import Verdict, certify
from ufm.theory.optimum import balanced_minimiser, balanced_value, collapse_threshold

EPS = np.finfo(float).eps
MODES = ["free", "regularised", "absent"]


def bias(mode, lam_b=1e-2):
    """The arguments that make a mode."""
    return {"lam_b": lam_b if mode == "regularised" else 0.0, "use_bias": mode != "absent"}


# Equal counts: the closed form against random starts


@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize(("K", "n", "d"), [(2, 1, 1), (3, 2, 4), (4, 4, 3), (6, 1, 6)])
def test_minimise_from_random_starts_reaches_the_closed_form_and_no_other_geometry(K, n, d, use_bias):
    loads = np.array([1e-6, 1e-3, 0.1, 0.5, 0.9, 0.999, 1.0, 1.0, 1.0, 1.001, 2.0])  # K√n s; 1 is the threshold
    s, ratio = loads / (K * np.sqrt(n)), np.linspace(0.5, 2, len(loads))
    lam_b = np.where(np.arange(len(loads)) % 2, 0, 1e-2)

    def solve(case):
        s, ratio, lam_b, key = case
        problem = balanced(K, n, d, lam_W=s * ratio, lam_H=s / ratio, lam_b=lam_b, use_bias=use_bias)
        found = minimise(functools.partial(objective, problem), init(problem, key), tol=1e-13)
        closed = balanced_minimiser(problem)
        gram = lambda x: jnp.concatenate([x.W, x.H.T]) @ jnp.concatenate([x.W, x.H.T]).T  # noqa: E731
        return found.value - balanced_value(problem), gram(found.params), gram(closed)

    keys = jax.random.split(jax.random.key(K), len(loads))
    excess, grams, closed = jax.jit(lambda cases: jax.lax.map(solve, cases))((s, ratio, lam_b, keys))
    assert np.abs(excess).max() <= 1e-12
    clear = np.abs(loads - 1) > 0.05  # near the threshold f is flat, and says little of the point
    difference = np.linalg.norm(grams - closed, axis=(1, 2))[clear]
    assert (difference <= 1e-5 * np.maximum(1, np.linalg.norm(closed, axis=(1, 2))[clear])).all()


@pytest.mark.parametrize("mode", MODES)
def test_equal_counts_use_the_closed_form_exactly(mode):
    problem = balanced(4, 3, 5, lam_W=5e-3, lam_H=2e-3, **bias(mode))
    assert jax.tree.all(jax.tree.map(np.array_equal, global_minimiser(problem), balanced_minimiser(problem)))
    assert float(optimal_value(problem)) == float(balanced_value(problem))


def test_the_solver_behind_unequal_counts_finds_the_balanced_optimum_as_its_limit():
    """f* is continuous in the counts: one sample more in a million changes it by about 1e-6."""
    near, equal = ([10**6, 10**6, 10**6 + 1], [10**6] * 3)
    lams = {"lam_W": 1e-4, "lam_H": 1e-10}
    values = [float(optimal_value(class_mean_problem(counts, 2, **lams))) for counts in (near, equal)]
    assert values[0] == pytest.approx(values[1], rel=1e-6)


def test_vmap_and_grad_go_through_the_balanced_value():
    f = lambda lam: optimal_value(balanced(3, 2, 4, lam_W=lam, lam_H=0.01))  # noqa: E731
    lams = jnp.array([1e-3, 1e-2, 1.0])
    np.testing.assert_allclose(jax.vmap(f)(lams), [float(f(lam)) for lam in lams], rtol=8 * EPS)
    slope = jnp.sum(global_minimiser(balanced(3, 2, 4, lam_W=1e-3, lam_H=0.01)).W ** 2) / 2
    assert float(jax.grad(f)(1e-3)) == pytest.approx(float(slope), rel=1e-12)


# Unequal counts against other solvers


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("counts", [(2, 2, 2), (4, 2, 1)])
def test_cvxpy_finds_the_same_optimum_of_the_convex_problem(counts, mode):
    cvxpy = pytest.importorskip("cvxpy")
    K, N, lam_W, lam_H, lam_b = 3, sum(counts), 3e-2, 1e-2, bias(mode, 0.05)["lam_b"]
    Y = np.repeat(np.eye(K), counts, axis=1)
    Z, b = cvxpy.Variable((K, N)), cvxpy.Variable((K, 1))
    shifted = Z + b @ np.ones((1, N)) if mode != "absent" else Z
    fit = (cvxpy.sum(cvxpy.log_sum_exp(shifted, axis=0)) - cvxpy.sum(cvxpy.multiply(Y, shifted))) / N
    penalty = np.sqrt(lam_W * lam_H) * cvxpy.normNuc(Z) + lam_b / 2 * cvxpy.sum_squares(b)
    convex = cvxpy.Problem(cvxpy.Minimize(fit + penalty))
    convex.solve(solver=cvxpy.CLARABEL)
    problem = imbalanced(counts, 3, lam_W=lam_W, lam_H=lam_H, **bias(mode, 0.05))
    x = global_minimiser(problem)
    assert float(optimal_value(problem)) == pytest.approx(convex.value, abs=1e-7)  # Clarabel's gap is 1e-8 of f ≈ 1
    np.testing.assert_allclose(x.W @ x.H, Z.value, atol=1e-3)  # √(gap / curvature)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("d", [2, 3])
def test_scipy_from_random_starts_finds_nothing_lower(mode, d):
    problem = imbalanced((5, 2, 1), d, lam_W=1e-2, lam_H=2e-2, **bias(mode))
    least = float(optimal_value(problem))
    unravel = ravel_pytree(init(problem, jax.random.key(0)))[1]
    f = jax.jit(jax.value_and_grad(lambda flat: objective(problem, unravel(flat))))
    for seed in range(3):
        start = ravel_pytree(init(problem, jax.random.key(seed)))[0]
        options = {"ftol": 0, "gtol": 1e-10, "maxiter": 10000}
        found = scipy.optimize.minimize(f, start, jac=True, method="L-BFGS-B", options=options)
        assert -1e-14 <= found.fun - least <= 1e-11
        x, gram = global_minimiser(problem), lambda x: x.W @ x.W.T
        np.testing.assert_allclose(gram(unravel(jnp.asarray(found.x))), gram(x), atol=1e-3)


# Certified, at any size and λ


@pytest.mark.parametrize("mode", MODES)
def test_a_hundred_classes_from_one_to_a_thousand_samples_are_certified(mode):
    counts = np.round(np.geomspace(1, 1000, 100)).astype(int)
    for lam in (1e-3, 1e-5, 1e-8):
        problem = class_mean_problem(counts, 99, lam_W=lam, lam_H=lam, **bias(mode, 1e-4))
        c = certify(problem, global_minimiser(problem))
        assert c.verdict == Verdict.GLOBAL
        assert abs(float(c.gap)) + float(c.rounding) <= 1e-9


def test_counts_like_imagenets_are_certified():
    """1000 classes: 895 of 1300 samples, the others between 732 and 1299."""
    counts = np.concatenate([np.full(895, 1300), np.random.default_rng(0).integers(732, 1300, 105)])
    problem = class_mean_problem(np.random.default_rng(1).permutation(counts), 999, lam_W=1e-6, lam_H=1e-6)
    c = certify(problem, global_minimiser(problem))
    assert c.verdict == Verdict.GLOBAL
    assert abs(float(c.gap)) <= 1e-12


@pytest.mark.parametrize("mode", MODES)
def test_every_lambda_and_imbalance_is_certified(mode):
    rng = np.random.default_rng(0)
    counts = (1, 1, 30, 1000)
    thresholds = np.sqrt(np.unique(counts)) / sum(counts)
    for i in range(30):
        s = 10 ** rng.uniform(-12, 0) if i % 2 else rng.choice(thresholds) * (1 + rng.choice([-1, 1]) * 10 ** rng.uniform(-12, -1))  # fmt: skip
        ratio = 10 ** rng.uniform(-4, 4)
        problem = class_mean_problem(
            counts, 3, lam_W=s * ratio, lam_H=s / ratio, **bias(mode, 10 ** rng.uniform(-8, 0))
        )
        c = certify(problem, global_minimiser(problem))
        assert abs(float(c.gap)) + float(c.rounding) <= 1e-10 * float(c.value)


@pytest.mark.parametrize("mode", MODES)
def test_full_size_and_shuffled_classes_have_the_same_optimum(mode):
    lams = {"lam_W": 2e-3, "lam_H": 5e-4, **bias(mode)}
    counts, order = np.array([7, 1, 3, 1]), np.array([2, 0, 3, 1])
    problem, shuffled = imbalanced(counts, 5, **lams), imbalanced(counts[order], 5, **lams)
    means = class_mean_problem(counts, 5, **lams)
    x, y = global_minimiser(problem), global_minimiser(shuffled)
    least = float(optimal_value(problem))
    assert float(optimal_value(shuffled)) == pytest.approx(least, rel=1e-14)
    assert float(optimal_value(means)) == pytest.approx(least, rel=1e-14)
    assert float(objective(problem, x)) == pytest.approx(least, rel=1e-13)
    assert certify(problem, x).verdict == Verdict.GLOBAL
    np.testing.assert_allclose((y.W @ y.W.T), (x.W @ x.W.T)[order][:, order], atol=1e-9)
    np.testing.assert_allclose(y.b, x.b[order], atol=1e-9)
    within = [np.ptp(np.asarray(x.H[:, problem.Y[k] == 1]), axis=1).max() for k in range(4)]
    assert max(within) == 0  # collapsed: NC1
    np.testing.assert_allclose(2e-3 * x.W.T @ x.W, 5e-4 * x.H @ x.H.T, atol=1e-15)


def test_a_free_bias_has_mean_zero():
    x = global_minimiser(class_mean_problem([7, 1, 3, 1], 3, lam_W=2e-3, lam_H=5e-4))
    assert float(jnp.mean(x.b)) == pytest.approx(0, abs=1e-14)
    assert np.any(x.b)


# Thresholds


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("counts", "pair"), [((10, 10, 10, 1, 1), (3, 4)), ((30, 8, 8, 1), (1, 2))])
def test_classes_of_a_size_merge_exactly_from_their_threshold_on(counts, pair, mode):
    """THEORY 3.4: while apart, p_kk − p_kj = 1 − Ns/√n_B; from Ns = √n_B on they are the same."""
    i, j = pair
    N, n, K = sum(counts), counts[i], len(counts)
    for factor in (0.3, 0.9, 0.99, 1.01, 1.5):
        s = factor * np.sqrt(n) / N
        problem = class_mean_problem(counts, K - 1, lam_W=2 * s, lam_H=s / 2, **bias(mode))
        x = global_minimiser(problem)
        c = certify(problem, x)
        excess = abs(float(c.gap)) + float(c.rounding)
        Z = logits(problem, x)
        p = jax.nn.softmax(Z, axis=0)
        if factor < 1:  # f is a smooth function of the pair's gap a: |f′| ≤ √(2 L excess), L ≤ n/N, f′ in units of n/N
            error = np.sqrt(2 * excess * N / n)
            assert float(p[i, i] - p[j, i]) == pytest.approx(1 - factor, abs=error)
            assert float(jnp.linalg.norm(x.W[i] - x.W[j])) > 1e-2
        else:  # f rises at least linearly in a, by √n s (1 − 1/factor)
            a = float(Z[i, i] - Z[j, i])
            assert abs(a) <= excess / (np.sqrt(n) * s * (1 - 1 / factor))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("counts", [(5, 2, 1), (10, 10, 1, 1)])
def test_everything_is_zero_exactly_from_the_collapse_threshold_on(counts, mode):
    K = len(counts)
    make = lambda s: class_mean_problem(counts, K - 1, lam_W=3 * s, lam_H=s / 3, **bias(mode))  # noqa: E731
    threshold = float(collapse_threshold(make(1.0)))
    n = np.asarray(counts, float)
    for factor in (0.5, 0.99, 1.01, 2.0):
        problem = make(factor * threshold)
        x = global_minimiser(problem)
        zero = Params(0 * x.W, 0 * x.H, x.b)
        if factor < 1:
            assert float(objective(problem, zero) - optimal_value(problem)) > 1e-7
        else:
            assert certify(problem, zero).verdict == Verdict.GLOBAL
            assert float(jnp.linalg.norm(x.W)) < 1e-6
            if mode == "free":
                assert float(optimal_value(problem)) == pytest.approx(
                    -np.sum(n / n.sum() * np.log(n / n.sum())), rel=1e-12
                )
            if mode == "absent":
                assert float(optimal_value(problem)) == pytest.approx(np.log(K), rel=1e-12)


# Bad input


class OtherLoss(CrossEntropy):
    """A loss that is not cross-entropy's own class."""


@pytest.mark.parametrize("call", [global_minimiser, optimal_value])
def test_what_is_not_covered_is_refused(call):
    with pytest.raises(ValueError, match="^d must be at least K - 1 = 3 for the global optimum, got 2$"):
        call(imbalanced([4, 3, 2, 1], 2, lam_W=0.1, lam_H=0.1))
    with pytest.raises(ValueError, match=r"^lam_W, lam_H or lam_b is traced"):
        jax.vmap(lambda lam: call(imbalanced([2, 1], 1, lam_W=lam, lam_H=0.1)))(jnp.ones(2))
    with pytest.raises(ValueError, match=r"^Y is traced"):
        jax.jit(call)(imbalanced([2, 1], 1, lam_W=0.1, lam_H=0.1))
