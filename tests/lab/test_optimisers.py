"""Optimisers by name against steps written by hand, optax's own AdamW, fixed points and conserved sums."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

from ufm.lab.optimisers import OPTIMISERS, optimiser
from ufm.lab.optimum import optimal_value
from ufm.measure.collapse import collapse_metrics
from ufm.model.problem import balanced, class_mean_problem, init, mean_loss, objective, sample_columns
from ufm.numerics.dynamics import descend
from ufm.theory.certificate import certify
from ufm.theory.optimum import balanced_value

LAMBDAS = {"lam_W": 2e-2, "lam_H": 1e-2, "lam_b": 5e-3}
COUNTS = (3, 1, 2)
PROBLEM = class_mean_problem(COUNTS, 4, **LAMBDAS)
START = init(PROBLEM, jax.random.key(0), scale=0.5)
DECOUPLED = [name for name, recipe in OPTIMISERS.items() if not recipe.coupled]


def flat(x):
    return np.asarray(ravel_pytree(x)[0])


def loss_gradient(x):
    """∇g of THEORY 0 from the softmax, on one vector, a column per class that stands for COUNTS samples."""
    W, H, b = x[:12].reshape(3, 4), x[12:24].reshape(4, 3), x[24:]
    e = np.exp(W @ H + b[:, None])
    G = (e / e.sum(0) - np.eye(3)) * np.array(COUNTS) / 6
    return np.r_[(G @ H.T).ravel(), (W.T @ G).ravel(), G.sum(1)]


def decay(x):
    """(λ_W W, λ_H n_k h_k, λ_b b)."""
    W, H, b = x[:12], x[12:24].reshape(4, 3), x[24:]
    return np.r_[2e-2 * W, (1e-2 * H * np.array(COUNTS)).ravel(), 5e-3 * b]


def by_hand(kind, lr, steps, coupled):
    """x ← x − lr·u − lr·λx (decoupled), u from ∇g; or u from ∇g + λx (coupled)."""
    x, m, v = flat(START), 0.0, 0.0
    for k in range(1, steps + 1):
        g, eta = loss_gradient(x) + coupled * decay(x), lr(k - 1) if callable(lr) else lr
        m = {"sgd": g, "adam": 0.9 * m + 0.1 * g, "sign": g, "signum": 0.9 * m + 0.1 * g}.get(kind, 0.9 * m + g)
        if kind == "adam":
            v = 0.999 * v + 0.001 * g**2
            u = m / (1 - 0.9**k) / (np.sqrt(v / (1 - 0.999**k)) + 1e-8)
        else:
            u = {"sign": np.sign(g), "signum": np.sign(m), "nesterov": g + 0.9 * m}.get(kind, m)
        x = x - eta * u - eta * (not coupled) * decay(x)
    return x


def SCHEDULE(step):
    return 0.1 / (1.0 + 0.2 * step)


@pytest.mark.usefixtures("hastily")
@pytest.mark.parametrize(
    ("name", "kind", "lr"),
    [
        ("sgd", "sgd", 0.1),
        ("momentum", "momentum", SCHEDULE),
        ("nesterov", "nesterov", 0.1),
        ("sgdw", "momentum", SCHEDULE),
        ("adam", "adam", 0.1),
        ("adam", "adam", SCHEDULE),
        ("adamw", "adam", 0.1),
        ("adamw", "adam", SCHEDULE),
        ("sign", "sign", 0.1),
        ("signum", "signum", SCHEDULE),
        ("signumw", "signum", 0.1),
    ],
)
def test_every_step_is_the_one_written_by_hand(name, kind, lr):
    found = optimiser(PROBLEM, name, lr)
    assert not found.draws
    run = descend(found.fun, START, found.optimiser, 20)
    np.testing.assert_allclose(flat(run.params), by_hand(kind, lr, 20, OPTIMISERS[name].coupled), rtol=0, atol=1e-11)


def test_who_decays_apart():
    assert DECOUPLED == ["sgdw", "adamw", "signumw", "muonw"]
    total, fit = float(objective(PROBLEM, START)), float(mean_loss(PROBLEM, START))
    for name in OPTIMISERS:
        found = float(optimiser(PROBLEM, name, None if name == "lbfgs" else 0.1).fun(START))
        assert found == pytest.approx(fit if name in DECOUPLED else total, rel=1e-15)
    assert total - fit > 0.05


@pytest.mark.usefixtures("hastily")
@pytest.mark.parametrize("name", DECOUPLED)
def test_a_decoupled_step_is_its_coupled_one_and_the_decay(name):
    lr, g = 0.3, jax.tree.map(jnp.cos, START)
    step, own = optimiser(PROBLEM, name, lr).optimiser, OPTIMISERS[name].step(lr)
    moved = jax.jit(lambda: step.update(g, step.init(START), START)[0])()
    alone = jax.jit(lambda: own.update(g, own.init(START), START)[0])()
    np.testing.assert_allclose(flat(moved), flat(alone) - lr * decay(flat(START)), atol=1e-14)


@pytest.mark.usefixtures("hastily")
@pytest.mark.parametrize("lr", [0.1, optax.cosine_decay_schedule(0.1, 20)])
def test_with_one_lambda_for_all_it_is_adamw_of_optax(lr):
    problem = balanced(3, 2, 4, lam_W=3e-2, lam_H=3e-2, lam_b=3e-2)
    start = init(problem, jax.random.key(1))
    found = optimiser(problem, "adamw", lr)
    mine = descend(found.fun, start, found.optimiser, 20)
    optaxs = descend(found.fun, start, optax.adamw(lr, weight_decay=3e-2), 20)
    np.testing.assert_allclose(flat(mine.params), flat(optaxs.params), rtol=0, atol=1e-13)


@pytest.mark.usefixtures("hastily")
@pytest.mark.parametrize("name", ["muon", "muonw"])
def test_muon_moves_every_direction_of_a_matrix_at_once(name):
    """Newton and Schulz's iteration makes the singular values of W's update alike, optax's within 0.6 to 1.3."""
    found = optimiser(PROBLEM, name, 0.05)
    run = descend(found.fun, START, found.optimiser, 1)
    moved = START.W - run.params.W - 0.05 * 2e-2 * START.W * (name in DECOUPLED)
    sigma = np.linalg.svd(moved / 0.05, compute_uv=False)
    assert (sigma[:2] > 0.6).all()
    assert (sigma < 1.4).all()
    if name in DECOUPLED:
        assert sigma[2] < 1e-12  # 1ᵀ∇_W g = 0


