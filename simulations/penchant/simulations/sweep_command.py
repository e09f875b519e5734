"""The subcommand `penchant sweep`: chooses a learner's public settings. Light to import."""

from __future__ import annotations

import argparse
import json
import os
import shlex
from pathlib import Path

from penchant.common.cli import EXIT_INTERRUPTED, Command
from penchant.common.errors import InvalidConfig


def _configure(parser: argparse.ArgumentParser) -> None:
    from penchant.simulations.commands import configure_simulation

    configure_simulation(parser)
    parser.add_argument("--trials", type=int, default=50, help="how many (default: 50)")
    parser.add_argument("--metric", default="ndcg@10", help="what to raise, on validation (default: ndcg@10)")
    parser.add_argument("--storage", type=Path, metavar="FILE", help="journal of the trials (default: in the folder)")
    parser.add_argument("--config", type=Path, metavar="FILE", help="a config.toml; options given here win")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="folder; one that holds this sweep goes on (default: a new one)"
    )
    parser.add_argument("--json", action="store_true", help="sweep.json on stdout; talk stays on stderr")
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress, no words")


def _run(args: argparse.Namespace) -> int:
    for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(name, "1")  # before NumPy loads: nodes run in threads, and pools within them only wait
    import dataclasses

    from rich.console import Console

    from penchant.simulations.commands import embedded_or_synthetic, given, new_folder
    from penchant.simulations.runs import read_config
    from penchant.simulations.settings import SimulationConfig
    from penchant.simulations.sweep import SweepConfig, sweep

    options = given(args)
    base = dataclasses.replace(read_config(args.config) if args.config else SimulationConfig(), **options)
    if "data" not in options and args.config is None:
        base = embedded_or_synthetic(base)
    if args.storage is not None and args.storage.is_dir():
        raise InvalidConfig(f"--storage names a file, and {args.storage} is a folder")
    path = args.out or new_folder(Path("runs"))
    talk = Console(stderr=True, quiet=args.quiet)
    try:
        found = sweep(
            SweepConfig(base=base, trials=args.trials, metric=args.metric),
            path,
            storage=args.storage,
            tell=lambda words: talk.print(words, highlight=False, markup=False),
        )
    except KeyboardInterrupt:
        talk.print(f"\nStopped. The same command with --out {shlex.quote(str(path))} goes on.", highlight=False)
        return EXIT_INTERRUPTED
    if args.json:
        print(json.dumps(found, ensure_ascii=False))
    elif not args.quiet:
        out = Console()
        best = found["best"]
        out.print(
            f"{found['row']} on validation, {found['metric']}: {best['value']:.2%}, with its own settings "
            f"{found['own']:.2%}",
            highlight=False,
        )
        for name, value in best["settings"].items():
            out.print(f"  {name} = {value:.4g}", highlight=False)
        out.print(best["privacy_note"], style="dim", markup=False, highlight=False)
        run = f"penchant simulate --config {shlex.quote(str(path / 'best.toml'))}"
        out.print(f"Use them:  {run}", markup=False, highlight=False, soft_wrap=True)
    return 0


sweep = Command(
    "Choose a learner's public settings on validation, with Optuna; what that costs in privacy is said.",
    "  penchant sweep --data synthetic:users=6000 --learner cooccurrence --epsilon 8 --delta 1e-5 --trials 50\n"
    "  penchant sweep --data ml-100k --learner fedavg --unit user --out runs/tuned\n"
    "  penchant simulate --config runs/tuned/best.toml",
    _configure,
    _run,
)
