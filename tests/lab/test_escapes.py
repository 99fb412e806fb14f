"""Measured escape times beside predicted ones, at the origin and a partition saddle, and the names of their ends."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

from ufm.lab import escapes as module
from ufm.lab.dense import dense_eigenvalues
from ufm.lab.escapes import Departure, Outcome, departure, flow_departure, random_start, steepest_start
from ufm.model.problem import balanced, objective
from ufm.numerics.dynamics import descend
from ufm.numerics.flow import distance
from ufm.theory.atlas import coarse_etf
from ufm.theory.rates import Method, escape_rate, escape_steps, escape_time, projection_loss, step_factor

LAMBDAS = {"lam_W": 2e-2, "lam_H": 1e-2}
PROBLEM = balanced(4, 2, 5, **LAMBDAS)
METHODS = [Method(0.5), Method(0.2, 0.9), Method(0.2, 0.9, True)]
RADIUS = 1e-2  # f is quadratic up to it to 1e-4
SADDLES = [1, 2]  # groups: the origin, and two pairs


@functools.cache
def curvature(groups, lam=1.0):
    """The least Hessian eigenvalue by brute force."""
    problem = balanced(4, 2, 5, lam_W=lam * 2e-2, lam_H=lam * 1e-2)
    return float(dense_eigenvalues(problem, coarse_etf(problem, groups))[0])


def steepest(groups, size, method, *, steps=120, problem=PROBLEM):
    saddle = coarse_etf(problem, groups)
    return departure(problem, saddle, steepest_start(problem, saddle, size), RADIUS, method, steps)


@pytest.mark.usefixtures("hastily")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("groups", SADDLES)
def test_the_steepest_escape_takes_the_predicted_steps_at_the_predicted_rate(groups, method):
    """Over distances at once; with momentum once the damped root, z₋/z₊ a step, has died away."""
    sizes, c = jnp.array([1e-4, 1e-5, 1e-6]), curvature(groups)
    found = jax.jit(jax.vmap(lambda size: steepest(groups, size, method)))(sizes)
    np.testing.assert_array_equal(found.outcome, Outcome.LEFT)
    np.testing.assert_allclose(found.time, escape_steps(c, sizes, RADIUS, method), rtol=1e-5)
    np.testing.assert_allclose(found.rate, escape_rate(c, method) * method.eta, rtol=5e-4)


@pytest.mark.usefixtures("hastily")
@pytest.mark.parametrize("groups", SADDLES)
def test_vmap_over_lambdas_and_step_sizes_is_predicted_too(groups):
    scales, etas = np.array([0.1, 1.0, 3.0]), np.array([0.3, 0.5, 0.6])

    def run(scale, eta):
        problem = balanced(4, 2, 5, lam_W=scale * 2e-2, lam_H=scale * 1e-2)
        return steepest(groups, 1e-4, Method(eta, 0.5), problem=problem)

    found = jax.jit(jax.vmap(run))(scales, etas)
    curvatures = np.array([curvature(groups, scale) for scale in scales])
    assert np.ptp(curvatures) > 0.02
    np.testing.assert_allclose(found.time, escape_steps(curvatures, 1e-4, RADIUS, Method(etas, 0.5)), rtol=1e-4)
    np.testing.assert_allclose(found.rate, escape_rate(curvatures, Method(etas, 0.5)) * etas, rtol=1e-3)


@pytest.mark.usefixtures("hastily")
@pytest.mark.parametrize("groups", SADDLES)
def test_the_flow_leaves_at_the_predicted_time(groups):
    saddle, c = coarse_etf(PROBLEM, groups), curvature(groups)
    start = steepest_start(PROBLEM, saddle, 1e-4)
    found = flow_departure(PROBLEM, saddle, start, RADIUS, 100.0)
    assert int(found.outcome) == Outcome.LEFT
    assert float(found.time) == pytest.approx(float(escape_time(c, 1e-4, RADIUS)), rel=1e-4)
    assert float(found.rate) == pytest.approx(-c, rel=1e-4)
    assert_not_left(flow_departure(PROBLEM, saddle, start, RADIUS, 0.9 * float(found.time)), Outcome.STAYED)
    assert_not_left(flow_departure(PROBLEM, saddle, saddle, RADIUS, 100.0), Outcome.ON_SADDLE)


@pytest.mark.usefixtures("hastily")
def test_the_steepest_start_is_an_eigenvector_away():
    for groups in SADDLES:
        saddle, c = coarse_etf(PROBLEM, groups), curvature(groups)
        start = steepest_start(PROBLEM, saddle, 1e-3)
        assert float(distance(start, saddle)) == pytest.approx(1e-3, rel=1e-12)
        v = jax.tree.map(lambda a, b: (a - b) / 1e-3, start, saddle)
        product = jax.jvp(jax.grad(functools.partial(objective, PROBLEM)), (saddle,), (v,))[1]
        np.testing.assert_allclose(ravel_pytree(product)[0], c * ravel_pytree(v)[0], atol=1e-12)


def assert_not_left(found: Departure, outcome):
    assert int(found.outcome) == outcome
    assert np.isnan([found.time, found.rate]).all()


@pytest.mark.usefixtures("hastily")
def test_too_few_steps_stay():
    whole = steepest(2, 1e-4, METHODS[0])
    enough = int(np.ceil(whole.time))
    assert_not_left(steepest(2, 1e-4, METHODS[0], steps=enough - 1), Outcome.STAYED)
    last = steepest(2, 1e-4, METHODS[0], steps=enough)
    assert float(last.time) == pytest.approx(float(whole.time), rel=1e-10)
    assert float(last.rate) == pytest.approx(float(whole.rate), rel=1e-10)


@pytest.mark.usefixtures("hastily")
def test_a_start_on_the_saddle_is_named_even_where_rounding_would_escape():
    for groups in SADDLES:
        saddle = coarse_etf(PROBLEM, groups)
        assert_not_left(departure(PROBLEM, saddle, saddle, RADIUS, METHODS[0], 600), Outcome.ON_SADDLE)
    near = steepest_start(PROBLEM, saddle, 4 * np.finfo(float).eps)
    assert 0 < float(distance(near, saddle)) < 1e-15
    assert_not_left(departure(PROBLEM, saddle, near, RADIUS, METHODS[0], 600), Outcome.ON_SADDLE)
    escaped = descend(functools.partial(objective, PROBLEM), near, optax.sgd(*METHODS[0]), 600)
    assert float(distance(escaped.params, saddle)) > RADIUS
    just_off = steepest_start(PROBLEM, saddle, 1e-12)
    assert int(departure(PROBLEM, saddle, just_off, RADIUS, METHODS[0], 600).outcome) == Outcome.LEFT


@pytest.mark.usefixtures("hastily")
@pytest.mark.parametrize("groups", SADDLES)
def test_steps_far_too_large_are_named_and_have_no_time(groups):
    """One step of 10⁷ goes where f is higher, one of 10¹⁶⁰ where it overflows."""
    etas = jnp.array([0.5, 1e7, 1e160])
    found = jax.jit(jax.vmap(lambda eta: steepest(groups, 1e-4, Method(eta), steps=70)))(etas)
    assert found.outcome.tolist() == [Outcome.LEFT, Outcome.DIVERGED, Outcome.NOT_FINITE]
    assert np.isfinite(found.time).tolist() == np.isfinite(found.rate).tolist() == [True, False, False]


@pytest.mark.usefixtures("hastily")
@pytest.mark.parametrize("groups", SADDLES)
def test_a_saddle_is_left_though_f_rises_far_beyond_it(groups):
    """With a step too large for what lies beyond, the ball is left downhill and on time, and only then f rises."""
    method, saddle = Method(150.0), coarse_etf(PROBLEM, groups)
    start = steepest_start(PROBLEM, saddle, 1e-4)
    found = departure(PROBLEM, saddle, start, RADIUS, method, 70)
    assert int(found.outcome) == Outcome.LEFT
    run = descend(functools.partial(objective, PROBLEM), start, optax.sgd(*method), 70)
    assert not float(run.value) < float(run.start_value)
    assert float(found.time) == pytest.approx(float(escape_steps(curvature(groups), 1e-4, RADIUS, method)), rel=1e-2)


@pytest.mark.usefixtures("hastily")
@pytest.mark.parametrize("use_bias", [True, False])
def test_random_starts_are_at_their_distance_and_isotropic(use_bias):
    """Uniform on the sphere of D dimensions: each entry has mean square 1/D, and entries are uncorrelated."""
    problem = balanced(3, 2, 3, **LAMBDAS, use_bias=use_bias)
    saddle = coarse_etf(problem, 3)
    D, number = 3 * 3 + 3 * 6 + 3 * use_bias, 2000
    draw = jax.jit(jax.vmap(functools.partial(random_start, problem, saddle, 0.3)))
    starts = draw(jax.random.split(jax.random.key(0), number))
    moved = [np.reshape(a - c, (number, -1)) for a, c in zip(*map(jax.tree.leaves, (starts, saddle)), strict=True)]
    away = np.concatenate(moved, axis=1)
    np.testing.assert_allclose(np.linalg.norm(away, axis=1), 0.3, rtol=1e-12)
    assert (away[:, 27:] == 0).all() == (not use_bias)
    x = np.asarray(away[:, :D]) / 0.3
    z = np.sqrt(number * D) * x.mean(0)
    second = np.sqrt(number) * D * (x.T @ x / number - np.eye(D) / D)
    variance = (1 + np.eye(D)) * D / (D + 2) - np.eye(D)  # of x_i x_j D on the sphere
    zz = (second / np.sqrt(variance))[np.triu_indices(D)]
    for normal in (z, zz):
        assert np.abs(normal).max() < 4.5
        assert normal.std() == pytest.approx(1, rel=4 / np.sqrt(2 * normal.size))


@pytest.mark.usefixtures("hastily")
def test_random_starts_take_the_predicted_time_on_average():
    """At the origin of equal counts the (K − 1)d unstable eigenvalues are equal, so the law is exact."""
    origin, method, number = coarse_etf(PROBLEM, 1), METHODS[0], 200

    def run(key):
        return departure(PROBLEM, origin, random_start(PROBLEM, origin, 1e-6, key), RADIUS, method, 250)

    found = jax.jit(jax.vmap(run))(jax.random.split(jax.random.key(0), number))
    np.testing.assert_array_equal(found.outcome, Outcome.LEFT)
    mean, deviation = projection_loss(3 * 5, 4 * 5 + 5 * 8 + 4)
    log_factor = np.log(float(step_factor(curvature(1), method)))
    lost = np.asarray(found.time) * log_factor - np.log(RADIUS / 1e-6)
    assert lost.mean() == pytest.approx(float(mean), abs=3 * float(deviation) / np.sqrt(number))
    assert lost.std() == pytest.approx(float(deviation), rel=4 / np.sqrt(2 * number))
    assert float(mean) > 10 * float(deviation) / np.sqrt(number)  # a start along the escape would be told apart
    np.testing.assert_allclose(found.rate, log_factor, rtol=1e-3)


def test_a_crossing_is_interpolated_between_steps():
    """Steps of a hand-made path: left by the first crossing, at any depth of the record."""
    logs, levels = jnp.array([0.0, 1.0, 3.0, 2.0, 4.0]), jnp.array([0.5, 1.0, 2.5, 3.5])
    assert [float(module._crossing(logs, level)) for level in levels] == [0.5, 1.0, 1.75, 3.75]
    assert np.isnan(float(module._crossing(logs, jnp.asarray(4.0))))
