"""The command `ufm`: check the theory, solve, certify, classify, measure, descend, sweep, train."""

import contextlib
import io
import itertools
import sys
from typing import Annotated, Any

import jax
import tyro

from ufm.cli.cache import use_cache
from ufm.cli.classify import Classify
from ufm.cli.descend import Descend
from ufm.cli.escape import Escape
from ufm.cli.features import Certify, Measure
from ufm.cli.landscape import Landscape
from ufm.cli.model import Solve
from ufm.cli.sweep import Sweep
from ufm.cli.train import Train
from ufm.cli.verify import Verify

Command = (
    Annotated[Verify, tyro.conf.subcommand("verify")]
    | Annotated[Solve, tyro.conf.subcommand("solve")]
    | Annotated[Certify, tyro.conf.subcommand("certify")]
    | Annotated[Classify, tyro.conf.subcommand("classify")]
    | Annotated[Measure, tyro.conf.subcommand("measure")]
    | Annotated[Landscape, tyro.conf.subcommand("landscape")]
    | Annotated[Escape, tyro.conf.subcommand("escape")]
    | Annotated[Descend, tyro.conf.subcommand("descend")]
    | Annotated[Sweep, tyro.conf.subcommand("sweep")]
    | Annotated[Train, tyro.conf.subcommand("train")]
)


def main(arguments: list[str] | None = None) -> None:
    """Run one command in float64; bad input is one line on standard error and exit status 2."""
    command = _parse(arguments)
    jax.config.update("jax_enable_x64", True)
    use_cache()
    try:
        sys.exit(command.run())
    except (ValueError, ArithmeticError, OSError, MemoryError) as error:
        sys.exit(_refuse(str(error)))
    except ModuleNotFoundError as error:
        sys.exit(_refuse(f"{str(error.name).partition('.')[0]} is not installed; pip install 'ufm[all]'"))
    except KeyboardInterrupt as stop:
        sys.exit(_refuse(": ".join(("interrupted", *map(str, stop.args))), status=130))


def _parse(arguments: list[str] | None) -> Any:
    """The command asked for; the parser's boxed complaint is cut down to its first paragraph."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(Command, args=arguments, prog="ufm", description=__doc__)
    except SystemExit as stop:
        if not stop.code:
            raise
        lines = [line.strip("│ ") for line in said.getvalue().splitlines()[1:]]
        complaint = itertools.takewhile(lambda line: not line.startswith("─"), lines)
        sys.exit(_refuse(f"{' '.join(complaint)}; see --help"))


def _refuse(message: str, status: int = 2) -> int:
    print("ufm:", " ".join(message.split()), file=sys.stderr)
    return status
