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

MOST_ENTRIES = 2**28  # of a Y that is made from counts, 2 GiB; whoever wants a larger one makes it


class Params(eqx.Module):
    """A point (W, H, b) of the model; gradients and directions are Params too."""

    W: Float[Array, "K d"]
    H: Float[Array, "d N"]
    b: Float[Array, " K"]


def is_concrete(x: Any) -> bool:
    """Whether the value of x can be read here and now: it is not traced, and no other process holds a part of it."""
    if isinstance(x, jax.core.Tracer):
        return False
    return not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated


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
        multiplicity: ω, positive; zero for a class that loss.present lacks, and for no other.
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
        check_integer("d", self.d, at_least=1)
        for name in ("lam_W", "lam_H", "lam_b"):
            _check_lambda(name, getattr(self, name), positive=name != "lam_b")
        if all(is_concrete(x) for x in (self.Y, self.multiplicity, self.present)):
            _check_targets(np.asarray(self.Y), np.asarray(self.multiplicity), np.asarray(self.present))

    @property
    def K(self) -> int:
        """Number of rows: of the classes that exist and of those that pad them."""
        return self.Y.shape[0]

    @property
    def is_padded(self) -> bool:
        """Whether some of the K classes may be absent."""
        return getattr(self.loss, "present", None) is not None

    @property
    def present(self) -> Float[Array | np.ndarray, " K"]:
        """1 for a class that exists, 0 for one that pads."""
        present = getattr(self.loss, "present", None)
        return np.ones(self.Y.shape[:1], self.Y.dtype) if present is None else present

    @property
    def classes(self) -> int | Scalar | np.floating:
        """Number of classes that exist: K itself, if none is padding."""
        return self.present.sum() if self.is_padded else self.K

    @property
    def counts(self) -> Float[Array | np.ndarray, " K"]:
        """Samples per class, n_k."""
        return self.Y @ self.multiplicity

    @property
    def total(self) -> Scalar | np.floating:
        """Number of samples, N."""
        return self.multiplicity.sum()

    @property
    def share(self) -> Float[Array, " N"]:
        """1/ω of every column, and 0 for one that stands for no sample."""
        return jnp.where(self.multiplicity > 0, 1 / jnp.where(self.multiplicity > 0, self.multiplicity, 1), 0)

    @property
    def s(self) -> Float[Array, ""]:
        """√(λ_W λ_H), the weight of the nuclear norm in the convex form (NUC)."""
        return jnp.sqrt(self.lam_W) * jnp.sqrt(self.lam_H)


