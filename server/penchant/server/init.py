"""The options of `penchant serve init`, and what it says once the folder is made (`making.py`). Light to import."""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from penchant.common.errors import InvalidConfig

if TYPE_CHECKING:
    from penchant.common.catalogue import Catalogue
    from penchant.common.privacy.plan import PrivacyPlan
    from penchant.server.folder import Folder, Settings, Task

LEARNERS = ("cooccurrence", "als")
"""Those whose plan follows from how many people there are."""
PORT = 8443
USERS, EPSILON = 1000, 8.0


def configure_init(parser: argparse.ArgumentParser) -> None:
    """The options of `penchant serve init`."""
    parser.add_argument("folder", type=Path, metavar="DIR", help="a new or empty folder, such as prod/")
    what = parser.add_argument_group("what is recommended")
    source = what.add_mutually_exclusive_group()
    source.add_argument(
        "--catalogue",
        type=Path,
        metavar="FILE",
        help="CSV or Parquet of item,title,topics (default: the embedded MovieLens set)",
    )
    source.add_argument(
        "--from",
        dest="bundle",
        type=Path,
        metavar="BUNDLE",
        help="go on from what penchant bundle made of a simulation",
    )
    what.add_argument("--app-id", metavar="ID", help="names the app (default: the folder's name, or the bundle's)")
    what.add_argument("--root", type=Path, metavar="FILE", help="the root key of an app that is there already")
    who = parser.add_argument_group("who takes part, and what they are promised")
    who.add_argument("--population", metavar="NAME", help="people whose contributions are summed (default: default)")
    who.add_argument("--users", type=int, metavar="N", help=f"places in the roster (default: {USERS})")
    who.add_argument("--epsilon", type=float, help=f"ε of all rounds together (default: {EPSILON:g})")
    words = "ε that no repeat may pass, for ever (default: none; a round that is repeated is charged again)"
    who.add_argument("--budget", type=float, metavar="EPSILON", help=words)
    who.add_argument("--delta", type=float, help="δ, below 1 over the users (default: 1e-5, or 1/(10 N) if smaller)")
    who.add_argument("--learner", choices=LEARNERS, help=f"what is learned (default: {LEARNERS[0]})")
    how = parser.add_argument_group("how it runs")
    how.add_argument(
        "--host",
        action="append",
        default=[],
        metavar="NAME",
        help="name or address that devices reach this machine under; the first goes into the bundle (default: none, "
        "and only this machine is reached)",
    )
    how.add_argument("--port", type=int, default=PORT, help=f"of the edge; three more follow (default: {PORT})")
    how.add_argument("--minimum", type=int, metavar="N", help="answers below which a round is given up (default: half)")
    how.add_argument("--deadline", type=float, metavar="S", help="seconds that a round waits (default: 3600)")
    how.add_argument(
        "--promote", choices=("by hand", "automatic"), help="how a new model becomes stable (default: by hand)"
    )
    how.add_argument(
        "--operator",
        default="127.0.0.1",
        metavar="ADDRESS",
        help="where the operator's page, metrics and tokens listen, in the clear; 0.0.0.0 only inside a container "
        "(default: 127.0.0.1)",
    )
    how.add_argument(
        "--operator-name",
        action="append",
        default=[],
        metavar="NAME",
        help="another host name that they may be asked under, such as the container's (default: none)",
    )


def run_init(args: argparse.Namespace, *, now_ms: int | None = None) -> int:
    """Makes the folder that the options ask for, and says what is not safe yet."""
    from penchant.server import keys
    from penchant.server.making import make, refuse_what_is_there

    refuse_what_is_there(args.folder)
    start = _start(args)
    settings = _settings(args, start)
    root = None if args.root is None else keys.read_signing_key(_bytes(args.root))
    folder = make(
        args.folder,
        settings=settings,
        catalogue=start.catalogue,
        plan=start.plan,
        task=start.task,
        now_ms=time.time_ns() // 1_000_000 if now_ms is None else now_ms,
        names=args.host,
        model=start.model,
        root=root,
    )
    print(_words(args, folder, start))
    return 0


@dataclass(frozen=True, kw_only=True)
class Start:
    """What an operator starts from.

    Attributes:
        model: of a bundle that is gone on from; else None.
    """

    app_id: str
    catalogue: Catalogue
    plan: PrivacyPlan
    task: Task
    model: bytes | None = None


