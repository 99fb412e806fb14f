"""Claims about critical points: whole spectra, partition saddles, their index, and saddles besides (THEORY 1, 8)."""

import itertools
import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize
from jax.tree_util import Partial

from ufm.lab.atlas import critical_points
from ufm.lab.census import hunt
from ufm.lab.claims.claim import Cases, claim
from ufm.lab.claims.grid import Shape, shapes
from ufm.lab.dense import dense_eigenvalues
from ufm.model.problem import Params, Problem, balanced, imbalanced, init, logits, objective, tie_features
from ufm.numerics.minimise import minimise
from ufm.theory.atlas import Partition, coarse_etf, index_threshold, successive_groups
from ufm.theory.certificate import relative_gradient
from ufm.theory.elimination import inertia
from ufm.theory.escape import predicted_curvature
from ufm.theory.spectrum import Where, hessian_spectrum

Models = tuple[tuple[list[int], int, dict[str, Any]], ...]
KINDS: tuple[dict[str, Any], ...] = ({"use_bias": False}, {"lam_b": 0.0}, {"lam_b": 1e-2}, {"lam_b": 1.0})
SMALL = ((2, 1, 1), (4, 2, 3), (6, 1, 2))  # (K, n, d)
WIDE = (*SMALL, (2, 3, 3), (3, 2, 2), (4, 1, 4), (5, 2, 6), (6, 2, 5), (8, 1, 8))
LOADS = (1e-6, 1e-3, 0.3, 0.99)  # κ = K√n s, below its threshold 1
COUNTS = ([1, 1, 1, 1, 1], [2, 2, 1])
MORE_COUNTS = ([2, 2, 2, 1, 1], [3, 3, 1, 1, 1], [4, 4, 2, 2, 2])
EQUAL: tuple[Shape, ...] = ((4, 3, 4, {"lam_b": 1e-2}),)
MORE_EQUAL: tuple[Shape, ...] = ((5, 1, 6, {}), (4, 1, 3, {"use_bias": False}), (8, 2, 8, {}), (7, 1, 7, {}))
ZERO = 1e-13  # dense eigenvalues relative to the largest in size


def _loaded(K: int, n: int, d: int, kappa: float, ratio: float, kind: dict[str, Any]) -> Problem:
    s = kappa / (K * math.sqrt(n))
    return balanced(K, n, d, lam_W=s * math.sqrt(ratio), lam_H=s / math.sqrt(ratio), **kind)


def _dense_signs(problem: Problem, x: Params) -> tuple[int, int]:
    """(negative, zero) eigenvalues by brute force."""
    values = dense_eigenvalues(problem, x)
    zero = ZERO * np.abs(values).max()
    return int((values < -zero).sum()), int((np.abs(values) <= zero).sum())


def _wrong(found: tuple[Any, Any], stated: tuple[int, int]) -> int:
    """How many eigenvalues are counted on the wrong side."""
    return abs(found[0] - stated[0]) + abs(found[1] - stated[1])


def spectrum_problems(full: bool) -> Iterator[tuple[Problem, int]]:
    """Problems with random λ's and a number of groups: every shape and bias, d = m − 1 and κ > 1 among them."""
    rng = np.random.default_rng(0)
    cases = itertools.product(WIDE if full else SMALL, KINDS, range(6 if full else 1))
    for i, ((K, n, d), kind, _) in enumerate(cases):
        m = int(rng.choice([m for m in range(1, K + 1) if K % m == 0 and m <= d + 1]))
        kappa = rng.uniform(1, 2) if i % 6 == 5 else 10 ** rng.uniform(-4, 0)
        yield _loaded(K, n, d, kappa, 10 ** rng.uniform(-3, 3), kind), m


