"""What a certificate claims, proved for the very numbers given, in ball arithmetic (THEORY 0 and 8.1).

Every array here holds balls (see balls.py). What is found in floating point (a bias, a direction, a step, a singular
vector) only chooses which inequality is tried; that it holds is then proved.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from ufm.model.problem import Params, Problem, is_concrete, logits, objective
from ufm.theory.balls import Ball, above, below, exact, nearest, product, root, spectral_bounds, square, xlogx
from ufm.theory.bias import optimal_bias
from ufm.theory.certificate import Certificate, Verdict
from ufm.theory.escape import LENGTHS, escape_direction

PRECISIONS = (128, 512, 2048)  # bits, tried in turn while an inequality is neither proved nor disproved


def prove(problem: Problem, params: Params, tol: Any, grad_tol: Any) -> Certificate:
    """The certificate of a point with every inequality proved; see certify, which says of what.

    Args:
        problem: the model, all of its numbers concrete.
        params: the point, likewise.
        tol: as certify's.
        grad_tol: as certify's.

    Raises:
        ValueError: if anything is traced.
        ModuleNotFoundError: if python-flint is not installed.
    """
    import flint

    _check_concrete({**vars(problem), **vars(params), "tol": tol, "grad_tol": grad_tol, "certify": jnp.zeros(())})
    problem = dataclasses.replace(problem)  # checks it again: what a traced function returns was never checked
    tries = _candidates(problem, params)
    for precision in PRECISIONS:
        with flint.ctx.workprec(precision):
            certificate, settled = _attempt(problem, params, tries, exact(tol), exact(grad_tol))
        if settled:
            break
    return certificate


def _check_concrete(values: dict[str, Any]) -> None:
    for name, value in values.items():
        if not is_concrete(value):
            raise ValueError(
                f"rigorous=True needs concrete numbers, but {name} is traced; certify outside jit and vmap"
            )


class _Candidates(NamedTuple):
    """A bias that nearly minimises f, a direction of escape and a step along it, in floating point."""

    bias: Array
    direction: Params
    length: Array


@jax.jit
def _candidates(problem: Problem, params: Params) -> _Candidates:
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, float), params)
    Z = jnp.matmul(params.W, params.H, precision="highest")
    bias = optimal_bias(problem, Z, params.b) if problem.use_bias else params.b
    direction = escape_direction(problem, params, problem.loss.residual(logits(problem, params), problem.Y))
    direction = jax.tree.map(jnp.nan_to_num, direction)

    def along(tau: Array) -> Array:
        return objective(problem, jax.tree.map(lambda x, dx: x + tau * dx, params, direction))

    lengths = jnp.asarray(LENGTHS, float)
    return _Candidates(jnp.nan_to_num(bias), direction, lengths[jnp.argmin(jax.lax.map(along, lengths))])


def _attempt(
    problem: Problem, params: Params, tries: _Candidates, tol: Ball, grad_tol: Ball
) -> tuple[Certificate, bool]:
    """What balls of the present precision prove, and whether more bits would change nothing."""
    model, x = _exact_model(problem), _exact_point(params)
    facts = _facts(model, x, exact(tries.bias))
    close, critical = tol * facts.value - facts.gap, grad_tol - facts.relative_grad
    excess = facts.norm - facts.threshold - 10 * facts.stray
    exceeds = excess.min(facts.gap - root(facts.relative_grad) * facts.value)
    code, way, margins = Verdict.UNDECIDED, None, [close, critical, exceeds]
    if close >= 0:
        code, margins = Verdict.GLOBAL, [close]
    elif critical < 0:
        code, margins = Verdict.NOT_CRITICAL, [close, critical]
    elif critical >= 0 and exceeds > 0:
        way = _escape(model, x, facts, _exact_point(tries.direction), exact(tries.length))
        falls = (way.predicted / 2 - way.curvature).min(-way.curvature).min(way.drop)
        code, margins = Verdict.STRICT_SADDLE if falls > 0 else code, [*margins, falls]
    settled = all(margin >= 0 or margin < 0 for margin in margins)
    return _certificate(facts, way, code, tries.direction), settled


# The model


class _Point(NamedTuple):
    W: np.ndarray
    H: np.ndarray
    b: np.ndarray


class _Model(NamedTuple):
    """The problem; labels are the classes of its columns."""

    labels: np.ndarray
    omega: np.ndarray
    lam_W: Ball
    lam_H: Ball
    lam_b: Ball
    use_bias: bool

    @property
    def total(self) -> Ball:
        return np.sum(self.omega)

    @property
    def s(self) -> Ball:
        return root(self.lam_W * self.lam_H)

    def true(self, M: np.ndarray) -> np.ndarray:
        """The entry of each column of M that belongs to its own class."""
        return M[self.labels, np.arange(M.shape[1])]

    def mean(self, x: np.ndarray) -> Any:
        """Σ_i ω_i x_i / N along the last axis."""
        return np.sum(self.omega * x, axis=-1) / self.total

    def size(self, W: np.ndarray, H: np.ndarray) -> Ball:
        """‖(W, H)‖ with every sample's own column."""
        return root(np.sum(square(W)) + np.sum(self.omega * square(H)))


