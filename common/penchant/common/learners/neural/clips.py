"""Clips for unit "user" to begin with: the median length of one person's update, by model and by what of it trains.

    C = lr · c(model, part)

With one local epoch an update is close to proportional to the step size, so lengths are kept for a step size of 1. At
the median half of the people are cut, which suits most trainings where noise grows with C (Andrew et al. 2021,
https://arxiv.org/abs/1905.03871, section 3). The figures come from synthetic people only, and so cost nothing:

    python benchmarks/clips.py

Parts:
    all       everything, from random weights
    adapter   maps of rank 4 and what is not an item table, from co-occurrence's vectors; without mf's biases
    rest      what is not an item table, from co-occurrence's vectors
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from penchant.common.errors import InvalidConfig

Part = Literal["all", "adapter", "rest"]

MEDIAN: dict[str, dict[Part, float]] = {
    "mf": {"all": 9.12, "adapter": 12.7, "rest": 1.55},
    "mlp": {"all": 12.5, "adapter": 11.7, "rest": 11.7},
    "neumf": {"all": 14.4, "adapter": 14.3, "rest": 14.3},
    "gru": {"all": 2.89, "adapter": 6.64, "rest": 6.27},
    "lstm": {"all": 1.69, "adapter": 3.66, "rest": 3.4},
    "cnn-lstm": {"all": 0.0896, "adapter": 0.281, "rest": 0.261},
    "transformer": {"all": 11.4, "adapter": 8.87, "rest": 7.96},
}
"""c(model, part): what benchmarks/clips.py prints under 50 %."""


def part(adapter: int, freeze: Sequence[str]) -> Part:
    """What trains, by the settings of `FedAvgConfig`."""
    if adapter:
        return "adapter"
    return "rest" if any(name.startswith("item") for name in freeze) else "all"


def preset(model: str, trains: Part, lr: float) -> float:
    """C for a model of `MODELS`, to one digit.

    >>> preset("mf", "all", lr=0.05) < preset("mf", "all", lr=0.5)
    True

    Raises:
        InvalidConfig: a model that is not in the table.
    """
    if model not in MEDIAN:
        raise InvalidConfig(f"no clip is known for model {model}: give --clip")
    return float(f"{lr * MEDIAN[model][trains]:.1g}")
