"""The commands `ufm escape` and `ufm descend`: their numbers are the package's, and what is interrupted goes on."""

import json
import re
from pathlib import Path
from typing import get_args

import jax
import numpy as np
import pytest

from ufm.cli import descend
from ufm.lab import chunks, courses, optimisers
from ufm.lab.escapes import departure, steepest_start
from ufm.lab.optimum import optimal_value
from ufm.model.problem import Params, balanced, init
from ufm.theory.rates import Method, projection_loss, step_limit, terminal_rate
from ufm.theory.spectrum import hessian_spectrum

pytestmark = pytest.mark.usefixtures("hastily")

LAMBDA, LEAST = 0.02, 0.02 - 1 / 3  # λ_W = λ_H, and λ_min at the origin for K = 3, n = 1: λ − 1/(K√n)
MODEL = ["--K", "3", "--n", "1", "--d", "3", "--lam-W", "0.02", "--lam-H", "0.02"]
ESCAPE = ["escape", *MODEL, "--distances", "1e-7", "--eta", "0.5"]
DESCEND = ["descend", *MODEL, "--steps", "600", "--lr", "2"]


@pytest.fixture
def problem():
    return balanced(3, 1, 3, lam_W=LAMBDA, lam_H=LAMBDA)


def _strict(text):
    return json.loads(text, parse_constant=pytest.fail)


def _tree(folder="."):
    """Every path below a folder, with the bytes of files."""
    return {p: p.read_bytes() if p.is_file() else None for p in sorted(Path(folder).rglob("*"))}


def _arrays(run):
    with np.load(Path(run) / "arrays.npz", allow_pickle=False) as file:
        return dict(file)


def test_escape_gives_the_steps_that_the_eigenvalue_foretells(ufm, problem):
    """log(r/ε)/log(1 + η|λ_min|) steps along the steepest direction, log(r/ε)/|λ_min| units of time."""
    code, out, err = ufm(*ESCAPE, "--seeds", 0, "--out", "new", "--json")
    assert (code, err) == (0, "")
    result = _strict(out)
    (row,) = result["escapes"]
    assert result["saddle"]["smallest_eigenvalue"] == pytest.approx(LEAST)
    assert result["saddle"]["largest_eigenvalue"] == pytest.approx(LAMBDA + 1 / 3)  # the other half of the same block
    assert result["saddle"]["index"] == result["saddle"]["multiplicity"] == 6
    assert result["method"]["step_limit"] == pytest.approx(2 / (LAMBDA + 1 / 3))
    assert result["method"]["above_limit"] is False
    steps, time = np.log(1e4) / np.log1p(-0.5 * LEAST), np.log(1e4) / -LEAST
    assert row["steps"]["predicted"] == pytest.approx(steps)
    assert row["rate"]["predicted"] == pytest.approx(np.log1p(-0.5 * LEAST))
    assert row["flow_time"]["predicted"] == pytest.approx(time)
    for name in ("steps", "rate", "flow_time", "flow_rate"):
        assert row[name]["measured"] == pytest.approx(row[name]["predicted"], rel=1e-4)
        assert row[name]["deviation"] == pytest.approx(row[name]["measured"] / row[name]["predicted"] - 1)
    origin = Params(np.zeros((3, 3)), np.zeros((3, 3)), np.zeros(3))
    alone = departure(problem, origin, steepest_start(problem, origin, 1e-7), 1e-3, Method(0.5), row["steps_allowed"])
    assert row["steps"]["measured"] == pytest.approx(float(alone.time), rel=1e-9)
    assert (row["outcome"], row["flow_outcome"]) == ("LEFT", "LEFT")
    assert sorted(p.name for p in Path("new").iterdir()) == [
        "arrays.npz", "config.json", "escape.png", "summary.json",
    ]  # fmt: skip
    assert _strict(Path("new/summary.json").read_text("utf-8"))["escapes"] == result["escapes"]
    assert _arrays("new")["steps"].tolist() == [row["steps"]["measured"]]


def test_escape_from_random_directions_is_later_by_what_they_lose(ufm):
    """Six of the 21 dimensions (K + N)d + K go down at the origin."""
    code, out, _ = ufm(*ESCAPE, "--seeds", 60, "--momentum", 0.5, "--json")
    assert code == 0
    result = _strict(out)
    random = result["escapes"][0]["random"]
    loss, spread = map(float, projection_loss(6, 21))
    rate = result["escapes"][0]["rate"]["predicted"]
    assert random["predicted_mean"] == pytest.approx(result["escapes"][0]["steps"]["predicted"] + loss / rate)
    assert random["predicted_sd"] == pytest.approx(spread / rate)
    assert abs(random["mean"] - random["predicted_mean"]) < 4 * random["predicted_sd"] / np.sqrt(60)
    assert random["outcomes"] == {"LEFT": 60}
    (run,) = Path("runs").iterdir()
    steps = _arrays(run)["random"]
    assert steps.shape == (1, 60)
    assert random["mean"] == pytest.approx(steps.mean())
    assert random["sd"] == pytest.approx(steps.std(ddof=1))


