"""float64 everywhere, and every annotated shape of the package checked at run time."""

import jax
from jaxtyping import install_import_hook

jax.config.update("jax_enable_x64", True)
install_import_hook("ufm", "beartype.beartype")
