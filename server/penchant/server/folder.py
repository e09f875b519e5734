"""An operator's folder: one app, one population, everything that its server needs and keeps.

    server.toml               what may be changed between two starts: addresses, deadlines, how a model becomes stable
    plan.json                 the privacy plan, frozen: changing it is another promise
    task.json                 the learner and its settings, which the plan names
    app.bundle                what the app ships with
    keys/                     release.key, server.key, superexec.secret, admin.token, subjects.secret: the server's own
    offline/                  root.key and ca.key: made here, and to be taken away from here
    tls/                      ca.crt, server.crt
    certificate.json          the root key's word for the release key
    server.db                 rounds, roster, tokens (database.py)
    ledgers/POPULATION.sqlite what was charged (privacy/ledger.py)
    states/SHA256.safetensors the learner's state after each round, the server's part included
    distribution/             what devices get (distribution.py, registry.py)
    catalogue.json            the newest catalogue's record
    flower-app/pyproject.toml what is submitted to Flower: a name, and no code
    flower/                   SuperLink's own: state.db, FLWR_HOME
    run/, logs/               of the processes: pids, the proxy's configuration; structured lines

Nothing of one person is in it but contributions' effect on a noised sum, a device's public key and its place.
"""

from __future__ import annotations

import json
import os
import re
import tomllib
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from penchant.common import config
from penchant.common.artifacts.bundle import write_whole
from penchant.common.errors import InvalidConfig, MalformedData
from penchant.common.privacy.plan import PrivacyPlan, task_digest

SCHEMA_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Addresses:
    """Where the processes listen, each as "host:port".

    Attributes:
        edge: the proxy's, which devices reach; everything else stays on this machine.
        public: how devices name the edge; "" for `edge` itself.
        operator: metrics, health, the operator's page, tokens for the app's backend; in the clear, so beyond 127.0.0.1
            only on a network of your own, such as a container's.
        operator_names: host names beside that address under which it may be asked; any other is refused.
        superlink: Flower's, all of its APIs on one port.
        services: the gRPC service of distribution and enrolment.
    """

    edge: str = "0.0.0.0:8443"
    public: str = "localhost:8443"
    operator: str = "127.0.0.1:8444"
    superlink: str = "127.0.0.1:8445"
    services: str = "127.0.0.1:8446"
    operator_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        seen = set()
        for name in ("edge", "public", "operator", "superlink", "services"):
            address = getattr(self, name)
            host, _, port = address.rpartition(":")
            if not host or not port.isdigit() or not 0 < int(port) < 65536:
                raise InvalidConfig(f"addresses.{name} must be host:port, such as 127.0.0.1:8443, not {address!r}")
            if name != "public":
                if port in seen:
                    raise InvalidConfig(f"addresses.{name}: port {port} is another process's already")
                seen.add(port)
        for name in ("superlink", "services"):
            if getattr(self, name).rpartition(":")[0] not in ("127.0.0.1", "localhost"):
                raise InvalidConfig(f"addresses.{name} must stay on this machine: 127.0.0.1")
        names = self.operator_names
        if not isinstance(names, tuple) or not all(re.fullmatch(r"[A-Za-z0-9._-]+", str(name)) for name in names):
            raise InvalidConfig(f'addresses.operator_names must be host names, such as ["penchant"], not {names!r}')


@dataclass(frozen=True, kw_only=True)
class RoundSettings:
    """How a round is run. None of it changes σ, clip or divisor, nor whose answers are in the sum.

    There is no "the first N": one person more would push another out, and the sum would move by twice the clip.

    Attributes:
        deadline_s: how long a round waits for answers.
        minimum: answers below which a round is abandoned, and nothing of it is released.
        pause_s: between two rounds.
        retry_s: after an abandoned round, doubled each time up to an hour.
    """

    deadline_s: float = 3600.0
    minimum: int = 1
    pause_s: float = 0.0
    retry_s: float = 10.0

    def __post_init__(self) -> None:
        for name in ("deadline_s", "retry_s"):
            if not 0 < getattr(self, name) < float("inf"):
                raise InvalidConfig(f"rounds.{name} must be positive and finite, not {getattr(self, name)}")
        if self.minimum < 1 or not 0 <= self.pause_s < float("inf"):
            raise InvalidConfig("rounds needs minimum ≥ 1 and a finite pause_s ≥ 0")


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """How releases reach devices.

    Attributes:
        promote: "by hand" leaves a new model on the channel candidate; "automatic" makes it stable at once.
        expires_days: after which a channel's pointer is no longer taken by devices; renewed while the server runs.
        keep: newest models that garbage collection keeps beside those that a channel names.
    """

    promote: Literal["by hand", "automatic"] = "by hand"
    expires_days: float = 30.0
    keep: int = 10

    def __post_init__(self) -> None:
        if self.promote not in ("by hand", "automatic"):
            raise InvalidConfig(f"models.promote is 'by hand' or 'automatic', not {self.promote!r}")
        if not 0 < self.expires_days <= 3650 or self.keep < 1:
            raise InvalidConfig("models needs expires_days in (0, 3650] and keep ≥ 1")


