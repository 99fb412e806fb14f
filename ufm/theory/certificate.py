"""How far any point is from the global optimum, and why: convex duality at a point (THEORY 0 and 8.1)."""

import enum
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ufm.model.losses import CrossEntropy
from ufm.model.padding import check_unpadded
from ufm.model.problem import Params, Problem, check_shapes, logits, objective
from ufm.theory.duality import (
    dual_value,
    gradient_rounding,
    norm_rounding,
    sample_gradient,
    top_singular_pair,
    value_rounding,
)
from ufm.theory.escape import escape


class Verdict(enum.IntEnum):
    """What a certificate claims; never more than was shown."""

    UNDECIDED = 0
    GLOBAL = 1
    STRICT_SADDLE = 2
    NOT_CRITICAL = 3


class Certificate(eqx.Module):
    """What convex duality proves at a point: f* ≥ value − gap − rounding.

    Attributes:
        value: f at the point, nats.
        gap: value − D, with D the dual value (lower bound on f*), nats.
        rounding: a bound on what floating point can have changed in the gap; f − f* ≤ gap + rounding. 0 if rigorous.
        dual_norm: ‖∇_Z g‖₂ at the point, per-sample columns.
        threshold: s = √(λ_W λ_H); a critical point is global iff dual_norm ≤ threshold (d ≥ K − 1).
        grad_norm: ‖∇f‖ at the point, over (W, H, b) with every sample's own column.
        code: the Verdict as an integer, an array under vmap; `verdict` names it.
        direction: unit direction of the escape (full-size norm), zero rows where nothing escapes.
        predicted_curvature: its exact Hessian eigenvalue at a critical point with a null vector (THEORY 0, CURV).
        measured_curvature: the Hessian's form along it, by automatic differentiation (if rigorous, by formula).
        drop: the largest f(point) − f(point + τ direction) over a geometric grid of τ; ≥ 0.
    """

    value: Float[Array, ""]
    gap: Float[Array, ""]
    rounding: Float[Array, ""]
    dual_norm: Float[Array, ""]
    threshold: Float[Array, ""]
    grad_norm: Float[Array, ""]
    code: Int[Array, ""]
    direction: Params
    predicted_curvature: Float[Array, ""]
    measured_curvature: Float[Array, ""]
    drop: Float[Array, ""]

    @property
    def verdict(self) -> Verdict:
        """The verdict of a single certificate."""
        return Verdict(int(self.code))


def certify(
    problem: Problem, params: Params, *, tol: float = 1e-8, grad_tol: float = 1e-6, rigorous: bool = False
) -> Certificate:
    """f − f* ≤ gap at any point, critical or not, for any class counts; and what kind of point it is.

    The bound is the Fenchel dual of min g(Z, b) + s‖Z‖_* + λ_b/2 ‖b‖² at the point's own softmax residual with
    the best bias, shrunk until its spectral norm is at most s, evaluated in JAX's default precision. It costs one
    pass over the K×N logits, Newton's method in the K biases and a K×K eigenproblem; the escape direction adds an
    SVD of W.

    Verdicts:
        GLOBAL: gap + rounding ≤ tol · f, so f exceeds f* by no more than that.
        STRICT_SADDLE: the gradients by (W, H) and by b are at most a fraction ρ ≤ grad_tol of the terms that make them
            up; the dual norm exceeds s by ten times what ‖∇f‖ / min(λ_W, λ_H) of displacement could explain; the gap is
            larger than √ρ f, as it is not near the optimum; f curves down and falls along `direction`, as measured.
            What is shown is the Hessian at this point; a critical point within rounding of it is inferred.
        NOT_CRITICAL: neither, and the gradient is larger than that by more than its rounding.
        UNDECIDED: anything else; the gap still holds.

    Rounding: `rounding` bounds what float arithmetic (with exp and log good to an ulp) can have changed in gap, summed
    from duality.dual_value, norm_rounding and value_rounding: about (N + K + d) eps of f, 4N eps of the dual value and
    the logits' own error times the probability of a wrong class. In float64 that is near 1e-13 f for a hundred samples
    and 1e-9 f for a million; for λ_b > 0 it grows as eps²/λ_b. It is a bound on rounding, not interval arithmetic, for
    the problem and point as given in JAX's default precision. At points so large that f overflows nothing is finite.

    Rigorous: rigorous=True proves the inequalities above in ball arithmetic of 128 bits and more, for the floats of the
    problem and the point taken as exact numbers, with rounding = 0. For GLOBAL: f − f* ≤ gap ≤ tol · f, as Λ is
    feasible exactly. For NOT_CRITICAL: ρ > grad_tol; another Λ could still show f − f* ≤ tol · f.
    For STRICT_SADDLE: every inequality listed, with vᵀ∇²f v < 0 for v = `direction` as it stands and f lower by at
    least `drop` somewhere on its ray, so this point is no minimum; a critical point near it is inferred here too, not
    proved. UNDECIDED is all else. Fields are floats on the safe side: value, dual_norm and drop from below; gap,
    grad_norm and measured_curvature from above, infinite if they overflow; threshold and predicted_curvature nearest.

    Args:
        problem: the model; its λ's may be traced, unless rigorous.
        params: any finite point of matching shapes.
        tol: relative gap below which a point counts as global.
        grad_tol: relative gradient below which a point counts as critical.
        rigorous: prove the verdict or say UNDECIDED; needs the extra ufm[rigour] and concrete numbers.

    Raises:
        ValueError: if shapes do not match, entries are not finite, the loss is not cross-entropy, or rigorous meets a
            number that is traced or a padded problem.
        ModuleNotFoundError: if rigorous and python-flint is not installed.

    Source: THEORY 8.1 and 0, derived for this project.
    """
    check_point(problem, params)
    if rigorous:
        check_unpadded(problem)
        from ufm.theory.rigour import prove  # which builds on this file and needs an extra

        return prove(problem, params, tol, grad_tol)
    problem, params = jax.tree.map(lambda x: jnp.asarray(x, float), (problem, params))
    return _certify(problem, params, tol, grad_tol)


