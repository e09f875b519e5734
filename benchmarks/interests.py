"""How long an event and the next list take on one core: python benchmarks/interests.py

Medians over events of `update`, of `recommend(10)`, and of both, with vectors, transitions and a context at the sizes
named. Releases are random numbers: nothing here depends on what they say. Set OMP_NUM_THREADS=1 for one core.
"""

from __future__ import annotations

import argparse
import time

import numpy as np

from penchant.common.arrays import Float64
from penchant.common.catalogue import Catalogue
from penchant.common.interests import STILL, Dynamics, InterestConfig, InterestProfile
from penchant.common.taste import ItemSide, TasteConfig, Transitions


def seconds(side: ItemSide, dynamics: Dynamics, n: int, context: dict[str, str] | None) -> Float64:
    """float64[n, 2], of each event's update and of the list after it."""
    catalogue = Catalogue(ids=tuple(map(str, range(len(side.vectors)))))
    profile = InterestProfile(side, catalogue, InterestConfig(dynamics=dynamics))
    out = np.empty((n, 2))
    for k, item in enumerate(np.random.default_rng(1).permutation(len(catalogue))[:n].tolist()):
        start = time.perf_counter()
        profile.update(item, context=context)
        between = time.perf_counter()
        profile.recommend(10, context=context)
        out[k] = between - start, time.perf_counter() - between
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description="Milliseconds of an event and of the next list.")
    parser.add_argument("--items", type=int, default=10_000)
    parser.add_argument("--dims", type=int, default=96)
    parser.add_argument("--events", type=int, default=500)
    args = parser.parse_args()
    random = np.random.default_rng(0)
    vectors = (random.standard_normal((args.items, args.dims)) / np.sqrt(args.dims)).astype(np.float32)
    follows = Transitions(*random.standard_normal((2, args.items, 32)).astype(np.float32))
    popularity = random.random(args.items).astype(np.float32)
    side = ItemSide(vectors, popularity, TasteConfig(popularity=0.3, transition=0.4), follows)
    print(f"{args.items:,} items, d = {args.dims}, {args.events} events; median ms")
    print(f"{'profile':28} {'update':>8} {'list':>8} {'both':>8}")
    moment = {"hour": "evening", "weekday": "6"}
    for name, dynamics, context in (
        ("still", STILL, None),
        ("adaptive, drift", Dynamics(), None),
        ("adaptive, drift, context", Dynamics(), moment),
    ):
        found = 1000 * seconds(side, dynamics, args.events, context)
        update, listing = np.median(found, axis=0)
        print(f"{name:28} {update:8.3f} {listing:8.3f} {np.median(found.sum(axis=1)):8.3f}")


if __name__ == "__main__":
    main()
