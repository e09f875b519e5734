"""The subcommand `penchant catalogue`: what can be recommended, changed while devices use it. Light to import."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from penchant.common.cli import Command, Parser
from penchant.common.errors import InvalidConfig, MalformedData

if TYPE_CHECKING:
    from penchant.common.catalogue import Catalogue


def _configure(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(dest="catalogue", metavar="COMMAND", required=True, parser_class=Parser)

    def command(name: str, summary: str, run: Callable[[argparse.Namespace], int]) -> argparse.ArgumentParser:
        sub: argparse.ArgumentParser = commands.add_parser(name, help=summary, description=summary, allow_abbrev=False)
        sub.add_argument("folder", type=Path, metavar="DIR", help="the server's folder")
        sub.add_argument("--json", action="store_true", help="one JSON object on stdout")
        sub.set_defaults(run_catalogue=run, parser=sub)
        return sub

    command("show", "Say what the catalogue holds.", _show)
    for name, summary in (
        ("add", "Add the items of a file."),
        ("update", "Change what is said of items, to what a file says."),
        ("retire", "Recommend items no more; they keep their place."),
        ("restore", "Recommend retired items again."),
    ):
        sub = command(name, summary, _change)
        if name in ("add", "update"):
            sub.add_argument("file", type=Path, metavar="FILE", help="CSV or Parquet with a column item")
        else:
            sub.add_argument("ids", nargs="*", metavar="ID", help="the items")
            sub.add_argument("--from", dest="listed", metavar="FILE", help="ids, one in a line; - reads stdin")
        sub.add_argument("--dry-run", action="store_true", help="check it and say what would change")


def _run(args: argparse.Namespace) -> int:
    code: int = args.run_catalogue(args)
    return code


def _show(args: argparse.Namespace) -> int:
    from penchant.server.folder import Folder
    from penchant.server.registry import columns, newest_catalogue

    found = newest_catalogue(Folder(args.folder))
    topics = {topic for own in found.topics for topic in own}
    names = list(columns(found))
    told = {
        "name": found.name,
        "version": found.version,
        "items": len(found),
        "retired": len(found.retired),
        "topics": len(topics),
        "sensitive": sorted(found.sensitive),
        "columns": names,
    }
    if args.json:
        print(json.dumps(told, ensure_ascii=False))
        return 0
    print(f"{found.name}, version {found.version}: {len(found)} items, {len(found.retired)} of them retired")
    print(f"columns: {', '.join(names)}; {len(topics)} topics, {len(found.sensitive)} of them sensitive")
    return 0


def _change(args: argparse.Namespace) -> int:
    from dataclasses import asdict

    from penchant.server.catalogue_ops import change
    from penchant.server.database import Database
    from penchant.server.folder import Folder
    from penchant.server.model_command import counted
    from penchant.server.registry import Registry, release_key

    folder, how = Folder(args.folder), _how(args)
    with Database(folder.database) as database:
        registry = Registry(folder, database, None if args.dry_run else release_key(folder))
        found, model = change(folder, database, registry, how, dry_run=args.dry_run)
    if args.json:
        version = None if model is None else model.version
        print(json.dumps({**asdict(found), "model": version, "dry_run": args.dry_run}, ensure_ascii=False))
        return 0
    kinds = [counted({"columns": "new columns"}.get(kind, kind), ids) for kind, ids in asdict(found).items() if ids]
    print("\n".join(kinds) or "nothing changes")
    if args.dry_run:
        print("nothing was written: a dry run", file=sys.stderr)
    elif model is not None:
        print(f"model version {model.version} is over it, on {' and '.join(model.channels) or 'no channel'}")
        if "stable" not in model.channels:
            print(f"every device gets it after: penchant model promote {args.folder} {model.version}", file=sys.stderr)
    elif kinds:
        print("the next release is over it")
    return 0


def _how(args: argparse.Namespace) -> Callable[[Catalogue], Catalogue]:
    from penchant.server import catalogue_ops as ops

    if args.catalogue in ("add", "update"):
        table = ops.read_table(args.file)
        return lambda before: (ops.added if args.catalogue == "add" else ops.updated)(before, table)
    ids = [*args.ids, *([] if args.listed is None else _listed(args.listed))]
    if not ids:
        raise InvalidConfig("name the items, or give them with --from FILE, one in a line")
    return lambda before: (ops.retired if args.catalogue == "retire" else ops.restored)(before, ids)


def _listed(name: str) -> list[str]:
    try:
        text = sys.stdin.read() if name == "-" else Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise MalformedData(f"{name}: {error}") from None
    return [line.strip() for line in text.splitlines() if line.strip()]


catalogue = Command(
    "Show the catalogue, add items, change or retire some.",
    "  penchant catalogue show prod/\n"
    "  penchant catalogue add prod/ new.csv --dry-run\n"
    "  penchant catalogue retire prod/ film:7 film:9",
    _configure,
    _run,
)
