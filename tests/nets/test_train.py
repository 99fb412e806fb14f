"""A training run does what its equations say, records all of it, and survives being killed."""

import dataclasses
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from ufm.lab.compare import compare, implied_lam_H, problem_of_features
from ufm.measure.collapse import collapse_metrics
from ufm.measure.features import load_features
from ufm.nets import train as module
from ufm.nets.config import TrainConfig, check_config
from ufm.nets.data import load
from ufm.nets.train import train

CONFIG = TrainConfig(
    limit=20, batch=8, epochs=4, measure_every=2, width=1, d=10, lr=0.02, regulariser="features", lam_W=5e-3
)
DECAY = dataclasses.replace(CONFIG, regulariser="decay", epochs=1)


@pytest.fixture(scope="module")
def images():
    return load("digits", "train", limit=20)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run of CONFIG that was never stopped."""
    return train(CONFIG, tmp_path_factory.mktemp("train") / "run", quiet=True)


@pytest.fixture(scope="module")
def decayed(tmp_path_factory):
    return train(DECAY, tmp_path_factory.mktemp("train") / "decay", quiet=True)


def _json(path):
    return json.loads(path.read_text("utf-8"), parse_constant=pytest.fail)


def _history(folder):
    """What must not depend on interruptions: all but the seconds."""
    return [{k: v for k, v in row.items() if k != "seconds"} for row in _json(folder / "history.json")]


def _assert_same_run(one, other):
    assert _history(one) == _history(other)
    assert (one / "features.npz").read_bytes() == (other / "features.npz").read_bytes()
    assert (one / "config.json").read_bytes() == (other / "config.json").read_bytes()


def _files(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_run_records_its_config_history_features_and_summary(run, images):
    assert sorted(p.name for p in run.iterdir()) == ["checkpoints", "config.json", "features.npz", "history.json",
                                                     "summary.json"]  # fmt: skip
    config = _json(run / "config.json")
    assert config == dataclasses.asdict(dataclasses.replace(CONFIG, lam_H=5e-3 / 20, lam_b=5e-3))
    history = _json(run / "history.json")
    assert [row["epoch"] for row in history] == [1, 2, 4]
    assert len({frozenset(row) for row in history}) == 1
    assert all(np.isfinite(row["running_loss"]) and row["seconds"] > 0 for row in history)
    summary = _json(run / "summary.json")
    assert summary | history[-1] == summary
    assert summary["wall_seconds"] > sum(row["seconds"] for row in history)
    assert {"versions", "device", "machine", "revision"} < summary.keys()
    features = load_features(run / "features.npz")
    assert {x.dtype for x in (features.H, features.W, features.b)} == {np.dtype(np.float32)}
    assert (features.H.shape, features.W.shape, features.b.shape) == ((10, 20), (10, 10), (10,))
    np.testing.assert_array_equal(features.labels, images.labels)


def test_the_last_measurement_is_that_of_the_features_written(run):
    f, last = load_features(run / "features.npz"), _json(run / "history.json")[-1]
    assert last["collapse"] == dataclasses.asdict(collapse_metrics(f.H, f.labels, f.W, f.b))
    logits = f.W.astype(float) @ f.H + f.b[:, None]
    assert last["train_error"] == np.mean(logits.argmax(0) != f.labels)
    sides, certificate = compare(*problem_of_features(f, lam_W=5e-3, lam_H=5e-3 / 20, lam_b=5e-3))
    assert {side: last[side] for side in sides} == sides
    assert last["gap"] == float(certificate.gap)
    assert last["dual_norm_over_s"] == float(certificate.dual_norm / certificate.threshold)
    assert last["lam_H"] == 5e-3 / 20
    assert last["observed"]["value"] - last["predicted"]["value"] <= last["gap"]


def test_under_weight_decay_lam_H_is_the_one_that_balance_implies(decayed):
    f, last = load_features(decayed / "features.npz"), _json(decayed / "history.json")[-1]
    assert last["lam_H"] == implied_lam_H(f, 5e-3)
    assert last["observed"]["balance"] == pytest.approx(1, rel=1e-14)
    assert _json(decayed / "config.json")["lam_H"] is None


class Killed(BaseException):
    """Nothing in the code catches it."""


def _killed_in(monkeypatch, owner, name, call, folder, *, resume):
    """Train until the given call of owner.name, then die."""
    calls, original = [], getattr(owner, name)

    def mortal(*arguments, **options):
        calls.append(1)
        if len(calls) == call:
            raise Killed
        return original(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, mortal)
        with pytest.raises(Killed):
            train(CONFIG, folder, resume=resume, quiet=True)


def test_killed_anywhere_and_resumed_a_run_ends_with_the_same_numbers(run, tmp_path, monkeypatch):
    folder, trainer = tmp_path / "run", module._Trainer
    _killed_in(monkeypatch, trainer, "step", 2, folder, resume=False)  # before anything was kept
    _killed_in(monkeypatch, trainer, "step", 4, folder, resume=True)  # within the second epoch
    _killed_in(monkeypatch, module, "write_json", 1, folder, resume=True)  # measured, history not yet written
    history = folder / "history.json"
    history.write_text(json.dumps([*_json(history), {"epoch": 2, "late": True}]))  # written, checkpoint not yet
    _killed_in(monkeypatch, module, "save_features", 1, folder, resume=True)  # all epochs done
    assert not (folder / "summary.json").exists()
    assert train(CONFIG, folder, resume=True, quiet=True) == folder
    _assert_same_run(folder, run)
    assert not [path for path in folder.rglob("*") if "part" in path.name or "tmp" in path.name]


def test_killed_by_the_system_and_resumed_a_run_ends_with_the_same_numbers(run, tmp_path):
    """SIGKILL of another process of the shipped command, once its first checkpoint stands."""
    folder = tmp_path / "run"
    flags = {"limit": 20, "batch": 8, "epochs": 4, "measure-every": 2, "width": 1, "d": 10, "lr": 0.02,
             "regulariser": "features", "lam-W": 5e-3}  # fmt: skip
    words = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
    program = "from ufm.cli import main; main()"
    process = subprocess.Popen([sys.executable, "-c", program, "train", str(folder), *words, "--json"])
    while process.poll() is None and not any((folder / "checkpoints").glob("[0-9]*")):
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    train(CONFIG, folder, resume=True, quiet=True)
    _assert_same_run(folder, run)


def test_resuming_a_finished_run_changes_nothing(run, tmp_path):
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    train(CONFIG, copy, resume=True, quiet=True)
    _assert_same_run(copy, run)
    assert _json(copy / "summary.json").items() >= _json(run / "history.json")[-1].items()


CHANGES = {"lr": 0.03, "seed": 1, "epochs": 5, "regulariser": "decay", "lam_W": 1e-3, "limit": 30, "d": None}


@pytest.mark.parametrize(("name", "value"), CHANGES.items(), ids=CHANGES.keys())
def test_a_run_is_resumed_only_with_its_own_config(run, name, value):
    before = _files(run)
    with pytest.raises(ValueError, match=f"was made with another .*{name}.*: resume with the same config"):
        train(dataclasses.replace(CONFIG, **{name: value}), run, resume=True, quiet=True)
    assert _files(run) == before


def test_a_run_is_never_overwritten(run):
    before = _files(run)
    with pytest.raises(ValueError, match="exists already: a run is never overwritten"):
        train(CONFIG, run, quiet=True)
    assert _files(run) == before


@pytest.mark.parametrize("content", [None, "[]", '{"full": true}', '{"K": '])
def test_what_is_no_training_run_is_not_resumed(tmp_path, content):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"config.json cannot be read|holds no training run") as refusal:
        train(CONFIG, tmp_path, resume=True, quiet=True)
    assert "\n" not in str(refusal.value)
    assert len(list(tmp_path.iterdir())) == (content is not None)


def test_a_run_that_lost_its_history_is_not_resumed_as_if_it_had_none(run, tmp_path):
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    (copy / "history.json").unlink()
    with pytest.raises(ValueError, match=r"history\.json cannot be read"):
        train(CONFIG, copy, resume=True, quiet=True)
    assert not (copy / "history.json").exists()


def test_a_loss_that_is_no_longer_finite_ends_the_run_and_says_what_to_change(tmp_path):
    with pytest.raises(ArithmeticError, match=r"loss is (nan|inf) in epoch 1: lower lr"):
        train(dataclasses.replace(DECAY, lr=1e30), tmp_path / "run", quiet=True)
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["checkpoints", "config.json"]
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


BAD = {
    "data": ("cifar", "digits, fashion-mnist, mnist, cifar10"),
    "limit": (7, "limit = 7"),
    "width": (0, "width = 0"),
    "d": (8, "d must be at least K - 1 = 9"),
    "stem": ("large", "stem = 'large'"),
    "epochs": (0, "epochs must be positive"),
    "batch": (21, "batch must be at most the 20 training images"),
    "lr": (np.nan, "lr must be positive"),
    "momentum": (1.0, r"momentum must be in \[0, 1\)"),
    "regulariser": ("feature", "regulariser must be 'decay' or 'features'"),
    "lam_W": (0.0, "lam_W must be positive"),
    "lam_H": (0.0, "lam_H must be positive"),
    "lam_b": (-1.0, "lam_b must be"),
    "measure_every": (0, "measure_every must be positive"),
}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(("name", "value", "complaint"), [(k, *v) for k, v in BAD.items()], ids=BAD.keys())
def test_what_no_run_can_be_made_of_is_refused_before_there_is_a_folder(tmp_path, name, value, complaint):
    with pytest.raises(ValueError, match=complaint) as refusal:
        train(dataclasses.replace(CONFIG, **{name: value}), tmp_path / "deep" / "run", quiet=True)
    assert "\n" not in str(refusal.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("name", ["epochs", "batch", "measure_every", "lr", "lam_W", "lam_H"])
@pytest.mark.parametrize("value", [0, -1, np.inf, np.nan])
def test_numbers_that_must_be_positive_are(name, value):
    with pytest.raises(ValueError, match=f"{name} must be positive, got"):
        check_config(dataclasses.replace(CONFIG, **{name: value}))


@pytest.mark.parametrize("name", ["lam_H", "lam_b"])
def test_lambdas_of_features_do_not_belong_to_weight_decay(name):
    with pytest.raises(ValueError, match=f"{name} belongs to the regulariser 'features', got 'decay'"):
        check_config(dataclasses.replace(DECAY, **{name: 1e-3}))
    check_config(dataclasses.replace(CONFIG, lam_b=0.0))
