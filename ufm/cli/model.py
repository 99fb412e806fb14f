"""The model as its classes, dimension and λ's, and its global optimum."""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import jax
import tyro

from ufm.cli.report import deliver
from ufm.model.problem import Problem, imbalanced


@dataclass(frozen=True)
class Model:
    """The model's classes, dimension and λ's."""

    K: int = 10
    """Number of classes."""
    n: int = 100
    """Samples per class."""
    counts: tuple[int, ...] = ()
    """Samples of each class where they differ; replaces K and n."""
    d: int = 20
    """Feature dimension, at least K − 1."""
    lam_W: float = 5e-3
    """λ_W of (UFM)."""
    lam_H: float = 5e-5
    """λ_H of (UFM), per sample."""
    lam_b: float = 0.0
    """λ_b; 0 leaves the bias free."""
    bias: bool = True
    """Without it the classifier has no bias."""

    def class_counts(self) -> tuple[int, ...]:
        """n_k of every class."""
        for name, least in (("K", 2), ("n", 1)):
            if not self.counts and getattr(self, name) < least:
                raise ValueError(f"{name} must be an integer of at least {least}, got {getattr(self, name)}")
        return self.counts or (self.n,) * self.K

    def problem(self) -> Problem:
        """The model with a column for every sample."""
        counts, lam_W, lam_H, lam_b = self.class_counts(), self.lam_W, self.lam_H, self.lam_b
        return imbalanced(counts, self.d, lam_W=lam_W, lam_H=lam_H, lam_b=lam_b, use_bias=self.bias)


@dataclass(frozen=True)
class Solve:
    """The global optimum: in closed form or certified, beside L-BFGS from a random start."""

    model: Annotated[Model, tyro.conf.arg(name="")] = field(default_factory=Model)
    seed: int = 0
    """Seed of the random start."""
    out: Path | None = None
    """New folder for config.json, summary.json and arrays.npz (W, class means M, b)."""
    json: bool = False
    """Print one JSON document instead of a table."""

    def run(self) -> int:
        """Run it; the exit status."""
        from functools import partial

        import numpy as np

        from ufm.lab.compare import summarise
        from ufm.lab.optimum import global_minimiser
        from ufm.model.problem import class_mean_problem, init, objective
        from ufm.numerics.minimise import Status, minimise
        from ufm.theory.certificate import certify
        from ufm.theory.optimum import collapse_threshold

        start, m = time.perf_counter(), self.model
        counts = m.class_counts()
        problem = class_mean_problem(counts, m.d, lam_W=m.lam_W, lam_H=m.lam_H, lam_b=m.lam_b, use_bias=m.bias)
        best = global_minimiser(problem)
        certificate = certify(problem, best)
        found = minimise(partial(objective, problem), init(problem, jax.random.key(self.seed)))
        result = {
            "optimum": summarise(problem, best),
            "gap": certificate.gap,
            "rounding": certificate.rounding,
            "verdict": certificate.verdict.name,
            "s": problem.s,
            "collapse_threshold": collapse_threshold(problem),
            "lbfgs": {
                "value": found.value,
                "excess": found.value - certificate.value,
                "grad_norm": found.grad_norm,
                "steps": found.steps,
                "status": Status(int(found.status)).name,
            },
        }
        arrays = {"W": best.W, "M": best.H, "b": best.b, "counts": np.asarray(counts)}
        return deliver(self, start, result, f"UFM with counts {_shorten(counts)}, d = {m.d}", arrays)


def _shorten(counts: tuple[int, ...]) -> str:
    return f"{len(counts)} × {counts[0]}" if len(set(counts)) == 1 else str(list(counts))
