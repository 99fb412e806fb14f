"""The blocks of a sweep, one after the other here or on somebody else's workers."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from typing import Any

import jax

from ufm.lab.grid import Block, Grid
from ufm.lab.program import Failures, Like, Recipe, Values, run_block

ATTEMPTS = 3  # for a block whose worker is lost
OUTSTANDING = 256  # blocks that the executor has at a time
Computed = Iterator[tuple[Block, Values, Failures]]


def compute(
    recipe: Recipe, grid: Grid, like: Like, blocks: Sequence[Block], devices: Sequence[jax.Device] | None,
    executor: Executor | None, is_kept: Callable[[Block], bool],
) -> Computed:  # fmt: skip
    """Every block as soon as it is done; here, those that another process keeps meanwhile are left out."""

    def task(block: Block) -> tuple:
        return run_block, recipe, grid.shapes(block), grid.leaves_of(block), grid.size, like

    if executor is not None:
        _check_spawned(executor)
        yield from _farmed(executor, task, blocks)
        return
    for block in blocks:
        if not is_kept(block):
            function, *arguments = task(block)
            yield block, *function(*arguments, devices)


def _check_spawned(executor: Executor) -> None:
    """Refuse forked processes, in which JAX's threads, started here already, are missing: they would wait for ever."""
    context = getattr(executor, "_mp_context", None)
    if context is not None and context.get_start_method() == "fork":
        raise ValueError("executor must spawn its processes: mp_context=multiprocessing.get_context('spawn')")


def _farmed(executor: Executor, task: Callable[[Block], tuple], blocks: Sequence[Block]) -> Computed:
    """Whichever ends first, first, results before errors; what raises, as when its worker is lost, is tried again."""
    waiting = [(block, 1) for block in reversed(blocks)]
    pending: dict[Future, tuple[Block, int]] = {}
    try:
        while waiting or pending:
            while waiting and len(pending) < OUTSTANDING:
                block, attempt = waiting.pop()
                pending[executor.submit(_attempt, attempt, *task(block))] = block, attempt
            for future in sorted(wait(pending, return_when=FIRST_COMPLETED).done, key=_raised):
                block, attempt = pending.pop(future)
                if (error := future.exception()) is None:
                    yield block, *future.result()
                elif isinstance(error, ValueError) or attempt == ATTEMPTS:
                    raise error
                else:
                    waiting.append((block, attempt + 1))
            del future  # or else Dask computes it again when its worker is lost
    finally:
        for future in pending:
            future.cancel()


def _attempt(number: int, function: Callable, *arguments: Any) -> Any:
    """What the function returns; by the number Dask tells an attempt from the one before, whose error it keeps."""
    return function(*arguments)


def _raised(future: Future) -> bool:
    return future.exception() is not None
