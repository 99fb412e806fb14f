"""A training run does what its equations say, records all of it, and survives being killed."""

import dataclasses
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import optax
import pytest
from flax import nnx

from ufm.lab.compare import compare, implied_lam_H, problem_of_features
from ufm.measure.collapse import collapse_metrics
from ufm.measure.features import load_features
from ufm.model.losses import CrossEntropy
from ufm.model.problem import Params, Problem, objective
from ufm.nets import train as module
from ufm.nets.config import TrainConfig, check_config
from ufm.nets.data import load
from ufm.nets.train import collect, error, train

CONFIG = TrainConfig(
    limit=20, batch=8, epochs=4, measure_every=2, width=1, d=10, lr=0.02, regulariser="features", lam_W=5e-3
)
DECAY = dataclasses.replace(CONFIG, regulariser="decay", epochs=1)
SINGLE = 2e-5  # relative; float32 gradients through 18 layers, summed in another order


@pytest.fixture
def unchecked():
    """No type checks at run time: what a user sees."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="module")
def images():
    return load("digits", "train", limit=20)


@pytest.fixture(scope="module")
def batch(images):
    return images.x[:8], images.labels[:8]


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


@pytest.fixture(scope="module", params=[CONFIG, DECAY], ids=["features", "decay"])
def stepped(request, images):
    """A trainer after 30 steps on one batch, and their losses."""
    config = module._resolved(dataclasses.replace(request.param, epochs=100), images)
    trainer = module._Trainer(config, images)
    batch = next(trainer.batches(0))
    return trainer, [trainer.step(batch) for _ in range(30)]


def test_steps_on_one_batch_lower_its_loss(stepped):
    losses = [float(loss) for loss in stepped[1]]
    assert losses[-1] < losses[0] / 2


def test_everything_is_float32_though_x64_is_on(stepped, images):
    assert jax.config.jax_enable_x64
    trainer, losses = stepped
    assert losses[0].dtype == np.float32
    dtypes = {x.dtype for x in jax.tree.leaves(trainer.state())}
    assert {t for t in dtypes if np.issubdtype(t, np.floating)} == {np.dtype(np.float32)}
    assert not any(np.issubdtype(t, np.signedinteger) and t.itemsize > 4 for t in dtypes)
    assert collect(trainer.model, images).H.dtype == np.float32


def test_measuring_leaves_the_model_as_it_is_and_does_not_depend_on_batches(stepped, images, monkeypatch):
    trainer, _ = stepped
    before = jax.tree.map(np.array, trainer.state())
    whole = collect(trainer.model, images)
    jax.tree.map(np.testing.assert_array_equal, before, trainer.state())
    monkeypatch.setattr(module, "EVALUATION_BATCH", 7)
    np.testing.assert_allclose(collect(trainer.model, images).H, whole.H, atol=1e-5)
    assert error(whole) == pytest.approx(np.mean((whole.W @ whole.H + whole.b[:, None]).argmax(0) != images.labels))


PLAIN = dataclasses.replace(CONFIG, lr=1.0, momentum=0.0, epochs=100)  # one step subtracts the gradient


def _parameters(trainer):
    return jax.tree.map(np.array, nnx.to_pure_dict(nnx.state(trainer.model, nnx.Param)))


def _gradient(trainer, batch):
    """The loss at the model and its gradient, by the step of a PLAIN trainer."""
    before, loss = _parameters(trainer), trainer.step(batch)
    return loss, jax.tree.map(np.subtract, before, _parameters(trainer))


def _assert_close(found, expected, rtol=SINGLE):
    """Relative to the largest entry of all leaves; gradients before a normalisation are differences near zero."""
    largest = max(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(expected))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=rtol * largest), found, expected)


def test_the_explicit_penalty_is_that_of_the_model_on_the_batch(images):
    """Loss and gradient are f's, λ_H standing for the N/B samples that each one of the batch speaks for."""
    config, N, B = dataclasses.replace(PLAIN, lam_W=0.03, lam_H=0.02, lam_b=0.04), 20, 10
    trainer = module._Trainer(config, images)
    one_of_each = np.unique(images.labels, return_index=True)[1]
    x, labels = images.x[one_of_each], images.labels[one_of_each]

    model = trainer.model
    h = module._features(model, jnp.asarray(x))
    problem = Problem(np.eye(10)[:, labels], np.ones(B), CrossEntropy(), 0.03, 0.02 * N / B, 0.04, 10, True)
    point = Params(*(jnp.asarray(a, float) for a in (model.head.kernel[...].T, h.T, model.head.bias[...])))
    value, slope = jax.value_and_grad(lambda p: objective(problem, p))(point)
    pull_back = nnx.jit(nnx.grad(lambda model, x, weights: jnp.sum(model.features(x) * weights)))
    through_features = pull_back(model, jnp.asarray(x), jnp.asarray(slope.H.T, jnp.float32))
    expected = nnx.to_pure_dict(through_features) | {"head": {"kernel": slope.W.T, "bias": slope.b}}

    loss, gradient = _gradient(trainer, (x, labels))
    assert float(loss) == pytest.approx(float(value), rel=SINGLE)
    _assert_close(gradient, expected)


