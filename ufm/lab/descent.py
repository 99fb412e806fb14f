"""One descent from a random start as records: its course, how it ended, its terminal rate, and where it rested."""

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, Key

from ufm.lab.chunks import Kept
from ufm.lab.courses import METRICS, course, rests
from ufm.lab.optimisers import MOMENTUM, optimiser
from ufm.lab.optimum import optimal_value
from ufm.lab.paths import Plateau, landmarks, plateaus
from ufm.model.problem import Problem, check_integer, init
from ufm.numerics.dynamics import Fate, Trajectory, judge
from ufm.theory.optimum import is_balanced
from ufm.theory.rates import Method, step_limit, terminal_rate
from ufm.theory.spectrum import hessian_spectrum

METHODS = {"sgd": (0.0, False), "momentum": (MOMENTUM, False), "nesterov": (MOMENTUM, True)}
TINY = np.finfo(float).tiny
NEAR = 1e-3  # f − f* relative to f* below which a descent is in its terminal phase
ROUNDED = 1e-12  # of the largest ‖∇f‖, below which the gradient is rounding
FALL = 10  # by so much at least ‖∇f‖ falls over the records that the terminal factor is measured on
Row = dict[str, Any]


def descent(
    problem: Problem, name: str, lr: float | None, *, schedule: Literal["constant", "cosine"] = "constant",
    steps: int, every: int = 1, scale: float = 1.0, batch: int | None = None, key: Key[Array, ""],
    file: Path | None = None, quiet: bool = True,
) -> tuple[Row, Kept]:  # fmt: skip
    """A descent as (scalars and tables, arrays along the way), which plots_dynamics.draw_course takes.

    Args:
        problem: cross-entropy, concrete, a column per sample, d ≥ K − 1.
        name: of lab.optimisers.
        lr: learning rate; None for lbfgs.
        schedule: cosine falls to zero at the last step.
        steps: a multiple of every.
        every: steps between records.
        scale: standard deviation of the start's entries.
        batch: samples drawn for every step; all if None.
        key: for the start and for what is drawn.
        file: where to keep what is done, in a folder that is made; see descend_in_chunks.
        quiet: without a progress bar.

    Raises:
        ValueError: if a number is out of range, or as optimal_value, optimiser and course do.
    """
    _check(name, lr, schedule, steps, every, scale, batch)
    optimum = float(optimal_value(problem))
    start_key, draw_key = jax.random.split(key)
    start = init(problem, start_key, scale=scale)
    rate = optax.cosine_decay_schedule(lr, steps) if schedule == "cosine" else lr
    rule = optimiser(problem, name, rate, batch=batch)
    _make_folder(file)
    end, kept = course(problem, rule, start, steps, every=every, key=draw_key, file=file, quiet=quiet)
    known = _known(problem, name, schedule, batch)
    told = {"optimiser": name, "lr": lr, "schedule": schedule, "batch": batch}
    ended = _ended(end, kept, int(end.steps) // every, optimum)
    terminal = known if isinstance(known, str) else _terminal(problem, known._replace(eta=lr), kept, optimum)
    rested, why = _rests(problem, kept) if ended["fate"] == Fate.DESCENDED.name else ([], "f did not fall")
    return told | ended | {"terminal": terminal, "plateaus": rested, "unnamed": why}, kept


def _ended(end: Trajectory, kept: Kept, last: int, optimum: float) -> Row:
    """The last finite record, and the fate of f itself, whatever was descended on."""
    value = jnp.asarray(kept["value"])
    fate = Fate(int(judge(value[0], value[last], end.fate != Fate.NOT_FINITE)))
    return {
        "steps": int(end.steps),
        "fate": fate.name,
        "optimal_value": optimum,
        "value": float(value[last]),
        "excess": float(value[last]) - optimum,
        **{key: float(kept[key][last]) for key in ("gap", "rounding", "grad_norm", *METRICS)},
    }


def _check(name: str, lr: float | None, schedule: str, steps: int, every: int, scale: float, batch: int | None) -> None:
    if lr is not None and not 0 < lr < math.inf:
        raise ValueError(f"lr must be positive and finite, got {lr}")
    if lr is None and schedule != "constant":
        raise ValueError(f"schedule must be constant for {name}, which searches its own step, got {schedule}")
    check_integer("every", every, at_least=1)
    check_integer("steps", steps, at_least=1)
    if steps % every:
        raise ValueError(f"steps must be a multiple of every = {every}, got {steps}")
    if not 0 <= scale < math.inf:
        raise ValueError(f"scale must be finite and not negative, got {scale}")
    if batch is not None:
        check_integer("batch", batch, at_least=1)


def _make_folder(file: Path | None) -> None:
    if file is not None:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"folder {file.parent} cannot be made ({error.strerror}): name a writable one") from error


