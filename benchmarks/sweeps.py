"""Whole sweeps beside loops: gradient descents for many λ's, and certified optima through the threshold.

Ours are the compiled blocks of ufm.sweep; prepare is what compiling them costs.
"""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.by_numpy import NumpyObjective, descend_by_numpy, flatten, solve_by_scipy
from benchmarks.descend import ETA, descent, floors
from benchmarks.descend import NUMPY as NUMPY_DESCENT
from benchmarks.descend import TORCH as TORCH_DESCENT
from benchmarks.race import CORES, HAS_TORCH, Contender, Row, absent, compile_time, race
from benchmarks.scale import Refusing
from benchmarks.solve import MEMORY, SCIPY, TARGET, TORCH
from ufm import Params, Problem, balanced, certify, global_minimiser, init, optimal_value
from ufm.lab.grid import problem_at
from ufm.lab.presets import solved
from ufm.lab.sweep import sweep

NUMPY_DESCENTS, TORCH_DESCENTS, SCIPY_LOOP, TORCH_LOOP = (
    f"loop: {name}" for name in (NUMPY_DESCENT, TORCH_DESCENT, SCIPY, TORCH)
)
BATCHED = "PyTorch batched by hand, analytic gradient"
TOLERANCES = 10.0 ** -np.arange(4, 11)
MOST = {SCIPY_LOOP: 1000, TORCH_LOOP: 200}  # steps; at the threshold the latter's line search stalls before the target
Points = list[list[Any]]


def compare_descent_sweeps(K: int, n: int, d: int, lams: np.ndarray, steps: int, repeats: int) -> list[Row]:
    """The same steps from the same start for every λ_W = λ_H = λ; the largest f − f* shows that all do the same."""
    problems = [balanced(K, n, d, lam_W=lam, lam_H=lam) for lam in lams]
    grid = {"lam": lams, "K": K, "n": n, "d": d}
    contenders = []
    for name, cell in DESCENTS.items():
        run = compiled(partial(cell, steps=steps), grid, make=equal_lambdas)
        contenders.append(Contender(f"ufm.sweep of {name}", run, steps, compile_time(run), [CORES]))
    contenders += [Contender(name, run, steps) for name, run in descend_by_others(problems, steps).items()]
    contenders += floors(problems, init(problems[0], jax.random.key(0)), steps)
    job = f"{len(lams)} λ's × {steps} gradient steps"
    return race(job, contenders, _excess(problems), repeats) + absent(job, TORCH_DESCENTS) + absent(job, BATCHED)


def compare_optimum_sweeps(
    cells: Mapping[str, Callable], Ks: Sequence[int], loads: np.ndarray, n: int, d: int, repeats: int
) -> list[Row]:
    """Certified optima for every K and load K√n λ, λ_W = λ_H = λ, beside others' descents to f − f* ≤ 1e-10.

    The others get the class-mean problems, a start each, no certificate, and for each problem the loosest tolerance on
    the gradient that reaches the target.
    """
    problems = [mean_problem(K, load, n, d) for K in Ks for load in loads]
    grid = {"K": list(Ks), "load": loads, "n": n, "d": d}
    blocks = {f"ufm.sweep of {name}": compiled(cell, grid, make=at_load, pad=True) for name, cell in cells.items()}
    contenders = [Contender(name, run, None, compile_time(run), [CORES]) for name, run in blocks.items()]
    contenders += [Contender(name, run, threads=[1]) for name, run in _solvers(problems).items()]
    job = f"{len(problems)} certified optima, K = {', '.join(map(str, Ks))}"
    rows = race(job, contenders, _excess(problems), repeats)
    ours, theirs = rows[: len(blocks)], rows[len(blocks) :]
    gaps = [f"largest certified gap {np.abs(blocks[row.contender]()['gap']).max():.1e}" for row in ours]
    noted = zip(rows, gaps + [_further_ratios(row, ours) for row in theirs], strict=True)
    return [replace(row, note=note) for row, note in noted] + absent(job, TORCH_LOOP)


def _further_ratios(row: Row, ours: Sequence[Row]) -> str:
    """Seconds over those of each of ours, without and with its compilation."""
    pairs = (f"{row.seconds / x.seconds:.3g} ({row.seconds / (x.seconds + x.prepare):.3g} compiling)" for x in ours)
    return "theirs/ours " + ", ".join(pairs)


def through_threshold(count: int) -> np.ndarray:
    """So many loads K√n λ from far below the threshold to far above it, 1 itself among them."""
    return np.sort(np.append(np.geomspace(0.05, 2, count - 1), 1.0))


def compiled(
    cell: Callable, grid: Mapping[str, Any], *, make: Callable, pad: bool = False
) -> Callable[[], dict[str, np.ndarray]]:
    """What ufm.sweep with method="map" has a worker do for a grid of one block; the first call compiles."""
    worker = Refusing()
    with contextlib.suppress(InterruptedError):
        sweep(cell, grid, make=make, pad=pad, method="map", executor=worker)
    return lambda: worker.task()[0]


def equal_lambdas(*, lam: Any, **sizes: int) -> Problem:
    """All samples, λ_W = λ_H = lam."""
    return balanced(**sizes, lam_W=lam, lam_H=lam)


