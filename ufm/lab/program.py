"""A cell of a sweep, compiled once for all the cells of a block."""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

COMPILED = ("vmap", "map")
METHODS = (*COMPILED, "python")
DONE, NOT_FINITE, RAISED = 1, 2, 3
SEED = "seed"
REPEATS, SHORT = 5, 0.1  # runs of a block when methods are compared, and the seconds after which one is enough

Shapes = tuple[tuple[str, Any], ...]
Cells = dict[str, np.ndarray]
Values = dict[str, np.ndarray]
Like = dict[str, jax.ShapeDtypeStruct]
Failures = dict[int, str]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a cell is computed, whatever its place in the grid; workers know it by its token.

    Attributes:
        cell: the function swept.
        make: what makes its argument of the settings.
        fixed: settings that do not vary.
        leaves: names and dtypes of those that are traced.
        method: "vmap" over the cells of a block, "map" over one after the other, both compiled; or
            "python".
        x64: whether floats are float64.
        token: its identity.
    """

    cell: Callable = dataclasses.field(compare=False)
    make: Callable = dataclasses.field(compare=False)
    fixed: dict[str, Any] = dataclasses.field(compare=False)
    leaves: tuple[tuple[str, str], ...]
    method: str
    x64: bool
    token: str

    def at(self, shapes: Shapes, leaves: dict[str, Any]) -> dict[str, jax.Array]:
        """What the cell returns at one point, by name; parts of a nested result have dotted names."""
        settings = self.fixed | dict(shapes) | leaves
        key = (jax.random.key(settings.pop(SEED)),) if SEED in settings else ()
        parts = jax.tree.leaves_with_path(self.cell(self.make(**settings), *key))
        return {_name(path): jnp.asarray(x) for path, x in parts}


def _name(path: tuple[Any, ...]) -> str:
    parts = (getattr(p, "key", getattr(p, "name", getattr(p, "idx", p))) for p in path)
    return ".".join(map(str, parts)) or "value"


def first_cell(cells: Cells) -> dict[str, Any]:
    """The leaves of the first of some cells as plain numbers."""
    return {name: values[0].item() for name, values in cells.items()}


def run_block(
    recipe: Recipe, shapes: Shapes, cells: Cells, size: int, like: Like, devices: Sequence[jax.Device] | None = None
) -> tuple[Values, Failures]:
    """Every output and the `status` of every cell of a block; and by cell what went wrong.

    Args:
        recipe: what to compute.
        shapes: the settings that the cells have in common.
        cells: those that differ, one entry a cell.
        size: cells to compile for, at least as many.
        like: shape and dtype of every output.
        devices: to split the cells over; all of this process if None.

    Raises:
        ValueError: if the cell returns other outputs here than `like`.
    """
    with jax.enable_x64(recipe.x64):
        results = _results(recipe, shapes, cells, size, tuple(devices or jax.local_devices()))
    return _judged(results, like, shapes)


def _results(recipe: Recipe, shapes: Shapes, cells: Cells, size: int, devices: tuple) -> list[Values | Exception]:
    """The outputs of a block, or of every cell alone where one of them fails."""
    count = len(next(iter(cells.values()), [None]))
    alone = [{name: values[i : i + 1] for name, values in cells.items()} for i in range(count)]
    if recipe.method == "python":
        return [_attempt(_by_itself, recipe, shapes, cell) for cell in alone]
    program = _program(recipe, shapes, size, devices)
    if isinstance(program, Exception):
        return [program] * count
    together = _attempt(program, cells)
    if not isinstance(together, Exception):
        return [together]
    single: Any = _program(recipe, shapes, 1, devices[:1])
    return [_attempt(single, cell) for cell in alone]


def _attempt(function: Callable, *arguments: Any) -> Any:
    """What the function returns, or the exception it raises."""
    try:
        return function(*arguments)
    except Exception as error:
        return error


def error_text(error: Exception) -> str:
    """The error in one line: its first, or the second where the first introduces a traceback, as callbacks' do."""
    lines = [line for line in str(error).splitlines() if line.strip() and not line.startswith(" ")] or [""]
    return f"{type(error).__name__}: {lines[lines[0].endswith(':') and len(lines) > 1]}"


def _by_itself(recipe: Recipe, shapes: Shapes, cell: Cells) -> Values:
    return {name: np.asarray(x)[None] for name, x in recipe.at(shapes, first_cell(cell)).items()}