def _known(problem: Problem, name: str, schedule: str, batch: int | None) -> Method | str:
    """The method, its step size left out, whose terminal factor is known; else why it is not."""
    if name not in METHODS:
        return f"not known for {name}, only for {', '.join(METHODS)}"
    if schedule != "constant":
        return "not known for a rate that changes"
    if batch is not None:
        return "not known for samples that are drawn"
    if not is_balanced(problem):
        return "not known for unequal counts, whose spectrum has no closed form"
    return Method(None, *METHODS[name])


def _terminal(problem: Problem, method: Method, kept: Kept, optimum: float) -> Row:
    """The terminal factor of the method at the optimum, and the one measured, with the steps between which it was."""
    spectrum = hessian_spectrum(problem)
    limit = float(step_limit(np.max(spectrum.eigenvalues), method))
    row = {"predicted_factor": math.exp(-float(terminal_rate(spectrum, method))), "step_limit": limit}
    swings = bool(
        terminal_rate(spectrum, method) >= -np.log(max(method.momentum, TINY)) / 2 * (1 - 1e-9)
    )  # complex roots
    window = terminal_window(kept["value"], kept["grad_norm"], optimum, whole=swings)
    if window is None:
        return row | {"measured_factor": None}
    later = np.maximum.accumulate(kept["grad_norm"][window[-1] :: -1])[::-1]  # max over the steps that follow
    step, slope = kept["step"][window], np.log(later[window])
    return row | {
        "measured_factor": math.exp(np.polyfit(step - step[0], slope, 1)[0]),
        "first": int(step[0]),
        "last": int(step[-1]),
    }


def terminal_window(
    value: Float[np.ndarray, " T"], grad_norm: Float[np.ndarray, " T"], optimum: float, *, whole: bool = False
) -> Int[np.ndarray, " records"] | None:
    """The records of a terminal phase: the later half, in log ‖∇f‖, of those from f − f* ≤ f*/1000 on to rounding.

    The whole of them where complex roots make ‖∇f‖ swing, which only many periods average.

    None if there is no such phase. It is ‖∇f‖ that is watched, since f − f*, its square, is lost in rounding after half
    as many steps.
    """
    far = np.flatnonzero(~(value - optimum <= NEAR * optimum))
    clear = np.flatnonzero(grad_norm > ROUNDED * np.nanmax(grad_norm))
    near = np.arange(far[-1] + 1 if far.size else 0, clear[-1] + 1 if clear.size else 0)
    if near.size == 0:
        return None
    early = near[grad_norm[near] > np.sqrt(grad_norm[near[0]] * grad_norm[near[-1]])]
    window = near[near > early[-1]] if early.size and not whole else near
    falls = window.size >= 3 and grad_norm[window[0]] >= FALL * grad_norm[window[-1]]
    return window if falls else None


def _rests(problem: Problem, kept: Kept) -> tuple[list[Row], str | None]:
    """The plateaus, and why they have no names where that is so."""
    found = plateaus(kept["value"], kept["grad_norm"])
    if not found:
        return [], None
    try:
        marks = landmarks(problem)
    except ValueError as error:
        return [_unnamed(kept, plateau) for plateau in found], str(error)
    return rests(problem, marks, kept), None


def _unnamed(kept: Kept, plateau: Plateau) -> Row:
    steps = {name: int(kept["step"][record]) for name, record in asdict(plateau).items()}
    return steps | {"nearest": None, "distance": None, "value": float(kept["value"][plateau.middle]), "saddle": None}
