"""The subcommand `penchant bench`: how fast this machine runs fixed work. Light to import."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from penchant.common.cli import Command
from penchant.common.errors import InvalidConfig

if TYPE_CHECKING:
    from rich.table import Table


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workload", default="w1", help="w1, w2 or scale (default: w1)")
    parser.add_argument("--cohort", type=int, help="people in a round (default: 100; scale: 10000)")
    parser.add_argument("--rounds", type=int, help="how many (default: 10)")
    parser.add_argument("--users", type=int, help="another number of people, each with as many interactions")
    parser.add_argument("--items", type=int, help="another size of the catalogue, with as many interactions")
    parser.add_argument("--engine", default="local", help="local, or flower for Flower's on Ray (default: local)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument("--nodes", type=int, help="nodes that share the people (default: one on every core)")
    parser.add_argument("--seed", type=int, default=0, help="of histories and draws (default: 0)")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")


def _run(args: argparse.Namespace) -> int:
    for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(name, "1")  # before NumPy loads: nodes run in threads, and pools within them only wait
    if args.engine not in ("local", "flower"):
        raise InvalidConfig(f"engine must be local or flower, not {args.engine!r}")
    if args.device not in ("cpu", "cuda"):
        raise InvalidConfig(f"device must be cpu or cuda, not {args.device!r}")
    if args.nodes is not None and args.nodes < 1:
        raise InvalidConfig(f"nodes must be a whole number ≥ 1, not {args.nodes}")
    if args.seed < 0:
        raise InvalidConfig(f"seed must be ≥ 0, not {args.seed}")

    from penchant.simulations.bench.workloads import workload

    work = workload(args.workload, users=args.users, items=args.items, cohort=args.cohort, rounds=args.rounds)
    if args.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise InvalidConfig("device cuda: there is no CUDA device here; take --device cpu")

    from penchant.simulations.bench.measure import Where, measure

    where = Where(engine=args.engine, device=args.device, nodes=args.nodes or 0)
    found = measure(work, where=where, seed=args.seed)
    if args.json:
        print(json.dumps(found))
    else:
        from rich.console import Console

        Console().print(table(found))
    return 0


def table(found: Mapping[str, Any]) -> Table:
    """What was measured, for a terminal."""
    from penchant.simulations import tables

    out = tables.plain_table(
        f"{found['workload']}: {found['users']:,} users, {found['items']:,} items, {found['interactions']:,} "
        f"interactions; {found['rounds']} rounds of {found['cohort']:,}"
    )
    out.add_column("", min_width=60)
    out.add_column("", justify="right")
    lines = [
        ("clients/s", f"{found['clients_per_second']:,.0f}"),
        ("examples/s", f"{found['examples_per_second']:,.0f}"),
        ("seconds a round (median)", f"{found['round_seconds']:.4f}"),
        ("of these with nobody's history", _seconds(found["empty_round_seconds"])),
        ("seconds to the end of round 1", f"{found['startup_seconds']:.2f}"),
        ("of these to make histories", f"{found['data_seconds']:.2f}"),
        ("peak memory, MiB", f"{found['peak_rss_mb']:,.0f}"),
        ("share of the float32 ceiling", f"{found['ceiling']['share']:.2%}"),
        ("that ceiling, GFLOP/s", f"{found['ceiling']['peak_gflops']:,.0f}"),
    ]
    if found["cooccurrence"] is not None:
        lines.append(("seconds of a co-occurrence pass", f"{found['cooccurrence']['seconds']:.2f}"))
    for line in lines:
        out.add_row(*line)
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    out.caption = (
        f"engine {found['engine']}, {found['device']}, {found['nodes']} nodes, {found['cpus']} cores; {versions}"
    )
    return out


def _seconds(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.4f}"


bench = Command(
    "Measure clients per second, start-up and memory on fixed work.",
    "  penchant bench\n"
    "  penchant bench --workload w1 --cohort 1000 --rounds 20 --json\n"
    "  penchant bench --workload w2\n"
    "  penchant bench --workload scale",
    _configure,
    _run,
)
