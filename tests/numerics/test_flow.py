"""The gradient flow against exact solutions: quadratics, blow-up, escapes, and gradient descent with small steps."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ufm.model.problem import balanced, init, objective
from ufm.numerics.dynamics import Fate, descend
from ufm.numerics.flow import distance, gradient_flow, left_ball, small_gradient

pytestmark = pytest.mark.usefixtures("hastily")

CURVATURES = np.array([-0.4, 0.3, 1.0, 4.0])
Q = np.linalg.qr(np.random.default_rng(0).normal(size=(4, 4)))[0]
CENTRE = jnp.array([1.0, -2.0, 30.0, 0.5])
OFFSET = Q @ np.array([0.1, 1.0, -2.0, 0.5])


def bowl(curvatures, centre, x):
    """Σ c_i y_i²/2 in the basis Q about the centre."""
    return jnp.sum(curvatures * ((x - centre) @ Q) ** 2) / 2


def exact(curvatures, offset, times):
    """x(t) − centre = Q e^{−ct} Qᵀ offset."""
    return np.exp(-np.outer(times, curvatures)) * (Q.T @ offset) @ Q.T


def identity(x):
    return x


SADDLE = functools.partial(bowl, jnp.asarray(CURVATURES), CENTRE)
MINIMUM = functools.partial(bowl, jnp.asarray(np.abs(CURVATURES)), CENTRE)


@pytest.mark.parametrize("rtol", [1e-4, 1e-8, 1e-11])
def test_a_quadratic_is_solved_exactly_to_the_tolerance(rtol):
    flow = gradient_flow(SADDLE, CENTRE + OFFSET, 3.0, rtol=rtol, atol=1e-3 * rtol)
    wanted = exact(CURVATURES, OFFSET, [3.0])[0]
    error = float(np.abs(flow.params - CENTRE - wanted).max())
    assert error < 10 * rtol
    assert (float(flow.time), int(flow.event), Fate(int(flow.fate))) == (3.0, -1, Fate.DESCENDED)
    assert float(flow.value) == pytest.approx(float(SADDLE(flow.params)), rel=1e-12)
    assert (flow.at.shape, flow.observed) == ((0,), None)


def test_records_are_the_exact_solution():
    times = np.array([0.0, 0.1, 0.5, 0.55, 2.0, 3.0])
    flow = gradient_flow(SADDLE, CENTRE + OFFSET, 3.0, at=times, observe=lambda x: {"x": x, "f": SADDLE(x)})
    path = exact(CURVATURES, OFFSET, times)
    np.testing.assert_array_equal(flow.at, times)
    np.testing.assert_allclose(flow.observed["x"] - CENTRE, path, atol=1e-6)  # between steps of order 5, order 4
    np.testing.assert_allclose(flow.observed["f"], (CURVATURES * (path @ Q) ** 2).sum(1) / 2, atol=1e-5)
    np.testing.assert_allclose(flow.params - CENTRE, path[-1], atol=1e-7)


@pytest.mark.parametrize("eps", [1e-1, 1e-5, 1e-9])
def test_a_ball_is_left_at_the_logarithm_of_its_radius(eps):
    """Along the unstable direction, from eps to r: log(r/eps)/|c|, also 1e-9 from a saddle 30 away from zero."""
    start = CENTRE + eps * Q[:, 0]
    given = float(distance(start, CENTRE))  # what rounding has left of eps
    assert given == pytest.approx(eps, rel=1e-5)
    flow = gradient_flow(SADDLE, start, 100.0, until=[left_ball(CENTRE, 0.5)])
    along = float(Q[:, 0] @ (start - CENTRE))
    assert float(flow.time) == pytest.approx(np.log(0.5 / along) / 0.4, rel=1e-3 if eps == 1e-9 else 1e-6)
    assert float(distance(flow.params, CENTRE)) == pytest.approx(0.5, rel=1e-6)
    assert (int(flow.event), Fate(int(flow.fate))) == (0, Fate.DESCENDED)


def test_the_first_of_several_events_stops_the_flow_and_records_after_it_are_nan():
    """The gradient of the least curvature, 0.3 e^{−0.3t}, is small before the ball about nowhere is left."""
    start = CENTRE + Q[:, 1]
    events = [left_ball(CENTRE, 2.0), small_gradient(MINIMUM, 0.1)]
    times = np.linspace(0, 8, 9)
    flow = gradient_flow(MINIMUM, start, 8.0, until=events, at=times, observe=identity)
    end = np.log(0.3 / 0.1) / 0.3
    assert float(flow.time) == pytest.approx(end, rel=1e-6)
    assert int(flow.event) == 1
    assert float(jnp.linalg.norm(jax.grad(MINIMUM)(flow.params))) == pytest.approx(0.1, rel=1e-6)
    before = times <= end
    assert 0 < before.sum() < 9
    path = exact(np.abs(CURVATURES), Q[:, 1], times[before])
    np.testing.assert_allclose(flow.observed[before] - CENTRE, path, atol=1e-6)
    assert np.isnan(flow.observed[~before]).all()
    other = gradient_flow(MINIMUM, start, 8.0, until=events[::-1], at=times, observe=identity)
    assert (int(other.event), float(other.time)) == (0, pytest.approx(end, rel=1e-6))


def test_an_event_that_does_not_come_is_none():
    flow = gradient_flow(MINIMUM, CENTRE + OFFSET, 1.0, until=[left_ball(CENTRE, 100.0)])
    assert (int(flow.event), float(flow.time)) == (-1, 1.0)
    np.testing.assert_allclose(flow.params - CENTRE, exact(np.abs(CURVATURES), OFFSET, [1.0])[0], atol=1e-7)


def test_what_starts_on_a_critical_point_stays_still():
    flow = gradient_flow(SADDLE, CENTRE, 10.0, until=[left_ball(CENTRE, 0.5)], at=[0.0, 5.0], observe=identity)
    assert (Fate(int(flow.fate)), int(flow.event), float(flow.time)) == (Fate.STILL, -1, 10.0)
    np.testing.assert_array_equal(flow.params, CENTRE)
    np.testing.assert_array_equal(flow.observed, jnp.stack([CENTRE, CENTRE]))


def hill(x):
    return -jnp.sum(x**4)


def test_what_blows_up_in_finite_time_is_named():
    """dx/dt = 4x³ from 1 is 1/√(1 − 8t), infinite at t = 1/8."""
    before = gradient_flow(hill, jnp.ones(1), 0.12)
    assert float(before.params[0]) == pytest.approx(1 / np.sqrt(1 - 8 * 0.12), rel=1e-6)
    assert Fate(int(before.fate)) == Fate.DESCENDED
    assert Fate(int(gradient_flow(hill, jnp.ones(1), 1.0).fate)) == Fate.STEP_LIMIT


def test_the_flow_is_the_limit_of_gradient_descent():
    """Euler's error is of the order of η: it halves with η, and Richardson's extrapolation is the flow."""
    problem = balanced(3, 2, 4, lam_W=2e-2, lam_H=1e-2)
    fun, start = functools.partial(objective, problem), init(problem, jax.random.key(0), scale=0.5)
    flow = gradient_flow(fun, start, 8.0, rtol=1e-10)
    half, whole = (descend(fun, start, optax.sgd(8.0 / steps), steps).params for steps in (1600, 800))
    error = [float(distance(x, flow.params)) for x in (half, whole)]
    assert error[1] / error[0] == pytest.approx(2, rel=2e-2)
    extrapolated = jax.tree.map(lambda a, b: 2 * a - b, half, whole)
    assert float(distance(extrapolated, flow.params)) < 1e-2 * error[0]


def test_vmap_goes_through_with_events():
    eps = jnp.array([1e-2, 1e-4])
    run = jax.vmap(lambda e: gradient_flow(SADDLE, CENTRE + e * Q[:, 0], 50.0, until=[left_ball(CENTRE, 0.5)]))
    np.testing.assert_allclose(run(eps).time, np.log(0.5 / eps) / 0.4, rtol=1e-5)


def test_single_precision_is_the_same_to_its_rounding():
    with jax.enable_x64(False):
        start = jnp.array([1e-3, 0.0])
        until = [left_ball(jnp.zeros(2), 0.5)]
        flow = gradient_flow(lambda x: (x[1] ** 2 - x[0] ** 2) / 2, start, 20.0, until=until, rtol=1e-5, atol=1e-9)
        assert flow.params.dtype == np.float32
        assert float(flow.time) == pytest.approx(np.log(500), rel=1e-4)
        still = gradient_flow(lambda x: (x[1] ** 2 - x[0] ** 2) / 2, 0 * start, 20.0, until=until, rtol=1e-5, atol=1e-9)
        assert (int(still.event), Fate(int(still.fate))) == (-1, Fate.STILL)
