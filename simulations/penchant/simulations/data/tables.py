"""Reads CSV, TSV, RecBole and Parquet files into checked columns, or says in one line what is wrong and where.

A file becomes a `Table` of text columns with each row's place in the file; roles (user, item, time, …) are found by
the names that public data sets use; every row is checked at once. Files without a quotation mark take the fast path
(polars); with one, Python's `csv` in strict mode decides, because line numbers and quoting must both be exact.

Times become UTC milliseconds. A column of numbers holds milliseconds when its median exceeds 1e11 (seconds reach that
in the year 5138, milliseconds did in 1973), else seconds; whether a column holds numbers or ISO 8601 text is decided by
its first value. ISO text without an offset is UTC.
"""

from __future__ import annotations

import codecs
import csv
import difflib
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, compress, zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from penchant.common.arrays import Float32, Int64
from penchant.common.errors import MalformedData

NAMES: Mapping[str, tuple[str, ...]] = {
    "user": ("user", "userid", "uid", "profile", "profileid", "visitorid", "customerid"),
    "item": ("item", "itemid", "iid", "movieid", "productid", "articleid", "trackid", "songid"),
    "timestamp": ("timestamp", "time", "ts", "datetime", "date", "unixtimestamp"),
    "rating": ("rating", "stars"),
    "strength": ("strength",),
    "event": ("event", "eventtype", "action", "behavior", "behaviour"),
    "title": ("title", "itemtitle", "movietitle", "name", "itemname"),
    "topics": ("topics", "topic", "genres", "genre", "categories", "category", "class"),
    "year": ("year", "releaseyear"),
    "retired": ("retired", "isretired"),
    "sensitive": ("sensitive", "sensitivetopics"),
}
"""The column names that each role goes by, in lower case without `_`, `-` or space."""

WRITTEN_BY_USERS = frozenset({"tag", "tags", "usertag", "usertags", "review", "reviews", "comment", "comments"})
"""Names, bare like those above, that no column of a catalogue may have."""

_KINDS = ("category", "number", "text", "vector")
_RECBOLE_TYPE = r"(?:token|float)(?:_seq)?$"  # `category:token` is RecBole's column of categories
_TYPED = re.compile(rf"({'|'.join(_KINDS)}):(?!{_RECBOLE_TYPE})\s*(\S.*)", re.I)
_YES_NO = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False, "": False}

NO_TOPIC = frozenset({"", "(no genres listed)", "unknown"})

_LAST_TIME_MS = 253_402_300_799_999  # the end of the year 9999
_MILLISECONDS_ABOVE = 1e11
_ISO_DATE = r"^\d{4}-\d{2}-\d{2}$"
_ISO_MINUTES = r"T\d{2}:\d{2}$"
_ISO_OFFSET = r"(?:[+-]\d{2}:?\d{2})$"


@dataclass(frozen=True, kw_only=True)
class Table:
    """A file's rows before any of them is believed.

    Attributes:
        file: its name, for messages.
        columns: text as in the file; from Parquet, whatever types it has. Missing values and "" are null.
        places: int64[n], the line of each row, or the row number in a Parquet file; both count from 1.
        unit: what a place is, "line" or "row".
        too_long: bool[n], rows with more values than there are columns.
    """

    file: str
    columns: pl.DataFrame
    places: Int64
    unit: str
    too_long: pl.Series


@dataclass(frozen=True, kw_only=True)
class InteractionRows:
    """Checked rows, in file order.

    Attributes:
        frame: user, item and event as text, time as int64 UTC ms (0 without times), strength as float32 in [0, 1].
        has_times: whether the file has times.
        rows_read: rows before any was skipped.
        missing: rows skipped because a value was missing.
        malformed: rows skipped for another fault.
        ignored: names of columns without a role.
    """

    frame: pl.DataFrame
    has_times: bool
    rows_read: int
    missing: int
    malformed: int
    ignored: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class ItemRows:
    """Checked items, in file order.

    Attributes:
        ids: unique.
        titles: with "(year)" at the end where the file has a column of years; the identifier where there is none.
        topics: of each item, possibly none.
        retired: identifiers of items to recommend no more.
        sensitive: topics that any row names so, each some item's.
        categories, numbers, texts, vectors: the typed columns, as `Catalogue` has them.
        untitled: items without a title.
        malformed: rows skipped.
        ignored: names of columns without a role.
    """

    ids: tuple[str, ...]
    titles: tuple[str, ...]
    topics: tuple[tuple[str, ...], ...]
    retired: frozenset[str] = frozenset()
    sensitive: frozenset[str] = frozenset()
    categories: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    numbers: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    texts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    vectors: Mapping[str, Float32] = field(default_factory=dict)
    untitled: int = 0
    malformed: int = 0
    ignored: tuple[str, ...] = ()