def test_escape_from_a_saddle_of_two_groups_prints_tables(ufm):
    code, out, _ = ufm(*ESCAPE, "--saddle", 1, 2, "--seeds", 2, "--nesterov", "--momentum", 0.3)
    assert code == 0
    for words in ("merges classes as 2+1", "rank 1, index 3", f"λ_min = {LEAST:.8g}", "Nesterov's", "η is below"):
        assert words in out
    assert "2 random directions, which see 2 copies of λ_min in 21 variables" in out  # (d − rank)(K − groups)
    assert "2 LEFT" in out
    assert re.search(r"escape-\S+/escape\.png", out)


def test_what_diverges_is_an_outcome_and_no_number(ufm):
    """A step of η = 1000 multiplies by 352 along λ_max and by 314 along λ_min; f rises where the former wins."""
    code, out, _ = ufm(*ESCAPE[:-1], 1000, "--seeds", 8, "--json", "--out", "new")
    assert code == 0
    result = _strict(out)
    assert result["method"]["above_limit"] is True
    random = result["escapes"][0]["random"]
    assert random["outcomes"]["DIVERGED"] > 0
    assert sum(random["outcomes"].values()) == 8
    assert random["mean"] is random["sd"] is None
    assert np.isfinite(_arrays("new")["random"]).sum() == random["outcomes"].get("LEFT", 0)


def test_a_start_on_the_saddle_is_an_outcome_and_no_number(ufm):
    """Beside a saddle of norm 3, 1e-15 is rounding."""
    code, out, _ = ufm(*ESCAPE[:-3], "1e-15", "--saddle", 2, 1, "--seeds", 0)
    assert code == 0
    assert re.search(r"1e-15 +\S+ +ON_SADDLE", out)


@pytest.mark.parametrize("name", ["sgd", "momentum", "nesterov"])
def test_descend_ends_at_the_optimum_at_the_predicted_rate(ufm, problem, name):
    lr = {"sgd": 2, "momentum": 0.3, "nesterov": 0.3}[name]  # overdamped, or nearly
    code, out, err = ufm(*DESCEND[:-1], lr, "--optimiser", name, "--out", "new", "--json", "--every", 2)
    assert (code, err) == (0, "")
    result = _strict(out)
    method = Method(float(lr), 0.0 if name == "sgd" else 0.9, name == "nesterov")
    spectrum = hessian_spectrum(problem)
    terminal = result["terminal"]
    assert terminal["predicted_factor"] == pytest.approx(np.exp(-float(terminal_rate(spectrum, method))))
    assert terminal["step_limit"] == pytest.approx(float(step_limit(spectrum.eigenvalues.max(), method)))
    assert np.log(terminal["measured_factor"]) == pytest.approx(np.log(terminal["predicted_factor"]), rel=0.05)
    assert result["fate"] == "DESCENDED"
    assert result["optimal_value"] == pytest.approx(float(optimal_value(problem)))
    assert result["excess"] <= result["gap"] + result["rounding"]
    assert abs(result["excess"]) < 1e-9
    arrays = _arrays("new")
    assert arrays["step"].tolist() == list(range(0, 601, 2))
    for quantity in ("value", "gap", "grad_norm", "nc0", "nc1", "nc2", "nc3"):
        assert result[quantity] == arrays[quantity][-1]


def test_descend_is_the_course_of_the_package(ufm, problem):
    ufm(
        *DESCEND,
        "--optimiser",
        "adamw",
        "--lr",
        0.02,
        "--batch",
        2,
        "--schedule",
        "cosine",
        "--seed",
        4,
        "--out",
        "new",
    )
    start_key, draw_key = jax.random.split(jax.random.key(4))
    rate = optimisers.optax.cosine_decay_schedule(0.02, 600)
    rule = optimisers.optimiser(problem, "adamw", rate, batch=2)
    _, kept = courses.course(problem, rule, init(problem, start_key), 600, every=10, key=draw_key)
    arrays = _arrays("new")
    assert arrays.keys() == kept.keys()
    for name, values in kept.items():
        np.testing.assert_array_equal(arrays[name], values)


def test_descend_names_the_saddle_it_rests_at(ufm):
    code, out, _ = ufm(*DESCEND, "--scale", 1e-4, "--every", 1)
    assert code == 0
    (run,) = Path("runs").iterdir()
    assert run.name.startswith("descend-")
    assert sorted(p.name for p in run.iterdir()) == ["arrays.npz", "config.json", "course.png", "summary.json"]
    first = _strict((run / "summary.json").read_text("utf-8"))["plateaus"][0]
    assert (first["first"], first["nearest"], first["saddle"]["index"]) == (0, "012", 6)
    assert "012, partition saddle, f = 1.09861, index 6" in out
    assert "DESCENDED in 600 steps" in out
    assert "seed 0" in out


