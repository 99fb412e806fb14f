"""A race: contenders for one job, timed in turn, and how far each ended from the optimum."""

import contextlib
import dataclasses
import importlib.util
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from threadpoolctl import threadpool_limits

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
HAS_TORCH = importlib.util.find_spec("torch") is not None


@dataclasses.dataclass(frozen=True)
class Contender:
    """One way of doing a job.

    Attributes:
        name: of the library and its method.
        run: does the whole job, waits for it and returns where it ended.
        steps: that the job takes.
        prepare: once per shape, outside the time; None for what is not compiled.
        threads: to try for BLAS and PyTorch, of which the fastest counts. XLA keeps its own pool of all cores.
    """

    name: str
    run: Callable[[], Any]
    steps: int | None = None
    prepare: float | None = None
    threads: Sequence[int] = tuple(sorted({1, CORES}))


@dataclasses.dataclass(frozen=True)
class Row:
    """A line of the table.

    Attributes:
        seconds: median wall time after compilation; None where the contender is missing.
        error: the accuracy reached, f − f*; None of what solves nothing.
        ratio: seconds over ours: above 1, ours is ahead.
        note: what else a reader must know.
    """

    job: str
    contender: str
    threads: int | None = None
    seconds: float | None = None
    steps: int | None = None
    error: float | None = None
    ratio: float | None = None
    prepare: float | None = None
    note: str = ""


def race(job: str, contenders: Sequence[Contender], error: Callable[[Any], float | None], repeats: int) -> list[Row]:
    """A row for each contender, ours first.

    After an untimed run each, they take turns, so that what else the machine does falls on all alike.
    """
    attempts = [(c, threads) for c in contenders for threads in c.threads]
    errors = [error(_timed(*attempt)[1]) for attempt in attempts]
    rounds = [[_timed(*attempt)[0] for attempt in attempts] for _ in range(repeats)]
    times = [statistics.median(column) for column in zip(*rounds, strict=True)]
    rows: dict[str, Row] = {}
    for (c, threads), seconds, reached in zip(attempts, times, errors, strict=True):
        row = Row(job, c.name, threads, seconds, c.steps, reached, seconds / times[0], c.prepare)
        rows[c.name] = min(rows.get(c.name, row), row, key=lambda r: r.ratio)
    return list(rows.values())


def absent(job: str, contender: str) -> list[Row]:
    """The row of a PyTorch contender where PyTorch is missing, or none."""
    return [] if HAS_TORCH else [Row(job, contender, note="torch not installed")]


def compile_time(run: Callable[[], Any]) -> float:
    """What the first call costs beyond the second, in seconds."""
    first, second = clock(run)[0], clock(run)[0]
    return max(first - second, 0.0)


def clock(run: Callable[[], Any]) -> tuple[float, Any]:
    """Wall time in seconds, and what was returned."""
    start = time.perf_counter()
    end = run()
    return time.perf_counter() - start, end


def fewest_steps(error_after: Callable[[int], float], target: float, most: int = 1 << 14) -> int:
    """A number of steps that reaches the target where one fewer does not, by doubling and bisection.

    Raises:
        ArithmeticError: if the target is not reached in most steps.
    """
    low, high = 0, 1
    while not error_after(high) <= target:
        low, high = high, 2 * high
        if high > most:
            raise ArithmeticError(f"error still above {target:.0e} after {low} steps")
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if error_after(middle) <= target else (middle, high)
    return high


def _timed(contender: Contender, threads: int) -> tuple[float, Any]:
    with using_threads(threads):
        return clock(contender.run)


@contextlib.contextmanager
def using_threads(count: int) -> Iterator[None]:
    """BLAS, OpenMP and PyTorch on so many threads."""
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(count)
    with threadpool_limits(count):
        yield
