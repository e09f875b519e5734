"""The public catalogue: what can be recommended, and what anybody may know about it.

Everything here is public and costs no privacy. What users wrote or did (tags, ratings, counts) is data and never
enters a catalogue. How the columns become numbers is content.py's to say, how a million of them fit compact.py's.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from penchant.common.arrays import Bool, Float32, Int32, Int64
from penchant.common.compact import Places, Shared, Strings
from penchant.common.config import did_you_mean
from penchant.common.errors import InvalidConfig, MalformedData

_YEAR = re.compile(r"\((\d{4})\)\s*$")


@dataclass(frozen=True, kw_only=True, eq=False)
class Catalogue:
    """Items and their public features, in a fixed order that every position elsewhere points into.

    Attributes:
        ids: identifier of each item, unique.
        titles: what a person would call it; as many as ids.
        topics: the item's topics (genres, categories), possibly none; as many as ids.
        retired: items that keep their position but are recommended no more; a catalogue never drops an item.
        sensitive: topics that say more of a person than they may want said; each is some item's. They are no feature,
            so that nothing is learned through them, and no distribution or explanation names them.
        name: of the data set or app.
        categories: columns of one word each (studio, language), by the column's name; "" where unknown.
        numbers: columns of numbers (runtime, price), by name; NaN where unknown, else finite.
        texts: columns of prose in any language (plot, description), by name; "" where there is none.
        vectors: float32[n, d] made elsewhere (of an image, a sound, a sentence), by name; finite, zeros where none.

    Every column has one value for each item, and those of text become the sequences of compact.py, which equal the
    tuples that were given. Two catalogues are equal when name and version are.
    """

    ids: Sequence[str]
    titles: Sequence[str] = ()
    topics: Sequence[tuple[str, ...]] = ()
    retired: frozenset[str] = frozenset()
    name: str = "catalogue"
    categories: Mapping[str, Sequence[str]] = field(default_factory=dict)
    numbers: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    texts: Mapping[str, Sequence[str]] = field(default_factory=dict)
    vectors: Mapping[str, Float32] = field(default_factory=dict)
    sensitive: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        ids = _texts("catalogue: ids", self.ids)
        listed: dict[str, Sequence[Any]] = {
            "ids": ids,
            "titles": _texts("catalogue: titles", self.titles) if len(self.titles) else ids,
            "topics": _topics(self.topics) if len(self.topics) else _topics(((),) * len(ids)),
        }
        for name, values in listed.items():
            if len(values) != len(ids):
                raise InvalidConfig(f"catalogue: {name} must be as many as ids")
            object.__setattr__(self, name, values)
        if not ids.are_unique:
            raise InvalidConfig("catalogue: ids must be unique")
        if unknown := sorted(item for item in self.retired if item not in self.index):
            raise InvalidConfig(f"catalogue: retired item {unknown[0]!r} is not in it")
        known = {topic for topics in _topics(self.topics).values for topic in topics}
        if unknown := sorted(self.sensitive - known):
            raise InvalidConfig(f"catalogue: sensitive {unknown[0]!r} is no topic{did_you_mean(unknown[0], known)}")
        for kind, checked in (("categories", _words), ("numbers", _numbers), ("texts", _texts), ("vectors", _vectors)):
            columns = {}
            for name, values in sorted(getattr(self, kind).items()):
                if len(values) != len(ids) or not name:
                    raise InvalidConfig(f"catalogue: {kind} {name!r} needs a name and as many values as ids")
                columns[name] = checked(f"catalogue: {kind} {name!r}", values)
            object.__setattr__(self, kind, columns)

    def __len__(self) -> int:
        return len(self.ids)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Catalogue) and (self.name, self.version) == (other.name, other.version)

    def __hash__(self) -> int:
        return hash((self.name, self.version))

    @cached_property
    def index(self) -> Mapping[str, int]:
        """Position of each identifier."""
        return Places(Strings.of(self.ids))

    @cached_property
    def version(self) -> str:
        """Sixteen hex digits that change when any item, title, topic or other column does, or an item retires."""
        digest = hashlib.sha256()
        for item, title, topics in zip(self.ids, self.titles, self.topics, strict=True):
            digest.update("\x1f".join((item, title, *topics)).encode() + b"\x1e")
        if self.retired:
            digest.update("\x1f".join(("retired", *sorted(self.retired))).encode())
        if self.sensitive:
            digest.update("\x1f".join(("\x1csensitive", *sorted(self.sensitive))).encode())
        if columns := {kind: values for kind, values in self._columns().items() if values}:
            digest.update(b"\x1d" + json.dumps(columns, sort_keys=True).encode())
        return digest.hexdigest()[:16]

    @cached_property
    def is_sensitive(self) -> Bool:
        """bool[n], which items have a sensitive topic."""
        topics = _topics(self.topics)
        found: Bool = np.array([not self.sensitive.isdisjoint(own) for own in topics.values], np.bool_)[topics.codes]
        return found

    @cached_property
    def is_retired(self) -> Int64:
        """int64[n], positions of the retired items."""
        return np.array([self.index[item] for item in sorted(self.retired)], np.int64)

    def positions(self, ids: Iterable[str]) -> Int32:
        """int32[n], where these items stand, in the order given; those that are not here are left out.

        >>> Catalogue(ids=("a", "b")).positions(["b", "x", "b"]).tolist()
        [1, 1]
        """
        return np.array([place for item in ids if (place := self.index.get(item)) is not None], np.int32)

    @cached_property
    def features(self) -> tuple[str, ...]:
        """Names of the public features, each once: topics, then decades read from titles' "(1995)"; none sensitive."""
        topics = sorted({t for ts in _topics(self.topics).values for t in ts})
        decades = sorted({d for title in self.titles if (d := decade(title))})
        return tuple(name for name in dict.fromkeys((*topics, *decades)) if name not in self.sensitive)

    @cached_property
    def content(self) -> Float32:
        """float32[n_items, n_features]: topics and decade of each item, every row of length 1 or all zero."""
        column = {name: j for j, name in enumerate(self.features)}
        out = np.zeros((len(self), len(column)), np.float32)
        for i, (title, topics) in enumerate(zip(self.titles, self.topics, strict=True)):
            own = sorted({column[name] for name in (*topics, decade(title)) if name and name in column})
            if own:
                out[i, own] = 1.0 / np.sqrt(len(own))
        return out

    def to_record(self) -> dict[str, Any]:
        """All of it as JSON types: an unknown number is null, a vector column its width and base64 of little-endian.

        Sensitive topics have a field only where there are any.
        """
        record = {
            "name": self.name,
            "ids": list(self.ids),
            "titles": list(self.titles),
            "topics": [list(topics) for topics in self.topics],
            "retired": sorted(self.retired),
            **self._columns(),
        }
        return record | ({"sensitive": sorted(self.sensitive)} if self.sensitive else {})

    def _columns(self) -> dict[str, dict[str, Any]]:
        """The part of the record that is columns by name."""
        return {
            "categories": {name: list(values) for name, values in self.categories.items()},
            "numbers": {
                name: [None if math.isnan(value) else value for value in values]
                for name, values in self.numbers.items()
            },
            "texts": {name: list(values) for name, values in self.texts.items()},
            "vectors": {
                name: {"width": rows.shape[1], "float32": base64.b64encode(rows.astype("<f4").tobytes()).decode()}
                for name, rows in self.vectors.items()
            },
        }

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Catalogue:
        """What `to_record` gave; a field that is not there is empty, one that is not known is refused.

        Raises:
            MalformedData: not such a record.
            InvalidConfig: its columns are not those of a catalogue.
        """
        if unknown := sorted(set(record) - {"name", "ids", "titles", "topics", "retired", "sensitive", *_KINDS}):
            raise MalformedData(f"catalogue record: unknown field {unknown[0]!r}; it may be of a newer penchant")
        try:
            return cls(
                name=record["name"],
                ids=Strings.of(record["ids"]),
                titles=Strings.of(record.get("titles", ())),
                topics=_topics(record.get("topics", ())),
                retired=frozenset(record.get("retired", ())),
                sensitive=frozenset(record.get("sensitive", ())),
                categories={name: Shared.of(values) for name, values in record.get("categories", {}).items()},
                numbers={
                    name: tuple(math.nan if value is None else value for value in values)
                    for name, values in record.get("numbers", {}).items()
                },
                texts={name: Strings.of(values) for name, values in record.get("texts", {}).items()},
                vectors={
                    name: np.frombuffer(base64.b64decode(rows["float32"], validate=True), "<f4").reshape(
                        len(record["ids"]), rows["width"]
                    )
                    for name, rows in record.get("vectors", {}).items()
                },
            )
        except (KeyError, TypeError, ValueError, AttributeError, binascii.Error) as error:
            raise MalformedData(f"not a catalogue record: {type(error).__name__}: {error}") from None


