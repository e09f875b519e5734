"""A folder's rounds survive a kill at any point: nothing is released twice or uncharged, and all end released."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from penchant.client.node import Node
from penchant.common.artifacts.bundle import Bundle
from penchant.common.artifacts.signing import Certificate, Envelope, SigningKey
from penchant.common.errors import InvalidConfig, MalformedData, PrivacyRefused, UntrustedArtifact
from penchant.common.interactions import Interactions
from penchant.common.learners import registry
from penchant.common.privacy.ledger import Ledger
from penchant.common.streams import Streams
from penchant.common.wire import Reply
from penchant.server import keys, states, wanted
from penchant.server.catalogue_ops import adopted
from penchant.server.database import Database
from penchant.server.folder import Folder
from penchant.server.operation import MOST_CHARGES, STOPPED, Operation
from penchant.server.registry import Registry
from tests.server.operators import CATALOGUE, DAY, NOW, SETTINGS, an_operator

N = 3
PEOPLE = Interactions.of([np.random.default_rng(u).integers(0, 40, 20).tolist() for u in range(N)], len(CATALOGUE))
PHASES = ("planned", "drawn", "training", "aggregating", "charged", "released")
POINTS = [f"{phase}:{when}" for phase in PHASES for when in ("before", "after")] + ["released:saved"]


def a_round(here: Operation, *, answers: int = N) -> None:
    """One round with the first devices answering."""
    run = here.rounds()
    orders, state = run.open(), run.learner.released(run.state)
    replies = []
    for place, order in list(orders.items())[:answers]:
        host = Node(PEOPLE.select([place]), lambda *_: run.learner, Streams(0), plan=here.plan)
        replies.append(Reply(node=place, round=order.round, attempt=order.attempt, arrays=host.answer(order, state)))
    run.close(iter(replies))
    here.publish()


def all_rounds(folder: Folder, at: Callable[[str], None] = lambda point: None) -> None:
    with Operation(folder, now_ms=lambda: NOW, at=at) as here:
        here.publish()
        while here.go_on():
            a_round(here)


def an_open(path: Path, toml: str = "") -> Folder:
    folder = an_operator(path, users=N, toml=toml)
    with Database(folder.database) as database:
        wanted.start(database)
    return folder


def done(folder: Folder) -> int:
    with Database(folder.database) as database:
        return int(database.rows("SELECT done FROM progress")[0]["done"])


def check(folder: Folder) -> None:
    """What must hold once all rounds are over, whatever happened on the way."""
    plan = folder.plan
    assert done(folder) == plan.rounds
    with Ledger.open(folder.ledger) as ledger, Database(folder.database) as database:
        ledger.verify()
        charges = [(e.round, e.attempt) for e in ledger.entries if e.kind == "charge"]
        releases = [(e.round, e.attempt) for e in ledger.entries if e.kind == "release"]
        assert set(releases) <= set(charges)
        assert len(charges) == len(set(charges))
        assert {number for number, _ in releases} == set(range(1, plan.rounds + 1))
        ends = database.rows("SELECT round, phase, count(*) AS n FROM rounds GROUP BY round, phase")
        assert {(row["round"], row["n"]) for row in ends if row["phase"] == "released"} == {
            (number, 1) for number in range(1, plan.rounds + 1)
        }
        assert {row["phase"] for row in ends} <= {"released", "abandoned"}
        models = Registry(folder, database, now_ms=lambda: NOW)
        assert models.verify() == []
        assert [(model.version, model.round) for model in models.models()] == [
            (1 + number, number) for number in range(plan.rounds + 1)
        ]
        newest = models.models()[-1].manifest
        assert newest.guarantee is not None
        assert newest.guarantee["epsilon"] == pytest.approx(ledger.spent().epsilon)
        row = database.rows("SELECT * FROM progress")[0]
        assert np.frombuffer(row["participations"], "<i8").tolist() == [plan.rounds] * N
        assert states.load(folder, row["state"]).keys() == adopted(folder, database)[1].keys()
    assert len(list(folder.states.glob("*.safetensors"))) <= 2 + 1


def test_all_rounds_are_released_charged_and_published(tmp_path: Path) -> None:
    folder = an_open(tmp_path / "prod")
    all_rounds(folder)
    check(folder)
    with Ledger.open(folder.ledger) as ledger:
        assert len([e for e in ledger.entries if e.kind == "charge"]) == folder.plan.rounds


@pytest.mark.parametrize("number", [1, 3])
@pytest.mark.parametrize("point", POINTS)
def test_a_process_that_is_stopped_at_any_point_goes_on_from_the_checkpoint(
    tmp_path: Path, point: str, number: int
) -> None:
    folder, seen = an_open(tmp_path / "prod"), 0

    def stop(found: str) -> None:
        nonlocal seen
        seen += found == point
        if found == point and seen == number:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        all_rounds(folder, stop)
    released = done(folder)
    assert released == (number if point == "released:after" else number - 1)
    all_rounds(folder)
    check(folder)
    with Database(folder.database) as database, Ledger.open(folder.ledger) as ledger:
        tries = database.rows("SELECT * FROM rounds WHERE round = ? ORDER BY attempt", number)
        again = point not in ("planned:before", "released:after")
        assert [(row["attempt"], row["phase"], row["why"]) for row in tries] == [
            *([(0, "abandoned", STOPPED)] if again else []),
            (int(again), "released", ""),
        ]
        twice = point in ("charged:before", "charged:after", "released:before", "released:saved")
        assert ledger.attempts(number, folder.plan.digest) == 1 + twice


_KILLED = """
import os, signal, sys
from pathlib import Path
from penchant.server.folder import Folder
from tests.server.test_operation import all_rounds

