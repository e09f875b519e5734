"""What the SDK costs on a device: PYTHONPATH=. python benchmarks/client.py [--sizes 4000,100000,1000000] [--rounds]

Import and memory in processes of their own; the rest through `Client`, on a bundle of random numbers (d = 32): nothing
here depends on what they say. Set OMP_NUM_THREADS=1 for one core.
"""

from __future__ import annotations

import argparse
import math
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from penchant.client import Client
from penchant.client._training import Trainer, Training
from penchant.common import config
from penchant.common.artifacts.release import Release
from penchant.common.artifacts.sealing import RoundKey, RoundOpener, seal
from penchant.common.artifacts.signing import SigningKey
from penchant.common.catalogue import Catalogue
from penchant.common.interactions import History, Interactions
from penchant.common.learners import registry
from penchant.common.privacy.plan import PrivacyPlan, SumSpec
from penchant.common.streams import Streams
from penchant.common.wire import Order
from tests.client.apps import NOW, Operator

_RSS = """
import pathlib, resource, sys, time
start = time.perf_counter()
import penchant.client
from penchant.client import Client
imported = time.perf_counter() - start
if len(sys.argv) > 1:
    with Client.open(sys.argv[1]) as me:
        me.recommend(10)
listed, most = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
if (status := pathlib.Path("/proc/self/status")).exists():  # Linux counts the parent's memory at the fork in ru_maxrss
    most = next(line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmHWM"))
print(imported, listed, int(most) / 1024)
"""


def process(*argv: str) -> tuple[float, float, float]:
    """Medians of five: seconds to import, seconds until a list is there, and MiB at most."""
    found = [
        [float(word) for word in subprocess.check_output([sys.executable, "-c", _RSS, *argv], text=True).split()]
        for _ in range(5)
    ]
    imported, listed, rss = np.median(found, axis=0).tolist()
    return imported, listed, rss


def milliseconds(call: Callable[[int], object], n: int) -> tuple[float, float]:
    """p50 and p99."""
    out = []
    for i in range(n):
        start = time.perf_counter()
        call(i)
        out.append(1000 * (time.perf_counter() - start))
    p50, p99 = np.percentile(out, [50, 99]).tolist()
    return p50, p99


def catalogue(n: int) -> Catalogue:
    return Catalogue(ids=tuple(f"film:{i}" for i in range(n)), topics=tuple((f"topic {i % 20}",) for i in range(n)))


def size(folder: Path, n: int, events: int) -> None:
    state = folder / f"state-{n}"
    bundle = Operator(catalogue=catalogue(n)).bundle(folder / f"{n}.bundle", d=32)
    Client.open(state, bundle=bundle).close()
    _, listed, rss = process(str(state))
    with Client.open(state) as me:
        me.recommend(10)
        before = sum(path.stat().st_size for path in state.glob("store.db*"))
        observed = milliseconds(lambda i: me.observe(f"film:{i}", "watch"), events)
        ranked = []
        for i in range(min(events, 200)):
            me.observe(f"film:{events + i}", "watch")
            start = time.perf_counter()
            me.recommend(10)
            ranked.append(1000 * (time.perf_counter() - start))
    after = sum(path.stat().st_size for path in state.glob("store.db*"))
    per_1000 = (after - before) / (events + min(events, 200)) * 1000 / 1024
    p50, p99 = np.percentile(ranked, [50, 99])
    print(
        f"{n:>9,} {1000 * listed:>14.0f} {rss:>8.0f} {p50:>11.2f} {p99:>6.2f} {observed[0]:>12.2f} {observed[1]:>6.2f} "
        f"{per_1000:>14.0f}"
    )


def network(folder: Path, name: str, n: int, events: int) -> None:
    """A release that is a network, with weights as they start, and a person with more history than it reads."""
    from penchant.common.learners.neural.fedavg import FedAvg, FedAvgConfig
    from penchant.common.learners.neural.models import ModelConfig

    items = catalogue(n)
    learner = FedAvg(items, FedAvgConfig(model=ModelConfig(name=name)))
    model, settings = Release(learner.init(Streams(0)), None).to_bytes(), config.encode(learner.config)
    operator = Operator(catalogue=items)
    bundle = operator.bundle(folder / f"{name}.bundle", model=model, learner="fedavg", settings=settings)
    with Client.open(folder / name, bundle=bundle) as me:
        for i in range(events):
            me.observe(f"film:{i}", "watch")
        ranked, first, others = [], [], []
        for i in range(200):
            me.observe(f"film:{events + i}", "watch")
            ranked.append(milliseconds(lambda _: me.recommend(10), 1)[0])
            if i % 10 == 0:
                first.append(milliseconds(lambda _: me.explain(f"film:{n - 1}"), 1)[0])
                others.append(milliseconds(lambda k: me.explain(f"film:{n - 2 - k}"), 9)[0])
    p50, p99 = np.percentile(ranked, [50, 99])
    print(f"{name:20} {p50:8.2f} {p99:8.2f} {np.median(first):12.1f} {np.median(others):8.1f}")