@claim(
    "Whole spectrum",
    "the eigenvalues in closed form, with multiplicities, are all those of the Hessian at the optimum, at the origin "
    "and at every saddle of equal groups",
    "THEORY 1.3, derived for this project",
    1e-12,
)
def whole_spectrum(full: bool) -> Cases:
    """Largest distance of sorted eigenvalues over the largest; the dense solver's is its size times eps, 1e-14."""
    for problem, m in spectrum_problems(full):
        spectrum = hessian_spectrum(problem, successive_groups(problem.K, m))
        stated = np.sort(np.repeat(np.asarray(spectrum.eigenvalues), spectrum.multiplicities))
        dense = dense_eigenvalues(problem, coarse_etf(problem, m))
        same = stated.shape == dense.shape
        yield f"{_text(problem)} m={m}", np.abs(stated - dense).max() / np.abs(dense).max() if same else math.inf


def _text(problem: Problem) -> str:
    bias = f"lam_b={float(problem.lam_b):g}" if problem.use_bias else "no bias"
    counts = ",".join(f"{n:g}" for n in np.asarray(problem.counts))
    return f"counts={counts} d={problem.d} {bias} lam_W={float(problem.lam_W):.3g} lam_H={float(problem.lam_H):.3g}"


@claim(
    "144 down, 99 flat",
    "for K = 10, d = 16, n = 50, λ_b > 0 and any λ's below the threshold the Hessian has 144 negative eigenvalues and "
    "no zero at W = H = 0, 99 zeros and no negative one at the optimum",
    "THEORY 1.3, 1.4",
    0.0,
)
def down_and_flat(full: bool) -> Cases:
    """How many signs are wrong: in closed form, by elimination, and (full) of 8170 dense eigenvalues at one κ."""
    points: tuple[tuple[Where, int, tuple[int, int]], ...] = (("origin", 1, (144, 0)), ("optimum", 10, (0, 99)))
    for kappa, ratio in itertools.product((*LOADS, 1 - 1e-7), (1.0, 50.0)):
        problem = _loaded(10, 50, 16, kappa, ratio, {"lam_b": 1e-2})
        for at, m, stated in points:
            text = f"{at} κ={kappa!r} λ_W/λ_H={ratio:g}"
            spectrum, x = hessian_spectrum(problem, at), coarse_etf(problem, m)
            yield f"{text} closed form", _wrong((spectrum.index, spectrum.nullity), stated)
            yield f"{text} elimination", _wrong(inertia(problem, x)[:2], stated)
            if full and kappa == 0.3 and ratio == 50:
                yield f"{text} dense", _wrong(_dense_signs(problem, x), stated)


def _atlas_problems(full: bool) -> Iterator[Problem]:
    """K = 5, equal and unequal counts, every bias in turn."""
    lams = ((2e-2, 5e-3), (1e-3, 1e-2)) if full else ((2e-2, 5e-3),)
    for (lam_W, lam_H), kind in itertools.product(lams, KINDS if full else KINDS[1:3]):
        for counts in COUNTS + MORE_COUNTS * full:
            yield imbalanced(counts, len(counts) + 1, lam_W=lam_W, lam_H=lam_H, **kind)


@claim(
    "Partition saddles",
    "tying classes of equal size as any partition says, the least f is critical, with Σ_A (g_A−1) neg(B_A) negative "
    "eigenvalues and as many zeros as its orbit has dimensions",
    "THEORY 8.3, derived for this project",
    1e-9,
)
def partition_saddles(full: bool) -> Cases:
    """The relative gradient, and f against descent from a random tied start; a solve to eps leaves √eps, polished less.

    inf if index or nullity are not those of the dense Hessian, or the rank not that where the random start ends.
    """
    for problem in _atlas_problems(full):
        for point in critical_points(problem):
            text = f"{_text(problem)} {point.partition}"
            right = (point.index, point.nullity) == _dense_signs(problem, point.params)
            value, rank = _tied_minimum(problem, point.partition)
            yield f"{text} gradient", float(_relative_gradient(problem, point.params)) if right else math.inf
            yield f"{text} f", abs(value / point.value - 1) if rank == point.rank else math.inf


@jax.jit
def _relative_gradient(problem: Problem, x: Params) -> jax.Array:
    gradient = jax.grad(partial(objective, problem))(x)
    R = problem.loss.residual(logits(problem, x), problem.Y)
    return relative_gradient(problem, x, gradient, R)


