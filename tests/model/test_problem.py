"""The objective against plain loops, its symmetries, derivatives in every λ, and one-line refusals of bad input."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ufm.model.losses import CrossEntropy
from ufm.model.problem import (
    Params,
    Problem,
    balanced,
    class_mean_problem,
    imbalanced,
    init,
    logits,
    mean_loss,
    objective,
    penalty,
    sample_columns,
    tie_features,
)

EPS = np.finfo(float).eps
LAMBDAS = {"lam_W": 5e-3, "lam_H": 2e-3, "lam_b": 1e-2}
COUNTS = (3, 1, 2)


def by_loops(problem, x):
    """(UFM) term by term."""
    W, H, b = (np.asarray(a).tolist() for a in (x.W, x.H, x.b))
    K, d, omega = problem.K, problem.d, np.asarray(problem.multiplicity).tolist()
    fit = 0.0
    for i, weight in enumerate(omega):
        z = [sum(W[k][j] * H[j][i] for j in range(d)) + (b[k] if problem.use_bias else 0.0) for k in range(K)]
        y = int(np.argmax(problem.Y[:, i]))
        fit += weight * (math.log(sum(math.exp(v - max(z)) for v in z)) + max(z) - z[y])
    f = fit / sum(omega)
    f += float(problem.lam_W) / 2 * sum(v**2 for row in W for v in row)
    f += float(problem.lam_H) / 2 * sum(omega[i] * H[j][i] ** 2 for j in range(d) for i in range(len(omega)))
    return f + (float(problem.lam_b) / 2 * sum(v**2 for v in b) if problem.use_bias else 0.0)


@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("build", [imbalanced, class_mean_problem])
def test_objective_equals_the_loops(build, use_bias):
    problem = build(COUNTS, 4, **LAMBDAS, use_bias=use_bias)
    for seed in range(3):
        x = init(problem, jax.random.key(seed), scale=2.0)
        x = Params(x.W, x.H, x.b + 0.3)  # without a bias b must not matter
        assert float(objective(problem, x)) == pytest.approx(by_loops(problem, x), rel=64 * EPS)


@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("build", [imbalanced, class_mean_problem])
def test_the_loss_and_the_penalty_add_up_and_the_penalty_alone_knows_lambda(build, use_bias):
    problem = build(COUNTS, 4, **LAMBDAS, use_bias=use_bias)
    x = init(problem, jax.random.key(0), scale=2.0)
    x = Params(x.W, x.H, x.b + 0.3)
    fit, decay = float(mean_loss(problem, x)), float(penalty(problem, x))
    assert fit + decay == pytest.approx(by_loops(problem, x), rel=64 * EPS)
    other = build(COUNTS, 4, lam_W=1.0, lam_H=2.0, lam_b=3.0, use_bias=use_bias)
    assert float(mean_loss(other, x)) == fit
    omega = np.asarray(problem.multiplicity)
    hand = 5e-3 * np.sum(x.W**2) + 2e-3 * np.sum(omega * x.H**2) + use_bias * 1e-2 * np.sum(x.b**2)
    assert decay == pytest.approx(hand / 2, rel=16 * EPS)


def test_the_penaltys_gradient_is_the_decay_and_homogeneous():
    problem = class_mean_problem(COUNTS, 4, **LAMBDAS)
    x = init(problem, jax.random.key(0))
    slope = jax.grad(functools.partial(penalty, problem))(x)
    np.testing.assert_allclose(slope.W, 5e-3 * x.W, rtol=4 * EPS)
    np.testing.assert_allclose(slope.H, 2e-3 * np.array(COUNTS) * x.H, rtol=4 * EPS)
    np.testing.assert_allclose(slope.b, 1e-2 * x.b, rtol=4 * EPS)
    assert float(penalty(problem, jax.tree.map(lambda a: 3 * a, x))) == pytest.approx(9 * float(penalty(problem, x)))


@pytest.mark.parametrize("build", [imbalanced, class_mean_problem])
@pytest.mark.parametrize("size", [1, 4])
def test_a_batch_has_f_as_its_mean_and_counts_every_draw_alike(build, size):
    """Multinomial counts: mean ω_i, variance (N²/size) p_i (1 − p_i), in units of the mean's standard error."""
    problem, number = build(COUNTS, 4, **LAMBDAS), 4000
    keys = jax.random.split(jax.random.key(0), number)
    draw = jax.jit(jax.vmap(lambda key: sample_columns(problem, key, size).multiplicity))
    weights, omega = np.asarray(draw(keys)), np.asarray(problem.multiplicity)
    np.testing.assert_allclose(weights.sum(1), 6, rtol=8 * EPS)
    np.testing.assert_allclose(weights * size / 6, np.round(weights * size / 6), atol=1e-12)
    p = omega / 6
    z = (weights.mean(0) - omega) / np.sqrt(36 / size * p * (1 - p) / number)
    assert np.abs(z).max() < 4
    np.testing.assert_allclose(weights.var(0), 36 / size * p * (1 - p), rtol=6 / np.sqrt(number / 6))
    x = init(problem, jax.random.key(1))
    values = np.asarray(jax.jit(jax.vmap(lambda key: objective(sample_columns(problem, key, size), x)))(keys))
    assert abs(values.mean() - float(objective(problem, x))) < 4 * values.std() / np.sqrt(number)


