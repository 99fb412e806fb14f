"""Verdicts at points whose nature is known, CURV against dense Hessians, and what a certificate must not depend on."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from ufm.model.problem import Params, balanced, class_mean_problem, imbalanced, init, logits, objective
from ufm.theory.atlas import coarse_etf
from ufm.theory.certificate import Verdict, certify
from ufm.theory.optimum import balanced_minimiser, balanced_value

pytestmark = pytest.mark.usefixtures("hastily")

EPS = np.finfo(float).eps
WORKED = balanced(4, 3, 5, lam_W=5e-3, lam_H=2e-3)  # the example of THEORY 0


def origin(problem):
    return jax.tree.map(jnp.zeros_like, init(problem, jax.random.key(0)))


def point_of_logits(problem, Z):
    """The balanced factors of Z by NumPy's SVD (THEORY 0)."""
    U, sigma, Vt = np.linalg.svd(Z, full_matrices=False)
    rank = min(problem.K - 1, problem.d)
    ratio, root = (problem.lam_H / problem.lam_W) ** 0.25, np.sqrt(sigma[:rank])
    W, H = np.zeros((problem.K, problem.d)), np.zeros((problem.d, Z.shape[1]))
    W[:, :rank], H[:rank] = ratio * U[:, :rank] * root, root[:, None] * Vt[:rank] / ratio
    return Params(jnp.asarray(W), jnp.asarray(H), jnp.zeros(problem.K))


def coarse(problem, m):
    """The coarse ETF of m groups, from the formula of THEORY 1.6."""
    K, n = problem.K, float(problem.counts[0])
    g = K // m
    t = np.log(1 / (g * np.sqrt(n) * float(problem.s)) - m + 1)
    return point_of_logits(problem, t * np.kron(np.eye(m) - 1 / m, np.ones((g, g))) @ problem.Y)


@jax.jit
def dense_hessian(problem, x):
    flat, unravel = ravel_pytree(x)
    return jax.hessian(lambda flat: objective(problem, unravel(flat)))(flat)


def residual_norm(problem, x):
    P = jax.nn.softmax(logits(problem, x), axis=0)
    return np.linalg.norm(np.asarray(P - problem.Y) / problem.Y.shape[1], 2)


# Known points


@pytest.mark.parametrize("mode", ["free", "regularised", "absent"])
@pytest.mark.parametrize("scale", [1e-10, 1e-4, 1e-2, 1.0])
def test_the_optimum_is_global_with_its_value_as_the_bound(mode, scale):
    lam_b = 1e-2 if mode == "regularised" else 0.0
    problem = balanced(4, 3, 5, lam_W=5 * scale, lam_H=2 * scale, lam_b=lam_b, use_bias=mode != "absent")
    c = certify(problem, balanced_minimiser(problem))
    assert c.verdict == Verdict.GLOBAL
    assert abs(float(c.value - balanced_value(problem))) <= float(c.rounding)
    assert abs(float(c.gap)) <= float(c.rounding) <= 1e-12 * float(c.value)
    assert float(c.dual_norm) <= float(c.threshold) * (1 + 1e-12)


@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("ratio", [1.0, 30.0])
def test_the_origin_changes_from_strict_saddle_to_global_at_the_threshold(use_bias, ratio):
    for load, verdict in ((1e-4, 2), (0.5, 2), (0.999, 2), (1.0, 1), (1.001, 1), (50.0, 1)):
        s = load / (4 * np.sqrt(4))
        problem = balanced(4, 4, 5, lam_W=s * ratio, lam_H=s / ratio, use_bias=use_bias)
        c = certify(problem, origin(problem))
        assert c.verdict == Verdict(verdict), load
        assert float(c.dual_norm) == pytest.approx(1 / 8, rel=16 * EPS)
        assert float(c.grad_norm) <= 8 * EPS


def test_random_points_are_not_critical():
    for seed in range(5):
        c = certify(WORKED, init(WORKED, jax.random.key(seed)))
        assert c.verdict == Verdict.NOT_CRITICAL
        assert float(c.gap) >= float(c.value - balanced_value(WORKED))
        assert not any(np.any(leaf) for leaf in jax.tree.leaves((c.direction, c.predicted_curvature, c.drop)))


