"""Trajectories against loops written by hand and by optax, bit for bit in pieces, and the names of their ends."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

from ufm.model.problem import Params, balanced, init, objective, sample_columns
from ufm.numerics.dynamics import Fate, descend
from ufm.theory.optimum import balanced_minimiser

EPS = np.finfo(float).eps
CURVATURES = np.array([0.3, 1.0, 2.0, 4.0])
Q = np.linalg.qr(np.random.default_rng(0).normal(size=(4, 4)))[0]
A, C = Q * CURVATURES @ Q.T, np.array([1.0, -2.0, 0.5, 0.0])
START = jnp.array([1.0, 2.0, -1.0, 0.5])
PROBLEM = balanced(3, 2, 4, lam_W=2e-2, lam_H=1e-2, lam_b=1e-2)
UFM = functools.partial(objective, PROBLEM)
POINT = init(PROBLEM, jax.random.key(0), scale=0.5)


def quadratic(x):
    return x @ A @ x / 2 - C @ x


def noisy(x, key):
    return quadratic(x) + jax.random.normal(key, x.shape) @ x


def identity(x):
    return x


def quadratic_gradient(x):
    return A @ x - C


def ufm_gradient(x):
    """∇f of THEORY 0 from the softmax, on one vector."""
    W, H, b = x[:12].reshape(3, 4), x[12:36].reshape(4, 6), x[36:]
    e = np.exp(W @ H + b[:, None])
    G = (e / e.sum(0) - np.repeat(np.eye(3), 2, axis=1)) / 6
    return np.r_[(G @ H.T + 2e-2 * W).ravel(), (W.T @ G + 1e-2 * H).ravel(), G.sum(1) + 1e-2 * b]


def by_hand(gradient, x, steps, eta, beta, nesterov):
    """x ← x − ηm with m ← g + βm, or x ← x − η(g + βm) with the new m."""
    m, path = np.zeros_like(x), [x]
    for _ in range(steps):
        g = gradient(x)
        m = g + beta * m
        x = x - eta * (g + beta * m if nesterov else m)
        path.append(x)
    return np.array(path)


@pytest.mark.usefixtures("hastily")
@pytest.mark.parametrize(("beta", "nesterov"), [(0.0, False), (0.8, False), (0.8, True)])
@pytest.mark.parametrize(
    ("fun", "gradient", "start", "eta"), [(quadratic, quadratic_gradient, START, 0.1), (UFM, ufm_gradient, POINT, 0.5)]
)
def test_gradient_descent_heavy_ball_and_nesterov_are_the_loops(fun, gradient, start, eta, beta, nesterov):
    run = descend(fun, start, optax.sgd(eta, beta, nesterov), 30, observe=identity)
    path = by_hand(gradient, np.asarray(ravel_pytree(start)[0]), 30, eta, beta, nesterov)
    np.testing.assert_allclose(jax.vmap(lambda x: ravel_pytree(x)[0])(run.observed), path, rtol=0, atol=1e-12)
    np.testing.assert_array_equal(
        ravel_pytree(run.params)[0], ravel_pytree(jax.tree.map(lambda a: a[-1], run.observed))[0]
    )
    assert float(run.value) == pytest.approx(float(fun(run.params)), rel=4 * EPS)
    assert float(run.start_value) == pytest.approx(float(fun(start)), rel=4 * EPS)
    assert (int(run.steps), Fate(int(run.fate))) == (30, Fate.DESCENDED)


OPTIMISERS = {
    "adam": optax.adam(0.1),
    "adamw": optax.adamw(0.1, weight_decay=0.01),
    "muon": optax.contrib.muon(0.1),
    "sign_sgd": optax.sign_sgd(0.1),
    "signum": optax.signum(0.1, beta=0.9),
    "lbfgs": optax.lbfgs(memory_size=4),
    "schedule": optax.sgd(optax.linear_schedule(0.5, 0.1, 8), 0.9),
}


@pytest.mark.usefixtures("hastily")
@pytest.mark.parametrize("name", OPTIMISERS)
def test_other_optimisers_are_the_plain_loop_of_optax(name):
    """Step by step from Python, with the state that optax's own documentation carries."""
    optimiser = OPTIMISERS[name]
    update = jax.jit(optax.with_extra_args_support(optimiser).update, static_argnames="value_fn")
    x, state = POINT, optimiser.init(POINT)
    for _ in range(10):
        value, grad = jax.value_and_grad(UFM)(x)
        updates, state = update(grad, state, x, value=value, grad=grad, value_fn=UFM)
        x = optax.apply_updates(x, updates)
    run = descend(UFM, POINT, optimiser, 10, every=5)
    np.testing.assert_allclose(ravel_pytree(run.params)[0], ravel_pytree(x)[0], rtol=0, atol=1e-11)
    for mine, optaxs in zip(jax.tree.leaves(run.state), jax.tree.leaves(state), strict=True):
        np.testing.assert_allclose(mine, optaxs, rtol=1e-7, atol=1e-9)
    assert int(run.fate) == Fate.DESCENDED