def read(path: Path) -> Table:
    """Reads a Parquet file by its suffix, anything else as text with a header.

    Raises:
        MalformedData: the file is missing, empty, not UTF-8, or not what its suffix says.
    """
    if not path.is_file():
        raise MalformedData(f"{path}: no such file")
    if path.suffix.lower() in (".parquet", ".pq"):
        return read_parquet(path)
    return read_text(path.read_bytes(), path.name, quoted=path.suffix.lower() not in (".inter", ".item"))


def read_parquet(path: Path) -> Table:
    """A Parquet file; its places are row numbers.

    Raises:
        MalformedData: not a Parquet file, or one without rows.
    """
    try:
        frame = pl.read_parquet(path)
    except (pl.exceptions.PolarsError, OSError) as e:
        raise MalformedData(f"{path.name}: not a Parquet file that can be read") from e
    if frame.is_empty():
        raise MalformedData(f"{path.name}: empty file")
    places = np.arange(1, frame.height + 1, dtype=np.int64)
    too_long = pl.zeros(frame.height, pl.Boolean, eager=True)
    return Table(file=path.name, columns=frame, places=places, unit="row", too_long=too_long)


def read_text(
    data: bytes,
    file: str,
    *,
    header: Sequence[str] | None = None,
    separator: str | None = None,
    quoted: bool = True,
) -> Table:
    """A text file of UTF-8 lines; blank ones are passed over.

    Args:
        data: the file's bytes.
        file: its name, for messages.
        header: the column names, where the file's first line does not hold them.
        separator: one character; else comma, tab or semicolon, whichever the first line has most of.
        quoted: whether `"` quotes, as in CSV.

    Raises:
        MalformedData: empty, not UTF-8, a name twice in the header, a quotation mark that never closes.
    """
    data = data.removeprefix(codecs.BOM_UTF8)
    _check_utf8(data, file)
    first, _, rest = data.partition(b"\n")
    if separator is None:
        separator = max(",\t;", key=first.decode().count)
    if header is None:
        names, body, first_line = _header(first.decode(), separator, file), rest, 2
    else:
        names, body, first_line = list(header), data, 1
    if not body.strip():
        raise MalformedData(f"{file}: empty file" if not data.strip() else f"{file}: no rows below the header")
    names = [name.strip() for name in names]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise MalformedData(f"{file}, line 1: two columns are named {twice!r}")
    if quoted and b'"' in body:
        columns, places = _parse_quoted(body.decode(), len(names), separator, file, first_line)
    else:
        columns, places = _parse_plain(body, len(names), separator, first_line)
    columns = columns.with_columns(pl.all().str.strip_chars().replace("", None))
    blank = columns.select(pl.all_horizontal(pl.all().is_null())).to_series()
    columns, places = columns.filter(~blank), places[~blank.to_numpy()]
    return Table(
        file=file,
        columns=columns.drop("beyond").rename(dict(zip(columns.columns, names, strict=False))),
        places=places,
        unit="line",
        too_long=columns["beyond"].is_not_null(),
    )


