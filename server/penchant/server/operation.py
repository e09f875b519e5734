"""The rounds of an operator's folder: what they start from, every phase of them on disk, and what follows a release.

    checkpoint ──► Rounds ──► phase by phase into server.db ──► released: state file, then checkpoint ──► candidate

One process runs a folder's rounds; a lock says which. A try that was under way when its process ended is written down
as abandoned when the next one starts: whether it had been charged is the ledger's to know, and a next try is charged
again with fresh noise. A release counts once its checkpoint is written; what is on disk is never ahead of the ledger.

Source: the phases are those of Bonawitz et al. 2019, https://arxiv.org/abs/1902.01046, section 3, with a charge before
every release.
"""

from __future__ import annotations

import fcntl
import json
import sqlite3
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import IO, Self

import numpy as np

from penchant.common.errors import InvalidConfig, MalformedData, PrivacyRefused
from penchant.common.learners import registry as learners
from penchant.common.privacy.ledger import Ledger
from penchant.common.privacy.plan import Guarantee
from penchant.common.streams import Streams
from penchant.server import states, wanted
from penchant.server.catalogue_ops import adopted
from penchant.server.database import Database
from penchant.server.enrolment import NotRunning, Roster
from penchant.server.folder import Folder
from penchant.server.keys import release_key
from penchant.server.making import MINIMUM_MET
from penchant.server.registry import Registry
from penchant.server.rounds import Phase, Progress, RoundRecord, Rounds

MOST_CHARGES = 3
"""Charges of one round without a release, after which the operator is asked: each costs budget and gives nothing."""
STOPPED = "the server stopped"
LOCK_S = 1.0
"""The supervisor looks at the lock by taking it for a moment."""


