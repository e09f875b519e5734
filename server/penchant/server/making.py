"""Makes an operator's folder: what `penchant serve init` asks for.

    catalogue, people, (ε, δ) ──► plan and task ──► keys, certificates ──► first release, bundle ──► server.db, last

All that can be refused is refused before a byte is written. The database comes last and under its name at once, and no
process runs without one: a folder of an init that was stopped is told from one that is whole.
"""

from __future__ import annotations

import csv
import importlib
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path

import numpy as np

from penchant.common import config
from penchant.common.artifacts.bundle import App, Bundle, catalogue_bytes, write_whole
from penchant.common.artifacts.manifest import Blob, Manifest, Offer, Pointer
from penchant.common.artifacts.release import Release
from penchant.common.artifacts.signing import Envelope, SigningKey
from penchant.common.catalogue import Catalogue
from penchant.common.errors import InvalidConfig
from penchant.common.inference.scorer import scorer
from penchant.common.learners import registry
from penchant.common.learners.planned import CHOSEN, PROFILES, PUBLIC_NUMBER, planned, usual_delta
from penchant.common.privacy import gaussian
from penchant.common.privacy.ledger import Ledger
from penchant.common.privacy.plan import PrivacyPlan, task_digest
from penchant.common.streams import Streams
from penchant.server import keys, states, tls
from penchant.server.database import Database
from penchant.server.distribution import publish
from penchant.server.folder import Folder, Settings, Task, sync, write_json, write_secret
from penchant.server.init import LEARNERS

MINIMUM_MET = "whether a round met its minimum of answers, and how often it was tried"
ELSEWHERE = "the first model was made of other people's data, under a promise of its own"


# ------------------------------------------------------------------------------------------------------------ make


def make(
    path: Path,
    *,
    settings: Settings,
    catalogue: Catalogue,
    plan: PrivacyPlan,
    task: Task,
    now_ms: int,
    names: Sequence[str] = (),
    model: bytes | None = None,
    root: SigningKey | None = None,
    release: SigningKey | None = None,
    days: int = keys.DAYS,
) -> Folder:
    """A complete folder, whose server can be started.

    Args:
        path: a new or empty folder.
        names: hosts and addresses that devices reach the edge under, beside this machine's own.
        model: bytes of a released model for the first release; the learner's before its first round if None.
        root: the root key of an app that is there already, which is not written anywhere; None makes one.
        release: the release key; None makes one.
        days: that the release key's and the server's certificates last.

    Raises:
        InvalidConfig: the folder is not empty, or what is given does not belong together; nothing was written. Or no
            place for it: what was written is to be deleted.
        MissingExtra: the learner needs one.
    """
    refuse_what_is_there(path)
    if plan.unit == "none":
        raise InvalidConfig("a plan with unit 'none' promises nothing to the people whose devices take part")
    if plan.population != settings.population:
        raise InvalidConfig(f"the plan is for population {plan.population!r}, not {settings.population!r}")
    if settings.rounds.minimum > plan.cohort:
        raise InvalidConfig(f"a minimum of {settings.rounds.minimum} answers, where a round asks {plan.cohort}")
    learner = registry.build(task.learner, task.settings, catalogue)
    state = learner.init(Streams.from_os())
    if model is None:
        model = Release(learner.released(state), learner.item_side(state)).to_bytes()
    found = Release.from_bytes(model, len(catalogue))
    if found.side is None:
        scorer(task.learner, task.settings, found.state, len(catalogue))  # as a device will
    root, made = root or SigningKey.generate(), root is None
    release = release or SigningKey.generate()
    authority = tls.new_authority(settings.app_id, now_ms=now_ms)
    server = tls.new_server(authority, names, now_ms=now_ms, days=days)
    certificate = keys.certified(root, release.public, app_id=settings.app_id, serial=1, now_ms=now_ms, days=days)
    offer = _first(settings, catalogue, plan, task, model, release, certificate, now_ms)
    address = settings.addresses.public
    app = App(
        app_id=settings.app_id,
        population=plan.population,
        root=root.public,
        distribution=address,
        fleet=address,
        enrolment=address,
        ca=authority.certificate.decode(),
        publisher=settings.publisher,
    )
    toml = to_toml(settings)
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_whole(path / "server.toml", toml.encode())
        write_whole(path / "plan.json", plan.to_json().encode())
        write_json(path / "task.json", {"learner": task.learner, "settings": dict(task.settings)})
        write_json(path / "catalogue.json", catalogue.to_record())
        for name in ("states", "distribution", "ledgers", "flower", "flower-app"):
            (path / name).mkdir(mode=0o700)
        keys.write_secrets(path / "keys")
        keys.write_signing_key(path / "keys" / "release.key", release)
        write_secret(path / "keys" / "server.key", server.key)
        if made:
            keys.write_signing_key(path / "offline" / "root.key", root)
        write_secret(path / "offline" / "ca.key", authority.key)
        (path / "tls").mkdir()
        write_whole(path / "tls" / "ca.crt", authority.certificate)
        write_whole(path / "tls" / "server.crt", server.certificate)
        write_whole(path / "certificate.json", certificate.to_bytes())
        write_whole(path / "flower-app" / "pyproject.toml", flower_app(settings).encode())
        folder = Folder(path)
        publish(folder.distribution, offer, (model, catalogue_bytes(catalogue)), root=root.public, now_ms=now_ms)
        Bundle.write(folder.bundle, app, root, offer, catalogue=catalogue, model=model)
        Ledger(
            plan.population,
            delta=plan.delta,
            budget=settings.budget,
            app_id=settings.app_id,
            path=folder.ledger,
            now_ms=lambda: now_ms,
        ).close()
        _database(folder, plan, states.save(folder, state), catalogue, offer, now_ms)
    except OSError as error:
        raise InvalidConfig(f"{path}: {error.strerror}; delete what is in it and run this again") from None
    return folder


