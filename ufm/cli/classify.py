"""A point in a file: what kind of point of the landscape it is."""

import time
from dataclasses import dataclass
from typing import Any

import jax

from ufm.cli.features import Certify
from ufm.cli.report import deliver


@dataclass(frozen=True)
class Classify(Certify):
    """Whether a point is a global optimum or a strict saddle, how it curves, and where downhill leads from it."""

    rigorous: bool = False
    """Let the verdict be proved in ball arithmetic (python-flint); the rest stays floating point."""
    seed: int = 0
    """Seed of the search for the steepest direction."""

    def run(self) -> int:
        """Run it; the exit status."""
        from ufm.lab.classification import classify
        from ufm.lab.compare import problem_of_features
        from ufm.measure.collapse import collapse_metrics
        from ufm.measure.features import load_features

        start, features = time.perf_counter(), load_features(self.file)
        collapse_metrics(features.H, features.labels, features.W, features.b)  # refuses what are not features
        problem, point = problem_of_features(features, lam_W=self.lam_W, lam_H=self.lam_H, lam_b=self.lam_b)
        found = classify(problem, point, rigorous=self.rigorous, key=jax.random.key(self.seed))
        result = {"verdict": found.verdict.name, "lam_H": problem.lam_H, **_as_result(found)}
        return deliver(self, start, result, f"{self.file}: {_in_words(found)}")


def _as_result(found: Any) -> dict[str, Any]:
    """What was found, under names that say what it is at such a point."""
    c, signs, steepest = found.certificate, found.signs, found.steepest
    result = {
        **{name: getattr(c, name) for name in ("value", "gap", "rounding", "dual_norm", "threshold", "grad_norm")},
        "excess": found.excess,
        "relative_gradient": signs.relative_gradient,
        "critical": found.critical,
        "morse_index" if found.critical else "negative_eigenvalues": signs.negative,
        "zero_eigenvalues": signs.zero,
        "positive_eigenvalues": signs.positive,
        "sign_margin": signs.margin,
        "smallest_eigenvalue": {
            "value": steepest.eigenvalue if steepest.converged else None,
            "rayleigh_quotient": steepest.eigenvalue,
            "lower_bound": steepest.lower_bound if steepest.converged else None,
            "residual": steepest.residual,
            "converged": steepest.converged,
        },
    }
    if c.predicted_curvature:
        result["escape"] = {n: getattr(c, n) for n in ("predicted_curvature", "measured_curvature", "drop")}
    if found.descent is not None:
        result["leads_to"] = {**vars(found.descent), "verdict": found.descent.verdict.name}
    return result | {"classes_merged": found.partition, "atlas": _atlas(found)}


def _atlas(found: Any) -> Any:
    if found.neighbours is None:
        return f"omitted: {found.omitted}"
    about = {name: getattr(found.neighbours, name) for name in ("alike", "below", "above")}
    entries = {name: None if saddle is None else saddle._asdict() for name, saddle in about.items()}
    return {"entries": found.neighbours.entries, **entries}


def _in_words(found: Any) -> str:
    c, signs, way = found.certificate, found.signs, found.steepest
    steep = f"curvature {way.eigenvalue:.4g}" if way.converged else f"curvature {way.eigenvalue:.4g} or less"
    words = {
        "GLOBAL": f"a global optimum; no point is lower by more than {float(c.gap + c.rounding):.1e} nats",
        "STRICT_SADDLE": f"a strict saddle; f falls in {signs.negative} directions, steepest with {steep}",
        "NOT_CRITICAL": f"not a critical point; the gradient is {signs.relative_gradient:.1e} of the terms that make it"
        f" up, and at least {signs.negative} eigenvalues of the Hessian are negative",
        "UNDECIDED": f"undecided; at least {signs.negative} eigenvalues of the Hessian are negative, and no point is"
        f" lower by more than {float(c.gap + c.rounding):.1e} nats",
    }[found.verdict.name]
    if found.descent is None:
        return words
    return f"{words}; downhill leads to f = {found.descent.value:.6g} ({found.descent.verdict.name})"
