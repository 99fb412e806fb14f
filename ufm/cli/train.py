"""A network trained into collapse on real images."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from ufm.cli.report import print_table
from ufm.lab.records import read_json
from ufm.nets.config import TrainConfig


@dataclass(frozen=True)
class Train:
    """Train ResNet18 on real images into collapse, measured against the theory as it goes, and draw training.png."""

    out: tyro.conf.Positional[Path]
    """Folder of the run: new, or with --resume that of a run that was stopped."""
    config: Annotated[TrainConfig, tyro.conf.arg(name="")] = field(default_factory=TrainConfig)
    resume: bool = False
    """Continue from the last finished epoch; the numbers are those of a run that was never stopped."""
    json: bool = False
    """Print the last measurement as JSON instead of a table."""

    def run(self) -> int:
        """Run it; the exit status."""
        from ufm.lab.plots import draw_training
        from ufm.nets.train import train

        folder = train(self.config, self.out, resume=self.resume, quiet=self.json)
        draw_training(folder)
        last = read_json(folder / "history.json")[-1]
        if self.json:
            print(json.dumps(last))
        else:
            print(folder)
            print_table(last)
        return 0
