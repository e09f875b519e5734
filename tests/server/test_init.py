"""`penchant serve init` makes a folder that is whole, that says what is not safe yet, or that is refused."""

from __future__ import annotations

import importlib
import json
import socket
import sqlite3
import tomllib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from penchant.client._distribution import fetch_offer
from penchant.common.artifacts.bundle import Bundle
from penchant.common.artifacts.manifest import Offer, Seen
from penchant.common.cli import Command
from penchant.common.errors import InvalidConfig, PenchantError
from penchant.common.learners import registry
from penchant.common.learners.planned import usual_delta
from penchant.common.privacy.ledger import Ledger
from penchant.common.privacy.plan import PrivacyPlan, task_digest
from penchant.common.streams import Streams
from penchant.server import making, states, tls
from penchant.server.database import Database
from penchant.server.distribution import Distribution
from penchant.server.folder import Folder, Settings, Task, secret
from penchant.server.init import configure_init, run_init
from penchant.server.making import new_plan
from penchant.server.rounds import Progress, Rounds
from penchant.simulations.bundle import Keys, make_bundle
from penchant.simulations.data.loaders import load
from penchant.simulations.plans import federated
from penchant.simulations.runs import RunFolder
from penchant.simulations.settings import Row, SimulationConfig
from penchant.simulations.simulate import simulate
from tests.server.commands import run
from tests.server.operators import CATALOGUE, SETTINGS, a_plan, an_operator

init = Command("", "", configure_init, run_init)
ITEMS = "item,title,topics\na,Alpha (1999),Drama|Comedy\nb,Beta,\n"


@pytest.fixture
def items(tmp_path: Path) -> Path:
    path = tmp_path / "films.csv"
    path.write_text(ITEMS)
    return path


# --------------------------------------------------------------------------------------------------------- the whole


def test_with_no_option_there_is_a_server_for_the_embedded_movies(
    tmp_path: Path, require: object, capsys: pytest.CaptureFixture[str]
) -> None:
    assert callable(require)
    require("penchant_movielens")
    assert run(init, str(tmp_path / "prod")) == 0
    said = capsys.readouterr().out
    for word in (
        "ε = 8 at δ = 1e-05",
        "trust server",
        "Not safe yet",
        "offline/root.key",
        "penchant serve up",
        "MovieLens",
    ):
        assert word in said
    folder = Folder(tmp_path / "prod")
    bundle, simulated = Bundle.read(folder.bundle), load("embedded").catalogue
    assert (bundle.catalogue, bundle.catalogue.titles) == (simulated, simulated.titles)  # name and version
    assert (folder.settings.app_id, folder.plan.n_users) == ("prod", 1000)
    assert folder.plan.task == task_digest(folder.task.learner, folder.task.settings)


def test_everything_in_a_new_folder_belongs_together(tmp_path: Path, items: Path) -> None:
    where = tmp_path / "prod"
    assert run(init, str(where), "--catalogue", str(items), "--users", "5", "--app-id", "com.example.films") == 0
    folder = Folder(where)
    plan, task, bundle = folder.plan, folder.task, Bundle.read(folder.bundle)
    assert plan.n_users == plan.cohort == 5
    assert any(said.startswith("whether a round met its minimum of answers") for said in plan.uncharged)
    learner = registry.build(task.learner, task.settings, bundle.catalogue)
    with Database(folder.database) as database:
        (row,) = database.rows("SELECT * FROM progress")
        moves = database.rows("SELECT channel, sequence, version, manifest FROM moves")
    assert (row["plan"], row["done"], row["catalogue"]) == (plan.digest, 0, bundle.catalogue.version)
    participations = np.frombuffer(row["participations"], "<i8")
    np.testing.assert_array_equal(participations, np.zeros(5, np.int64))
    state = states.load(folder, row["state"])
    assert state.keys() == learner.init(Streams.from_os()).keys()
    assert [tuple(move) for move in moves] == [("stable", 1, 1, bundle.offer.manifest.sha256)]
    offer = Offer.from_bytes((folder.distribution / "channels" / "stable.json").read_bytes())
    manifest, seen = offer.check(
        bundle.app.root,
        app_id="com.example.films",
        population="default",
        channel="stable",
        now_ms=offer.made_ms,
        seen=Seen(),
    )
    assert offer == bundle.offer
    assert (seen.serial, seen.sequence, manifest.version) == (1, 1, 1)
    assert manifest.guarantee is not None
    assert manifest.guarantee["epsilon"] == 0
    app = bundle.app
    assert {app.fleet, app.enrolment, app.distribution} == {folder.settings.addresses.public} == {"localhost:8443"}
    assert app.ca == (folder.tls / "ca.crt").read_text()
    with Ledger.open(folder.ledger) as ledger:
        assert (ledger.population, ledger.app_id, ledger.delta) == ("default", "com.example.films", plan.delta)
    with Ledger("default", delta=plan.delta, app_id="com.example.films", path=folder.ledger) as ledger:
        Rounds(
            learner=learner,
            settings=task.settings,
            plan=plan,
            roster=(1,) * 5,
            ledger=ledger,
            streams=Streams.from_os(),
            progress=Progress(state, participations, 0),
        ).open()
    flower = tomllib.loads((where / "flower-app" / "pyproject.toml").read_text())
    assert flower["tool"]["flwr"]["app"]["publisher"] == folder.settings.publisher.partition("/")[0]
    assert flower["tool"]["flwr"]["app"]["components"]["serverapp"] == "penchant.server.app:app"
    assert not [path for path in where.rglob("*") if path.name.endswith((".part", "-wal", "-shm"))]
    for path in (*folder.keys.iterdir(), *(where / "offline").iterdir()):
        secret(path)
    for private in (where, folder.keys, where / "offline"):
        assert private.stat().st_mode & 0o077 == 0


