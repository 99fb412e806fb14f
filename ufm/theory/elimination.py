"""How many directions go down: the inertia of the Hessian by eliminating the features (THEORY 1.8).

For fixed (W, b) f is a sum of functions of one feature each, strictly convex with Hessian A_i = λ_H I + WᵀC_iW/N, C_i
= ∇²ℓ. By Sylvester's law ∇²f has dN positive directions and the inertia of its Schur complement on (δW, δb): with h̃ =
(h, 1) and r = ∇ℓ,

    S = diag(λ_W, λ_b) + (1/N) Σ_i [T_i ⊗ h̃h̃ᵀ − (2/N) sym(U_i h̃ ⊗ r) − (1/N) rrᵀ ⊗ A_i⁻¹],   U_i = C_iWA_i⁻¹,

T_i = C_i − U_iWᵀC_i/N; U and A⁻¹ act on δW alone. Since 1ᵀC = 0 and 1ᵀr = 0 the rows along 1 see only λ_W and λ_b, and
tied classes split S further: into the differences inside each group, all alike, and the groups' sums.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ufm.model.padding import check_unpadded
from ufm.model.problem import Params, Problem, is_concrete, logits, objective
from ufm.theory.certificate import check_point, relative_gradient

BATCH_BYTES = 1 << 26  # of the per-column matrices held at a time
CRITICAL = 1e-6  # relative gradient
TIED = 1e3  # roundings by which rows that count as tied may differ


class Inertia(NamedTuple):
    """Signs of the eigenvalues of ∇²f over (W, H, b), every sample with its own column.

    Attributes:
        negative: how many are negative; the Morse index, at a critical point.
        zero: how many cannot be told from zero.
        positive: how many are positive.
        margin: the least eigenvalue of the Schur complement that was given a sign, relative to what rounding and the
            gradient left at the point can do to a zero; near 1 a sign is doubtful, 0 if none was given.
        relative_gradient: ∇f over the terms that cancel in it; not small at a point that is not critical, where the
            counts are those of the Hessian but no Morse index.
    """

    negative: int
    zero: int
    positive: int
    margin: float
    relative_gradient: float


def inertia(problem: Problem, params: Params) -> Inertia:
    """(negative, zero, positive) eigenvalues of ∇²f at any point, exactly, without the Hessian.

    O(N K² d²) time in batches of columns, and (Kd)³ for the eigenvalues of the Schur complement; columns that agree
    count once, and so do tied classes. An eigenvalue μ of it counts as zero if |μ| ≤ 16 q eps, q its size, of the
    terms that make it up; at a critical point (relative gradient at most 1e-6) also if it could be the zero of a
    symmetry, which the gradient left there moves, to first order, by at most (‖∇_W f‖ + √(λ_W/λ_H) ‖∇_H f‖)/σ_min(W):
    differentiate f(W e^{τΩ}, e^{−τΩ}H) = f twice.

    Args:
        problem: cross-entropy, or any loss that is convex in the logits and blind to a constant added to them.
        params: any finite point; values must be known, not traced.

    Raises:
        ValueError: if shapes do not match, entries or f are not finite, or values are traced.

    Source: derived for this project; Haynsworth's additivity of inertia.
    """
    check_unpadded(problem)
    check_point(problem, params)
    if not all(is_concrete(x) for x in jax.tree.leaves((problem, params))):
        raise ValueError("params and problem must be known, not traced, to count eigenvalues")
    problem, params = jax.tree.map(lambda x: jnp.asarray(x, float), (problem, params))
    columns = _distinct_columns(problem, params)
    value, gradient, relative = _first_order(problem, params)
    if not np.isfinite(value):
        raise ValueError("W, H or b is too large: f overflows there")
    relative = float(relative)
    shift = _zero_shift(problem, params, gradient, relative) if relative <= CRITICAL else 0.0
    counts, margin = np.zeros(3, int), np.inf
    for Q, multiplicity in _row_blocks(_tied_classes(problem, params, columns)):
        S, rounding = _schur_complement(problem, params, columns, Q)
        signs, separation = _signs(S, rounding + shift)
        counts, margin = counts + multiplicity * signs, min(margin, separation)
    free = problem.use_bias and float(problem.lam_b) == 0
    counts[1] += free
    counts[2] += problem.d * (1 + round(float(problem.total))) + (problem.use_bias and not free)
    negative, zero, positive = counts.tolist()
    return Inertia(negative, zero, positive, margin, relative)


@jax.jit
def _first_order(problem: Problem, params: Params) -> tuple[Array, Params, Array]:
    """f, ∇f and the relative gradient."""
    value, gradient = jax.value_and_grad(functools.partial(objective, problem))(params)
    R = problem.loss.residual(logits(problem, params), problem.Y)
    return value, gradient, relative_gradient(problem, params, gradient, R)


class _Columns(NamedTuple):
    """The distinct columns of H with their targets and multiplicities."""

    H: Float[np.ndarray, "d n"]
    Y: Float[np.ndarray, "K n"]
    weight: Float[np.ndarray, " n"]


def _distinct_columns(problem: Problem, params: Params) -> _Columns:
    both = np.concatenate([np.argmax(problem.Y, axis=0)[None, :], np.asarray(params.H)])
    distinct, which = np.unique(both, axis=1, return_inverse=True)
    weight = np.bincount(which, np.asarray(problem.multiplicity))
    return _Columns(distinct[1:], np.eye(problem.K)[:, distinct[0].astype(int)], weight)


def _zero_shift(problem: Problem, params: Params, gradient: Params, relative: float) -> float:
    """How far the gradient left at the point moves a symmetry's zero; singular values of its size count as none."""
    sigma = np.linalg.svd(np.asarray(params.W), compute_uv=False)
    kept = sigma[sigma > max(np.sqrt(np.finfo(sigma.dtype).eps), 10 * relative) * sigma[0]]
    H_part = jnp.sqrt(problem.lam_W / problem.lam_H * jnp.sum(gradient.H**2 / problem.multiplicity))
    return float((jnp.linalg.norm(gradient.W) + H_part) / kept[-1]) if kept.size else 0.0