def _tied_minimum(problem: Problem, partition: Partition) -> tuple[float, int]:
    """f and rank W where descent over tied points ends from a random start."""
    means = tie_features(problem)
    tie = jnp.stack([np.isin(np.arange(problem.K), group) / len(group) for group in partition for _ in group])
    order = np.argsort([k for group in partition for k in group])
    found = minimise(Partial(_tied_objective, means, tie[order]), init(means, jax.random.key(0)), tol=1e-10)
    rank = np.linalg.matrix_rank(tie[order] @ found.params.W, tol=1e-4)
    return float(found.value), int(rank)


def _tied_objective(means: Problem, tie: jax.Array, x: Params) -> jax.Array:
    return objective(means, Params(tie @ x.W, x.H @ tie.T, tie @ x.b))


@claim(
    "Where the index d(K−m) holds",
    "with a free bias m equal groups have index d(K−m) for all κ < 1 if m ≤ 2, else exactly for κ < κ* = m/(m+u), "
    "u(m+u) = m(1+u)log(1+u), and (d−1)(K−m) above",
    "THEORY 8.3, derived for this project",
    1e-9,
)
def index_pattern(full: bool) -> Cases:
    """|κ/κ* − 1| where the count by elimination switches, by bisection to 1e-12; how many signs are wrong elsewhere."""
    for m, width in itertools.product((3, 4, 5, 7, 10) if full else (3,), (2, 3) if full else (2,)):
        middle = (m * width + 0.5) * m * (width - 1)  # (d − ½)(K − m)
        found = scipy.optimize.bisect(lambda x: _index(m, width, x) - middle, 0.05, 0.95, xtol=1e-13)  # noqa: B023
        yield f"m={m} K={m * width} switch", abs(found / index_threshold(m) - 1)
        for factor in (0.1, 0.9, 0.999, 1.001, 1.1):
            index = _index(m, width, factor * index_threshold(m))
            stated = (m * width + (factor < 1)) * m * (width - 1)
            yield f"m={m} K={m * width} κ={factor:g}κ*", abs(index - stated)
    for m, kappa in itertools.product((1, 2) if full else (2,), LOADS):
        yield f"m={m} κ={kappa!r}", abs(_index(m, 2, kappa) - (2 * m + 1) * m)


def _index(m: int, width: int, kappa: float) -> int:
    """Negative eigenvalues by elimination at m groups of so many classes each, d = K + 1."""
    problem = _loaded(m * width, 2, m * width + 1, kappa, 3.0, {})
    return inertia(problem, coarse_etf(problem, m)).negative


@claim(
    "Signs by elimination",
    "at any point the Hessian has the signs of its Schur complement on (W, b) and dN positive eigenvalues besides",
    "THEORY 1.8, derived for this project; Haynsworth's additivity of inertia",
    0.0,
)
def signs_by_elimination(full: bool) -> Cases:
    """How many signs differ from those of the dense eigenvalues, at random points and at optima with their zeros.

    At larger points the softmax saturates, and eigenvalues that are not zero fall below rounding.
    """
    models: Models = (([3, 1, 2], 2, {"lam_b": 1e-2}), ([1, 1, 1, 1], 5, {"use_bias": False}), ([2, 2], 1, {}))
    wide: Models = tuple(([n] * K, d, kind) for K, n, d, kind in shapes(True)[:6])
    for counts, d, kind in models + wide * full:
        for i, scale in enumerate((0.1, 0.5, 1.5)):
            problem = imbalanced(counts, d, lam_W=10.0**-i, lam_H=10.0**-i / 30, **kind)
            points = {f"scale={scale:g}": init(problem, jax.random.key(i), scale=scale)}
            if len(set(counts)) == 1:
                points["optimum"] = coarse_etf(problem, problem.K)
            for name, x in points.items():
                yield f"{_text(problem)} {name}", _wrong(inertia(problem, x)[:2], _dense_signs(problem, x))


