"""Every claim of the registry checked, then a network trained on the spot and put beside the theory."""

import json
import sys
import time
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ufm.lab.records import as_json, create_folder, provenance, read_json, write_json
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


def _claim_line(e: Any) -> str:
    verdict = "holds" if e.holds else "FAILS"
    line = f"{verdict}  {e.name:<30} {e.cases:>6} cases  worst {e.worst:.1e} of {e.tolerance:.0e}  ({e.source})"
    return line if e.holds else f"{line}\n       {e.statement}\n       worst case: {e.worst_case}"


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
