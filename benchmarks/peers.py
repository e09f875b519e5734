"""penchant beside a plain loop and Flower's simulation on Ray: the same work in one run: python benchmarks/peers.py

Each way runs in a process of its own, in turns, so that whatever else the machine does meets them all; figures are
medians over the turns. All draw the same people in the same rounds, which is checked. `--check` shows that they do the
same arithmetic. What each way is: docs/bench.md, and peer_work.py.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
WAYS = ("penchant", "loop", "flower")
_ONE_THREAD = dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
_PEER = "from peer_work import main; main()"


def run(way: str, options: Sequence[str]) -> dict[str, Any]:
    """One way, once, in a process of its own.

    Raises:
        RuntimeError: it failed; its own words come with it.
    """
    command = [sys.executable, "-c", _PEER, way, *options]
    if way == "penchant":
        command = [sys.executable, "-m", "penchant.common.cli", "bench", "--json", *options]
    path = os.pathsep.join(filter(None, (str(FOLDER), os.environ.get("PYTHONPATH"))))  # Ray's workers need it too
    environment = {**os.environ, **_ONE_THREAD, "PYTHONPATH": path}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{way} failed:\n{done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def compare(ways: Sequence[str], repeats: int, options: Sequence[str]) -> dict[str, Any]:
    """All turns, and for each way the medians.

    Raises:
        RuntimeError: two ways did not draw the same people.
    """
    turns: dict[str, list[dict[str, Any]]] = {way: [] for way in ways}
    for turn in range(repeats):
        for way in ways:
            turns[way].append(run(way, options))
            rate = turns[way][-1]["clients_per_second"]
            print(f"turn {turn + 1} of {repeats}: {way} {rate:,.1f} clients/s", file=sys.stderr)
    if len({tuple(turn["clients"]) for done in turns.values() for turn in done}) > 1:
        raise RuntimeError("the ways did not draw the same people: their figures do not compare")
    return {"ways": {way: summary(done) for way, done in turns.items()}, "turns": turns}


def summary(turns: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the turns, and the range of the speed."""
    rates = [turn["clients_per_second"] for turn in turns]
    names = ("clients_per_second", "round_seconds", "startup_seconds", "peak_rss_mb")
    medians = {name: statistics.median(turn[name] for turn in turns) for name in names}
    return {**medians, "range": [min(rates), max(rates)], "turns": len(turns)}


def table(found: dict[str, dict[str, Any]], workload: str, cohort: str) -> str:
    """Markdown, a line for each way."""
    lines = [
        "| workload, cohort | way | clients/s | range | × loop | × flower | round s | start-up s | MiB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for way, its in found.items():
        times = [
            f"{its['clients_per_second'] / found[other]['clients_per_second']:.2f}" if other in found else ""
            for other in ("loop", "flower")
        ]
        low, high = its["range"]
        cells = [
            f"{workload}, {cohort}",
            way,
            f"{its['clients_per_second']:,.1f}",
            f"{low:,.1f}–{high:,.1f}",
            *times,
            f"{its['round_seconds']:.4f}",
            f"{its['startup_seconds']:.1f}",
            f"{its['peak_rss_mb']:,.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description="penchant beside a plain loop and Flower's simulation on Ray.")
    parser.add_argument("--workload", default="w1", choices=("w1", "w2"))
    parser.add_argument("--cohort", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=5, help="the first is left out of the speed (default: 5)")
    parser.add_argument("--users", type=int, help="another number of people")
    parser.add_argument("--items", type=int, help="another size of the catalogue")
    parser.add_argument("--repeats", type=int, default=3, help="turns of each way (default: 3)")
    parser.add_argument("--only", default=",".join(WAYS), help=f"of {', '.join(WAYS)}, with commas between")
    parser.add_argument("--check", action="store_true", help="show that all do the same arithmetic, and stop")
    parser.add_argument("--json", action="store_true", help="every turn, as JSON")
    args = parser.parse_args()
    ways = args.only.split(",")
    if unknown := [way for way in ways if way not in WAYS]:
        parser.error(f"--only knows {', '.join(WAYS)}, not {unknown[0]}")
    if args.check:
        checked = run("check", ["--cohort", str(args.cohort)])
        print(json.dumps(checked, indent=2))
        return 0 if all(part["same"] for part in checked.values()) else 1
    sizes = ("cohort", "rounds", "users", "items")
    options = [f"--{name}={getattr(args, name)}" for name in sizes if getattr(args, name) is not None]
    found = compare(ways, args.repeats, ["--workload", args.workload, *options])
    print(json.dumps(found) if args.json else table(found["ways"], args.workload, f"{args.cohort:,}"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
