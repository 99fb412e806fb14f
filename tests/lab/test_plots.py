"""Figures come from records alone, whatever numbers stand there, and say what they show."""

import json
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from ufm.lab import plots
from ufm.lab.plots import (
    draw_atlas,
    draw_censuses,
    draw_claims,
    draw_escape,
    draw_landscape,
    draw_network,
    draw_spectra,
    draw_training,
)

COLLAPSE = ("nc1_pinv", "nc2_etf_err", "nc2_etf_err_weights", "nc3_dual_err", "nc4_disagree")
SIDE = ("value", "margin_mean", "margin_min", "w_norm2_mean", "h_norm2_mean", "balance", "bias_spread")
CONFIG = {"regulariser": "features", "limit": None, "data": "digits", "width": 8, "lam_W": 5e-3}


def _row(epoch, number=0.5, sides=("observed", "predicted", "predicted_nonnegative"), **changed):
    row = {"epoch": epoch, "train_error": number, "test_error": number, "lam_H": 1e-5, "gap": number}
    row |= {side: dict.fromkeys(SIDE, number) for side in sides}
    return row | {"collapse": dict.fromkeys(COLLAPSE, number)} | changed


def _training(folder, history, **config):
    (folder / "config.json").write_text(json.dumps(CONFIG | config))
    (folder / "history.json").write_text(json.dumps(history))
    return folder


def _claim(name="Some claim", worst=1e-13, tolerance=1e-12, holds=True):
    return {"name": name, "cases": 3, "worst": worst, "tolerance": tolerance, "holds": holds}


