"""Extreme eigenpairs of a symmetric operator, however many of its eigenvalues coincide."""

from collections.abc import Callable, Sequence
from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jax.tree_util import Partial
from jaxtyping import Array, Bool, Float, Key, PyTree

from ufm.numerics.curvature import check_count, check_point, check_symmetric, flat_operator, rounding_unit
from ufm.numerics.subspace import DEGREE, ROUNDINGS, Subspace, distinct_ritz_values, empty, expand, filter_roots

BASIS = 80  # vectors kept, unless four times as many as are wanted are more


class Eigenpairs(eqx.Module):
    """Eigenpairs from one end of the spectrum, outermost first.

    Attributes:
        eigenvalues: θ.
        vectors: orthonormal v, a pytree whose leaves have a leading axis k.
        residuals: ‖Av − θv‖ of the vectors returned: A has an eigenvalue within it of θ.
        converged: whether the residual is at most tol·norm.
        norm: the largest |Ritz value| seen, a lower bound of ‖A‖ and sharp in practice.
        products: operator products used.
    """

    eigenvalues: Float[Array, " k"]
    vectors: PyTree
    residuals: Float[Array, " k"]
    converged: Bool[Array, " k"]
    norm: Float[Array, ""]
    products: int = eqx.field(static=True)


def extreme_eigenpairs(
    matvec: Callable[[PyTree], PyTree], like: PyTree, k: int, which: Literal["smallest", "largest"],
    key: Key[Array, ""], *, tol: float | None = None, max_products: int = 20_000, block: int | None = None,
    deflate: Sequence[PyTree] = (),
) -> Eigenpairs:  # fmt: skip
    """Av = θv for the k algebraically smallest or largest θ, each with its residual.

    Block Davidson: the subspace starts with k random vectors, so that it holds k copies of an eigenvalue of whatever
    multiplicity, and grows by p(A)v of Ritz vectors v, where p is large at the wanted end alone. Directions that are
    in it already (an invariant subspace after a few steps, where few eigenvalues are distinct) give way to random ones.

    A residual bounds the distance to some eigenvalue. That none further out was missed is likely, not proved: one that
    stands out by less than about 1e-6 of the norm from hundreds that coincide can be. For the features model
    elimination counts signs for sure.

    No library meets both demands (benchmarks/curvature.py): SciPy's eigsh, faster for a few pairs, returns 96 of the
    144 copies at the origin of the features model without an error, and jax's lobpcg_standard misses the residual at
    its optimum.

    Args:
        matvec: a symmetric operator on pytrees; new leaves of the same shape compile nothing new.
        like: a pytree of the shapes and dtypes it takes; values do not matter.
        k: how many.
        which: the end of the spectrum.
        key: draws the start.
        tol: what the residual may be, relative to the norm of A; √eps/2 unless stated. Much less is out of reach.
        max_products: no new step begins after so many; pairs still open are then not marked converged.
        block: vectors by which the subspace grows at once; k unless stated. Fewer save products where the end of the
            spectrum is crowded.
        deflate: known directions, dependent or not, to which all vectors stay orthogonal; the span should be
            invariant, such as the tangents of a symmetry orbit at a critical point, else no residual vanishes.

    Raises:
        ValueError: if matvec is not symmetric, not finite, not like to like or of a norm outside 1e±300 (float64), if
            deflate is not like `like` and finite, or a number is out of range.

    Source: Zhou & Saad 2007 (Chebyshev-Davidson), with the roots of the filter from a Lanczos run.
    """
    operator, sign = flat_operator(matvec, like), _sign(which)
    flat, eps = ravel_pytree(like)[0], rounding_unit(like)
    tol = eps**0.5 / 2 if tol is None else tol
    _check_numbers(k, block, max_products, tol)
    Q = _orthonormal(like, deflate)
    room = flat.size - len(Q)
    if k > room:
        raise ValueError(f"k must be at most {room}, the dimension less the deflated directions; got {k}")
    check_key, key = jax.random.split(key)
    unit = _unit(check_symmetric(operator, flat, check_key, eps=eps), flat.dtype)
    A = Partial(_compressed, operator, sign / unit, away=Q)
    V, norm, products = _search(A, flat, room, k, block or k, tol, max_products, key)
    theta, residuals = _judged(operator, unit, V)
    vectors, converged = jax.vmap(ravel_pytree(like)[1])(V), residuals <= tol * norm
    return Eigenpairs(unit * theta, vectors, unit * residuals, converged, unit * norm, products + k)