def refuse_what_is_there(path: Path) -> None:
    """
    Raises:
        InvalidConfig: something is.
    """
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    if (path / "server.toml").is_file() and not (path / "server.db").exists():
        raise InvalidConfig(
            f"{path} was left by an init that was stopped, or has lost its server.db: if no server ever ran on it, "
            "delete it and run this again"
        )
    raise InvalidConfig(f"{path} is not an empty folder: give a new one")


def _first(
    settings: Settings,
    catalogue: Catalogue,
    plan: PrivacyPlan,
    task: Task,
    model: bytes,
    release: SigningKey,
    certificate: Envelope,
    now_ms: int,
) -> Offer:
    """Version 1 of the model, on the channel stable."""
    guarantee = plan.guarantee(0)
    manifest = Manifest(
        app_id=settings.app_id,
        population=plan.population,
        version=1,
        created_ms=now_ms,
        model=Blob.of(model),
        catalogue=Blob.of(catalogue_bytes(catalogue)),
        catalogue_version=catalogue.version,
        learner=task.learner,
        settings=task.settings,
        plan=plan.to_json(),
        guarantee=None if guarantee is None else asdict(guarantee),
        metrics={"round": 0},
        software={"penchant": version("penchant")},
    ).signed(release)
    pointer = Pointer(
        app_id=settings.app_id,
        population=plan.population,
        channel="stable",
        sequence=1,
        manifest=manifest.sha256,
        created_ms=now_ms,
        expires_ms=now_ms + int(settings.models.expires_days * keys.DAY_MS),
    )
    return Offer(certificate, pointer.signed(release), manifest)


def _database(folder: Folder, plan: PrivacyPlan, state: str, catalogue: Catalogue, offer: Offer, now_ms: int) -> None:
    """server.db with the checkpoint before the first round, whole under its name."""
    beside = folder.database.with_name("server.db.part")
    Database.make(beside)
    with Database(beside) as database, database.transaction() as db:
        nobody = np.zeros(plan.n_users, "<i8").tobytes()
        db.execute(
            "INSERT INTO progress (plan, done, state, catalogue, participations) VALUES (?, 0, ?, ?, ?)",
            (plan.digest, state, catalogue.version, nobody),
        )
        db.execute(
            "INSERT INTO moves (channel, sequence, version, manifest, at_ms, why) VALUES ('stable', 1, 1, ?, ?, ?)",
            (offer.manifest.sha256, now_ms, "the first release"),
        )
        db.execute("INSERT INTO switches VALUES ('rounds', 'running', ?)", (now_ms,))  # once enough devices are there
    beside.replace(folder.database)
    sync(folder.path)


