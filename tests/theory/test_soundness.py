"""Soundness of the certificate: over 15,000 random points and problems, never below f − f*, never a false verdict.

f is recomputed by NumPy in extended precision, f* is the closed form or a solved point whose own gap is negligible.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ufm.lab.optimum import solve_tied
from ufm.model.problem import Params, balanced, tie_features
from ufm.theory.atlas import coarse_etf
from ufm.theory.bias import optimal_bias
from ufm.theory.certificate import Verdict, certify
from ufm.theory.optimum import balanced_minimiser
from ufm.theory.orbits import tie_classes

BATCH, SHARED = 2000, 5  # points, and points that share a problem
EQUAL = [((2, 2, 2), 4, True), ((2, 2, 2), 4, False), ((1, 1), 1, True), ((1,) * 5, 4, False), ((8,) * 4, 3, True)]
UNEQUAL = [((5, 2, 1), 3, True), ((7, 1, 1, 3), 4, False), ((1, 40), 2, True)]
KINDS = 5


def draw_lambdas(rng, counts):
    """λ_W, λ_H over 8 decades and more; a third of the products close to a threshold √n_k / N; free biases too."""
    size = BATCH // SHARED
    lam_W, lam_H, lam_b = 10 ** rng.uniform(-8, 0, (3, size))
    near = rng.random(size) < 1 / 3
    thresholds = np.sqrt(rng.choice(counts, size)) / sum(counts)
    factor = 1 + rng.choice([-1, 1], size) * 10 ** rng.uniform(-14, -1, size)
    lam_H = np.where(near, (thresholds * factor) ** 2 / lam_W, lam_H)
    return {"lam_W": lam_W, "lam_H": lam_H, "lam_b": np.where(rng.random(size) < 0.4, 0, lam_b)}


def draw_points(rng, optimum, saddle):
    """Five kinds of points: random at all scales, optimum perturbed, classes merged, huge logits, saddle perturbed."""
    kind = rng.integers(0, KINDS, BATCH)
    size = np.where(kind == 0, 10 ** rng.uniform(-6, 12, BATCH), 10 ** rng.uniform(-13, 0, BATCH))
    noise = [rng.normal(size=x.shape) for x in optimum]
    points = []
    for x, y, e in zip(optimum, saddle, noise, strict=True):
        pick = lambda *values, x=x: np.choose(kind.reshape(-1, *[1] * (x.ndim - 1)), values)  # noqa: E731
        s = size.reshape(-1, *[1] * (x.ndim - 1))
        merged = np.concatenate([x[:, :1], x[:, :1], x[:, 2:]], axis=1) if x.shape[1] > 1 else x
        spread = 1e-3 + np.abs(x).max(axis=tuple(range(1, x.ndim)), keepdims=True)
        points.append(pick(s * e, x + s * spread * e, merged + 1e-9 * s * e, x * (1 + 1e3 * s), y * (1 + s * e)))
    return kind, size, points


def certify_all(family, points):
    """Certificates of all points, one compiled program."""
    one = lambda lams, W, H, b: certify(family.problem(lams), Params(W, H, b))  # noqa: E731
    return jax.tree.map(np.asarray, jax.jit(jax.vmap(one))(family.lams, *points))


def arrays(x):
    return [np.asarray(leaf) for leaf in (x.W, x.H, x.b)]


def optima(family):
    """A minimiser of each problem as arrays, and an upper bound on f* in extended precision."""
    if len(set(family.counts)) == 1:
        x = jax.jit(jax.vmap(lambda lams: balanced_minimiser(family.problem(lams))))(family.lams)
        return arrays(x), family.closed_form_value()

    def solve(lams):
        problem = family.problem(lams)
        tied = tie_features(problem)
        x = solve_tied(tie_classes(problem), tied)
        return Params(x.W, x.H @ problem.Y, x.b), certify(tied, x)

    x, c = jax.jit(lambda lams: jax.lax.map(solve, lams))(family.lams)
    assert (c.gap + c.rounding <= 1e-10 * c.value).all()  # the oracle itself
    return arrays(x), family.value(*arrays(x))


def saddles(family):
    """A critical point of each problem: two merged pairs of four equal classes, else the origin with its best bias."""

    def find(lams):
        problem = family.problem(lams)
        K, N = problem.Y.shape
        if family.counts == (8,) * 4:
            return coarse_etf(problem, 2)
        b = optimal_bias(problem, jnp.zeros((K, N)), jnp.zeros(K)) if family.use_bias else jnp.zeros(K)
        return Params(jnp.zeros((K, family.d)), jnp.zeros((family.d, N)), b)

    return arrays(jax.jit(jax.vmap(find))(family.lams))


@pytest.mark.parametrize(("counts", "d", "use_bias"), EQUAL + UNEQUAL)
def test_no_bound_is_below_the_excess_and_no_verdict_is_false(family, counts, d, use_bias):
    rng = np.random.default_rng([*counts, d])
    problems = family(counts, d, use_bias, **draw_lambdas(rng, counts))
    each = np.repeat(np.arange(BATCH // SHARED), SHARED)
    best, least = optima(problems)
    kind, size, points = draw_points(rng, [x[each] for x in best], [x[each] for x in saddles(problems)])
    problems = problems.subset(each)
    c, f = certify_all(problems, points), problems.value(*points)
    check_bounds(c, f, f - least[each])
    check_rounding(c, f, kind, counts)
    check_global(c, f, f - least[each], kind, size)
    check_saddles(c, problems, points, f - least[each])
    check_near_the_optimum(c, problems, kind, size)


def check_bounds(c, f, excess):
    """gap + rounding ≥ f − f*, and the value is right to rounding."""
    assert np.isfinite(c.gap + c.rounding).all()
    assert (np.abs(c.value - f) <= c.rounding).all()
    assert (c.gap.astype(np.longdouble) + c.rounding >= excess).all()


def check_rounding(c, f, kind, counts):
    """rounding is a few (N + K²) eps of f, where logits are not huge: a bound as well as a gap can be useless."""
    moderate = (kind != 0) & (kind != 3)
    terms = sum(counts) + len(counts) ** 2
    assert (c.rounding[moderate] <= 100 * terms * np.finfo(float).eps * (1 + f[moderate])).all()


def check_global(c, f, excess, kind, size):
    """GLOBAL is said only within its tolerance, and of every optimum."""
    is_global = c.code == Verdict.GLOBAL
    assert (excess[is_global] <= 1e-8 * f[is_global]).all()
    assert is_global[(kind == 1) & (size < 1e-12)].all()


def check_saddles(c, problems, points, excess):
    """At a STRICT_SADDLE the Hessian has a negative eigenvalue and f falls by no more than f − f*."""
    saddle = np.flatnonzero(c.code == Verdict.STRICT_SADDLE)
    assert len(saddle) > 30
    assert (c.drop[saddle] <= excess[saddle] * (1 + 1e-9)).all()
    assert (c.drop[saddle] > 2 * c.rounding[saddle]).all()
    some = saddle[:: 1 + len(saddle) // 20]
    least = least_eigenvalues(problems.subset(some), [x[some] for x in points])
    assert (c.measured_curvature[some] < 0).all()
    assert (least <= c.measured_curvature[some] + 1e-11).all()  # h² and eps/h of the differences


def check_near_the_optimum(c, problems, kind, size):
    """Far below the threshold no other critical point is within a hundredth of the optimum's own size."""
    n = min(problems.counts)
    load = np.sqrt(problems.lam_W * problems.lam_H) * sum(problems.counts) / np.sqrt(n)
    close = (kind == 1) & (size < 1e-2) & (load < 0.5)
    assert close.sum() > 50
    assert (c.code[close] != Verdict.STRICT_SADDLE).all()