def interaction_rows(
    table: Table, *, rating_scale: tuple[float, float] | None = None, skip_bad_rows: bool = False
) -> InteractionRows:
    """Checks a table of interactions: `user, item[, timestamp][, rating | strength][, event]`.

    A value missing from any column that is used makes the row malformed: nothing is filled in.

    Args:
        table: as read.
        rating_scale: lowest and highest rating that the data set documents, mapped to strengths 0 and 1. Without it
            the scale is 0 to 5 and a rating beyond is refused even when bad rows are skipped.
        skip_bad_rows: count malformed rows instead of raising.

    Raises:
        MalformedData: a column is missing or there twice, the first malformed row in the file, or no row is left.
    """
    names = _roles(table, required=("user", "item"), optional=("timestamp", "rating", "strength", "event"))
    if {"rating", "strength"} <= names.keys():
        raise MalformedData(f"{table.file}: has both {names['rating']!r} and {names['strength']!r}; keep one of them")
    given = {role: table.columns[name] for role, name in names.items()}
    if nested := next((names[role] for role, column in given.items() if column.dtype.is_nested()), None):
        raise MalformedData(f"{table.file}: column {nested!r} holds lists; each row must have one value")
    n = table.columns.height
    columns = {"user": _identifiers(given["user"]), "item": _identifiers(given["item"])}
    columns["time"] = times_ms(given["timestamp"]) if "timestamp" in given else pl.zeros(n, pl.Int64, eager=True)
    columns["event"] = _identifiers(given["event"]) if "event" in given else pl.repeat(_event(names), n, eager=True)

    faults = [_Fault("", f"more values than the {table.columns.width} columns", table.too_long)]
    missing = pl.zeros(n, pl.Boolean, eager=True)
    for role, column in given.items():
        gone = column.is_null() if role not in ("user", "item", "event") else columns[role].is_null()
        missing |= gone
        faults.append(_Fault(names[role], "the value is missing", gone))
    if "timestamp" in given:
        wrong = columns["time"].is_null() & given["timestamp"].is_not_null()
        reason = "not a time: seconds or milliseconds since 1970, or ISO 8601"
        faults.append(_Fault(names["timestamp"], reason, wrong))

    if "rating" in given:
        low, high = rating_scale or (0.0, 5.0)
        value = _numbers(given["rating"])
        reason = f"not a rating from {low:g} to {high:g}"
        outside = given["rating"].is_not_null() & ~value.is_between(low, high).fill_null(value=False)
        if rating_scale is None:
            hint = f"{reason}; give the scale as rating_scale=(lowest, highest)"
            _raise_first(table, [_Fault(names["rating"], hint, outside & value.is_not_null())])
        faults.append(_Fault(names["rating"], reason, outside))
        columns["strength"] = (value - low) / (high - low)
    elif "strength" in given:
        columns["strength"] = _numbers(given["strength"])
        inside = columns["strength"].is_between(0.0, 1.0).fill_null(value=False)
        faults.append(_Fault(names["strength"], "not a number from 0 to 1", given["strength"].is_not_null() & ~inside))
    else:
        columns["strength"] = pl.ones(n, pl.Float64, eager=True)

    if not skip_bad_rows:
        _raise_first(table, faults)
    bad = pl.zeros(n, pl.Boolean, eager=True)
    for fault in faults:
        bad |= fault.rows
    frame = pl.DataFrame(columns).with_columns(pl.col("strength").cast(pl.Float32)).filter(~bad)
    if frame.is_empty():
        raise MalformedData(f"{table.file}: not one row can be used")
    n_missing = int((missing & ~table.too_long).sum())
    return InteractionRows(
        frame=frame,
        has_times="timestamp" in given,
        rows_read=n,
        missing=n_missing,
        malformed=int(bad.sum()) - n_missing,
        ignored=tuple(name for name in table.columns.columns if name not in names.values()),
    )


