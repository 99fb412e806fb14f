"""What kind of point it is: optimum, strict saddle or neither; how many directions go down, and where they lead."""

import itertools
import math
from collections import Counter
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from ufm.lab.atlas import TYPES, critical_points, partition_type
from ufm.lab.census import tied_classes
from ufm.lab.optimum import optimal_value
from ufm.model.problem import Params, Problem, objective, tie_features
from ufm.numerics.curvature import hessian_operator
from ufm.numerics.eigenpairs import extreme_eigenpairs
from ufm.numerics.minimise import minimise
from ufm.numerics.newton import polish
from ufm.theory.atlas import Partition, integer_partitions
from ufm.theory.certificate import Certificate, Verdict, certify
from ufm.theory.elimination import CRITICAL, Inertia, inertia
from ufm.theory.escape import LENGTHS

VARIABLES = 100_000  # beyond which the least eigenvector is sought among movements alike within classes
PRODUCTS = 2000  # Hessian products for it
TOL = 1e-7  # its residual, relative to ‖∇²f‖
SLACK = 2e-6  # how far λ_min may be below θ, so relative; more than CRITICAL, lest inertia takes the shift for a zero
TELLING = 0.5  # width of the bracket about λ_min, relative to it or to the lesser of λ_W and λ_H
CLEAR = 10  # roundings by which a sign is beyond doubt
SAME = 1e-9  # relative difference of values that is none
GLOBAL = 1e-8  # relative excess over f* of a global optimum, as certify's
GRADIENT = 1e-10  # at which a descent ends, relative to s


class Steepest(NamedTuple):
    """The least eigenvalue of ∇²f over (W, H, b), as far as it was found.

    Attributes:
        eigenvalue: the Rayleigh quotient θ of a unit direction; λ_min ≤ θ whether it converged or not.
        residual: ‖∇²f v − θ v‖: some eigenvalue lies within it of θ.
        lower_bound: θ − 2e-6 ‖∇²f‖, which is ≤ λ_min if converged.
        converged: whether it is, as the inertia of ∇²f less that multiple of I decides, and the two are close enough to
            tell λ_min from 0 or from λ_W and λ_H; not so where some curvature is a million times steeper.
        direction: v, a unit vector if every sample's own column is counted.
    """

    eigenvalue: float
    residual: float
    lower_bound: float
    converged: bool
    direction: Params


@dataclass(frozen=True)
class Descent:
    """Where f leads downhill.

    Attributes:
        drop: how far f falls along the least eigenvector before the descent begins; 0 where it does not curve down.
        value: f at the end, nats.
        verdict: the certificate's at the end.
        gap: f − f* at the end is at most that, nats.
        index: negative eigenvalues at the end.
        partition: classes that coincide at the end.
    """

    drop: float
    value: float
    verdict: Verdict
    gap: float
    index: int
    partition: Partition


class Saddle(NamedTuple):
    """An entry of the atlas: the partition and f at its critical point, nats; the optimum is one of them."""

    partition: Partition
    value: float


@dataclass(frozen=True)
class Neighbours:
    """Where a value lies among the partition saddles.

    Attributes:
        entries: how many types of partitions have a critical point of their own.
        alike: the one whose classes are merged as the point's are, if there is one.
        below: the highest of those lower in f; None at or below the optimum.
        above: the lowest of those higher in f; None above all.
    """

    entries: int
    alike: Saddle | None
    below: Saddle | None
    above: Saddle | None


@dataclass(frozen=True)
class Classification:
    """What is known of a point.

    Attributes:
        verdict: the certificate's, or more where f* or the curvature tell more; see classify.
        certificate: value, gap, rounding, and at a strict saddle the escape: curvature predicted and measured, drop.
        excess: f − f*, nats; None where f* is not known (d < K − 1, or no certified optimum).
        signs: numbers of negative, zero and positive eigenvalues with their margin, and the relative gradient.
        steepest: the least eigenvalue and its direction.
        descent: where f leads from here; None at a global optimum.
        partition: classes that coincide in size, row of W, mean feature and bias.
        neighbours: the atlas about the point; None where omitted.
        omitted: why the atlas is omitted, or None.
    """

    verdict: Verdict
    certificate: Certificate
    excess: float | None
    signs: Inertia
    steepest: Steepest
    descent: Descent | None
    partition: Partition
    neighbours: Neighbours | None
    omitted: str | None

    @property
    def critical(self) -> bool:
        """Whether the relative gradient is at most 1e-6; if not, signs.negative is no Morse index."""
        return self.signs.relative_gradient <= CRITICAL


