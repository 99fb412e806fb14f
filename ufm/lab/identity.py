"""What a cell computes, as a digest by which a store knows it again."""

import functools
import hashlib
import inspect
import re
from collections.abc import Callable
from typing import Any

import jax

from ufm.lab.program import Cells, Like, Recipe, Shapes, first_cell


def outputs_and_digest(recipe: Recipe, shapes: Shapes, cells: Cells, known: Like) -> tuple[Like, str]:
    """Shape and dtype of every output of a cell, and the digest of the program it lowers to; raises what the cell does.

    The program holds all that the cell calls and closes over. A cell that is not traced has the digest of its source,
    and is run for what it returns unless that is known.
    """
    with jax.enable_x64(recipe.x64):
        if recipe.method == "python":
            outputs: Any = known or recipe.at(shapes, first_cell(cells))
            text = _source(recipe.cell) + _source(recipe.make)
        else:
            points = {name: jax.ShapeDtypeStruct((), x.dtype) for name, x in cells.items()}
            lowered = jax.jit(functools.partial(recipe.at, shapes)).lower(points)
            outputs, text = lowered.out_info, without_addresses(lowered.as_text())
    like = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in outputs.items()}
    return like, hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def function_name(function: Any) -> str:
    """The dotted name of a function, or of a callable's class."""
    if isinstance(function, functools.partial):
        return f"partial of {function_name(function.func)}"
    return f"{function.__module__}.{getattr(function, '__qualname__', type(function).__qualname__)}"


def without_addresses(text: str) -> str:
    """The text with every address of this process replaced; the bytes of arrays, dense<"0x...">, stay."""
    return re.sub(r'(?<!dense<")0x[0-9a-f]{6,}', "0x", text)


def _source(function: Callable) -> str:
    inner: Any = inspect.unwrap(function.func if isinstance(function, functools.partial) else function)
    try:
        return inspect.getsource(inner if inspect.isroutine(inner) or inspect.isclass(inner) else type(inner))
    except (OSError, TypeError):  # built in, or typed at a prompt
        return function_name(function)