@dataclass(frozen=True, kw_only=True)
class EnrolmentSettings:
    """
    Attributes:
        per_minute: calls that one address may make before it is told to wait.
    """

    per_minute: int = 60

    def __post_init__(self) -> None:
        if self.per_minute < 1:
            raise InvalidConfig("enrolment.per_minute must be ≥ 1")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """server.toml.

    Attributes:
        app_id, population: whose server it is.
        publisher: "publisher/name" of the Flower app.
        budget: ε that the population's ledger must not pass; None where the plan alone limits the rounds.
    """

    app_id: str
    population: str = "default"
    publisher: str = "operator/rounds"
    budget: float | None = None
    addresses: Addresses = field(default_factory=Addresses)
    rounds: RoundSettings = field(default_factory=RoundSettings)
    models: ModelSettings = field(default_factory=ModelSettings)
    enrolment: EnrolmentSettings = field(default_factory=EnrolmentSettings)
    schema_version: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        if self.schema_version != SCHEMA_VERSION:
            raise InvalidConfig(f"server.toml is of version {self.schema_version!r}; update penchant")
        if not self.app_id or not self.population or self.publisher.count("/") != 1:
            raise InvalidConfig("server.toml needs an app_id, a population and a publisher/name")


@dataclass(frozen=True)
class Task:
    """What devices compute: a learner by name, and its settings as plain types."""

    learner: str
    settings: dict[str, Any]


class Folder:
    """
    Args:
        path: made by `penchant serve init`.

    Raises:
        InvalidConfig: no such folder, or a setting in it that cannot be.
        MalformedData: a file of it is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path.resolve()
        if not (self.path / "server.toml").is_file():
            raise InvalidConfig(f"{path} is no server's folder: make one with penchant serve init {path}")
        try:
            record = tomllib.loads((self.path / "server.toml").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InvalidConfig(f"{path / 'server.toml'}: {error}") from None
        self.settings = config.decode(Settings, record)

    @cached_property
    def plan(self) -> PrivacyPlan:
        return PrivacyPlan.from_json(self._text("plan.json"))

    @cached_property
    def task(self) -> Task:
        try:
            record = json.loads(self._text("task.json"))
            found = Task(str(record["learner"]), dict(record["settings"]))
        except (ValueError, KeyError, TypeError):
            raise MalformedData(f"{self.path / 'task.json'} is damaged: restore it from a backup") from None
        if self.plan.task not in ("", task_digest(found.learner, found.settings)):
            raise InvalidConfig("task.json is not the task that plan.json names: restore both from a backup")
        return found

    # files

    @property
    def database(self) -> Path:
        return self.path / "server.db"

    @property
    def ledger(self) -> Path:
        return self.path / "ledgers" / f"{self.settings.population}.sqlite"

    @property
    def states(self) -> Path:
        return self.path / "states"

    @property
    def distribution(self) -> Path:
        return self.path / "distribution"

    @property
    def keys(self) -> Path:
        return self.path / "keys"

    @property
    def tls(self) -> Path:
        return self.path / "tls"

    @property
    def certificate(self) -> Path:
        return self.path / "certificate.json"

    @property
    def bundle(self) -> Path:
        return self.path / "app.bundle"

    @property
    def run(self) -> Path:
        return self._made("run")

    @property
    def logs(self) -> Path:
        return self._made("logs")

    def _made(self, name: str) -> Path:
        path = self.path / name
        path.mkdir(mode=0o700, exist_ok=True)
        return path

    def _text(self, name: str) -> str:
        try:
            return (self.path / name).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise MalformedData(f"{self.path / name}: {error}; restore it from a backup") from None


def secret(path: Path) -> bytes:
    """The bytes of a key file that only its owner may read.

    Raises:
        InvalidConfig: absent, or others may read it.
    """
    try:
        if os.name == "posix" and path.stat().st_mode & 0o077:
            raise InvalidConfig(f"{path} can be read by others: chmod 600 {path}")
        return path.read_bytes()
    except OSError as error:
        raise InvalidConfig(f"{path}: {error.strerror}; penchant doctor says what is missing") from None


def write_secret(path: Path, data: bytes) -> None:
    """Writes a key file, its mode 0600 from the first byte on, whole or not at all."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.{os.getpid()}.part")
    descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def write_json(path: Path, record: Any) -> None:
    """Whole or not at all."""
    write_whole(path, (json.dumps(record, indent=1, ensure_ascii=False, sort_keys=True) + "\n").encode())


def sync(folder: Path) -> None:
    """Makes the names in a folder last, as its files' bytes do already."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