def classify(problem: Problem, params: Params, *, rigorous: bool = False, key: Key[Array, ""]) -> Classification:
    """Global optimum, strict saddle, undecided or not critical; with index, least curvature, descent and neighbours.

    The verdict is certify's. If it is not to be rigorous, two more are given where certify finds nothing: GLOBAL if f
    is known to exceed f* by at most 1e-8 f, where the gap was too large to show it; and STRICT_SADDLE, as at saddles
    with rank W = d, if the point is critical (not NOT_CRITICAL), has negative eigenvalues and falls along the steepest
    direction, both beyond rounding, and the gap is no mere effect of the gradient.

    The descent starts at the lowest point on the line along the least eigenvector, where it is one of negative
    curvature, or else at the point itself. Averaging features within classes then lowers f, which is convex in each;
    the rest is L-BFGS over class means, so its end is one of many points that a descent could reach. Movements alike
    within classes also stand in for all where there are more than 100,000 variables: at a critical point they hold the
    least eigenvector, elsewhere residual and lower bound tell how good it is.

    Args:
        problem: cross-entropy, concrete.
        params: any finite point.
        rigorous: let the certificate prove its verdict in ball arithmetic; the rest is floating point.
        key: starts the search for the least eigenvalue.

    Raises:
        ValueError: as certify and inertia do.
        ModuleNotFoundError: as certify does.

    Source: THEORY 0, 1.8, 8.1, 8.3.
    """
    certificate = certify(problem, params, rigorous=rigorous)
    problem, params = jax.tree.map(lambda x: jnp.asarray(x, float), (problem, params))
    signs = inertia(problem, params)
    steepest = _steepest(problem, params, signs, key)
    downhill = steepest.eigenvalue + steepest.residual < 0
    start, drop = _lowest_on_line(problem, params, steepest.direction) if downhill else (params, jnp.zeros(()))
    value = float(objective(problem, params))
    excess, verdict = _excess(problem, value), certificate.verdict
    if not rigorous:
        verdict = _verdict(certificate, excess, signs, float(drop))
    descent = None if verdict == Verdict.GLOBAL else _descend(problem, start, float(drop))
    partition = tied_classes(tie_features(problem), _unit_size(problem, _class_means(problem, params)))
    neighbours, omitted = _neighbours(problem, partition, value)
    return Classification(verdict, certificate, excess, signs, steepest, descent, partition, neighbours, omitted)


def _verdict(c: Certificate, excess: float | None, signs: Inertia, drop: float) -> Verdict:
    """The certificate's, or what f* and a fall beyond rounding say where it found nothing."""
    value, rounding = float(c.value), float(c.rounding)
    nothing_found = c.verdict in (Verdict.UNDECIDED, Verdict.NOT_CRITICAL)
    if nothing_found and excess is not None and excess + rounding <= GLOBAL * value:
        return Verdict.GLOBAL
    explained = math.sqrt(signs.relative_gradient) * value  # a gap that the gradient alone can make
    if (
        c.verdict == Verdict.UNDECIDED
        and float(c.gap) > explained
        and signs.margin >= CLEAR
        and drop > CLEAR * rounding
    ):
        return Verdict.STRICT_SADDLE
    return c.verdict


def _excess(problem: Problem, value: float) -> float | None:
    if problem.d < problem.K - 1:
        return None
    try:
        return value - float(optimal_value(_narrow(problem)))
    except ArithmeticError:
        return None


def _narrow(problem: Problem) -> Problem:
    """The class-mean problem at d = K − 1, from which on f at the optimum and at partition saddles is the same."""
    return replace(tie_features(problem), d=problem.K - 1)


def _class_means(problem: Problem, x: Params) -> Params:
    H = (np.asarray(x.H) * problem.multiplicity) @ np.asarray(problem.Y).T / problem.counts
    return Params(x.W, jnp.asarray(H), x.b)


def _coordinates(problem: Problem, x: Params, balance: Any = 1.0) -> tuple[Array, ...]:
    """(W/β, β√ω_i h_i, b), in which equal columns are as long as one; without b where the model has none."""
    return (x.W / balance, balance * jnp.sqrt(problem.multiplicity) * x.H, x.b)[: 2 + problem.use_bias]


def _point(problem: Problem, y: tuple[Array, ...], balance: Any = 1.0) -> Params:
    b = y[2] if problem.use_bias else jnp.zeros(problem.K)
    return Params(balance * y[0], y[1] / (balance * jnp.sqrt(problem.multiplicity)), b)


def _value(problem: Problem, balance: Any, y: tuple[Array, ...]) -> Float[Array, ""]:
    return objective(problem, _point(problem, y, balance))


def _steepest(problem: Problem, params: Params, signs: Inertia, key: Key[Array, ""]) -> Steepest:
    """The least eigenpair; where disparate λ's hide it, a direction that curves down if there is one."""
    found = _least(problem, params, 1.0, signs, key)
    if found.eigenvalue < 0 or not signs.negative:
        return found
    balance = (problem.lam_H / problem.lam_W) ** 0.25
    return _least(problem, params, balance, signs, key)._replace(converged=False)


