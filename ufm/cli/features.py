"""Features in a file: how far from the optimum, and how collapsed."""

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import tyro

from ufm.cli.report import deliver


@dataclass(frozen=True)
class Certify:
    """How far features and a classifier are from the global optimum of the model with the λ's you state."""

    file: tyro.conf.Positional[Path]
    """Features: an .npz or .safetensors file with H (d×N) or features (N×d), labels, W (K×d) and perhaps b."""
    lam_W: float
    """λ_W of (UFM)."""
    lam_H: float | None = None
    """λ_H of (UFM), per sample; if not given, the one that the balance λ_W‖W‖² = λ_H‖H‖² implies."""
    lam_b: float = 0.0
    """λ_b; 0 leaves the bias free."""
    out: Path | None = None
    """New folder for config.json and summary.json."""
    json: bool = False
    """Print one JSON document instead of a table."""

    def run(self) -> int:
        """Run it; the exit status."""
        from ufm.lab.compare import compare, problem_of_features
        from ufm.measure.collapse import collapse_metrics
        from ufm.measure.features import load_features

        start, features = time.perf_counter(), load_features(self.file)
        collapse_metrics(features.H, features.labels, features.W, features.b)  # refuses what are not features
        problem, point = problem_of_features(features, lam_W=self.lam_W, lam_H=self.lam_H, lam_b=self.lam_b)
        sides, c = compare(problem, point)
        names = ("gap", "rounding", "dual_norm", "threshold", "grad_norm")
        result = {"verdict": c.verdict.name, "lam_H": problem.lam_H, **{n: getattr(c, n) for n in names}, **sides}
        if c.predicted_curvature:
            result |= {n: getattr(c, n) for n in ("predicted_curvature", "measured_curvature", "drop")}
        return deliver(self, start, result, str(self.file))


@dataclass(frozen=True)
class Measure:
    """NC0 to NC4 of features in a file, every published variant under its own name."""

    file: tyro.conf.Positional[Path]
    """Features: an .npz or .safetensors file with H (d×N) or features (N×d), labels, W (K×d) and perhaps b."""
    centre: Literal["class_means", "samples"] = "class_means"
    """What the global mean is under unequal counts: the mean of class means, or of all samples."""
    out: Path | None = None
    """New folder for config.json and summary.json."""
    json: bool = False
    """Print one JSON document instead of a table."""

    def run(self) -> int:
        """Run it; the exit status."""
        from ufm.measure.collapse import collapse_metrics
        from ufm.measure.features import load_features

        start, f = time.perf_counter(), load_features(self.file)
        metrics = collapse_metrics(f.H, f.labels, f.W, f.b, centre=self.centre)
        return deliver(self, start, asdict(metrics), str(self.file))
