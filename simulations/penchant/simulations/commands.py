"""The researcher's subcommands: simulate, compare, recommend. Light to import; the work loads when one runs."""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from penchant.common.cli import EXIT_INTERRUPTED, Command
from penchant.common.errors import InvalidConfig

if TYPE_CHECKING:
    from penchant.simulations.settings import SimulationConfig


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


# flag, field of SimulationConfig, type, help
_OPTIONS: tuple[tuple[str, Callable[[str], Any], str], ...] = (
    (
        "data",
        str,
        "data set: embedded, ml-100k, synthetic[:users=…], or a path (CSV, Parquet, MovieLens zip or folder)",
    ),
    ("items", str, "items file for --data PATH: item,title,genres"),
    ("split", str, "leave-last-out, global-time, held-out-users or 5-fold-users:0"),
    ("learner", str, "fedavg, cooccurrence, als or strengths"),
    ("model", str, "mf, mlp, neumf, gru, lstm, cnn-lstm or transformer"),
    ("unit", str, "what is protected: user, interaction or none"),
    ("epsilon", float, "privacy budget ε of each private row; needs --delta"),
    ("delta", float, "δ, below 1 over the number of users"),
    ("noise-multiplier", float, "σ instead of --epsilon"),
    ("rounds", int, "rounds of FedAvg"),
    ("cohort", int, "users in a round"),
    ("sampling", str, "none, or poisson: a coin for each user (unit user)"),
    ("max-participations", int, "rounds in which one profile may take part"),
    ("local-epochs", int, "passes over the own history in a round"),
    ("lr", float, "step size of local training"),
    ("clip", float, "L2 bound on an update (unit user) or a sample's gradient (unit interaction)"),
    ("clip-quantile", float, "let the clip follow this quantile of updates' norms (unit user)"),
    ("row-clip", float, "L2 bound on each item's row of an update: bounds what one person does to one item"),
    ("start", str, "where FedAvg's item vectors start: random, content or co-occurrence (charged with the rest)"),
    ("freeze", _names, "weights that FedAvg leaves as they start, such as item or blocks,norm"),
    ("adapter", int, "rank of a map that FedAvg trains in place of item tables"),
    ("proximal", float, "μ of FedProx in local training"),
    ("counts-share", float, "of co-occurrence's budget μ², the share of the counts"),
    ("as-if-users", int, "noise as this many people would get, for research: the people in the data get a larger ε"),
    ("k-core", int, "keep users and items with at least so many interactions (uncharged)"),
    ("seed", int, "of everything random"),
    ("nodes", int, "Flower nodes that share the users"),
    ("engine", str, "local, flower (Flower's simulation engine on Ray), or fleet: devices against a running server"),
    ("device", str, "auto, cpu or cuda"),
)


def configure_simulation(parser: argparse.ArgumentParser) -> None:
    """The options that decide a simulation; `given` reads them back."""
    for name, kind, words in _OPTIONS:
        parser.add_argument(f"--{name}", type=kind, help=words)
    parser.add_argument(
        "--rating-scale", type=float, nargs=2, metavar=("LOW", "HIGH"), help="lowest and highest rating"
    )
    parser.add_argument("--skip-bad-rows", action="store_true", default=None, help="count malformed rows and go on")


