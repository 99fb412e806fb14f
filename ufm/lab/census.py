"""The saddle hunt: critical points that nobody wrote down, found by minimising ‖∇f‖² (THEORY 8.3, 8.4)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize
from jax.flatten_util import ravel_pytree
from jax.tree_util import Partial
from jaxtyping import Array, Key
from tqdm import tqdm

from ufm.lab.atlas import CriticalPoint, critical_points, partition_type
from ufm.lab.dense import dense_eigenvalues
from ufm.model.problem import Params, Problem, init, objective, tie_features
from ufm.numerics.minimise import minimise
from ufm.theory.atlas import Partition, check_partition
from ufm.theory.elimination import inertia

SCALES = (0.3, 5.0)  # of a start's entries, in units that balance W and H, log-uniform
CRITICAL = 1e-11  # gradient of f in those units, relative to s, above which a search has failed
SAME = 1e-6  # relative distance of invariants below which points are on one orbit
TIED = 1e-6  # distance of classes that count as one
RANK = 1e-10  # singular values of the logits, √n-weighted
NEWTON_STEPS = 4
SETTLING = 20  # such steps from a point that is only near
TINY = 1e-14  # tolerances of MINPACK: as far as it gets
DESCENTS = np.array([0, 0, 1, 3, 10, 30, 100])  # steps downhill before the search, so that low saddles are met too
ABOVE = 1e-9  # relative excess over the lowest f that is not rounding


@dataclass(frozen=True)
class Orbit:
    """A critical point up to isometries of R^d, exchange of alike classes and shifts of a free bias.

    Attributes:
        params: a representative, one column per class.
        value: f, nats.
        rank: of W.
        index: number of negative Hessian eigenvalues, every sample with its own column.
        nullity: number of zero ones.
        smallest_eigenvalue: λ_min(∇²f).
        partition: classes that coincide in W, h, b and size.
        known: whether it is the partition saddle (or the optimum) of that partition.
        hits: how many searches ended on it.
    """

    params: Params
    value: float
    rank: int
    index: int
    nullity: int
    smallest_eigenvalue: float
    partition: Partition
    known: bool
    hits: int


@dataclass(frozen=True)
class Census:
    """What a hunt found.

    Attributes:
        starts: searches begun.
        converged: searches that ended at a critical point; the others ended at a positive minimum of ‖∇f‖².
        orbits: the distinct critical points, from the lowest f up.
        missed: partition saddles of the atlas that no search ended on.
        lowest: the least f of atlas and hunt; the global minimum where d ≥ K − 1.
    """

    starts: int
    converged: int
    orbits: tuple[Orbit, ...]
    missed: tuple[CriticalPoint, ...]
    lowest: float

    @property
    def new(self) -> tuple[Orbit, ...]:
        """Critical points that are no partition saddles."""
        return tuple(orbit for orbit in self.orbits if not orbit.known)

    @property
    def spurious(self) -> tuple[Orbit, ...]:
        """Critical points above the lowest f without negative curvature; for d ≥ K one would refute THEORY 0."""
        bar = self.lowest + ABOVE * abs(self.lowest)
        return tuple(orbit for orbit in self.orbits if orbit.index == 0 and orbit.value > bar)


def hunt(problem: Problem, starts: int, key: Key[Array, ""], *, quiet: bool = True) -> Census:
    """Critical points of f from random starts, identified modulo symmetry against the atlas, and classified.

    A start is drawn at a random scale, led downhill for a random number of steps (often none), then to a minimum of
    ‖∇f‖² by Levenberg–Marquardt (MINPACK through SciPy, the Hessian as Jacobian) and polished by Newton steps of least
    norm. Features of one class coincide at every critical point, since f is strictly convex in each, so the search
    runs over class means and loses nothing.

    Args:
        problem: cross-entropy, concrete; K(2d + 1) variables are searched, up to a few hundred.
        starts: number of searches.
        key: start i draws from fold_in(key, i).
        quiet: without a progress bar.

    Raises:
        ValueError: as critical_points does.
    """
    if starts < 0:
        raise ValueError(f"starts must be at least 0, got {starts}")
    tied = tie_features(problem)
    atlas = critical_points(tied)
    search = _searcher(tied)
    found: list[list[Any]] = []
    for i in tqdm(range(starts), desc="hunt", disable=quiet, leave=False):
        point = search(jax.random.fold_in(key, i))
        if point is not None:
            _collect(found, _invariants(tied, point), point)
    orbits = sorted((_classify(tied, point, hits, atlas) for _, point, hits in found), key=lambda orbit: orbit.value)
    known = {partition_type(np.asarray(tied.counts), orbit.partition) for orbit in orbits if orbit.known}
    missed = tuple(p for p in atlas if partition_type(np.asarray(tied.counts), p.partition) not in known)
    lowest = min([point.value for point in atlas] + [orbit.value for orbit in orbits])
    return Census(starts, sum(hits for *_, hits in found), tuple(orbits), missed, lowest)


class _Units:
    """f/s of a class-mean problem as a function of a vector in which both penalties weigh s; b, if any, is last."""

    def __init__(self, tied: Problem) -> None:
        balance, n = float(tied.lam_H / tied.lam_W) ** 0.25, np.asarray(tied.multiplicity)
        ones = jax.tree.map(jnp.ones_like, init(tied, jax.random.key(0), scale=0.0))
        self.unit, self.unravel = ravel_pytree(Params(balance * ones.W, ones.H / (balance * np.sqrt(n)), ones.b))
        self.K, self.size = tied.K, self.unit.size if tied.use_bias else self.unit.size - tied.K
        s = float(tied.s)
        self.fun = Partial(lambda x: objective(tied, self.point(x)) / s)
        self.gradient, self.hessian = jax.jit(jax.grad(self.fun)), jax.jit(jax.hessian(self.fun))

    def point(self, x: Array | np.ndarray) -> Params:
        """The point of a vector."""
        return self.unravel(self.unit.at[: self.size].multiply(x).at[self.size :].set(0))

    def vector(self, point: Params) -> np.ndarray:
        """The vector of a point."""
        return np.asarray((ravel_pytree(point)[0] / self.unit)[: self.size])

    def polished(self, x: np.ndarray, steps: int) -> Params | None:
        """Where Newton steps of least norm lead, if ∇f = 0 there to rounding."""
        for _ in range(steps):
            x = x - np.linalg.lstsq(self.hessian(x), self.gradient(x), rcond=1e-9)[0]
        size = 1 + np.linalg.norm(x[: self.unit.size - self.K])
        return self.point(x) if float(jnp.linalg.norm(self.gradient(x))) <= CRITICAL * size else None


def _searcher(tied: Problem) -> Callable[[Key[Array, ""]], Params | None]:
    """A function that leads a random start to a critical point, or None."""
    units, n = _Units(tied), np.asarray(tied.multiplicity)

    def search(key: Key[Array, ""]) -> Params | None:
        options = {"method": "lm", "xtol": TINY, "ftol": TINY, "gtol": TINY}
        x = scipy.optimize.least_squares(units.gradient, start(key), units.hessian, **options).x
        return units.polished(x, NEWTON_STEPS)

    def start(key: Key[Array, ""]) -> np.ndarray:
        scale_key, start_key, steps_key = jax.random.split(key, 3)
        low, high = np.log(SCALES)
        scale = jnp.exp(jax.random.uniform(scale_key, minval=low, maxval=high)) * n.mean() ** 0.25
        x = scale * jax.random.normal(start_key, (units.size,))
        return np.asarray(minimise(units.fun, x, max_steps=jax.random.choice(steps_key, DESCENTS)).params)

    return search


def settle(problem: Problem, x: Params) -> Orbit | None:
    """The critical point to which Newton steps of least norm lead from near it, classified; None if they lead to none.

    Args:
        problem: cross-entropy, concrete and small, as for hunt.
        x: a point with a column per class (class means).
    """
    tied = tie_features(problem)
    units = _Units(tied)
    point = units.polished(units.vector(x), SETTLING)
    return None if point is None else _classify(tied, point, 1, critical_points(tied))


def _invariants(tied: Problem, x: Params) -> np.ndarray:
    """What isometries of R^d, exchange of alike classes and shifts of the bias leave alone."""
    n, ratio = np.asarray(tied.counts), float(jnp.sqrt(tied.lam_W / tied.lam_H))
    W, b = np.asarray(x.W), np.asarray(x.b) - float(tied.use_bias and tied.lam_b == 0) * np.mean(x.b)
    sigma = np.linalg.svd(W, compute_uv=False) ** 2 * ratio
    rows = [np.sort(v[n == size]) for size in np.unique(n) for v in (np.sum(W**2, axis=1) * ratio, b)]
    return np.concatenate([[float(objective(tied, x))], sigma, *rows])


def _collect(found: list[list[Any]], invariants: np.ndarray, point: Params) -> None:
    """Count the point with those on its orbit, or as a new orbit."""
    for entry in found:
        if np.abs(entry[0] - invariants).max() <= SAME * (1 + np.abs(invariants).max()):
            entry[2] += 1
            return
    found.append([invariants, point, 1])


def _classify(tied: Problem, x: Params, hits: int, atlas: tuple[CriticalPoint, ...]) -> Orbit:
    signs, value, partition = inertia(tied, x), float(objective(tied, x)), tied_classes(tied, x)
    ratio = float(jnp.sqrt(tied.lam_W / tied.lam_H))
    rank = int((np.linalg.svd(np.asarray(x.W), compute_uv=False) ** 2 * ratio > RANK).sum())
    alike = partition_type(np.asarray(tied.counts), partition)
    known = any(
        partition_type(np.asarray(tied.counts), p.partition) == alike and abs(p.value - value) <= SAME * abs(value)
        for p in atlas
    )
    least = float(dense_eigenvalues(tied, x)[0])
    return Orbit(x, value, rank, signs.negative, signs.zero, least, partition, known, hits)


def tied_classes(tied: Problem, x: Params) -> Partition:
    """The partition of the classes into those that agree in size, row of W, feature and bias."""
    balance = float(tied.lam_W / tied.lam_H) ** 0.25
    columns = [balance * np.asarray(x.W), np.asarray(x.H).T / balance, np.asarray(x.b)[:, None]]
    rows = np.concatenate([*columns, np.asarray(tied.counts)[:, None]], axis=1)
    first = np.argmax(np.abs(rows[:, None] - rows).max(-1) <= TIED, axis=1)
    return check_partition(tied.K, [np.flatnonzero(first == k).tolist() for k in np.unique(first)])
