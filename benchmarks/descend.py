"""Gradient descent at a fixed step size: a jitted lax.scan, NumPy with its analytic gradient, PyTorch's autograd."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.by_numpy import NumpyObjective, descend_by_numpy, flatten
from benchmarks.race import CORES, HAS_TORCH, Contender, Row, absent, compile_time, race
from ufm import Params, Problem, balanced, init, objective, optimal_value

ETA = 1.0
NUMPY, TORCH = "NumPy, analytic gradient", "PyTorch autograd"


def compare_descents(K: int, n: int, d: int, lam_W: float, lam_H: float, steps: int, repeats: int) -> list[Row]:
    """The same steps from the same start; f − f* shows that all do the same."""
    problem = balanced(K, n, d, lam_W=lam_W, lam_H=lam_H)
    start = init(problem, jax.random.key(0))
    optimum = float(optimal_value(problem))

    def error(end: Any) -> float:
        return float(objective(problem, Params(*map(jnp.asarray, end)))) - optimum

    ours = partial(descend, problem, start, steps=steps)
    contenders = [Contender("jitted lax.scan of jax.grad(ufm.objective)", ours, steps, compile_time(ours), [CORES])]
    contenders += [Contender(name, run, steps) for name, run in _others(problem, start, steps).items()]
    job = f"{steps} gradient steps"
    return race(job, contenders, error, repeats) + absent(job, TORCH)


def descend(problem: Problem, start: Params, *, steps: int) -> list[jax.Array]:
    """Where steps of size η lead: W, H, b."""
    return jax.block_until_ready(jax.tree.leaves(descent(problem, start, steps)))


@partial(jax.jit, static_argnums=2)
def descent(problem: Problem, start: Params, steps: int) -> Params:
    gradient = jax.grad(partial(objective, problem))

    def step(x: Params, _: None) -> tuple[Params, None]:
        return jax.tree.map(lambda part, slope: part - ETA * slope, x, gradient(x)), None

    return jax.lax.scan(step, start, length=steps)[0]


def _others(problem: Problem, start: Params, steps: int) -> dict[str, Callable]:
    options = {"steps": steps, "eta": ETA}
    others = {NUMPY: partial(descend_by_numpy, NumpyObjective(problem), flatten(start), **options)}
    if HAS_TORCH:
        from benchmarks.by_torch import TorchObjective, descend_by_torch

        others[TORCH] = partial(descend_by_torch, TorchObjective(problem), start, **options)
    return others
