"""The subcommand `penchant keys`: what keys there are, and the drills for a new one. Light to import."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from penchant.common.cli import Command, Parser
from penchant.common.errors import InvalidConfig

if TYPE_CHECKING:
    from penchant.common.artifacts.signing import SigningKey
    from penchant.server.keys import Rotated

DAYS = 365


def _configure(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(dest="keys", metavar="COMMAND", required=True, parser_class=Parser)
    for name, summary, run in (
        ("show", "Show what keys and certificates there are: ids, serials, expiry, and no secret.", _show),
        ("rotate", "Make a new release key, and sign with it what devices are offered.", _rotate),
        ("compromised", "The same, after somebody else may have had the release key.", _compromised),
        ("renew-server", "Make a new certificate for the names that devices reach this server under.", _renew),
    ):
        sub = commands.add_parser(name, help=summary, description=summary, allow_abbrev=False)
        sub.add_argument("folder", type=Path, metavar="DIR", help="the operator's folder")
        sub.set_defaults(run_keys=run, parser=sub)
        if name == "show":
            sub.add_argument("--json", action="store_true", help="the same as a JSON array")
            continue
        what = "authority's" if name == "renew-server" else "root"
        option = "--ca" if name == "renew-server" else "--root"
        sub.add_argument(option, type=Path, required=True, metavar="FILE", help=f"the offline {what} key")
        sub.add_argument("--days", type=int, default=DAYS, help=f"until it expires (default: {DAYS})")
        if name == "renew-server":
            sub.add_argument(
                "--names", nargs="+", default=[], metavar="NAME", help="hosts and addresses (default: those it has)"
            )
            sub.add_argument("--new-key", action="store_true", help="also a new private key, where the old was seen")


def _run(args: argparse.Namespace) -> int:
    code: int = args.run_keys(args)
    return code


def _show(args: argparse.Namespace) -> int:
    from penchant.server import keys
    from penchant.server.folder import Folder

    found = keys.show(Folder(args.folder))
    if args.json:
        print(json.dumps(found, ensure_ascii=False))
        return 0
    print("\n".join(map(_words, found)))
    return 0


def _words(found: dict[str, Any]) -> str:
    if "here" in found:
        return f"{found['what']:24}{'here' if found['here'] else 'not here'}"
    parts = [found["id"][:16]]
    if "serial" in found:
        parts.append(f"serial {found['serial']}")
    if found.get("names"):
        parts.append("for " + ", ".join(found["names"]))
    if "until_ms" in found:
        parts.append("until " + time.strftime("%Y-%m-%d", time.gmtime(found["until_ms"] / 1000)))
    return f"{found['what']:24}{', '.join(parts)}"


def _rotate(args: argparse.Namespace) -> int:
    from penchant.server import keys
    from penchant.server.folder import Folder

    done = keys.rotate(Folder(args.folder), _root(args), now_ms=_now_ms(), days=_days(args))
    _say(args, done)
    return 0


def _compromised(args: argparse.Namespace) -> int:
    from penchant.server import keys
    from penchant.server.folder import Folder

    done = keys.compromised(Folder(args.folder), _root(args), now_ms=_now_ms(), days=_days(args))
    _say(args, done)
    print(
        f"a device that has heard of serial {done.serial} refuses the old key; one that has not believes it until its "
        "certificate expires: ship the new app.bundle now, and keep the server reachable"
    )
    return 0


def _say(args: argparse.Namespace, done: Rotated) -> None:
    what = "a new release key" if done.made else "an interrupted change of the release key was finished"
    print(f"{what}, serial {done.serial}; signed again: {', '.join((*done.channels, 'app.bundle'))}")
    print(f"restart what still holds the old one: penchant serve down {args.folder}, then penchant serve up")
    print(
        f"ship {args.folder / 'app.bundle'} with the app's next version, so that new devices know serial {done.serial}"
    )
    if args.root.resolve().is_relative_to(args.folder.resolve()):
        print(f"{args.root} lies on this machine: who breaks in has it too; move it away")


def _renew(args: argparse.Namespace) -> int:
    from penchant.server import keys
    from penchant.server.folder import Folder

    names = keys.renew_server(
        Folder(args.folder),
        _bytes(args.ca),
        now_ms=_now_ms(),
        days=_days(args),
        names=args.names,
        new_key=args.new_key,
    )
    print(f"a new certificate for {', '.join(names)}, {args.days} days")
    print(f"restart what still holds the old one: penchant serve down {args.folder}, then penchant serve up")
    return 0


def _root(args: argparse.Namespace) -> SigningKey:
    from penchant.server.keys import read_signing_key

    return read_signing_key(_bytes(args.root))


def _bytes(path: Path) -> bytes:
    """A key from wherever it is kept: a stick's file system may know no modes, so they are not looked at."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise InvalidConfig(f"{path}: {error.strerror}; give the key's file, such as offline/root.key") from None


def _days(args: argparse.Namespace) -> int:
    if args.days < 1:
        raise InvalidConfig(f"--days must be ≥ 1, not {args.days}")
    return int(args.days)


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


keys = Command(
    "Show, rotate and renew an operator's keys.",
    "  penchant keys show prod/\n"
    "  penchant keys rotate prod/ --root /media/stick/root.key\n"
    "  penchant keys renew-server prod/ --ca /media/stick/ca.key --days 365",
    _configure,
    _run,
)