class Operation:
    """A folder's rounds. `close` it, or use it as a context.

    Args:
        now_ms: UTC milliseconds.
        at: called with "PHASE:before" and "PHASE:after" around each write; tests stop there.

    Raises:
        InvalidConfig: another process runs this folder's rounds, or its files do not belong together.
        UntrustedArtifact: the root key does not vouch for the release key: devices would refuse every round.
        MalformedData: a file of it is damaged.
    """

    def __init__(
        self,
        folder: Folder,
        *,
        now_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
        at: Callable[[str], None] = lambda point: None,
    ) -> None:
        self.folder, self.settings, self._now_ms, self._at = folder, folder.settings, now_ms, at
        self.key, self.certificate = release_key(folder)
        self._lock = (folder.run / "rounds.lock").open("w")
        until = time.monotonic() + LOCK_S
        while not _locked(self._lock):
            if time.monotonic() > until:
                self._lock.close()
                raise InvalidConfig(f"another process runs the rounds of {folder.path}: stop it first")
            time.sleep(0.05)
        self.plan, self.task = folder.plan, folder.task
        self.database = Database(folder.database, now_ms=now_ms)
        self.ledger = Ledger(
            self.plan.population,
            delta=self.plan.delta,
            budget=self.settings.budget,
            app_id=self.settings.app_id,
            path=folder.ledger,
            now_ms=now_ms,
        )
        self.models = Registry(folder, self.database, self.key, now_ms=now_ms)
        self._roster = Roster.of(folder, NotRunning())
        self._settle()

    def close(self) -> None:
        self.ledger.close()
        self.database.close()
        self._lock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # what the operator wants

    def go_on(self) -> bool:
        """Whether another round is wanted and possible."""
        return wanted.wanted(self.database) and self._progress()["done"] < self.plan.rounds

    def hold(self, why: str) -> None:
        """Pauses the rounds until the operator starts them again."""
        wanted.pause(self.database, why)

    # a round

    def nodes(self) -> dict[int, int]:
        """The number that Flower knows each device by, by its place in the roster."""
        return self._roster.live()

    def rounds(self) -> Rounds:
        """What the next round runs on, from the checkpoint, over the newest catalogue.

        Raises:
            PrivacyRefused: the ledger lacks charges of what was released, or one round was charged too often.
            MalformedData: the checkpoint is damaged.
        """
        row = self._progress()
        participations = np.frombuffer(row["participations"], "<i8").astype(np.int64)
        if participations.shape != (self.plan.n_users,):
            raise MalformedData(f"{self.database.path}: a checkpoint of another roster: restore it from a backup")
        catalogue, state = adopted(self.folder, self.database)
        number = row["done"] + 1
        spent = self.ledger.attempts(number, self.plan.digest)
        if spent >= MOST_CHARGES and self.database.switch("charged") != f"{number}:{spent}":
            self.database.set_switch("charged", f"{number}:{spent}")  # whoever starts again has seen it
            raise PrivacyRefused(f"round {number} was charged {spent} times and never released; see logs/")
        made = Rounds(
            learner=learners.build(self.task.learner, self.task.settings, catalogue),
            settings=self.task.settings,
            plan=self.plan,
            roster=(1,) * self.plan.n_users,
            ledger=self.ledger,
            streams=Streams.from_os(),
            progress=Progress(state, participations, row["done"]),
            watch=lambda phase, record: self._watch(lambda: made, phase, record),
            attempts=self._tries,
            minimum=self.settings.rounds.minimum,
        )
        return made

    def publish(self) -> None:
        """Makes a model of the newest checkpoint, for the channels that it is meant for; again does no harm."""
        if not (done := self._progress()["done"]):
            return  # the first model is as `serve init` made it
        catalogue, state = adopted(self.folder, self.database)
        guarantee = self._guarantee(done)
        told = None if guarantee is None else asdict(guarantee)
        self.models.add(state, catalogue, round=done, plan=self.plan, guarantee=told)

    # what is on disk

    def _settle(self) -> None:
        """Ends the tries that no process is at any more."""
        for row in self.database.rows("SELECT * FROM rounds WHERE phase NOT IN ('released', 'abandoned')"):
            found = RoundRecord(
                round=row["round"],
                attempt=row["attempt"],
                sum=row["sum"],
                drawn=row["drawn"],
                nodes=row["asked"],
                answered=row["answered"],
                refused=json.loads(row["refused"]),
                abandoned=STOPPED,
            )
            with self.database.transaction() as db:
                self._write(db, "abandoned", row["plan"], found)

    def _progress(self) -> sqlite3.Row:
        found = self.database.one("SELECT * FROM progress WHERE plan = ?", self.plan.digest)
        if found is None:
            raise MalformedData(f"{self.database.path} has no checkpoint of plan.json: restore both from a backup")
        return found

    def _tries(self, number: int) -> int:
        query = "SELECT max(attempt) AS last FROM rounds WHERE plan = ? AND round = ?"
        last = self.database.rows(query, self.plan.digest, number)[0]["last"]
        return max(0 if last is None else last + 1, self.ledger.attempts(number, self.plan.digest))

    def _watch(self, rounds: Callable[[], Rounds], phase: Phase, record: RoundRecord) -> None:
        """Writes a phase down; with a release, the checkpoint in the same transaction."""
        self._at(f"{phase}:before")
        state = ""
        if phase == "released":
            state = states.save(self.folder, rounds().state)
            self._at("released:saved")
        with self.database.transaction() as db:
            self._write(db, phase, self.plan.digest, record)
            if phase == "released":
                db.execute(
                    "UPDATE progress SET done = ?, state = ?, catalogue = ?, participations = ? WHERE plan = ?",
                    (
                        record.round,
                        state,
                        rounds().learner.catalogue.version,
                        rounds().progress.participations.astype("<i8").tobytes(),
                        self.plan.digest,
                    ),
                )
        self._at(f"{phase}:after")
        if phase == "released":
            self._clean(state)

    def _write(self, db: sqlite3.Connection, phase: Phase, plan: str, record: RoundRecord) -> None:
        now = self._now_ms()
        db.execute(
            "INSERT OR REPLACE INTO rounds VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                *(plan, record.round, record.attempt, phase, now, record.sum, record.drawn, record.nodes),
                *(record.answered, json.dumps(dict(record.refused)), record.seconds, record.abandoned),
            ),
        )
        db.execute(
            "INSERT INTO phases (plan, round, attempt, phase, at_ms) VALUES (?, ?, ?, ?, ?)",
            (plan, record.round, record.attempt, phase, now),
        )

    def _clean(self, newest: str) -> None:
        """Deletes states that no checkpoint names; the one before the newest stays for whoever reads it now."""
        files = sorted(self.folder.states.glob("*.safetensors"), key=lambda path: path.stat().st_mtime)
        named = {row["state"] for row in self.database.rows("SELECT state FROM progress")} | {newest}
        for path in files[:-2]:
            if path.stem not in named:
                path.unlink(missing_ok=True)

    def _guarantee(self, done: int) -> Guarantee | None:
        """What holds for the population after all that its ledger was ever charged."""
        promised = self.plan.guarantee(done, self.ledger.neighbours, self.ledger.repeated(self.plan.digest))
        if promised is None or self.plan.unit != "user":
            return promised
        spent = self.ledger.spent()
        return replace(
            promised,
            epsilon=spent.epsilon,
            accountant=spent.accountant,
            uncharged=tuple(dict.fromkeys((*promised.uncharged, MINIMUM_MET))),
        )


def _locked(lock: IO[str]) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
