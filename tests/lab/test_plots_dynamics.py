"""Figures of descents and escapes: what is drawn is what the records hold, and nothing that they do not."""

import json

import numpy as np
import pytest
from matplotlib.figure import Figure

from ufm.lab import plots_dynamics
from ufm.lab.plots_dynamics import draw_course, draw_escape_times

PNG = b"\x89PNG\r\n"
STEP = np.arange(0, 1010, 10)
DECAY = 0.98
REST = {"first": 0, "middle": 0, "last": 50, "nearest": "01 2", "distance": 0.1, "value": 1.0, "saddle": None}


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are saved."""
    figures = []
    save = plots_dynamics._save
    monkeypatch.setattr(plots_dynamics, "_save", lambda figure, path: figures.append(figure) or save(figure, path))
    return figures


def _written(folder, summary, arrays):
    (folder / "summary.json").write_text(json.dumps(summary))
    np.savez(folder / "arrays.npz", **arrays)
    return folder


def _course(folder, **changed):
    """‖∇f‖ falls by DECAY a step and f − f* by its square, to f* = 1."""
    terminal = {"predicted_factor": DECAY, "step_limit": 3.0, "measured_factor": DECAY, "first": 500, "last": 1000}
    summary = {
        "optimiser": "sgd", "lr": 1.0, "schedule": "constant", "batch": None, "fate": "DESCENDED", "steps": 1000,
        "optimal_value": 1.0, "terminal": terminal, "plateaus": [REST],
    }  # fmt: skip
    fall = DECAY**STEP
    arrays = {"step": STEP, "value": 1 + fall**2, "rounding": 0 * fall + 1e-15, "gap": fall, "grad_norm": fall}
    arrays |= {f"nc{i}": fall for i in range(4)}
    return _written(folder, summary | changed, arrays)


def test_the_course_is_drawn_with_its_plateau_and_the_decay_foretold(tmp_path, drawn):
    assert draw_course(_course(tmp_path)).read_bytes().startswith(PNG)
    values, collapse = drawn[0].axes
    assert [line.get_label() for line in collapse.lines] == ["NC0", "NC1", "NC2", "NC3"]
    excess, *_, slope_decay, excess_decay = values.lines
    shown = np.isfinite(excess.get_ydata())
    assert not shown[0]  # the start, at step 0
    assert shown.sum() > 80
    np.testing.assert_array_equal(excess.get_ydata()[shown], (1 + (DECAY**STEP) ** 2 - 1)[shown])
    for line, power in ((slope_decay, 1), (excess_decay, 2)):
        np.testing.assert_allclose(line.get_ydata(), DECAY ** (power * line.get_xdata()), rtol=1e-6)
    assert len(values.patches) == len(collapse.patches) == 1
    assert values.texts[0].get_text() == "A"
    assert drawn[0]._supxlabel.get_text() == "A: rests 0.1 from 01 2, at f = 1"


@pytest.mark.parametrize(
    "changed",
    [
        {"terminal": "not known for adam", "lr": None, "batch": 2},
        {"terminal": {"predicted_factor": 0.5, "step_limit": 3.0, "measured_factor": None}, "plateaus": []},
        {"plateaus": [REST | {"nearest": None, "distance": None, "first": 990, "last": 1000}]},
    ],
    ids=["no theory", "not reached", "no names"],
)
def test_the_course_leaves_out_what_is_not_known(tmp_path, drawn, changed):
    assert draw_course(_course(tmp_path, **changed)).exists()
    dashed = [line for line in drawn[0].axes[0].lines if line.get_linestyle() == "--"]
    assert len(dashed) == (0 if "terminal" in changed else 2)


def _escapes(folder, *, seeds, steps):
    """Escapes from distances 1e-4 and 1e-2 that take 20 and 10 steps; random starts 2 more."""
    rows = [{"steps": {"predicted": predicted}} for predicted in (20.0, 10.0)]
    random = [{"predicted_mean": 22.0, "predicted_sd": 1.0}, {"predicted_mean": 12.0, "predicted_sd": 1.0}]
    summary = {
        "saddle": {"groups": "2+1", "rank": 1, "smallest_eigenvalue": -0.1}, "radius": 0.1, "seeds": seeds,
        "method": {"eta": 1.0, "momentum": 0.5, "nesterov": True, "step_limit": 3.0},
        "escapes": [row | {"random": r} for row, r in zip(rows, random, strict=True)] if seeds else rows,
    }  # fmt: skip
    arrays = {"distance": np.array([1e-4, 1e-2]), "steps": np.array(steps), "random": np.full((2, seeds), 13.0)}
    return _written(folder, summary, arrays)


def test_escape_times_stand_on_the_prediction(tmp_path, drawn):
    assert draw_escape_times(_escapes(tmp_path, seeds=3, steps=[20.5, 10.5])).read_bytes().startswith(PNG)
    beside, against = drawn[0].axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in beside.lines}
    assert lines["steepest direction"] == [[20, 20.5], [10, 10.5]]
    assert lines["random directions"] == [[22, 13]] * 3 + [[12, 13]] * 3
    assert lines["measured = predicted"] == [[10, 10], [22, 22]]
    lines = {line.get_label(): line.get_xydata().tolist() for line in against.lines}
    assert lines["predicted"] == [[1e-4, 20], [1e-2, 10]]
    assert lines["predicted mean ± sd"] == [[1e-4, 22], [1e-2, 12]]


def test_what_did_not_leave_is_not_drawn(tmp_path, drawn):
    assert draw_escape_times(_escapes(tmp_path, seeds=0, steps=[np.nan, np.nan])).exists()
    assert isinstance(drawn[0], Figure)
    assert not np.isfinite(drawn[0].axes[0].lines[0].get_ydata()).any()
