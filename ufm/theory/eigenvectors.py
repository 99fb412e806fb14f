"""Eigenvectors of the Hessian at symmetric critical points, level by level (THEORY 1.3).

A block of the spectrum is a matrix repeated over a space of movements: group contrasts, class differences within
groups, directions across the row space of W. One random element of that space gives one eigenvector of every level of
the block.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Key

from ufm.model.geometry import centring, simplex_etf
from ufm.model.problem import Params, Problem, is_concrete, tie_features
from ufm.theory.atlas import equal_groups
from ufm.theory.duality import sample_gradient
from ufm.theory.optimum import is_balanced, origin_logits
from ufm.theory.spectrum import OUTSIDE, Where, spectrum_blocks

Movements = list[Params]


def eigenvector(problem: Problem, at: Where, level: int, key: Key[Array, ""]) -> Params:
    """A unit eigenvector of ∇²f, uniformly random in one level of hessian_spectrum(problem, at).

    The point is balanced_minimiser(problem), coarse_etf(problem, at), or W = H = 0 at the best bias. As many draws as
    the multiplicity says span the level.

    Args:
        problem: as for hessian_spectrum, every column one sample, λ's concrete.
        at: as for hessian_spectrum.
        level: position in its eigenvalues and labels.
        key: of the draw.

    Raises:
        ValueError: as hessian_spectrum does; if columns stand for more than one sample; if there is no such level.
    """
    if not (np.asarray(problem.multiplicity) == 1).all():
        raise ValueError("multiplicity must be 1 everywhere: an eigenvector has a column for every sample")
    if not all(is_concrete(x) for x in (problem.lam_W, problem.lam_H, problem.lam_b)):
        raise ValueError("lam_W, lam_H or lam_b is traced; eigenvectors need known λ's")
    levels = [(block, j) for block in spectrum_blocks(problem, at) for j in range(len(block.matrix))]
    if not 0 <= level < len(levels):
        raise ValueError(f"level must be one of the {len(levels)} levels of the spectrum, got {level}")
    block, j = levels[level]
    mix = np.linalg.eigh(np.asarray(block.matrix))[1][:, j]
    movements = _movements(problem, at, block.label, key)[: len(mix)]  # b comes last, and is left out without bias
    terms = [c / optax.tree.norm(x) for c, x in zip(mix, movements, strict=True)]
    return jax.tree.map(lambda *parts: sum(c * part for c, part in zip(terms, parts, strict=True)), *movements)


def _movements(problem: Problem, at: Where, label: str, key: Key[Array, ""]) -> Movements:
    """A random element of the space of a block, in each of the coordinates of its matrix."""
    if at == "origin" and not is_balanced(problem):
        return _at_unequal_origin(problem, label, key)
    K = problem.K
    named: dict[Any, Any] = {"origin": [range(K)], "optimum": [[k] for k in range(K)]}
    groups = equal_groups(K, named[at] if isinstance(at, str) else at)
    m, group = len(groups), np.empty(K, int)
    for i, classes in enumerate(groups):
        group[list(classes)] = i
    M = simplex_etf(m, m - 1) if m > 1 else np.zeros((1, 0))
    return AT_SADDLE[label](_Saddle(problem, m, M, group, key))


class _Saddle(NamedTuple):
    """The coarse ETF of m groups with frame M (m×(m−1)); W's row space is that of the first m − 1 coordinates."""

    problem: Problem
    m: int
    M: np.ndarray
    group: np.ndarray
    key: Key[Array, ""]

    @property
    def out(self) -> int:
        """Dimension of what the rows of W do not span."""
        return self.problem.d - self.m + 1

    def normal(self, *shape: int) -> np.ndarray:
        """Independent normal entries."""
        return np.asarray(jax.random.normal(self.key, shape))

    def spread(self, X: np.ndarray) -> np.ndarray:
        """Rows of the groups as rows of their classes."""
        return X[self.group]

    def within_groups(self, q: int) -> np.ndarray:
        """K×q with columns that sum to zero over each group."""
        return _centred(self.normal(self.problem.K, q), self.group)

    def within_classes(self, q: int) -> np.ndarray:
        """N×q with columns that sum to zero over each class."""
        return _centred(self.normal(self.problem.Y.shape[1], q), _labels(self.problem))

    def between_groups(self, q: int) -> np.ndarray:
        """K×q, rows alike within groups, with columns that sum to zero."""
        return self.spread(centring(self.m) @ self.normal(self.m, q))

    def inside(self, X: np.ndarray) -> np.ndarray:
        """In the row space of W."""
        return np.pad(X, ((0, 0), (0, self.out)))

    def outside(self, X: np.ndarray) -> np.ndarray:
        """Outside the row space of W."""
        return np.pad(X, ((0, 0), (self.m - 1, 0)))

    def W(self, X: np.ndarray) -> Movements:
        """Rows of W moving."""
        return [_params(self.problem, W=X)]

    def H(self, X: np.ndarray) -> Movements:
        """Features moving, by a row for each class or for each sample."""
        return [_params(self.problem, H=(X[_labels(self.problem)] if len(X) == self.problem.K else X).T)]

    def b(self, x: np.ndarray) -> Movements:
        """The bias moving."""
        return [_params(self.problem, b=x)]

    def both(self, X: np.ndarray) -> Movements:
        """Rows of W moving, or features."""
        return self.W(X) + self.H(X)


def _centred(X: np.ndarray, group: np.ndarray) -> np.ndarray:
    means = np.eye(group.max() + 1)[group]
    return X - means @ (means.T @ X / means.sum(0)[:, None])


