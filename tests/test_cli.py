"""The command `ufm`: it teaches, its numbers are the package's, bad input is one line and leaves no trace."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from ufm import lab
from ufm.cli import verify
from ufm.lab.claims import balanced as claims
from ufm.lab.claims import grid
from ufm.lab.claims.claim import claim
from ufm.measure.collapse import collapse_metrics
from ufm.measure.features import Features, save_features
from ufm.model.problem import balanced
from ufm.nets.config import TrainConfig
from ufm.theory.optimum import balanced_minimiser, balanced_value

pytestmark = pytest.mark.usefixtures("hastily")

TINY = TrainConfig(limit=20, batch=10, epochs=1, width=1, d=10, regulariser="features", lam_W=5e-3)
FLAGS = "--limit 20 --batch 10 --epochs 1 --width 1 --d 10 --regulariser features --lam-W 5e-3"
TINY_FLAGS = FLAGS.split()


def _strict(text):
    return json.loads(text, parse_constant=pytest.fail)


def _tree(folder="."):
    """Every path below a folder, with the bytes of files."""
    return {p: p.read_bytes() if p.is_file() else None for p in sorted(Path(folder).rglob("*"))}


def _optimal(K=3, n=4, d=5, lam_W=5e-3, lam_H=2e-3):
    """Features at the optimum."""
    problem = balanced(K, n, d, lam_W=lam_W, lam_H=lam_H)
    x = balanced_minimiser(problem)
    return problem, Features(np.asarray(x.H), np.repeat(np.arange(K), n), np.asarray(x.W), np.asarray(x.b))


TAUGHT = {
    "": "verify solve certify classify measure landscape escape descend sweep train",
    "verify": "claim residual --full --no-network --out --json",
    "solve": "λ_W λ_H λ_b --counts --no-bias --seed",
    "certify": "H (d×N) features (N×d) labels balance --lam-W",
    "classify": "H (d×N) labels --lam-W --lam-H --lam-b --rigorous --seed --out --json",
    "measure": ".npz .safetensors --centre class_means",
    "landscape": "escape.png spectrum.png atlas.png network.png --saddle --hunt --network --seed --out --json",
    "escape": "λ_min |λ_min| escape.png --saddle --distances --radius --eta --momentum --nesterov --seeds --out --json",
    "descend": "NC0 NC3 course.png --optimiser lbfgs --schedule cosine --every --scale --batch --seed --out --json",
    "sweep": "collapse norms minority conditioning index --points --out --batch --devices --scheduler --open --json",
    "train": "--resume fashion-mnist ‖H‖² --lam-H",
}


@pytest.mark.parametrize("command", TAUGHT)
def test_help_teaches(ufm, command):
    code, out, err = ufm(*command.split(), "--help")
    assert (code, err) == (0, "")
    assert f"usage: ufm {command}".rstrip() in out
    for word in TAUGHT[command].split():
        assert word in out


def test_solve_gives_the_closed_form_and_what_lbfgs_finds(ufm):
    code, out, err = ufm("solve", "--K", 4, "--n", 5, "--d", 6, "--lam-W", 5e-3, "--lam-H", 2e-3, "--json")
    assert (code, err) == (0, "")
    result = _strict(out)
    assert result["optimum"]["value"] == pytest.approx(0.126028943439, abs=1e-12)  # THEORY 1.2
    assert result["optimum"]["margin_mean"] == pytest.approx(4.93030234, abs=1e-8)
    assert result["verdict"] == "GLOBAL"
    assert result["collapse_threshold"] == pytest.approx(1 / (4 * np.sqrt(5)))
    assert result["s"] == pytest.approx(np.sqrt(1e-5))
    assert result["lbfgs"]["status"] == "CONVERGED"
    assert abs(result["lbfgs"]["excess"]) < 1e-12


def test_solve_keeps_what_it_found_in_open_formats(ufm, tmp_path):
    run = tmp_path / "runs" / "first"
    code, out, _ = ufm("solve", "--counts", 4, 2, 1, "--d", 3, "--no-bias", "--out", run)
    assert code == 0
    assert "counts [4, 2, 1], d = 3" in out
    assert sorted(p.name for p in run.iterdir()) == ["arrays.npz", "config.json", "summary.json"]
    config, summary = (_strict((run / f"{name}.json").read_text("utf-8")) for name in ("config", "summary"))
    assert config["model"]["counts"] == [4, 2, 1]
    assert config["model"]["bias"] is False
    assert summary["verdict"] == "GLOBAL"
    assert summary["wall_seconds"] > 0
    assert summary["versions"]["ufm"]
    with np.load(run / "arrays.npz", allow_pickle=False) as arrays:
        W, M, counts = arrays["W"], arrays["M"], arrays["counts"]
    assert (W.shape, M.shape, counts.tolist()) == ((3, 3), (3, 3), [4, 2, 1])
    losses = [np.log(np.exp(W @ m).sum()) - W[k] @ m for k, m in enumerate(M.T)]
    value = counts @ losses / 7 + 5e-3 / 2 * (W**2).sum() + 5e-5 / 2 * (counts * M**2).sum()
    assert value == pytest.approx(summary["optimum"]["value"], rel=1e-12)


def test_certify_knows_the_optimum_and_balance_implies_lam_H(ufm, tmp_path):
    problem, features = _optimal()
    save_features(tmp_path / "f.npz", features)
    code, out, err = ufm("certify", tmp_path / "f.npz", "--lam-W", 5e-3, "--json", "--out", tmp_path / "run")
    assert (code, err) == (0, "")
    result = _strict(out)
    assert result["verdict"] == "GLOBAL"
    assert result["lam_H"] == pytest.approx(2e-3)
    assert result["observed"] == pytest.approx(result["predicted"], abs=1e-12)
    assert result["observed"]["value"] == pytest.approx(float(balanced_value(problem)), abs=1e-13)
    assert _strict((tmp_path / "run" / "summary.json").read_text("utf-8"))["verdict"] == "GLOBAL"
    assert _strict((tmp_path / "run" / "config.json").read_text("utf-8"))["lam_H"] is None
    assert ufm("certify", tmp_path / "f.npz", "--lam-W", 5e-3, "--lam-H", 1e-3)[1].count("NOT_CRITICAL") == 1


def test_certify_shows_the_way_down_from_a_saddle(ufm, tmp_path):
    """At the origin ‖∇_Z g‖₂ = 1/(K√n)."""
    _, f = _optimal()
    save_features(tmp_path / "f.npz", Features(0 * f.H, f.labels, 0 * f.W, f.b))
    result = _strict(ufm("certify", tmp_path / "f.npz", "--lam-W", 5e-3, "--lam-H", 2e-3, "--json")[1])
    assert result["verdict"] == "STRICT_SADDLE"
    assert result["dual_norm"] == pytest.approx(1 / (3 * 2))
    stated = 3.5e-3 - np.hypot(1.5e-3, 1 / 6)
    assert result["predicted_curvature"] == pytest.approx(stated)
    assert result["measured_curvature"] == pytest.approx(stated)
    assert 0 < result["drop"] <= np.log(3)


def test_classify_tells_a_saddle_in_float32_and_where_it_leads(ufm, tmp_path):
    """At the origin (K − 1)d directions go down, with ‖∇_Z g‖₂ = 1/(K√n); every descent ends at f* for d ≥ K."""
    problem, f = _optimal(4, 2, 4)
    save_features(tmp_path / "f.npz", Features(np.float32(0 * f.H), f.labels, np.float32(0 * f.W), np.float32(f.b)))
    flags = (tmp_path / "f.npz", "--lam-W", 5e-3, "--lam-H", 2e-3, "--seed", 3)
    code, out, err = ufm("classify", *flags, "--json", "--out", tmp_path / "run")
    assert (code, err) == (0, "")
    result, least = _strict(out), 3.5e-3 - np.hypot(1.5e-3, 1 / 4 / np.sqrt(2))
    assert (result["verdict"], result["critical"], result["morse_index"]) == ("STRICT_SADDLE", True, 12)
    assert "negative_eigenvalues" not in result
    assert sum(result[f"{sign}_eigenvalues"] for sign in ("zero", "positive")) == 4 * (4 + 8) + 4 - 12
    assert result["smallest_eigenvalue"]["value"] == pytest.approx(least, abs=1e-9)
    assert result["smallest_eigenvalue"]["converged"] is True
    assert result["escape"]["predicted_curvature"] == pytest.approx(least)
    assert result["value"] == pytest.approx(np.log(4))
    assert result["excess"] == pytest.approx(np.log(4) - float(balanced_value(problem)))
    assert result["leads_to"]["value"] == pytest.approx(float(balanced_value(problem)), rel=1e-11)
    assert result["leads_to"]["verdict"] == "GLOBAL"
    assert result["classes_merged"] == [[0, 1, 2, 3]]
    assert result["atlas"]["entries"] == 5
    assert result["atlas"]["alike"] == {"partition": [[0, 1, 2, 3]], "value": pytest.approx(np.log(4))}
    assert result["atlas"]["above"] is None
    assert sorted(map(len, result["atlas"]["below"]["partition"])) == [1, 3]
    assert _strict((tmp_path / "run" / "summary.json").read_text("utf-8"))["verdict"] == "STRICT_SADDLE"
    assert _strict((tmp_path / "run" / "config.json").read_text("utf-8"))["seed"] == 3
    proved = ufm("classify", *flags, "--rigorous")[1]
    assert "a strict saddle; f falls in 12 directions, steepest with curvature -0.1733" in proved
    assert f"downhill leads to f = {float(balanced_value(problem)):.6g} (GLOBAL)" in proved


def test_classify_tells_an_optimum_from_a_point_that_is_not_critical(ufm, tmp_path):
    _, f = _optimal(4, 2, 4)
    for name, size in (("optimum", 0), ("other", 0.1)):
        H = f.H + size * np.cos(np.arange(32)).reshape(4, 8)
        save_features(tmp_path / f"{name}.npz", Features(H, f.labels, f.W, f.b))
    optimum, other = (
        _strict(ufm("classify", tmp_path / f"{name}.npz", "--lam-W", 5e-3, "--lam-H", 2e-3, "--json")[1])
        for name in ("optimum", "other")
    )
    assert (optimum["verdict"], optimum["morse_index"]) == ("GLOBAL", 0)
    assert optimum["zero_eigenvalues"] == 3 + 3 + 1  # the frame of rank 3 turns in four dimensions, and b moves along 1
    assert not {"leads_to", "negative_eigenvalues"} & optimum.keys()
    assert abs(optimum["excess"]) < 1e-15
    assert (other["verdict"], other["critical"]) == ("NOT_CRITICAL", False)
    assert "morse_index" not in other
    assert other["negative_eigenvalues"] >= 0
    assert other["leads_to"]["value"] == pytest.approx(optimum["value"], rel=1e-11)
    assert other["excess"] == pytest.approx(other["value"] - optimum["value"], rel=1e-11)
    table = ufm("classify", tmp_path / "other.npz", "--lam-W", 5e-3, "--lam-H", 2e-3)[1]
    assert "not a critical point; the gradient is" in table
    assert "morse_index" not in table


@pytest.mark.parametrize("suffix", ["npz", "safetensors"])
def test_measure_prints_every_metric(ufm, tmp_path, suffix):
    rng = np.random.default_rng(0)
    arrays = {"features": rng.normal(size=(7, 4)), "labels": np.array([0, 1, 2, 0, 1, 2, 2]),
              "W": rng.normal(size=(3, 4))}  # fmt: skip
    file = tmp_path / f"f.{suffix}"
    np.savez(file, **arrays) if suffix == "npz" else save_file(arrays, file)
    for centre in ("class_means", "samples"):
        code, out, err = ufm("measure", file, "--centre", centre, "--json", "--out", tmp_path / centre)
        assert (code, err) == (0, "")
        expected = collapse_metrics(arrays["features"].T, arrays["labels"], arrays["W"], None, centre=centre)
        assert _strict(out) == vars(expected)
        assert sorted(p.name for p in (tmp_path / centre).iterdir()) == ["config.json", "summary.json"]
    table = ufm("measure", file)[1]
    assert all(name in table for name in vars(expected))


def test_metrics_that_are_not_finite_are_still_json(ufm, tmp_path):
    _, f = _optimal()
    save_features(tmp_path / "f.npz", Features(0 * f.H, f.labels, f.W, f.b))
    assert _strict(ufm("measure", tmp_path / "f.npz", "--json")[1])["nc1_pinv"] == "nan"
    assert "nan" in ufm("measure", tmp_path / "f.npz")[1]


def test_train_records_draws_and_resumes(ufm, tmp_path):
    run = tmp_path / "run"
    code, out, _ = ufm("train", run, *TINY_FLAGS, "--json")
    assert code == 0
    last = _strict(out)
    assert last["epoch"] == 1
    assert last == _strict((run / "history.json").read_text("utf-8"))[-1]
    assert {"config.json", "summary.json", "features.npz", "training.png"} <= {p.name for p in run.iterdir()}
    before = _tree(run)
    assert ufm("train", run, *TINY_FLAGS)[0] == 2
    assert _tree(run) == before
    code, out, _ = ufm("train", run, *TINY_FLAGS, "--resume")
    assert code == 0
    assert "margin_mean" in out
    assert (run / "history.json").read_bytes() == before[run / "history.json"]
    measured = _strict(ufm("measure", run / "features.npz", "--json")[1])
    assert measured == last["collapse"]


def _claims(monkeypatch, *registry):
    monkeypatch.setattr(lab.claims, "REGISTRY", registry)
    monkeypatch.setattr(grid, "QUICK", ((2, 1, 2, {}),))


def _f_star(name, factor):
    """f* at the closed form against the formula times a factor."""

    @claim(name, "f at the closed form is f*", "THEORY 1.2", 1e-12)
    def test(full):
        problem = balanced(3, 2, 4, lam_W=5e-3, lam_H=2e-3)
        result = lab.compare.summarise(problem, balanced_minimiser(problem))
        yield "K=3", abs(result["value"] - factor * float(balanced_value(problem)))

    return test


def test_verify_shows_its_evidence_and_draws_it(ufm, tmp_path, monkeypatch):
    _claims(monkeypatch, _f_star("Right", 1.0), claims.collapsed)
    code, out, err = ufm("verify", "--no-network", "--out", tmp_path / "run")
    assert (code, err) == (0, "")
    assert out.count("holds ") == 2
    assert "All 2 claims hold" in out
    assert "(THEORY 1.2)" in out
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["claims.png", "config.json", "summary.json"]
    summary = _strict((tmp_path / "run" / "summary.json").read_text("utf-8"))
    assert summary["holds"] is True
    assert [c["name"] for c in summary["claims"]] == ["Right", "NC1 to NC4"]
    assert all(c["cases"] > 0 and c["worst"] <= c["tolerance"] for c in summary["claims"])
    assert _strict((tmp_path / "run" / "config.json").read_text("utf-8"))["network"] is False


def test_verify_ends_with_a_network_beside_the_theory(ufm, tmp_path, monkeypatch):
    _claims(monkeypatch, _f_star("Right", 1.0))
    monkeypatch.setattr(verify, "DEMONSTRATION", TINY)
    code, out, _ = ufm("verify", "--out", tmp_path / "run")
    assert code == 0
    assert "theory, H ≥ 0" in out
    assert all(name in out for name in ("margin_mean", "nc1_pinv", "test_error", "≥ f − f*"))
    assert {"training.png", "summary.json", "features.npz"} <= {
        p.name for p in (tmp_path / "run" / "network").iterdir()
    }
    network = _strict((tmp_path / "run" / "summary.json").read_text("utf-8"))["network"]
    assert network == _strict((tmp_path / "run" / "network" / "history.json").read_text("utf-8"))[-1]


def test_numbers_of_the_network_that_are_not_finite_are_shown_all_the_same():
    side = {"value": 0.5, "balance": "nan"}
    metrics = dict.fromkeys(("nc1_pinv", "nc2_etf_err", "nc2_etf_err_weights", "nc3_dual_err", "nc4_disagree"), "inf")
    last = {"epoch": 1, "observed": side, "predicted": side, "collapse": metrics, "train_error": 0.0, "test_error": 0.1}
    table = verify._network_table(last | {"gap": 0.5})
    assert table.count("nan") == 2
    assert table.count("inf") == 5


@pytest.mark.parametrize("json_flag", [[], ["--json"]], ids=["table", "json"])
def test_a_formula_wrong_by_1e_6_fails_verify(ufm, tmp_path, monkeypatch, json_flag):
    _claims(monkeypatch, _f_star("Right", 1.0), _f_star("Wrong", 1 + 1e-6))
    code, out, _ = ufm("verify", "--no-network", "--out", tmp_path / "run", *json_flag)
    assert code == 1
    summary = _strict((tmp_path / "run" / "summary.json").read_text("utf-8"))
    assert [c["holds"] for c in summary["claims"]] == [True, False]
    assert summary["holds"] is False
    assert (tmp_path / "run" / "claims.png").exists()
    if json_flag:
        assert _strict(out)["claims"] == summary["claims"]
    else:
        assert "FAILS  Wrong" in out
        assert "worst case: K=3" in out
        assert "1 of 2 claims FAIL" in out


def test_an_optimal_value_wrong_by_1e_9_fails_verify(ufm, tmp_path, monkeypatch):
    _claims(monkeypatch, claims.optimum_value)
    monkeypatch.setattr(claims, "balanced_value", lambda problem: balanced_value(problem) * (1 + 1e-9))
    code, out, _ = ufm("verify", "--no-network", "--out", tmp_path / "run")
    assert code == 1
    assert "FAILS  Balanced optimum" in out


@pytest.mark.parametrize("residuals", [[], [0.0, float("nan")], [ArithmeticError("optimum not certified")]], ids=str)
def test_a_claim_without_evidence_fails_verify(ufm, tmp_path, monkeypatch, residuals):
    def cases(full):
        for residual in residuals:
            if isinstance(residual, Exception):
                raise residual
            yield "case", residual

    _claims(monkeypatch, claim("Empty", "statement", "source", 1.0)(cases))
    code, out, err = ufm("verify", "--no-network", "--out", tmp_path / "run", "--json")
    assert (code, err) == (1, "")
    assert _strict(out)["claims"][0]["holds"] is False
    assert (tmp_path / "run" / "claims.png").exists()


def test_verify_without_a_folder_makes_one_of_its_own(ufm, monkeypatch):
    _claims(monkeypatch, _f_star("Right", 1.0))
    assert ufm("verify", "--no-network")[0] == 0
    (run,) = Path("runs").iterdir()
    assert run.name.startswith("verify-")


def test_the_installed_command_in_a_process_of_its_own(tmp_path):
    def run(*arguments):
        command = [sys.executable, "-c", "from ufm.cli import main; main()", *arguments]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)

    refused = run("solve", "--lam-W", "0", "--out", "new")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr == "ufm: lam_W must be positive and finite, got 0.0\n"
    solved = run("solve", "--K", "3", "--n", "2", "--d", "3", "--json", "--out", "new")
    assert (solved.returncode, solved.stderr) == (0, "")
    assert _strict(solved.stdout)["gap"] < 1e-12  # in float64, without being told to
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["arrays.npz", "config.json", "summary.json"]
