"""A catalogue file is taken whole or refused at its line; devices follow each change, and nothing learned is lost."""

from __future__ import annotations

import io
import json
import math
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penchant.client import Client
from penchant.common.catalogue import Catalogue
from penchant.common.errors import InvalidConfig, MalformedData, MissingExtra, PenchantError
from penchant.server import catalogue_ops as ops
from penchant.server.catalogue_command import catalogue as command
from penchant.server.folder import write_json
from penchant.server.registry import Model, Registry, changes, newest_catalogue
from tests.server.commands import run
from tests.server.models import Server
from tests.server.operators import CATALOGUE

HEADER = "item,title,topics,category:studio,number:runtime_s,text:plot\n"
GOOD = HEADER + 'a,"One, two (1999)",Drama|Comedy,Ealing,5400,"First\nsecond line"\nb,,,,,\n'


def written(path: Path, text: str | bytes, name: str = "items.csv") -> Path:
    where = path / name
    where.write_bytes(text if isinstance(text, bytes) else text.encode())
    return where


# ------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_a_file_is_read_as_it_says(tmp_path: Path, mark: bytes) -> None:
    found = ops.read_items(written(tmp_path, mark + GOOD.encode()), name="films")
    assert (found.name, found.ids, found.titles) == ("films", ("a", "b"), ("One, two (1999)", ""))
    assert found.topics == (("Drama", "Comedy"), ())
    assert found.categories == {"studio": ("Ealing", "")}
    assert found.numbers["runtime_s"][0] == 5400
    assert math.isnan(found.numbers["runtime_s"][1])
    assert found.texts == {"plot": ("First\nsecond line", "")}
    assert Catalogue.from_record(json.loads(json.dumps(found.to_record()))) == found


def test_only_ids_are_needed(tmp_path: Path) -> None:
    assert ops.read_items(written(tmp_path, "id\r\na\r\n\r\nb\r\n"), name="x") == Catalogue(ids=("a", "b"), name="x")


@pytest.mark.parametrize(
    ("text", "where", "why"),
    [
        (GOOD + "c,,,,,\na,,,,,\n", ":6", "same item"),
        (GOOD + ",t,,,,\n", ":5", "no id"),
        (GOOD + "c,,Drama||Comedy,,,\n", ":5", "'topics'"),
        (GOOD + "c,,Drama|Drama,,,\n", ":5", "twice"),
        (GOOD + "c,,,,long,\n", ":5", "'number:runtime_s'"),
        (GOOD + "c,,,,inf,\n", ":5", "not a number"),
        (GOOD + "c,,,,1_000,\n", ":5", "not a number"),
        (GOOD + "c,,,,1e999,\n", ":5", "finite"),
        (GOOD + "c\x07,,,,,\n", ":5", "control"),
        (GOOD + '"c\nd",,,,,\n', ":5", "control"),
        (GOOD + "c,,,,,a\x00b\n", ":5", "control|NUL"),
        (GOOD + " c,,,,,\n", ":5", "spaces"),
        (GOOD + "c" * 201 + ",,,,,\n", ":5", "at most 200"),
        (GOOD + f"c,{'t' * 1001},,,,\n", ":5", "at most 1000"),
        (GOOD + "c,,,\n", ":5", "4 values"),
        (GOOD + 'c,"t" x,,,,\n', ":5", "expected"),
        (GOOD.encode() + b"c,\xff,,,,\n", ":5", "UTF-8"),
        (HEADER, "items.csv", "no item"),
        ("", "items.csv", "item"),
        ("title\nx\n", "items.csv", "column named item"),
        ("item,id\na,b\n", "items.csv", "column named item"),
        ("item,titel\na,b\n", "items.csv", "did you mean 'title'"),
        ("item,price:x\na,1\n", "items.csv", "price:x"),
        ("item,number:\na,1\n", "items.csv", "number:"),
        ("item,title,title\na,b,c\n", "items.csv", "one name"),
    ],
)
def test_a_file_that_is_wrong_anywhere_is_refused_at_its_line(
    tmp_path: Path, text: str | bytes, where: str, why: str
) -> None:
    with pytest.raises(MalformedData, match=why) as caught:
        ops.read_items(written(tmp_path, text), name="films")
    assert where in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(MalformedData, match=r"none\.csv: No such file"):
        ops.read_items(tmp_path / "none.csv", name="films")


