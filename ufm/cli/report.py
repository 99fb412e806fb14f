"""What a command found, printed as a table or JSON and kept in a folder."""

import json
from typing import Any

from ufm.lab.records import as_json, write_run


def deliver(
    command: Any, start: float, result: dict[str, Any], title: str, arrays: dict[str, Any] | None = None
) -> int:
    """Print a result, and keep it where a folder was named."""
    if command.out is not None:
        write_run(command.out, command, result, arrays, start=start)
    if command.json:
        print(json.dumps(as_json(result)))
    else:
        print(title)
        print_table(as_json(result))
    return 0


def print_table(result: dict[str, Any], indent: str = "  ") -> None:
    """Print names and numbers, one a line; what is nested goes further in."""
    for name, value in result.items():
        if isinstance(value, dict):
            print(f"{indent}{name}")
            print_table(value, indent + "  ")
        else:
            print(f"{indent}{name:<28} {f'{value:.10g}' if isinstance(value, float) else value}")


def table(names: tuple[str, ...], rows: list[dict[str, Any]]) -> str:
    """A line of these names, and one for every row: what it has under each of them."""
    cells = [list(names)] + [[_cell(row[name]) for name in names] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(names))]
    return "\n".join("  " + "  ".join(_justified(line, widths)) for line in cells)


def _justified(line: list[str], widths: list[int]) -> list[str]:
    """Numbers to the right; a last column of words to the left."""
    cells = [cell.rjust(width) for cell, width in zip(line, widths, strict=True)]
    return [*cells[:-1], line[-1]] if widths[-1] > 20 else cells


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.8g}" if isinstance(value, float) else str(value)