@claim(
    "Saddles that are no partitions",
    "a hunt for K = 3 finds logits ∝ (1,−1,0) at ∇_Z g with the norm that a cubic in κ gives, index d − 1; and no "
    "critical point above f* without negative curvature",
    "THEORY 8.4, derived for this project",
    1e-9,
)
def other_saddles(full: bool) -> Cases:
    """The relative gradient, the logits' distance from (1,−1,0), and |λ_min/stated − 1| by dense eigenvalues.

    Searches end at relative gradients of 1e-11 and are then led on by Newton's method.
    """
    free = ((0.1, 4.0, 3), (0.02, 1.0, 3), (0.7, 0.1, 4), (0.1, 4.0, 2))
    none = ((0.4, 1.0, 3), (0.1, 4.0, 2))
    cases: list[Any] = [(*case, {}) for case in free] + [(*case, {"use_bias": False}) for case in none]
    for kappa, ratio, d, kind in cases if full else cases[:1]:
        problem = _loaded(3, 1, d, kappa, ratio, kind)
        census = hunt(problem, 100 if full else 40, jax.random.key(0))
        text = _text(problem)
        yield f"{text} spurious", math.inf if census.spurious else 0.0
        found = [orbit for orbit in census.new if orbit.rank == 1]
        yield f"{text} found once", 0.0 if len(found) == 1 else math.inf
        x, least = found[0].params, float(predicted_curvature(problem, jnp.asarray(opposed_norm(problem))))
        Z = np.sort(np.ravel(x.W @ x.H))
        yield f"{text} gradient", _relative_gradient(problem, x)
        yield f"{text} logits", float(np.abs(Z / Z[-1] - [-1, -1, 0, 0, 0, 0, 0, 1, 1]).max())
        right = _dense_signs(problem, x)[0] == found[0].index == d - 1
        yield f"{text} λ_min", abs(dense_eigenvalues(problem, x)[0] / least - 1) if right else math.inf


def opposed_norm(problem: Problem) -> float:
    """‖∇_Z g‖₂ where of three classes two are opposed and one is at zero, with a free bias or none."""
    root_n = math.sqrt(float(problem.counts[0]))
    kappa = 3 * root_n * float(problem.s)
    c = kappa * (2 - kappa)
    if not problem.use_bias:
        p = (math.sqrt(1 + 3 * c) - 1) / 3
        return math.sqrt(3 * p**2 + 2 / 3) / (3 * root_n)
    return scipy.optimize.brentq(lambda p: ((12 * p - 9 - 4 * c) * p + 2 + 4 * c) * p - c, kappa / 3, kappa) / root_n


@claim(
    "Steepest everywhere alike, at partitions",
    "at every partition saddle of equal counts λ_min = (λ_W+λ_H)/2 − √((λ_W−λ_H)²/4 + 1/(K²n)), as at the origin",
    "THEORY 8.3, derived for this project",
    1e-11,
)
def steepest_alike(full: bool) -> Cases:
    """Relative distance of λ_min from the atlas and of the dense one, whose rounding is 1e-15 times λ_max/|λ_min|."""
    for K, n, d, kind in EQUAL + MORE_EQUAL * full:
        for kappa, ratio in ((1e-2, 1.0), (0.3, 20.0), (0.9, 0.5)) if full else ((0.3, 20.0), (0.9, 0.5)):
            problem = _loaded(K, n, d, kappa, ratio, kind)
            stated = float(predicted_curvature(problem, jnp.asarray(1 / (K * math.sqrt(n)))))
            for point in critical_points(problem)[1:]:
                dense = dense_eigenvalues(problem, point.params)[0]
                residual = max(abs(point.smallest_eigenvalue / stated - 1), abs(dense / stated - 1))
                yield f"{_text(problem)} {point.groups}", residual


CLAIMS = (
    whole_spectrum,
    down_and_flat,
    partition_saddles,
    index_pattern,
    signs_by_elimination,
    other_saddles,
    steepest_alike,
)
