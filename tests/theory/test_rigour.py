"""Proved certificates against the same quantities in 120 decimal digits, at and around every threshold."""

import decimal
import functools
from decimal import Decimal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flint import arb

from ufm.model.losses import CrossEntropy
from ufm.model.problem import Params, Problem, balanced, class_mean_problem, imbalanced, init
from ufm.theory import balls, rigour
from ufm.theory.atlas import coarse_etf
from ufm.theory.certificate import Verdict, certify
from ufm.theory.optimum import balanced_minimiser

pytestmark = pytest.mark.usefixtures("hastily")

EPS = np.finfo(float).eps
MODES = {"free": {}, "regularised": {"lam_b": 1e-2}, "absent": {"use_bias": False}}
SHAPE = (4, 4, 5)  # one for most tests, as each costs a compilation; K√n = 8 exactly
WORKED = balanced(*SHAPE, lam_W=5e-3, lam_H=2e-3)
decimals = np.frompyfunc(Decimal, 1, 1)
prove = functools.partial(certify, rigorous=True)


@pytest.fixture(autouse=True)
def _digits():
    with decimal.localcontext(prec=120):
        yield


# The oracle: (UFM), its gradient and THEORY 1.2 in decimals


def exact(x):
    return decimals(np.asarray(x, float))


def softmax_and_loss(problem, W, H, b):
    Z = W @ H + (b[:, None] if problem.use_bias else 0)
    E = np.exp(Z - Z.max(0))
    Y = exact(problem.Y)
    return E / E.sum(0), np.array([x.ln() for x in E.sum(0)]) - (Y * (Z - Z.max(0))).sum(0)


def objective(problem, W, H, b):
    omega, lam_W, lam_H, lam_b = (exact(x) for x in (problem.multiplicity, problem.lam_W, problem.lam_H, problem.lam_b))
    fit = (omega * softmax_and_loss(problem, W, H, b)[1]).sum() / omega.sum()
    penalty = lam_W * (W**2).sum() + lam_H * (omega * H**2).sum()
    return fit + (penalty + (lam_b * (b**2).sum() if problem.use_bias else 0)) / 2


def value(problem, x):
    return objective(problem, *(exact(leaf) for leaf in (x.W, x.H, x.b)))


def along(problem, x, v, tau):
    point = [exact(p) + tau * exact(q) for p, q in zip((x.W, x.H, x.b), (v.W, v.H, v.b), strict=True)]
    return objective(problem, *point)


def curvature(problem, x, v, h=Decimal("1e-30")):
    """The second difference of f along v."""
    return (along(problem, x, v, h) - 2 * along(problem, x, v, Decimal(0)) + along(problem, x, v, -h)) / h**2


def gradient_norms(problem, x):
    """‖∇f‖, and relative to the terms that make it up."""
    W, H, b, omega = (exact(a) for a in (x.W, x.H, x.b, problem.multiplicity))
    lam_W, lam_H, lam_b = (exact(a) for a in (problem.lam_W, problem.lam_H, problem.lam_b))
    R = softmax_and_loss(problem, W, H, b)[0] - exact(problem.Y)
    N = omega.sum()
    features = (
        (((omega * R) @ H.T / N + lam_W * W) ** 2).sum() + (omega * (W.T @ R / N + lam_H * H) ** 2).sum()
    ).sqrt()
    penalty = ((lam_W * W) ** 2).sum() + (omega * (lam_H * H) ** 2).sum()
    bias = ((((R * omega).sum(1) / N + lam_b * b) ** 2).sum()).sqrt() if problem.use_bias else Decimal(0)
    fit = sum(w * r.sqrt() for w, r in zip(omega, (R**2).sum(0), strict=True)) / N
    ratio = features / penalty.sqrt() if features else Decimal(0)
    return (features**2 + bias**2).sqrt(), max(ratio, bias / fit)


