"""The problems that claims are tried on: few shapes, since each is compiled, and many λ's."""

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import jax

from ufm.model.problem import Params, Problem, balanced, init, objective
from ufm.numerics.minimise import minimise
from ufm.numerics.newton import polish

Shape = tuple[int, int, int, dict[str, Any]]
QUICK: tuple[Shape, ...] = ((2, 1, 2, {}), (4, 5, 3, {"lam_b": 1e-2}), (6, 3, 8, {"use_bias": False}))
FULL: tuple[Shape, ...] = (
    *QUICK,
    (2, 3, 1, {"lam_b": 1e-3}),
    (3, 1, 2, {}),
    (5, 4, 5, {}),
    (10, 10, 16, {"lam_b": 1e-4}),
    (20, 2, 19, {"use_bias": False}),
    (50, 4, 64, {}),
)
LOADS = (1e-6, 1e-3, 0.03, 0.3, 0.9, 1.0, 1.2)  # K√n s, of which 1 is the threshold
RATIOS = (1.0, 50.0)  # λ_W / λ_H


def shapes(full: bool) -> tuple[Shape, ...]:
    """The (K, n, d, bias) tried."""
    return FULL if full else QUICK


def balanced_problems(full: bool, loads: tuple[float, ...] = LOADS) -> Iterator[tuple[str, Problem]]:
    """Balanced problems with their descriptions: every shape at every load K√n s and λ_W/λ_H."""
    for K, n, d, kind in shapes(full):
        for load in loads:
            for ratio in RATIOS:
                s = load / (K * math.sqrt(n))
                lam_W, lam_H = s * math.sqrt(ratio), s / math.sqrt(ratio)
                bias = "no bias" if kind.get("use_bias") is False else f"lam_b={kind.get('lam_b', 0):g}"
                text = f"K={K} n={n} d={d} {bias} lam_W={lam_W:.3g} lam_H={lam_H:.3g}"
                yield text, balanced(K, n, d, lam_W=lam_W, lam_H=lam_H, **kind)


def solved(problem: Problem, seed: int) -> Params:
    """A minimiser found from a random start, with no knowledge of the theory."""
    fun = partial(objective, problem)
    start = init(problem, jax.random.key(seed))
    return polish(fun, minimise(fun, start, tol=1e-9 * math.sqrt(float(problem.s))).params).params
