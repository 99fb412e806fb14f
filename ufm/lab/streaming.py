"""A certificate of features that come in batches: f, ∇f and the duality gap, never H as a whole (THEORY 8.1)."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ufm.lab.blocks import Piece, Stream, Sums, add_up, as_problem
from ufm.lab.streamed_dual import dual_value, largest_singular_value
from ufm.measure.moments import Batches, class_means
from ufm.model.problem import Params, Problem, class_mean_problem, logits, objective
from ufm.theory.certificate import Certificate, Verdict, check_point, full_norm, relative_gradient
from ufm.theory.duality import gradient_rounding, sample_gradient, value_rounding


def certify_stream(
    batches: Batches,
    W: Float[Array | np.ndarray, "K d"],
    b: Float[Array | np.ndarray, " K"] | None,
    *,
    lam_W: Any,
    lam_H: Any,
    lam_b: Any = 0.0,
    tol: float = 1e-8,
    grad_tol: float = 1e-6,
) -> Certificate:
    """f − f* ≤ gap at the point (W, H, b) of which H comes in batches: as certify says, but without a way down.

    Reads the batches once to check and count them, once for f and its gradient, once for each step of Newton's method
    in the biases and two or three times for the dual value. A reading costs one to three products with W. Memory is
    O(K² + Kd) beyond a batch and some K×2048 arrays of a piece of it, whatever N is. Computed in JAX's default
    precision, sums over pieces in float64.

    Verdicts are those of certify, but for STRICT_SADDLE: what is critical and not GLOBAL is UNDECIDED, since no
    direction is looked for. `rounding` is bounded as there.

    Args:
        batches: pairs (H, labels), H a column a sample; a list, or a function that returns a fresh iterator. The same
            samples at every reading: what collapse_metrics_stream takes.
        W: classifier, a row a class.
        b: bias, or None for the model without.
        lam_W: λ_W.
        lam_H: λ_H per sample.
        lam_b: λ_b; ignored without b.
        tol: relative gap below which a point counts as global.
        grad_tol: relative gradient below which a point counts as critical.

    Returns:
        A Certificate; its direction is zero and has no columns for H.

    Raises:
        ValueError: as collapse_metrics_stream and certify do.

    Source: THEORY 8.1, whose sums over samples are taken piece by piece.
    """
    tied, W, b = _checked(batches, W, b, lam_W=lam_W, lam_H=lam_H, lam_b=lam_b)
    stream = Stream(batches, tied, W)
    at = add_up(stream, _at_point, b)
    dual, dual_rounding = dual_value(stream, b)
    value, gap = at["value"], at["value"] - dual
    rounding = dual_rounding + at["value_rounding"] + float(tied.total * jnp.finfo(W.dtype).eps) * value
    grad_norm, relative, relative_rounding = _gradients(tied, W, b, at)
    code = Verdict.UNDECIDED
    if gap + rounding <= tol * value:
        code = Verdict.GLOBAL
    elif relative - relative_rounding > grad_tol:
        code = Verdict.NOT_CRITICAL
    number, zero = (lambda x: jnp.asarray(x, float)), jnp.zeros(())
    nowhere = Params(jnp.zeros_like(W), jnp.zeros((tied.d, 0)), jnp.zeros_like(b))
    return Certificate(
        number(value), number(gap), number(rounding), number(largest_singular_value(at["gram"])), tied.s, grad_norm,
        jnp.asarray(int(code)), nowhere, zero, zero, zero,
    )  # fmt: skip


def _checked(batches: Batches, W: Any, b: Any, **lams: Any) -> tuple[Problem, Array, Array]:
    """The class-mean problem of the counts, and the classifier in JAX's default precision."""
    if np.ndim(W) != 2:
        raise ValueError(f"W has shape {np.shape(W)}, but must be K×d with a row for each class")
    K, d = np.shape(W)
    tied = class_mean_problem([1] * K, d, **lams, use_bias=b is not None)
    W, b = (jnp.asarray(np.asarray(x), float) for x in (W, np.zeros(K) if b is None else b))
    check_point(tied, Params(W, jnp.zeros((d, K)), b))
    tied = eqx.tree_at(lambda p: p.multiplicity, tied, class_means(batches, K, d).counts)
    return jax.tree.map(lambda x: jnp.asarray(x, float), tied), W, b


@jax.jit
def _at_point(tied: Problem, W: Array, piece: Piece, b: Array) -> tuple[Sums, Sums]:
    block, x = as_problem(tied, W, piece, b)
    share = block.total / tied.total
    value, grad = jax.value_and_grad(lambda x: objective(block, x))(x)
    R = block.loss.residual(logits(block, x), block.Y)
    G = share * sample_gradient(block, R)
    terms = {
        "value": share * value,
        "value_rounding": share * value_rounding(block, x, R, value),
        "gram": jnp.matmul(G, G.T, precision="highest"),
        "fit": block.multiplicity @ jnp.linalg.norm(R, axis=0) / tied.total,
        "H2": jnp.sum(x.H**2),
        "pieces": 1.0,
    }
    for name, entries in (("grad", grad), ("bound", gradient_rounding(block, x, R))):
        terms |= {f"{name}_W": share * entries.W, f"{name}_b": share * entries.b}
        terms[f"{name}_H2"] = jnp.sum((share * entries.H) ** 2)
    return terms, {}


@jax.jit
def _gradients(tied: Problem, W: Array, b: Array, at: Sums) -> tuple[Array, Array, Array]:
    """‖∇f‖, the relative gradient and what rounding may add to it.

    H and the gradient by H matter through their norms alone, so a single column of that norm stands for all. Adding up
    pieces rounds once more for each; the bound of a piece holds K + d roundings and more.
    """
    n = tied.counts[0]
    corner = jnp.zeros((tied.d, tied.K)).at[0, 0]
    x = Params(W, corner.set(jnp.sqrt(at["H2"] / n)), b)
    R = jnp.zeros((tied.K, tied.K)).at[0].set(at["fit"])
    grad, bound = (
        Params(at[f"{name}_W"], corner.set(jnp.sqrt(at[f"{name}_H2"] * n)), at[f"{name}_b"])
        for name in ("grad", "bound")
    )
    rounding = (1 + at["pieces"] / (tied.K + tied.d)) * relative_gradient(tied, x, bound, R)
    return full_norm(tied, grad, dual=True), relative_gradient(tied, x, grad, R), rounding