def least_value(problem):
    """f* of THEORY 1.2."""
    K, n = problem.K, exact(problem.counts)[0]
    q = (n * exact(problem.lam_W) * exact(problem.lam_H)).sqrt()
    if K * q >= 1:
        return Decimal(K).ln()
    t = (1 / q - K + 1).ln()
    return (1 + (K - 1) * (-t).exp()).ln() + (K - 1) * t * q


def number(x):
    return Decimal(float(x))


def origin(problem):
    return jax.tree.map(jnp.zeros_like, init(problem, jax.random.key(0)))


def moved(x, size, seed=0):
    """The point with every entry off by a fraction of about `size`."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: leaf * (1 + size * rng.normal(size=leaf.shape)), x)


# What is proved


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("scale", [1e-12, 1e-4, 1e-2, 1.0])
def test_every_field_is_the_exact_number_on_its_safe_side(mode, scale):
    problem = balanced(*SHAPE, lam_W=5 * scale, lam_H=2 * scale, **MODES[mode])
    points = {"optimum": balanced_minimiser(problem), "random": init(problem, jax.random.key(1))}
    points |= {"origin": origin(problem), "near": moved(points["optimum"], 1e-9)}
    points["no features"] = Params(points["random"].W, 0 * points["random"].H, points["random"].b)
    for name, x in points.items():
        c, f = prove(problem, x), value(problem, x)
        grad = gradient_norms(problem, x)[0]
        assert number(c.value) <= f < number(np.nextafter(c.value, np.inf)), name
        assert f - least_value(problem) <= number(c.gap), name
        assert grad <= number(c.grad_norm) <= grad * (1 + number(2 * EPS)), name
        assert float(c.rounding) == 0
        assert name not in ("random", "no features") or c.verdict == Verdict.NOT_CRITICAL
        if name == "optimum":
            assert c.verdict == Verdict.GLOBAL
            assert float(c.gap) <= 1e-14 * float(c.value)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("m", [1, 2])
def test_saddles_are_proved_with_curvature_and_fall_of_the_second_difference(mode, m):
    problem = balanced(*SHAPE, lam_W=5e-3, lam_H=2e-3, **MODES[mode])
    x = coarse_etf(problem, 2) if m == 2 else origin(problem)
    c = prove(problem, x)
    form, above = curvature(problem, x, c.direction), number(c.measured_curvature)
    falls = [value(problem, x) - along(problem, x, c.direction, Decimal(2) ** e) for e in range(-12, 14)]
    assert c.verdict == Verdict.STRICT_SADDLE
    assert form - Decimal("1e-50") <= above <= form * (1 - number(2 * EPS))  # the difference errs by h²
    assert 0 < number(c.drop) <= max(falls) <= number(c.drop) * (1 + number(2 * EPS))
    assert float(c.predicted_curvature) == pytest.approx(3.5e-3 - np.hypot(1.5e-3, 1 / 8), rel=4 * EPS)
    assert number(c.dual_norm) <= 1 / Decimal(8) * (1 + Decimal("1e-14"))
    assert float(c.dual_norm) == pytest.approx(1 / 8, rel=1e-14)


@pytest.mark.parametrize(("counts", "d"), [((5, 2, 1), 3), ((1, 1), 1)])
@pytest.mark.parametrize("mode", MODES)
def test_proofs_and_floating_point_agree_within_its_rounding(counts, d, mode):
    problem = imbalanced(counts, d, lam_W=4e-3, lam_H=3e-3, **MODES[mode])
    for seed, scale in enumerate((1e-3, 0.1, 1.0, 3.0)):
        x = init(problem, jax.random.key(seed), scale=scale)
        c, rounded = prove(problem, x), certify(problem, x)
        assert c.verdict == rounded.verdict
        assert abs(number(c.value) - number(rounded.value)) <= number(rounded.rounding)
        assert abs(number(c.gap) - number(rounded.gap)) <= number(rounded.rounding)
        assert float(c.dual_norm) == pytest.approx(float(rounded.dual_norm), rel=1e-13)
        assert float(c.grad_norm) == pytest.approx(float(rounded.grad_norm), rel=1e-12)
        assert float(c.threshold) == pytest.approx(float(rounded.threshold), rel=2 * EPS)


def test_a_column_of_multiplicity_counts_as_that_many_samples():
    for mode in MODES.values():
        means = class_mean_problem((5, 2, 1), 3, lam_W=5e-3, lam_H=2e-3, **mode)
        full = imbalanced((5, 2, 1), 3, lam_W=5e-3, lam_H=2e-3, **mode)
        for x in (init(means, jax.random.key(0)), Params(jnp.zeros((3, 3)), jnp.zeros((3, 3)), jnp.log(means.counts))):
            small, large = prove(means, x), prove(full, Params(x.W, x.H @ full.Y, x.b))
            assert small.verdict == large.verdict
            for name in ("value", "gap", "dual_norm", "grad_norm", "measured_curvature", "drop"):
                assert float(getattr(small, name)) == pytest.approx(float(getattr(large, name)), rel=1e-14, abs=1e-37)


def minima():
    """Minimisers whose f* is known: the balanced one, and the origin far above the threshold with b = log n_k."""
    for mode in MODES.values():
        problem = balanced(*SHAPE, lam_W=3e-2, lam_H=2e-2, **mode)
        yield problem, balanced_minimiser(problem), least_value(problem)
    counts = (5, 2, 1)
    x = Params(jnp.zeros((3, 3)), jnp.zeros((3, 8)), jnp.log(jnp.array(counts, float)))
    yield imbalanced(counts, 3, lam_W=1, lam_H=1), x, -sum(Decimal(n) / 8 * (Decimal(n) / 8).ln() for n in counts)


def test_any_candidate_gives_a_true_bound(monkeypatch):
    """The bias, the direction and the step only choose what is tried: no choice makes a gap too small."""
    rng = np.random.default_rng(0)
    for problem, x, least in minima():
        excess = value(problem, x) - least
        for scale in (1e-9, 1e-6, 1e-3, 1.0, 30.0, 1e5, 1e300):
            noise = jax.tree.map(lambda leaf, scale=scale: leaf + scale * rng.normal(size=leaf.shape), x)
            tries = rigour._Candidates(noise.b, noise, rng.normal())
            monkeypatch.setattr(rigour, "_candidates", lambda *_, tries=tries: tries)
            c = prove(problem, x)
            assert excess <= number(c.gap) < np.inf
            assert c.verdict in (Verdict.GLOBAL, Verdict.UNDECIDED)
            if scale == 1e-9:
                assert number(c.gap) <= excess + Decimal("1e-8")


def test_rebalancing_takes_the_surplus_off_and_keeps_probabilities():
    rng = np.random.default_rng(0)
    problem = Problem(np.eye(4)[:, [0, 1, 2, 3, 3, 1]], rng.uniform(0.1, 3, 6), CrossEntropy(), 1, 1, 0, 3, True)
    model = rigour._exact_model(problem)
    for _ in range(20):
        surplus = balls.exact(rng.normal(size=4))
        surplus -= np.sum(surplus) / 4
        moved = rigour._rebalancing(model, surplus)
        assert all(abs(x) < arb(1e-12) for x in [*np.sum(moved, axis=0), *(model.mean(moved) + surplus)])
        wrong = np.where(problem.Y == 1, balls.exact(np.zeros((4, 6))), moved)
        assert all(x >= 0 for x in wrong.flat)
        assert np.any(wrong != 0)


# At the thresholds


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("step", [-1e-12, -EPS, -EPS / 2, 0.0, EPS, 1e-12])
def test_the_origin_an_ulp_from_the_collapse_threshold(mode, step):
    """K√n s = 1 + step with K = n = 4: f − f* is of order step² below, 0 from it on, and float sees none of it."""
    problem = balanced(*SHAPE, lam_W=(1 + step) / 8, lam_H=1 / 8 * (1 + step), **MODES[mode])
    x = origin(problem)
    excess = value(problem, x) - least_value(problem)
    c = prove(problem, x, tol=1e-26)
    assert excess <= number(c.gap) <= 16 * excess + Decimal("1e-30")
    assert c.verdict == (Verdict.UNDECIDED if step == -1e-12 else Verdict.GLOBAL)
    assert certify(problem, x, tol=1e-26).verdict == Verdict.UNDECIDED
    if step < 0:
        below = float(excess / value(problem, x)) * (1 - 4 * EPS)
        assert prove(problem, x, tol=below).verdict == Verdict.UNDECIDED


def test_no_tolerance_below_the_excess_is_ever_met():
    for mode in MODES.values():
        problem = balanced(*SHAPE, lam_W=5e-3, lam_H=2e-3, **mode)
        for seed, size in enumerate((0.0, 1e-16, 1e-12, 1e-8, 1e-4)):
            x = moved(balanced_minimiser(problem), size, seed)
            excess = (value(problem, x) - least_value(problem)) / value(problem, x)
            c = prove(problem, x)
            share = float(c.gap / c.value)
            assert excess > 0
            assert prove(problem, x, tol=float(excess) * (1 - 4 * EPS)).verdict != Verdict.GLOBAL
            assert prove(problem, x, tol=share * (1 - 4 * EPS)).verdict != Verdict.GLOBAL
            assert prove(problem, x, tol=share * (1 + 4 * EPS)).verdict == Verdict.GLOBAL


@pytest.mark.parametrize("mode", MODES)
def test_an_ulp_of_the_gradient_tolerance_decides_what_is_critical(mode):
    """The coarse ETF's own rounding leaves a gradient near eps, which float64 cannot tell from its own errors."""
    problem = balanced(*SHAPE, lam_W=5e-3, lam_H=2e-3, **MODES[mode])
    for seed, size in enumerate((0.0, 0.0, EPS, 2 * EPS, 1e-8)):
        x = moved(coarse_etf(problem, 2), size, seed)
        rho = float(gradient_norms(problem, x)[1])
        below, above = rho * (1 - EPS), rho * (1 + EPS)
        assert prove(problem, x, grad_tol=below).verdict == Verdict.NOT_CRITICAL
        assert prove(problem, x, grad_tol=above).verdict == Verdict.STRICT_SADDLE
        assert certify(problem, x, grad_tol=above).verdict != Verdict.NOT_CRITICAL