@given(data=st.one_of(st.binary(max_size=200), st.text(max_size=200).map(lambda text: HEADER.encode() + text.encode())))
def test_any_bytes_give_a_catalogue_or_one_of_our_errors(data: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "any.csv"
    path.write_bytes(data)
    said = str(path)
    try:
        assert len(ops.read_items(path, name="any")) > 0
    except PenchantError as error:
        said = str(error)
    assert str(path) in said


def test_parquet_says_the_same_as_csv(tmp_path: Path) -> None:
    polars = pytest.importorskip("polars")
    columns = {
        "item": ["a", "b"],
        "title": ["One, two (1999)", None],
        "topics": [["Drama", "Comedy"], []],
        "category:studio": ["Ealing", None],
        "number:runtime_s": [5400, None],
        "text:plot": ["First\nsecond line", ""],
    }
    polars.DataFrame(columns).write_parquet(tmp_path / "items.parquet")
    expected = ops.read_items(written(tmp_path, GOOD), name="films")
    assert ops.read_items(tmp_path / "items.parquet", name="films") == expected
    polars.DataFrame({**columns, "topics": ["Drama|Comedy", None]}).write_parquet(tmp_path / "text.parquet")
    assert ops.read_items(tmp_path / "text.parquet", name="films") == expected
    for bad, where in (
        ({"item": [1.5]}, "row 1"),
        ({"item": ["a", "a"]}, "row 2"),
        ({"item": ["a"], "number:x": [float("inf")]}, "row 1"),
        ({"item": ["a"], "number:x": [True]}, "row 1"),
        ({"item": ["a"], "title": [3]}, "row 1"),
        ({"item": ["a"], "topics": [[1]]}, "row 1"),
        ({"item": ["a"], "topics": [[None]]}, "row 1"),
    ):
        polars.DataFrame(bad).write_parquet(tmp_path / "bad.parquet")
        with pytest.raises(MalformedData, match=where):
            ops.read_items(tmp_path / "bad.parquet", name="films")
    with pytest.raises(MalformedData, match="no Parquet"):
        ops.read_items(written(tmp_path, "item\na\n", "text.parquet"), name="films")


def test_parquet_without_polars_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "polars", None)
    with pytest.raises(MissingExtra, match="pip install"):
        ops.read_items(written(tmp_path, "x", "items.parquet"), name="films")


# ----------------------------------------------------------------------------------------------------- changes

RICH = Catalogue(
    ids=("a", "b", "c"),
    titles=("A", "B", "C"),
    topics=(("x",), ("y",), ()),
    retired=frozenset({"b"}),
    sensitive=frozenset({"y"}),
    name="films",
    categories={"studio": ("s", "", "t")},
    numbers={"runtime_s": (1.0, math.nan, 3.0)},
    vectors={"picture": np.eye(3, 2, dtype=np.float32)},
)


def table(path: Path, text: str) -> ops.Table:
    return ops.read_table(written(path, text))


def test_new_items_come_after_all_others_and_nothing_else_changes(tmp_path: Path) -> None:
    after = ops.added(RICH, table(tmp_path, "item,topics,number:price\nd,x|z,2\ne,,\n"))
    assert after.ids == ("a", "b", "c", "d", "e")
    assert after.titles[3:] == ("d", "e")
    assert after.topics[3:] == (("x", "z"), ())
    assert after.categories["studio"] == ("s", "", "t", "", "")
    assert np.isnan(after.numbers["price"][:3]).all()
    assert after.numbers["price"][3] == 2
    assert not after.vectors["picture"][3:].any()
    assert (after.retired, after.sensitive, after.name) == (RICH.retired, RICH.sensitive, RICH.name)
    found = changes(RICH, after)
    assert (found.added, found.changed, found.columns, found.gone) == (("d", "e"), (), ("number:price",), ())
    assert ops.added(after, table(tmp_path, "item,topics,number:price\nd,x|z,2\n")) == after


