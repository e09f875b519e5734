"""Sequence models of people trained together beside one by one: python benchmarks/together.py

Ratios of the least processor time of each way, in turns and in one process on one thread, for a sum over people whose
numbers of items are spread over 20 to 200; clips included. `learners/neural/together.py` says what was found.
"""

from __future__ import annotations

import argparse
import sys
import time

import numpy as np
import torch

from penchant.common.catalogue import Catalogue
from penchant.common.interactions import Interactions
from penchant.common.learners.contract import Learner
from penchant.common.learners.neural.fedavg import FedAvg, FedAvgConfig
from penchant.common.learners.neural.models import MODELS, ModelConfig, reads_history
from penchant.common.learners.training import LocalTraining
from penchant.common.privacy.sums import Clip
from penchant.common.streams import Streams


def seconds(learner: FedAvg, people: Interactions, turns: int) -> tuple[float, float]:
    """The least processor time of one by one and of together."""
    state, times = learner.init(Streams(0)), np.empty((2, turns))
    for turn in range(turns):
        for way, total in enumerate((Learner._partial_sum, FedAvg._partial_sum)):
            start = time.process_time()
            total(learner, state, people, Clip(1.0), _person)
            times[way, turn] = time.process_time() - start
    alone, together = times.min(axis=1)
    return float(alone), float(together)


def _person(row: int) -> Streams:
    return Streams(1).scope("person", row)


def main() -> int:
    parser = argparse.ArgumentParser(description="Sequence models of people trained together beside one by one.")
    parser.add_argument("--people", type=int, default=64)
    parser.add_argument("--items", type=int, default=1700)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--turns", type=int, default=4)
    args = parser.parse_args()
    torch.set_num_threads(1)
    random = np.random.default_rng(0)
    lengths = np.exp(random.uniform(np.log(20), np.log(200), args.people)).astype(int)
    histories = [random.choice(args.items, length, replace=False).tolist() for length in lengths]
    people, catalogue = Interactions.of(histories, args.items), Catalogue(ids=tuple(map(str, range(args.items))))
    for name in filter(reads_history, MODELS):
        config = FedAvgConfig(model=ModelConfig(name=name), local=LocalTraining(epochs=args.epochs))
        alone, together = (1000 * t / args.people for t in seconds(FedAvg(catalogue, config), people, args.turns))
        print(f"{name:12} {alone:6.2f} ms alone, {together:6.2f} ms together: {alone / together:.2f} times as fast")
    return 0


if __name__ == "__main__":
    sys.exit(main())
