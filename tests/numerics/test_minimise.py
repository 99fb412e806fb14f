"""L-BFGS against SciPy and closed forms, every way of ending, and what transformations and data it goes through."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

from ufm.model.problem import balanced, init, objective
from ufm.numerics.minimise import Solution, Status, as_pytree_function, minimise

EPS = np.finfo(float).eps


def rosenbrock(x):
    return jnp.sum(100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2)


def quadratic(A, c, x):
    return x @ A @ x / 2 - c @ x


def spd(seed, d=6, condition=1e3):
    Q = jnp.linalg.qr(jax.random.normal(jax.random.key(seed), (d, d)))[0]
    return Q * jnp.geomspace(1, condition, d) @ Q.T


@pytest.mark.parametrize("start", [[-1.2, 1.0], [0.0, 0.0], [3.0, -4.0, 2.0, 1.0, 0.5]])
def test_rosenbrock_ends_where_scipy_does(start):
    found = minimise(rosenbrock, jnp.array(start), tol=1e-9)
    scipys = scipy.optimize.minimize(scipy.optimize.rosen, start, jac=scipy.optimize.rosen_der, method="L-BFGS-B",
                                     options={"ftol": 0, "gtol": 1e-10})  # fmt: skip
    assert bool(found.converged)
    assert float(found.grad_norm) <= 1e-9
    np.testing.assert_allclose(found.params, scipys.x, atol=1e-8)
    np.testing.assert_allclose(found.params, 1, atol=1e-8)


def test_a_quadratic_ends_at_its_linear_solve():
    A, c = spd(0), jax.random.normal(jax.random.key(1), (6,))
    found = minimise(functools.partial(quadratic, A, c), jnp.zeros(6), tol=1e-11)
    exact = jnp.linalg.solve(A, c)
    np.testing.assert_allclose(found.params, exact, atol=1e-10)  # tol over the least eigenvalue, 1
    assert float(found.value) == pytest.approx(-float(c @ exact) / 2, rel=1e-14)


def test_a_layer_of_features_ends_where_scipy_does():
    problem = balanced(3, 2, 4, lam_W=2e-2, lam_H=1e-2, lam_b=1e-2)
    x = init(problem, jax.random.key(0))
    found = minimise(functools.partial(objective, problem), x, tol=1e-9)
    flat, unravel = jax.flatten_util.ravel_pytree(x)
    f = jax.jit(jax.value_and_grad(lambda flat: objective(problem, unravel(flat))))
    scipys = scipy.optimize.minimize(f, flat, jac=True, method="L-BFGS-B", options={"ftol": 0, "gtol": 1e-9})
    assert float(found.value) == pytest.approx(scipys.fun, abs=1e-13)
    assert jax.tree.structure(found.params) == jax.tree.structure(x)


def test_value_and_gradient_norm_are_those_of_the_point_returned():
    found = minimise(rosenbrock, jnp.array([-1.2, 1.0]), max_steps=7)
    assert float(found.value) == pytest.approx(float(rosenbrock(found.params)), rel=8 * EPS)
    assert float(found.grad_norm) == pytest.approx(
        float(jnp.linalg.norm(jax.grad(rosenbrock)(found.params))), rel=1e-12
    )


# How it ends


def test_a_start_at_the_minimum_takes_no_step():
    found = minimise(rosenbrock, jnp.ones(2))
    assert (int(found.steps), Status(int(found.status)), float(found.value)) == (0, Status.CONVERGED, 0)
    np.testing.assert_array_equal(found.params, jnp.ones(2))


def test_running_out_of_steps_is_said():
    found = minimise(rosenbrock, jnp.array([-1.2, 1.0]), max_steps=3)
    assert (int(found.steps), Status(int(found.status))) == (3, Status.STEP_LIMIT)
    assert not bool(found.converged)
    assert float(found.value) < float(rosenbrock(jnp.array([-1.2, 1.0])))
    none = minimise(rosenbrock, jnp.array([-1.2, 1.0]), max_steps=0)
    assert (int(none.steps), Status(int(none.status))) == (0, Status.STEP_LIMIT)


def test_a_tolerance_below_rounding_ends_stalled_and_close():
    A, c = spd(2), jax.random.normal(jax.random.key(3), (6,))
    found = minimise(functools.partial(quadratic, A, c), jnp.zeros(6), tol=0.0)
    assert Status(int(found.status)) == Status.STALLED
    assert not bool(found.converged)
    least = -float(c @ jnp.linalg.solve(A, c)) / 2
    assert float(found.value) == pytest.approx(least, rel=64 * 1e3 * EPS)  # the condition number times eps


@pytest.mark.parametrize("start", [[np.nan, 1.0], [np.inf, 1.0], [1e200, 1.0]])
def test_values_that_are_not_finite_end_it_at_once(start):
    found = minimise(rosenbrock, jnp.array(start))
    assert (int(found.steps), Status(int(found.status))) == (0, Status.NOT_FINITE)


def test_running_off_to_minus_infinity_is_said():
    found = minimise(lambda x: -jnp.sum(jnp.exp(x)), jnp.ones(2))
    assert Status(int(found.status)) == Status.NOT_FINITE


# What it goes through


def test_jit_vmap_and_map_give_the_same_solutions():
    starts = jnp.array([[-1.2, 1.0], [0.0, 0.0], [2.0, 2.0], [1.0, 1.0]])
    solve = functools.partial(minimise, rosenbrock, tol=1e-9)
    alone = [solve(x) for x in starts]
    for batch in (jax.vmap(solve)(starts), jax.jit(lambda starts: jax.lax.map(solve, starts))(starts)):
        assert isinstance(batch, Solution)
        np.testing.assert_array_equal(batch.converged, [True] * 4)
        np.testing.assert_allclose(batch.params, 1, atol=1e-8)
        assert int(batch.steps[3]) == 0
        np.testing.assert_allclose(batch.steps, [int(one.steps) for one in alone], atol=3)  # fused sums round apart


def test_vmap_over_the_data_of_the_function():
    matrices, c = jnp.stack([spd(i) for i in range(3)]), jax.random.normal(jax.random.key(9), (6,))
    solve = lambda A: minimise(functools.partial(quadratic, A, c), jnp.zeros(6), tol=1e-10)  # noqa: E731
    found = jax.vmap(solve)(matrices)
    np.testing.assert_allclose(
        found.params, jnp.linalg.solve(matrices, jnp.stack([c] * 3)[..., None])[..., 0], atol=1e-9
    )


def test_any_pytree_keeps_its_structure_shapes_and_dtypes():
    start = {"a": (jnp.ones(3), jnp.zeros(())), "b": [jnp.ones((2, 2))]}
    fun = lambda x: jnp.sum((x["a"][0] - 2) ** 2) + (x["a"][1] + 1) ** 2 + jnp.sum((x["b"][0] - 3) ** 4)  # noqa: E731
    found = minimise(fun, start, tol=1e-9)
    assert jax.tree.structure(found.params) == jax.tree.structure(start)
    assert jax.tree.map(jnp.shape, found.params) == jax.tree.map(jnp.shape, start)
    np.testing.assert_allclose(found.params["a"][0], 2, atol=1e-9)
    assert float(found.params["a"][1]) == pytest.approx(-1)
    np.testing.assert_allclose(found.params["b"][0], 3, atol=1e-3)  # a fourth power: (tol/4)^{1/3}


def test_single_precision_stays_single():
    found = minimise(rosenbrock, jnp.array([-1.2, 1.0], jnp.float32), tol=1e-3)
    assert found.params.dtype == found.value.dtype == found.grad_norm.dtype == jnp.float32
    assert bool(found.converged)
    np.testing.assert_allclose(found.params, 1, atol=3e-2)  # tol over the least eigenvalue, 0.4, and rounding


def test_new_data_and_options_of_the_same_shape_compile_nothing_new():
    traces = []

    def fun(A, c, x):
        traces.append(1)
        return quadratic(A, c, x)

    c = jax.random.normal(jax.random.key(0), (6,))
    minimise(functools.partial(fun, spd(0), c), jnp.zeros(6))
    first = len(traces)
    minimise(functools.partial(fun, spd(1), 2 * c), jnp.ones(6), tol=1e-3, max_steps=5)
    minimise(jax.tree_util.Partial(fun, spd(2), c), jnp.ones(6))
    assert first > 0
    assert len(traces) == first
    minimise(functools.partial(fun, spd(0, d=4), c[:4]), jnp.zeros(4))
    assert len(traces) > first


def test_bound_keywords_and_plain_functions_become_partials():
    def fun(x, scale):
        return jnp.sum((scale * x - 1) ** 2)

    for bound in (functools.partial(fun, scale=2.0), jax.tree_util.Partial(fun, scale=2.0)):
        np.testing.assert_allclose(minimise(bound, jnp.zeros(2)).params, 0.5, atol=1e-10)
        assert isinstance(as_pytree_function(bound), jax.tree_util.Partial)
    assert float(as_pytree_function(lambda x: 3 * x)(2.0)) == 6


def test_memory_changes_the_path_not_the_end():
    short, long = (minimise(rosenbrock, jnp.array([-1.2, 1.0]), tol=1e-9, memory=m) for m in (1, 20))
    assert bool(short.converged & long.converged)
    np.testing.assert_allclose(short.params, long.params, atol=1e-7)
