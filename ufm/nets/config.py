"""What a training run is made of; its fields are the defaults, the documentation and the command line at once."""

from dataclasses import dataclass
from typing import Literal

import numpy as np


@dataclass(frozen=True)
class TrainConfig:
    """ResNet18 on real images by SGD with momentum and a step schedule (zhu2021, papyan2020)."""

    data: str = "digits"
    """digits, fashion-mnist, mnist or cifar10."""
    limit: int | None = None
    """Use this many training images, the same number of each class; all of them if not given."""
    width: int = 8
    """Channels of the first stage; 64 is the published ResNet18."""
    d: int | None = None
    """Feature dimension; 8 times the width if not given."""
    stem: Literal["small", "imagenet"] = "small"
    """3×3 convolution for small images, or the 7×7 one with stride and pooling."""
    epochs: int = 60
    """Passes over the training images."""
    batch: int = 128
    """Images per step; the few left over at the end of an epoch's order sit it out."""
    lr: float = 0.05
    """Learning rate at the start; divided by 10 after one third and again after two thirds of the epochs."""
    momentum: float = 0.9
    """Heavy-ball momentum of SGD."""
    regulariser: Literal["decay", "features"] = "decay"
    """decay: lam_W/2 of the squared norm of ALL weights. features: lam_W/2 ‖W‖² + lam_H/2 ‖H‖² + lam_b/2 ‖b‖² of the
    classifier and the unnormalised penultimate features alone, as in the unconstrained features model."""
    lam_W: float = 5e-4
    """λ_W; also the weight decay."""
    lam_H: float | None = None
    """λ_H per sample, for `features` only; lam_W / N if not given, which weighs W and one mean feature alike."""
    lam_b: float | None = None
    """λ_b, for `features` only; lam_W if not given."""
    measure_every: int = 5
    """Epochs between measurements; the first and the last are always measured."""
    seed: int = 0
    """Seeds the initial weights and the order of images."""


def check_config(config: TrainConfig) -> None:
    """Refuse numbers that no run can be made of; the data's own are checked when they are read."""
    if config.regulariser not in ("decay", "features"):
        raise ValueError(f"regulariser must be 'decay' or 'features', got {config.regulariser!r}")
    positive = {name: getattr(config, name) for name in ("epochs", "batch", "measure_every", "lr", "lam_W")}
    for name, value in positive.items():
        if not (np.isfinite(value) and value > 0):
            raise ValueError(f"{name} must be positive, got {value}")
    if not 0 <= config.momentum < 1:
        raise ValueError(f"momentum must be in [0, 1), got {config.momentum}")
    for name in ("lam_H", "lam_b"):
        value = getattr(config, name)
        if value is not None and config.regulariser != "features":
            raise ValueError(f"{name} belongs to the regulariser 'features', got {config.regulariser!r}")
        if value is not None and not (np.isfinite(value) and (value > 0 or (value == 0 and name == "lam_b"))):
            raise ValueError(f"{name} must be positive, got {value}")
