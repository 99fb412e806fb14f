"""The compiled programs that runs of the command share."""

import contextlib
import os
import re
from pathlib import Path

import jax

from ufm.lab.records import processor


def use_cache() -> str | None:
    """The folder that keeps compiled programs for later runs, or None if it cannot be made.

    It is the one that JAX_COMPILATION_CACHE_DIR names, or in the user's cache.

    There it has the processor's name, since what is compiled for one need not run on another.
    """
    if jax.config.values["jax_compilation_cache_dir"] is None:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        folder = home / "ufm" / re.sub(r"\W+", "-", processor())
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            jax.config.update("jax_compilation_cache_dir", str(folder))
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    return jax.config.values["jax_compilation_cache_dir"]
