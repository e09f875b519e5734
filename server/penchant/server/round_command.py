"""The subcommand `penchant round`: whether rounds run, and what became of those that did. Light to import."""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from penchant.common.cli import EXIT_ERROR, Command, Parser
from penchant.common.errors import InvalidConfig

if TYPE_CHECKING:
    from penchant.server.database import Database
    from penchant.server.folder import Folder


def _configure(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(dest="round", metavar="COMMAND", required=True, parser_class=Parser)
    for name, summary, run in (
        ("start", "Want rounds: the server goes on from its checkpoint.", _start),
        ("pause", "Want no more rounds: one that is under way is finished.", _pause),
        ("status", "Show what the rounds are at.", _status),
        ("history", "Show every try at a round, the newest first.", _history),
    ):
        sub = commands.add_parser(name, help=summary, description=summary, allow_abbrev=False)
        sub.add_argument("folder", type=Path, metavar="DIR", help="the operator's folder")
        if name == "start":
            sub.add_argument(
                "--after-restore",
                action="store_true",
                help="go on although a ledger restored from a backup may lack charges",
            )
        if name == "history":
            sub.add_argument("--limit", type=int, default=20, metavar="N", help="tries to show (default: 20)")
        if name in ("status", "history"):
            sub.add_argument("--json", action="store_true", help="as JSON")
        sub.set_defaults(run_round=run, parser=sub)


def _run(args: argparse.Namespace) -> int:
    from penchant.server.database import Database
    from penchant.server.folder import Folder

    folder = Folder(args.folder)
    with Database(folder.database) as database:
        code: int = args.run_round(args, folder, database)
    return code


def _start(args: argparse.Namespace, folder: Folder, database: Database) -> int:
    from penchant.server import wanted

    wanted.start(database, after_restore=args.after_restore)
    found = status(folder, database)
    if not found["left"]:
        print("every round of the plan is released: penchant round status shows what was spent", file=sys.stderr)
        return EXIT_ERROR
    print(f"rounds are wanted: {found['done']} of {found['rounds']} released", end="")
    print("" if found["up"] else f"; the server is not up: penchant serve up {args.folder}")
    return 0


def _pause(args: argparse.Namespace, folder: Folder, database: Database) -> int:
    from penchant.server import wanted

    wanted.pause(database)
    print("no more rounds are wanted; one that is under way is finished")
    return 0


def _status(args: argparse.Namespace, folder: Folder, database: Database) -> int:
    found = status(folder, database)
    if args.json:
        print(json.dumps(found, ensure_ascii=False))
        return 0
    wanted = found["wanted"] + (f" ({found['hold']})" if found["hold"] and found["wanted"] != "running" else "")
    print(f"rounds    {wanted}; {found['done']} of {found['rounds']} released, {found['left']} left")
    print(f"server    {'up' if found['up'] else 'down'}")
    if (last := found["last"]) is not None:
        print(f"last      {_words(last)}")
    return 0


def _history(args: argparse.Namespace, folder: Folder, database: Database) -> int:
    if args.limit < 1:
        raise InvalidConfig(f"--limit must be ≥ 1, not {args.limit}")
    found = tries(database, args.limit)
    if args.json:
        print(json.dumps(found, ensure_ascii=False))
        return 0
    print("\n".join(map(_words, found)) if found else "no round was tried yet")
    return 0


def status(folder: Folder, database: Database) -> dict[str, Any]:
    """What the rounds are at, as plain types."""
    from penchant.server.supervisor import held

    plan = folder.plan
    row = database.one("SELECT done FROM progress WHERE plan = ?", plan.digest)
    done, last = 0 if row is None else int(row["done"]), tries(database, 1)
    return {
        "wanted": database.switch("rounds", "paused"),
        "hold": database.switch("hold"),
        "up": held(folder.run / "supervisor.lock"),
        "rounds": plan.rounds,
        "done": done,
        "left": plan.rounds - done,
        "last": last[0] if last else None,
    }


def tries(database: Database, limit: int) -> list[dict[str, Any]]:
    """Tries at rounds, the newest first."""
    rows = database.rows("SELECT * FROM rounds ORDER BY at_ms DESC, round DESC, attempt DESC LIMIT ?", limit)
    return [{**dict(row), "refused": json.loads(row["refused"])} for row in rows]


def _words(one: dict[str, Any]) -> str:
    at = datetime.datetime.fromtimestamp(one["at_ms"] / 1000, datetime.UTC)
    refused = ", ".join(f"{n} {why}" for why, n in sorted(one["refused"].items()))
    return (
        f"{at:%Y-%m-%d %H:%M:%SZ}  round {one['round']}.{one['attempt']} ({one['sum']})  {one['phase']:<11} "
        f"{one['answered']} of {one['drawn']} drawn answered"
        + (f"; left out: {refused}" if refused else "")
        + (f"; {one['why']}" if one["why"] else "")
    )


round = Command(
    "Start, pause and follow the server's rounds.",
    "  penchant round start prod/\n  penchant round status prod/\n  penchant round history prod/ --limit 5",
    _configure,
    _run,
)