def _least(problem: Problem, params: Params, balance: Any, signs: Inertia, key: Key[Array, ""]) -> Steepest:
    """The least eigenpair in the coordinates of this balance, judged by the Hessian at the point itself."""
    few = problem.d * (problem.K + problem.Y.shape[1]) <= VARIABLES
    model, x = (problem, params) if few else (tie_features(problem), _class_means(problem, params))
    like = _coordinates(model, x, balance)
    operator = hessian_operator(partial(_value, model, balance), like)
    found = extreme_eigenpairs(operator, like, 1, "smallest", key, tol=TOL, max_products=PRODUCTS)
    v = _point(model, jax.tree.map(lambda leaf: leaf[0], found.vectors), balance)
    v = v if few else Params(v.W, v.H @ problem.Y, v.b)
    norm = jnp.sqrt(sum(jnp.sum(leaf**2) for leaf in _coordinates(problem, v)))
    v = jax.tree.map(lambda leaf: leaf / norm, v)
    y, direction = _coordinates(problem, params), _coordinates(problem, v)
    w, product = _flat(direction), _flat(hessian_operator(partial(_value, problem, 1.0), y)(direction))
    theta = float(w @ product)
    residual = float(np.linalg.norm(product - theta * w))
    bound = theta - SLACK * float(found.norm)
    telling = theta - bound <= TELLING * max(abs(theta), float(jnp.minimum(problem.lam_W, problem.lam_H)))
    return Steepest(theta, residual, bound, telling and _none_below(problem, params, bound, signs), v)


def _flat(y: tuple[Array, ...]) -> np.ndarray:
    return np.concatenate([np.ravel(leaf) for leaf in y])


def _none_below(problem: Problem, params: Params, mu: float, signs: Inertia) -> bool:
    """Whether no eigenvalue of ∇²f is below μ: ∇²f − μI is the Hessian of the problem with every λ less by μ."""
    if mu <= 0 and signs.negative == 0 and signs.relative_gradient > CRITICAL:  # counted with no allowance for zeros
        return True
    lam_W, lam_H, lam_b = (np.asarray(x) - mu for x in (problem.lam_W, problem.lam_H, problem.lam_b))
    if min(lam_W, lam_H) <= 0 or (problem.use_bias and lam_b < 0):  # λ_min ≤ λ_W, and ≤ λ_b by a shift of the bias
        return False
    lam_b = np.maximum(lam_b, 0)
    shifted = inertia(replace(problem, lam_W=lam_W, lam_H=lam_H, lam_b=lam_b), params)
    return shifted.negative == shifted.zero == 0


@jax.jit
def _lowest_on_line(problem: Problem, params: Params, v: Params) -> tuple[Params, Array]:
    """The lowest of points ±τv away on a geometric grid of τ ≥ 0, and how much lower it is."""
    steps = jnp.concatenate([jnp.zeros(1), LENGTHS, -LENGTHS])
    moved = lambda tau: jax.tree.map(lambda x, dx: x + tau * dx, params, v)  # noqa: E731
    values = jax.lax.map(lambda tau: objective(problem, moved(tau)), steps)
    return moved(steps[jnp.argmin(values)]), values[0] - jnp.min(values)


def _descend(problem: Problem, start: Params, drop: float) -> Descent:
    """L-BFGS over class means in units in which both penalties weigh s, polished by Newton's method."""
    tied, means = tie_features(problem), _class_means(problem, start)
    balance, s = (tied.lam_H / tied.lam_W) ** 0.25, tied.s
    fun = partial(_value, tied, balance)
    end = minimise(fun, _coordinates(tied, means, balance), tol=GRADIENT * s).params
    means = _point(tied, polish(fun, end).params, balance)
    x = Params(means.W, means.H @ problem.Y, means.b)
    c, partition = certify(problem, x), tied_classes(tied, _unit_size(tied, means))
    return Descent(drop, float(c.value), c.verdict, float(c.gap + c.rounding), inertia(problem, x).negative, partition)


def _unit_size(problem: Problem, means: Params) -> Params:
    """The point in units of its largest entry if that exceeds 1 in balanced units, where tied_classes compares."""
    balance = float(problem.lam_W / problem.lam_H) ** 0.25
    W, H, b = (np.abs(leaf).max() for leaf in (means.W, means.H, means.b))
    unit = max(1, balance * W, H / balance, b)
    return Params(means.W / unit, means.H / unit, means.b / unit)


def _neighbours(problem: Problem, partition: Partition, value: float) -> tuple[Neighbours | None, str | None]:
    """The atlas about a value, or why there is none."""
    p, counts = problem, np.asarray(problem.counts)
    if p.d < p.K - 1:
        return None, f"d = {p.d} is less than K - 1 = {p.K - 1}"
    if _types(counts) > TYPES:
        return None, f"the {p.K} classes have more than {TYPES} types of partitions"
    try:
        atlas = [Saddle(point.partition, point.value) for point in critical_points(_narrow(p))]
    except ArithmeticError as error:
        return None, str(error)
    merged = partition_type(counts, partition)
    alike = next((x for x in atlas if partition_type(counts, x.partition) == merged), None)
    below = [x for x in atlas if x.value < value * (1 - SAME)]
    above = [x for x in atlas if x.value > value * (1 + SAME)]
    return Neighbours(len(atlas), alike, below[-1] if below else None, above[0] if above else None), None


def _types(counts: np.ndarray) -> int:
    """How many types of partitions there are, counted no further than is needed."""
    sizes = Counter(counts.astype(int).tolist()).values()
    return math.prod(sum(1 for _ in itertools.islice(integer_partitions(k), TYPES + 1)) for k in sizes)
