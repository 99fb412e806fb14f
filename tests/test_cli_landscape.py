"""The command `ufm landscape`: its records are the theory's, its tables and figures are named."""

import json
from pathlib import Path

import numpy as np
import pytest

from ufm.measure.features import Features, save_features
from ufm.model.problem import balanced
from ufm.theory.optimum import balanced_minimiser, balanced_value

pytestmark = pytest.mark.usefixtures("hastily")

SMALL_MODEL = "--K 3 --n 1 --d 3 --lam-W 0.02 --lam-H 0.02 --lam-b 0.01"
LANDSCAPE = ["landscape", *SMALL_MODEL.split()]


def _strict(text):
    return json.loads(text, parse_constant=pytest.fail)


def test_landscape_shows_every_saddle_its_spectrum_and_the_way_down(ufm, tmp_path):
    """The origin, λ_min = λ − 1/K; in d = 3 dimensions (K − m)d directions go down."""
    run = tmp_path / "run"
    code, out, err = ufm(*LANDSCAPE, "--saddle", 3, "--hunt", 2, "--out", run, "--json")
    assert (code, err) == (0, "")
    result = _strict(out)
    rows = {row["groups"]: row for row in result["atlas"]}
    assert {groups: row["index"] for groups, row in rows.items()} == {"1+1+1": 0, "2+1": 3, "3": 6}
    assert {groups: row["points"] for groups, row in rows.items()} == {"1+1+1": 1, "2+1": 3, "3": 1}
    problem = balanced(3, 1, 3, lam_W=0.02, lam_H=0.02)
    assert rows["1+1+1"]["value"] == pytest.approx(float(balanced_value(problem)), rel=1e-13)
    assert result["saddle"] == {"groups": "3", "value": rows["3"]["value"], "curvature": pytest.approx(0.02 - 1 / 3)}
    for spectrum in result["spectra"].values():
        assert [row["dense"] for row in spectrum] == [row["theory"] for row in spectrum]
    assert result["hunt"]["starts"] == 2
    assert {p.name for p in run.iterdir()} == {
        "arrays.npz", "atlas.png", "config.json", "escape.png", "spectrum.png", "summary.json",
    }  # fmt: skip
    assert _strict((run / "summary.json").read_text("utf-8"))["saddle"] == result["saddle"]
    assert _strict((run / "config.json").read_text("utf-8"))["saddle"] == [3]
    with np.load(run / "arrays.npz", allow_pickle=False) as arrays:
        assert arrays["along"].max() == pytest.approx(np.log(3))  # down on both sides


def test_landscape_prints_its_tables_and_names_its_figures(ufm):
    code, out, _ = ufm("landscape", "--K", 2, "--n", 1, "--d", 2, "--lam-W", 0.02, "--lam-H", 0.02, "--hunt", 0)
    assert code == 0
    (run,) = Path("runs").iterdir()
    assert run.name.startswith("landscape-")
    for words in ("Partition saddles", "Spectrum at the optimum", "Spectrum at the origin", "smallest_eigenvalue"):
        assert words in out
    assert all(str(run / f"{name}.png") in out for name in ("escape", "spectrum", "atlas"))
    assert f"{0.02 - 1 / 2:.8g}" in out
    assert "Hunt" not in out


def test_landscape_places_a_network(ufm, tmp_path):
    problem = balanced(2, 3, 3, lam_W=5e-3, lam_H=2e-3)
    x = balanced_minimiser(problem)
    features = Features(np.asarray(x.H), np.repeat(np.arange(2), 3), np.asarray(x.W), np.asarray(x.b))
    save_features(tmp_path / "features.npz", features)
    (tmp_path / "config.json").write_text('{"lam_W": 0.005, "lam_b": 0.0, "regulariser": "features"}')
    value = float(balanced_value(problem))
    history = [{"epoch": 3, "lam_H": 0.002, "observed": {"value": value}}]
    (tmp_path / "history.json").write_text(json.dumps(history))
    code, out, _ = ufm(*LANDSCAPE[:1], "--K", 2, "--n", 1, "--d", 2, "--hunt", 0, "--network", tmp_path, "--out", "new")
    assert code == 0
    assert Path("new/network.png").exists()
    assert f"f = {value:.6g}" in out
    assert "0 negative and 3 zero eigenvalues" in out  # one dimension turns in three, and the bias is free