def check_integer(name: str, value: Any, *, at_least: int) -> None:
    """Refuse a size that is no integer or too small."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < at_least:
        raise ValueError(f"{name} must be an integer of at least {at_least}, got {value!r}")


def _check_lambda(name: str, value: Any, *, positive: bool) -> None:
    if value.ndim:
        raise ValueError(f"{name} must be a scalar, got shape {value.shape}; vmap over arrays of them")
    if is_concrete(value) and not (np.isfinite(value) and (value > 0 or (value == 0 and not positive))):
        want = "positive" if positive else "zero (free bias) or positive"
        raise ValueError(f"{name} must be {want} and finite, got {float(value)}")


def _check_targets(Y: np.ndarray, multiplicity: np.ndarray, present: np.ndarray) -> None:
    if Y.ndim != 2 or Y.shape[0] < 2:
        raise ValueError(f"Y must be K×N with K at least 2 classes, got shape {Y.shape}")
    if not (((Y == 0) | (Y == 1)).all() and (Y.sum(0) == 1).all()):
        raise ValueError("Y must be one-hot: every column exactly one 1 and zeros elsewhere")
    if present.shape != Y.shape[:1] or not np.array_equal(present, np.arange(len(Y)) < max(2, present.sum())):
        raise ValueError(f"present must be {len(Y)} entries, at least two ones and then zeros, got {present.tolist()}")
    if multiplicity.shape != Y.shape[1:] or not _is_multiplicity(multiplicity, present @ Y).all():
        zero = "" if present.all() else ", zero where its class is absent"
        raise ValueError(f"multiplicity must be positive, one entry for each of the {Y.shape[1]} columns of Y{zero}")
    if (missing := np.flatnonzero(~Y.any(1) & (present > 0))).size:
        raise ValueError(f"Y has no sample of class {missing.tolist()}; drop the class or give it a sample")


def _is_multiplicity(multiplicity: np.ndarray, exists: np.ndarray) -> np.ndarray:
    return np.isfinite(multiplicity) & np.where(exists > 0, multiplicity > 0, multiplicity == 0)


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
    check_integer("K", K, at_least=2)
    check_integer("n", n, at_least=1)
    return imbalanced([n] * K, d, lam_W=lam_W, lam_H=lam_H, lam_b=lam_b, loss=loss, use_bias=use_bias)


def imbalanced(
    counts: Sequence[int] | np.ndarray, d: int, *, lam_W: Any, lam_H: Any, lam_b: Any = 0.0,
    loss: Loss = CrossEntropy(), use_bias: bool = True,
) -> Problem:  # fmt: skip
    """The model with counts[k] samples in class k, columns in class order."""
    counts = _check_counts(counts)
    if (entries := counts.size * counts.sum(dtype=float)) > MOST_ENTRIES:
        raise ValueError(
            f"counts make Y a {counts.size}×{counts.sum(dtype=float):.0f} array of {8e-9 * entries:.1f} GB; "
            "class_mean_problem has the same optimum with a column per class"
        )
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
    """A point whose every entry is drawn from N(0, scale²); b is zero where the model has none.

    The first classes and columns are the same whatever K and N, and zero where a class is absent.
    """
    K, N = problem.Y.shape
    W_key, H_key, b_key = jax.random.split(key, 3)
    W = scale * jax.random.normal(W_key, (K, problem.d))
    H = scale * jax.random.normal(H_key, (N, problem.d)).T
    b = scale * problem.use_bias * jax.random.normal(b_key, (K,))
    if not problem.is_padded:
        return Params(W, H, b)
    return Params(W * problem.present[:, None], H * (problem.present @ problem.Y), b * problem.present)


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


def mean_loss(problem: Problem, params: Params) -> Float[Array, ""]:
    """g(WH, b) = (1/N) Σ_i ω_i ℓ(W h_i + b; y_i), f without its penalty, in nats.

    Raises:
        ValueError: if a shape is not the problem's.
    """
    return jnp.asarray(problem.multiplicity @ problem.loss(logits(problem, params), problem.Y) / problem.total)


def penalty(problem: Problem, params: Params) -> Float[Array, ""]:
    """λ_W/2 ‖W‖² + λ_H/2 Σ_i ω_i ‖h_i‖² + λ_b/2 ‖b‖², the last only where the model has a bias."""
    W, H, b = params.W, params.H, params.b
    twice = problem.lam_W * jnp.sum(W**2) + problem.lam_H * jnp.sum(problem.multiplicity * H**2)
    if problem.use_bias:
        twice = twice + problem.lam_b * jnp.sum(b**2)
    return jnp.asarray(twice / 2)


def objective(problem: Problem, params: Params) -> Float[Array, ""]:
    """f(W, H, b) of (UFM), in nats.

    Raises:
        ValueError: if a shape is not the problem's.
    """
    return mean_loss(problem, params) + penalty(problem, params)


def sample_columns(problem: Problem, key: Key[Array, ""], size: int) -> Problem:
    """The problem of a mini-batch: f of it, N unchanged, has f as its mean over keys, for every point.

    `size` of the N samples are drawn with replacement, each counted N/size times; a sample that is not drawn adds
    neither its loss nor its λ_H/2 ‖h_i‖², as in a network whose feature penalty is taken over the batch.
    """
    check_integer("size", size, at_least=1)
    p = problem
    drawn = jax.random.choice(key, p.Y.shape[1], (size,), p=jnp.asarray(p.multiplicity / p.total))
    weights = jnp.zeros(p.Y.shape[1]).at[drawn].add(p.total / size)
    return eqx.tree_at(lambda q: q.multiplicity, p, weights)