def given(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of SimulationConfig that were given."""
    from penchant.simulations.settings import SimulationConfig

    fields = {f.name for f in dataclasses.fields(SimulationConfig)}
    found = {k: v for k, v in vars(args).items() if k in fields and v is not None}
    if "rating_scale" in found:
        found["rating_scale"] = tuple(found["rating_scale"])
    return found


def _configure_simulate(parser: argparse.ArgumentParser) -> None:
    configure_simulation(parser)
    parser.add_argument(
        "--sampled-negatives", action="store_true", default=None, help="also report the 99-sampled-negatives protocol"
    )
    parser.add_argument("--audit", action="store_true", help="then audit the private rows, as penchant audit does")
    parser.add_argument("--config", type=Path, metavar="FILE", help="a config.toml; options given here win")
    parser.add_argument("--resume", type=Path, metavar="DIR", help="go on with an interrupted run")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the run (default: a new one under runs/)")
    _configure_talk(parser)
    fleet = parser.add_argument_group("with --engine fleet")
    fleet.add_argument("--url", help="an operator's folder on this machine, or https://host:port of a server elsewhere")
    fleet.add_argument("--devices", type=int, default=5, metavar="N", help="processes to start (default: 5)")
    fleet.add_argument("--bundle", type=Path, metavar="FILE", help="of a server elsewhere: what its app ships with")
    fleet.add_argument("--token", help="of a server elsewhere: an enrolment token with as many uses as devices")
    fleet.add_argument("--wait", type=float, default=600.0, metavar="SECONDS", help="at most (default: 600)")


def _configure_talk(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="results on stdout as JSON; talk stays on stderr")
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress, no table")
    parser.add_argument("-v", "--verbose", action="count", default=0, help="tell of each round")


def _simulate(args: argparse.Namespace) -> int:
    if args.engine == "fleet":
        from penchant.simulations.fleet_command import run

        return run(args)
    if args.url or args.bundle or args.token:
        raise InvalidConfig("--url, --bundle and --token go with --engine fleet")
    for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(name, "1")  # before NumPy loads: nodes run in threads, and pools within them only wait

    from rich.console import Console

    from penchant.simulations.progress import progress
    from penchant.simulations.simulate import simulate
    from penchant.simulations.tables import results_table

    _set_up_logging(args)
    folder, settings = _what_to_run(args)
    if args.audit and settings.unit == "none":
        raise InvalidConfig("unit none promises nothing to audit: drop --audit, or take --unit user")
    talk = Console(stderr=True, quiet=args.quiet)
    try:
        with progress(talk, rounds=args.verbose > 0) as watch:
            results = simulate(settings, folder, watch)
    except KeyboardInterrupt:
        if folder.path.exists():
            again = f"penchant simulate --resume {shlex.quote(str(folder.path))}"
            talk.print(f"\nStopped. Go on with:  {again}", markup=False, highlight=False, soft_wrap=True)
        return EXIT_INTERRUPTED
    if args.json:
        print(json.dumps(results, ensure_ascii=False))
    elif not args.quiet:
        out = Console()
        out.print(results_table(results))
        terms = results["data"]["terms"]
        if results["budget_note"]:
            out.print(results["budget_note"], style="dim")
        if terms:
            out.print(terms, style="dim", markup=False)
        out.print(f"Report: {folder.path / 'report.html'}", markup=False, soft_wrap=True)
    if args.audit:
        from penchant.simulations.audit_command import run_audit

        run_audit(folder, seed=settings.seed, quiet=args.quiet or args.json)
    return 0


def _what_to_run(args: argparse.Namespace) -> tuple[Any, SimulationConfig]:
    from penchant.simulations.runs import RunFolder, read_config
    from penchant.simulations.settings import SimulationConfig

    options = given(args)
    if args.resume is not None:
        if options or args.config or args.out:
            raise InvalidConfig("--resume goes on with what the run was started with: give no other option")
        folder = RunFolder(args.resume)
        return folder, folder.read_config()
    base = read_config(args.config) if args.config else SimulationConfig()
    settings = dataclasses.replace(base, **options)
    if settings.data == "embedded" and "data" not in options and args.config is None:
        settings = embedded_or_synthetic(settings)
    path = args.out or new_folder(Path("runs"))
    if args.out and (args.out / "config.toml").exists():
        raise InvalidConfig(f"{path} already holds a run: take another --out, or --resume {path}")
    return RunFolder(path), settings


def embedded_or_synthetic(settings: SimulationConfig) -> SimulationConfig:
    """Without the MovieLens distribution, a synthetic population, and a word on how to get the other."""
    import importlib.util

    if importlib.util.find_spec("penchant_movielens") is not None:
        return settings
    print(
        "penchant: MovieLens is not installed, so this runs on synthetic data; to get it: pip install ./movielens "
        "(in the repository)",
        file=sys.stderr,
    )
    return dataclasses.replace(settings, data="synthetic")


def new_folder(parent: Path) -> Path:
    """One that is not there yet, named by date and time."""
    import time

    stamp = time.strftime("%Y%m%d-%H%M%S")
    path, n = parent / stamp, 1
    while path.exists():
        path, n = parent / f"{stamp}-{n}", n + 1
    return path


def _set_up_logging(args: argparse.Namespace) -> None:
    level = logging.ERROR if args.quiet else (logging.WARNING, logging.INFO, logging.DEBUG)[min(args.verbose, 2)]
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(name)s: %(message)s")
    logging.getLogger("penchant").setLevel(level)


def _configure_compare(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("a", type=Path, metavar="A", help="folder of a run")
    parser.add_argument("b", type=Path, metavar="B", help="folder of another run")
    _configure_talk(parser)


def _compare(args: argparse.Namespace) -> int:
    from rich.console import Console

    from penchant.simulations.compare import differences
    from penchant.simulations.runs import RunFolder
    from penchant.simulations.tables import compare_table, differing

    first, second = RunFolder(args.a), RunFolder(args.b)
    a, b = first.read_results(), second.read_results()
    found = differences(first, second, a, b)
    if args.json:
        record = {"a": str(args.a), "b": str(args.b), "metric": "ndcg@10", "differing": differing(a, b)}
        print(json.dumps({**record, "differences": found}, ensure_ascii=False))
    elif not args.quiet:
        Console().print(compare_table(a, b, differences=found, names=(args.a.name, args.b.name)))
    return 0


def _configure_recommend(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run", dest="folder", type=Path, required=True, metavar="DIR", help="folder of a run")
    parser.add_argument("--user", required=True, help="a user of the run's data")
    parser.add_argument("--row", help="whose model recommends (default: the run's last federated row)")
    parser.add_argument("-k", type=int, default=10, help="how many items")
    _configure_talk(parser)


def _recommend(args: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from penchant.simulations.recommend import recommend
    from penchant.simulations.runs import RunFolder

    if args.k < 1:
        raise InvalidConfig(f"-k must be ≥ 1, not {args.k}")
    folder = RunFolder(args.folder)
    federated = [row["name"] for row in folder.read_results()["runs"] if row["kind"] == "federated"]
    if args.row is None and not federated:
        raise InvalidConfig(f"{args.folder} holds no federated row, so no model was released")
    row = args.row or federated[-1]
    found = recommend(folder, row, args.user, args.k)
    if args.json:
        print(json.dumps(found, ensure_ascii=False))
    if args.json or args.quiet:
        return 0
    console = Console()
    recent = ", ".join(item["title"] for item in found["recent"])
    console.print(f"User {args.user} most recently chose: {recent or 'nothing yet'}", markup=False)
    table = Table(title=f"Recommended by {row}", title_justify="left")
    for column in ("#", "Title", "Topics", "Score"):
        table.add_column(column, justify="right" if column in "#Score" else "left")
    for place, item in enumerate(found["items"], 1):
        cells = (str(place), item["title"], ", ".join(item["topics"]), f"{item['score']:.3f}")
        table.add_row(*map(Text, cells))  # a title may look like markup
    console.print(table)
    console.print(found["privacy_note"], style="dim", markup=False)
    return 0


simulate = Command(
    "Train federated, private interest models on one machine and show what they are worth.",
    "  penchant simulate\n"
    "  penchant simulate --data ratings.csv --items items.csv --learner cooccurrence --epsilon 3 --delta 1e-5\n"
    "  penchant simulate --data ml-100k --unit none --json",
    _configure_simulate,
    _simulate,
)
compare = Command(
    "Compare two runs row by row, paired over the same people.",
    "  penchant compare runs/a runs/b",
    _configure_compare,
    _compare,
)
recommend = Command(
    "Show what a run's model recommends to one user.",
    "  penchant recommend --run runs/a --user 42",
    _configure_recommend,
    _recommend,
)
