"""Training a network into collapse, measured against the theory as it goes; killed at any moment, it resumes."""

import dataclasses
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float
from orbax.checkpoint import v1 as ocp
from tqdm import tqdm

from ufm.lab.compare import compare, problem_of_features
from ufm.lab.records import as_json, create_folder, provenance, read_json, write_json
from ufm.measure.collapse import collapse_metrics
from ufm.measure.features import Features, save_features
from ufm.nets.config import TrainConfig, check_config
from ufm.nets.data import Images, load
from ufm.nets.resnet import ResNet18

EVALUATION_BATCH = 500


def train(config: TrainConfig, folder: str | Path, *, resume: bool = False, quiet: bool = False) -> Path:
    """A run in folder: config.json, history.json, features.npz and summary.json, all in open formats.

    After every epoch the state is checkpointed, so that a killed run, resumed, ends with the same numbers.

    Args:
        config: what to train.
        folder: a new folder; with resume, that of a run of the same config.
        resume: continue from the last finished epoch.
        quiet: no progress bar.

    Raises:
        ValueError: if an argument, the data or the folder is not as it must be.
        ArithmeticError: if the loss stops being finite; what was measured until then is kept.
    """
    start = time.perf_counter()
    check_config(config)
    images, test = load(config.data, "train", limit=config.limit), load(config.data, "test")
    config = _resolved(config, images)
    trainer = _Trainer(config, images)
    folder = _open_run(config, Path(folder), resume)
    with ocp.training.Checkpointer(
        (folder / "checkpoints").resolve(),
        preservation_policy=ocp.training.preservation_policies.LatestN(1),
        cleanup_tmp_directories=True,
    ) as checkpoints:
        history = _restore(trainer, checkpoints, folder)
        for epoch in tqdm(range(trainer.epoch, config.epochs), desc=str(folder), unit="epoch", disable=quiet):
            row = trainer.run_epoch()
            if epoch == 0 or trainer.epoch % config.measure_every == 0 or trainer.epoch == config.epochs:
                history.append(row | observe(config, trainer, images, test))
                write_json(folder / "history.json", as_json(history))
            checkpoints.save(trainer.epoch, trainer.state())
    save_features(folder / "features.npz", collect(trainer.model, images))
    write_json(folder / "summary.json", as_json(history[-1]) | provenance(start))
    return folder


def _resolved(config: TrainConfig, images: Images) -> TrainConfig:
    """The config with every default that depends on the data filled in."""
    N = len(images.labels)
    if config.batch > N:
        raise ValueError(f"batch must be at most the {N} training images, got {config.batch}")
    if config.d is not None and config.d < images.K - 1:
        raise ValueError(f"d must be at least K - 1 = {images.K - 1} for the theory to compare with, got {config.d}")
    if config.regulariser == "decay":
        return config
    lam_H = config.lam_W / N if config.lam_H is None else config.lam_H
    lam_b = config.lam_W if config.lam_b is None else config.lam_b
    return dataclasses.replace(config, lam_H=lam_H, lam_b=lam_b)


def _open_run(config: TrainConfig, folder: Path, resume: bool) -> Path:
    if not resume:
        create_folder(folder)
        write_json(folder / "config.json", as_json(config))
        return folder
    found, asked = read_json(folder / "config.json"), as_json(config)
    if not isinstance(found, dict) or found.keys() != asked.keys():
        raise ValueError(f"{folder} holds no training run of this version: name the folder of one")
    if changed := [k for k in asked if found[k] != asked[k]]:
        raise ValueError(f"{folder} was made with another {', '.join(changed)}: resume with the same config")
    return folder


