"""Critical points that are not global minima, in closed form: coarse simplex ETFs (THEORY 1.6)."""

import numpy as np

from ufm.model.geometry import simplex_etf
from ufm.model.problem import Params, Problem
from ufm.theory.optimum import class_size, frame_point, margin, wrong_class_probability


def coarse_etf(problem: Problem, m: int) -> Params:
    """The critical point whose K/m successive classes are merged into each of m groups, the groups on a simplex ETF.

    The logit gap between groups is t_m = log(1/(g√n s) − m + 1), g = K/m. m = K is the global minimiser and m = 1 the
    origin; any other is a strict saddle while K√n s < 1, with ‖∇_Z g‖₂ = 1/(K√n).

    Raises:
        ValueError: if m does not divide K, or as balanced_minimiser does.

    Source: THEORY 1.6, derived for this project.
    """
    K = problem.K
    if not 1 <= m <= K or K % m:
        raise ValueError(f"m must divide the K = {K} classes into equal groups, got {m}")
    group = K // m
    q = group * wrong_class_probability(class_size(problem), problem.s)
    return frame_point(problem, np.repeat(simplex_etf(m, problem.d), group, axis=0), margin(m, q))
