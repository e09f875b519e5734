"""The subcommand `penchant doctor`: is an operator's folder in order, and what is around it? Light to import."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from penchant.common.cli import EXIT_ERROR, Command
from penchant.common.errors import InvalidConfig


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="DIR", help="the operator's folder")
    parser.add_argument("--json", action="store_true", help="a JSON array, an object for each line")


def _run(args: argparse.Namespace) -> int:
    from penchant.server.doctor import Around, check

    if not args.folder.is_dir():
        raise InvalidConfig(f"no folder {args.folder}: make one with penchant serve init {args.folder}")
    lines = check(args.folder, Around.here())
    if args.json:
        told = [{"name": x.name, "level": x.level, "detail": x.detail, "fix": x.fix} for x in lines]
        print(json.dumps(told, ensure_ascii=False))
    else:
        for line in lines:
            print(f"{line.level:4} {line.name}: {line.detail}" + (f" → {line.fix}" if line.fix else ""))
    return 0 if all(line.ok for line in lines) else EXIT_ERROR


doctor = Command(
    "Look an operator's folder over, and say what to mend.",
    "  penchant doctor prod/\n  penchant doctor prod/ --json",
    _configure,
    _run,
)
