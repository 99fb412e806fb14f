"""The Python of docs/scaling.md runs as it stands, each block in a process of its own; only Ray's is not installed."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

BLOCKS = re.findall(r"```python\n(.*?)```", (Path(__file__).parents[1] / "docs" / "scaling.md").read_text(), re.DOTALL)
HANG = 100  # seconds after which a process counts as hung


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.mark.parametrize("names", ["samples_mesh())  # N must", "jax.distributed", "ufm.sweep("])
def test_blocks_run(names, tmp_path):
    (block,) = (block for block in BLOCKS if names in block)
    command = [sys.executable, "-c", block, "0", "1", f"127.0.0.1:{free_port()}"]
    environment = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=HANG)
    assert ended.returncode == 0, ended.stderr


def test_there_is_no_other_block():
    assert len(BLOCKS) == 4
    assert sum("import ray" in block for block in BLOCKS) == 1
