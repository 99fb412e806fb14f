"""Records of the landscape: an escape, spectra beside dense eigenvalues, a survey, a network among the saddles."""

import functools
import json

import jax
import numpy as np
import pytest

from ufm.lab.atlas import critical_points, lattice
from ufm.lab.landscape import escape_profile, network_place, spectrum_rows, survey
from ufm.lab.records import as_json
from ufm.measure.features import Features, save_features
from ufm.model.problem import balanced, class_mean_problem, imbalanced, logits, objective
from ufm.theory.atlas import coarse_etf, successive_groups
from ufm.theory.escape import escape_direction
from ufm.theory.optimum import balanced_minimiser, balanced_value
from ufm.theory.spectrum import hessian_spectrum

pytestmark = pytest.mark.usefixtures("hastily")

PROBLEM = balanced(4, 1, 4, lam_W=0.02, lam_H=0.02, lam_b=0.01)
KEY = jax.random.key(0)


@functools.cache
def surveyed(saddle=(), hunted=0):
    return survey(PROBLEM, saddle=saddle, hunted=hunted, key=KEY)


@functools.cache
def profile(m=2):
    return escape_profile(PROBLEM, coarse_etf(PROBLEM, m))


def moved(m, tau):
    """f at a distance τ along the escape from the saddle of m groups."""
    x = coarse_etf(PROBLEM, m)
    v = escape_direction(PROBLEM, x, PROBLEM.loss.residual(logits(PROBLEM, x), PROBLEM.Y))
    return float(objective(PROBLEM, jax.tree.map(lambda a, da: a + tau * da, x, v)))


@pytest.mark.parametrize("m", [1, 2])
def test_parabola_agrees_with_f_to_third_order(m):
    p = profile(m)
    tau, error = p["tau"], np.abs(p["along"] - p["parabola"])
    assert error[100] < 1e-15
    assert tau[100] == 0
    assert np.polynomial.polynomial.polyfit(tau, p["parabola"], 2) == pytest.approx(
        [float(objective(PROBLEM, coarse_etf(PROBLEM, m))), 0, (0.02 - 1 / 4) / 2], abs=1e-12
    )
    for near, far in ((95, 90), (105, 110)):
        assert error[far] > 1e-9  # more than rounding
        assert error[near] <= error[far] / 8


def test_line_is_f_and_falls_below_the_saddle_on_either_side():
    p = profile()
    for i in (0, 60, 140, 200):
        assert p["along"][i] == pytest.approx(moved(2, p["tau"][i]), rel=1e-14)
    assert p["along"].shape == p["tau"].shape == p["parabola"].shape
    assert min(p["along"][:100].min(), p["along"][101:].min()) < p["along"][100] - 0.01
    assert 0 < p["along"].argmin() < 200  # the least along the line is seen


def test_diagonal_of_the_plane_is_the_line():
    """With λ_W = λ_H the steepest direction moves classifier and features alike."""
    p = profile()
    side, plane = p["side"], p["plane"]
    assert plane.shape == (len(side), len(side))
    for i in (0, 20, 30, 45, 60):
        assert plane[i, i] == pytest.approx(moved(2, np.sqrt(2) * side[i]), rel=1e-13)
    assert plane == pytest.approx(plane[::-1, ::-1], rel=1e-12)  # turning a into −a
    assert plane[10, 50] > plane[30, 30]  # against one another they go up


def test_first_axis_of_the_plane_moves_the_classifier():
    """A penalty on W alone is seen along the first axis: u aᵀ leaves all logits as they are."""
    p = profile()
    start, a = p["plane"][30, 30], p["side"]
    assert p["plane"][:, 30] == pytest.approx(start + 0.02 / 2 * a**2, rel=1e-12)
    unequal = balanced(4, 1, 4, lam_W=0.04, lam_H=0.01)
    q = escape_profile(unequal, coarse_etf(unequal, 2))
    for axis, lam in ((q["plane"][:, 30], 0.04), (q["plane"][30, :], 0.01)):
        assert axis == pytest.approx(axis[30] + lam / 2 * q["side"] ** 2, rel=1e-12)


@pytest.mark.parametrize("m", [1, 2, 4])
def test_spectrum_rows_count_every_variable_and_meet_the_dense_ones(m):
    partition = successive_groups(4, m)
    rows = spectrum_rows(PROBLEM, partition, coarse_etf(PROBLEM, m))
    assert sum(row["theory"] for row in rows) == 4 * 4 + 4 * 4 + 4
    assert [row["dense"] for row in rows] == [row["theory"] for row in rows]
    values = [row["eigenvalue"] for row in rows]
    assert values == sorted(values)
    labels = "; ".join(row["what"] for row in rows).split("; ")
    assert sorted(labels) == sorted(hessian_spectrum(PROBLEM, partition).labels)


def test_spectrum_rows_show_a_point_that_has_another_spectrum():
    rows = spectrum_rows(PROBLEM, "origin", coarse_etf(PROBLEM, 2))
    assert [row["dense"] for row in rows] != [row["theory"] for row in rows]