def test_what_no_precision_proves_is_undecided():
    free = imbalanced((1, 1, 1), 3, lam_W=5e-3, lam_H=2e-3)
    absent = imbalanced((1, 1, 1), 3, lam_W=5e-3, lam_H=2e-3, use_bias=False)
    above = balanced(*SHAPE, lam_W=1.0, lam_H=1.0)
    near = moved(balanced_minimiser(WORKED), 1e-3)
    assert prove(free, origin(free), grad_tol=0.0).verdict == Verdict.UNDECIDED  # thirds that sum to 0, in balls
    assert prove(absent, origin(absent), grad_tol=0.0).verdict == Verdict.STRICT_SADDLE  # G·0 = 0 exactly
    assert prove(above, origin(above), tol=0.0).verdict == Verdict.UNDECIDED  # a gap that is 0
    assert prove(WORKED, near, grad_tol=1.0).verdict == Verdict.UNDECIDED  # dual norm within reach of s
    assert prove(WORKED, near).verdict == Verdict.NOT_CRITICAL


def test_a_saddle_that_could_be_explained_by_a_displaced_optimum_is_not_claimed():
    """The safeguards of certify hold here too: gap ≤ √ρ f near the optimum, whatever f does along the direction."""
    for size in (1e-6, 1e-4, 1e-2):
        x = moved(balanced_minimiser(WORKED), size)
        c = prove(WORKED, x, tol=1e-15, grad_tol=1.0)
        assert c.verdict == Verdict.UNDECIDED
        assert not any(np.any(leaf) for leaf in jax.tree.leaves((c.direction, c.predicted_curvature, c.drop)))