def _tied_classes(problem: Problem, params: Params, columns: _Columns) -> np.ndarray:
    """The group of each class: classes whose rows of W, biases, features and sizes agree to rounding."""
    K = problem.K
    owner = np.argmax(columns.Y, axis=0)
    if len(owner) > K:
        return np.arange(K)
    scaled = [_scaled(params.W), _scaled(params.b)[:, None], _scaled(columns.H[:, np.argsort(owner)].T)]
    rows = np.concatenate([*scaled, np.asarray(problem.counts)[:, None]], axis=1)
    close = np.abs(rows[:, None] - rows).max(-1) <= TIED * np.finfo(rows.dtype).eps
    return np.unique(np.argmax(close, axis=1), return_inverse=True)[1]


def _scaled(x: Any) -> np.ndarray:
    x = np.asarray(x)
    return x / max(np.abs(x).max(), np.finfo(x.dtype).tiny)


def _row_blocks(group: np.ndarray) -> list[tuple[np.ndarray, int]]:
    """Orthonormal row bases, K×q, that S does not couple, and how often each block occurs; the row 1 is left out."""
    sizes = np.bincount(group)
    indicator = np.eye(len(sizes))[group] / np.sqrt(sizes)
    between = indicator @ np.linalg.qr(np.sqrt(sizes)[:, None], mode="complete")[0][:, 1:]
    blocks = [(between, 1)] if len(sizes) > 1 else []
    for i in np.flatnonzero(sizes > 1):
        first, second = np.flatnonzero(group == i)[:2]
        difference = (np.eye(len(group))[:, [first]] - np.eye(len(group))[:, [second]]) / np.sqrt(2)
        blocks.append((difference, int(sizes[i]) - 1))
    return blocks