def test_an_item_that_is_there_is_not_added_over(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfig, match="'a' is there with other values"):
        ops.added(RICH, table(tmp_path, "item,title\nd,D\na,Another\n"))
    with pytest.raises(InvalidConfig, match="'b' is there, and retired"):
        ops.added(RICH, table(tmp_path, "item,title\nb,B\n"))


def test_an_update_changes_only_the_columns_and_items_of_the_file(tmp_path: Path) -> None:
    after = ops.updated(RICH, table(tmp_path, "item,title,number:runtime_s,text:plot\nc,See,,Long\n"))
    assert (after.titles, after.topics) == (("A", "B", "See"), RICH.topics)
    assert math.isnan(after.numbers["runtime_s"][2])
    assert after.texts == {"plot": ("", "", "Long")}
    np.testing.assert_array_equal(after.vectors["picture"], RICH.vectors["picture"])
    assert changes(RICH, after).changed == ("c",)
    with pytest.raises(InvalidConfig, match="'d' is not in"):
        ops.updated(RICH, table(tmp_path, "item\nd\n"))
    with pytest.raises(InvalidConfig, match="sensitive"):  # it would be no topic any more, and then a plain one again
        ops.updated(RICH, table(tmp_path, "item,topics\nb,x\n"))


def test_items_retire_and_come_back_in_their_place() -> None:
    after = ops.retired(RICH, ["a", "b"])
    assert (after.ids, after.retired) == (RICH.ids, frozenset("ab"))
    assert changes(RICH, after).retired == ("a",)
    assert ops.restored(after, ["a"]) == RICH
    for wrong in (["x"], []):
        with pytest.raises(InvalidConfig):
            ops.retired(RICH, wrong)
        with pytest.raises(InvalidConfig):
            ops.restored(RICH, wrong)


# ---------------------------------------------------------------------------------------------------- in effect


@pytest.fixture
def server(tmp_path: Path) -> Server:
    made = Server.make(tmp_path / "prod", '[models]\npromote = "automatic"\n')
    made.checkpoint(2)
    made.add(2)
    return made


def did(server: Server, *argv: str) -> int:
    return run(command, argv[0], str(server.folder.path), *argv[1:])


def test_devices_follow_the_catalogue_and_older_ones_are_refused(server: Server, tmp_path: Path) -> None:
    with Client.open(
        tmp_path / "d", bundle=server.device_bundle(tmp_path / "d.bundle"), now_ms=lambda: server.now_ms
    ) as me:
        for item in ("film:0", "film:3", "film:6"):  # dramas
            me.observe(item, "like")
        assert me.sync().version == 2
        first = [one.item for one in me.recommend(60)]
        assert "film:9" in first
        assert "film:new" not in first
        old = (server.folder.distribution / "channels" / "stable.json").read_bytes()
        new = written(tmp_path, "item,title,topics\nfilm:new,New (1953),Drama\nfilm:odd,Odd (1953),Horror\n")
        assert did(server, "add", str(new)) == 0
        assert (me.sync().release, me.sync().version) == ("updated", 3)
        shown = [one.item for one in me.recommend(60)]
        assert shown.index("film:new") < shown.index("film:odd")  # placed by what it is about
        assert did(server, "retire", "film:9", "film:new") == 0
        assert (me.sync().release, me.sync().version) == ("updated", 4)
        shown = [one.item for one in me.recommend(60)]
        assert not {"film:9", "film:new"} & set(shown)
        assert "film:odd" in shown
        (server.folder.distribution / "channels" / "stable.json").write_bytes(old)
        found = me.sync()
        assert (found.release, found.version) == ("failed", 4)
        assert "older" in found.why
        assert "film:9" not in [one.item for one in me.recommend(60)]