def _search(
    A: Partial, flat: Array, room: int, k: int, block: int, tol: float, max_products: int, key: Array
) -> tuple[Array, float, int]:
    """The k lowest Ritz vectors once they have converged, the largest |Ritz value| and the products used."""
    lanczos_key, start_key, key = jax.random.split(key, 3)
    v, W = (jax.random.normal(x, (c, flat.size), flat.dtype) for x, c in ((lanczos_key, 1), (start_key, k)))
    products = min(DEGREE, room)
    seen = distinct_ritz_values(A, _without(A.keywords["away"], v[0]), products)
    norm, bound, end = abs(seen).max(), seen[min(k, len(seen)) - 1], seen[0]
    space = empty(min(max(BASIS, 4 * k), room), flat.size, flat.dtype)
    while True:
        roots = filter_roots(seen, bound, end)
        space = expand(A, space, W, roots, end, jax.random.fold_in(key, products))
        products += len(W) * (len(roots) + 1)
        values, coordinates = space.ritz()
        norm, bound, end = max(norm, abs(values).max()), values[k - 1], min(end, values[0])
        open_pairs = np.flatnonzero(_residuals(space, values[:k], coordinates[:k]) > tol * norm)
        if not open_pairs.size or products >= max_products or space.filled == room:
            return space.combine(coordinates[:k])[0], norm, products
        space, W = _room_for(block, space, values, coordinates, room, open_pairs)


def _room_for(
    block: int, space: Subspace, values: np.ndarray, coordinates: np.ndarray, room: int, open_pairs: np.ndarray
) -> tuple[Subspace, Array]:
    """The subspace, cut to its lowest Ritz vectors if full, and Ritz vectors to grow from, open ones first."""
    rest = np.setdiff1d(np.arange(space.filled), open_pairs)
    capacity = len(space.V)
    if space.filled + block <= capacity or capacity == room:
        free = min(block, capacity - space.filled)
        return space, space.combine(coordinates[np.append(open_pairs, rest)[:free]])[0]
    W = space.combine(coordinates[np.append(open_pairs, rest)[:block]])[0]
    keep = capacity // 2
    return space.restart(values[:keep], coordinates[:keep]), W


def _residuals(space: Subspace, values: np.ndarray, coordinates: np.ndarray) -> np.ndarray:
    Y, AY = space.combine(coordinates)
    return np.linalg.norm(AY - values[:, None] * Y, axis=1)


def _sign(which: str) -> int:
    if which not in (signs := {"smallest": 1, "largest": -1}):
        raise ValueError(f"which must be 'smallest' or 'largest', got {which!r}")
    return signs[which]


def _check_numbers(k: int, block: int | None, max_products: int, tol: float) -> None:
    for name, count in (("k", k), ("max_products", max_products), ("block", 1 if block is None else block)):
        check_count(name, count)
    if not 0 < tol < 1:
        raise ValueError(f"tol must be between 0 and 1, got {tol}")


def _unit(largest: float, dtype: np.dtype) -> Array:
    """A power of two near the operator's size, by which its numbers are brought to about 1."""
    limits = jnp.finfo(dtype)
    if largest and not float(limits.tiny) * 1e8 < largest < float(limits.max) / 1e8:
        raise ValueError(f"matvec must have a norm that its squares can tell, got numbers of {largest:.0e}; rescale it")
    return jnp.asarray(2.0 ** np.round(np.log2(largest)) if largest else 1.0, dtype)


def _orthonormal(like: PyTree, deflate: Sequence[PyTree]) -> Array:
    """Orthonormal rows with the span of the given pytrees."""
    flat, rows = ravel_pytree(like)[0], []
    for x in deflate:
        if jax.tree.map(jnp.shape, x) != jax.tree.map(jnp.shape, like):
            raise ValueError("deflate must hold pytrees like the vectors; one has other leaves or shapes")
        check_point(x, "deflate")
        row = np.asarray(ravel_pytree(x)[0], flat.dtype)
        rows += [row / np.abs(row).max()] if row.any() else []
    if not rows:
        return jnp.zeros((0, flat.size), flat.dtype)
    unit = np.stack([row / np.linalg.norm(row) for row in rows])
    _, s, Qt = np.linalg.svd(unit, full_matrices=False)
    return jnp.asarray(Qt[s > ROUNDINGS * np.finfo(flat.dtype).eps * s[0]])


def _compressed(operator: Partial, sign: Array, v: Array, *, away: Array) -> Array:
    return _without(away, sign * operator(v))


def _without(Q: Array, v: Array) -> Array:
    return v - (Q @ v) @ Q


@jax.jit
def _judged(operator: Partial, unit: Array, V: Array) -> tuple[Array, Array]:
    """Rayleigh quotients and residuals, in the unit."""
    AV = jax.lax.map(operator, V) / unit
    theta = jnp.sum(V * AV, axis=1)
    return theta, jnp.linalg.norm(AV - theta[:, None] * V, axis=1)