@pytest.mark.parametrize(("K", "m", "n", "d"), [(4, 2, 3, 5), (6, 3, 1, 6), (6, 2, 1, 6), (4, 1, 3, 5)])
def test_coarse_etfs_are_strict_saddles_with_the_stated_energy_and_curvature(K, m, n, d):
    lam_W, lam_H = 5e-3, 2e-3
    problem = balanced(K, n, d, lam_W=lam_W, lam_H=lam_H, lam_b=1e-2)
    x, g, s = coarse(problem, m), K // m, np.sqrt(lam_W * lam_H)
    c = certify(problem, x)
    sigma = 1 / (K * np.sqrt(n))
    least = (lam_W + lam_H) / 2 - np.hypot((lam_W - lam_H) / 2, sigma)
    t = np.log(1 / (g * np.sqrt(n) * s) - m + 1)
    energy = np.log(g) + np.log1p((m - 1) * np.exp(-t)) + (m - 1) * t * g * np.sqrt(n) * s
    spectrum = np.linalg.eigvalsh(dense_hessian(problem, x))
    assert c.verdict == Verdict.STRICT_SADDLE
    assert float(c.value) == pytest.approx(energy, rel=1e-13)
    assert float(c.dual_norm) == pytest.approx(sigma, rel=1e-12)
    assert float(c.threshold) == pytest.approx(s, rel=4 * EPS)
    assert float(c.predicted_curvature) == pytest.approx(least, rel=1e-12)
    assert float(c.measured_curvature) == pytest.approx(least, rel=1e-11)
    assert spectrum[0] == pytest.approx(least, rel=1e-11)
    assert np.sum(spectrum < -1e-12) == (K - m) * d  # the Morse index observed in THEORY 1.6
    assert 0 < float(c.drop) <= float(c.value - balanced_value(problem))
    same = coarse_etf(problem, m)
    assert float(objective(problem, same)) == pytest.approx(energy, rel=1e-13)


def test_worked_numbers_of_theory_0():
    x = coarse(WORKED, 2)
    c = certify(WORKED, x)
    assert float(c.dual_norm) == pytest.approx(0.144338, abs=5e-7)
    assert float(c.threshold) == pytest.approx(0.00316228, abs=5e-9)
    assert float(c.measured_curvature) == pytest.approx(-0.14084536, abs=5e-9)
    # CURV with its own direction: Δ_W = (λ_H/λ_W)^{1/4} u aᵀ, Δ_H = −(λ_W/λ_H)^{1/4} a vᵀ
    G = np.asarray(jax.nn.softmax(logits(WORKED, x), axis=0) - WORKED.Y) / 12
    U, _, Vt = np.linalg.svd(G)
    a = np.linalg.svd(x.W)[2][-1]
    r = (2e-3 / 5e-3) ** 0.25
    v = Params(jnp.asarray(r * np.outer(U[:, 0], a)), jnp.asarray(-np.outer(a, Vt[0]) / r), jnp.zeros(4))
    product = jax.jvp(jax.grad(functools.partial(objective, WORKED)), (x,), (v,))[1]
    form = sum(float(jnp.vdot(p, q)) for p, q in zip(jax.tree.leaves(product), jax.tree.leaves(v), strict=True))
    assert form == pytest.approx(-0.28235058, abs=5e-9)
    assert form == pytest.approx(-2 * (float(c.dual_norm) - float(c.threshold)), rel=1e-11)


def test_escape_is_a_unit_eigenvector_of_the_least_eigenvalue_and_goes_down():
    x = coarse(WORKED, 2)
    c = certify(WORKED, x)
    v = ravel_pytree(c.direction)[0]
    assert float(jnp.linalg.norm(v)) == pytest.approx(1, rel=1e-13)
    np.testing.assert_allclose(dense_hessian(WORKED, x) @ v, float(c.predicted_curvature) * v, atol=1e-14)
    ray = [objective(WORKED, jax.tree.map(lambda p, q: p + 2.0**e * q, x, c.direction)) for e in range(-12, 14)]  # noqa: B023
    assert float(c.drop) == pytest.approx(float(c.value) - float(min(ray)), rel=1e-12)


def test_dual_norm_and_gradient_norm_are_what_they_say():
    problem = imbalanced([5, 2, 1], 4, lam_W=5e-3, lam_H=2e-3, lam_b=1e-2)
    x = init(problem, jax.random.key(2))
    c = certify(problem, x)
    grad = jax.grad(functools.partial(objective, problem))(x)
    assert float(c.dual_norm) == pytest.approx(residual_norm(problem, x), rel=1e-13)
    assert float(c.grad_norm) == pytest.approx(float(jnp.linalg.norm(ravel_pytree(grad)[0])), rel=1e-13)


# What it must not depend on