def _judged(results: list[Values | Exception], like: Like, shapes: Shapes) -> tuple[Values, Failures]:
    """All results in one, with the status of every cell and a message for those that failed."""
    blank = {name: np.full((1, *x.shape), np.nan if x.dtype.kind in "fc" else 0, x.dtype) for name, x in like.items()}
    filled = [blank if isinstance(result, Exception) else result for result in results]
    for part in filled:
        _check_like(part, like, shapes)
    outputs = {name: np.concatenate([part[name] for part in filled]) for name in like}
    failures = {i: error_text(x) for i, x in enumerate(results) if isinstance(x, Exception)}
    status = np.full(len(next(iter(outputs.values()))), DONE, np.int8)
    status[list(failures)] = RAISED
    for name, x in outputs.items():
        nan = np.isnan(x).reshape(len(x), -1).any(1) & (status != RAISED)
        status[nan] = NOT_FINITE
        failures |= {int(i): f"{name} is NaN" for i in np.flatnonzero(nan)}
    return outputs | {"status": status}, failures


def _check_like(part: Values, like: Like, shapes: Shapes) -> None:
    """Refuse a cell whose outputs depend on its place in the grid."""
    for name in sorted(part.keys() | like.keys()):
        here, there = (
            f"{x.dtype.name}{list(x.shape[skip:])}" if (x := of.get(name)) is not None else "missing"
            for of, skip in ((part, 1), (like, 0))
        )
        if here != there:
            raise ValueError(f"cell must return the same everywhere: {name} is {here} at {dict(shapes)}, else {there}")


@functools.lru_cache(maxsize=64)
def _program(recipe: Recipe, shapes: Shapes, size: int, devices: tuple[jax.Device, ...]) -> "Program | Exception":
    """The compiled block, or why there is none."""
    return _attempt(Program, recipe, shapes, size, devices)


class Program:
    """A block of cells in one compiled program, split over devices; NumPy arrays in and out.

    Raises:
        ValueError: if vmap calls LAPACK, as on a CPU. jaxlib's batched calls each hold a thread of the pool while they
            wait for others of it, and as many calls at once as there are threads wait for ever.
    """

    def __init__(self, recipe: Recipe, shapes: Shapes, size: int, devices: tuple[jax.Device, ...]) -> None:
        self.size = len(devices) * math.ceil(size / len(devices))
        mesh = Mesh(np.array(devices), ("cells",), axis_types=(AxisType.Auto,))
        self.sharding = NamedSharding(mesh, PartitionSpec("cells"))
        at = lambda point: recipe.at(shapes, point[1])  # noqa: E731
        run = jax.vmap(at) if recipe.method == "vmap" else functools.partial(jax.lax.map, at)
        cells = PartitionSpec("cells")
        split = jax.shard_map(run, mesh=mesh, in_specs=cells, out_specs=cells, check_vma=False)
        points = self._points({name: np.zeros(1, kind) for name, kind in recipe.leaves})
        lowered = jax.jit(split).lower(points)
        if recipe.method == "vmap" and "lapack_" in lowered.as_text():
            raise ValueError(
                "vmap would batch calls of LAPACK, which on a CPU can wait for each other; use method='map'"
            )
        self.compiled = lowered.compile()

    def _points(self, cells: Cells) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The cells' numbers and leaves, the last cell repeated up to the compiled size."""
        padded = {name: np.pad(x, (0, self.size - len(x)), "edge") for name, x in cells.items()}
        return jax.device_put((np.arange(self.size), padded), self.sharding)

    def __call__(self, cells: Cells) -> Values:
        """Every output at the cells given."""
        count = len(next(iter(cells.values()), [None]))
        return {name: np.asarray(x)[:count] for name, x in self.compiled(self._points(cells)).items()}


def measure_methods(recipe: Recipe, shapes: Shapes, cells: Cells, size: int, devices: Any = None) -> dict[str, float]:
    """Seconds that each compiled method takes for a block, compilation aside; those that fail are left out.

    If only one compiles, it is not run: there is nothing to choose.
    """
    devices = tuple(devices or jax.local_devices())
    with jax.enable_x64(recipe.x64):
        methods = {name: _program(dataclasses.replace(recipe, method=name), shapes, size, devices) for name in COMPILED}
        programs = {name: program for name, program in methods.items() if not isinstance(program, Exception)}
        if len(programs) < 2:
            return dict.fromkeys(programs, math.nan)
        timed = {name: _attempt(_seconds, program, cells) for name, program in programs.items()}
    return {name: x for name, x in timed.items() if not isinstance(x, Exception)}


def _seconds(program: "Program", cells: Cells) -> float:
    """What a run takes; the least of several where it is short, since a first run is slower."""
    taken: list[float] = []
    while len(taken) < REPEATS and sum(taken) < SHORT:
        start = time.perf_counter()
        program(cells)
        taken.append(time.perf_counter() - start)
    return min(taken)
