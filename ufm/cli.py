"""The command `ufm`: check the theory, solve, certify, measure, train."""

import contextlib
import io
import itertools
import json
import sys
import time
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import tyro
from tqdm import tqdm

from ufm.lab.records import as_json, create_folder, provenance, read_json, write_json, write_run
from ufm.nets.config import TrainConfig

DEMONSTRATION = TrainConfig(limit=1000, batch=50, epochs=150, measure_every=10, regulariser="features", lam_W=5e-3)


@dataclass(frozen=True)
class Verify:
    """Check every claim of the registry, then a network trained on the spot, and draw the figures.

    One line a claim: source, cases tried, worst residual, tolerance, verdict. Exit status 1 if a claim fails.
    """

    full: bool = False
    """Wide grids: more shapes, more λ's, more random points."""
    network: bool = True
    """Train a small ResNet18 on scikit-learn's digits and measure it against the theory."""
    out: Path | None = None
    """Folder of the run; runs/verify-<time> if not given."""
    json: bool = False
    """Print one JSON document instead of tables."""

    def run(self) -> int:
        """Run it; the exit status."""
        from ufm.lab.claims import REGISTRY
        from ufm.lab.claims.claim import check
        from ufm.lab.plots import draw_claims, draw_training

        if self.network:
            import ufm.nets.train  # noqa: F401  (what is not installed is missed before anything is made)

        start = time.perf_counter()
        out = create_folder(self.out or Path("runs") / f"verify-{datetime.now():%Y%m%d-%H%M%S}")
        evidence = []
        for claim in tqdm(REGISTRY, desc="claims", disable=self.json or not sys.stderr.isatty(), leave=False):
            evidence.append(check(claim, full=self.full))
            if not self.json:
                tqdm.write(_claim_line(evidence[-1]), file=sys.stdout)
        holds = all(e.holds for e in evidence)
        result: dict[str, Any] = {"holds": holds, "claims": [asdict(e) | {"holds": e.holds} for e in evidence]}
        if self.network:
            result["network"] = _demonstrate(out / "network", quiet=self.json)
        write_json(out / "config.json", as_json(self))
        write_json(out / "summary.json", as_json(result) | provenance(start))
        draw_claims(out)
        if self.network:
            draw_training(out / "network")
        print(json.dumps(as_json(result)) if self.json else _conclusion(evidence, out))
        return 0 if holds else 1


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
        return _report(self, start, result, f"UFM with counts {_shorten(counts)}, d = {m.d}", arrays)


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
        return _report(self, start, result, str(self.file))


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
        return _report(self, start, asdict(metrics), str(self.file))


@dataclass(frozen=True)
class Train:
    """Train ResNet18 on real images into collapse, measured against the theory as it goes, and draw training.png."""

    out: tyro.conf.Positional[Path]
    """Folder of the run: new, or with --resume that of a run that was stopped."""
    config: Annotated[TrainConfig, tyro.conf.arg(name="")] = field(default_factory=TrainConfig)
    resume: bool = False
    """Continue from the last finished epoch; the numbers are those of a run that was never stopped."""
    json: bool = False
    """Print the last measurement as JSON instead of a table."""

    def run(self) -> int:
        """Run it; the exit status."""
        from ufm.lab.plots import draw_training
        from ufm.nets.train import train

        folder = train(self.config, self.out, resume=self.resume, quiet=self.json)
        draw_training(folder)
        last = read_json(folder / "history.json")[-1]
        if self.json:
            print(json.dumps(last))
        else:
            print(folder)
            _print_table(last)
        return 0


Command = (
    Annotated[Verify, tyro.conf.subcommand("verify")]
    | Annotated[Solve, tyro.conf.subcommand("solve")]
    | Annotated[Certify, tyro.conf.subcommand("certify")]
    | Annotated[Measure, tyro.conf.subcommand("measure")]
    | Annotated[Train, tyro.conf.subcommand("train")]
)


def main(arguments: list[str] | None = None) -> None:
    """Run one command in float64; bad input is one line on standard error and exit status 2."""
    command = _parse(arguments)
    jax.config.update("jax_enable_x64", True)
    try:
        sys.exit(command.run())
    except (ValueError, ArithmeticError, OSError, MemoryError) as error:
        sys.exit(_refuse(str(error)))
    except ModuleNotFoundError as error:
        sys.exit(_refuse(f"{str(error.name).partition('.')[0]} is not installed; pip install 'ufm[all]'"))
    except KeyboardInterrupt:
        sys.exit(_refuse("interrupted", status=130))


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


def _report(
    command: Any, start: float, result: dict[str, Any], title: str, arrays: dict[str, Any] | None = None
) -> int:
    """Print a result, and keep it where a folder was named."""
    if command.out is not None:
        write_run(command.out, command, result, arrays, start=start)
    if command.json:
        print(json.dumps(as_json(result)))
    else:
        print(title)
        _print_table(as_json(result))
    return 0


def _print_table(result: dict[str, Any], indent: str = "  ") -> None:
    for name, value in result.items():
        if isinstance(value, dict):
            print(f"{indent}{name}")
            _print_table(value, indent + "  ")
        else:
            print(f"{indent}{name:<28} {f'{value:.10g}' if isinstance(value, float) else value}")


def _claim_line(e: Any) -> str:
    verdict = "holds" if e.holds else "FAILS"
    line = f"{verdict}  {e.name:<30} {e.cases:>6} cases  worst {e.worst:.1e} of {e.tolerance:.0e}  ({e.source})"
    return line if e.holds else f"{line}\n       {e.statement}\n       worst case: {e.worst_case}"


def _shorten(counts: tuple[int, ...]) -> str:
    return f"{len(counts)} × {counts[0]}" if len(set(counts)) == 1 else str(list(counts))


def _conclusion(evidence: list[Any], out: Path) -> str:
    failed = sum(not e.holds for e in evidence)
    cases = sum(e.cases for e in evidence)
    said = f"{failed} of {len(evidence)} claims FAIL" if failed else f"All {len(evidence)} claims hold"
    return f"{said} ({cases} cases). Figures and numbers: {out}"


def _demonstrate(folder: Path, *, quiet: bool) -> dict[str, Any]:
    """Train on digits under the theory's own regulariser and put the network beside it."""
    from ufm.nets.train import train

    train(DEMONSTRATION, folder, quiet=quiet or not sys.stderr.isatty())
    last = read_json(folder / "history.json")[-1]
    if not quiet:
        print(_network_table(last))
    return last


def _network_table(last: dict[str, Any]) -> str:
    sides = {"observed": "observed", "predicted": "theory", "predicted_nonnegative": "theory, H ≥ 0"}
    shown = [side for side in sides if side in last]
    rows = [f"\nResNet18 trained on digits for {last['epoch']} epochs, beside the theory"]
    rows.append(_row("", *(sides[side] for side in shown)))
    rows += [_row(name, *(last[side][name] for side in shown)) for name in last["observed"]]
    for name in ("nc1_pinv", "nc2_etf_err", "nc2_etf_err_weights", "nc3_dual_err", "nc4_disagree"):
        rows.append(_row(name, last["collapse"][name], *(0.0 for _ in shown[1:])))
    rows += [_row(name, last[name]) for name in ("train_error", "test_error", "gap")]
    return "\n".join(rows) + "  ≥ f − f*\n"


def _row(name: str, *values: Any) -> str:
    return f"  {name:<22}" + "".join(f"{f'{v:.5g}' if isinstance(v, float) else v:>16}" for v in values)
