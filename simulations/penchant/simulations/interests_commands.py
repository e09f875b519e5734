"""The subcommands `penchant evaluate` and `penchant profile`: how well profiles follow interests, and one to look at.

Light to import.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from penchant.common.cli import Command
from penchant.common.errors import InvalidConfig

if TYPE_CHECKING:
    from penchant.simulations.interests.releases import Table

PARTS = {
    "dynamic": ("table", "drift_table", "context_table"),
    "intensity": ("table", "truths"),
    "distribution": ("table", "lists", "quantized"),
    "explore": ("table",),
}
"""What each module of `interests/` measures; the first takes the options that the part takes."""
_OPTIONS = ("data", "epsilon", "seed")


def _configure_evaluate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", choices=["interests"], help="what is evaluated")
    parser.add_argument("--part", choices=PARTS, help="one of its questions (default: all)")
    parser.add_argument("--data", help="data set, as for penchant simulate (default: each part's own)")
    parser.add_argument("--epsilon", type=float, help="of the release, unit user (default: exact sums)")
    parser.add_argument("--seed", type=int, help="of everything random (default: 0)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="also write each part's tables there, as Markdown")


def _evaluate(args: argparse.Namespace) -> int:
    for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(name, "1")  # before NumPy loads: its arrays here are small

    from rich.console import Console

    from penchant.simulations.runs import write_file

    given = {name: getattr(args, name) for name in _OPTIONS if getattr(args, name) is not None}
    if given.get("seed", 0) < 0:
        raise InvalidConfig(f"--seed must be ≥ 0, not {args.seed}")
    chosen = [args.part] if args.part else list(PARTS)
    parts = {part: _part(part, given if args.part else ()) for part in chosen}
    console = Console()
    for part, runs in parts.items():
        tables = []
        for run in runs:
            taken = inspect.signature(run).parameters
            options = {name: value for name, value in given.items() if name in taken}
            one = run(**options)
            tables.append(one)
            console.print(one.title, style="bold", markup=False, highlight=False)
            console.print(_shown(one))
            for note in one.notes:
                console.print(note, style="dim", markup=False, highlight=False)
            console.print()
        if args.out:
            write_file(args.out / f"{part}.md", ("\n\n".join(one.markdown() for one in tables) + "\n").encode())
    return 0


def _part(name: str, given: Iterable[str]) -> list[Callable[..., Table]]:
    """What a part measures; the first of it takes the options that were given.

    Raises:
        InvalidConfig: this version has no such part, or it takes no such option.
    """
    path = f"penchant.simulations.interests.{name}"
    try:
        module = importlib.import_module(path)
    except ModuleNotFoundError as error:
        if error.name != path:
            raise
        raise InvalidConfig(f"this version of penchant has no part {name}: update it, or take another --part") from None
    runs: list[Callable[..., Table]] = [getattr(module, function) for function in PARTS[name]]
    for option in given:
        if option not in inspect.signature(runs[0]).parameters:
            raise InvalidConfig(f"part {name} takes no --{option}: leave it out")
    return runs


def _shown(table: Table) -> Any:
    """A table for a terminal."""
    from rich.text import Text

    from penchant.simulations.tables import plain_table

    out = plain_table("")
    out.title = None
    for k, column in enumerate(table.columns):
        out.add_column(Text(column), justify="right" if k else "left", overflow="fold")
    for row in table.rows:
        out.add_row(*map(Text, row))
    return out


def _configure_profile(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run", dest="folder", type=Path, required=True, metavar="DIR", help="folder of a run")
    parser.add_argument("--user", required=True, help="a user of the run's data")
    parser.add_argument("--row", help="whose release it is made from (default: the run's last that has item vectors)")
    parser.add_argument("-k", type=int, default=10, help="how many items to recommend")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="also draw it there, as .svg or .png")


def _profile(args: argparse.Namespace) -> int:
    from rich.console import Console

    from penchant.simulations.interests import picture
    from penchant.simulations.runs import RunFolder, write_file

    if args.k < 1:
        raise InvalidConfig(f"-k must be ≥ 1, not {args.k}")
    kind = args.plot.suffix.lower() if args.plot else ""
    if args.plot and kind not in (".svg", ".png"):
        raise InvalidConfig(f"--plot must end in .svg or .png, not {args.plot.name!r}")
    found = picture.person(RunFolder(args.folder), args.user, row=args.row, n=args.k)
    console = Console()
    for part in picture.told(found):
        console.print(part)
    if args.plot:
        write_file(args.plot, picture.figure(found, "svg" if kind == ".svg" else "png"))
        console.print(f"Picture: {args.plot}", markup=False, highlight=False, soft_wrap=True)
    return 0


evaluate = Command(
    "Measure how well profiles follow interests: one table for each question.",
    "  penchant evaluate interests --part explore\n"
    "  penchant evaluate interests --part dynamic --data ml-100k --epsilon 8 --out tables",
    _configure_evaluate,
    _evaluate,
)
profile = Command(
    "Show one simulated person's interests: over time, now, how sure, and a list with reasons.",
    "  penchant profile --run runs/a --user 42\n  penchant profile --run runs/a --user 42 --plot person.svg",
    _configure_profile,
    _profile,
)