def _exact_model(problem: Problem) -> _Model:
    labels, omega = np.argmax(problem.Y, axis=0), exact(problem.multiplicity)
    return _Model(labels, omega, exact(problem.lam_W), exact(problem.lam_H), exact(problem.lam_b), problem.use_bias)


def _exact_point(params: Params) -> _Point:
    return _Point(exact(params.W), exact(params.H), exact(params.b))


def _logits(model: _Model, x: _Point) -> np.ndarray:
    Z = product(x.W, x.H)
    return Z + x.b[:, None] if model.use_bias else Z


def _loss_and_residual(model: _Model, Z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """ℓ = z_m − z_y + log(1 + Σ_{j≠m} e^{z_j − z_m}) for any m, here of a large logit, and softmax − one-hot.

    The true class's residual is minus the sum of the others, so that columns sum to zero whatever the balls.
    """
    m, columns = np.argmax(Z, axis=0), np.arange(Z.shape[1])
    top = Z[m, columns]
    E = np.exp(Z - top)
    E[m, columns] = exact(0.0)
    others = np.sum(E, axis=0)
    E[m, columns] = exact(1.0)
    E[model.labels, columns] = exact(0.0)
    R = E / (1 + others)
    R[model.labels, columns] = -np.sum(R, axis=0)
    return top - model.true(Z) + np.log1p(others), R


def _penalty(model: _Model, x: _Point) -> Ball:
    """λ_W ‖W‖² + λ_H Σ_i ω_i ‖h_i‖² + λ_b ‖b‖²."""
    penalty = model.lam_W * np.sum(square(x.W)) + model.lam_H * np.sum(model.omega * square(x.H))
    return penalty + model.lam_b * np.sum(square(x.b)) if model.use_bias else penalty


def _gradient_norms(model: _Model, x: _Point, R: np.ndarray) -> tuple[Ball, Ball]:
    """‖∇f‖, and ∇f over the terms that cancel in it at a critical point, as certify measures it."""
    W = product(R * model.omega, x.H.T) / model.total + model.lam_W * x.W
    H = product(x.W.T, R) / model.total + model.lam_H * x.H
    features, penalty = model.size(W, H), model.size(model.lam_W * x.W, model.lam_H * x.H)
    bias = root(np.sum(square(model.mean(R) + model.lam_b * x.b))) if model.use_bias else exact(0.0)
    fit = model.mean(np.frompyfunc(root, 1, 1)(np.sum(square(R), axis=0)))
    return root(square(features) + square(bias)), _ratio(features, penalty).max(_ratio(bias, fit))


def _ratio(x: Ball, scale: Ball) -> Ball:
    return x if x.is_zero() else x / scale


def _gram(model: _Model, R: np.ndarray) -> np.ndarray:
    """ΛΛᵀ of Λ = R/N with every sample's own column."""
    return product(R * model.omega, R.T) / square(model.total)


# The dual bound


def _dual_value(model: _Model, Z: np.ndarray, b: np.ndarray) -> Ball:
    """D(Λ) at a Λ that is feasible by its formula, as a matrix of real numbers, whatever b.

    Λ = θR/N with R the residual at logits Z + b1ᵀ, rebalanced so that its mean is −λ_b(b − b̄). So Λ1 = 0 if the bias
    is free, and otherwise costs θ²λ_b/2 ‖b − b̄‖². θ is the largest number at most 1 for which probabilities θR + Y
    stay in [0, 1] and a proved bound on ‖Λ‖₂ stays at most s.
    """
    R, centred = _loss_and_residual(model, Z)[1], 0 * b
    if model.use_bias:
        centred = b - np.sum(b) / len(b)
        R = _loss_and_residual(model, Z + b[:, None])[1]
        R = R + _rebalancing(model, model.mean(R) + model.lam_b * centred)
    shrink = exact(1.0).max(spectral_bounds(_gram(model, R))[1] / model.s)
    for wrong in -model.true(R):
        shrink = shrink.max(wrong)
    Q = R / shrink
    Q[model.labels, np.arange(Q.shape[1])] += 1
    entropy = -model.mean(np.sum(np.frompyfunc(xlogx, 1, 1)(Q), axis=0))
    return entropy - model.lam_b * np.sum(square(centred / shrink)) / 2


def _rebalancing(model: _Model, surplus: np.ndarray) -> np.ndarray:
    """What lowers the residual's mean by `surplus`, whose sum is 0, moving mass only from true classes to wrong ones.

    In its own columns every class with too much gives it to the class m with most samples; in m's columns, m gives to
    those that lack. m is then even, as the sum is 0.
    """
    K = len(surplus)
    counts = np.array([np.sum(model.omega[model.labels == k]) for k in range(K)])
    m = np.argmax(counts)
    excess, lack = (np.array([x.max(0) for x in side]) for side in (surplus, -surplus))
    excess[m] = lack[m] = exact(0.0)
    moved = exact(np.zeros((K, K)))  # row: entry, column: class of the sample
    moved[np.arange(K), np.arange(K)] = -excess
    moved[m] += excess
    moved[:, m] += lack
    moved[m, m] -= np.sum(lack)
    return (moved * model.total / counts)[:, model.labels]


# What is enclosed, and what follows


class _Facts(NamedTuple):
    """Balls at the point; `norm` and `norm_above` bound ‖∇_Z g‖₂ from both sides."""

    value: Ball
    gap: Ball
    norm: Ball
    norm_above: Ball
    threshold: Ball
    grad_norm: Ball
    relative_grad: Ball
    stray: Ball
    residual: np.ndarray


def _facts(model: _Model, x: _Point, bias: np.ndarray) -> _Facts:
    loss, R = _loss_and_residual(model, _logits(model, x))
    value = model.mean(loss) + _penalty(model, x) / 2
    dual = _dual_value(model, product(x.W, x.H), bias)
    grad, relative = _gradient_norms(model, x, R)
    size = root(np.sum(square(x.W))) + root(np.sum(model.omega * square(x.H))) + root(model.total)
    stray = size / (2 * model.total) * grad / model.lam_W.min(model.lam_H)
    return _Facts(value, value - dual, *spectral_bounds(_gram(model, R)), model.s, grad, relative, stray, R)


class _Way(NamedTuple):
    """Along a direction v: the least curvature that THEORY 0 promises, vᵀ∇²f v, and a fall of f."""

    predicted: Ball
    curvature: Ball
    drop: Ball


def _escape(model: _Model, x: _Point, facts: _Facts, v: _Point, length: Ball) -> _Way:
    mean, half = (model.lam_W + model.lam_H) / 2, (model.lam_W - model.lam_H) / 2
    predicted = mean - root(square(half) + square(facts.norm.union(facts.norm_above)))
    there = _Point(*(p + length * q for p, q in zip(x, v, strict=True)))
    loss = _loss_and_residual(model, _logits(model, there))[0]
    drop = facts.value - model.mean(loss) - _penalty(model, there) / 2
    return _Way(predicted, _curvature(model, x, facts.residual, v), drop)


def _curvature(model: _Model, x: _Point, R: np.ndarray, v: _Point) -> Ball:
    """vᵀ∇²f v: the variance under the softmax of the logits' change A, what R makes of its bend, and the penalty.

    Relative to the true class's change only wrong classes count, whose probabilities are R's entries.
    """
    A = product(v.W, x.H) + product(x.W, v.H)
    if model.use_bias:
        A = A + v.b[:, None]
    A = A - model.true(A)
    variance = np.sum(R * square(A), axis=0) - square(np.sum(R * A, axis=0))
    bend = 2 * np.sum(R * product(v.W, v.H), axis=0)
    return model.mean(variance + bend) + _penalty(model, v)


def _certificate(facts: _Facts, way: _Way | None, code: Verdict, direction: Params) -> Certificate:
    """Floats on the cautious side of what is proved."""
    numbers = {
        "value": below(facts.value),
        "gap": above(facts.gap),
        "rounding": 0.0,
        "dual_norm": below(facts.norm),
        "threshold": nearest(facts.threshold),
        "grad_norm": above(facts.grad_norm),
        "predicted_curvature": nearest(way.predicted) if way else 0.0,
        "measured_curvature": above(way.curvature) if way else 0.0,
        "drop": max(0.0, below(way.drop)) if way else 0.0,
    }
    arrays = {name: jnp.asarray(x, float) for name, x in numbers.items()}
    direction = direction if way else jax.tree.map(jnp.zeros_like, direction)
    return Certificate(**arrays, code=jnp.asarray(int(code)), direction=direction)
