"""From one random start to f − f* ≤ 1e-10: ufm.minimise, SciPy's L-BFGS-B, torch.optim.LBFGS."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.by_numpy import NumpyObjective, flatten, solve_by_scipy
from benchmarks.race import CORES, HAS_TORCH, Contender, Row, absent, compile_time, fewest_steps, race, using_threads
from ufm import Params, Problem, balanced, init, minimise, objective, optimal_value

TARGET = 1e-10
MEMORY = 10  # SciPy's default and ours
SCIPY, TORCH = "SciPy L-BFGS-B, NumPy gradient", "torch.optim.LBFGS"


def compare_solvers(K: int, n: int, d: int, lam_W: float, lam_H: float, repeats: int) -> list[Row]:
    """All have the same start and memory, and stop at the step that brings them to the target."""
    problem = balanced(K, n, d, lam_W=lam_W, lam_H=lam_H)
    start = init(problem, jax.random.key(0))
    optimum = float(optimal_value(problem))

    def error(end: Any) -> float:
        return float(objective(problem, Params(*map(jnp.asarray, end)))) - optimum

    def contender(name: str, solve: Callable, **options: Any) -> Contender:
        with using_threads(1):
            steps = fewest_steps(lambda steps: error(solve(steps=steps)), TARGET)
        return Contender(name, partial(solve, steps=steps), steps, **options)

    ours = partial(_solve, problem, start)
    compiled = compile_time(partial(ours, steps=1))
    contenders = [contender("ufm.minimise", ours, prepare=compiled, threads=[CORES])]
    contenders += [contender(name, solve) for name, solve in _others(problem, start).items()]
    job = f"solve λ_W={lam_W:g} λ_H={lam_H:g}"
    return race(job, contenders, error, repeats) + absent(job, TORCH)


def _solve(problem: Problem, start: Params, *, steps: int) -> list[jax.Array]:
    solution = minimise(partial(objective, problem), start, tol=0.0, max_steps=steps, memory=MEMORY)
    return jax.block_until_ready(jax.tree.leaves(solution.params))


def _others(problem: Problem, start: Params) -> dict[str, Callable]:
    others = {SCIPY: partial(solve_by_scipy, NumpyObjective(problem), flatten(start), memory=MEMORY)}
    if HAS_TORCH:
        from benchmarks.by_torch import TorchObjective, solve_by_torch

        others[TORCH] = partial(solve_by_torch, TorchObjective(problem), start, memory=MEMORY)
    return others
