"""The subcommand `penchant frontier`: accuracy against ε for every learner. Light to import."""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from penchant.common.cli import EXIT_INTERRUPTED, Command
from penchant.common.errors import InvalidConfig

if TYPE_CHECKING:
    from rich.table import Table

    from penchant.simulations.frontier import FrontierConfig


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", help="data set, as for penchant simulate (default: embedded)")
    parser.add_argument("--items", help="items file for --data PATH: item,title,genres")
    parser.add_argument("--rating-scale", type=float, nargs=2, metavar=("LOW", "HIGH"), help="as for simulate")
    parser.add_argument("--split", help="as for simulate (default: leave-last-out)")
    parser.add_argument("--epsilons", help="ε of the cells, inf for without privacy (default: 0.5,1,2,4,8,inf)")
    parser.add_argument("--learners", help="NAME[:MODEL][:OPTION=VALUE]…, with commas between (default: every learner)")
    parser.add_argument("--references", help="ease, central, item-knn, truth, or none (default: ease,central)")
    parser.add_argument("--seeds", type=int, help="how many (default: 5)")
    parser.add_argument("--seed", type=int, help="the first (default: 0)")
    parser.add_argument("--delta", type=float, help="δ of every cell (default: as for simulate)")
    parser.add_argument("--as-if-users", type=int, metavar="N", help="noise as N people would get, for research")
    parser.add_argument("--nodes", type=int, help="Flower nodes that share the users (default: 2)")
    parser.add_argument("--device", help="auto, cpu or cuda")
    parser.add_argument("--jobs", type=int, default=1, help="processes over cells; changes no figure (default: 1)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder (default: a new one under runs/)")
    parser.add_argument("--resume", type=Path, metavar="DIR", help="go on with what is in this folder")
    parser.add_argument("--json", action="store_true", help="frontier.json on stdout; talk stays on stderr")
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress, no table")


def _run(args: argparse.Namespace) -> int:
    for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(name, "1")  # before NumPy loads, here and in every process over cells

    from rich.console import Console

    from penchant.simulations import frontier

    path, wanted = _what_to_run(args)
    talk = Console(stderr=True, quiet=args.quiet)
    try:
        frontier.run(wanted, path, jobs=args.jobs, tell=lambda words: talk.print(words, highlight=False, markup=False))
        found = frontier.record(wanted, path)
    except KeyboardInterrupt:
        if path.exists():
            again = f"penchant frontier --resume {shlex.quote(str(path))}"
            talk.print(f"\nStopped. Go on with:  {again}", markup=False, highlight=False, soft_wrap=True)
        return EXIT_INTERRUPTED
    frontier.write(path, found)
    if args.json:
        print(json.dumps(found, ensure_ascii=False))
    elif not args.quiet:
        out = Console()
        out.print(table(found))
        out.print(f"Figure: {path / 'frontier.svg'}, page: {path / 'frontier.html'}", markup=False, soft_wrap=True)
    return 0


def _what_to_run(args: argparse.Namespace) -> tuple[Path, FrontierConfig]:
    from penchant.simulations.commands import embedded_or_synthetic, new_folder
    from penchant.simulations.frontier import FrontierConfig, read_config
    from penchant.simulations.settings import SimulationConfig

    def given(*names: str) -> dict[str, Any]:
        return {name: getattr(args, name) for name in names if getattr(args, name) is not None}

    base = given("data", "items", "rating_scale", "split", "seed", "delta", "nodes", "device")
    more = given("learners", "epsilons", "references", "seeds", "as_if_users")
    if args.resume is not None:
        if base or more or args.out:
            raise InvalidConfig("--resume goes on with what the folder was started with: give no other option")
        return args.resume, read_config(args.resume)
    if args.out and (args.out / "frontier.toml").exists():
        raise InvalidConfig(f"{args.out} already holds a frontier: take another --out, or --resume {args.out}")
    if "rating_scale" in base:
        base["rating_scale"] = tuple(base["rating_scale"])
    if "epsilons" in more:
        more["epsilons"] = tuple(_epsilon(word) for word in _words(more["epsilons"]))
    if "learners" in more:
        more["learners"] = _words(more["learners"])
    if "references" in more:
        more["references"] = () if more["references"] == "none" else _words(more["references"])
    settings = SimulationConfig(**base)
    if "data" not in base:
        settings = embedded_or_synthetic(settings)
    return args.out or new_folder(Path("runs")), FrontierConfig(base=settings, **more)


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())


def _epsilon(word: str) -> float:
    try:
        return math.inf if word == "∞" else float(word)
    except ValueError:
        raise InvalidConfig(f"epsilons must be numbers or inf, not {word!r}") from None


def table(found: Mapping[str, Any]) -> Table:
    """The frontier for a terminal: a line for each floor, reference, and learner at an ε."""
    from rich.text import Text

    from penchant.simulations import tables
    from penchant.simulations.frontier import epsilon_words, promises
    from penchant.simulations.frontier_page import canary, imitated, interval, kept

    data, split = found["data"], found["split"]
    out = tables.plain_table(f"{data['name']}, {split['name']}, {split['scored_users']:,} people scored")
    out.add_column("", overflow="fold")
    for title in ("ε", "NDCG@10 %\n[95 %]", "vs popu-\nlarity", "vs no-\nsharing", "kept\n%"):
        out.add_column(title, justify="right", no_wrap=True)
    shared, own = promises(found["rows"])
    notes: dict[str, int] = {}
    before = None
    for line, words in zip(found["rows"], own, strict=True):
        if before not in (None, line["name"] if line["kind"] == "learner" else line["kind"]):
            out.add_section()
        before = line["name"] if line["kind"] == "learner" else line["kind"]
        epsilon = "" if line["kind"] != "learner" else epsilon_words(line)
        if line["privacy"]:
            epsilon += f" ({notes.setdefault(words, len(notes) + 1)})"
        against = [line["against_floors"].get(floor) for floor in tables.FLOORS]
        cells = [
            line["name"],
            epsilon,
            interval(line["ndcg@10"]),
            *(tables.less(one) for one in against),
            kept(line),
        ]
        out.add_row(*map(Text, cells))
    said = ["▲ better, ▼ worse: the paired 95 % interval of the difference, in points of NDCG@10, leaves out 0."]
    if shared:
        said.append(f"Every finite ε: {shared}.")
        said += [f"({n}) {words}." for words, n in notes.items() if words]
    said += [words for words in (imitated(found), canary(found), data["terms"]) if words]
    out.caption = Text("\n".join(("", *said)))
    return out


frontier = Command(
    "Draw accuracy against ε for every learner, with both floors in one figure.",
    "  penchant frontier\n"
    "  penchant frontier --data ml-100k --learners cooccurrence,fedavg:transformer --seeds 5 --jobs 2\n"
    "  penchant frontier --data synthetic:users=6000 --epsilons 1,8,inf --references ease,truth\n"
    "  penchant frontier --resume runs/a",
    _configure,
    _run,
)
