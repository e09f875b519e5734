"""Two runs against each other, paired over the people that both scored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np

from penchant.simulations.evaluation import paired_difference
from penchant.simulations.runs import RunFolder
from penchant.simulations.tables import differing

METRIC = "ndcg@10"


def differences(
    first: RunFolder, second: RunFolder, a: Mapping[str, Any], b: Mapping[str, Any]
) -> dict[str, dict[str, float]]:
    """Second minus first in NDCG@10, {"mean", "low", "high"} for each row that both have.

    Empty where the runs do not score the same people on the same data and split.
    """
    if differing(a, b):
        return {}
    out = {}
    for name in [row["name"] for row in a["runs"] if row["name"] in {r["name"] for r in b["runs"]}]:
        one, two = first.per_user(name), second.per_user(name)
        if np.array_equal(one["users"], two["users"]):
            out[name] = asdict(paired_difference(two[METRIC], one[METRIC], seed=0))
    return out
