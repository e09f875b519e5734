"""How long one person's update is, by model and by what of it trains: python benchmarks/clips.py

The medians are the table in `learners/neural/clips.py`. People, items and weights are synthetic.
"""

from __future__ import annotations

import argparse

import numpy as np

from penchant.common.arrays import Float64
from penchant.common.interactions import Interactions
from penchant.common.learners.cooccurrence import CooccurrenceConfig
from penchant.common.learners.neural.clips import Part, part
from penchant.common.learners.neural.fedavg import FedAvg, FedAvgConfig
from penchant.common.learners.neural.models import MODELS, ModelConfig, reads_history
from penchant.common.learners.training import LocalTraining
from penchant.common.privacy.sums import Clip, norm
from penchant.common.streams import Streams
from penchant.simulations.data.dataset import Dataset
from penchant.simulations.data.loaders import load

PEOPLE = "synthetic:users=1000,items=1000,interactions=60,seed=0"
LR = {True: 0.5, False: 0.05}  # the simulation's, for models that read the history and for others


def lengths(data: Dataset, model: str, trains: Part, n: int) -> Float64:
    """L2 norms of n people's updates over the step size."""
    lr, streams, people = LR[reads_history(model)], Streams(0), data.interactions
    freeze, adapter = {"all": ((), 0), "adapter": ((), 4), "rest": (tables(model), 0)}[trains]
    if model == "mf" and trains == "adapter":
        freeze = ("bias",)
    assert part(adapter, freeze) == trains
    learner = FedAvg(
        data.catalogue,
        FedAvgConfig(
            model=ModelConfig(name=model),
            local=LocalTraining(lr=lr),
            start="random" if trains == "all" else "co-occurrence",
            cooccurrence=CooccurrenceConfig(head=1000, dims=32),
            freeze=freeze,
            adapter=adapter,
        ),
    )
    state = learner.init(streams)
    while "popularity" in state:
        state = learner.apply(state, learner.partial_sum(state, people, Clip(1.0), _unused), people.n_users)
    chosen: Interactions = people.select(range(n))
    found = [norm(learner.contribution(state, h, streams.scope("local", u))) for u, h in enumerate(chosen)]
    return np.array(found) / lr


def tables(model: str) -> tuple[str, ...]:
    return ("item_product", "item_network") if model == "neumf" else ("item",)


def _unused(row: int) -> Streams:
    return Streams(row)


def main() -> None:
    parser = argparse.ArgumentParser(description="Lengths of updates over the step size, by model and part.")
    parser.add_argument("--people", type=int, default=100)
    args = parser.parse_args()
    data = load(PEOPLE)
    parts: tuple[Part, ...] = ("all", "adapter", "rest")
    print(f"{'model':12} {'part':8} {'10 %':>8} {'50 %':>8} {'90 %':>8}")
    for model in MODELS:
        for trains in parts:
            low, middle, high = np.quantile(lengths(data, model, trains, args.people), (0.1, 0.5, 0.9))
            print(f"{model:12} {trains:8} {low:8.3g} {middle:8.3g} {high:8.3g}")


if __name__ == "__main__":
    main()
