"""A padded problem against the problem without padding: value, gradient, solver, certificate and closed forms."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from ufm.model.losses import CrossEntropy
from ufm.model.padding import padded
from ufm.model.problem import Params, Problem, balanced, class_mean_problem, init, objective
from ufm.numerics.minimise import minimise
from ufm.numerics.newton import polish
from ufm.theory.atlas import coarse_etf
from ufm.theory.bias import optimal_bias
from ufm.theory.certificate import certify
from ufm.theory.optimum import (
    balanced_minimiser,
    balanced_value,
    class_size,
    collapse_threshold,
    is_balanced,
    nonnegative_minimiser,
)

pytestmark = pytest.mark.usefixtures("hastily")

EPS = np.finfo(float).eps
LARGEST, D, N = 5, 5, 3  # d = largest: a null vector by QR without padding, by SVD with it
MODES = {"free": (0.0, True), "regularised": (1e-2, True), "absent": (0.0, False)}
FIELDS = ("value", "gap", "dual_norm", "grad_norm", "predicted_curvature", "measured_curvature", "drop")


def both(K, load, mode):
    """A padded problem and the same without padding, √(λ_W λ_H) at load times the collapse threshold."""
    s = load / (K * math.sqrt(N))
    lam_b, use_bias = MODES[mode]
    rest = {"lam_W": 3 * s, "lam_H": s / 3, "lam_b": lam_b, "use_bias": use_bias}
    return padded(K, N, D, largest=LARGEST, **rest), class_mean_problem([N] * K, D, **rest)


def cut(x, K):
    return Params(x.W[:K], x.H[:, :K], x.b[:K])


def grow(x):
    extra = LARGEST - len(x.b)
    return Params(jnp.pad(x.W, ((0, extra), (0, 0))), jnp.pad(x.H, ((0, 0), (0, extra))), jnp.pad(x.b, (0, extra)))


def assert_same(x, y, K, rtol=0.0):
    """x is y with zeros for the absent classes."""
    for a, b in zip(jax.tree.leaves(x), jax.tree.leaves(grow(y)), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=rtol * float(jnp.max(jnp.abs(b))))
    assert_zero_beyond(x, K)


def assert_zero_beyond(x, K):
    assert not any(np.any(part) for part in (x.W[K:], x.H[:, K:], x.b[K:]))


# The loss


@jax.jit
def parts(loss, Z, Y, weights):
    R = loss.residual(Z, Y)
    return loss(Z, Y), R, loss.conjugate(R, Y), loss.mean_hessian(Z, Y, weights)


@pytest.mark.parametrize("rubbish", [5.0, 1e308, -1e308, np.inf, -np.inf, np.nan])
def test_the_logits_of_an_absent_class_count_for_nothing(rubbish):
    rng = np.random.default_rng(0)
    Z, Y, weights = rng.normal(size=(3, 6)), np.eye(3)[:, rng.integers(0, 3, 6)], rng.random(6)
    more = np.pad(Z, ((0, 2), (0, 0)), constant_values=rubbish), np.pad(Y, ((0, 2), (0, 0)))
    value, R, conjugate, hessian = parts(CrossEntropy(), jnp.asarray(Z), Y, jnp.asarray(weights))
    expected = value, np.pad(R, ((0, 2), (0, 0))), conjugate, np.pad(hessian, (0, 2))
    got = parts(CrossEntropy(np.array([1.0, 1, 1, 0, 0])), jnp.asarray(more[0]), more[1], jnp.asarray(weights))
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=8 * EPS)


@pytest.mark.parametrize("size", [1.0, 1e5, 1e308])
def test_a_column_of_an_absent_class_stays_finite(size):
    Z = size * jnp.array([[1.0, -1], [-0.5, 0.5], [0.5, -1]])
    for values in parts(CrossEntropy(np.array([1.0, 1, 0])), Z, np.eye(3)[:, [2, 2]], jnp.zeros(2)):
        assert np.isfinite(values).all()


# The start


@pytest.mark.parametrize("K", [2, 4, LARGEST])
def test_a_start_is_that_of_the_problem_without_padding_and_zeros(K):
    with_padding, without = both(K, 0.3, "free")
    assert_same(init(with_padding, jax.random.key(5)), init(without, jax.random.key(5)), K)


# Everything measured at a point


def points(problem):
    K = problem.K
    random = init(problem, jax.random.key(0))
    found = {"optimum": balanced_minimiser(problem), "random": random, "origin": jax.tree.map(jnp.zeros_like, random)}
    if K == 4:
        found["saddle"] = coarse_etf(problem, 2)
    return found


@jax.jit
def measure(problem, x):
    return jax.grad(functools.partial(objective, problem))(x), certify(problem, x)


@pytest.mark.parametrize("K", [2, 4])
def test_gradient_and_certificate_at_optimum_origin_saddle_and_random_points(K):
    for mode in MODES if K == 2 else ("free", "regularised"):
        for load in (1e-3, 0.3, 1.0, 2.0):
            with_padding, without = both(K, load, mode)
            for where, x in points(without).items():
                (grad, c), (expected_grad, expected) = measure(with_padding, grow(x)), measure(without, x)
                assert_zero_beyond(grad, K)
                size = max(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(x)) + 1
                difference = ravel_pytree(jax.tree.map(jnp.subtract, cut(grad, K), expected_grad))[0]
                assert float(jnp.max(jnp.abs(difference))) <= 1e-14 * size
                assert int(c.code) == int(expected.code), (mode, load, where)
                assert float(expected.rounding) / 4 <= float(c.rounding) <= 4 * float(expected.rounding)
                assert_zero_beyond(c.direction, K)
                for name in FIELDS:
                    got, want = float(getattr(c, name)), float(getattr(expected, name))
                    relative_to = abs(want) if where == "random" else max(abs(want), float(expected.value))
                    assert abs(got - want) <= 1e-12 * relative_to, (mode, load, where, name)


@pytest.mark.parametrize("mode", ["free", "regularised"])
def test_a_solver_takes_the_same_steps_and_newton_ends_at_the_same_optimum(mode):
    K = 3
    with_padding, without = both(K, 0.1, mode)
    funs = [functools.partial(objective, problem) for problem in (with_padding, without)]
    start = init(with_padding, jax.random.key(1))
    solve = functools.partial(minimise, tol=0.0, max_steps=50)
    large, small = solve(funs[0], start), solve(funs[1], cut(start, K))
    assert int(large.steps) == int(small.steps) == 50
    assert float(large.value) == pytest.approx(float(small.value), rel=1e-12)
    assert_zero_beyond(large.params, K)
    end, other = polish(funs[0], large.params), polish(funs[1], small.params)
    assert float(end.value) == pytest.approx(float(other.value), rel=1e-12)
    assert float(end.value) == pytest.approx(float(balanced_value(with_padding)), rel=1e-12)
    assert_zero_beyond(end.params, K)


@pytest.mark.parametrize("lam_b", [0.0, 1e-3])
def test_the_best_bias_of_unequal_classes(lam_b):
    counts, present = np.array([5.0, 2, 1]), np.array([1.0, 1, 1, 0])
    rest = (0.1, 0.1, lam_b, D, True)
    with_padding = Problem(np.eye(4), np.append(counts, 0), CrossEntropy(present), *rest)
    without = Problem(np.eye(3), counts, CrossEntropy(), *rest)
    Z = jax.random.normal(jax.random.key(0), (3, 3))
    b = optimal_bias(with_padding, jnp.pad(Z, ((0, 1), (0, 1)), constant_values=7.0), jnp.zeros(4))
    np.testing.assert_allclose(b[:3], optimal_bias(without, Z, jnp.zeros(3)), atol=32 * EPS)
    assert float(b[3]) == 0


# Closed forms, with K traced


def test_one_program_gives_the_closed_forms_of_every_k():
    compilations = []

    @jax.jit
    def known(K, n, lam_W, lam_b):
        compilations.append(K)
        problem = padded(K, n, D, largest=LARGEST, lam_W=lam_W, lam_H=0.02, lam_b=lam_b)
        return balanced_minimiser(problem), balanced_value(problem), collapse_threshold(problem), problem.classes

    for K, n, lam_W, lam_b in [(2, 1, 1e-9, 0.0), (3, 7, 1e-2, 1e-2), (4, 2, 1e-3, 0.0), (5, 5, 9.0, 1.0)]:
        x, value, threshold, classes = known(K, n, lam_W, lam_b)
        without = class_mean_problem([n] * K, D, lam_W=lam_W, lam_H=0.02, lam_b=lam_b)
        assert_same(x, balanced_minimiser(without), K, rtol=1e-13)
        assert float(value) == pytest.approx(float(balanced_value(without)), rel=1e-13)
        assert float(threshold) == pytest.approx(1 / (K * math.sqrt(n)), rel=1e-13)
        assert int(classes) == K
    assert len(compilations) == 1


def test_vmap_over_k_and_lambda_certifies_every_optimum():
    K, lam = jnp.array([2, 3, 4, 5, 3]), jnp.array([1e-9, 1e-4, 1e-2, 0.5, 0.1])

    def cell(K, lam):
        problem = padded(K, N, D, largest=LARGEST, lam_W=lam, lam_H=lam / 2)
        return certify(problem, balanced_minimiser(problem)), balanced_value(problem)

    c, value = jax.vmap(cell)(K, lam)
    assert (c.code == 1).all()
    assert (jnp.abs(c.gap) <= 1e-12 * value).all()
    alone = [balanced_value(balanced(int(k), N, D, lam_W=v, lam_H=v / 2)) for k, v in zip(K, lam, strict=True)]
    np.testing.assert_allclose(c.value, alone, rtol=1e-12)


def test_sizes_count_the_classes_that_exist():
    problem = padded(3, 5, 6, largest=4, lam_W=0.1, lam_H=0.1)
    assert (problem.K, float(problem.classes), float(problem.total)) == (4, 3, 15)
    np.testing.assert_array_equal(problem.counts, [5, 5, 5, 0])
    plain = balanced(3, 5, 6, lam_W=0.1, lam_H=0.1)
    assert type(plain.classes) is int
    assert (plain.classes, plain.is_padded) == (3, False)


# Bad input


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"K": 1}, "^K must be a whole number of at least 2, got 1$"),
        ({"K": 5}, "^K must be at most largest = 4, got 5$"),
        ({"K": 2.5}, "^K must"),
        ({"K": True}, "^K must"),
        ({"K": None}, "^K must"),
        ({"K": [2, 3]}, r"^K must be a whole number .* got \[2, 3\]$"),
        ({"n": 0}, "^n must be a whole number of at least 1, got 0$"),
        ({"n": math.inf}, "^n must"),
        ({"n": math.nan}, "^n must"),
        ({"largest": 1}, "^largest must be an integer of at least 2, got 1$"),
        ({"largest": 4.0}, "^largest must"),
        ({"d": 0}, "^d must"),
        ({"lam_W": -1.0}, "^lam_W must"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_sizes_that_make_no_problem_are_refused(changed, match):
    good = {"K": 3, "n": 2, "d": 4, "largest": 4, "lam_W": 0.1, "lam_H": 0.1}
    with pytest.raises(ValueError, match=match):
        padded(**{**good, **changed})


@pytest.mark.parametrize(
    ("present", "multiplicity", "match"),
    [
        ([1, 0, 1], [2, 0, 2], "^present must be 3 entries, at least two ones and then zeros, got"),
        ([1, 0, 0], [2, 0, 0], "^present must"),
        ([1, 1, 0.5], [2, 2, 0], "^present must"),
        ([1, 1, math.nan], [2, 2, 0], "^present must"),
        ([1, 1], [2, 2, 0], "^present must"),
        ([1, 1, 0], [2, 2, 2], "^multiplicity must be positive.* zero where its class is absent$"),
        ([1, 1, 0], [2, 0, 0], "^multiplicity must"),
        ([1, 1, 0], [2, math.nan, 0], "^multiplicity must"),
        ([1, 1, 0], [2, 2, math.nan], "^multiplicity must"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_padding_that_does_not_fit_the_columns_is_refused(present, multiplicity, match):
    with pytest.raises(ValueError, match=match):
        Problem(np.eye(3), np.array(multiplicity), CrossEntropy(np.array(present, float)), 0.1, 0.1, 0.0, 3, True)


def test_what_takes_k_for_the_number_of_classes_refuses_padding():
    problem, without = both(3, 0.5, "free")
    rigorous = functools.partial(certify, params=grow(balanced_minimiser(without)), rigorous=True)
    for call in (is_balanced, class_size, nonnegative_minimiser, functools.partial(coarse_etf, partition=1), rigorous):
        with pytest.raises(ValueError, match=r"^the problem is padded"):
            call(problem)
    with pytest.raises(ValueError, match=r"^d must be at least K - 1 = 4"):
        balanced_minimiser(padded(2, N, 2, largest=LARGEST, lam_W=0.1, lam_H=0.1))
