"""The subcommand `penchant model`: versions, what devices get, what to throw away. Light to import."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from penchant.common.cli import EXIT_DATA, Command, Parser

if TYPE_CHECKING:
    from penchant.server.registry import Model, Registry


def _configure(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(dest="model", metavar="COMMAND", required=True, parser_class=Parser)

    def command(name: str, summary: str, run: Callable[[argparse.Namespace], int]) -> argparse.ArgumentParser:
        sub: argparse.ArgumentParser = commands.add_parser(name, help=summary, description=summary, allow_abbrev=False)
        sub.add_argument("folder", type=Path, metavar="DIR", help="the server's folder")
        sub.add_argument("--json", action="store_true", help="one JSON value on stdout")
        sub.set_defaults(run_model=run, parser=sub)
        return sub

    def version(sub: argparse.ArgumentParser, name: str = "version") -> None:
        sub.add_argument(name, type=int, metavar=name.upper(), help="as `penchant model ls` numbers them")

    def channel(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("--channel", default="stable", metavar="NAME", help="which (default: stable)")
        sub.add_argument(
            "--older-catalogue", action="store_true", help="also if items that retired since are recommended again"
        )

    command("ls", "List the versions and which channel has which.", _ls)
    version(command("show", "Show all about one version.", _show))
    sub = command("promote", "Give a later version to the devices that follow a channel.", _promote)
    version(sub)
    channel(sub)
    sub = command("rollback", "Give them an earlier version again.", _rollback)
    sub.add_argument("--to", type=int, metavar="VERSION", help="default: the last one that the channel had before")
    channel(sub)
    command("verify", "Check every hash, every signature, the versions and the channels.", _verify)
    sub = command("diff", "Say what changed from one version to another.", _diff)
    version(sub, "a")
    version(sub, "b")
    sub = command("collect", "Throw away the bytes of versions that no device can want any more.", _collect)
    sub.add_argument("--dry-run", action="store_true", help="only say which")


def _run(args: argparse.Namespace) -> int:
    code: int = args.run_model(args)
    return code


@contextmanager
def opened(path: Path, *, signs: bool = False) -> Iterator[Registry]:
    """The registry of a server's folder.

    Args:
        signs: with the release key.
    """
    from penchant.server.database import Database
    from penchant.server.folder import Folder
    from penchant.server.registry import Registry, release_key

    folder = Folder(path)
    with Database(folder.database) as database:
        yield Registry(folder, database, release_key(folder) if signs else None)


def _ls(args: argparse.Namespace) -> int:
    with opened(args.folder) as registry:
        models, channels = registry.models(), registry.channels()
    if args.json:
        pointers = [
            {
                "channel": one.name,
                "version": one.version,
                "sequence": one.sequence,
                "since": utc(one.created_ms),
                "expires": utc(one.expires_ms),
            }
            for one in channels
        ]
        print(json.dumps({"models": [_record(model) for model in models], "channels": pointers}, ensure_ascii=False))
        return 0
    rows = [("version", "created", "learner", "round", "guarantee", "channels", "size")]
    rows += [
        (
            str(model.version),
            utc(model.manifest.created_ms),
            model.manifest.learner,
            str(model.round),
            _short(model.manifest.guarantee),
            ", ".join(model.channels) or "-",
            "collected" if model.collected else _size(model.size),
        )
        for model in models
    ]
    print("\n".join(table(rows)))
    for rest in dict.fromkeys(_rest(m.manifest.guarantee) for m in models if m.manifest.guarantee is not None):
        print(f"\neach ε: {rest}")
    for one in channels:
        print(f"{one.name}: version {one.version} since {utc(one.created_ms)}, signed until {utc(one.expires_ms)}")
    return 0


def _show(args: argparse.Namespace) -> int:
    with opened(args.folder) as registry:
        model = registry.model(args.version)
    if args.json:
        print(json.dumps(_record(model), ensure_ascii=False))
        return 0
    told = _record(model)
    for name in ("version", "manifest", "created", "learner", "round", "catalogue"):
        print(f"{name:<10} {told[name]}")
    guarantee = model.manifest.guarantee
    print(f"guarantee  {_short(guarantee)}" + ("" if guarantee is None else f"; {_rest(guarantee)}"))
    print(f"metrics    {_pairs({n: v for n, v in told['metrics'].items() if n != 'round'})}")
    print(f"software   {_pairs(told['software'])}")
    print(f"parents    {', '.join(told['parents']) or '-'}")
    print(f"channels   {', '.join(model.channels) or '-'}")
    print(f"size       {'collected' if model.collected else _size(model.size)}")
    return 0


def _promote(args: argparse.Namespace) -> int:
    with opened(args.folder, signs=True) as registry:
        model = registry.promote(args.version, args.channel, older_catalogue=args.older_catalogue)
    return _moved(args, model)


def _rollback(args: argparse.Namespace) -> int:
    with opened(args.folder, signs=True) as registry:
        model = registry.rollback(args.channel, args.to, older_catalogue=args.older_catalogue)
    return _moved(args, model)


def _moved(args: argparse.Namespace, model: Model) -> int:
    if args.json:
        print(json.dumps(_record(model), ensure_ascii=False))
    else:
        print(f"{args.channel} has version {model.version}")
    return 0


def _verify(args: argparse.Namespace) -> int:
    with opened(args.folder) as registry:
        problems = registry.verify()
    if args.json:
        print(json.dumps({"ok": not problems, "problems": problems}, ensure_ascii=False))
    else:
        print("\n".join(problems) or f"OK {args.folder}")
    return EXIT_DATA if problems else 0


def _diff(args: argparse.Namespace) -> int:
    with opened(args.folder) as registry:
        found = registry.diff(args.a, args.b)
    if args.json:
        print(json.dumps(found, ensure_ascii=False))
        return 0
    print(f"from version {args.a} to version {args.b}")
    for part in ("learner", "settings", "plan", "guarantee", "metrics", "software"):
        for name, (before, after) in found.get(part, {}).items():
            where = f"{part}.{name}" if name else part
            print(f"  {where}: {json.dumps(before, ensure_ascii=False)} → {json.dumps(after, ensure_ascii=False)}")
    for kind, ids in found.get("catalogue", {}).items():
        if ids:
            print(f"  catalogue: {counted(kind, ids)}")
    for name, told in found["arrays"].items():
        before, after = (_norm(norm, shape) for norm, shape in zip(told["norm"], told["shape"], strict=True))
        moved = f", moved by {told['moved']:.4g}" if "moved" in told else ""
        print(f"  {name}: {before} → {after}{moved}")
    return 0


def _collect(args: argparse.Namespace) -> int:
    with opened(args.folder) as registry:
        found = registry.collect(dry_run=args.dry_run)
    if args.json:
        told = {"versions": found.versions, "files": found.n_files, "bytes": found.n_bytes, "dry_run": args.dry_run}
        print(json.dumps(told))
        return 0
    versions = f"of version {', '.join(map(str, found.versions))}" if found.versions else "of no version"
    verb = "would throw away" if args.dry_run else "threw away"
    print(f"{verb} the bytes {versions}: {found.n_files} files, {_size(found.n_bytes)}")
    return 0


def _record(model: Model) -> dict[str, Any]:
    manifest = model.manifest
    return {
        "version": model.version,
        "manifest": model.name,
        "created": utc(manifest.created_ms),
        "created_ms": manifest.created_ms,
        "learner": manifest.learner,
        "round": model.round,
        "catalogue": manifest.catalogue_version,
        "guarantee": manifest.guarantee,
        "metrics": dict(manifest.metrics),
        "software": dict(manifest.software),
        "parents": list(manifest.parents),
        "channels": list(model.channels),
        "size_bytes": model.size,
        "collected": model.collected,
    }


def utc(at_ms: int) -> str:
    """
    >>> utc(1_700_000_000_000)
    '2023-11-14 22:13 UTC'
    """
    return datetime.fromtimestamp(at_ms / 1000, UTC).strftime("%Y-%m-%d %H:%M UTC")


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns one under the other, at least two spaces apart."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def counted(kind: str, ids: Sequence[str], most: int = 5) -> str:
    """
    >>> counted("added", ["a", "b"])
    '2 added: a, b'
    """
    return f"{len(ids)} {kind}: {', '.join(ids[:most])}{', …' if len(ids) > most else ''}"


def _short(guarantee: Mapping[str, Any] | None) -> str:
    """An ε with what it may never be without."""
    from penchant.common.privacy.plan import rounded_up

    if guarantee is None:
        return "nothing is promised"
    return f"ε {rounded_up(guarantee['epsilon'])} at δ {guarantee['delta']:g} per {guarantee['unit']}"


def _rest(guarantee: Mapping[str, Any]) -> str:
    left_out = "; ".join(guarantee["uncharged"]) or "nothing"
    return (
        f"{guarantee['neighbours']}, sampling {guarantee['sampler']}, accountant {guarantee['accountant']}, "
        f"trust {guarantee['trust']}, not charged: {left_out}"
    )


def _pairs(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items()) or "-"


def _norm(norm: float | None, shape: Sequence[int] | None) -> str:
    return "nothing" if norm is None or shape is None else f"norm {norm:.4g} {list(shape)}"


def _size(size: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024
    return f"{size:.4g} GiB"


model = Command(
    "Show versions of the model, promote one, roll back, check or clear the registry.",
    "  penchant model ls prod/\n"
    "  penchant model promote prod/ 7\n"
    "  penchant model rollback prod/\n"
    "  penchant model verify prod/",
    _configure,
    _run,
)