@pytest.mark.usefixtures("hastily")
@pytest.mark.parametrize("counts", [COUNTS, (2, 2, 2)])
def test_sgdw_ends_at_the_optimum_of_a_tenth_of_the_lambdas(counts):
    """m = ∇g/(1 − β) at a fixed point, so ∇g + (1 − β)λx = 0."""
    tenth = class_mean_problem(counts, 3, **{name: 0.1 * value for name, value in LAMBDAS.items()})
    found = optimiser(class_mean_problem(counts, 3, **LAMBDAS), "sgdw", 0.5)
    start = init(tenth, jax.random.key(0))
    run = descend(found.fun, start, found.optimiser, 3000)
    assert float(objective(tenth, run.params)) == pytest.approx(float(optimal_value(tenth)), abs=1e-10)


@pytest.mark.usefixtures("hastily")
@pytest.mark.parametrize("name", ["sgd", "sgdw", "momentum"])
def test_the_sum_of_the_rows_of_W_shrinks_as_theory_says(name):
    """1ᵀ∇_W g = 0: 1ᵀW is multiplied by 1 − ηλ_W a step; with coupled momentum it obeys a quadratic's recursion."""
    eta = 0.3
    found = optimiser(PROBLEM, name, eta)
    run = descend(found.fun, START, found.optimiser, 40, observe=lambda x: x.W.sum(0))
    sums = np.asarray(run.observed)
    if name == "momentum":
        wanted = (1.9 - eta * 2e-2) * sums[1:-1] - 0.9 * sums[:-2]
        np.testing.assert_allclose(sums[2:], wanted, rtol=0, atol=1e-14)
    else:
        np.testing.assert_allclose(sums, np.outer((1 - eta * 2e-2) ** np.arange(41), sums[0]), rtol=0, atol=1e-14)
    assert np.abs(sums[0]).min() > 1e-2