def test_a_new_catalogue_costs_nothing_and_loses_nothing_that_was_learned(server: Server, tmp_path: Path) -> None:
    ledger = server.folder.ledger.read_bytes()
    assert did(server, "add", str(written(tmp_path, "item,topics\nfilm:new,Drama\n"))) == 0
    registry = server.registry()
    before, after = registry.model(2), registry.model(3)
    assert after.manifest.guarantee == before.manifest.guarantee
    assert (after.round, after.manifest.parents) == (before.round, (before.name,))
    assert server.folder.ledger.read_bytes() == ledger
    learned, kept = (registry.bytes_of(model)[1].state["vectors"] for model in (before, after))
    np.testing.assert_array_equal(kept[: len(learned)], learned)
    assert kept[len(learned) :].any()


def test_the_round_loop_takes_the_catalogue_up_with_the_state_that_it_has(server: Server, tmp_path: Path) -> None:
    with server.database() as database:
        catalogue, state = ops.adopted(server.folder, database)
        assert catalogue == CATALOGUE
        np.testing.assert_array_equal(state["vectors"], server.state(2)["vectors"])
        assert did(server, "add", str(written(tmp_path, "item,topics\nfilm:new,Drama\n"))) == 0
        catalogue, state = ops.adopted(server.folder, database)
        assert len(catalogue) == len(state["vectors"]) == 41
        made = server.registry().add(
            server.state(3, CATALOGUE), CATALOGUE, round=3, plan=server.folder.plan, guarantee=server.guarantee(3)
        )
    assert made.manifest.catalogue_version == catalogue.version, "a round that began before is over the newest too"


def test_before_any_round_a_new_catalogue_is_a_version_too(tmp_path: Path) -> None:
    server = Server.make(tmp_path / "prod")
    assert did(server, "retire", "film:1") == 0
    assert [(m.version, m.round, m.channels) for m in server.registry().models()] == [
        (1, 0, ("stable",)),
        (2, 0, ("candidate",)),
    ]


def test_while_a_round_waits_for_its_release_the_catalogue_waits_for_it(server: Server) -> None:
    server.checkpoint(3)
    assert did(server, "retire", "film:1") == 0
    assert [model.version for model in server.registry().models()] == [1, 2]
    assert did(server, "retire", "film:1") == 0
    assert did(server, "retire", "film:2") == 2  # else a checkpoint could be over a catalogue that is nowhere
    assert server.add(3).manifest.catalogue_version == newest_catalogue(server.folder).version


