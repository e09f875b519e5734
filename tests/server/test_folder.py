"""An operator's folder says what is wrong with it in one line, and its database keeps whole transactions."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from penchant.common.errors import InvalidConfig, MalformedData
from penchant.server.database import Database
from penchant.server.folder import Addresses, Folder, RoundSettings, secret, write_secret
from tests.server.operators import an_operator


def test_a_folder_reads_what_the_operator_wrote(tmp_path: Path) -> None:
    folder = an_operator(tmp_path / "prod", toml="[rounds]\ndeadline_s = 5\nminimum = 2\n")
    assert folder.settings.rounds == RoundSettings(deadline_s=5, minimum=2)
    assert folder.plan.n_users == 3
    assert folder.task.learner == "cooccurrence"
    assert Folder(folder.path).settings == folder.settings


@pytest.mark.parametrize(
    ("toml", "word"),
    [
        ("[rounds]\nminimum = 0\n", "minimum"),
        ("[rounds]\ndeadline = 5\n", "deadline_s"),
        ("[rounds]\nenough = 1\n", "enough"),
        ("[models]\npromote = 'now'\n", "by hand"),
        ("[addresses]\nedge = 'nowhere'\n", "host:port"),
        ("[addresses]\nedge = '0.0.0.0:8444'\n", "8444"),
        ("[addresses]\nsuperlink = '0.0.0.0:8445'\n", "this machine"),
        ("schema_version = 2\n", "version 2"),
    ],
)
def test_a_setting_that_cannot_be_is_named(tmp_path: Path, toml: str, word: str) -> None:
    with pytest.raises(InvalidConfig, match=word):
        an_operator(tmp_path / "prod", toml=toml)


def test_a_folder_that_is_none_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfig, match="serve init"):
        Folder(tmp_path)


def test_a_plan_of_another_task_is_refused(tmp_path: Path) -> None:
    folder = an_operator(tmp_path / "prod")
    (folder.path / "task.json").write_text("[]")
    with pytest.raises(MalformedData, match=r"task\.json"):
        _ = folder.task


def test_a_key_that_others_may_read_is_not_used(tmp_path: Path) -> None:
    write_secret(tmp_path / "a.key", b"secret")
    assert secret(tmp_path / "a.key") == b"secret"
    (tmp_path / "a.key").chmod(0o640)
    with pytest.raises(InvalidConfig, match="chmod 600"):
        secret(tmp_path / "a.key")


def test_a_transaction_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    Database.make(tmp_path / "server.db")
    with Database(tmp_path / "server.db") as one, Database(tmp_path / "server.db") as other:
        one.set_switch("rounds", "running")
        assert other.switch("rounds") == "running"
        with pytest.raises(sqlite3.IntegrityError), one.transaction() as db:
            db.executemany("INSERT INTO switches VALUES (?, 'paused', 0)", [("new",), ("rounds",)])
        assert other.switch("new") == ""
        assert other.switch("rounds") == "running"
        assert other.switch("nothing", "default") == "default"


def test_a_database_that_is_damaged_or_newer_is_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "server.db"
    with pytest.raises(InvalidConfig, match="backup"):
        Database(path)
    Database.make(path)
    with pytest.raises(InvalidConfig, match="already"):
        Database.make(path)
    db = sqlite3.connect(path)
    db.execute("PRAGMA user_version = 99")
    db.close()
    with pytest.raises(MalformedData, match="version 99"):
        Database(path)
    path.write_bytes(b"no database" * 100)
    with pytest.raises(MalformedData, match="damaged"):
        Database(path)


def test_two_processes_of_one_port_are_refused() -> None:
    with pytest.raises(InvalidConfig, match="already"):
        Addresses(operator="127.0.0.1:8445")