@pytest.mark.usefixtures("hastily")
def test_adam_collapses_with_coupled_decay_and_does_not_with_decoupled():
    """zhao2026: NC0, necessary for collapse, vanishes where the decay is in the gradient, and not under AdamW."""
    problem = balanced(3, 2, 4, lam_W=2e-2, lam_H=1e-2)
    start, labels = init(problem, jax.random.key(0), scale=0.5), np.repeat(np.arange(3), 2)
    ends = {}
    for name in ("adam", "adamw"):
        found = optimiser(problem, name, optax.cosine_decay_schedule(0.05, 1000))
        ends[name] = descend(found.fun, start, found.optimiser, 1000).params
    nc0 = {k: collapse_metrics(np.asarray(x.H), labels, np.asarray(x.W), np.asarray(x.b)).nc0 for k, x in ends.items()}
    found = certify(problem, ends["adam"])
    assert float(found.gap + found.rounding) < 1e-8
    assert float(objective(problem, ends["adam"])) == pytest.approx(float(balanced_value(problem)), abs=1e-12)
    assert nc0["adam"] < 1e-12
    assert nc0["adamw"] > 1e-3


@pytest.mark.usefixtures("hastily")
@pytest.mark.parametrize("name", ["sgd", "sgdw"])
def test_batches_draw_columns_with_the_keys_of_descend(name):
    key, x, m = jax.random.key(4), flat(START), 0.0
    found = optimiser(PROBLEM, name, 0.2, batch=2)
    assert found.draws
    for k in range(4):
        drawn = np.asarray(sample_columns(PROBLEM, jax.random.fold_in(key, k), 2).multiplicity)
        W, H, b = x[:12].reshape(3, 4), x[12:24].reshape(4, 3), x[24:]
        e = np.exp(W @ H + b[:, None])
        G = (e / e.sum(0) - np.eye(3)) * drawn / 6
        g = np.r_[(G @ H.T).ravel(), (W.T @ G).ravel(), G.sum(1)]
        drawn_decay = np.r_[2e-2 * x[:12], (1e-2 * H * drawn).ravel(), 5e-3 * b]
        m = 0.9 * m + g if name == "sgdw" else g + drawn_decay
        x = x - 0.2 * m - 0.2 * (name == "sgdw") * decay(x)
    run = descend(found.fun, START, found.optimiser, 4, key=key)
    np.testing.assert_allclose(flat(run.params), x, atol=1e-13)


@pytest.mark.usefixtures("hastily")
def test_vmap_over_learning_rates_and_lambdas_is_the_loop():
    lrs, lams = jnp.array([0.05, 0.1]), jnp.array([1e-2, 3e-2])

    def run(lr, lam):
        problem = class_mean_problem(COUNTS, 4, lam_W=lam, lam_H=1e-2)
        found = optimiser(problem, "adamw", lr)
        return descend(found.fun, START, found.optimiser, 10).params

    mapped, alone = jax.jit(jax.vmap(run))(lrs, lams), jax.jit(run)
    for i in range(2):
        one = jax.tree.map(lambda a, i=i: a[i], mapped)
        np.testing.assert_allclose(flat(one), flat(alone(lrs[i], lams[i])), atol=1e-13)


@pytest.mark.usefixtures("unchecked")
def test_bad_input_is_refused_in_one_line():
    with pytest.raises(ValueError, match=r"^optimiser must be one of sgd, momentum, .*, lbfgs, got 'SGD'$"):
        optimiser(PROBLEM, "SGD", 0.1)
    for name in OPTIMISERS:
        if name != "lbfgs":
            with pytest.raises(ValueError, match=f"^lr must be given for {name}$"):
                optimiser(PROBLEM, name)