def item_rows(table: Table, *, between_topics: str = "|", skip_bad_rows: bool = False) -> ItemRows:
    """Checks a table of items: `item[, title][, topics][, year][, retired][, sensitive]`, typed columns.

    A typed column is named by its kind and its own name, as `category:studio`, `number:runtime_min`, `text:plot` or
    `vector:image`. Words are not split. A vector is numbers with spaces between them, or a list in Parquet, as many in
    every row. What is missing is unknown: no topic, NaN, "", zeros, not retired. A topic that one row names sensitive
    is so wherever it stands; one that is none of its row's topics raises even where bad rows are passed over, and what
    a row that is passed over names still counts: nothing is to be said of a topic because of a slip elsewhere.

    Args:
        table: as read.
        between_topics: what separates topics in a text column; a Parquet list needs none.
        skip_bad_rows: pass over malformed rows, and all but the first of an identifier, instead of raising.

    Raises:
        MalformedData: a column is missing or there twice, a column of what users did or wrote, or the first malformed
            row in the file.
    """
    names = _roles(table, required=("item",), optional=("title", "topics", "year", "retired", "sensitive"))
    typed = {n: (found[1].lower(), found[2].strip()) for n in table.columns.columns if (found := _typed(n))}
    _refuse_data(table, typed)
    checked = {name: _check(kind, table.columns[name]) for name, (kind, _) in typed.items()}
    if "retired" in names:
        checked[names["retired"]] = _check("retired", table.columns[names["retired"]])
    ids = _identifiers(table.columns[names["item"]])
    twice = _Fault(names["item"], "an earlier row has this identifier", ids.is_not_null() & ~ids.is_first_distinct())
    faults = [
        _Fault("", f"more values than the {table.columns.width} columns", table.too_long),
        _Fault(names["item"], "the value is missing", ids.is_null()),
        *(_Fault(name, column.reason, column.wrong) for name, column in checked.items()),
    ]
    every, named = (
        [_topics(value, between_topics) for value in table.columns[names[role]]] if role in names else [()] * len(ids)
        for role in ("topics", "sensitive")
    )
    strange = [not set(some) <= set(topics) for some, topics in zip(named, every, strict=True)]
    wrong = pl.Series(strange, dtype=pl.Boolean)
    stranger = _Fault(names.get("sensitive", ""), "a topic that this item does not have", wrong)
    _raise_first(table, [stranger] if skip_bad_rows else [*faults, twice, stranger])
    good = pl.repeat(True, len(ids), eager=True)
    for fault in faults:
        good &= ~fault.rows
    good &= ids.set(~good, None).is_first_distinct()
    rows = table.columns.filter(good)
    ids = ids.filter(good)
    titles = _text(rows, names.get("title"))
    topics = tuple(compress(every, good))
    columns: dict[str, dict[str, npt.NDArray[Any]]] = {kind: {} for kind in _KINDS}
    for name, (kind, own) in typed.items():
        columns[kind][own] = checked[name].values[good.to_numpy()]
    retired = checked[names["retired"]].values[good.to_numpy()] if "retired" in names else ()
    return ItemRows(
        ids=tuple(ids),
        titles=tuple(
            _dated(title or item, year)
            for item, title, year in zip(ids, titles, _text(rows, names.get("year")), strict=True)
        ),
        topics=topics,
        retired=frozenset(item for item, gone in zip(ids, retired, strict=False) if gone),
        sensitive=frozenset(chain(*named)) & frozenset(chain(*topics)),
        categories={name: tuple(words.tolist()) for name, words in columns["category"].items()},
        numbers={name: tuple(numbers.tolist()) for name, numbers in columns["number"].items()},
        texts={name: tuple(words.tolist()) for name, words in columns["text"].items()},
        vectors=columns["vector"],
        untitled=sum(title is None for title in titles),
        malformed=table.columns.height - len(ids),
        ignored=tuple(n for n in table.columns.columns if n not in names.values() and n not in typed),
    )


def times_ms(column: pl.Series) -> pl.Series:
    """A column of times as int64 UTC milliseconds; null where there is no time to be read.

    >>> times_ms(pl.Series(["2018-09-24T12:00:00Z", "2018-09-24"])).to_list()
    [1537790400000, 1537747200000]
    >>> times_ms(pl.Series([1537790400, 1537747200])).to_list()
    [1537790400000, 1537747200000]
    """
    if column.dtype in (pl.Date, pl.Datetime):
        return column.dt.epoch("ms")
    numbers = _numbers(column)
    first = column.is_not_null().arg_max()
    if column.dtype == pl.String and first is not None and column.len() and numbers[first] is None:
        return _iso_ms(column)
    median = numbers.abs().median()
    unit = 1 if isinstance(median, float) and median > _MILLISECONDS_ABOVE else 1000
    ms = (numbers * unit).round()
    return ms.set(ms.abs() > _LAST_TIME_MS, None).cast(pl.Int64)


@dataclass(frozen=True)
class _Fault:
    column: str
    reason: str
    rows: pl.Series


def _raise_first(table: Table, faults: Sequence[_Fault]) -> None:
    """Raises for the faulty row that comes first in the file."""
    found = [(at, fault) for fault in faults if fault.rows.any() and (at := fault.rows.arg_max()) is not None]
    if found:
        at, fault = min(found, key=lambda f: f[0])
        where = f", column {fault.column!r}" if fault.column else ""
        raise MalformedData(f"{table.file}, {table.unit} {table.places[at]}{where}: {fault.reason}")


def _check_utf8(data: bytes, file: str) -> None:
    try:
        data.decode()
    except UnicodeDecodeError as e:
        line = data.count(b"\n", 0, e.start) + 1
        raise MalformedData(f"{file}, line {line}: not UTF-8 text") from e