def _claims(folder, *claims):
    (folder / "summary.json").write_text(json.dumps({"claims": claims}))
    return folder


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were drawn, to look into."""
    figures, save = [], plots._save

    def keep(figure, path):
        figures.append(figure)
        return save(figure, path)

    monkeypatch.setattr(plots, "_save", keep)
    return figures


def _is_png(path):
    return path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000


def _panel(figure: Figure, title):
    return next(axes for axes in figure.axes if title in axes.get_ylabel())


def _lines(axes):
    return {line.get_label(): np.asarray(line.get_ydata(), float) for line in axes.get_lines()}


def test_claims_are_drawn_each_at_its_worst_residual_and_tolerance(tmp_path, drawn):
    path = draw_claims(_claims(tmp_path, _claim("A", 1e-13), _claim("B", 1e-3, 1e-6, holds=False)))
    assert path == tmp_path / "claims.png"
    assert _is_png(path)
    (axes,) = drawn[0].axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["A (3)", "B (3)"]
    points = {c.get_label(): c.get_offsets().tolist() for c in axes.collections if c.get_label()[0] != "_"}
    assert points == {"worst residual": [[1e-13, 1]], "claim fails": [[1e-3, 0]]}
    assert _lines(axes)["tolerance"].tolist() == [1, 0]


@pytest.mark.parametrize("holds", [True, False])
@pytest.mark.parametrize("worst", [0.0, "inf", "-inf", 5e-324, 1e300])
@pytest.mark.parametrize("tolerance", [0.0, 1e-12])
def test_claims_of_any_residual_are_drawn_without_warning(tmp_path, worst, tolerance, holds):
    assert _is_png(draw_claims(_claims(tmp_path, _claim("A", worst, tolerance, holds), _claim("B"))))


def test_training_is_drawn_from_its_record(tmp_path, drawn):
    history = [_row(1, 0.5), _row(5, 0.25), _row(10, 0.125, observed=dict.fromkeys(SIDE, 0.1))]
    path = draw_training(_training(tmp_path, history))
    assert path == tmp_path / "training.png"
    assert _is_png(path)
    (figure,) = drawn
    assert len(figure.axes) == 6
    assert "digits" in figure.get_suptitle()
    assert "λ_H = 1e-05" in figure.get_suptitle()
    margin = _panel(figure, "margin").get_lines()
    assert [line.get_xdata().tolist() for line in margin] == [[1, 5, 10]] * 3
    assert [line.get_ydata().tolist() for line in margin] == [[0.5, 0.25, 0.1], *[[0.5, 0.25, 0.125]] * 2]
    assert [line.get_label() for line in margin] == ["mean logit margin t", "theory, H free", "theory, H ≥ 0"]
    assert _lines(_panel(figure, "per cent"))["test error"].tolist() == [50, 25, 12.5]
    assert _lines(_panel(figure, "nats"))["certified gap ≥ f − f*"].tolist() == [0.5, 0.25, 0.125]
    assert len(_lines(_panel(figure, "collapse"))) == 5


def test_features_that_were_once_negative_are_drawn_beside_the_free_theory_alone(tmp_path, drawn):
    draw_training(_training(tmp_path, [_row(1), _row(2, sides=("observed", "predicted"))]))
    assert _lines(_panel(drawn[0], "margin")).keys() == {"mean logit margin t", "theory, H free"}
    draw_training(_training(tmp_path, [_row(1, sides=("observed", "predicted")), _row(2)]))
    assert np.isnan(_lines(_panel(drawn[1], "margin"))["theory, H ≥ 0"]).tolist() == [True, False]


@pytest.mark.parametrize("number", [0.0, "nan", "inf", 1e-30, 1e30, -1.0])
@pytest.mark.parametrize("everywhere", [True, False])
def test_training_with_any_numbers_is_drawn_without_warning(tmp_path, number, everywhere):
    error = {"train_error": 0.0, "test_error": 1.0}  # fractions, always
    history = [_row(1, number if everywhere else 0.5, **error), _row(2, number, **error)]
    assert _is_png(draw_training(_training(tmp_path, history, regulariser="decay", limit=100)))


def test_one_measurement_is_drawn(tmp_path):
    assert _is_png(draw_training(_training(tmp_path, [_row(1, train_error=0.0, test_error=0.0)])))


def test_what_is_not_finite_leaves_a_gap(tmp_path, drawn):
    observed = dict.fromkeys(SIDE, "inf")
    draw_training(_training(tmp_path, [_row(1), _row(2, observed=observed), _row(3)]))
    assert np.isnan(_lines(_panel(drawn[0], "margin"))["mean logit margin t"]).tolist() == [False, True, False]


def test_rounding_of_an_implied_balance_is_not_magnified(tmp_path, drawn):
    draw_training(_training(tmp_path, [_row(1, 1 - 1e-16), _row(2, 1.0)], regulariser="decay"))
    low, high = _panel(drawn[0], "λ_W").get_ylim()
    assert low <= 0.1
    assert high >= 10


LANDSCAPE = [draw_escape, draw_spectra, draw_atlas, draw_censuses, draw_network, draw_landscape]


@pytest.mark.parametrize("draw", [draw_claims, draw_training, *LANDSCAPE])
def test_a_folder_that_is_no_run_is_one_line(tmp_path: Path, draw):
    with pytest.raises(ValueError, match=r"is .* the folder of a run\?"):
        draw(tmp_path)
    assert list(tmp_path.iterdir()) == []


def _saddle(groups, value, index):
    return {"groups": groups, "value": value, "index": index}


def _orbit(groups, value, index, known=False):
    return _saddle(groups, value, index) | {"known": known}


ATLAS = [_saddle("1+1+1", 0.2, 0), _saddle("2+1", 0.6, 3), _saddle("3", 1.1, 6)]


def _landscape(folder, **summary):
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def _escape(folder, **changed):
    """f = 1 − τ² + τ⁴/2 along the line, the sum of it over the plane's two sides."""
    tau, side = np.linspace(-1, 1, 21), np.linspace(-1, 1, 11)

    def f(x):
        return 1 - x**2 + x**4 / 2

    plane = f(side)[:, None] + side**2
    arrays = {"tau": tau, "along": f(tau), "parabola": 1 - tau**2, "side": side, "plane": plane}
    np.savez(folder / "arrays.npz", **arrays | changed)
    return _landscape(folder, saddle={"groups": "2+1", "value": 1.0, "curvature": -2.0})


def test_escape_is_drawn_with_its_parabola_and_its_plane(tmp_path, drawn):
    assert _is_png(draw_escape(_escape(tmp_path)))
    line, plane = drawn[0].axes[:2]
    lines = line.get_lines()
    assert [len(each.get_xdata()) for each in lines] == [21, 21]
    assert lines[0].get_ydata()[10] == lines[1].get_ydata()[10] == 1
    assert "-2 predicted" in lines[1].get_label()
    low, high = line.get_ylim()
    assert low < 0.5 < 1 < high
    assert "classifier" in plane.get_ylabel()  # first axis of the array, up the page
    assert "features" in plane.get_xlabel()
    assert plane.get_xlim() == plane.get_ylim() == (-1, 1)
    assert "2+1" in drawn[0].get_suptitle()