def to_toml(settings: Settings) -> str:
    """server.toml, with every setting in it."""
    record = config.encode(settings)
    tables = {name: value for name, value in record.items() if isinstance(value, dict)}
    lines = ["# Read at each start. What decides the promise is in plan.json, and is not to be changed."]
    lines += [f"{name} = {_value(value)}" for name, value in record.items() if name not in tables]
    for name, table in tables.items():
        lines += ["", f"[{name}]", *(f"{key} = {_value(value)}" for key, value in table.items())]
    return "\n".join(lines) + "\n"


def _value(value: str | int | float | list[str]) -> str:
    if isinstance(value, str) and not value.isprintable():
        raise InvalidConfig(f"{value!r} has characters that cannot be printed")
    return json.dumps(value, ensure_ascii=False)  # of strings, numbers and lists, TOML reads what JSON writes


def flower_app(settings: Settings) -> str:
    """What is submitted to Flower: names of what is installed, and no code."""
    publisher, _, name = settings.publisher.partition("/")
    return (
        f'[project]\nname = "{name}"\nversion = "1.0.0"\ndescription = ""\nlicense = "Apache-2.0"\ndependencies = []\n'
        f'[tool.flwr.app]\npublisher = "{publisher}"\n[tool.flwr.app.components]\n'
        'serverapp = "penchant.server.app:app"\nclientapp = "penchant.client._flower:client_app"\n'
        "[tool.flwr.app.config]\n"
    )


# -------------------------------------------------------------------------------------------- what it is made of


def new_plan(
    learner: str, *, users: int, epsilon: float, delta: float | None, population: str, uncharged: tuple[str, ...] = ()
) -> tuple[PrivacyPlan, Task]:
    """A plan that its task is bound to, for so many people at (ε, δ).

    Args:
        delta: None for `usual_delta`.

    Raises:
        InvalidConfig: a number that no plan has, such as δ ≥ 1/n.
    """
    if learner not in LEARNERS:
        raise InvalidConfig(f"a plan for --learner {learner} is made by a simulation: give its bundle with --from")
    if users < 1:
        raise InvalidConfig(f"--users must be ≥ 1, not {users}")
    if delta is None:
        delta = usual_delta(users)
    if not 0 < delta < 1 / users:
        raise InvalidConfig(f"delta {delta:g} is not below 1/{users}: take --delta {usual_delta(users):g}")
    mu = gaussian.mu_of(epsilon, delta) * (1 - 1e-9)  # dividing it must not round ε up
    said = (*uncharged, CHOSEN, PUBLIC_NUMBER, PROFILES, MINIMUM_MET)
    made, plan = planned(learner, n_users=users, mu=mu, delta=delta, population=population, uncharged=said)
    return replace(plan, task=task_digest(learner, made)), Task(learner, dict(made))


def embedded() -> Catalogue:
    """The movies of MovieLens ml-latest-small, the very catalogue that `penchant simulate` has.

    Raises:
        InvalidConfig: penchant-movielens is not installed.
    """
    try:
        path = Path(importlib.import_module("penchant_movielens").path())
    except ModuleNotFoundError:
        raise InvalidConfig(
            "what can be recommended? give --catalogue FILE, a CSV of item,title,topics, or --from BUNDLE"
        ) from None
    with (path / "movies.csv").open(encoding="utf-8", newline="") as file:
        ids, titles, genres = zip(*([cell.strip() for cell in row] for row in list(csv.reader(file))[1:]), strict=True)
    topics = tuple(tuple(name for name in named.split("|") if name != "(no genres listed)") for named in genres)
    return Catalogue(ids=ids, titles=titles, topics=topics, name="ml-latest-small")
