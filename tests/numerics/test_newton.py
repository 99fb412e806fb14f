"""Newton's method with conjugate gradients: the rate of an inexact Newton method, and no harm where it cannot help."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ufm.model.problem import Params, balanced, init, objective
from ufm.numerics.minimise import Status, minimise
from ufm.numerics.newton import polish
from ufm.theory.optimum import balanced_minimiser

EPS = np.finfo(float).eps


def logistic(x):
    """Strictly convex and not quadratic."""
    return jnp.sum(jnp.logaddexp(0, 3 * x)) - x @ jnp.arange(1.0, 6) / 4 + jnp.sum(x**2) / 20


def test_each_step_divides_the_gradient_by_the_forcing_term():
    """Inexact Newton: ‖g⁺‖ ≤ η ‖g‖ + O(‖g‖²) with η = 1e-3, the tolerance of the conjugate gradients."""
    x = minimise(logistic, jnp.zeros(5), tol=1e-3).params
    norms = [float(polish(logistic, x, max_steps=k).grad_norm) for k in range(4)]
    assert norms[0] == pytest.approx(float(jnp.linalg.norm(jax.grad(logistic)(x))), rel=1e-12)
    for before, after in itertools.pairwise(norms):
        assert after <= 1e-3 * before + 10 * before**2 + 64 * EPS
    assert norms[3] < 1e-12


def test_a_quadratic_is_solved_in_as_many_steps_as_the_digits_need():
    A = jnp.diag(jnp.arange(1.0, 6))
    found = polish(lambda x: x @ A @ x / 2 - jnp.sum(x), jnp.zeros(5), tol=1e-12)
    assert (Status(int(found.status)), bool(found.converged)) == (Status.CONVERGED, True)
    assert int(found.steps) <= 5
    np.testing.assert_allclose(found.params, 1 / jnp.arange(1.0, 6), atol=1e-12)


def test_rounding_is_reached_where_minimise_stops_and_orbits_do_no_harm():
    """At the UFM's optimum the Hessian is singular along rotations."""
    problem = balanced(3, 2, 4, lam_W=2e-2, lam_H=1e-2)
    fun = functools.partial(objective, problem)
    rough = minimise(fun, init(problem, jax.random.key(0)), tol=1e-5)
    fine = polish(fun, rough.params)
    assert Status(int(fine.status)) == Status.STALLED
    assert float(fine.grad_norm) < 1e-14 < float(rough.grad_norm)
    closed = balanced_minimiser(problem)
    np.testing.assert_allclose(fine.params.W @ fine.params.W.T, closed.W @ closed.W.T, atol=1e-11)
    assert isinstance(fine.params, Params)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0, 1e100])
def test_the_gradient_never_grows(scale):
    """From anywhere, also where Newton's method diverges: a step that does not halve it is not taken."""
    fun = lambda x: jnp.sum(jnp.sqrt(1 + x**2)) + jnp.sum(jnp.cos(x)) / 2  # noqa: E731
    start = scale * jax.random.normal(jax.random.key(0), (8, 5))
    found = jax.vmap(lambda x: polish(fun, x))(start)
    before = jax.vmap(lambda x: jnp.linalg.norm(jax.grad(fun)(x)))(start)
    assert (found.grad_norm <= before * (1 + 4 * EPS)).all()
    unmoved = found.steps == 0
    np.testing.assert_array_equal(found.params[unmoved], start[unmoved])
    assert set(np.asarray(found.status)) <= {Status.STALLED, Status.CONVERGED, Status.STEP_LIMIT}


def test_ends_are_named():
    at_minimum = polish(logistic, minimise(logistic, jnp.zeros(5), tol=1e-9).params, tol=1e-8)
    assert (int(at_minimum.steps), Status(int(at_minimum.status))) == (0, Status.CONVERGED)
    limited = polish(logistic, jnp.zeros(5), max_steps=1)
    assert (int(limited.steps), Status(int(limited.status))) == (1, Status.STEP_LIMIT)
    broken = polish(logistic, jnp.full(5, jnp.nan))
    assert Status(int(broken.status)) == Status.NOT_FINITE


def test_new_data_compiles_nothing_new_and_jit_and_map_go_through():
    traces = []

    def fun(c, x):
        traces.append(1)
        return jnp.sum(jnp.cosh(x - c))

    first = polish(functools.partial(fun, jnp.array([0.1, 0.2])), jnp.zeros(2))
    count = len(traces)
    second = polish(functools.partial(fun, jnp.array([0.3, -0.2])), jnp.zeros(2))
    assert len(traces) == count > 0
    np.testing.assert_allclose(first.params, [0.1, 0.2], atol=1e-14)
    np.testing.assert_allclose(second.params, [0.3, -0.2], atol=1e-14)
    centres = jnp.array([[0.1, 0.2], [0.3, -0.2]])
    mapped = jax.jit(lambda cs: jax.lax.map(lambda c: polish(functools.partial(fun, c), jnp.zeros(2)), cs))(centres)
    np.testing.assert_allclose(mapped.params, centres, atol=1e-14)