def check_point(problem: Problem, params: Params) -> None:
    """Refuse a point of the wrong shapes or with entries that are not finite."""
    if not isinstance(problem.loss, CrossEntropy):
        raise ValueError(f"loss must be CrossEntropy to be certified, got {type(problem.loss).__name__}")
    check_shapes(problem, params)
    for name in ("W", "H", "b"):
        value = getattr(params, name)
        finite = jnp.isfinite if isinstance(value, jax.Array) else np.isfinite  # on the devices that hold it
        with jax.ensure_compile_time_eval():  # and now, also where a function around this is traced
            if not isinstance(value, jax.core.Tracer) and not finite(value).all():
                raise ValueError(f"{name} must be finite; it holds NaN or infinite entries")


@jax.jit
def _certify(problem: Problem, params: Params, tol: Any, grad_tol: Any) -> Certificate:
    value, grad = jax.value_and_grad(lambda x: objective(problem, x))(params)
    dual, dual_rounding = dual_value(problem, params)
    R = problem.loss.residual(logits(problem, params), problem.Y)
    gap, rounding = value - dual, dual_rounding + value_rounding(problem, params, R, value)
    G = sample_gradient(problem, R)
    sigma = top_singular_pair(G)[0]
    grad_norm = full_norm(problem, grad, dual=True)
    is_global = gap + rounding <= tol * value
    relative_grad = relative_gradient(problem, params, grad, R)
    is_critical = relative_grad <= grad_tol
    grad_rounding = relative_gradient(problem, params, gradient_rounding(problem, params, R), R)
    excess = sigma * (1 - norm_rounding(G, sigma)) - problem.s
    exceeds = (excess > 10 * _stray(problem, params, grad_norm)) & (gap > jnp.sqrt(relative_grad) * value)
    way = jax.lax.cond(
        ~is_global & is_critical & exceeds,
        lambda: escape(problem, params, R),
        lambda: jax.tree.map(jnp.zeros_like, jax.eval_shape(escape, problem, params, R)),
    )
    falls = (way.measured < way.predicted / 2) & (way.drop > 2 * rounding)
    code = jnp.select(
        [is_global, relative_grad - grad_rounding > grad_tol, is_critical & exceeds & falls],
        [Verdict.GLOBAL, Verdict.NOT_CRITICAL, Verdict.STRICT_SADDLE],
        Verdict.UNDECIDED,
    )
    return Certificate(value, gap, rounding, sigma, problem.s, grad_norm, code,
                       way.direction, way.predicted, way.measured, way.drop)  # fmt: skip


def full_norm(problem: Problem, x: Params, *, dual: bool = False) -> Float[Array, ""]:
    """‖x‖ with every sample's own column counted; for a gradient (dual) columns share it, so ω divides."""
    weight = problem.share if dual else problem.multiplicity
    return jnp.sqrt(jnp.sum(x.W**2) + jnp.sum(weight * x.H**2) + problem.use_bias * jnp.sum(x.b**2))


def relative_gradient(problem: Problem, params: Params, grad: Params, R: Float[Array, "K N"]) -> Float[Array, ""]:
    """∇f over the terms that cancel in it at a critical point, the penalties' for (W, H) and the fit's for b."""
    features = full_norm(problem, Params(grad.W, grad.H, 0 * grad.b), dual=True)
    W, H = jnp.asarray(problem.lam_W) * params.W, jnp.asarray(problem.lam_H) * params.H
    penalty = full_norm(problem, Params(W, H, 0 * params.b))
    fit = problem.multiplicity @ jnp.linalg.norm(R, axis=0) / problem.total
    bias = problem.use_bias * jnp.linalg.norm(grad.b)
    return jnp.maximum(_ratio(features, penalty), _ratio(bias, fit))


def _ratio(x: Float[Array, ""], scale: Float[Array, ""]) -> Float[Array, ""]:
    return jnp.where(x > 0, x / jnp.where(scale > 0, scale, jnp.finfo(x.dtype).tiny), 0)


def _stray(problem: Problem, params: Params, grad_norm: Float[Array, ""]) -> Float[Array, ""]:
    """How much ‖∇_Z g‖₂ can differ at a critical point ‖∇f‖ / min(λ_W, λ_H) away, to first order, for ‖∇²ℓ‖₂ ≤ 1/2.

    That distance is a scale, not a bound: where the Hessian is nearly singular a critical point can be further.
    """
    H_norm = jnp.sqrt(jnp.sum(problem.multiplicity * params.H**2))
    slope = (jnp.linalg.norm(params.W) + H_norm + jnp.sqrt(problem.total)) / (2 * problem.total)
    return slope * grad_norm / jnp.minimum(problem.lam_W, problem.lam_H)
