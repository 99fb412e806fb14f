"""A claim: a statement of the theory as an executable check, and the evidence a run of it gives."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

Cases = Iterator[tuple[str, float]]


@dataclass(frozen=True)
class Claim:
    """A statement with its source and its test.

    Attributes:
        name: a few words.
        statement: what is claimed, one sentence.
        source: where it is stated or derived.
        tolerance: the largest residual that counts as agreement; the test's docstring derives it.
        cases: given whether to run the wide grid, yields (description, residual) of every case tried; a residual of
            inf is a flat contradiction.
    """

    name: str
    statement: str
    source: str
    tolerance: float
    cases: Callable[[bool], Cases]


@dataclass(frozen=True)
class Evidence:
    """What a run of a claim found: the number of cases, the worst residual and where it was met."""

    name: str
    statement: str
    source: str
    tolerance: float
    cases: int
    worst: float
    worst_case: str
    seconds: float

    @property
    def holds(self) -> bool:
        """Whether some case was tried and none left the tolerance."""
        return self.cases > 0 and self.worst <= self.tolerance


def claim(name: str, statement: str, source: str, tolerance: float) -> Callable[[Callable[[bool], Cases]], Claim]:
    """Make a Claim of the function that yields its cases."""
    return lambda cases: Claim(name, statement, source, tolerance, cases)


def _caught(cases: Cases) -> Cases:
    try:
        yield from cases
    except Exception as error:
        yield f"{type(error).__name__}: {error}", math.inf


def check(claim: Claim, *, full: bool = False) -> Evidence:
    """Run every case of a claim; NaN and an exception count as the worst residual of all, and the latter ends it."""
    start, count, worst, worst_case = time.perf_counter(), 0, -math.inf, ""
    for description, residual in _caught(claim.cases(full)):
        residual = math.inf if math.isnan(residual) else float(residual)
        count += 1
        if residual > worst:
            worst, worst_case = residual, description
    seconds = time.perf_counter() - start
    return Evidence(claim.name, claim.statement, claim.source, claim.tolerance, count, worst, worst_case, seconds)
