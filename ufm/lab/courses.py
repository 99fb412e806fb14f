"""A descent measured along its way: f − f*, certified gap, NC0 to NC3, and the saddles it passes."""

from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, Key

from ufm.lab.census import settle
from ufm.lab.chunks import Kept, descend_in_chunks
from ufm.lab.optimisers import Descent
from ufm.lab.paths import Landmarks, Plateau, class_path, nearest, partition_name, plateaus
from ufm.measure.collapse import collapse_metrics
from ufm.model.problem import Params, Problem, objective
from ufm.numerics.dynamics import Trajectory
from ufm.numerics.flow import gradient_norm
from ufm.theory.certificate import certify

METRICS = {
    "nc0": "nc0",
    "nc1": "nc1_pinv",
    "nc2": "nc2_etf_err_weights",
    "nc3": "nc3_dual_err",
}


def course(
    problem: Problem,
    descent: Descent,
    start: Params,
    steps: int,
    *,
    every: int = 1,
    key: Key[Array, ""] | None = None,
    file: Path | None = None,
    quiet: bool = True,
) -> tuple[Trajectory, Kept]:
    """The descent from a start with what along_path measures at every record, in chunks that can be resumed.

    Args:
        problem: cross-entropy, concrete.
        descent: of lab.optimisers.
        start: a point.
        steps: a multiple of every.
        every: steps between records.
        key: for a descent that draws.
        file: where to keep what is done, see descend_in_chunks.
        quiet: without a progress bar.
    """
    if descent.draws and key is None:
        raise ValueError("key must be given for a descent that draws its samples")
    keep, chosen = Partial(_identity), key if descent.draws else None
    end, kept = descend_in_chunks(
        descent.fun, start, descent.optimiser, steps,
        observe=keep, keep=partial(along_path, problem), every=every, key=chosen, file=file, quiet=quiet,
    )  # fmt: skip
    return end, {"step": every * np.arange(len(kept["value"])), **kept}


def _identity(x: Params) -> Params:
    return x


def along_path(problem: Problem, x: Params) -> Kept:
    """f, ‖∇f‖, certified gap with its rounding, NC0 to NC3 (tding1's forms) and class means, of points along a path.

    Args:
        problem: cross-entropy, a column per sample, concrete.
        x: points with a leading axis.
    """
    found = {name: np.asarray(value) for name, value in _certified(problem, x).items()}
    labels = np.argmax(problem.Y, axis=0)
    metrics = [_metrics(labels, *point) for point in zip(*map(np.asarray, (x.W, x.H, x.b)), strict=True)]
    found |= {name: np.array([m[name] for m in metrics]) for name in METRICS}
    means = jax.vmap(partial(class_path, problem))(x)
    return found | {"W": np.asarray(means.W), "M": np.asarray(means.H), "b": np.asarray(means.b)}


def _metrics(labels: np.ndarray, W: np.ndarray, H: np.ndarray, b: np.ndarray) -> dict[str, float]:
    """NC0 to NC3; NaN where the point is not finite."""
    if not all(np.isfinite(part).all() for part in (W, H, b)):
        return dict.fromkeys(METRICS, np.nan)
    found = collapse_metrics(H, labels, W, b)
    return {name: getattr(found, field) for name, field in METRICS.items()}


@jax.jit
def _certified(problem: Problem, x: Params) -> dict[str, Array]:
    def at(point: Params) -> dict[str, Array]:
        found = certify(problem, point)
        value, slope = objective(problem, point), gradient_norm(partial(objective, problem), point)
        return {"value": value, "grad_norm": slope, "gap": found.gap, "rounding": found.rounding}

    return jax.lax.map(at, x)


def rests(problem: Problem, marks: Landmarks, kept: Kept) -> list[dict[str, Any]]:
    """The plateaus of a course, each with the landmark nearest to it and the critical point that Newton finds from it.

    The critical point may be one that is no partition saddle (THEORY 8.4); it is None where Newton finds none, and
    `newton` is how far it went. A plateau at the start is included, one at the end is not.
    """
    return [_rest(problem, marks, kept, plateau) for plateau in plateaus(kept["value"], kept["grad_norm"])]


def _rest(problem: Problem, marks: Landmarks, kept: Kept, plateau: Plateau) -> dict[str, Any]:
    x = Params(*(jnp.asarray(kept[name][plateau.middle]) for name in ("W", "M", "b")))
    index, away = nearest(marks, jax.tree.map(lambda a: a[None], x))
    found = settle(problem, x)
    moved = None if found is None else _between(problem, x, found.params)
    steps = {name: int(kept["step"][getattr(plateau, name)]) for name in ("first", "middle", "last")}
    near = {"nearest": marks.names[index[0]], "distance": float(away[0]), "value": float(kept["value"][plateau.middle])}
    if found is None:
        return steps | near | {"saddle": None, "newton": None}
    saddle = {
        "partition": partition_name(found.partition),
        "known": found.known,
        "value": found.value,
        "rank": found.rank,
        "index": found.index,
        "smallest_eigenvalue": found.smallest_eigenvalue,
    }
    return steps | near | {"saddle": saddle, "newton": moved}


def _between(problem: Problem, x: Params, y: Params) -> float:
    """‖x − y‖ over all samples, of points with a column per class."""
    squares = jnp.sum((x.W - y.W) ** 2) + jnp.sum(problem.counts * (x.H - y.H) ** 2) + jnp.sum((x.b - y.b) ** 2)
    return float(jnp.sqrt(squares))
