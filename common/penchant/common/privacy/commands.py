"""The subcommand `penchant privacy`: what ledgers say, whether they are whole, and all that is in one."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from penchant.common.cli import Command, Parser
from penchant.common.errors import InvalidConfig

if TYPE_CHECKING:
    from penchant.common.privacy.ledger import Ledger


def _configure(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(dest="privacy", metavar="COMMAND", required=True, parser_class=Parser)
    where = "a ledger, or the folder of a run with its ledgers"
    for name, summary, run, path in (
        ("show", "Show what was spent, with everything without which an ε means nothing.", _show, where),
        ("verify", "Replay every entry from zero and check the chain of hashes.", _verify, where),
        ("export", "Print header and entries with their hashes, a JSON object on each line.", _export, "a ledger"),
    ):
        sub = commands.add_parser(name, help=summary, description=summary, allow_abbrev=False)
        sub.add_argument("path", type=Path, metavar="PATH", help=path)
        sub.set_defaults(run_privacy=run, parser=sub)
        if name == "show":
            sub.add_argument("--json", action="store_true", help="the same as a JSON array, an object for each ledger")
        if name == "verify":
            sub.add_argument("--head", metavar="HASH", help="a head noted earlier, which must still be in the chain")


def _run(args: argparse.Namespace) -> int:
    code: int = args.run_privacy(args)
    return code


def _show(args: argparse.Namespace) -> int:
    from penchant.common.privacy.ledger import Ledger

    found = []
    for path in _ledgers(args.path):
        with Ledger.open(path) as ledger:
            found.append(_summary(path, ledger))
    if args.json:
        print(json.dumps(found, ensure_ascii=False))
        return 0
    print("\n\n".join(_words(summary) for summary in found))
    if len(found) > 1:
        print("\nOf one population's ledgers, each ε holds where only that one's releases are given out.")
    return 0


def _verify(args: argparse.Namespace) -> int:
    from penchant.common.privacy.ledger import Ledger

    paths = _ledgers(args.path)
    if args.head is not None and len(paths) > 1:
        raise InvalidConfig(f"{args.path} holds {len(paths)} ledgers: name the one that the head is of")
    for path in paths:
        with Ledger.open(path) as ledger:
            n = ledger.verify(args.head)
            print(f"OK {path}: {n} entries, head {ledger.head}")
    return 0


def _export(args: argparse.Namespace) -> int:
    from penchant.common.privacy.ledger import Ledger

    with Ledger.open(args.path) as ledger:
        for record, hash in ledger.records():
            print(json.dumps({"record": record, "hash": hash}))
    return 0


def _ledgers(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    inside = path / "ledgers" if (path / "ledgers").is_dir() else path
    if not (found := sorted(inside.glob("*.sqlite"))):
        raise InvalidConfig(f"{path} holds no ledger: nothing with server noise was run there")
    return found


def _summary(path: Path, ledger: Ledger) -> dict[str, Any]:
    entries, bound = ledger.entries, ledger.spent()
    charges = [entry for entry in entries if entry.kind == "charge"]
    taken = [entry for entry in entries if entry.kind == "participation"]
    return {
        "path": str(path),
        "population": ledger.population,
        "app_id": ledger.app_id,
        "unit": "interaction" if any(entry.event is not None for entry in taken) else "user",
        "epsilon": bound.epsilon,
        "delta": ledger.delta,
        "neighbours": ledger.neighbours,
        "accountant": bound.accountant,
        "budget": ledger.budget,
        "left": None if ledger.budget is None else max(0.0, ledger.budget - bound.epsilon),
        "charges": len(charges),
        "rounds": len({(entry.plan, entry.round) for entry in charges}),
        "repeats": sum(entry.attempt > 0 for entry in charges),
        "releases": sum(entry.kind == "release" for entry in entries),
        "participations": sum(
            ledger.participations(one) for one in {e.profile for e in taken if e.profile is not None}
        ),
        "tries": len(taken),
        "profiles": len({entry.profile for entry in taken}),
        "entries": len(entries),
        "head": ledger.head,
    }


def _words(found: dict[str, Any]) -> str:
    from penchant.common.privacy.plan import rounded_up

    one = "interaction" if found["unit"] == "interaction" else "profile"
    guarantee = (
        f"δ = {found['delta']:g}, unit {found['unit']} ({found['neighbours']} one {one}), "
        f"accountant {found['accountant']}"
    )
    budget = "none" if found["budget"] is None else f"ε ≤ {found['budget']:g} at {guarantee}; left {found['left']:.3g}"
    return "\n".join(
        (
            found["path"],
            f"  population      {found['population']}" + (f" of app {found['app_id']}" if found["app_id"] else ""),
            f"  spent           ε = {rounded_up(found['epsilon'])} at {guarantee}",
            f"  budget          {budget}",
            f"  charges         {found['charges']} for {found['rounds']} rounds, {found['repeats']} of them repeats",
            f"  releases        {found['releases']}",
            f"  participations  {found['participations']} of {found['profiles']} profiles, in {found['tries']} tries",
            f"  head            {found['head']}",
        )
    )


privacy = Command(
    "Show, verify or export what was spent on privacy.",
    "  penchant privacy show runs/a\n"
    "  penchant privacy verify runs/a\n"
    "  penchant privacy export runs/a/ledgers/co-occurrence.sqlite",
    _configure,
    _run,
)