@pytest.mark.parametrize("mode", ["free", "regularised", "absent"])
@pytest.mark.parametrize("where", ["random", "origin"])
def test_class_means_and_all_samples_get_the_same_certificate(mode, where):
    counts = (5, 2, 1)
    lams = {"lam_W": 5e-3, "lam_H": 2e-3, "lam_b": 1e-2 if mode == "regularised" else 0.0}
    means = class_mean_problem(counts, 4, **lams, use_bias=mode != "absent")
    full = imbalanced(counts, 4, **lams, use_bias=mode != "absent")
    x = init(means, jax.random.key(0)) if where == "random" else origin(means)
    if where == "origin" and mode == "free":
        x = Params(x.W, x.H, jnp.log(means.counts))  # the best bias
    small, large = certify(means, x), certify(full, Params(x.W, x.H @ full.Y, x.b))
    assert small.verdict == large.verdict
    for name in set(vars(small)) - {"rounding", "code", "direction"}:
        left, right = float(getattr(small, name)), float(getattr(large, name))
        assert left == pytest.approx(right, rel=1e-11, abs=32 * EPS * (1 + float(small.value))), name
    if small.verdict == Verdict.STRICT_SADDLE:
        expanded = Params(small.direction.W, small.direction.H @ full.Y, small.direction.b)
        assert float(jnp.linalg.norm(ravel_pytree(expanded)[0])) == pytest.approx(1, rel=1e-12)


def test_isometries_of_feature_space_change_nothing():
    x = init(WORKED, jax.random.key(3), scale=0.3)
    Q = jnp.linalg.qr(jax.random.normal(jax.random.key(4), (5, 5)))[0]
    a, b = certify(WORKED, x), certify(WORKED, Params(x.W @ Q, Q.T @ x.H, x.b))
    for name in ("value", "gap", "dual_norm", "grad_norm"):
        assert float(getattr(a, name)) == pytest.approx(float(getattr(b, name)), rel=1e-12)


def test_vmap_over_points_and_lambdas_equals_the_loop():
    lam = jnp.array([1e-4, 5e-3, 0.5])
    make = lambda lam: balanced(4, 3, 5, lam_W=lam, lam_H=lam)  # noqa: E731
    points = jax.vmap(lambda key: init(make(1.0), key))(jax.random.split(jax.random.key(0), 3))
    batch = jax.vmap(lambda lam, x: certify(make(lam), x))(lam, points)
    for i in range(3):
        alone = certify(make(lam[i]), jax.tree.map(lambda leaf: leaf[i], points))  # noqa: B023
        for name in ("value", "gap", "rounding", "dual_norm", "grad_norm"):
            assert float(getattr(batch, name)[i]) == pytest.approx(float(getattr(alone, name)), rel=1e-12)
        assert int(batch.code[i]) == int(alone.verdict)


def test_tolerances_decide_the_verdict_alone():
    x = balanced_minimiser(WORKED)
    near = Params(x.W * (1 + 1e-3), x.H, x.b)
    strict, loose = certify(WORKED, near), certify(WORKED, near, tol=1.0)
    assert (strict.verdict, loose.verdict) == (Verdict.NOT_CRITICAL, Verdict.GLOBAL)
    assert certify(WORKED, near, grad_tol=1.0).verdict == Verdict.UNDECIDED  # dual norm within reach of s
    assert float(strict.gap) == float(loose.gap)


def test_single_precision_features_are_certified_in_the_precision_of_jax():
    x = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), balanced_minimiser(WORKED))
    c = certify(WORKED, x)
    same = certify(WORKED, jax.tree.map(lambda leaf: leaf.astype(float), x))
    assert c.gap.dtype == jnp.float64
    assert (float(c.gap), int(c.code)) == (float(same.gap), int(same.code))
    assert 0 < float(c.gap) < 1e-6


# Bad input


@pytest.mark.parametrize("name", ["W", "H", "b"])
@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
def test_points_that_are_not_finite_are_refused(name, bad):
    x = init(WORKED, jax.random.key(0))
    spoilt = getattr(x, name).at[0].set(bad)
    with pytest.raises(ValueError, match=f"^{name} must be finite; it holds NaN or infinite entries$"):
        certify(WORKED, Params(**{**vars(x), name: spoilt}))


def test_points_of_another_shape_are_refused():
    for other, name in ((balanced(4, 3, 6, lam_W=1, lam_H=1), "W"), (balanced(4, 1, 5, lam_W=1, lam_H=1), "H")):
        with pytest.raises(ValueError, match=f"^{name} must have shape .* for this problem, got"):
            certify(WORKED, init(other, jax.random.key(0)))