def test_a_batch_drawn_at_once_is_the_one_drawn_under_jit():
    problem, key = class_mean_problem(COUNTS, 4, **LAMBDAS), jax.random.key(3)
    x = init(problem, jax.random.key(1))
    eager = sample_columns(problem, key, 1)  # which leaves two classes out
    traced = jax.jit(lambda k: sample_columns(problem, k, 1))(key)
    np.testing.assert_array_equal(eager.multiplicity, traced.multiplicity)
    assert sorted(eager.multiplicity.tolist()) == [0, 0, 6]
    k = int(np.argmax(eager.multiplicity))
    alone = np.log(np.sum(np.exp(x.W @ x.H[:, k] + x.b))) - x.W[k] @ x.H[:, k] - x.b[k]
    assert float(mean_loss(eager, x)) == pytest.approx(float(alone), rel=32 * EPS)
    hand = 5e-3 * np.sum(x.W**2) + 2e-3 * 6 * np.sum(x.H[:, k] ** 2) + 1e-2 * np.sum(x.b**2)
    assert float(penalty(eager, x)) == pytest.approx(float(hand) / 2, rel=32 * EPS)
    assert jax.tree.structure(eager) == jax.tree.structure(problem)


def test_balanced_is_imbalanced_with_equal_counts_in_class_order():
    problem = balanced(3, 2, 4, **LAMBDAS)
    np.testing.assert_array_equal(problem.Y, np.kron(np.eye(3), np.ones(2)))
    np.testing.assert_array_equal(problem.counts, [2, 2, 2])
    assert (problem.K, problem.total, problem.d) == (3, 6, 4)
    assert float(problem.s) == pytest.approx(math.sqrt(5e-3 * 2e-3), rel=4 * EPS)
    same = imbalanced([2, 2, 2], 4, **LAMBDAS)
    assert jax.tree.all(jax.tree.map(np.array_equal, problem, same))


def test_class_means_stand_for_all_their_samples():
    full, means = imbalanced(COUNTS, 4, **LAMBDAS), class_mean_problem(COUNTS, 4, **LAMBDAS)
    x = init(means, jax.random.key(0))
    expanded = Params(x.W, x.H @ full.Y, x.b)
    assert float(objective(full, expanded)) == pytest.approx(float(objective(means, x)), rel=8 * EPS)
    assert jax.tree.all(jax.tree.map(np.array_equal, tie_features(full), means))


def test_objective_is_invariant_under_isometries_of_feature_space():
    problem = imbalanced(COUNTS, 4, **LAMBDAS)
    x = init(problem, jax.random.key(1))
    Q = jnp.linalg.qr(jax.random.normal(jax.random.key(2), (4, 4)))[0]
    turned = Params(x.W @ Q, Q.T @ x.H, x.b)
    assert float(objective(problem, turned)) == pytest.approx(float(objective(problem, x)), rel=32 * EPS)


def test_a_free_bias_is_blind_to_a_common_shift():
    problem = imbalanced(COUNTS, 4, lam_W=5e-3, lam_H=2e-3, lam_b=0.0)
    x = init(problem, jax.random.key(1))
    shifted = Params(x.W, x.H, x.b + 3)
    assert float(objective(problem, shifted)) == pytest.approx(float(objective(problem, x)), rel=32 * EPS)