def _labels(problem: Problem) -> np.ndarray:
    return np.argmax(np.asarray(problem.Y), axis=0)


def _across(X: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """X less its part along each row's direction."""
    return X - np.sum(X * rows, axis=1, keepdims=True) * rows / np.sum(rows * rows, axis=1, keepdims=True)


def _along_w(at: _Saddle) -> Movements:
    c = at.within_groups(1)
    return at.both(at.inside(c * at.spread(at.M))) + at.b(c[:, 0])


def _symmetric(at: _Saddle) -> Movements:
    """M S with S symmetric, tr S = 0 and the diagonal of M S Mᵀ zero."""
    m, M = at.m, at.M
    S = at.normal(m - 1, m - 1)
    S = S + S.T - 2 * np.trace(S) / (m - 1) * np.eye(m - 1)
    v = np.sum(M @ S * M, axis=1) / (1 - 2 / m)
    return at.both(at.inside(at.spread(M @ (S - M.T @ (v[:, None] * M)))))


def _turning(at: _Saddle) -> Movements:
    A = at.normal(at.m - 1, at.m - 1)
    return at.both(at.inside(at.spread(at.M @ (A - A.T))))


def _standard(at: _Saddle) -> Movements:
    """A group contrast v: M Mᵀ diag(v) M in W and H (zero for two groups), Mᵀv in all features, v in b."""
    M, v = at.M, centring(at.m) @ at.normal(at.m)
    frame = at.both(at.inside(at.spread(M @ M.T @ (v[:, None] * M)))) if at.m > 2 else []
    return frame + at.H(at.inside(np.tile(v @ M, (at.problem.K, 1)))) + at.b(at.spread(v))


def _ones(at: _Saddle, q: int) -> np.ndarray:
    return np.ones((at.problem.K, 1)) * at.normal(q)


AT_SADDLE: dict[str, Callable[[_Saddle], Movements]] = {
    f"{OUTSIDE}, within classes: H": lambda at: at.H(at.outside(at.within_classes(at.out))),
    f"{OUTSIDE}, within groups: W, H": lambda at: at.both(at.outside(at.within_groups(at.out))),
    f"{OUTSIDE}, between groups: W, H": lambda at: at.both(at.outside(at.between_groups(at.out))),
    f"{OUTSIDE}, along 1: W": lambda at: at.W(at.outside(_ones(at, at.out))),
    f"{OUTSIDE}, along 1: H": lambda at: at.H(at.outside(_ones(at, at.out))),
    "within classes, along w: H": lambda at: at.H(at.inside(at.within_classes(1) * _w_of_samples(at))),
    "within classes, across w: H": lambda at: at.H(at.inside(_across(at.within_classes(at.m - 1), _w_of_samples(at)))),
    "within groups, across w: W, H": lambda at: at.both(
        at.inside(_across(at.within_groups(at.m - 1), at.spread(at.M)))
    ),
    "within groups, along w: W, H, b": _along_w,
    "along 1, in the row space of W: W": lambda at: at.W(at.inside(_ones(at, at.m - 1))),
    "between groups, trivial: W, H growing": lambda at: at.both(at.inside(at.spread(at.M))),
    "between groups, symmetric: W, H": _symmetric,
    "between groups, antisymmetric: W, H turning": _turning,
    "between groups, standard: W, H, b": _standard,
    "class differences: b": lambda at: at.b(centring(at.problem.K) @ at.normal(at.problem.K)),
    "along 1: b": lambda at: at.b(np.ones(at.problem.K)),
}


def _w_of_samples(at: _Saddle) -> np.ndarray:
    return at.spread(at.M)[_labels(at.problem)]


def _at_unequal_origin(problem: Problem, label: str, key: Key[Array, ""]) -> Movements:
    """At W = H = 0: singular vectors of ∇_Z g times any direction of R^d, eigenvectors of the bias's own Hessian."""
    K, d, tied = problem.K, problem.d, tie_features(problem)
    Z = origin_logits(tied)
    U, _, V = np.linalg.svd(np.asarray(sample_gradient(tied, tied.loss.residual(Z, tied.Y))))
    V = V[:-1] / np.sqrt(tied.counts) @ problem.Y  # of every sample
    if label == "along 1: b":
        return [_params(problem, b=np.ones(K))]
    if label == "along 1: W":
        return [_params(problem, W=np.ones((K, 1)) * np.asarray(jax.random.normal(key, (d,))))]
    if label == "all else: H":
        X = np.asarray(jax.random.normal(key, (d, problem.Y.shape[1])))
        return [_params(problem, H=X - X @ V.T @ V)]
    i = int(label.split()[2].rstrip(":")) - 1
    if label.endswith("b"):
        C = np.asarray(tied.loss.mean_hessian(Z, tied.Y, jnp.asarray(tied.multiplicity)))
        return [_params(problem, b=np.linalg.eigh(C)[1][:, i + 1])]
    a = np.asarray(jax.random.normal(key, (d,)))
    return [_params(problem, W=np.outer(U[:, i], a)), _params(problem, H=-np.outer(a, V[i]))]


def _params(problem: Problem, **parts: np.ndarray) -> Params:
    (K, N), d = problem.Y.shape, problem.d
    zero = {"W": np.zeros((K, d)), "H": np.zeros((d, N)), "b": np.zeros(K)}
    return Params(**{name: jnp.asarray(parts.get(name, zero[name])) for name in zero})
