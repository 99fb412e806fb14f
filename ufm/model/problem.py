"""The unconstrained features model: free features H beside the classifier W, b (THEORY 0)."""

from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from ufm.model.losses import CrossEntropy, Loss

Scalar = Float[Array | np.ndarray, ""]


class Params(eqx.Module):
    """A point (W, H, b) of the model; gradients and directions are Params too."""

    W: Float[Array, "K d"]
    H: Float[Array, "d N"]
    b: Float[Array, " K"]


def is_concrete(x: Any) -> bool:
    """Whether the value of x is known now, outside any JAX transformation."""
    return not isinstance(x, jax.core.Tracer)


def _leaf(x: Any) -> Any:
    """A floating array that stays concrete inside traced functions unless it is traced itself."""
    if isinstance(x, jax.Array):
        floating = jnp.issubdtype(x.dtype, jnp.floating)
        return x.astype(jnp.promote_types(x.dtype, jnp.float32) if floating else float)
    return np.asarray(x, jnp.result_type(float))


class Problem(eqx.Module):
    """min f(W, H, b) = (1/N) Σ_i ω_i ℓ(W h_i + b; y_i) + λ_W/2 ‖W‖² + λ_H/2 Σ_i ω_i ‖h_i‖² + λ_b/2 ‖b‖².

    Column i stands for ω_i samples that share one feature; N = Σ ω_i counts samples. All ω_i = 1 is the model of
    zhu2021; one column per class with ω_k = n_k is the class-mean problem of THEORY 8.2, with the same optimum.

    Attributes:
        Y: one-hot targets, a column per feature.
        multiplicity: ω, positive.
        loss: ℓ, cross-entropy unless stated.
        lam_W: λ_W > 0.
        lam_H: λ_H > 0, per sample and not divided by N.
        lam_b: λ_b ≥ 0; zero leaves the bias free.
        d: feature dimension.
        use_bias: without it b is ignored.

    Raises:
        ValueError: if an argument is not of this form. Traced values are not checked.
    """

    Y: Float[Array | np.ndarray, "K N"] = eqx.field(converter=_leaf)
    multiplicity: Float[Array | np.ndarray, " N"] = eqx.field(converter=_leaf)
    loss: Loss
    lam_W: Scalar = eqx.field(converter=_leaf)
    lam_H: Scalar = eqx.field(converter=_leaf)
    lam_b: Scalar = eqx.field(converter=_leaf)
    d: int = eqx.field(static=True, converter=lambda d: int(d) if isinstance(d, np.integer) else d)
    use_bias: bool = eqx.field(static=True)

    def __check_init__(self) -> None:
        """Refuse what the theory does not cover."""
        _check_integer("d", self.d, at_least=1)
        for name in ("lam_W", "lam_H", "lam_b"):
            _check_lambda(name, getattr(self, name), positive=name != "lam_b")
        if is_concrete(self.Y) and is_concrete(self.multiplicity):
            _check_targets(np.asarray(self.Y), np.asarray(self.multiplicity))

    @property
    def K(self) -> int:
        """Number of classes."""
        return self.Y.shape[0]

    @property
    def counts(self) -> Float[Array | np.ndarray, " K"]:
        """Samples per class, n_k."""
        return self.Y @ self.multiplicity

    @property
    def total(self) -> Scalar | np.floating:
        """Number of samples, N."""
        return self.multiplicity.sum()

    @property
    def s(self) -> Float[Array, ""]:
        """√(λ_W λ_H), the weight of the nuclear norm in the convex form (NUC)."""
        return jnp.sqrt(self.lam_W) * jnp.sqrt(self.lam_H)


