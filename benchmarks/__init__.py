"""Side by side, in one run, with what a user would pick instead.

OpenBLAS reads these names when NumPy loads it; forced kernels would hold NumPy, SciPy and CVXPY back, so they go first.
"""

import os

for _forced in ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE"):
    os.environ.pop(_forced, None)