def at_load(*, K: Any, load: Any, n: int, **settings: Any) -> Problem:
    """The class-mean problem with K√n λ = load for λ_W = λ_H = λ; K may be traced."""
    lam = load / (K * np.sqrt(n))
    return problem_at(K=K, n=n, lam_W=lam, lam_H=lam, **settings)


def mean_problem(K: int, load: float, n: int, d: int) -> Problem:
    """at_load as a problem of K samples, which other solvers can take: n h's of one class cost n λ_H ‖h‖²."""
    lam = load / (K * np.sqrt(n))
    return balanced(K, 1, d, lam_W=lam, lam_H=n * lam)


def differentiated(problem: Problem, *, steps: int) -> Params:
    """Where ufm.descend leads from a random start."""
    return descent(problem, init(problem, jax.random.key(0)), steps)


def by_hand(problem: Problem, *, steps: int) -> Params:
    """The same with the gradient written out, as the others have it."""
    Y = problem.Y * (ETA / problem.total)

    def step(x: Params, _: None) -> tuple[Params, None]:
        Z = x.W @ x.H + x.b[:, None]
        P = jnp.exp(Z - Z.max(0))
        R = P * (ETA / problem.total / P.sum(0)) - Y
        W = (1 - ETA * problem.lam_W) * x.W - (x.H @ R.T).T
        H = (1 - ETA * problem.lam_H) * x.H - x.W.T @ R
        return Params(W, H, x.b - R.sum(1)), None

    return jax.lax.scan(step, init(problem, jax.random.key(0)), length=steps)[0]


def known(problem: Problem) -> dict[str, Any]:
    """The certificate of the closed form."""
    certificate = certify(problem, global_minimiser(problem))
    return {"excess": certificate.value - optimal_value(problem), "gap": certificate.gap}


def found(problem: Problem) -> dict[str, Any]:
    """What a solver finds from a random start, and its certificate."""
    return solved(problem, jax.random.key(0))


DESCENTS = {"ufm.descend": differentiated, "a gradient by hand": by_hand}
CLOSED = {"closed form and certificate": known}
OPTIMA = CLOSED | {"L-BFGS, Newton and certificate": found}


def descend_by_others(problems: Sequence[Problem], steps: int) -> dict[str, Callable[[], Points]]:
    """What descends from our start, for problems that differ in λ_W = λ_H alone."""
    start, options = init(problems[0], jax.random.key(0)), {"steps": steps, "eta": ETA}
    funs, x = [NumpyObjective(problem) for problem in problems], flatten(start)
    others: dict[str, Callable] = {NUMPY_DESCENTS: lambda: [descend_by_numpy(fun, x, **options) for fun in funs]}
    if HAS_TORCH:
        from benchmarks.by_torch import TorchObjective, descend_batch_by_torch, descend_by_torch

        objectives = [TorchObjective(problem) for problem in problems]
        labels, lams = np.argmax(problems[0].Y, axis=0), np.array([[float(p.lam_W), float(p.lam_H)] for p in problems])
        others[TORCH_DESCENTS] = lambda: [descend_by_torch(fun, start, **options) for fun in objectives]
        others[BATCHED] = partial(descend_batch_by_torch, labels, lams, start, **options)
    return others


def _solvers(problems: Sequence[Problem]) -> dict[str, Callable[[], Points]]:
    pairs = [(problem, init(problem, jax.random.key(0))) for problem in problems]
    attempts = {SCIPY_LOOP: [partial(solve_by_scipy, NumpyObjective(problem), flatten(x)) for problem, x in pairs]}
    if HAS_TORCH:
        from benchmarks.by_torch import TorchObjective, solve_by_torch

        attempts[TORCH_LOOP] = [partial(solve_by_torch, TorchObjective(problem), x) for problem, x in pairs]
    return {name: _tuned(solves, problems, MOST[name]) for name, solves in attempts.items()}


def _tuned(solves: Sequence[Callable], problems: Sequence[Problem], most: int) -> Callable[[], Points]:
    """All solves, each with the loosest tolerance that reaches the target, or the tightest where none does."""
    chosen = []
    for solve, problem in zip(solves, problems, strict=True):
        error = _excess([problem])
        for tol in TOLERANCES:
            attempt = partial(solve, steps=most, memory=MEMORY, tol=tol)
            if error([attempt()]) <= TARGET:
                break
        chosen.append(attempt)
    return lambda: [attempt() for attempt in chosen]


def _excess(problems: Sequence[Problem]) -> Callable[[Any], float | None]:
    """The largest f − f* of points, or of what a sweep returned; None of nothing."""
    funs = [NumpyObjective(problem) for problem in problems]
    optima = [float(optimal_value(problem)) for problem in problems]

    def error(end: Any) -> float | None:
        if end is None:
            return None
        if "excess" in end:
            return float(end["excess"].max())
        points = zip(end["W"], end["H"], end["b"], strict=True) if isinstance(end, dict) else end
        values = [fun(np.concatenate([np.ravel(x) for x in point]))[0] for fun, point in zip(funs, points, strict=True)]
        return float(np.max(np.subtract(values, optima)))

    return error