def test_plateaus_without_names_say_why(ufm):
    code, out, _ = ufm(
        "descend", "--K", 8, "--n", 1, "--d", 8, "--steps", 300, "--lr", 5, "--scale", 1e-4, "--every", 5
    )
    assert code == 0
    assert "Plateaus, without names: K must be smaller" in out


def test_a_descent_that_overflows_is_not_finite_and_still_drawn(ufm):
    code, out, _ = ufm(*DESCEND[:-1], 1e6, "--steps", 40, "--out", "new")
    assert code == 0
    assert "NOT_FINITE" in out
    assert "Terminal factor: none, for lr is not below" in out
    assert Path("new/course.png").exists()


def test_an_interrupted_descent_goes_on_as_if_it_had_not_been(ufm, monkeypatch):
    again = [*DESCEND, "--every", 2, "--out"]
    assert ufm(*again, "whole")[0] == 0
    save, saved = chunks._save, []

    def save_twice(*arguments):
        if len(saved) == 2:
            raise KeyboardInterrupt
        saved.append(save(*arguments))

    monkeypatch.setattr(chunks, "_save", save_twice)
    code, out, err = ufm(*again, "new")
    assert (code, out, err) == (130, "", "ufm: interrupted: start again with --out new to go on\n")
    assert not Path("new").exists()
    code, _, err = ufm(*again[:-1], "--lr", 1, "--out", "new")
    assert code == 2
    assert "is of another run" in err
    assert sorted(p.name for p in Path(".new.unfinished").iterdir()) == ["course.npz"]
    monkeypatch.setattr(chunks, "_save", save)
    assert ufm(*again, "new")[0] == 0
    assert not Path(".new.unfinished").exists()
    whole, new = _arrays("whole"), _arrays("new")
    assert whole.keys() == new.keys()
    assert all(np.array_equal(whole[name], new[name]) for name in whole)


def test_the_names_of_the_optimisers_are_the_labs():
    assert list(get_args(descend.Name)) == list(optimisers.OPTIMISERS)
    decoupled = [name for name, recipe in optimisers.OPTIMISERS.items() if not recipe.coupled]
    assert list(descend.DECOUPLED) == decoupled


E_, D_ = " ".join(ESCAPE), " ".join(DESCEND)
BAD = {
    f"{E_} --saddle 3 2": r"saddle must be the group sizes of a saddle of this problem \(2\+1, 3\), got \[3, 2\]",
    f"{E_} --saddle 1 1 1": r"saddle must have negative curvature, and the point of groups 1\+1\+1 has none: merge",
    f"{E_} --lam-W 20": r"saddle must have negative curvature, .* 3 has none: .* or take smaller lam_W and lam_H",
    f"{E_} --d 1 --saddle 2 1": "d must exceed the rank 1 of W at the saddle",
    f"{E_} --distances 1e-3": "distances must be positive and smaller than radius = 0.001, got 0.001",
    f"{E_} --distances 1e-6 nan": "distances must be positive .*, got nan",
    f"{E_} --distances 0": "distances must be positive .*, got 0",
    f"{E_} --radius inf": "radius must be positive and finite, got inf",
    **{f"{E_} --eta {eta}": f"eta must be positive and finite, got {eta}" for eta in ("0.0", "-1.0", "nan")},
    **{f"{E_} --momentum {beta}": r"momentum must be in \[0, 1\), got" for beta in ("1", "-0.1", "nan")},
    f"{E_} --seeds -1": "seeds must be an integer of at least 0, got -1",
    f"{E_} --eta 1e-9": "eta must be larger, distances larger or seeds fewer: escapes of .* steps are predicted",
    f"{E_} --out taken": "taken exists already: a run is never overwritten, name another",
    f"{D_} --lr 0": "lr must be positive and finite, got 0.0",
    f"{D_} --lr nan": "lr must be positive and finite, got nan",
    f"{D_} --optimiser lbfgs --schedule cosine": "schedule must be constant for lbfgs",
    f"{D_} --optimiser lion": "--optimiser.*see --help",
    f"{D_} --steps 15": "steps must be a multiple of every = 10, got 15",
    f"{D_} --steps 0": "steps must be an integer of at least 1, got 0",
    f"{D_} --every 0": "every must be an integer of at least 1, got 0",
    f"{D_} --scale -1": "scale must be finite and not negative, got -1.0",
    f"{D_} --batch 0": "batch must be an integer of at least 1, got 0",
    f"{D_} --d 1": "d must be at least K - 1 = 2",
    f"{D_} --lam-W 0": "lam_W must be positive",
    f"{D_} --out taken": "taken exists already",
    f"{D_} --out file/run": "cannot be made .*: name a writable one",
}


@pytest.mark.parametrize(("line", "complaint"), BAD.items(), ids=BAD)
def test_bad_input_is_one_line_that_names_it_and_leaves_no_trace(ufm, line, complaint):
    Path("taken").mkdir()
    Path("file").touch()
    before = _tree()
    code, out, err = ufm(*line.split())
    assert (code, out) == (2, "")
    assert err.startswith("ufm: ")
    assert err.count("\n") == 1
    assert re.search(complaint, err), err
    assert _tree() == before
