"""What the device's store costs: python benchmarks/store.py

Each append waits until the disk has it, so its rate is the disk's; `--folder` says which. Medians of repetitions.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from penchant.client._keys import KeyFile
from penchant.client._retention import Retention
from penchant.client._store import Event, Store


def events(n: int) -> list[Event]:
    return [
        Event(
            item=f"film:{i % 4000}", kind="watch", at_ms=1_760_000_000_000 + i, dwell_s=5400.0, context={"at": "home"}
        )
        for i in range(n)
    ]


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def measure(folder: Path, n: int, repeat: int, profile: bytes) -> dict[str, tuple[float, str]]:
    """Each figure with its unit; n events are in the store when it is opened, read and salvaged."""
    key, everything = KeyFile(folder / "key"), Retention(days=None, max_events=None)

    def opened() -> Store:
        return Store.open(folder / "store", key=key, retention=everything)

    some, found = events(n), {}

    def both(store: Store, event: Event) -> None:
        with store.transaction():
            store.append(event)
            store.put("profile", profile)

    with opened() as store:
        single = [seconds(lambda event=event: store.append(event)) for event in some[: 20 * repeat]]  # type: ignore[misc]  # a lambda's default
        found["append one"] = (1e3 * statistics.median(single), "ms")
        together = [seconds(lambda event=event: both(store, event)) for event in some[: 20 * repeat]]  # type: ignore[misc]  # a lambda's default
        found[f"append one with a profile of {len(profile) >> 10} KiB"] = (1e3 * statistics.median(together), "ms")
    with opened() as store:
        before = (folder / "store" / "store.db").stat().st_size
        taken = seconds(lambda: store.append_all(some))
        found["append in one transaction"] = (len(some) / taken, "events/s")
    size = (folder / "store" / "store.db").stat().st_size - before
    found["bytes per 1,000 events"] = (1000 * size / len(some), "bytes")
    times = [seconds(lambda: opened().close()) for _ in range(repeat)]
    with opened() as store:
        found[f"open and close with {store.n_events:,} events"] = (1e3 * statistics.median(times), "ms")
        found["read events"] = (store.n_events / seconds(lambda: sum(1 for _ in store.events())), "events/s")
        found["check"] = (store.n_events / seconds(store.check), "events/s")
        found["get the profile"] = (
            1e3 * statistics.median(seconds(lambda: store.get("profile")) for _ in some[:20]),
            "ms",
        )
    found["salvage"] = (seconds(lambda: Store.salvage(folder / "store", key=key)), "s")
    with opened() as store:
        found["forget"] = (1e3 * seconds(lambda: store.forget(keep={"spent": 1})), "ms")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="What the device's store costs.")
    parser.add_argument("--events", type=int, default=50_000)
    parser.add_argument("--repeat", type=int, default=15)
    parser.add_argument("--profile", type=int, default=150_000, help="bytes of a profile, as of 96 columns")
    parser.add_argument("--folder", type=Path, help="where; a temporary folder if not given")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        for name, (value, unit) in measure(Path(folder), args.events, args.repeat, os.urandom(args.profile)).items():
            print(f"{name:40} {value:12,.2f} {unit}")


if __name__ == "__main__":
    main()
