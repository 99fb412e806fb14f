"""Gradient descent at a fixed step size: ufm.descend, NumPy with its analytic gradient, PyTorch, and their floor."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import Partial

from benchmarks.by_numpy import NumpyObjective, descend_by_numpy, flatten
from benchmarks.race import CORES, HAS_TORCH, Contender, Row, absent, compile_time, race
from ufm import Params, Problem, balanced, init, objective, optimal_value
from ufm.numerics.dynamics import descend

ETA = 1.0
GRADIENT_DESCENT = optax.sgd(ETA)
NUMPY, TORCH, BY_HAND = "NumPy, analytic gradient", "PyTorch autograd", "PyTorch, analytic gradient in place"
FLOORS = {"numpy": "floor: its products and exponentials, NumPy", "xla": "floor: its products and exponentials, XLA"}


def compare_descents(K: int, n: int, d: int, lam_W: float, lam_H: float, steps: int, repeats: int) -> list[Row]:
    """The same steps from the same start; f − f* shows that all do the same. The floors end nowhere."""
    problem = balanced(K, n, d, lam_W=lam_W, lam_H=lam_H)
    start = init(problem, jax.random.key(0))
    optimum = float(optimal_value(problem))

    def error(end: Any) -> float | None:
        return None if end is None else float(objective(problem, Params(*map(jnp.asarray, end)))) - optimum

    ours = partial(descended, problem, start, steps=steps)
    contenders = [Contender("ufm.descend(ufm.objective, optax.sgd)", ours, steps, compile_time(ours), [CORES])]
    contenders += [Contender(name, run, steps) for name, run in _others(problem, start, steps).items()]
    contenders += floors([problem], start, steps)
    job = f"{steps} gradient steps"
    return race(job, contenders, error, repeats) + absent(job, TORCH) + absent(job, BY_HAND)


def descended(problem: Problem, start: Params, *, steps: int) -> list[jax.Array]:
    """Where steps of size η lead: W, H, b."""
    return jax.block_until_ready(jax.tree.leaves(descent(problem, start, steps)))


def descent(problem: Problem, start: Params, steps: int) -> Params:
    return descend(Partial(objective, problem), start, GRADIENT_DESCENT, steps, every=steps).params


def _others(problem: Problem, start: Params, steps: int) -> dict[str, Callable]:
    options = {"steps": steps, "eta": ETA}
    others = {NUMPY: partial(descend_by_numpy, NumpyObjective(problem), flatten(start), **options)}
    if HAS_TORCH:
        from benchmarks.by_torch import TorchObjective, descend_batch_by_torch, descend_by_torch

        labels = np.argmax(problem.Y, axis=0)
        lams = np.array([[float(problem.lam_W), float(problem.lam_H)]])
        others[TORCH] = partial(descend_by_torch, TorchObjective(problem), start, **options)
        others[BY_HAND] = lambda: descend_batch_by_torch(labels, lams, start, **options)[0]
    return others


def floors(problems: list[Problem], start: Params, steps: int) -> list[Contender]:
    """The three matrix products and the exponentials of every step alone, of all problems, by BLAS and by XLA."""
    W, H = (np.stack([np.asarray(x)] * len(problems)) for x in (start.W, start.H))
    by_xla = partial(_products_by_xla, jnp.asarray(W), jnp.asarray(H), steps)
    return [
        Contender(FLOORS["numpy"], partial(_products_by_numpy, W, H, steps), steps),
        Contender(
            FLOORS["xla"], lambda: jax.block_until_ready(by_xla()) and None, steps, compile_time(by_xla), [CORES]
        ),
    ]


def _waited(arrays: list[jax.Array]) -> None:
    jax.block_until_ready(arrays)


def _products_by_numpy(W: np.ndarray, H: np.ndarray, steps: int) -> None:
    Z, slope_W, slope_H = W @ H, np.empty_like(W), np.empty_like(H)
    for _ in range(steps):
        np.matmul(W, H, out=Z)
        np.exp(Z, out=Z)
        np.matmul(Z, H.swapaxes(1, 2), out=slope_W)
        np.matmul(W.swapaxes(1, 2), Z, out=slope_H)


@partial(jax.jit, static_argnums=2)
def _products_by_xla(W: jax.Array, H: jax.Array, steps: int) -> list[jax.Array]:
    """Each step takes the last one's results times a number too small to matter, so that none can be left out."""

    def step(x: tuple[jax.Array, jax.Array], _: None) -> tuple[tuple[jax.Array, jax.Array], None]:
        P = jnp.exp(x[0] @ x[1])
        return (W + 1e-30 * P @ x[1].swapaxes(1, 2), H + 1e-30 * x[0].swapaxes(1, 2) @ P), None

    return list(jax.lax.scan(step, (W, H), length=steps)[0])
