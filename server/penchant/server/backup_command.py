"""The subcommands `penchant backup` and `penchant restore`. Light to import."""

from __future__ import annotations

import argparse
import getpass
import os
import sys
from pathlib import Path

from penchant.common.cli import Command
from penchant.common.errors import InvalidConfig

VARIABLE = "PENCHANT_PASSPHRASE"
LEAST = 12
"""Characters of a passphrase: whoever has the file may guess for as long as they like."""


def _configure_backup(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="DIR", help="the server's folder; the server may run")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the backup to write")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--without-keys", action="store_true", help="leave keys/ out, and seal nothing")
    _passphrase_file(how)


def _passphrase_file(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--passphrase-file",
        type=Path,
        metavar="FILE",
        help=f"holds the passphrase (default: the environment's {VARIABLE}, else it is asked for)",
    )


def _backup(args: argparse.Namespace) -> int:
    from penchant.server.backup import backup
    from penchant.server.folder import Folder

    folder = Folder(args.folder)
    passphrase = None if args.without_keys else _passphrase(args.passphrase_file, new=True)
    made = backup(folder, args.out, passphrase)
    print(f"{args.out}: {made}, after round {made.done}")
    print(f"ledger of {made.entries} entries; note its head elsewhere: {made.head}")
    print(f"check it: penchant restore {args.out} --verify", file=sys.stderr)
    if not made.keys:
        print("keys/ is not in it: without them a restored server cannot sign or start", file=sys.stderr)
    return 0


def _configure_restore(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, metavar="FILE", help="a backup")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--to", type=Path, metavar="DIR", help="a folder to make, or an empty one")
    what.add_argument("--verify", action="store_true", help="only check it")
    parser.add_argument("--ledger", type=Path, metavar="PATH", help="that the server had last, if it is left")
    _passphrase_file(parser)


def _restore(args: argparse.Namespace) -> int:
    from penchant.server.backup import is_sealed, restore, verify

    if args.verify and args.ledger:
        raise InvalidConfig("--ledger goes with --to")
    passphrase = _passphrase(args.passphrase_file, new=False) if is_sealed(args.file) else None
    if args.verify:
        lines = verify(args.file, passphrase)
        print("\n".join(f"OK {line}" for line in lines))
        return 0
    lines = restore(args.file, args.to, passphrase, ledger=args.ledger)
    print(f"{args.to}: restored")
    print("\n".join(lines), file=sys.stderr)
    return 0


def _passphrase(file: Path | None, *, new: bool) -> str:
    """From a file, the environment, or whoever sits there; never from the command line, which others can read.

    Raises:
        InvalidConfig: none, too short for a new backup, or typed differently the second time.
    """
    if file is not None:
        try:
            found = file.read_text(encoding="utf-8").rstrip("\r\n")
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidConfig(f"--passphrase-file {file}: {error}") from None
    elif VARIABLE in os.environ:
        found = os.environ[VARIABLE]
    elif sys.stdin.isatty():
        found = getpass.getpass("passphrase of the backup: ")
        if new and getpass.getpass("once more: ") != found:
            raise InvalidConfig("the two passphrases differ; nothing was written")
    else:
        raise InvalidConfig(f"a backup with keys needs a passphrase: --passphrase-file FILE, or {VARIABLE}")
    if new and len(found) < LEAST:
        raise InvalidConfig(f"the passphrase must have at least {LEAST} characters")
    if not found:
        raise InvalidConfig("the passphrase is empty")
    return found


backup = Command(
    "Copy a server's folder into one sealed file, while it runs.",
    "  penchant backup prod/ --out prod.backup --passphrase-file passphrase\n"
    "  penchant backup prod/ --out prod.backup --without-keys",
    _configure_backup,
    _backup,
)
restore = Command(
    "Check a backup, or make a server's folder of it.",
    "  penchant restore prod.backup --verify\n"
    "  penchant restore prod.backup --to prod/\n"
    "  penchant restore prod.backup --to prod/ --ledger kept/default.sqlite",
    _configure_restore,
    _restore,
)