def test_the_slope_in_each_lambda_is_half_its_squared_norm():
    x = init(imbalanced(COUNTS, 4, **LAMBDAS), jax.random.key(3))
    f = lambda lams: objective(imbalanced(COUNTS, 4, **lams), x)  # noqa: E731
    slopes = jax.grad(f)({name: jnp.asarray(value) for name, value in LAMBDAS.items()})
    for name, part in (("lam_W", x.W), ("lam_H", x.H), ("lam_b", x.b)):
        assert float(slopes[name]) == pytest.approx(float(jnp.sum(part**2)) / 2, rel=16 * EPS)


@pytest.mark.parametrize("name", LAMBDAS)
def test_vmap_over_each_lambda_equals_the_loop(name):
    values = np.geomspace(1e-8, 1, 5)
    x = init(imbalanced(COUNTS, 4, **LAMBDAS), jax.random.key(3))
    f = lambda value: objective(imbalanced(COUNTS, 4, **{**LAMBDAS, name: value}), x)  # noqa: E731
    np.testing.assert_allclose(jax.vmap(f)(values), [float(f(v)) for v in values], rtol=16 * EPS)


def test_a_batch_of_problems_goes_through_jit_and_vmap_as_one_pytree():
    values = jnp.geomspace(1e-6, 1, 4)
    problems = jax.vmap(lambda lam: balanced(3, 2, 4, lam_W=lam, lam_H=2 * lam))(values)
    x = init(balanced(3, 2, 4, lam_W=1, lam_H=1), jax.random.key(0))
    batched = jax.jit(jax.vmap(objective, in_axes=(0, None)))(problems, x)
    alone = [float(objective(balanced(3, 2, 4, lam_W=lam, lam_H=2 * lam), x)) for lam in values]
    np.testing.assert_allclose(batched, alone, rtol=16 * EPS)


def test_gradient_matches_central_differences():
    problem = imbalanced(COUNTS, 2, **LAMBDAS)
    x = init(problem, jax.random.key(4))
    flat, unravel = jax.flatten_util.ravel_pytree(x)
    grad = jax.flatten_util.ravel_pytree(jax.grad(functools.partial(objective, problem))(x))[0]
    h = 1e-5
    for i, g in enumerate(np.asarray(grad)):
        up, down = (by_loops(problem, unravel(flat.at[i].add(step))) for step in (h, -h))
        assert g == pytest.approx((up - down) / (2 * h), abs=1e-9)  # h² and eps/h, both 1e-10 here


def test_init_draws_normal_entries_of_the_stated_scale_and_no_bias_where_none_is():
    problem = balanced(10, 40, 50, **LAMBDAS)
    x = init(problem, jax.random.key(0), scale=0.1)
    assert (x.W.shape, x.H.shape, x.b.shape) == ((10, 50), (50, 400), (10,))
    assert float(jnp.std(x.H)) == pytest.approx(0.1, rel=5 / np.sqrt(2 * x.H.size))
    assert not np.array_equal(x.W, init(problem, jax.random.key(1), scale=0.1).W)
    without = balanced(10, 1, 9, lam_W=1, lam_H=1, use_bias=False)
    np.testing.assert_array_equal(init(without, jax.random.key(0)).b, np.zeros(10))


def test_float32_arrays_stay_float32_and_integers_become_the_default_float():
    Y, omega = jnp.eye(3, dtype=jnp.int32), jnp.array([2**24 + 1, 1, 1])
    single = Problem(jnp.eye(3, dtype=jnp.float32), jnp.ones(3), CrossEntropy(), 1, 1, 0, 3, True)
    integer = Problem(Y, omega, CrossEntropy(), 1, 1, 0, 3, True)
    assert single.Y.dtype == jnp.float32
    assert integer.Y.dtype == integer.multiplicity.dtype == jnp.float64
    assert int(integer.counts[0]) == 2**24 + 1


@pytest.mark.usefixtures("unchecked")
def test_numpy_integers_serve_as_sizes():
    problem = balanced(np.int64(3), np.int32(2), np.int64(4), **LAMBDAS)
    assert (problem.K, int(problem.total), problem.d) == (3, 6, 4)
    assert type(problem.d) is int


# Bad input