# Extreme points


def test_points_beyond_the_range_of_floating_point_get_bounds():
    problem = balanced(2, 1, 1, lam_W=1e-3, lam_H=1e-3)
    x = init(problem, jax.random.key(0))
    huge = prove(problem, Params(1e300 * x.W, 1e300 * x.H, x.b))
    assert huge.verdict == Verdict.NOT_CRITICAL
    assert (float(huge.value), float(huge.gap)) == (np.finfo(float).max, np.inf)
    far = Params(1e20 * x.W, 1e20 * x.H, 1e20 * x.b)
    f = value(problem, far)
    assert number(prove(problem, far).value) <= f <= number(prove(problem, far).value) * (1 + number(2 * EPS))
    tiny = prove(problem, Params(1e-300 * x.W, 5e-324 * jnp.ones_like(x.H), 0 * x.b))
    assert number(tiny.value) <= Decimal(2).ln() <= number(tiny.value) + number(EPS)


def test_a_tiny_bias_penalty_does_not_spoil_the_bound():
    """Λ1 = −λ_b b̄ holds exactly, where floating point loses eps²/λ_b."""
    problem = imbalanced((5, 2, 1), 3, lam_W=1e-3, lam_H=1e-3, lam_b=1e-300)
    x = Params(jnp.zeros((3, 3)), jnp.zeros((3, 8)), jnp.log(jnp.array([5.0, 2.0, 1.0])))
    c, free = prove(problem, x), prove(imbalanced((5, 2, 1), 3, lam_W=1e-3, lam_H=1e-3), x)
    assert not certify(problem, x).gap < 1e200
    assert float(c.gap) == pytest.approx(float(free.gap), rel=1e-12)
    assert c.verdict == Verdict.STRICT_SADDLE


