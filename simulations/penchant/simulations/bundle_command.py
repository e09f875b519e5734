"""The subcommand `penchant bundle`: from a run to what an app ships with. Light to import."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from penchant.common.cli import Command
from penchant.common.errors import InvalidConfig


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run", dest="folder", type=Path, required=True, metavar="DIR", help="folder of a run")
    parser.add_argument("--row", help="whose model (default: the run's last federated row)")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the bundle to write")
    parser.add_argument("--app-id", required=True, help="names the app, such as com.example.films")
    parser.add_argument("--keys", type=Path, default=Path("keys"), metavar="DIR", help="made if absent (default: keys)")
    parser.add_argument("--distribution", default="", metavar="WHERE", help="host:port, or a URL of a folder")
    parser.add_argument("--days", type=int, default=365, help="until its signatures expire (default: 365)")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")


def _run(args: argparse.Namespace) -> int:
    from penchant.simulations.bundle import Keys, make_bundle
    from penchant.simulations.runs import RunFolder

    if args.days < 1:
        raise InvalidConfig(f"--days must be ≥ 1, not {args.days}")
    folder = RunFolder(args.folder)
    federated = [row["name"] for row in folder.read_results()["runs"] if row["kind"] == "federated"]
    if args.row is None and not federated:
        raise InvalidConfig(f"{args.folder} holds no federated row, so no model was released")
    made = make_bundle(
        folder,
        args.row or federated[-1],
        args.out,
        Keys.kept(args.keys),
        app_id=args.app_id,
        distribution=args.distribution,
        days=args.days,
    )
    manifest = made.manifest
    if args.json:
        said = {"app_id": manifest.app_id, "population": manifest.population, "version": manifest.version}
        print(json.dumps({**said, "items": len(made.catalogue), "guarantee": manifest.guarantee}))
        return 0
    print(f"{args.out}: {manifest.learner} version {manifest.version}, {len(made.catalogue)} items, for {args.app_id}")
    if manifest.guarantee is None:
        print("its model was made of exact sums: it is not private", file=sys.stderr)
    print(
        f"try it: python -c \"from penchant.client import Client; me = Client.open('state/', bundle='{args.out}'); "
        'print(me.recommend(10))"'
    )
    return 0


bundle = Command(
    "Make of a run's model what an app ships with.",
    "  penchant bundle --run runs/a --app-id films --out films.bundle",
    _configure,
    _run,
)