def _start(args: argparse.Namespace) -> Start:
    from penchant.common.artifacts.bundle import Bundle
    from penchant.common.privacy.plan import PrivacyPlan, task_digest
    from penchant.server.catalogue_ops import read_items
    from penchant.server.folder import Task
    from penchant.server.making import ELSEWHERE, MINIMUM_MET, embedded, new_plan

    asked = {name: getattr(args, name) for name in ("users", "epsilon", "delta", "learner")}
    epsilon = EPSILON if args.epsilon is None else args.epsilon
    if args.bundle is None:
        catalogue = embedded() if args.catalogue is None else read_items(args.catalogue, name=args.catalogue.stem)
        plan, task = new_plan(
            args.learner or LEARNERS[0],
            users=USERS if args.users is None else args.users,
            epsilon=epsilon,
            delta=args.delta,
            population="default" if args.population is None else args.population,
        )
        app_id = args.folder.resolve().name if args.app_id is None else args.app_id
        return Start(app_id=app_id, catalogue=catalogue, plan=plan, task=task)
    bundle = Bundle.read(args.bundle)
    before, manifest = PrivacyPlan.from_json(bundle.manifest.plan), bundle.manifest
    population = before.population if args.population is None else args.population
    if any(value is not None for value in asked.values()):
        plan, task = new_plan(
            args.learner or manifest.learner,
            users=before.n_users if args.users is None else args.users,
            epsilon=epsilon,
            delta=args.delta,
            population=population,
            uncharged=(ELSEWHERE,),
        )
    else:
        task = Task(manifest.learner, dict(manifest.settings))
        said = tuple(dict.fromkeys((*before.uncharged, ELSEWHERE, MINIMUM_MET)))
        digest = task_digest(task.learner, task.settings)
        plan = replace(before, population=population, task=digest, uncharged=said)
    return Start(
        app_id=manifest.app_id if args.app_id is None else args.app_id,
        catalogue=bundle.catalogue,
        plan=plan,
        task=task,
        model=bundle.model,
    )


def _settings(args: argparse.Namespace, start: Start) -> Settings:
    from penchant.server.folder import Addresses, ModelSettings, RoundSettings, Settings

    if not 0 < args.port < 65533:
        raise InvalidConfig(f"--port and the three after it must be below 65536, not {args.port}")
    host = args.host[0] if args.host else "localhost"
    listens = "0.0.0.0" if args.host else "127.0.0.1"
    addresses = Addresses(
        edge=f"{listens}:{args.port}",
        public=f"[{host}]:{args.port}" if ":" in host else f"{host}:{args.port}",
        operator=f"{args.operator}:{args.port + 1}",
        operator_names=tuple(args.operator_name),
        superlink=f"127.0.0.1:{args.port + 2}",
        services=f"127.0.0.1:{args.port + 3}",
    )
    half = (start.plan.cohort + 1) // 2  # fewer would spend the same budget on next to nothing
    rounds: dict[str, Any] = {
        "minimum": half if args.minimum is None else args.minimum,
        "deadline_s": args.deadline,
    }
    if args.bundle is not None and args.promote == "automatic":
        raise InvalidConfig("the first round's model would take the place of the bundle's: promote by hand")
    return Settings(
        app_id=start.app_id,
        population=start.plan.population,
        budget=args.budget,
        addresses=addresses,
        rounds=RoundSettings(**{name: value for name, value in rounds.items() if value is not None}),
        models=ModelSettings() if args.promote is None else ModelSettings(promote=args.promote),
    )


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InvalidConfig(f"{path}: {error.strerror}") from None


def _words(args: argparse.Namespace, folder: Folder, start: Start) -> str:
    from penchant.server.keys import root_of

    plan, settings, where = start.plan, folder.settings, str(args.folder)
    offline = "offline/ca.key lies" if args.root is not None else "offline/root.key and offline/ca.key lie"
    warnings = [
        f"{offline} on this machine: move offline/ to a stick that stays out of it, and keep a copy",
        "this server is trusted: it sees each contribution before it is summed and noised",
        "the TLS certificate is by an authority of your own: only devices with this app.bundle trust it",
        "nothing is backed up: who loses the ledger must start a new population (penchant backup --help)",
        "who reads keys/admin.token acts as the operator: hand it to the app's backend by a safe way",
        "statements have times: keep this machine's clock right (NTP), or devices refuse them",
    ]
    if args.budget is None and plan.unit == "user":
        warnings.append("a round that is repeated after a crash is charged again: --budget would stop there")
    if args.operator not in ("127.0.0.1", "localhost"):
        warnings.append(
            f"the operator's page listens at {settings.addresses.operator} in the clear: let nobody but you reach it"
        )
    if not args.host:
        warnings.append("no --host was given: only this machine reaches the server")
    if args.bundle is None and args.catalogue is None:
        warnings.append("the catalogue is MovieLens': research only, no commercial use")
    return "\n".join(
        (
            f"{where}: a server for app {settings.app_id}, population {settings.population}",
            f"  catalogue   {len(start.catalogue):,} items ({start.catalogue.name})",
            f"  learner     {start.task.learner}, {plan.rounds} rounds, up to {plan.n_users:,} people",
            f"  promise     {plan.guarantee()}",
            f"  devices     ship {Path(where) / 'app.bundle'} in the app; they reach {settings.addresses.public}",
            f"  root key    {root_of(folder).id}",
            "",
            "Not safe yet:",
            *(f"  - {warning}" for warning in warnings),
            "",
            f"Next: penchant serve up {where}",
        )
    )