def test_a_device_with_the_bundle_reaches_the_server_and_another_apps_device_does_not(
    tmp_path: Path, items: Path
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    for name in ("prod", "other"):
        assert run(init, str(tmp_path / name), "--catalogue", str(items), "--app-id", "films", "--port", port) == 0
    folder, app = Folder(tmp_path / "prod"), Bundle.app_of(tmp_path / "prod" / "app.bundle")
    stranger = Bundle.app_of(tmp_path / "other" / "app.bundle")
    with Distribution(
        {("films", "default"): folder.distribution},
        address=folder.settings.addresses.edge,
        private_key=secret(folder.keys / "server.key"),
        chain=(folder.tls / "server.crt").read_bytes(),
    ):
        offer = fetch_offer(app, deadline_s=10)
        assert offer == Bundle.read(folder.bundle).offer
        with pytest.raises(PenchantError):
            fetch_offer(stranger, deadline_s=2)


def test_the_options_are_what_the_folder_says(tmp_path: Path, items: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = tmp_path / "prod"
    assert not run(
        init,
        *(str(where), "--catalogue", str(items), "--population", "north", "--users", "20", "--epsilon", "2"),
        *("--delta", "1e-3", "--learner", "als", "--host", "films.example", "--host", "10.0.0.7", "--port", "9000"),
        *("--minimum", "3", "--deadline", "60", "--promote", "automatic"),
    )
    said, folder = capsys.readouterr().out, Folder(where)
    at, settings = folder.settings.addresses, folder.settings
    assert (at.public, at.edge, at.operator) == ("films.example:9000", "0.0.0.0:9000", "127.0.0.1:9001")
    assert (at.superlink, at.services) == ("127.0.0.1:9002", "127.0.0.1:9003")
    assert (settings.population, settings.rounds.minimum, settings.rounds.deadline_s) == ("north", 3, 60.0)
    assert (settings.models.promote, folder.task.learner, folder.plan.delta) == ("automatic", "als", 1e-3)
    guarantee = folder.plan.guarantee()
    assert guarantee is not None
    assert 1.99 < guarantee.epsilon <= 2
    names = tls.names_of(tls.read_certificate((folder.tls / "server.crt").read_bytes()))
    assert names == ("films.example", "localhost", "10.0.0.7", "127.0.0.1")
    assert "only this machine reaches" not in said
    assert folder.ledger.name == "north.sqlite"


def test_the_root_key_of_an_app_that_is_there_is_used_and_not_written(tmp_path: Path, items: Path) -> None:
    first = an_operator(tmp_path / "first")
    key = tmp_path / "root.key"
    (first.path / "offline" / "root.key").rename(key)
    assert run(init, str(tmp_path / "next"), "--catalogue", str(items), "--root", str(key)) == 0
    assert Bundle.app_of(tmp_path / "next" / "app.bundle").root == Bundle.app_of(first.bundle).root
    assert [path.name for path in (tmp_path / "next" / "offline").iterdir()] == ["ca.key"]


def test_settings_survive_being_written(tmp_path: Path) -> None:
    odd = Settings(app_id='a "quoted" \\ app é', publisher="some/app", budget=3.5)
    plan, task = a_plan(3), Task("cooccurrence", SETTINGS)
    making.make(tmp_path / "a", settings=odd, catalogue=CATALOGUE, plan=plan, task=task, now_ms=0)
    assert Folder(tmp_path / "a").settings == odd
    with pytest.raises(InvalidConfig, match="cannot be printed"):
        making.to_toml(replace(odd, app_id="a\x7fb"))


# ---------------------------------------------------------------------------------------------------------- refusals


def files(path: Path) -> dict[Path, bytes]:
    return {p: p.read_bytes() for p in path.rglob("*") if p.is_file()}


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (("--users", "0"), "--users"),
        (("--users", "50", "--delta", "0.02"), "take --delta 1e-05"),
        (("--epsilon", "0"), "epsilon"),
        (("--epsilon", "nan"), "epsilon"),
        (("--users", "5", "--minimum", "6"), "minimum of 6"),
        (("--deadline", "0"), "deadline_s"),
        (("--port", "65535"), "--port"),
        (("--host", "no host"), "no host's name"),
        (("--app-id", ""), "app_id"),
        (("--catalogue", "nowhere.csv"), "nowhere.csv"),
        (("--root", "nowhere.key"), "nowhere.key"),
        (("--learner", "fedavg"), "fedavg"),
    ],
)
def test_a_wrong_option_writes_nothing(
    tmp_path: Path, items: Path, options: tuple[str, ...], word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source = () if "--catalogue" in options else ("--catalogue", str(items))
    assert run(init, str(tmp_path / "prod"), *source, *options) != 0
    assert word in capsys.readouterr().err
    assert not (tmp_path / "prod").exists()


def test_a_folder_with_something_in_it_is_left_alone(
    tmp_path: Path, items: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    an_operator(tmp_path / "prod")
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "mine.txt").write_text("mine")
    for name in ("prod", "letters"):
        before = files(tmp_path / name)
        assert run(init, str(tmp_path / name), "--catalogue", str(items)) == 2
        assert "not an empty folder" in capsys.readouterr().err
        assert files(tmp_path / name) == before
    assert run(init, str(items), "--catalogue", str(items)) == 2
    (tmp_path / "empty").mkdir()
    assert run(init, str(tmp_path / "empty"), "--catalogue", str(items)) == 0


class Killed(BaseException):
    """Not an error: nothing may catch it."""


@pytest.mark.parametrize("step", ["write_json", "publish", "Ledger", "_database"])
def test_a_folder_whose_making_was_killed_is_refused_and_says_to_delete_it(
    tmp_path: Path, items: Path, step: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def killed(*_: object, **__: object) -> None:
        raise Killed

    where = tmp_path / "prod"
    with monkeypatch.context() as patched:
        patched.setattr(making, step, killed)
        with pytest.raises(Killed):
            run(init, str(where), "--catalogue", str(items))
    with pytest.raises(InvalidConfig, match=r"server\.db"):
        Database(Folder(where).database)
    before = files(where)
    assert run(init, str(where), "--catalogue", str(items)) == 2
    assert "delete it" in capsys.readouterr().err
    assert files(where) == before


def test_a_database_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(making, "sync", full)
    with pytest.raises(InvalidConfig, match="No space left"):
        an_operator(tmp_path / "prod")
    db = sqlite3.connect(tmp_path / "prod" / "server.db")  # it is named before the folder is synced
    assert db.execute("SELECT count(*) FROM progress").fetchone() == (1,)
    db.close()


def test_without_movies_it_says_what_to_give(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(name: str) -> object:
        raise ModuleNotFoundError(name=name)

    monkeypatch.setattr(importlib, "import_module", missing)
    assert run(init, str(tmp_path / "prod")) == 2
    assert "--catalogue FILE" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------- plan, catalogue


@pytest.mark.parametrize("learner", ["cooccurrence", "als"])
@pytest.mark.parametrize("users", [1, 5, 1000, 200_000])
def test_a_plan_is_the_one_that_a_simulation_of_as_many_people_has(learner: str, users: int) -> None:
    plan, task = new_plan(learner, users=users, epsilon=4.0, delta=None, population="default")
    row = Row(name=learner, kind="federated", learner=learner, unit="user")
    made = federated(row, SimulationConfig(epsilon=4.0, delta=usual_delta(users)), users)
    assert json.loads(json.dumps(made.settings)) == json.loads(json.dumps(task.settings))
    assert replace(plan, task="", uncharged=()) == replace(made.plan, uncharged=())
    assert plan.task == task_digest(learner, task.settings)
    guarantee = plan.guarantee()
    assert guarantee is not None
    assert guarantee.epsilon <= 4.0


def test_a_plan_that_promises_nothing_is_refused(tmp_path: Path) -> None:
    open_plan = replace(
        a_plan(3), unit="none", sums=tuple(replace(spec, noise_multiplier=0.0) for spec in a_plan(3).sums)
    )
    with pytest.raises(InvalidConfig, match="promises nothing"):
        an_operator(tmp_path / "prod", plan=open_plan)
    with pytest.raises(InvalidConfig, match="population"):
        an_operator(tmp_path / "prod", plan=replace(a_plan(3), population="others"))
    assert not (tmp_path / "prod").exists()


def test_a_catalogue_file_may_have_columns_of_the_apps_own(tmp_path: Path) -> None:
    (tmp_path / "films.csv").write_text("item,title,number:runtime_s\na,Alpha,60\nb,Beta,\n")
    assert run(init, str(tmp_path / "prod"), "--catalogue", str(tmp_path / "films.csv")) == 0
    assert list(Bundle.read(tmp_path / "prod" / "app.bundle").catalogue.numbers) == ["runtime_s"]


# ------------------------------------------------------------------------------------------------------- from a bundle


@pytest.fixture(scope="module")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `penchant bundle` makes of a small simulation."""
    path = tmp_path_factory.mktemp("run")
    folder = RunFolder(path / "run")
    data = "synthetic:users=40,items=30,interactions=8,topics=4,seed=0"
    simulate(SimulationConfig(data=data, learner="cooccurrence", epsilon=8.0, delta=1e-5), folder)
    make_bundle(folder, "co-occurrence", path / "films.bundle", Keys.kept(path / "keys"), app_id="films")
    return path / "films.bundle"


def test_a_bundle_of_a_simulation_is_gone_on_from(tmp_path: Path, simulated: Path) -> None:
    before = Bundle.read(simulated)
    was = PrivacyPlan.from_json(before.manifest.plan)
    assert run(init, str(tmp_path / "prod"), "--from", str(simulated)) == 0
    folder = Folder(tmp_path / "prod")
    now = Bundle.read(folder.bundle)
    assert (now.model, now.catalogue, folder.settings.app_id) == (before.model, before.catalogue, "films")
    assert now.manifest.parents == ()  # what it came from is in no server's folder
    assert now.app.root != before.app.root
    same = replace(was, task=folder.plan.task, uncharged=folder.plan.uncharged)
    assert folder.plan == same
    assert making.ELSEWHERE in folder.plan.uncharged
    assert set(was.uncharged) < set(folder.plan.uncharged)
    assert folder.task == Task(before.manifest.learner, dict(before.manifest.settings))
    assert now.manifest.guarantee is not None
    assert now.manifest.guarantee["epsilon"] == 0


def test_with_other_people_the_bundles_plan_is_made_again(tmp_path: Path, simulated: Path) -> None:
    where = tmp_path / "prod"
    assert run(init, str(where), "--from", str(simulated), "--users", "5", "--population", "b", "--app-id", "b") == 0
    folder = Folder(where)
    assert (folder.plan.n_users, folder.plan.population, folder.settings.app_id) == (5, "b", "b")
    assert Bundle.read(folder.bundle).model == Bundle.read(simulated).model
    assert folder.plan.task == task_digest(folder.task.learner, folder.task.settings)


def test_a_catalogue_and_a_bundle_exclude_each_other(tmp_path: Path, simulated: Path, items: Path) -> None:
    where = str(tmp_path / "prod")
    assert run(init, where, "--from", str(simulated), "--catalogue", str(items)) == 2
    assert run(init, where, "--from", str(items)) != 0
    assert not (tmp_path / "prod").exists()
