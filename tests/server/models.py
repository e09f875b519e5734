"""A server's folder with rounds behind it, for tests of the registry and the catalogue; no round is run for it."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from penchant.common.artifacts.bundle import Bundle
from penchant.common.artifacts.signing import Certificate, SigningKey
from penchant.common.catalogue import Catalogue
from penchant.common.learners import registry as learners
from penchant.common.learners.contract import State
from penchant.common.streams import Streams
from penchant.server import states
from penchant.server.database import Database
from penchant.server.folder import Folder
from penchant.server.keys import read_signing_key
from penchant.server.registry import Model, Registry, newest_catalogue, release_key
from tests.server.operators import DAY, an_operator


@dataclass
class Server:
    """What the round loop and the operator do, on a clock that starts now and goes on by hand.

    Attributes:
        ahead_ms: of the machine's clock, by which files' ages are told.
    """

    folder: Folder
    ahead_ms: int = 0
    at: Callable[[str], None] = lambda point: None

    @classmethod
    def make(cls, path: Path, toml: str = "") -> Server:
        return cls(an_operator(path, toml=toml, now_ms=time.time_ns() // 1_000_000))

    @property
    def now_ms(self) -> int:
        return time.time_ns() // 1_000_000 + self.ahead_ms

    @property
    def root(self) -> SigningKey:
        return read_signing_key((self.folder.path / "offline" / "root.key").read_bytes())

    def database(self) -> Database:
        return Database(self.folder.database, now_ms=lambda: self.now_ms)

    def registry(self, key: SigningKey | None = None, database: Database | None = None) -> Registry:
        signer = key or release_key(self.folder)
        return Registry(self.folder, database or self.database(), signer, now_ms=lambda: self.now_ms, at=self.at)

    def state(self, round: int, catalogue: Catalogue | None = None) -> State:
        """After so many rounds of sums that are the same in every run."""
        learner = learners.build(
            self.folder.task.learner, self.folder.task.settings, catalogue or newest_catalogue(self.folder)
        )
        state = learner.init(Streams(0))
        for number in range(1, round + 1):
            random = np.random.default_rng(number)
            shapes = learner.shapes(state).items()
            state = learner.apply(state, {name: random.random(shape, np.float32) for name, shape in shapes}, 3.0)
        return state

    def checkpoint(self, round: int) -> State:
        """What the round loop leaves after so many rounds."""
        state, catalogue = self.state(round), newest_catalogue(self.folder)
        with self.database() as database, database.transaction() as db:
            db.execute(
                "INSERT OR REPLACE INTO progress VALUES (?, ?, ?, ?, ?)",
                (self.folder.plan.digest, round, states.save(self.folder, state), catalogue.version, b""),
            )
        return state

    def guarantee(self, round: int) -> Mapping[str, Any]:
        found = self.folder.plan.guarantee(round)
        assert found is not None
        return asdict(found)

    def add(self, round: int, registry: Registry | None = None, **more: Any) -> Model:
        catalogue = newest_catalogue(self.folder)
        given = {"round": round, "plan": self.folder.plan, "guarantee": self.guarantee(round), **more}
        return (registry or self.registry()).add(self.state(round), catalogue, **given)

    def rotate(self, serial: int = 2) -> SigningKey:
        """A new release key, certified, in place of the one before."""
        key = SigningKey(bytes([serial]) * 32)
        certificate = Certificate(
            app_id="films",
            public_key=key.public,
            serial=serial,
            not_before_ms=self.now_ms - DAY,
            not_after_ms=self.now_ms + 365 * DAY,
        )
        self.folder.certificate.write_bytes(certificate.signed(self.root).to_bytes())
        (self.folder.keys / "release.key").write_text(key.private_bytes().hex() + "\n")
        return key

    def device_bundle(self, path: Path, **changes: Any) -> Path:
        """The app's bundle for devices that read the folder itself."""
        found = Bundle.read(self.folder.bundle)
        app = replace(found.app, **{"distribution": self.folder.distribution.as_uri(), "fleet": "", **changes})
        Bundle.write(path, app, self.root, found.offer, catalogue=found.catalogue, model=found.model)
        return path


def stop_at(point: str) -> Callable[[str], None]:
    """What kills this process there."""

    def at(reached: str) -> None:
        if reached == point:
            os.kill(os.getpid(), signal.SIGKILL)

    return at
