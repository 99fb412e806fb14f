"""A subspace that grows towards the lower end of a spectrum: block Davidson with a polynomial filter."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, Float, Key

from ufm.numerics.krylov import flat_lanczos

DEGREE = 50  # Lanczos steps, whose Ritz values are the roots of the filter
HEIGHT = 0.1  # of the filter beyond the wanted eigenvalues, relative to the end of the spectrum
ROUNDINGS = 1e3  # what is left of a unit vector below so many roundings is noise


class Subspace(NamedTuple):
    """Orthonormal rows V of which the first so many are filled while the rest are zero, AV, and T = V(AV)ᵀ."""

    V: Float[Array, "m n"]
    AV: Float[Array, "m n"]
    T: Float[np.ndarray, "m m"]
    filled: int

    def ritz(self) -> tuple[np.ndarray, np.ndarray]:
        """Ritz values, ascending, and the Ritz vectors' coordinates in the rows of V, as rows."""
        values, inner = np.linalg.eigh(self.T[: self.filled, : self.filled])
        coordinates = np.zeros((self.filled, len(self.V)), self.V.dtype)
        coordinates[:, : self.filled] = inner.T
        return values, coordinates

    def combine(self, coordinates: np.ndarray) -> tuple[Array, Array]:
        """The vectors with these coordinates, and A times them."""
        return _combine(coordinates, self.V, self.AV)

    def restart(self, values: np.ndarray, coordinates: np.ndarray) -> "Subspace":
        """The span of these Ritz vectors alone."""
        keep = len(values)
        padded = np.zeros_like(self.T, self.V.dtype)
        padded[:keep] = coordinates
        T = np.zeros_like(self.T)
        T[:keep, :keep] = np.diag(values)
        return Subspace(*self.combine(padded), T, keep)


def empty(rows: int, size: int, dtype: np.dtype) -> Subspace:
    """No vectors yet, and room for so many."""
    nothing = functools.partial(jnp.zeros, (rows, size), dtype)
    return Subspace(nothing(), nothing(), np.zeros((rows, rows)), 0)


def distinct_ritz_values(A: Partial, v: Float[Array, " n"], steps: int) -> np.ndarray:
    """What a Lanczos run sees of A's spectrum, ascending; of Ritz values that agree the best resolved one.

    Past the step where the Krylov space is all but invariant, rounding would add unresolved copies.
    """
    run = flat_lanczos(A, v, steps)
    alpha, beta = np.asarray(run.diagonal, float), np.asarray(run.off_diagonal, float)
    scale = max(np.abs(alpha).max(), beta.max())
    m = 1 + int(np.argmax(np.append(beta[:-1] <= np.finfo(v.dtype).eps ** 0.5 * scale, True)))
    values, inner = np.linalg.eigh(np.diag(alpha[:m]) + np.diag(beta[: m - 1], -1))
    kept: list[float] = []
    for i in np.argsort(np.abs(inner[-1])):  # the last components are the residuals over beta
        if np.all(np.abs(values[i] - kept) > scale / (100 * DEGREE**2)):
            kept.append(values[i])
    return np.sort(kept)


def filter_roots(seen: np.ndarray, bound: float, end: float) -> np.ndarray:
    """Where p(A) vanishes: Ritz values that lie above the bound, and what else keeps |p| ≤ p(end)/10 from there up.

    If the bound is one of the k-th eigenvalue, no wanted eigenvalue is near a root: a polynomial of degree D resolves
    1/D² of the spectrum's width at an end. Where too many roots would be needed they are those of Chebyshev's.
    """
    cut = bound + (seen[-1] - end) / DEGREE**2
    if cut >= seen[-1]:
        return seen[1:][-1:]
    angles = np.linspace(0, np.pi, 20 * DEGREE)
    grid = cut + (seen[-1] - cut) * (1 - np.cos(angles)) / 2
    roots = seen[1:][seen[1:] > cut]
    with np.errstate(divide="ignore"):
        height = np.log(np.abs((grid[:, None] - roots) / (end - roots))).sum(1)
        while height.max() > np.log(HEIGHT) and len(roots) < 2 * DEGREE:
            roots = np.append(roots, grid[np.argmax(height)])
            height = height + np.log(np.abs((grid - roots[-1]) / (end - roots[-1])))
    if height.max() > np.log(HEIGHT):
        roots = cut + (seen[-1] - cut) * (1 - np.cos((np.arange(DEGREE) + 0.5) * np.pi / DEGREE)) / 2
    return _leja(roots)


def _leja(points: np.ndarray) -> np.ndarray:
    """In an order in which no partial product Π (x − root) overflows: each the farthest from those before."""
    order: list[int] = []
    log = np.array(points, float)
    for step in range(len(points)):
        order.append(int(np.argmax(log)))
        with np.errstate(divide="ignore"):
            log = log * (step > 0) + np.log(np.abs(points - points[order[-1]]))
    return points[order]


def expand(
    A: Partial, space: Subspace, W: Float[Array, "b n"], roots: np.ndarray, end: float, key: Key[Array, ""]
) -> Subspace:
    """With p(A)W, p(end) = 1; what lies in the span already makes room for random vectors."""
    padded = np.zeros((2, 2 * DEGREE), W.dtype)
    padded[:, : len(roots)] = roots, 1 / (end - roots)
    V, AV, new = _expand(A, space.V, space.AV, space.filled, W, *padded, len(roots), key)
    now = slice(space.filled, space.filled + len(W))
    T = space.T.copy()
    T[:, now] = new
    T[now] = T[:, now].T
    T[now, now] = (T[now, now] + T[now, now].T) / 2
    return Subspace(V, AV, T, now.stop)


@functools.partial(jax.jit, donate_argnums=(1, 2))
def _expand(
    A: Partial, V: Array, AV: Array, count: Any, W: Array, roots: Array, scales: Array, degree: Any, key: Array
) -> tuple[Array, Array, Array]:
    def filtered(w: Array) -> Array:
        return jax.lax.fori_loop(0, degree, lambda i, w: (A(w) - roots[i] * w) * scales[i], w)

    W = _orthonormalised(jax.lax.map(filtered, W), V, A.keywords["away"], key)
    AW = jax.lax.map(A, W)
    V = jax.lax.dynamic_update_slice(V, W, (count, 0))
    AV = jax.lax.dynamic_update_slice(AV, AW, (count, 0))
    return V, AV, V @ AW.T


def _orthonormalised(W: Array, V: Array, Q: Array, key: Array) -> Array:
    """An orthonormal basis of W's part orthogonal to V and Q, completed by random directions where that is noise."""
    off = lambda W: _off(Q, _off(V, W))  # noqa: E731
    norms = jnp.linalg.norm(W, axis=1, keepdims=True)
    Qt, R = jnp.linalg.qr(off(W / jnp.where(norms > 0, norms, 1)).T)
    noise = jnp.abs(jnp.diag(R)) <= ROUNDINGS * jnp.finfo(W.dtype).eps
    fresh = jax.random.normal(key, W.shape, W.dtype) / W.shape[1] ** 0.5
    W = jnp.where(noise[:, None], fresh, Qt.T)
    for _ in range(2):
        W = jnp.linalg.qr(off(W).T)[0].T
    return W


def _off(V: Array, W: Array) -> Array:
    return W - (W @ V.T) @ V


@jax.jit
def _combine(coordinates: Array, V: Array, AV: Array) -> tuple[Array, Array]:
    return coordinates @ V, coordinates @ AV