def kill(point):
    if point == sys.argv[2]:
        os.kill(os.getpid(), signal.SIGKILL)

all_rounds(Folder(Path(sys.argv[1])), kill)
"""


@pytest.mark.parametrize("point", ["charged:after", "released:saved", "released:after"])
def test_a_process_that_is_killed_leaves_what_the_next_one_goes_on_from(tmp_path: Path, point: str) -> None:
    folder = an_open(tmp_path / "prod")
    root = Path(__file__).resolve().parents[2]
    paths = [str(root), *(str(root / part) for part in ("common", "client", "server", "simulations"))]
    killed = subprocess.run(
        [sys.executable, "-c", _KILLED, str(folder.path), point],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL
    all_rounds(folder)
    check(folder)


def test_a_model_is_made_once_however_often_it_is_published(tmp_path: Path) -> None:
    folder = an_open(tmp_path / "prod")
    for _ in range(2):
        with Operation(folder, now_ms=lambda: NOW) as here:
            if not done(folder):
                a_round(here)
            here.publish()
            assert [model.round for model in here.models.models()] == [0, 1]
            assert [channel.name for channel in here.models.channels()] == ["candidate", "stable"]


def test_only_one_process_runs_a_folders_rounds(tmp_path: Path) -> None:
    folder = an_open(tmp_path / "prod")
    with Operation(folder, now_ms=lambda: NOW), pytest.raises(InvalidConfig, match="another process"):
        Operation(folder, now_ms=lambda: NOW)
    Operation(folder, now_ms=lambda: NOW).close()


def test_a_round_that_is_charged_over_and_over_is_held_until_the_operator_says_go_on(tmp_path: Path) -> None:
    folder = an_open(tmp_path / "prod")

    def stop(point: str) -> None:
        if point == "charged:after":
            raise KeyboardInterrupt

    for _ in range(MOST_CHARGES):
        with pytest.raises(KeyboardInterrupt):
            all_rounds(folder, stop)
    with Operation(folder, now_ms=lambda: NOW) as here, pytest.raises(PrivacyRefused, match="charged 3 times"):
        here.rounds()
    with Operation(folder, now_ms=lambda: NOW) as here:  # as after penchant round start
        assert here.rounds().n_left == folder.plan.rounds


def test_a_ledger_of_before_a_release_stops_the_rounds(tmp_path: Path) -> None:
    folder = an_open(tmp_path / "prod")
    before = folder.ledger.read_bytes()
    with Operation(folder, now_ms=lambda: NOW) as here:
        a_round(here)
    for path in folder.ledger.parent.glob("*"):
        path.unlink()
    folder.ledger.write_bytes(before)
    with Operation(folder, now_ms=lambda: NOW) as here, pytest.raises(PrivacyRefused, match="lacks charges"):
        here.rounds()


def test_too_few_answers_leave_the_checkpoint_where_it_was_and_charge_nothing(tmp_path: Path) -> None:
    folder = an_open(tmp_path / "prod", toml="[rounds]\nminimum = 2\n")
    with Operation(folder, now_ms=lambda: NOW) as here:
        a_round(here, answers=1)
        assert not here.ledger.entries
        a_round(here, answers=2)
        assert len([e for e in here.ledger.entries if e.kind == "charge"]) == 1
    assert done(folder) == 1
    with Database(folder.database) as database:
        rows = database.rows("SELECT attempt, phase, why, answered FROM rounds ORDER BY attempt")
    assert [tuple(row) for row in rows] == [(0, "abandoned", "too few answers", 1), (1, "released", "", 2)]


def test_rounds_stop_where_the_operator_pauses_them(tmp_path: Path) -> None:
    folder = an_open(tmp_path / "prod")
    with Operation(folder, now_ms=lambda: NOW) as here:
        assert here.go_on()
        here.hold("for a test")
        assert not here.go_on()
    with Database(folder.database) as database:
        assert (database.switch("rounds"), database.switch("hold")) == ("paused", "for a test")


def test_after_a_restore_rounds_start_only_when_the_operator_confirms(tmp_path: Path) -> None:
    folder = an_open(tmp_path / "prod")
    with Database(folder.database) as database:
        wanted.pause(database, "restored from a backup of yesterday")
        with pytest.raises(InvalidConfig, match="after-restore"):
            wanted.start(database)
        assert not wanted.wanted(database)
        wanted.pause(database)  # by the operator, or the page: no word about the ledger
        with pytest.raises(InvalidConfig, match="after-restore"):
            wanted.start(database)
        wanted.start(database, after_restore=True)
        assert wanted.wanted(database)


def test_a_state_that_is_damaged_stops_the_rounds_before_anybody_is_asked(tmp_path: Path) -> None:
    folder = an_open(tmp_path / "prod")
    with Operation(folder, now_ms=lambda: NOW) as here:
        a_round(here)
        for path in folder.states.glob("*"):
            path.write_bytes(path.read_bytes()[:-1])
        with pytest.raises(MalformedData, match="damaged"):
            here.rounds()


def test_the_model_says_what_the_ledger_does_and_what_is_not_charged(tmp_path: Path) -> None:
    folder = an_open(tmp_path / "prod")
    with Operation(folder, now_ms=lambda: NOW) as here:
        a_round(here)
        manifest = here.models.models()[-1].manifest
    assert manifest.guarantee is not None
    assert any("minimum of answers" in words for words in manifest.guarantee["uncharged"])
    assert Bundle.read(folder.bundle).manifest.version == 1
    assert registry.build("cooccurrence", SETTINGS, CATALOGUE).name == manifest.learner


def test_rounds_begin_under_a_release_key_that_the_root_vouches_for_and_under_no_other(tmp_path: Path) -> None:
    folder = an_operator(tmp_path / "prod", users=N)
    root = keys.read_signing_key((folder.path / "offline" / "root.key").read_bytes())
    certificate = folder.certificate.read_bytes()
    found = Certificate.read(Envelope.from_bytes(certificate), root.public)
    folder.certificate.write_bytes(found.signed(SigningKey.generate()).to_bytes())
    with pytest.raises(UntrustedArtifact):
        Operation(folder)
    folder.certificate.write_bytes(certificate)

    def stop(point: str) -> None:
        if point == "certificate":  # it names a key that has not taken its name yet
            raise InterruptedError

    with pytest.raises(InterruptedError):
        keys.rotate(folder, root, now_ms=NOW, at=stop)
    with Operation(folder) as here:
        assert Certificate.read(here.certificate, root.public).public_key == here.key.public
        assert here.key.public != found.public_key


def test_a_clock_that_fell_back_stops_no_round_and_no_model_while_it_is_wrong_or_after(tmp_path: Path) -> None:
    folder = an_open(tmp_path / "prod")
    for days in (-3, 0, 3, 0):
        with Operation(folder, now_ms=lambda days=days: NOW + days * DAY) as here:  # type: ignore[misc]  # a default
            here.publish()
            if here.go_on():
                a_round(here)
    with Database(folder.database) as database:
        models = Registry(folder, database, here.key, now_ms=lambda: NOW)
        assert models.verify()  # dated three days from now
        assert models.renew()
        assert not models.renew()
    check(folder)