def test_the_penalty_of_the_classifier_pulls_it_to_zero_in_proportion(images, batch):
    pulls = {}
    for scale in (1.0, 2.0):
        config = dataclasses.replace(PLAIN, lam_W=0.3 * scale, lam_H=1e-30, lam_b=0.4 * scale)
        trainer = module._Trainer(config, images)
        trainer.model.head.bias[...] = jnp.arange(10, dtype=jnp.float32) / 10
        head = _parameters(trainer)["head"]
        pulls[scale] = _gradient(trainer, batch)[1]["head"]
    pull = jax.tree.map(np.subtract, pulls[2.0], pulls[1.0])
    _assert_close(pull, {"kernel": 0.3 * head["kernel"], "bias": 0.4 * head["bias"]})


def test_weight_decay_pulls_every_parameter_by_lam_W_of_itself(images, batch):
    """θ − ∇ − λθ for weights, biases and the scales of normalisation alike."""
    gradients = {}
    for lam in (1e-30, 0.5):
        trainer = module._Trainer(dataclasses.replace(PLAIN, regulariser="decay", lam_W=lam), images)
        theta = _parameters(trainer)
        gradients[lam] = _gradient(trainer, batch)[1]
    pull = jax.tree.map(np.subtract, gradients[0.5], gradients[1e-30])
    _assert_close(pull, jax.tree.map(lambda x: 0.5 * x, theta))
    assert len(jax.tree.leaves(theta)) == 3 * 21 + 2  # 17 convolutions, 4 shortcuts, a head


def test_momentum_and_decay_are_coupled_as_in_sgd(images, batch):
    """v ← μ v + (∇ + λθ), θ ← θ − lr v, two steps by hand."""
    config = dataclasses.replace(PLAIN, regulariser="decay", lam_W=0.1, lr=0.05, momentum=0.9)
    trainer = module._Trainer(config, images)
    shadow = module._Trainer(dataclasses.replace(config, lr=1.0, momentum=0.0), images)
    v = jax.tree.map(np.zeros_like, _parameters(trainer))
    for _ in range(2):
        nnx.update(shadow.model, nnx.state(trainer.model))
        theta, (_, gradient) = _parameters(trainer), _gradient(shadow, batch)
        v = jax.tree.map(lambda old, new: 0.9 * old + new, v, gradient)
        trainer.step(batch)
        _assert_close(_parameters(trainer), jax.tree.map(lambda x, dx: x - 0.05 * dx, theta, v))


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 60, 100, 93800])
def test_the_learning_rate_falls_tenfold_after_each_third(steps):
    thirds = [0, steps // 3, 2 * steps // 3, steps - 1]
    step = np.unique(np.clip(np.add.outer(thirds, np.arange(-2, 3)), 0, steps - 1))
    found = jax.vmap(lambda i: module._learning_rate(0.05, steps, i))(jnp.asarray(step, jnp.int32))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, [0.05 / 10 ** (3 * int(i) // steps) for i in step], rtol=1e-6)


def test_the_schedule_that_sgd_follows_spans_the_whole_run(images, monkeypatch):
    seen, original = {}, optax.sgd

    def sgd(schedule, momentum):
        seen["rates"] = [float(schedule(jnp.int32(i))) for i in range(6)]
        return original(schedule, momentum)

    monkeypatch.setattr(optax, "sgd", sgd)
    module._Trainer(dataclasses.replace(CONFIG, epochs=3, lr=1.0), images)  # 2 batches of 8 from 20 images an epoch
    assert seen["rates"] == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])


def test_an_epoch_visits_images_once_each_in_an_order_of_its_own(images):
    numbers = np.broadcast_to(np.arange(20, dtype=np.float32)[:, None, None, None], images.x.shape)
    trainer = module._Trainer(CONFIG, dataclasses.replace(images, x=numbers))

    def order(epoch):
        return np.concatenate([x[:, 0, 0, 0].astype(int) for x, _ in trainer.batches(epoch)]).tolist()

    for epoch in (0, 1):
        assert len(order(epoch)) == len(set(order(epoch))) == 16
        assert order(epoch) == order(epoch)
        for x, labels in trainer.batches(epoch):
            np.testing.assert_array_equal(labels, images.labels[x[:, 0, 0, 0].astype(int)])
    assert order(0) != order(1)


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