def _schur_complement(problem: Problem, params: Params, columns: _Columns, Q: np.ndarray) -> tuple[np.ndarray, float]:
    """S on the rows of Q, of size q(d+1) (qd without bias), and a bound on its rounding."""
    K, d, q = problem.K, problem.d, Q.shape[1]
    batch = max(1, min(columns.weight.size, BATCH_BYTES // (8 * (2 * K * K + 2 * K * d + 3 * d * d))))
    total, size = np.zeros((q, d + 1, q, d + 1)), 0.0
    for start in range(0, columns.weight.size, batch):
        part = _Columns(*(_padded(x[..., start : start + batch], batch) for x in columns))
        terms, scale = _accumulate(problem, params, part, Q)
        total, size = total + np.asarray(terms), size + float(scale)
    S = total.reshape(q * (d + 1), q * (d + 1)) + np.kron(np.eye(q), np.diag([problem.lam_W] * d + [problem.lam_b]))
    scale = np.tile([1.0] * d + [1 / np.sqrt(1 + float(problem.lam_b))], q)  # a stiff bias drowns nothing
    kept = np.tile(np.arange(d + 1) < d + problem.use_bias, q)
    rounding = (
        16 * len(S) * np.finfo(S.dtype).eps * (size + float(problem.lam_W) + float(problem.lam_b / (1 + problem.lam_b)))
    )
    return (scale[:, None] * S * scale)[np.ix_(kept, kept)], rounding


def _padded(x: np.ndarray, length: int) -> np.ndarray:
    """With zeros up to length columns; a column of weight zero adds nothing."""
    return np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, length - x.shape[-1])])


@jax.jit
def _accumulate(problem: Problem, params: Params, columns: _Columns, Q: Array) -> tuple[Array, Array]:
    """The sum over columns in S, as a tensor (q, d+1, q, d+1), and the size of its terms."""
    W, N = params.W, problem.total
    Z = W @ columns.H + params.b[:, None] * problem.use_bias
    R = Q.T @ problem.loss.residual(Z, columns.Y)
    C = jax.vmap(lambda z, y: problem.loss.mean_hessian(z[:, None], y[:, None], jnp.ones(1)), 1)(Z, columns.Y)
    CW, weight = C @ W, columns.weight / N
    inverse = jnp.linalg.inv(problem.lam_H * jnp.eye(problem.d) + W.T @ CW / N)
    U = Q.T @ CW @ inverse
    T = Q.T @ C @ Q - U @ jnp.swapaxes(CW, 1, 2) @ Q / N
    H = jnp.concatenate([columns.H, jnp.ones((1, Z.shape[1]))])
    inverse, U = (jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, 1)]) for x in (inverse, U))
    inverse = jnp.pad(inverse, [(0, 0), (0, 1), (0, 0)])
    outer = jnp.einsum("ikl,ai,bi,i->kalb", T, H, H, weight, optimize=True)
    cross = jnp.einsum("ikb,ai,li,i->kalb", U, H, R, weight, optimize=True)
    down = jnp.einsum("ki,li,iab,i->kalb", R, R, inverse, weight, optimize=True)
    S = outer - (cross + cross.transpose(2, 3, 0, 1)) / N - down / N
    size = jnp.linalg.norm((H * weight) @ H.T, 2) / 2 + jnp.linalg.norm((R * weight) @ R.T, 2) / (N * problem.lam_H)
    return S, size


def _signs(S: np.ndarray, tolerance: float) -> tuple[np.ndarray, float]:
    """How many eigenvalues are negative, zero, positive, and the least that is not zero over the tolerance."""
    values = np.linalg.eigvalsh(S)
    signs = np.where(np.abs(values) <= tolerance, 0, np.sign(values))
    counted = np.abs(values[signs != 0])
    margin = counted.min() / tolerance if counted.size else 0.0
    return np.array([(signs == sign).sum() for sign in (-1, 0, 1)]), float(margin)
