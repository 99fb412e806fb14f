"""A grid of hyper-parameters, cut into blocks that one compiled program serves."""

import dataclasses
import itertools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from ufm.lab.program import SEED, Shapes
from ufm.model.padding import padded
from ufm.model.problem import Problem, check_integer, class_mean_problem

Block = dict[str, slice]
SIZES = ("K", "n", "d")
LEAST = {"lam_W": "positive", "lam_H": "positive", "lam_b": "zero or positive"}  # no traced λ is checked later


@dataclasses.dataclass(frozen=True)
class Grid:
    """Named axes and fixed settings.

    Attributes:
        axes: the values along every axis, in order.
        fixed: what does not vary.
        leaves: the axes whose values are traced, in order; the others are shapes, a program each.
        chunk: how many values of every axis a block spans, one for shapes.
        size: cells of a compiled block; smaller blocks repeat their last cell.
        largest: the number of classes that every problem is padded to; None pads nothing.
    """

    axes: dict[str, np.ndarray]
    fixed: dict[str, Any]
    leaves: tuple[str, ...]
    chunk: dict[str, int]
    size: int
    largest: int | None

    @property
    def shape(self) -> tuple[int, ...]:
        """Cells along every axis."""
        return tuple(len(values) for values in self.axes.values())

    @property
    def chunks(self) -> tuple[int, ...]:
        """Cells of a block along every axis."""
        return tuple(self.chunk[name] for name in self.axes)

    def blocks(self) -> list[Block]:
        """Where the blocks lie, those of one bucket of shapes together."""
        inner = [name for name in self.axes if name in self.leaves]
        outer = [name for name in self.axes if name not in self.leaves]
        cuts = [
            [slice(i, min(i + self.chunk[name], len(self.axes[name]))) for i in _starts(self, name)]
            for name in outer + inner
        ]
        found = (dict(zip(outer + inner, cut, strict=True)) for cut in itertools.product(*cuts))
        return [{name: block[name] for name in self.axes} for block in found]

    def place(self, block: Block) -> tuple[int, ...]:
        """The block's position among the blocks, one number an axis."""
        return tuple(block[name].start // self.chunk[name] for name in self.axes)

    @property
    def cells(self) -> int:
        """Cells in all."""
        return math.prod(self.shape)

    def shapes(self, block: Block) -> Shapes:
        """Names and values of the shapes of a block, which its cells have in common."""
        values = ((name, self.axes[name][block[name].start]) for name in self.axes if name not in self.leaves)
        return tuple((name, value.item() if isinstance(value, np.generic) else value) for name, value in values)

    def first_blocks(self) -> dict[Shapes, Block]:
        """The first block of every combination of shapes."""
        found: dict[Shapes, Block] = {}
        for block in self.blocks():
            found.setdefault(self.shapes(block), block)
        return found

    def leaves_of(self, block: Block) -> dict[str, np.ndarray]:
        """The values of every leaf at each cell of a block, in the order of the axes."""
        values = np.meshgrid(*(self.axes[name][block[name]] for name in self.leaves), indexing="ij")
        return {name: value.ravel() for name, value in zip(self.leaves, values, strict=True)}

    def coordinates(self, block: Block, cell: int) -> dict[str, Any]:
        """The place of one cell of a block, by name."""
        place = np.unravel_index(cell, extent(block))
        return {n: self.axes[n][block[n].start + i] for n, i in zip(self.axes, place, strict=True)}


def _starts(grid: Grid, name: str) -> range:
    return range(0, len(grid.axes[name]), grid.chunk[name])


def cell_count(block: Block) -> int:
    """Cells of a block."""
    return math.prod(extent(block))


def extent(block: Block) -> tuple[int, ...]:
    """Cells of a block along every axis."""
    return tuple(cut.stop - cut.start for cut in block.values())


def make_grid(axes: Mapping[str, Any], *, batch_size: int, pad: bool) -> Grid:
    """The grid that names, values and a batch size describe.

    Args:
        axes: a value, or a list or array of values, by name. Floating values are leaves, and so is `seed`; integers,
            strings, booleans and tuples are shapes.
        batch_size: the largest number of cells in a block.
        pad: makes K a leaf; needs integers under that name.

    Raises:
        ValueError: if there is no axis, or one is empty, not one-dimensional, not finite, or repeats a value.
    """
    check_integer("batch_size", batch_size, at_least=1)
    varying = {name: _axis(name, x) for name, x in axes.items() if _varies(x)}
    fixed = {name: x for name, x in axes.items() if not _varies(x)}
    if not varying:
        raise ValueError("grid must vary at least one axis; every value is fixed")
    if pad and not (varying.get("K") is not None and varying["K"].dtype.kind == "i"):
        raise ValueError("pad=True needs an axis K of integers in the grid")
    leaves = tuple(n for n, x in varying.items() if x.dtype.kind == "f" or n == SEED or (pad and n == "K"))
    chunk = _chunks(varying, leaves, batch_size)
    largest = int(varying["K"].max()) if pad else None
    return Grid(varying, fixed, leaves, chunk, math.prod(chunk.values()), largest)


def _varies(given: Any) -> bool:
    return isinstance(given, list | range) or (hasattr(given, "__array__") and np.ndim(given) > 0)


def _axis(name: str, given: Any) -> np.ndarray:
    """The values of an axis; tuples count as one value each, and floats have the precision of the cells."""
    if any(isinstance(x, list) for x in given):
        raise ValueError(f"{name} must be a value or a list of values, got {given}; write tuples within the list")
    if any(isinstance(x, tuple) for x in given):
        axis = np.empty(len(given), object)
        axis[:] = list(given)
    else:
        axis = np.asarray(given)
        if axis.dtype.kind == "U" and not all(isinstance(x, str) for x in given):
            raise ValueError(f"{name} must be values of one kind, got {list(given)}")
    _check_axis(name, axis)
    return axis.astype(float) if axis.dtype.kind == "f" or name in LEAST else axis


def _check_axis(name: str, axis: np.ndarray) -> None:
    if name in SIZES and axis.dtype.kind != "i":
        raise ValueError(f"{name} must be integers, got {axis.tolist()}")
    if axis.ndim > 1 or axis.size == 0:
        raise ValueError(f"{name} must be a value or a list of at least one, got shape {axis.shape}")
    if axis.dtype.kind == "f" and not np.isfinite(axis).all():
        raise ValueError(f"{name} must be finite, got {axis.tolist()}")
    if name in LEAST and axis.dtype.kind not in "fi":
        raise ValueError(f"{name} must be numbers, got {axis.tolist()}")
    if name in LEAST and (axis < 0 if name == "lam_b" else axis <= 0).any():
        raise ValueError(f"{name} must be {LEAST[name]}, got {axis.min()}")
    if axis.ndim and len(set(axis.tolist())) < len(axis):
        raise ValueError(f"{name} must not repeat a value, got {axis.tolist()}")


def _chunks(axes: Mapping[str, np.ndarray], leaves: tuple[str, ...], batch_size: int) -> dict[str, int]:
    """As many cells as fit a batch, the last leaves first, in parts of an axis that are as equal as can be."""
    chunk, room = dict.fromkeys(axes, 1), batch_size
    for name in reversed(leaves):
        length = len(axes[name])
        chunk[name] = math.ceil(length / math.ceil(length / room))
        room = max(room // chunk[name], 1)
    return chunk


def problem_at(
    *, d: int, lam_W: Any, lam_H: Any, K: Any = None, n: Any = None, counts: tuple[int, ...] | None = None,
    lam_b: Any = 0.0, use_bias: bool = True, largest: int | None = None,
) -> Problem:  # fmt: skip
    """The class-mean problem with these settings: one column a class, the optimum of all samples (THEORY 8.2)."""
    if counts is not None and (K is not None or n is not None or largest is not None):
        raise ValueError("counts say what K and n are, and cannot be padded; give K and n, or counts")
    lams = {"lam_W": lam_W, "lam_H": lam_H, "lam_b": lam_b, "use_bias": use_bias}
    if largest is not None:
        return padded(K, n, d, largest=largest, **lams)
    return class_mean_problem((n,) * K if counts is None else counts, d, **lams)