def _header(line: str, separator: str, file: str) -> list[str]:
    try:
        return next(csv.reader([line], delimiter=separator), [])
    except csv.Error as e:  # such as the bare carriage returns of old Macintosh files
        raise MalformedData(f"{file}, line 1: not a header that can be read ({str(e).partition(' - ')[0]})") from e


def _parse_plain(body: bytes, n_columns: int, separator: str, first_line: int) -> tuple[pl.DataFrame, Int64]:
    """Splits at separators; one more column, "beyond", shows the rows that have too many values."""
    header = separator.join([*(f"c{i}" for i in range(n_columns)), "beyond"]).encode() + b"\n"
    frame = pl.read_csv(
        io.BytesIO(header + body), separator=separator, quote_char=None, infer_schema=False, truncate_ragged_lines=True
    )
    return frame, np.arange(first_line, first_line + frame.height, dtype=np.int64)


def _parse_quoted(text: str, n_columns: int, separator: str, file: str, first_line: int) -> tuple[pl.DataFrame, Int64]:
    """As `_parse_plain`, for text in which a value may hold separators and line ends between quotation marks."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    rows: list[list[str]] = []
    places = [first_line]
    try:
        for row in reader:
            beyond = "".join(row[n_columns:]).strip()
            rows.append([*row[:n_columns], *[""] * (n_columns - len(row)), beyond])
            places.append(first_line + reader.line_num)
    except csv.Error as e:
        raise MalformedData(f"{file}, line {places[-1]}: {e}") from e
    columns = list(zip_longest(*rows))
    names = [*(f"c{i}" for i in range(n_columns)), "beyond"]
    frame = pl.DataFrame(
        {name: pl.Series(values, dtype=pl.String) for name, values in zip(names, columns, strict=True)}
    )
    return frame, np.array(places[:-1], np.int64)


def _bare(name: str) -> str:
    """A column's name without case, punctuation or RecBole's ":type"."""
    return re.sub(r"[^a-z0-9]", "", name.partition(":")[0].lower())


def _typed(name: str) -> re.Match[str] | None:
    """The kind and own name of a typed column."""
    return _TYPED.fullmatch(name.strip())


def _refuse_data(table: Table, typed: Mapping[str, tuple[str, str]]) -> None:
    """A catalogue is public: a file that says who did something, or a column of what users wrote, is not one."""
    for name in table.columns.columns:
        if name not in typed and _bare(name) in NAMES["user"]:
            raise MalformedData(f"{table.file}: column {name!r} says who; an items file holds nothing of users")
    for name, (kind, own) in typed.items():
        if list(typed.values()).count((kind, own)) > 1:
            raise MalformedData(f"{table.file}: two columns are {kind}:{own}; keep one")
        if _bare(own) in WRITTEN_BY_USERS:
            raise MalformedData(f"{table.file}: column {name!r}: what users wrote is data and not part of a catalogue")


@dataclass(frozen=True)
class _Checked:
    """A column's values, one a row; which of its rows are wrong, and why."""

    values: npt.NDArray[Any]
    wrong: pl.Series
    reason: str


def _check(kind: str, column: pl.Series) -> _Checked:
    """A typed column, or that of retired items; what is missing becomes "", NaN, zeros or False."""
    if kind == "vector":
        return _check_vectors(column)
    if column.dtype.is_nested():
        return _Checked(np.full(len(column), ""), column.is_not_null(), "a list where one value belongs")
    if kind == "number":
        unknown = column.is_null() | (column.is_nan().fill_null(value=False) if column.dtype.is_float() else False)
        numbers = _numbers(column)
        return _Checked(numbers.to_numpy(), ~unknown & numbers.is_null(), "not a finite number")
    words = column.cast(pl.String).fill_null("")
    if kind == "retired":
        answer = words.str.to_lowercase().replace_strict(_YES_NO, default=None, return_dtype=pl.Boolean)
        return _Checked(answer.fill_null(value=False).to_numpy(), answer.is_null(), "neither true nor false")
    return _Checked(np.array(words.to_list(), object), pl.repeat(False, len(words), eager=True), "")


