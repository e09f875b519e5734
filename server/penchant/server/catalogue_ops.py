"""Catalogue files, and what an operator does to the catalogue while devices use it.

A file is CSV in UTF-8 with a header, or Parquet with the same columns:

    item                       the id (or `id`); needed, each once
    title                      what a person would call it; the id if there is no such column
    topics                     "Drama|Comedy"; in Parquet also a list
    category:NAME, number:NAME, text:NAME    columns of the app's own, such as number:runtime_s; "" where unknown

It is taken whole or not at all. An item keeps its position for ever: what is not recommended any more is retired, and
nothing is dropped, so that what was learned of every other item stays where it is (`Learner.adopt`).

A change is written to catalogue.json first, then becomes a version of the model: the newest round's state, adopted. No
person's data enters it, so nothing is charged and the guarantee stays. The round loop takes the catalogue up with its
next round; `progress` says which one the state in the checkpoint is of.
"""

from __future__ import annotations

import csv
import importlib
import io
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from sqlite3 import Row
from typing import Any

import numpy as np

from penchant.common.artifacts.bundle import catalogue_bytes, write_whole
from penchant.common.artifacts.manifest import MAX_BLOB
from penchant.common.catalogue import Catalogue
from penchant.common.config import did_you_mean
from penchant.common.errors import InvalidConfig, MalformedData, MissingExtra
from penchant.common.learners import registry as learners
from penchant.common.learners.contract import State
from penchant.common.streams import Streams
from penchant.server import states
from penchant.server.database import Database
from penchant.server.folder import Folder, sync
from penchant.server.registry import Changes, Model, Registry, changes, columns, newest_catalogue

MAX_ITEMS = 10_000_000
MAX_ID, MAX_WORD, MAX_TEXT, MAX_TOPICS = 200, 1000, 100_000, 100
"""Characters of an id; of a title, topic or category; of a text; and topics of one item."""
_KINDS = {"category": "categories", "number": "numbers", "text": "texts"}
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f]")
_CONTROL_IN_TEXT = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")


# ------------------------------------------------------------------------------------------------------- files


@dataclass(frozen=True)
class Table:
    """What a catalogue file says.

    Attributes:
        ids: each once.
        columns: by their names in the file, each with a value for every id: text, a tuple of topics, or a number.
    """

    ids: tuple[str, ...]
    columns: dict[str, list[Any]]


def read_items(path: Path, *, name: str) -> Catalogue:
    """The catalogue that a file lists.

    Args:
        path: ends in .parquet where it is Parquet.
        name: the catalogue's.

    Raises:
        MalformedData: as `read_table`.
        MissingExtra: likewise.
    """
    return _catalogue(Catalogue(ids=(), name=name), *_appended(Catalogue(ids=(), name=name), read_table(path)))


def read_table(path: Path) -> Table:
    """A catalogue file as it is.

    Raises:
        MalformedData: cannot be read, a column that is none, or a value that cannot be; with its line and column.
        MissingExtra: Parquet, and polars is not installed.
    """
    try:
        if path.stat().st_size > MAX_BLOB:
            raise MalformedData(f"{path} has more than {MAX_BLOB} bytes: no device would read such a catalogue")
        header, rows = _parquet(path) if path.suffix.lower() == ".parquet" else _csv(path)
    except OSError as error:
        raise MalformedData(f"{path}: {error.strerror}") from None
    if len(set(header)) < len(header):
        raise MalformedData(f"{path}: two columns have one name")
    for column in header:
        if column not in ("item", "id", "title", "topics") and not _named(column):
            known = ("item", "title", "topics", "category:NAME", "number:NAME", "text:NAME")
            raise MalformedData(f"{path}: unknown column {column!r}{did_you_mean(column, known)}")
    if len(key := [column for column in ("item", "id") if column in header]) != 1:
        raise MalformedData(f"{path}: it needs one column named item")
    kept: dict[str, list[Any]] = {column: [] for column in header}
    first: dict[str, str] = {}
    for where, row in rows:
        for column, value in zip(header, row, strict=True):
            try:
                kept[column].append(_value(column, value))
            except ValueError as error:
                raise MalformedData(f"{where}: column {column!r}: {error}") from None
        if (item := kept[key[0]][-1]) in first:
            raise MalformedData(f"{where}: column {key[0]!r}: the same item as in {first[item]}")
        first[item] = where
        if len(first) > MAX_ITEMS:
            raise MalformedData(f"{where}: more than {MAX_ITEMS} items")
    if not first:
        raise MalformedData(f"{path}: no item in it")
    return Table(tuple(kept.pop(key[0])), kept)