_KINDS = ("categories", "numbers", "texts", "vectors")


def _topics(topics: Iterable[tuple[str, ...]]) -> Shared[tuple[str, ...]]:
    return topics if isinstance(topics, Shared) else Shared.of(map(tuple, topics))


def _words(where: str, values: Iterable[str]) -> Shared[str]:
    try:
        words = Shared.of(values)
        Strings.of(words.values)
    except (TypeError, UnicodeEncodeError):  # TypeError: also of a value without a hash
        raise InvalidConfig(f"{where} must be text") from None
    return words


def _texts(where: str, values: Iterable[str]) -> Strings:
    try:
        return Strings.of(values)
    except (TypeError, UnicodeEncodeError):
        raise InvalidConfig(f"{where} must be text") from None


def _numbers(where: str, values: Iterable[float]) -> tuple[float, ...]:
    try:
        numbers = tuple(float(value) + 0.0 for value in values)  # + 0.0: there is only one zero
    except (TypeError, ValueError):
        raise InvalidConfig(f"{where} must be numbers, NaN where unknown") from None
    if any(map(math.isinf, numbers)):
        raise InvalidConfig(f"{where} must be finite, or NaN where unknown")
    return numbers


def _vectors(where: str, values: npt.ArrayLike) -> Float32:
    """A copy that nobody can write to."""
    try:
        rows = np.array(values, np.float64)
    except (TypeError, ValueError):
        raise InvalidConfig(f"{where} must be rows of numbers") from None
    if rows.ndim != 2 or not rows.shape[1]:
        raise InvalidConfig(f"{where} must be float32[n, d] with d ≥ 1")
    if not (np.abs(rows) <= np.finfo(np.float32).max).all():  # also refuses NaN
        raise InvalidConfig(f"{where} must be finite; give an item without a vector zeros")
    out = rows.astype(np.float32) + np.float32(0)
    out.flags.writeable = False
    return out


def decade(title: str) -> str:
    """The decade of a title that ends in its year, else "".

    >>> decade("Toy Story (1995)")
    '1990s'
    """
    found = _YEAR.search(title)
    return f"{int(found.group(1)) // 10 * 10}s" if found else ""