def history() -> History:
    random = np.random.default_rng(0)
    return History(
        random.choice(3706, 200, replace=False).astype(np.int32),
        NOW + np.arange(200, dtype=np.int64) * 60_000,
        np.ones(200, np.float32),
    )


def contribution(name: str, settings: Mapping[str, Mapping[str, str]]) -> None:
    items = catalogue(3706)
    learner = registry.build(name, settings, items)
    state, mine = learner.init(Streams(0)), history()
    p50, p99 = milliseconds(lambda i: learner.contribution(state, mine, Streams(i)), 20)
    size = sum(8 * math.prod(shape) for shape in learner.shapes(state).values())  # a sum is of float64
    print(f"{' '.join((name, *settings.get('model', {}).values())):20} {p50:8.2f} {p99:8.2f} {size / 1024:12.0f}")


def worker() -> None:
    """A training of matrix factorisation in a worker, from start to end, and the most memory that one had."""
    items = catalogue(3706)
    settings: dict[str, Any] = {"model": {"name": "mf"}}
    learner = registry.build("fedavg", settings, items)
    state = learner.released(learner.init(Streams(0)))
    plan = PrivacyPlan(
        unit="none",
        n_users=1,
        delta=1e-5,
        sampling="none",
        cohort=1,
        sums=(SumSpec(name="update", rounds=1, clip_norm=1.0),),
        max_participations=1,
    )
    order = Order(round=1, attempt=0, plan=plan, learner="fedavg", settings=settings, users=(0,))
    mine = Interactions.one(history(), len(items))
    trainer = Trainer(lambda: items, Training())
    p50, p99 = milliseconds(lambda i: trainer.answer(order, state, mine, taken=0, look=lambda: None), 3)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    print(f"\nfedavg mf in a worker: {p50:.0f} ms, at most {p99:.0f}; {peak:.0f} MiB, none of them the app's")


def sealing() -> None:
    key, plan = SigningKey.generate(), "a" * 64
    opener = RoundOpener(key, app_id="films", population="default", plan=plan, round=1, attempt=0)
    statement = opener.statement
    to, values = RoundKey.read(statement, key.public), {"sum": np.ones(1 << 17)}
    p50, _ = milliseconds(lambda i: seal(values, statement, to), 20)
    print(f"sealing {len(seal(values, statement, to)) / 1e6:.1f} MB: {p50:.1f} ms")


def main() -> None:
    parser = argparse.ArgumentParser(description="Milliseconds and bytes of the SDK's calls.")
    parser.add_argument("--sizes", default="4000,100000,1000000")
    parser.add_argument("--events", type=int, default=1000)
    parser.add_argument("--rounds", action="store_true", help="only what taking part in a round costs")
    args = parser.parse_args()
    if not args.rounds:
        calls(args.sizes, args.events)
    print("contribution of 200 interactions, 3,706 items, p50 and p99 ms, KiB sent")
    for name, settings in (
        ("cooccurrence", {}),
        ("als", {}),
        *(("fedavg", {"model": {"name": model}}) for model in ("mf", "mlp", "neumf", "gru", "transformer")),
    ):
        contribution(name, settings)
    worker()
    sealing()


def calls(sizes: str, events: int) -> None:
    imported, _, rss = process()
    print(f"import: {1000 * imported:.0f} ms, {rss:.0f} MiB\n")
    print("    items  ms to 1st list      MiB  list p50 ms    p99  event p50 ms    p99  KiB/1000 kept")
    with tempfile.TemporaryDirectory() as folder:
        for n in map(int, sizes.split(",")):
            size(Path(folder), n, events)
        print(
            "\na release that is a network, 4,000 items: list p50 and p99 ms; p50 of a first explanation, and of others"
        )
        for name in ("gru", "lstm", "cnn-lstm", "transformer", "mlp", "neumf"):
            network(Path(folder), name, 4000, 300)
    print()


if __name__ == "__main__":
    main()