def _named(column: str) -> bool:
    kind, _, name = column.partition(":")
    return kind in _KINDS and bool(name.strip()) and len(name) <= MAX_WORD and not _CONTROL.search(name)


def _csv(path: Path) -> tuple[list[str], Iterator[tuple[str, Sequence[Any]]]]:
    data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise MalformedData(f"{path}:{line}: not UTF-8: save it so") from None
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)

    def lines() -> Iterator[tuple[str, list[str]]]:
        while True:
            where = f"{path}:{reader.line_num + 1}"
            try:
                row = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                raise MalformedData(f"{where}: {error}") from None
            if row:  # else an empty line
                yield where, row

    found = lines()
    _, header = next(found, ("", []))

    def rows() -> Iterator[tuple[str, list[str]]]:
        for where, row in found:
            if len(row) != len(header):
                raise MalformedData(f"{where}: {len(row)} values, and the header names {len(header)} columns")
            yield where, row

    return [column.strip() for column in header], rows()


def _parquet(path: Path) -> tuple[list[str], Iterator[tuple[str, Sequence[Any]]]]:
    try:
        polars: Any = importlib.import_module("polars")
    except ModuleNotFoundError:
        raise MissingExtra("simulations", "polars, which reads Parquet,") from None
    try:
        frame = polars.read_parquet(path)
    except polars.exceptions.PolarsError as error:
        raise MalformedData(f"{path}: no Parquet file: {str(error).splitlines()[0]:.200}") from None
    return list(frame.columns), ((f"{path}: row {n}", row) for n, row in enumerate(frame.iter_rows(), 1))


def _value(column: str, value: Any) -> Any:
    """A cell as the catalogue keeps it.

    Raises:
        ValueError: why it cannot be.
    """
    if column in ("item", "id"):
        item = str(value) if type(value) is int else value
        if not isinstance(item, str) or not item:
            raise ValueError("no id")
        return _word(item, MAX_ID)
    if column == "topics":
        topics = value.split("|") if isinstance(value, str) and value else value or ()
        if not isinstance(topics, list | tuple) or not all(isinstance(topic, str) for topic in topics):
            raise ValueError("topics are words with | between them")
        if len(topics) > MAX_TOPICS or len(set(topics)) < len(topics) or "" in topics:
            raise ValueError(f"at most {MAX_TOPICS} topics, none empty and none twice")
        return tuple(_word(topic, MAX_WORD) for topic in topics)
    if column.startswith("number:"):
        return _number(value)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ValueError("not text")
    return _word(value, MAX_TEXT, _CONTROL_IN_TEXT) if column.startswith("text:") else _word(value, MAX_WORD)


def _word(value: str, most: int, refused: re.Pattern[str] = _CONTROL) -> str:
    if len(value) > most:
        raise ValueError(f"{len(value)} characters; at most {most}")
    if refused.search(value):
        raise ValueError("a control character")
    if refused is _CONTROL and value != value.strip():
        raise ValueError("spaces before or after it")
    return value