def test_spectra_are_drawn_theory_over_dense(tmp_path, drawn):
    rows = [{"eigenvalue": -1, "theory": 6, "dense": 6}, {"eigenvalue": 0, "theory": 3, "dense": 2}]
    bare = [{"eigenvalue": 2.0, "theory": 5, "dense": None}]
    assert _is_png(draw_spectra(_landscape(tmp_path, spectra={"origin": rows, "optimum": bare})))
    origin, optimum = drawn[0].axes
    assert [bar.get_height() for bar in origin.patches] == [6, 2]
    assert _lines(origin)["theory"].tolist() == [6, 3]
    assert [label.get_text() for label in origin.get_xticklabels()] == ["-1", "0"]
    assert (origin.get_title(), optimum.get_title()) == ("origin", "optimum")
    assert not optimum.patches
    assert _lines(optimum)["theory"].tolist() == [5]


def test_atlas_is_drawn_with_arrows_and_what_is_new(tmp_path, drawn):
    orbits = [_orbit("1+1+1", 0.2, 0, known=True), _orbit("1+1+1", 0.5, 2)]
    folder = _landscape(tmp_path, atlas=ATLAS, arrows=[[1, 0], [2, 1]], hunt={"orbits": orbits})
    assert _is_png(draw_atlas(folder))
    (axes,) = drawn[0].axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in axes.get_lines()}
    assert lines == {"partition saddles": [[0, 0.2], [3, 0.6], [6, 1.1]], "found by the hunt": [[2, 0.5]]}
    arrows = [text for text in axes.texts if text.arrow_patch is not None]
    assert [(arrow.xyann, arrow.xy) for arrow in arrows] == [((3, 0.6), (0, 0.2)), ((6, 1.1), (3, 0.6))]
    assert {text.get_text() for text in axes.texts} >= {"1+1+1", "2+1", "3"}


def test_atlas_without_a_hunt_has_its_saddles_alone(tmp_path, drawn):
    draw_atlas(_landscape(tmp_path, atlas=ATLAS, arrows=[]))
    assert _lines(drawn[0].axes[0]).keys() == {"partition saddles"}


def test_a_network_is_drawn_through_the_energies(tmp_path, drawn):
    network = {"run": "digits", "epochs": [1, 10, 100], "values": [1.2, 0.7, 0.21], "atlas": ATLAS}
    assert _is_png(draw_network(_landscape(tmp_path, network=network)))
    (axes,) = drawn[0].axes
    *levels, path = axes.get_lines()
    assert [line.get_ydata()[0] for line in levels] == [0.2, 0.6, 1.1]
    assert path.get_xydata().tolist() == [[1, 1.2], [10, 0.7], [100, 0.21]]
    assert {text.get_text(): text.xy[1] for text in axes.texts} == {
        "optimum": 0.2,
        "lowest partition saddle": 0.6,
        "highest": 1.1,
    }
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")


def test_censuses_are_drawn_a_panel_for_each(tmp_path, drawn):
    census = {"atlas": ATLAS, "arrows": [[1, 0]], "orbits": [_orbit("1+1+1", 0.5, 2)], "known": 3, "new": 1}
    kinds = [(4, 0.1), (4, 0.3), (3, 0.1), (3, 0.3)]
    censuses = [census | {"d": d, "kappa": kappa} for d, kappa in kinds]
    assert _is_png(draw_censuses(_landscape(tmp_path, censuses=censuses)))
    titles = [axes.get_title() for axes in drawn[0].axes]
    assert titles == [f"d = {d}, κ = {kappa:g}: 3 known, 1 new" for d, kappa in kinds]
    assert _lines(drawn[0].axes[3])["found by the hunt"].tolist() == [0.5]


def test_a_landscape_has_the_figures_it_has_records_for(tmp_path):
    folder = _escape(tmp_path)
    summary = json.loads((folder / "summary.json").read_text()) | {"atlas": ATLAS, "arrows": [], "spectra": {}}
    _landscape(folder, **summary)
    assert [path.name for path in draw_landscape(folder)] == ["escape.png", "atlas.png"]