def test_fractional_and_large_multiplicities_are_exact():
    problem = Problem(np.eye(3), np.array([0.1, 2.3, 1e8]), CrossEntropy(), 1e-3, 1e-9, 0.0, 3, True)
    x = init(problem, jax.random.key(0))
    c, f = prove(problem, x), value(problem, x)
    assert number(c.value) <= f < number(np.nextafter(c.value, np.inf))
    assert abs(number(c.gap) - number(certify(problem, x).gap)) <= number(certify(problem, x).rounding)


@pytest.mark.parametrize(("counts", "d"), [((4,) * 4, 5), ((1, 1), 1)])
def test_no_verdict_is_false_at_random_points(counts, d):
    rng = np.random.default_rng(len(counts))
    seen = set()
    for trial in range(40):
        lam_W, lam_H, lam_b = 10 ** rng.uniform(-9, 0, 3)
        problem = imbalanced(counts, d, lam_W=lam_W, lam_H=lam_H, lam_b=(trial % 2) * lam_b)
        start = (balanced_minimiser, origin, lambda p: init(p, jax.random.key(trial)))[trial % 3](problem)  # noqa: B023
        x = moved(start, 10 ** rng.uniform(-17, -1), trial)
        c, f = prove(problem, x), value(problem, x)
        seen.add(c.verdict)
        assert f - least_value(problem) <= number(c.gap)
        if c.verdict == Verdict.GLOBAL:
            assert f - least_value(problem) <= number(1e-8) * f
        if c.verdict == Verdict.NOT_CRITICAL:
            assert gradient_norms(problem, x)[1] > number(1e-6)
        if c.verdict == Verdict.STRICT_SADDLE:
            assert curvature(problem, x, c.direction) < 0
            assert number(c.drop) <= f - least_value(problem)
    assert seen >= {Verdict.GLOBAL, Verdict.NOT_CRITICAL, Verdict.STRICT_SADDLE}


def test_single_precision_is_rounded_outwards():
    with jax.enable_x64(False):
        problem = balanced(*SHAPE, lam_W=3e-3, lam_H=5e-3)
        x = moved(balanced_minimiser(problem), 1e-3)
        x = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), x)
        c = prove(problem, x)
        assert c.gap.dtype == c.value.dtype == jnp.float32
    f = value(problem, x)
    assert number(c.value) <= f < number(np.nextafter(np.float32(c.value), np.float32(np.inf)))
    assert f - least_value(problem) <= number(c.gap)