def _check_vectors(column: pl.Series) -> _Checked:
    """float32[n, d], d that of the first row that has one."""
    rows = [_vector(value) for value in column]
    width = next((len(row) for row in rows if row is not None and len(row)), 1)
    wrong = [row is None or len(row) not in (0, width) for row in rows]
    values = np.zeros((len(rows), width), np.float32)
    for i, row in enumerate(rows):
        if row is not None and len(row) == width:
            values[i] = row
    return _Checked(values, pl.Series(wrong, dtype=pl.Boolean), f"not {width} finite numbers, as the first vector has")


def _vector(value: Any) -> Float32 | None:
    """The numbers in a text or list, none where it is missing; None where it is no vector."""
    try:
        row = np.array(value.split() if isinstance(value, str) else () if value is None else value, np.float64)
    except (TypeError, ValueError):
        return None
    sound = row.ndim == 1 and bool((np.abs(row) <= np.finfo(np.float32).max).all())
    return row.astype(np.float32) if sound else None


def _roles(table: Table, *, required: Sequence[str], optional: Sequence[str]) -> dict[str, str]:
    """The column of each role that the table has."""
    bare = {name: _bare(name) for name in table.columns.columns if not _typed(name)}
    found: dict[str, str] = {}
    for role in (*required, *optional):
        columns = [name for name, b in bare.items() if b in NAMES[role]]
        if len(columns) > 1:
            raise MalformedData(f"{table.file}: columns {columns[0]!r} and {columns[1]!r} both mean {role}; keep one")
        if columns:
            found[role] = columns[0]
        elif role in required:
            close = [name for name, b in bare.items() if difflib.get_close_matches(b, NAMES[role], n=1)]
            hint = f"did you mean {close[0]!r}? " if close else ""
            has = ", ".join(table.columns.columns[:8])
            raise MalformedData(
                f"{table.file}: no column for the {role}; {hint}name it {' or '.join(NAMES[role][:2])} (it has: {has})"
            )
    return found


def _event(names: Mapping[str, str]) -> str:
    return "rate" if "rating" in names else "view"


def _identifiers(column: pl.Series) -> pl.Series:
    """Identifiers as text; whole floats, which is how pandas writes integers beside a missing value, lose their .0."""
    if column.dtype.is_float() and (column.drop_nulls() == column.drop_nulls().round()).all():
        column = column.cast(pl.Int64, strict=False)
    return column.cast(pl.String).str.strip_chars().replace("", None)


def _numbers(column: pl.Series) -> pl.Series:
    """Finite float64 values; null where there is none."""
    values = column.cast(pl.Float64, strict=False)
    return values.set(~values.is_finite(), None)


def _iso_ms(column: pl.Series) -> pl.Series:
    text = column.str.replace(" ", "T", literal=True).str.replace(r"[Zz]$", "+00:00")
    text = pl.select(
        pl.when(text.str.contains(_ISO_DATE)).then(text + "T00:00:00").otherwise(text).alias("t")
    ).to_series()
    offset = text.str.extract(f"({_ISO_OFFSET})").fill_null("+00:00")
    local = text.str.replace(r"(T.*)[+-]\d{2}:?\d{2}$", "$1")
    local = pl.select(
        pl.when(local.str.contains(_ISO_MINUTES)).then(local + ":00").otherwise(local).alias("t")
    ).to_series()
    parsed = (local + offset).str.to_datetime("%Y-%m-%dT%H:%M:%S%.f%:z", strict=False, time_unit="ms")
    return parsed.dt.epoch("ms")


def _text(frame: pl.DataFrame, name: str | None) -> list[str | None]:
    if name is None:
        return [None] * frame.height
    return list(frame[name].cast(pl.String, strict=False))


def _dated(title: str, year: str | None) -> str:
    """A title that ends in "(year)", where the year is known and not there yet.

    >>> _dated("Toy Story", "1995")
    'Toy Story (1995)'
    """
    known = year is not None and re.fullmatch(r"\d{4}", year) and not title.endswith(f"({year})")
    return f"{title} ({year})" if known else title


def _topics(value: object, separator: str) -> tuple[str, ...]:
    parts: Iterable[object] = ()
    if isinstance(value, str):
        parts = value.split(separator)
    elif isinstance(value, pl.Series):  # a list in Parquet
        parts = value.drop_nulls().to_list()
    names = (str(part).strip() for part in parts)
    return tuple(dict.fromkeys(name for name in names if name not in NO_TOPIC))