def test_spectra_too_large_or_of_weighted_columns_have_no_dense_count():
    means = class_mean_problem([3] * 4, 4, lam_W=0.02, lam_H=0.02)
    rows = spectrum_rows(means, "optimum", balanced_minimiser(means))
    assert {row["dense"] for row in rows} == {None}
    assert sum(row["theory"] for row in rows) == 4 * 4 + 12 * 4 + 4
    large = balanced(4, 200, 4, lam_W=0.02, lam_H=0.02)
    assert spectrum_rows(large, "optimum", balanced_minimiser(large))[0]["dense"] is None


def test_survey_holds_the_atlas_with_its_arrows():
    result, _ = surveyed()
    points = critical_points(PROBLEM)
    assert [row["groups"] for row in result["atlas"]] == ["1+1+1+1", "2+1+1", "2+2", "3+1", "4"]
    for row, point in zip(result["atlas"], points, strict=True):
        assert {name: row[name] for name in row if name != "groups"} == {
            name: getattr(point, name) for name in row if name != "groups"
        }
    assert result["arrows"] == [list(pair) for pair in lattice(points, np.ones(4))]
    assert "hunt" not in result
    json.dumps(as_json(result), allow_nan=False)


def test_survey_looks_down_from_the_lowest_saddle_of_equal_groups_by_default():
    result, arrays = surveyed()
    assert result["saddle"]["groups"] == "2+2"
    assert result["saddle"]["curvature"] == pytest.approx(0.02 - 1 / 4, rel=1e-12)
    assert list(result["spectra"]) == ["optimum", "saddle 2+2", "origin"]
    for rows in result["spectra"].values():
        assert [row["dense"] for row in rows] == [row["theory"] for row in rows]
    assert arrays["along"] == pytest.approx(profile()["along"], rel=1e-12)


def test_survey_of_a_saddle_without_closed_form_has_the_other_spectra():
    result, arrays = surveyed((1, 2, 1))
    assert result["saddle"]["groups"] == "2+1+1"
    assert list(result["spectra"]) == ["optimum", "origin"]
    assert arrays["along"][100] == pytest.approx(result["saddle"]["value"], rel=1e-13)


@pytest.mark.parametrize("saddle", [(1, 1, 1, 1), (3, 2), (5,), (2,)])
def test_what_is_no_saddle_is_refused_with_those_there_are(saddle):
    with pytest.raises(ValueError, match=r"\(2\+1\+1, 2\+2, 3\+1, 4\), got \["):
        surveyed(saddle)


def test_above_the_threshold_there_is_no_saddle():
    with pytest.raises(ValueError, match=r"lam_W and lam_H must be smaller"):
        survey(balanced(2, 1, 2, lam_W=1.0, lam_H=1.0), key=KEY)


def test_survey_of_unequal_counts_has_no_closed_form_of_the_optimum():
    result, _ = survey(imbalanced([2, 2, 1], 3, lam_W=0.02, lam_H=0.02), key=KEY)
    assert "optimum" not in result["spectra"]
    assert result["saddle"]["groups"] == "2+1"


def test_survey_counts_what_its_hunt_found():
    hunted = surveyed((), 3)[0]["hunt"]
    assert hunted["starts"] == 3
    assert hunted["converged"] == sum(row["hits"] for row in hunted["orbits"])
    assert hunted["distinct"] == len(hunted["orbits"])
    assert hunted["new"] == sum(not row["known"] for row in hunted["orbits"])
    assert hunted["spurious"] == 0
    assert len(hunted["missed"]) == 5 - (hunted["distinct"] - hunted["new"])


def _network(folder, regulariser="features", lam_b=None):
    """A train run that ended at the optimum."""
    problem = balanced(2, 6, 5, lam_W=0.02, lam_H=0.01, lam_b=0.02)
    x = balanced_minimiser(problem)
    (folder / "config.json").write_text(json.dumps({"lam_W": 0.02, "lam_b": lam_b, "regulariser": regulariser}))
    history = [{"epoch": k, "lam_H": 0.01, "observed": {"value": 1 / k}} for k in (1, 5, 9)]
    (folder / "history.json").write_text(json.dumps(history))
    save_features(folder / "features.npz", Features(np.asarray(x.H), np.arange(12) // 6, np.asarray(x.W), np.zeros(2)))
    return problem


def test_a_network_at_the_optimum_is_placed_there(tmp_path):
    problem = _network(tmp_path)
    place = network_place(tmp_path)
    assert place["run"] == tmp_path.name
    assert place["value"] == pytest.approx(float(balanced_value(problem)), rel=1e-13)
    assert place["value"] == pytest.approx(place["atlas"][0]["value"], rel=1e-13)
    assert (place["negative"], place["zero"]) == (0, place["atlas"][0]["nullity"])
    assert place["relative_gradient"] < 1e-13
    assert (place["epochs"], place["values"]) == ([1, 5, 9], [1, 1 / 5, 1 / 9])
    assert [row["groups"] for row in place["atlas"]] == ["1+1", "2"]


def test_an_implied_lam_H_leaves_the_last_epoch_alone(tmp_path):
    _network(tmp_path, regulariser="decay")
    assert network_place(tmp_path)["epochs"] == [9]


def test_a_penalty_on_the_bias_is_that_of_the_run(tmp_path):
    _network(tmp_path, lam_b=0.0)
    assert network_place(tmp_path)["zero"] == 4 + 1  # one dimension turns in five, and the bias is free


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"config\.json"):
        network_place(tmp_path)