def watch(x):
    return {"f": quadratic(x), "count": jnp.sum(x > 0), "point": x}


SGD = optax.sgd(0.1, 0.9)


@pytest.mark.usefixtures("hastily")
@pytest.mark.parametrize(("steps", "every"), [(12, 3), (12, 12), (0, 4)])
def test_records_are_every_so_many_steps_from_the_start_on(steps, every):
    run = descend(quadratic, START, SGD, steps, observe=watch, every=every)
    path = by_hand(quadratic_gradient, np.asarray(START), 12, 0.1, 0.9, False)[: steps + 1 : every]
    np.testing.assert_array_equal(run.at, np.arange(0, steps + 1, every))
    np.testing.assert_allclose(run.observed["point"], path, atol=1e-13)
    np.testing.assert_array_equal(run.observed["count"], (path > 0).sum(1))
    np.testing.assert_allclose(run.observed["f"], [x @ A @ x / 2 - C @ x for x in path], atol=1e-12)
    assert jnp.issubdtype(run.observed["count"].dtype, jnp.integer)
    assert (int(run.steps), Fate(int(run.fate))) == (steps, Fate.DESCENDED if steps else Fate.STILL)


def test_nothing_is_observed_unless_asked_for():
    run = descend(quadratic, START, SGD, 4, every=2)
    assert run.observed is None
    np.testing.assert_array_equal(run.at, [0, 2, 4])


def bits(leaf):
    typed = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(leaf) if typed else leaf)


def same(one, other):
    """Bit for bit, NaN where NaN."""
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(bits(a), bits(b))


NOISE = optax.chain(optax.add_noise(0.1, 0.5, 7), optax.adam(0.1))
KEY = jax.random.key(3)


@pytest.mark.parametrize(
    ("fun", "key", "optimiser", "pieces"),
    [
        (quadratic, None, SGD, (8, 4)),
        (noisy, KEY, SGD, (2, 10)),
        (noisy, KEY, NOISE, (8, 4)),
        (noisy, KEY, SGD, (0, 12)),
    ],
)
def test_in_pieces_is_in_one_go_to_the_last_bit(fun, key, optimiser, pieces):
    run = functools.partial(descend, fun, optimiser=optimiser, observe=watch, every=2, key=key)
    whole = run(params=START, steps=12)
    first = run(params=START, steps=pieces[0])
    second = run(params=first, steps=pieces[1])
    for name in ("params", "value", "steps", "fate", "start_value", "state"):
        same(getattr(second, name), getattr(whole, name))
    cut = pieces[0] // 2
    for a, b, c in zip(*(jax.tree.leaves((t.at, t.observed)) for t in (first, second, whole)), strict=True):
        same(jnp.concatenate([a, b[1:]]), c)
        same(b[0], c[cut])


def test_mini_batches_continued_are_the_same_to_the_last_bit():
    def batch(problem, x, key):
        return objective(sample_columns(problem, key, 2), x)

    run = functools.partial(
        descend, functools.partial(batch, PROBLEM), optimiser=OPTIMISERS["adam"], key=jax.random.key(1)
    )
    whole, half = run(params=POINT, steps=10), run(params=POINT, steps=5)
    rest = run(params=half, steps=5)
    same((rest.params, rest.value, rest.state), (whole.params, whole.value, whole.state))
    np.testing.assert_array_equal(rest.at, np.arange(5, 11))


def test_a_seed_is_a_trajectory():
    run = functools.partial(descend, noisy, START, SGD, 8, observe=identity)
    same(run(key=jax.random.key(0)), run(key=jax.random.key(0)))
    one, other = run(key=jax.random.key(0)).observed, run(key=jax.random.key(1)).observed
    same(one[0], other[0])
    assert (one[1:] != other[1:]).all()


def test_step_k_draws_with_the_key_folded_with_k():
    key, x, m = jax.random.key(5), np.asarray(START), np.zeros(4)
    for k in range(6):
        g = quadratic_gradient(x) + np.asarray(jax.random.normal(jax.random.fold_in(key, k), (4,)))
        m = g + 0.9 * m
        x = x - 0.1 * m
    run = descend(noisy, START, SGD, 6, every=3, key=key)
    np.testing.assert_allclose(run.params, x, atol=1e-13)
    assert float(run.value) == pytest.approx(float(noisy(run.params, key)), rel=1e-13)


