"""Compiled training of simulated people, where Numba is installed and there is a kernel for the model."""

from __future__ import annotations

from collections.abc import Set
from typing import TYPE_CHECKING

from penchant.common.learners.neural.models import InterestModel
from penchant.common.learners.training import LocalTraining

if TYPE_CHECKING:
    from penchant.common.learners.neural.fused.cohort import Cohort


def compiled(model: InterestModel, config: LocalTraining, frozen: Set[str], threads: int) -> Cohort | None:
    """The kernels for this training; None where there are none, or no Numba."""
    try:
        from penchant.common.learners.neural.fused.cohort import Cohort, fits
    except ModuleNotFoundError:
        return None
    return Cohort(model, config, frozen, threads) if fits(model, config) else None
