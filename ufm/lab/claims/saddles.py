"""Claims about points that are not optimal: the gap anywhere, the way down from a saddle (THEORY 0, 1.6, 8.1)."""

import math
from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from ufm.lab.claims.claim import Cases, claim
from ufm.lab.claims.grid import balanced_problems
from ufm.lab.dense import dense_eigenvalues
from ufm.lab.optimum import global_minimiser
from ufm.model.problem import Params, Problem, imbalanced, init, logits, objective
from ufm.theory.atlas import coarse_etf
from ufm.theory.certificate import Verdict, certify
from ufm.theory.duality import sample_gradient, top_singular_pair
from ufm.theory.escape import escape_direction, predicted_curvature

SCALES = tuple(10.0 ** np.arange(-9, 2))  # sizes of a random point, and of a perturbation of the optimum
LOADS = (1e-3, 0.1, 0.6)  # K√n s at which partition saddles are tried


@claim(
    "Duality gap is sound",
    "f − f* ≤ gap + rounding at any point, near or far, critical or not",
    "THEORY 8.1",
    0.0,
)
def gap_soundness(full: bool) -> Cases:
    """The amount by which f − f* exceeds gap + rounding + the rounding of f* itself; 0 if it never does."""
    draws = 50 if full else 5
    for text, problem in (*balanced_problems(full), *_unequal_problems()):
        best = global_minimiser(problem)
        keys = jax.random.split(jax.random.key(len(text)), draws)
        for name, excess in _excesses(problem, best, objective(problem, best), keys).items():
            for i, value in enumerate(excess.ravel()):
                yield f"{text} {name} {i}", max(0.0, float(value))


def _unequal_problems() -> Iterator[tuple[str, Problem]]:
    for lam_b in (0.0, 1e-2):
        for lam in (1e-1, 1e-3, 1e-5):
            problem = imbalanced([6, 3, 1, 1], 4, lam_W=lam, lam_H=lam, lam_b=lam_b)
            yield f"counts=6,3,1,1 lam_b={lam_b:g} lam={lam:g}", problem


@jax.jit
def _excesses(problem: Problem, best: Params, f_star: jax.Array, keys: jax.Array) -> dict[str, jax.Array]:
    """f − f* − gap − rounding at random points of every scale, and at the optimum moved by them."""
    eps = jnp.finfo(f_star.dtype).eps

    def excess(x: Params) -> jax.Array:
        c = certify(problem, x)
        return (c.value - f_star) - c.gap - c.rounding - 8 * eps * f_star

    def at(scale: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        x = jax.tree.map(partial(jnp.multiply, scale), init(problem, key))
        return excess(x), excess(jax.tree.map(jnp.add, best, x))

    scale, key = jnp.repeat(jnp.asarray(SCALES), len(keys)), jnp.tile(keys, len(SCALES))
    random, perturbed = jax.lax.map(lambda pair: at(*pair), (scale, key))
    return {"random": random, "perturbed optimum": perturbed}


@claim(
    "Certificate, both sides",
    "for d ≥ K−1 a critical point is global iff ‖∇_Z g‖₂ ≤ √(λ_Wλ_H): equality at the ETF, 1/(K√n) at coarse ETFs",
    "THEORY 0, 1.6",
    1e-12,
)
def two_sides(full: bool) -> Cases:
    """Relative distance of ‖∇_Z g‖₂ from the stated value, or inf if the verdict is not the one stated."""
    for text, problem, m, x in _coarse(full):
        c = certify(problem, x)
        optimal = m == problem.K
        stated = float(problem.s) if optimal else 1 / (problem.K * math.sqrt(float(problem.counts[0])))
        right = c.verdict == (Verdict.GLOBAL if optimal else Verdict.STRICT_SADDLE)
        yield f"{text} m={m}", abs(float(c.dual_norm) / stated - 1) if right else math.inf


def _coarse(full: bool) -> Iterator[tuple[str, Problem, int, Params]]:
    for text, problem in balanced_problems(full, LOADS):
        for m in (m for m in range(1, problem.K + 1) if problem.K % m == 0):
            yield text, problem, m, coarse_etf(problem, m)


@claim(
    "Escape curvature",
    "at a saddle vᵀ∇²f v = −2(‖∇_Z g‖₂ − s) along the null-vector direction, and the best mix of its two halves is the "
    "steepest direction of all",
    "THEORY 0, (CURV)",
    1e-10,
)
def escape_curvature(full: bool) -> Cases:
    """Relative error of the stated curvatures: by autodiff along the direction, and against dense eigenvalues."""
    for text, problem, m, x in _coarse(full):
        if m == problem.K:
            continue
        sigma, curvature, along = (float(v) for v in _curvatures(problem, x))
        steepest = float(predicted_curvature(problem, jnp.asarray(sigma)))
        plain = -2 * (sigma - float(problem.s))
        yield f"{text} m={m} (CURV)", abs(curvature / plain - 1)
        yield f"{text} m={m} eigenvector", abs(along / steepest - 1)
        if x.W.size + x.H.size < 300:
            yield f"{text} m={m} dense", abs(float(dense_eigenvalues(problem, x)[0]) / steepest - 1)


@jax.jit
def _curvatures(problem: Problem, x: Params) -> tuple[jax.Array, jax.Array, jax.Array]:
    """‖∇_Z g‖₂, the curvature along (CURV)'s direction, and along the certificate's."""
    R = problem.loss.residual(logits(problem, x), problem.Y)
    sigma = top_singular_pair(sample_gradient(problem, R))[0]
    best = escape_direction(problem, x, R)
    power = (problem.lam_H / problem.lam_W) ** 0.25
    plain = Params(best.W * power / jnp.linalg.norm(best.W), best.H / power / jnp.linalg.norm(best.H), best.b)
    return sigma, _form(problem, x, plain), _form(problem, x, best)


def _form(problem: Problem, x: Params, v: Params) -> jax.Array:
    """vᵀ∇²f(x) v by two directional derivatives."""

    def along(tau: jax.Array) -> jax.Array:
        return objective(problem, jax.tree.map(lambda a, da: a + tau * da, x, v))

    return jax.grad(jax.grad(along))(0.0)


CLAIMS = (gap_soundness, two_sides, escape_curvature)