def cosh(x):
    return jnp.sum(jnp.cosh(x["a"])) + x["b"][0] ** 2 + jnp.sum(x["b"][1] ** 4)


LEAVES = {"a": np.ones((2, 3)), "b": [np.float64(2), np.ones(1)]}


@pytest.mark.usefixtures("hastily")
@pytest.mark.parametrize(("optimiser", "x64"), [(SGD, True), (SGD, False), (OPTIMISERS["lbfgs"], True)])
def test_float32_stays_float32_and_is_float64_to_its_rounding(optimiser, x64):
    single = jax.tree.map(np.float32, LEAVES)
    double = descend(cosh, LEAVES, optimiser, 6, every=2, observe=identity)
    with jax.enable_x64(x64):
        run = descend(cosh, single, optimiser, 6, every=2, observe=identity)
        assert {leaf.dtype for leaf in jax.tree.leaves((run.params, run.value, run.observed))} == {np.dtype(np.float32)}
    assert {leaf.dtype for leaf in jax.tree.leaves((double.params, double.value))} == {np.dtype(float)}
    for a, b in zip(jax.tree.leaves(run.observed), jax.tree.leaves(double.observed), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-4 if optimiser is not SGD else 2e-6)


@pytest.mark.usefixtures("hastily")
def test_any_pytree_and_its_structure_is_kept():
    run = descend(cosh, LEAVES, SGD, 6, every=2, observe=identity)
    assert jax.tree.structure(run.params) == jax.tree.structure(LEAVES)
    assert [leaf.shape for leaf in jax.tree.leaves(run.observed)] == [(4, 2, 3), (4,), (4, 1)]
    assert isinstance(descend(UFM, POINT, OPTIMISERS["adam"], 10, every=5).params, Params)
    plain = descend(lambda x: x**2, 1.0, optax.sgd(0.25), 3)
    assert float(plain.params) == 1 / 8


@pytest.mark.usefixtures("hastily")
def test_vmap_over_starts_learning_rates_and_keys_is_the_loop():
    starts = START + jnp.arange(3.0)[:, None]
    etas, keys = jnp.array([0.05, 0.1, 0.2]), jax.random.split(jax.random.key(2), 3)

    def run(x, eta, key):
        return descend(noisy, x, optax.sgd(eta, 0.5), 6, observe=identity, every=3, key=key)

    alone = jax.jit(run)
    np.testing.assert_allclose(
        alone(starts[1], etas[1], keys[1]).params, run(starts[1], 0.1, keys[1]).params, atol=1e-13
    )
    for axes in [(0, None, None), (None, 0, None), (None, None, 0)]:
        given = [a if axis == 0 else a[1] for a, axis in zip((starts, etas, keys), axes, strict=True)]
        mapped = jax.vmap(run, axes)(*given)
        assert mapped.fate.shape == mapped.value.shape == (3,)
        assert (mapped.observed.shape, mapped.at.shape) == ((3, 3, 4), (3, 3))
        for i in range(3):
            one = alone(*(a[i] if axis == 0 else a for a, axis in zip(given, axes, strict=True)))
            np.testing.assert_allclose(mapped.observed[i], one.observed, atol=1e-13)


def test_jit_goes_through_and_new_data_compiles_nothing_new():
    traces = []

    def fun(c, x):
        traces.append(1)
        return jnp.sum(jnp.cosh(x - c))

    first = descend(functools.partial(fun, jnp.zeros(4)), START, SGD, 3)
    count = len(traces)
    second = descend(functools.partial(fun, jnp.ones(4)), START + 1, SGD, 3)
    assert len(traces) == count > 0
    np.testing.assert_allclose(second.params, first.params + 1, atol=1e-14)
    jitted = jax.jit(lambda c, x: descend(functools.partial(fun, c), x, SGD, 3).params)
    np.testing.assert_allclose(jitted(jnp.zeros(4), START), first.params, atol=1e-14)


@pytest.mark.usefixtures("hastily")
def test_what_starts_on_a_critical_point_stays_still():
    origin = jax.tree.map(jnp.zeros_like, POINT)
    for start in (origin, balanced_minimiser(PROBLEM)):
        run = descend(UFM, start, optax.sgd(0.5, 0.9), 50, every=10)
        assert (int(run.steps), Fate(int(run.fate))) == (50, Fate.STILL)
        np.testing.assert_allclose(ravel_pytree(run.params)[0], ravel_pytree(start)[0], rtol=0, atol=1e-13)