def _number(value: Any) -> float:
    if value is None or value == "":
        return math.nan
    if isinstance(value, str):
        if not _NUMBER.fullmatch(value.strip()):
            raise ValueError("not a number")
        value = float(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError("not a number, or not a finite one")
    return float(value)


# ----------------------------------------------------------------------------------------------------- changes


def added(before: Catalogue, table: Table) -> Catalogue:
    """With new items after all that are there; one that is there as it is in the table is left alone.

    Raises:
        InvalidConfig: an item that is there with other values, or is retired.
    """
    if retired := [item for item in table.ids if item in before.retired]:
        raise InvalidConfig(f"item {retired[0]!r} is there, and retired: penchant catalogue restore brings it back")
    ids, filled = _appended(before, table)
    after = _catalogue(before, ids, filled)
    if other := changes(after, updated(after, table)).changed:
        raise InvalidConfig(f"item {other[0]!r} is there with other values: penchant catalogue update changes them")
    return after


def updated(before: Catalogue, table: Table) -> Catalogue:
    """With the table's values in place of those that were there; columns that it lacks stay.

    Raises:
        InvalidConfig: an item that is not there.
    """
    _known(before, table.ids)
    filled = _filled(before, before.ids, table.columns)
    for name, values in table.columns.items():
        for item, value in zip(table.ids, values, strict=True):
            filled[name][before.index[item]] = value
    return _catalogue(before, before.ids, filled)


def retired(before: Catalogue, ids: Iterable[str]) -> Catalogue:
    """With these recommended no more, also those that were not before.

    Raises:
        InvalidConfig: an item that is not there.
    """
    return _catalogue(before, before.ids, _filled(before, before.ids, ()), before.retired | _known(before, ids))


def restored(before: Catalogue, ids: Iterable[str]) -> Catalogue:
    """With these recommended again, or still.

    Raises:
        InvalidConfig: an item that is not there.
    """
    return _catalogue(before, before.ids, _filled(before, before.ids, ()), before.retired - _known(before, ids))


def _known(catalogue: Catalogue, ids: Iterable[str]) -> frozenset[str]:
    found = list(ids)
    if unknown := [item for item in found if item not in catalogue.index]:
        raise InvalidConfig(f"item {unknown[0]!r} is not in the catalogue")
    if not found:
        raise InvalidConfig("no item is named")
    return frozenset(found)


def _appended(before: Catalogue, table: Table) -> tuple[tuple[str, ...], dict[str, list[Any]]]:
    """Ids and columns with the table's new items after those that are there."""
    new = [row for row, item in enumerate(table.ids) if item not in before.index]
    ids = (*before.ids, *(table.ids[row] for row in new))
    filled = _filled(before, ids, table.columns)
    for name, values in table.columns.items():
        filled[name][len(before) :] = [values[row] for row in new]
    return ids, filled


def _filled(before: Catalogue, ids: Sequence[str], more: Iterable[str]) -> dict[str, list[Any]]:
    """A catalogue's columns and these more, with a value for each id: those that are there, then nothing."""
    there, out = columns(before), {}
    for name in {**there, **dict.fromkeys(more)}:
        values, kind = list(there.get(name, ())), name.partition(":")[0]
        nothing: Any = {"topics": (), "number": math.nan}.get(kind, "")
        if kind == "vector":
            nothing = np.zeros(before.vectors[name.partition(":")[2]].shape[1], np.float32)
        rest = ids[len(values) :]
        out[name] = values + (list(rest) if name == "title" else [nothing] * len(rest))
    return out


def _catalogue(
    before: Catalogue, ids: Sequence[str], filled: dict[str, list[Any]], retired: frozenset[str] | None = None
) -> Catalogue:
    """A catalogue of these columns; name, sensitive topics and, unless told, what is retired as before.

    Raises:
        InvalidConfig: it cannot be one, or is larger than devices read.
    """
    kinds: dict[str, dict[str, Any]] = {kind: {} for kind in (*_KINDS.values(), "vectors")}
    for name, values in filled.items():
        kind, _, column = name.partition(":")
        if kind == "vector":
            kinds["vectors"][column] = np.array(values, np.float32)
        elif kind in _KINDS:
            kinds[_KINDS[kind]][column] = tuple(values)
    out = Catalogue(
        ids=tuple(ids),
        titles=tuple(filled["title"]),
        topics=tuple(filled["topics"]),
        retired=before.retired if retired is None else retired,
        name=before.name,
        sensitive=before.sensitive,
        **kinds,
    )
    if (size := len(catalogue_bytes(out))) > MAX_BLOB:
        raise InvalidConfig(f"the catalogue would have {size} bytes; devices read at most {MAX_BLOB}")
    return out


# ---------------------------------------------------------------------------------------------------- in effect


def adopted(folder: Folder, database: Database) -> tuple[Catalogue, State]:
    """The newest catalogue, and the checkpoint's state for it: what the next round, or a release, is made of.

    Before the first round it is the learner's state that has seen nobody, of the public root 0.

    Raises:
        MalformedData: the state, its catalogue or catalogue.json is damaged or gone.
        InvalidConfig: catalogue.json lacks an item that the state's catalogue has.
    """
    catalogue = newest_catalogue(folder)
    return catalogue, _state(folder, Registry(folder, database), _checkpoint(folder, database), catalogue)


def _checkpoint(folder: Folder, database: Database) -> Row | None:
    """One row, read at once: a state and the rounds that are in it belong together."""
    return database.one("SELECT done, state, catalogue FROM progress WHERE plan = ?", folder.plan.digest)


def _state(folder: Folder, registry: Registry, checkpoint: Row | None, catalogue: Catalogue) -> State:
    learner = learners.build(folder.task.learner, folder.task.settings, catalogue)
    if checkpoint is None:
        return learner.init(Streams(0))
    state = states.load(folder, checkpoint["state"])
    if checkpoint["catalogue"] == catalogue.version:
        return state
    return learner.adopt(state, registry.catalogue(checkpoint["catalogue"]))


def change(
    folder: Folder, database: Database, registry: Registry, how: Callable[[Catalogue], Catalogue], *, dry_run: bool
) -> tuple[Changes, Model | None]:
    """Changes the catalogue, and makes a version of the model over it. Stopped in between, the same again ends it.

    Args:
        how: the catalogue after, of the one before.
        dry_run: only says what would change.

    Returns:
        What changed, and the version over it; None in a dry run, or where the last round is not released yet, whose
        release will be over the new catalogue.

    Raises:
        MalformedData, InvalidConfig: a change that cannot be; nothing was written.
    """
    path = folder.path / "catalogue.json"
    while True:
        read = path.read_bytes() if path.is_file() else b""
        before = newest_catalogue(folder)
        after = how(before)
        if before == after:
            break
        _state(folder, registry, _checkpoint(folder, database), after)  # that it can be learned over
        if dry_run:
            break
        if not _is_over(registry, before):
            _released(folder, database, registry)  # what a kill left undone, or another change has not done yet
        if not _is_over(registry, before) and path.read_bytes() == read:
            raise InvalidConfig("the change before this one waits for a round's release: try again after it")
        if _replaced(database, path, read, after):
            break
    return changes(before, after), None if dry_run else _released(folder, database, registry)


def _replaced(database: Database, path: Path, read: bytes, after: Catalogue) -> bool:
    """Whether catalogue.json is this one now; not where another change came first."""
    data = catalogue_bytes(after)
    with database.transaction():  # a short one: others wait for it
        if path.read_bytes() != read:
            return False
        try:
            write_whole(path, data)
            sync(path.parent)
        except OSError as error:
            raise InvalidConfig(f"{path}: {error.strerror}; make room, and do it again") from None
    return True


def _is_over(registry: Registry, catalogue: Catalogue) -> bool:
    """Whether some model is over this catalogue, so that it can be found again."""
    return any(model.manifest.catalogue_version == catalogue.version for model in registry.models())


def _released(folder: Folder, database: Database, registry: Registry) -> Model | None:
    """The newest round's version over the newest catalogue, made if there is none."""
    plan, catalogue, checkpoint = folder.plan, newest_catalogue(folder), _checkpoint(folder, database)
    done = 0 if checkpoint is None else int(checkpoint["done"])
    of_round = [m for m in registry.models() if (m.manifest.plan, m.round) == (plan.to_json(), done)]
    if not of_round:
        return None
    last, state = of_round[-1], _state(folder, registry, checkpoint, catalogue)
    guarantee = last.manifest.guarantee  # of all that is in the state: it is of that round
    return registry.add(state, catalogue, round=done, plan=plan, guarantee=guarantee, parents=(last.name,))