def least_eigenvalues(problems, points):
    """λ_min(∇²f) by central differences of the extended-precision gradient."""
    B, h = len(points[0]), np.longdouble(1e-7)
    shapes = [x.shape[1:] for x in points]
    sizes = [int(np.prod(shape)) for shape in shapes]
    flat = np.concatenate([x.reshape(B, -1) for x in points], axis=1).astype(np.longdouble)
    cuts = np.cumsum(sizes)[:-1]

    def gradient(flat):
        parts = [p.reshape(B, *shape) for p, shape in zip(np.split(flat, cuts, axis=1), shapes, strict=True)]
        grad = problems.value_and_gradient(*parts)[1]
        return np.concatenate([g.reshape(B, -1) for g in grad], axis=1)

    steps = h * np.eye(sum(sizes), dtype=np.longdouble)
    columns = [(gradient(flat + step) - gradient(flat - step)) / (2 * h) for step in steps]
    hessian = np.stack(columns, axis=2).astype(float)
    return np.linalg.eigvalsh((hessian + hessian.transpose(0, 2, 1)) / 2)[:, 0] if B else np.zeros(0)


def test_the_differences_see_the_origins_curvature(family):
    problems = family((2, 2, 2), 4, True, np.array([1e-3]), np.array([3e-3]), np.array([0.0]))
    zero = [np.zeros((1, 3, 4)), np.zeros((1, 4, 6)), np.zeros((1, 3))]
    stated = 2e-3 - np.hypot(1e-3, 1 / (3 * np.sqrt(2)))  # THEORY 1.4
    assert least_eigenvalues(problems, zero)[0] == pytest.approx(stated, rel=1e-10)


@pytest.mark.parametrize("use_bias", [True, False])
def test_single_precision_is_sound_too(family, use_bias):
    """JAX without float64: points and λ's are float32 numbers, the bound widens to what their arithmetic can do."""
    rng = np.random.default_rng(0)
    lams = {name: np.repeat(value, SHARED) for name, value in draw_lambdas(rng, (2, 2, 2)).items()}
    make = lambda lams: balanced(3, 2, 4, **lams, use_bias=use_bias)  # noqa: E731
    with jax.enable_x64(False):
        single = {name: jnp.asarray(value, jnp.float32) for name, value in lams.items()}
        x = jax.jit(jax.vmap(lambda lams: balanced_minimiser(make(lams))))(single)
        _, _, points = draw_points(rng, arrays(x), [0 * leaf for leaf in arrays(x)])
        points = [jnp.asarray(np.clip(p, -1e8, 1e8), jnp.float32) for p in points]
        c = jax.jit(jax.vmap(lambda lams, *x: certify(make(lams), Params(*x))))(single, *points)
        assert c.gap.dtype == jnp.float32
    exact = family((2, 2, 2), 4, use_bias, **{name: np.asarray(value) for name, value in single.items()})
    excess = exact.value(*points) - exact.closed_form_value()
    assert (np.asarray(c.gap, np.longdouble) + np.asarray(c.rounding) >= excess).all()
