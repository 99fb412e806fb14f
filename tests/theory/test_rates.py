"""Rates against iterated 2×2 matrices, dense eigenvalues, random starts and measured trajectories."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

from ufm.lab.dense import dense_eigenvalues
from ufm.model.problem import Params, balanced, imbalanced, init, logits, objective
from ufm.numerics.dynamics import descend
from ufm.numerics.flow import distance
from ufm.theory.atlas import coarse_etf
from ufm.theory.escape import escape_direction
from ufm.theory.optimum import balanced_minimiser, balanced_value
from ufm.theory.rates import (
    Method,
    escape_rate,
    escape_steps,
    escape_time,
    log_factor,
    projection_loss,
    separation,
    step_factor,
    step_limit,
    steps_to_gap,
    terminal_rate,
)
from ufm.theory.spectrum import hessian_spectrum

pytestmark = pytest.mark.usefixtures("hastily")

METHODS = [Method(0.3), Method(0.3, 0.9), Method(0.3, 0.9, True), Method(0.3, 0.4), Method(0.3, 0.4, True)]
CURVATURES = np.array([-2.0, -0.5, -1e-3, 1e-3, 0.05, 0.4, 2.0, 3.0, 4.1])  # real and complex roots


def update(curvature, method):
    """(x, m) after a step: m ← cx + βm, x ← x − ηm or x − η(cx + βm)."""
    eta, beta, nesterov = method
    m = np.array([curvature, beta])
    x = np.array([1.0, 0.0]) - eta * (np.array([curvature, 0.0]) + beta * m if nesterov else m)
    return np.array([x, m])


def radius(curvature, method):
    return np.abs(np.linalg.eigvals(update(curvature, method))).max()


def sgd(method):
    return optax.sgd(*method)


@pytest.mark.parametrize("method", METHODS)
def test_a_step_multiplies_by_the_spectral_radius(method):
    wanted = [radius(c, method) for c in CURVATURES]
    np.testing.assert_allclose(step_factor(CURVATURES, method), wanted, rtol=1e-12)
    np.testing.assert_allclose(escape_rate(CURVATURES, method), np.log(wanted) / 0.3, rtol=1e-12, atol=1e-12)
    if method.momentum == 0:
        np.testing.assert_allclose(wanted, np.abs(1 - 0.3 * CURVATURES), rtol=1e-14)


def test_the_curvatures_have_real_and_complex_roots():
    kinds = {np.iscomplexobj(np.linalg.eigvals(update(c, m))) for m in METHODS[1:] for c in CURVATURES if c > 0}
    assert kinds == {True, False}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("curvature", [-2.0, -0.5, -0.05])
def test_the_escape_reaches_a_radius_when_the_recursion_does(method, curvature):
    """From rest, with its prefactor: |x_k| is reached after k steps."""
    state, size = np.array([1e-9, 0.0]), []
    for _ in range(300):
        state = update(curvature, method) @ state
        size.append(state[0])
    k = np.arange(1, 301)
    np.testing.assert_allclose(escape_steps(curvature, 1e-9, np.array(size), method)[200:], k[200:], rtol=1e-10)
    if method.momentum == 0:
        np.testing.assert_allclose(escape_steps(curvature, 1e-9, np.array(size), method), k, rtol=1e-10)


@pytest.mark.parametrize("curvature", [-2.0, -0.05])
def test_small_steps_are_the_flow_and_momentum_runs_faster(curvature):
    time = float(escape_time(curvature, 1e-8, 1e-3))
    assert time == pytest.approx(np.log(1e5) / -curvature, rel=1e-14)
    for beta, nesterov in [(0.0, False), (0.9, False), (0.9, True)]:
        errors = []
        for eta in (1e-4, 1e-5):
            method, small = Method(eta, beta, nesterov), 2 * eta * abs(curvature) / (1 - beta) ** 2
            assert float(escape_rate(curvature, method)) == pytest.approx(-curvature / (1 - beta), rel=small)
            steps = float(escape_steps(curvature, 1e-8, 1e-3, method))
            errors.append(abs(steps * eta / (1 - beta) / time - 1))
            assert errors[-1] < small
        assert errors[1] == pytest.approx(errors[0] / 10, rel=0.1)  # of the order of η


@pytest.mark.parametrize("method", METHODS)
def test_the_step_limit_is_where_the_spectral_radius_passes_one(method):
    largest = 4.0
    limit = float(step_limit(largest, method))
    assert radius(largest, method._replace(eta=limit)) == pytest.approx(1, abs=1e-12)
    assert np.linalg.eigvals(update(largest, method._replace(eta=limit))).min() == pytest.approx(-1, abs=1e-12)
    assert radius(largest, method._replace(eta=limit * (1 + 1e-4))) > 1 + 1e-5
    below = method._replace(eta=limit * (1 - 1e-4))
    assert max(radius(c, below) for c in np.linspace(1e-3, largest, 200)) < 1


SHAPES = [(3, 2, 3, 0.08, 0.05, {"lam_b": 0.1}), (4, 1, 5, 0.05, 0.05, {}), (2, 3, 2, 0.1, 0.05, {"use_bias": False})]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_terminal_factor_is_the_largest_radius_over_dense_eigenvalues_off_the_orbit(shape, method):
    K, n, d, lam_W, lam_H, kind = shape
    problem = balanced(K, n, d, lam_W=lam_W, lam_H=lam_H, **kind)
    spectrum = hessian_spectrum(problem)
    dense = dense_eigenvalues(problem, balanced_minimiser(problem))
    across = np.sort(np.abs(dense))[int(spectrum.orbit_dimension) :]
    assert len(across) == len(dense) - spectrum.orbit_dimension > 0
    assert np.abs(across).min() > 1e-3 > 1e-12 > np.sort(np.abs(dense))[int(spectrum.orbit_dimension) - 1]
    wanted = max(radius(c, method) for c in across)
    assert float(jnp.exp(-terminal_rate(spectrum, method))) == pytest.approx(wanted, rel=1e-10)
    if method.momentum == 0:
        assert wanted == pytest.approx(1 - 0.3 * across.min(), rel=1e-12)


def slope(y, first):
    """Of a straight line through y from `first` on."""
    return np.polyfit(np.arange(first, len(y)), y[first:], 1)[0]


@pytest.mark.parametrize("method", [Method(3.0), Method(2.0, 0.3), Method(3.0, 0.5), Method(2.0, 0.3, True)])
def test_descent_ends_at_the_terminal_rate(method):
    """‖∇f‖ falls by the factor a step and f − f* by its square; logarithms are averaged over random starts."""
    K, n, d, lam_W, lam_H, kind = SHAPES[0]
    problem = balanced(K, n, d, lam_W=lam_W, lam_H=lam_H, **kind)
    fun, optimum = functools.partial(objective, problem), balanced_minimiser(problem)
    factor = float(jnp.exp(-terminal_rate(hessian_spectrum(problem), method)))

    def run(key):
        start = jax.tree.map(jnp.add, optimum, init(problem, key, scale=1e-2))
        observe = lambda x: (jnp.log(optax.tree.norm(jax.grad(fun)(x))), fun(x) - balanced_value(problem))  # noqa: E731
        return descend(fun, start, sgd(method), 80, observe=observe).observed

    grad, gap = (np.asarray(a) for a in jax.vmap(run)(jax.random.split(jax.random.key(0), 32)))
    assert slope(grad.mean(0), 40) == pytest.approx(np.log(factor), rel=1e-2)
    late = 40 if factor > 0.8 else 20  # where the gap is above the rounding of f, and early the next eigenvalue gone
    assert gap[:, : late + 1].min() > 1e-13
    now, then = np.exp(np.log(gap[:, [late // 2, late]]).mean(0))
    assert float(steps_to_gap(-np.log(factor), now, then)) == pytest.approx(late / 2, rel=5e-2)


def gradient_at(problem, x):
    return problem.loss.residual(logits(problem, x), problem.Y)


SADDLES = [(2, 1, Method(0.5)), (3, 1, Method(0.3, 0.6)), (4, 2, Method(0.5)), (4, 2, Method(0.3, 0.6, True))]


def saddle(K, m):
    """m = 1 is the origin."""
    problem = balanced(K, 2, K + 1, lam_W=3e-2, lam_H=2e-2, lam_b=1e-2)
    x = coarse_etf(problem, m)
    spectrum = hessian_spectrum(problem, "origin" if m == 1 else coarse_partition(K, m))
    return problem, x, float(np.min(spectrum.eigenvalues))


def coarse_partition(K, m):
    return np.arange(K).reshape(m, -1).tolist()


def left_at(size, radius):
    """The fractional step at which the distance passes the radius, its logarithm interpolated."""
    after = int(np.argmax(size > radius))
    assert after > 0
    below, above = np.log(size[after - 1]), np.log(size[after])
    return after - 1 + (np.log(radius) - below) / (above - below)


def distances(problem, x, starts, method, steps):
    """‖x_k − saddle‖ from each start."""

    def run(start):
        moved = descend(functools.partial(objective, problem), start, sgd(method), steps, observe=away)
        return moved.observed

    def away(y):
        return distance(y, x)

    return np.asarray(jax.vmap(run)(starts))


@pytest.mark.parametrize(("K", "m", "method"), SADDLES)
def test_a_saddle_is_left_after_the_predicted_steps_and_later_where_the_ball_is_large(K, m, method):
    problem, x, curvature = saddle(K, m)
    unit = escape_direction(problem, x, gradient_at(problem, x))
    eps = 10.0 ** np.arange(-9, -4)
    starts = jax.vmap(lambda e: jax.tree.map(lambda a, u: a + e * u, x, unit))(jnp.asarray(eps))
    size = distances(problem, x, starts, method, 500)
    predicted = [float(escape_steps(curvature, e, 1e-3, method)) for e in eps]
    measured = [left_at(row, 1e-3) for row in size]
    np.testing.assert_allclose(measured, predicted, rtol=1e-4 if method.momentum == 0 else 1e-3)
    np.testing.assert_allclose(-np.diff(measured), np.log(10) / np.log(step_factor(curvature, method)), rtol=1e-3)
    far = 0.9 * size[-1].max()
    assert left_at(size[-1], far) > 1.1 * float(escape_steps(curvature, eps[-1], far, method))


def test_a_random_start_loses_its_projection():
    """At the origin of equal counts all (K−1)d unstable eigenvalues are equal, so that the loss is exact."""
    problem, x, curvature = saddle(3, 1)
    method, variables = Method(0.5), ravel_pytree(x)[0].size
    starts = jax.vmap(lambda key: init(problem, key, scale=1e-8))(jax.random.split(jax.random.key(1), 200))
    size = distances(problem, x, starts, method, 250)
    rate = np.log(float(step_factor(curvature, method)))
    predicted = [float(escape_steps(curvature, row[0], 1e-3, method)) for row in size]
    lost = (np.array([left_at(row, 1e-3) for row in size]) - predicted) * rate
    mean, spread = (float(a) for a in projection_loss(2 * problem.d, variables))
    assert np.abs(lost.mean() - mean) < 4 * spread / np.sqrt(200)
    assert lost.std() == pytest.approx(spread, rel=0.25)
    assert mean > 10 * spread / np.sqrt(200)  # the test would see a loss of zero


@pytest.mark.parametrize(("m", "D"), [(1, 5), (8, 35), (30, 40)])
def test_the_projection_loss_is_that_of_random_vectors(m, D):
    x = np.random.default_rng(0).normal(size=(40_000, D))
    loss = np.log(np.linalg.norm(x, axis=1) / np.linalg.norm(x[:, :m], axis=1))
    mean, spread = (float(a) for a in projection_loss(m, D))
    assert np.abs(loss.mean() - mean) < 4 * spread / 200
    assert loss.std() == pytest.approx(spread, rel=3e-2)


def test_the_projection_loss_where_the_cosine_is_uniform_or_nothing_is_lost():
    """‖Px‖²/‖x‖² uniform for a plane of four, ‖Px‖/‖x‖ for a line of three: −log U has mean and deviation 1."""
    np.testing.assert_allclose(projection_loss(2, 4), [0.5, 0.5], rtol=1e-12)
    np.testing.assert_allclose(projection_loss(1, 3), [1, 1], rtol=1e-12)
    np.testing.assert_allclose(projection_loss(np.array([1, 7]), np.array([1, 7])), 0, atol=1e-12)


def test_where_nothing_escapes_or_nothing_converges_the_steps_are_infinite():
    for method in METHODS:
        assert np.isinf(escape_steps(np.array([0.0, 0.1, 3.0]), 1e-8, 1e-3, method)).all()
    assert np.isinf(escape_time(np.array([0.0, 0.1]), 1e-8, 1e-3)).all()
    assert float(escape_time(-1.0, 1e-2, 1e-3)) == float(escape_steps(-1.0, 1e-2, 1e-3, METHODS[0])) == 0
    assert np.isinf(steps_to_gap(np.array([0.0, -0.5]), 1e-2, 1e-8)).all()
    np.testing.assert_allclose(
        steps_to_gap(-np.log(0.9), 1.0, 0.9 ** np.array([-4.0, 0.0, 2.0, 20.0])), [0, 0, 1, 10], atol=1e-12
    )


def test_at_the_threshold_the_approach_is_algebraic():
    """κ = 1: the curvature at the origin is 0 and 1/‖x‖² grows by a constant a step, as for ẏ = −a y³."""
    lam = 1 / (3 * np.sqrt(2))
    problem = balanced(3, 2, 4, lam_W=lam, lam_H=lam, lam_b=0.1)
    method, origin = Method(1.0), jax.tree.map(jnp.zeros_like, init(problem, jax.random.key(0)))
    spectrum = hessian_spectrum(problem, "origin")
    assert float(np.min(spectrum.eigenvalues)) == pytest.approx(0, abs=1e-16)
    assert np.isinf(escape_steps(0.0, 1e-8, 1e-3, method))
    rate = float(terminal_rate(hessian_spectrum(problem), method))
    assert (rate, float(steps_to_gap(rate, 1.0, 1e-3))) == (0.0, np.inf)
    start = escape_direction(problem, origin, gradient_at(problem, origin))
    size = distances(problem, origin, jax.tree.map(lambda a: a[None], start), method, 6000)[0]
    steps = np.diff(1 / size[[2000, 4000, 6000]] ** 2)
    assert steps[1] == pytest.approx(steps[0], rel=1e-2)
    assert size[6000] / size[4000] == pytest.approx(np.sqrt(4000 / 6000), rel=2e-2)


UNEQUAL = imbalanced((20, 20, 2, 2), 6, lam_W=1e-2, lam_H=1e-2)


@pytest.mark.parametrize("kind", [{}, {"lam_b": 0.1}, {"use_bias": False}])
def test_contrasts_are_the_negative_levels_of_the_origin(kind):
    problem = imbalanced((20, 20, 2, 2), 6, lam_W=2e-2, lam_H=1e-2, **kind)
    found = separation(problem)
    levels = [v for v, _, label in hessian_spectrum(problem, "origin").levels() if "W, H, 1 of 2" in label]
    np.testing.assert_allclose(found.curvatures, levels, rtol=1e-12)
    assert (np.diff(found.curvatures) >= -1e-15).all()
    U = np.asarray(found.contrasts)
    np.testing.assert_allclose(U.T @ U, np.eye(3), atol=1e-12)
    np.testing.assert_allclose(U.sum(0), 0, atol=1e-12)
    np.testing.assert_allclose(np.abs(U[:, 0]), [np.sqrt(0.5), np.sqrt(0.5), 0, 0], atol=1e-12)
    np.testing.assert_allclose(np.abs(U[:, 2]), [0, 0, np.sqrt(0.5), np.sqrt(0.5)], atol=1e-12)
    np.testing.assert_allclose(found.sizes, [20, 11, 2], rtol=1e-12)
    within = [15e-3 - np.hypot(5e-3, np.sqrt(n) / 44) for n in (20, 2)]  # σ = √n_B/N
    np.testing.assert_allclose(found.curvatures[jnp.array([0, 2])], within, rtol=1e-12)


def contrast(x, classes):
    """‖uᵀW + Hv‖/√2, the component along the unstable direction of the contrast between two classes (λ_W = λ_H)."""
    i, j = classes
    Y = UNEQUAL.Y
    v = (Y[i] - Y[j]) / np.sqrt(Y[i].sum() + Y[j].sum())
    return jnp.linalg.norm((x.W[i] - x.W[j]) / np.sqrt(2) + x.H @ v) / np.sqrt(2)


def test_small_classes_separate_at_their_time_although_large_ones_have_before():
    method, found = Method(1.0), separation(UNEQUAL)
    x = init(UNEQUAL, jax.random.key(0), scale=1e-8)
    start = Params(x.W, x.H, jnp.log(jnp.asarray(UNEQUAL.counts) / 44))
    observe = lambda x: (contrast(x, (0, 1)), contrast(x, (2, 3)))  # noqa: E731
    run = descend(functools.partial(objective, UNEQUAL), start, sgd(method), 1200, observe=observe)
    large, small = (np.asarray(a) for a in run.observed)
    first, last = left_at(large, 1e-2), left_at(small, 1e-2)
    assert first == pytest.approx(float(escape_steps(found.curvatures[0], large[0], 1e-2, method)), rel=1e-2)
    assert last == pytest.approx(float(escape_steps(found.curvatures[2], small[0], 1e-2, method)), rel=4e-2)
    assert last > 3 * first
    assert large[int(last)] > 0.5  # separated long before


@pytest.mark.parametrize("method", [Method(0.1), Method(0.1, 0.9), Method(0.1, 0.999), Method(0.1, 0.9, True)])
@pytest.mark.parametrize("curvature", [-1e-5, -1e-8, 1e-8])
def test_rates_keep_their_digits_where_a_step_changes_little(method, curvature):
    """In float32, where 1 + η|c| is 1, what the quadratic formula gives in extended precision."""
    a, beta = np.longdouble(-0.1 * curvature), np.longdouble(method.momentum)
    p = 1 - beta - a * (1 + beta * method.nesterov)
    wanted = float(np.log1p((-p + np.sqrt(p**2 + 4 * a)) / 2))
    with jax.enable_x64(False):
        found = float(log_factor(jnp.float32(curvature), method))
        steps = float(escape_steps(jnp.float32(curvature), 1e-8, 1e-3, method))
    assert found == pytest.approx(wanted, rel=2e-3)
    assert steps == (pytest.approx(np.log(1e5) / wanted, rel=0.05) if curvature < 0 else np.inf)  # A differs from 1


@pytest.mark.parametrize("nesterov", [False, True])
def test_a_step_multiplies_by_the_larger_root_on_either_side_of_every_limit(nesterov):
    for beta in (0.0, 0.1, 0.5, 0.9, 0.99):
        for step in np.linspace(-3, 5, 161):  # ηc
            shrink = (1 + beta) * (1 - step) if nesterov else 1 + beta - step
            roots = np.roots([1, -shrink, beta * (1 - step) if nesterov else beta])
            found = float(step_factor(step, Method(1.0, beta, nesterov)))
            assert found == pytest.approx(np.abs(roots).max(), rel=1e-6, abs=1e-7), (beta, step)  # double roots: √eps