def test_a_round_that_ends_in_between_never_gets_the_guarantee_of_the_one_before(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = Registry.models
    once: list[object] = []

    def ended(self: Registry) -> list[Model]:
        if not once and newest_catalogue(server.folder).retired:  # catalogue.json is written, no version made yet
            once.append(server.checkpoint(3))
        return find(self)

    monkeypatch.setattr(Registry, "models", ended)
    assert did(server, "retire", "film:1") == 0
    assert once
    monkeypatch.undo()
    registry = server.registry()
    made = registry.model(3)
    np.testing.assert_array_equal(registry.bytes_of(made)[1].state["vectors"], server.state(2)["vectors"])
    assert (made.round, made.manifest.guarantee) == (2, registry.model(2).manifest.guarantee)


def test_two_changes_at_once_are_both_there(server: Server) -> None:
    with ThreadPoolExecutor(2) as pool:
        codes = list(pool.map(lambda item: did(server, "retire", item), ["film:1", "film:2"]))
    assert codes == [0, 0]
    assert newest_catalogue(server.folder).retired == {"film:1", "film:2"}
    registry = server.registry()
    assert registry.verify() == []
    assert {one.version for one in registry.channels()} == {registry.models()[-1].version}
    newest = registry.bytes_of(registry.models()[-1])[0]
    assert newest.retired == {"film:1", "film:2"}


def test_a_change_and_its_undoing_are_two_versions(server: Server) -> None:
    assert did(server, "retire", "film:1") == did(server, "restore", "film:1") == 0
    registry = server.registry()
    assert [one.version for one in registry.channels()] == [4, 4]
    assert registry.model(4).manifest.catalogue_version == registry.model(2).manifest.catalogue_version
    assert registry.verify() == []


@pytest.mark.parametrize(
    ("argv", "code"),
    [
        (("add", "bad.csv"), 3),
        (("add", "there.csv"), 2),
        (("update", "unknown.csv"), 2),
        (("retire", "film:0", "nothing"), 2),
        (("retire",), 2),
        (("retire", "--from", "nowhere"), 3),
        (("add", "good.csv", "--dry-run"), 0),
        (("retire", "film:1", "--dry-run"), 0),
    ],
)
def test_what_is_refused_or_only_tried_writes_nothing(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, argv: tuple[str, ...], code: int
) -> None:
    monkeypatch.chdir(tmp_path)
    written(tmp_path, "item,number:x\nfilm:40,1\nfilm:41,one\n", "bad.csv")
    written(tmp_path, "item,title\nfilm:40,New\nfilm:0,Another\n", "there.csv")
    written(tmp_path, "item,title\nfilm:0,Another\nfilm:40,New\n", "unknown.csv")
    written(tmp_path, "item,title\nfilm:40,New\n", "good.csv")
    before = {p: p.read_bytes() for p in server.folder.path.rglob("*.json")}
    assert did(server, *argv) == code
    assert {p: p.read_bytes() for p in server.folder.path.rglob("*.json")} == before


def test_a_catalogue_that_lost_an_item_is_refused(server: Server) -> None:
    fewer = Catalogue(ids=CATALOGUE.ids[:-1], name="films")
    write_json(server.folder.path / "catalogue.json", fewer.to_record())
    with server.database() as database, pytest.raises(InvalidConfig, match="left the catalogue"):
        ops.adopted(server.folder, database)
    assert did(server, "retire", "film:1") == 2
    (server.folder.path / "catalogue.json").write_text("[]")
    assert did(server, "show") == 3


CHILD = """
import sys
from pathlib import Path
from penchant.server import catalogue_ops as ops
from penchant.server.folder import Folder
from tests.server.models import Server, stop_at
server = Server(Folder(Path(sys.argv[1])), at=stop_at(sys.argv[2]))
with server.database() as database:
    registry = server.registry(database=database)
    ops.change(server.folder, database, registry, lambda c: ops.retired(c, ["film:1"]), dry_run=False)
"""


def test_after_a_kill_another_change_comes_on_top(server: Server) -> None:
    subprocess.run([sys.executable, "-c", CHILD, str(server.folder.path), "add:begin"], timeout=120, check=False)
    assert did(server, "retire", "film:2") == 0
    assert newest_catalogue(server.folder).retired == {"film:1", "film:2"}
    assert [one.version for one in server.registry().channels()] == [4, 4]


@pytest.mark.parametrize("point", ["add:begin", "add:blobs", "add:manifest", "move:channel", "move:noted"])
def test_after_a_kill_the_same_change_again_ends_it(server: Server, point: str) -> None:
    killed = subprocess.run([sys.executable, "-c", CHILD, str(server.folder.path), point], timeout=120, check=False)
    assert killed.returncode == -9
    assert server.registry().verify() == []
    assert did(server, "retire", "film:1") == 0
    registry = server.registry()
    assert [one.version for one in registry.channels()] == [3, 3]
    assert registry.verify() == []


def test_the_command_says_what_changes(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    capsys.readouterr()
    assert did(server, "show", "--json") == 0
    assert json.loads(capsys.readouterr().out)["items"] == 40
    path = str(written(tmp_path, "item,title\nfilm:0,Another\nfilm:1,Film 1 (1951)\n"))
    assert did(server, "update", path) == 0
    assert capsys.readouterr().out.splitlines() == [
        "1 changed: film:0",
        "model version 3 is over it, on candidate and stable",
    ]
    monkeypatch.setattr("sys.stdin", io.StringIO("film:2\n\nfilm:3\n"))
    assert did(server, "retire", "--from", "-", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["retired"], told["model"], told["added"]) == (["film:2", "film:3"], 4, [])
    assert did(server, "retire", "film:2") == 0
    assert capsys.readouterr().out.splitlines() == [
        "nothing changes",
        "model version 4 is over it, on candidate and stable",
    ]
    assert did(server, "show") == 0
    assert "40 items, 2 of them retired" in capsys.readouterr().out
    assert replace(CATALOGUE, retired=frozenset({"film:2", "film:3"})).ids == newest_catalogue(server.folder).ids