def refuse(match, build, *args, **kwargs):
    with pytest.raises(ValueError, match=match) as caught:
        build(*args, **kwargs)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"K": 1}, "^K must be an integer of at least 2, got 1$"),
        ({"K": 3.0}, "^K must"),
        ({"K": True}, "^K must"),
        ({"n": 0}, "^n must be an integer of at least 1, got 0$"),
        ({"n": -2}, "^n must"),
        ({"n": 2.5}, "^n must"),
        ({"n": None}, "^n must"),
        ({"d": 0}, "^d must be an integer of at least 1, got 0$"),
        ({"d": 4.0}, "^d must"),
        ({"lam_W": 0.0}, r"^lam_W must be positive and finite, got 0\.0$"),
        ({"lam_W": -1}, "^lam_W must"),
        ({"lam_W": math.nan}, "^lam_W must .* got nan$"),
        ({"lam_W": math.inf}, "^lam_W must .* got inf$"),
        ({"lam_W": jnp.nan}, "^lam_W must"),
        ({"lam_H": 0}, "^lam_H must be positive"),
        ({"lam_H": None}, "^lam_H must"),
        ({"lam_H": [0.1, 0.2]}, "^lam_H must be a scalar, got shape .*vmap"),
        ({"lam_b": -1e-9}, "^lam_b must be zero .* or positive"),
        ({"lam_b": math.nan}, "^lam_b must"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_bad_scalars_are_refused(changed, match):
    good = {"K": 3, "n": 2, "d": 4, "lam_W": 0.1, "lam_H": 0.1}
    refuse(match, balanced, **{**good, **changed})


@pytest.mark.parametrize(
    "counts",
    [[3.5, 2], [0, 1], [-1, 2], [2], [], 7, None, [[1, 2], [3, 4]], [math.nan, 1], [math.inf, 1], [1e300, 1],
     ["a", "b"], [True, True], [1 + 0j, 2], [10**30, 1]],
)  # fmt: skip
@pytest.mark.parametrize("build", [imbalanced, class_mean_problem])
@pytest.mark.usefixtures("unchecked")
def test_counts_that_are_not_positive_integers_are_refused(build, counts):
    refuse("^counts must", build, counts, 4, lam_W=0.1, lam_H=0.1)


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"Y": 2 * np.eye(3)}, "^Y must be one-hot"),
        ({"Y": np.nan * np.eye(3)}, "^Y must be one-hot"),
        ({"Y": np.ones((3, 3))}, "^Y must be one-hot"),
        ({"Y": np.eye(3)[:, :2], "multiplicity": np.ones(2)}, r"^Y has no sample of class \[2\]"),
        ({"multiplicity": np.ones(2)}, "^multiplicity must be positive, one entry for each of the 3 columns"),
        ({"multiplicity": np.zeros(3)}, "^multiplicity must"),
        ({"multiplicity": -np.ones(3)}, "^multiplicity must"),
        ({"multiplicity": np.full(3, np.nan)}, "^multiplicity must"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_targets_that_are_not_one_hot_or_not_counted_are_refused(changed, match):
    good = {"Y": np.eye(3), "multiplicity": np.ones(3)}
    rest = {"loss": CrossEntropy(), "lam_W": 0.1, "lam_H": 0.1, "lam_b": 0.0, "d": 3, "use_bias": True}
    refuse(match, Problem, **{**good, **changed}, **rest)


@pytest.mark.parametrize("call", [objective, logits])
@pytest.mark.parametrize("name", ["W", "H", "b"])
@pytest.mark.usefixtures("unchecked")
def test_a_point_of_another_shape_is_refused_not_broadcast(call, name):
    problem = balanced(3, 2, 4, **LAMBDAS)
    shapes = {"W": (3, 4), "H": (4, 6), "b": (3,)}
    shapes[name] = {"W": (3, 2), "H": (4, 1), "b": (1,)}[name]
    x = Params(**{key: jnp.zeros(shape) for key, shape in shapes.items()})
    refuse(f"^{name} must have shape .* for this problem, got", call, problem, x)


@pytest.mark.parametrize("size", [0, -1, 2.0, True])
@pytest.mark.usefixtures("unchecked")
def test_batches_of_no_size_are_refused(size):
    refuse(
        "^size must be an integer of at least 1", sample_columns, balanced(3, 2, 4, **LAMBDAS), jax.random.key(0), size
    )


@pytest.mark.usefixtures("unchecked")
def test_the_loss_of_a_point_of_another_shape_is_refused():
    x = Params(jnp.zeros((3, 4)), jnp.zeros((4, 1)), jnp.zeros(3))
    refuse("^H must have shape", mean_loss, balanced(3, 2, 4, **LAMBDAS), x)


def test_targets_beyond_memory_are_not_made_by_accident():
    with pytest.raises(ValueError, match=r"Y a 1000×1300000 array of 10\.4 GB; class_mean_problem"):
        imbalanced([1300] * 1000, 2048, lam_W=1.0, lam_H=1.0)
