"""The compiled programs that runs of the command share."""

import os
import re
from pathlib import Path

import jax

from ufm.lab.records import processor


def use_cache() -> Path:
    """Keep compiled programs for later runs in the folder that JAX_COMPILATION_CACHE_DIR names, or in the user's cache.

    There it has the processor's name, since what is compiled for one need not run on another.
    """
    if jax.config.values["jax_compilation_cache_dir"] is None:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        folder = home / "ufm" / re.sub(r"\W+", "-", processor())
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    return Path(jax.config.values["jax_compilation_cache_dir"])