def _check_integer(name: str, value: Any, *, at_least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < at_least:
        raise ValueError(f"{name} must be an integer of at least {at_least}, got {value!r}")


def _check_lambda(name: str, value: Any, *, positive: bool) -> None:
    if value.ndim:
        raise ValueError(f"{name} must be a scalar, got shape {value.shape}; vmap over arrays of them")
    if is_concrete(value) and not (np.isfinite(value) and (value > 0 or (value == 0 and not positive))):
        want = "positive" if positive else "zero (free bias) or positive"
        raise ValueError(f"{name} must be {want} and finite, got {float(value)}")


def _check_targets(Y: np.ndarray, multiplicity: np.ndarray) -> None:
    if Y.ndim != 2 or Y.shape[0] < 2:
        raise ValueError(f"Y must be K×N with K at least 2 classes, got shape {Y.shape}")
    if not (((Y == 0) | (Y == 1)).all() and (Y.sum(0) == 1).all()):
        raise ValueError("Y must be one-hot: every column exactly one 1 and zeros elsewhere")
    if multiplicity.shape != Y.shape[1:] or not (np.isfinite(multiplicity).all() and (multiplicity > 0).all()):
        raise ValueError(f"multiplicity must be positive, one entry for each of the {Y.shape[1]} columns of Y")
    if (missing := np.flatnonzero(~Y.any(1))).size:
        raise ValueError(f"Y has no sample of class {missing.tolist()}; drop the class or give it a sample")


def _check_counts(counts: Any) -> np.ndarray:
    counts = np.asarray(counts)
    if counts.ndim != 1 or counts.size < 2:
        raise ValueError(f"counts must list n_k for at least 2 classes, got {counts.tolist()!r}")
    whole = counts.dtype.kind in "iuf" and ((counts >= 1) & (counts <= 2**53) & (counts == np.floor(counts))).all()
    if not whole:
        raise ValueError(f"counts must be positive integers (at most 2^53), got {counts.tolist()!r}")
    return counts.astype(int)


def balanced(
    K: int, n: int, d: int, *, lam_W: Any, lam_H: Any, lam_b: Any = 0.0,
    loss: Loss = CrossEntropy(), use_bias: bool = True,
) -> Problem:  # fmt: skip
    """The model with n samples in each of K classes, columns in class order (zhu2021)."""
    _check_integer("K", K, at_least=2)
    _check_integer("n", n, at_least=1)
    return imbalanced([n] * K, d, lam_W=lam_W, lam_H=lam_H, lam_b=lam_b, loss=loss, use_bias=use_bias)


def imbalanced(
    counts: Sequence[int] | np.ndarray, d: int, *, lam_W: Any, lam_H: Any, lam_b: Any = 0.0,
    loss: Loss = CrossEntropy(), use_bias: bool = True,
) -> Problem:  # fmt: skip
    """The model with counts[k] samples in class k, columns in class order."""
    counts = _check_counts(counts)
    Y = np.repeat(np.eye(counts.size), counts, axis=1)
    return Problem(Y, np.ones(Y.shape[1]), loss, lam_W, lam_H, lam_b, d, use_bias)


def class_mean_problem(
    counts: Sequence[int] | np.ndarray, d: int, *, lam_W: Any, lam_H: Any, lam_b: Any = 0.0,
    loss: Loss = CrossEntropy(), use_bias: bool = True,
) -> Problem:  # fmt: skip
    """The model with one feature per class standing for counts[k] samples: same optimum, K columns (THEORY 8.2)."""
    counts = _check_counts(counts)
    return Problem(np.eye(counts.size), counts, loss, lam_W, lam_H, lam_b, d, use_bias)


def tie_features(problem: Problem) -> Problem:
    """The class-mean problem of the same classes, counts, d and λ's."""
    p = problem
    return Problem(np.eye(p.K), p.counts, p.loss, p.lam_W, p.lam_H, p.lam_b, p.d, p.use_bias)


def init(problem: Problem, key: Key[Array, ""], *, scale: float = 1.0) -> Params:
    """A point whose every entry is drawn from N(0, scale²); b is zero where the model has none."""
    K, N = problem.Y.shape
    W_key, H_key, b_key = jax.random.split(key, 3)
    W = scale * jax.random.normal(W_key, (K, problem.d))
    H = scale * jax.random.normal(H_key, (problem.d, N))
    b = scale * problem.use_bias * jax.random.normal(b_key, (K,))
    return Params(W, H, b)


def check_shapes(problem: Problem, params: Params) -> None:
    """Refuse a point whose shapes are not the problem's, which broadcasting would otherwise accept."""
    K, N = problem.Y.shape
    for name, shape in {"W": (K, problem.d), "H": (problem.d, N), "b": (K,)}.items():
        if (got := jnp.shape(getattr(params, name))) != shape:
            raise ValueError(f"{name} must have shape {shape} for this problem, got {got}")


def logits(problem: Problem, params: Params) -> Float[Array, "K N"]:
    """WH + b1ᵀ, or WH where the model has no bias.

    Raises:
        ValueError: if a shape is not the problem's.
    """
    check_shapes(problem, params)
    Z = jnp.matmul(params.W, params.H, precision="highest")  # accelerators round float32 factors otherwise
    return Z + params.b[:, None] if problem.use_bias else Z


def objective(problem: Problem, params: Params) -> Float[Array, ""]:
    """f(W, H, b) of (UFM), in nats.

    Raises:
        ValueError: if a shape is not the problem's.
    """
    W, H, b = params.W, params.H, params.b
    fit = problem.multiplicity @ problem.loss(logits(problem, params), problem.Y) / problem.total
    penalty = problem.lam_W * jnp.sum(W**2) + problem.lam_H * jnp.sum(problem.multiplicity * H**2)
    if problem.use_bias:
        penalty = penalty + problem.lam_b * jnp.sum(b**2)
    return jnp.asarray(fit + penalty / 2)