@pytest.mark.parametrize(("factor", "fate"), [(0.99, Fate.DESCENDED), (1.01, Fate.DIVERGED)])
def test_steps_above_two_over_the_largest_curvature_diverge(factor, fate):
    eta = factor * 2 / CURVATURES[-1]
    start = jnp.asarray(np.linalg.solve(A, C) + Q[:, -1])  # displaced along the largest curvature
    run = descend(quadratic, start, optax.sgd(eta), 100, every=50)
    assert (int(run.steps), Fate(int(run.fate))) == (100, fate)
    displacement = Q.T @ (run.params - np.linalg.solve(A, C))
    assert displacement[-1] == pytest.approx((1 - eta * CURVATURES[-1]) ** 100, rel=1e-10)


def quartic(x):
    return jnp.sum(x**4)


@pytest.mark.parametrize("every", [1, 3])
def test_a_point_that_is_not_finite_leaves_the_last_finite_one_and_nan_behind(every):
    """x ← x − 4x³ from 2: overflow within ten steps."""
    path = [2.0]
    with np.errstate(over="ignore", invalid="ignore"):
        for _ in range(12):
            path.append(float(np.float64(path[-1]) - 4 * np.float64(path[-1]) ** 3))
    recorded = np.array(path[::every])
    last = int(np.flatnonzero(np.isfinite(recorded))[-1])
    assert 0 < last < len(recorded) - 1
    run = descend(quartic, jnp.array([2.0]), optax.sgd(1.0), 12, every=every, observe=identity)
    assert (Fate(int(run.fate)), int(run.steps)) == (Fate.NOT_FINITE, last * every)
    np.testing.assert_allclose(run.params, recorded[last], rtol=1e-12)
    np.testing.assert_allclose(run.observed[: last + 1, 0], recorded[: last + 1], rtol=1e-12)
    assert np.isnan(run.observed[last + 1 :]).all()
    again = descend(quartic, run, optax.sgd(1.0), 12, every=every)
    assert Fate(int(again.fate)) == Fate.NOT_FINITE
    same((again.params, again.steps), (run.params, run.steps))


def test_a_start_that_is_not_finite_is_named():
    run = descend(quadratic, START.at[1].set(jnp.nan), SGD, 4, every=2, observe=watch)
    assert (Fate(int(run.fate)), int(run.steps)) == (Fate.NOT_FINITE, 0)
    assert np.isnan(run.observed["f"]).all()
    beyond = descend(quadratic, START * 1e200, SGD, 4, every=2)  # f overflows, its gradient does not
    assert Fate(int(beyond.fate)) == Fate.NOT_FINITE


@pytest.mark.usefixtures("hastily")
def test_mini_batches_step_like_the_whole_on_average():
    """E ∇f_batch = ∇f: the mean of one step over keys, in units of its standard error."""

    def batch(x, key):
        return objective(sample_columns(PROBLEM, key, 2), x)

    step = jax.vmap(lambda key: descend(batch, POINT, optax.sgd(1.0), 1, key=key).params)
    moved = np.asarray(jax.vmap(lambda x: ravel_pytree(x)[0])(step(jax.random.split(jax.random.key(0), 4000))))
    full = np.asarray(ravel_pytree(POINT)[0]) - ufm_gradient(np.asarray(ravel_pytree(POINT)[0]))
    error = moved.std(0) / np.sqrt(4000)
    z = (moved.mean(0) - full)[error > 1e-12] / error[error > 1e-12]
    assert np.abs(z).max() < 4.5
    assert 0.5 < np.sqrt(np.mean(z**2)) < 1.5
    assert (error > 1e-12).sum() == 39  # every entry draws


def test_noise_that_an_optimiser_adds_is_its_seeds():
    noises = [optax.chain(optax.add_noise(1.0, 0.5, seed), SGD) for seed in (0, 0, 1)]
    one, again, other = (descend(quadratic, START, noise, 6).params for noise in noises)
    same(one, again)
    assert (one != other).all()


@pytest.mark.parametrize(("steps", "every"), [(5, 2), (-1, 1), (4, 0), (4, -2)])
def test_steps_that_cannot_be_are_refused(steps, every):
    with pytest.raises(
        ValueError, match=f"steps must be a multiple of every ≥ 1, got steps = {steps}, every = {every}"
    ):
        descend(quadratic, START, SGD, steps, every=every)