class _Trainer:
    """The model, its optimiser and the epoch they have reached."""

    def __init__(self, config: TrainConfig, images: Images) -> None:
        self.config, self.images, self.epoch = config, images, 0
        self.key = jax.random.key(config.seed)
        self.model = ResNet18(
            images.K,
            rngs=nnx.Rngs(jax.random.fold_in(self.key, 0)),
            in_channels=images.x.shape[-1],
            width=config.width,
            d=config.d,
            stem=config.stem,
        )
        steps = len(images.labels) // config.batch * config.epochs
        chain = optax.chain(
            optax.add_decayed_weights(config.lam_W if config.regulariser == "decay" else 0.0),
            optax.sgd(partial(_learning_rate, config.lr, steps), config.momentum),
        )
        self.optimiser = nnx.Optimizer(self.model, chain, wrt=nnx.Param)
        self._step = nnx.jit(partial(_step, _penalty(config, len(images.labels))))

    def batches(self, epoch: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The images of an epoch in its own order, in whole batches."""
        N, size = len(self.images.labels), self.config.batch
        order = np.asarray(jax.random.permutation(jax.random.fold_in(self.key, epoch + 1), N))
        for start in range(0, N - size + 1, size):
            chosen = order[start : start + size]
            yield self.images.x[chosen], self.images.labels[chosen]

    def run_epoch(self) -> dict[str, Any]:
        """One more epoch of steps: its number, its seconds and the mean of its losses."""
        start = time.perf_counter()
        loss = float(np.mean([self.step(batch) for batch in self.batches(self.epoch)]))
        self.epoch += 1
        if not np.isfinite(loss):
            raise ArithmeticError(f"the loss is {loss} in epoch {self.epoch}: lower lr, or the λ's, and start anew")
        return {"epoch": self.epoch, "seconds": time.perf_counter() - start, "running_loss": loss}

    def step(self, batch: tuple[np.ndarray, np.ndarray]) -> Array:
        """One step of SGD; the regularised loss before it."""
        return self._step(self.model, self.optimiser, *batch)

    def state(self) -> dict[Any, Any]:
        """Everything that the rest of the run depends on, as plain arrays."""
        return nnx.to_pure_dict(nnx.state((self.model, self.optimiser)))

    def restore(self, state: dict[Any, Any]) -> None:
        """Back to a saved state."""
        target = nnx.state((self.model, self.optimiser))
        nnx.replace_by_pure_dict(target, state)
        nnx.update((self.model, self.optimiser), target)


def _penalty(config: TrainConfig, N: int) -> tuple[np.float32, np.float32, np.float32]:
    """λ_W, N λ_H (a batch mean of ‖h‖² estimates that of all N) and λ_b; zero where the weights decay instead."""
    if config.lam_H is None or config.lam_b is None:
        return np.float32(0), np.float32(0), np.float32(0)
    return np.float32(config.lam_W), np.float32(N * config.lam_H), np.float32(config.lam_b)


def _learning_rate(lr: float, steps: int, step: Array) -> Float[Array, ""]:
    return jnp.float32(lr) * jnp.float32(0.1) ** (jnp.float32(step * 3) // jnp.float32(max(steps, 1)))


def _step(penalty: tuple, model: ResNet18, optimiser: nnx.Optimizer, x: Array, labels: Array) -> Array:
    lam_W, lam_H_total, lam_b = penalty

    def loss(model: ResNet18) -> Array:
        h = model.features(x)
        fit = jnp.mean(optax.softmax_cross_entropy_with_integer_labels(model.head(h), labels))
        W, b = _classifier(model)
        squares = lam_W * jnp.sum(W**2) + lam_b * jnp.sum(b**2) + lam_H_total * jnp.mean(jnp.sum(h**2, axis=1))
        return fit + squares / 2

    value, grads = nnx.value_and_grad(loss)(model)
    optimiser.update(model, grads)
    return value


def _classifier(model: ResNet18) -> tuple[Array, Array]:
    """Wᵀ (d×K, as nnx keeps it) and b."""
    kernel, bias = model.head.kernel, model.head.bias
    assert kernel is not None
    assert bias is not None
    return kernel[...], bias[...]


@nnx.jit
def _features(model: ResNet18, x: Array) -> Array:
    return model.features(x)


def collect(model: ResNet18, images: Images) -> Features:
    """The network's features of all images in evaluation, with its classifier, float32."""
    evaluation = nnx.view(model, use_running_average=True)
    rows = [
        np.asarray(_features(evaluation, jnp.asarray(images.x[i : i + EVALUATION_BATCH])))
        for i in range(0, len(images.labels), EVALUATION_BATCH)
    ]
    W, b = (np.asarray(x) for x in _classifier(model))
    return Features(np.concatenate(rows).T, images.labels, W.T, b)


def observe(config: TrainConfig, trainer: _Trainer, images: Images, test: Images) -> dict[str, Any]:
    """Errors, collapse metrics, and the point the features are in the model with the regulariser's λ's.

    Coupled weight decay has no λ_H; the one that its balance implies is used and recorded.
    """
    features = collect(trainer.model, images)
    lam_b = config.lam_W if config.lam_b is None else config.lam_b
    problem, point = problem_of_features(features, lam_W=config.lam_W, lam_H=config.lam_H, lam_b=lam_b)
    sides, certificate = compare(problem, point)
    return {
        "train_error": error(features),
        "test_error": error(collect(trainer.model, test)),
        "lam_H": float(problem.lam_H),
        "gap": float(certificate.gap),
        "dual_norm_over_s": float(certificate.dual_norm / certificate.threshold),
        "collapse": dataclasses.asdict(collapse_metrics(features.H, features.labels, features.W, features.b)),
        **sides,
    }


def error(features: Features) -> float:
    """Fraction of samples whose largest logit is not their label's."""
    scores = np.asarray(features.W) @ np.asarray(features.H)
    scores = scores + np.asarray(features.b)[:, None]
    return float(np.mean(scores.argmax(0) != features.labels))


def _restore(trainer: _Trainer, checkpoints: Any, folder: Path) -> list[dict[str, Any]]:
    """Continue from the last finished epoch, forgetting what was measured after it."""
    if checkpoints.latest is None:
        return []
    trainer.restore(checkpoints.load(checkpoints.latest.step, trainer.state()))
    trainer.epoch = checkpoints.latest.step
    return [row for row in read_json(folder / "history.json") if row["epoch"] <= trainer.epoch]
