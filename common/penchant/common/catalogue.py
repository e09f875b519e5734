"""The public catalogue: what can be recommended, and what anybody may know about it.

Everything here is public and costs no privacy. What users wrote or did (tags, ratings, counts) is data and never
enters a catalogue.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from penchant.common.arrays import Float32, Int32, Int64
from penchant.common.errors import InvalidConfig

_YEAR = re.compile(r"\((\d{4})\)\s*$")


@dataclass(frozen=True, kw_only=True)
class Catalogue:
    """Items and their public features, in a fixed order that every position elsewhere points into.

    Attributes:
        ids: identifier of each item, unique.
        titles: what a person would call it; as many as ids.
        topics: the item's topics (genres, categories), possibly none; as many as ids.
        retired: items that keep their position but are recommended no more; a catalogue never drops an item.
        name: of the data set or app.
    """

    ids: tuple[str, ...]
    titles: tuple[str, ...] = ()
    topics: tuple[tuple[str, ...], ...] = ()
    retired: frozenset[str] = frozenset()
    name: str = "catalogue"

    def __post_init__(self) -> None:
        for column in ("titles", "topics"):
            if not getattr(self, column):
                object.__setattr__(self, column, self.ids if column == "titles" else ((),) * len(self.ids))
            if len(getattr(self, column)) != len(self.ids):
                raise InvalidConfig(f"catalogue: {column} must be as many as ids")
        if len(set(self.ids)) != len(self.ids):
            raise InvalidConfig("catalogue: ids must be unique")
        if unknown := sorted(self.retired - set(self.ids)):
            raise InvalidConfig(f"catalogue: retired item {unknown[0]!r} is not in it")

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def index(self) -> dict[str, int]:
        """Position of each identifier."""
        return {item: i for i, item in enumerate(self.ids)}

    @cached_property
    def version(self) -> str:
        """Sixteen hex digits that change when any item, title or topic does, or an item retires."""
        digest = hashlib.sha256()
        for item, title, topics in zip(self.ids, self.titles, self.topics, strict=True):
            digest.update("\x1f".join((item, title, *topics)).encode() + b"\x1e")
        if self.retired:
            digest.update("\x1f".join(("retired", *sorted(self.retired))).encode())
        return digest.hexdigest()[:16]

    @cached_property
    def is_retired(self) -> Int64:
        """int64[n], positions of the retired items."""
        return np.array([self.index[item] for item in sorted(self.retired)], np.int64)

    def positions(self, ids: Iterable[str]) -> Int32:
        """int32[n], where these items stand, in the order given; those that are not here are left out.

        >>> Catalogue(ids=("a", "b")).positions(["b", "x", "b"]).tolist()
        [1, 1]
        """
        return np.array([self.index[item] for item in ids if item in self.index], np.int32)

    @cached_property
    def features(self) -> tuple[str, ...]:
        """Names of the public features, each once: every topic, then every decade read from a title's "(1995)"."""
        topics = sorted({t for ts in self.topics for t in ts})
        decades = sorted({d for title in self.titles if (d := decade(title))})
        return tuple(dict.fromkeys((*topics, *decades)))

    @cached_property
    def content(self) -> Float32:
        """float32[n_items, n_features]: topics and decade of each item, every row of length 1 or all zero."""
        column = {name: j for j, name in enumerate(self.features)}
        out = np.zeros((len(self), len(column)), np.float32)
        for i, (title, topics) in enumerate(zip(self.titles, self.topics, strict=True)):
            own = sorted({column[name] for name in (*topics, decade(title)) if name})
            if own:
                out[i, own] = 1.0 / np.sqrt(len(own))
        return out


def decade(title: str) -> str:
    """The decade of a title that ends in its year, else "".

    >>> decade("Toy Story (1995)")
    '1990s'
    """
    found = _YEAR.search(title)
    return f"{int(found.group(1)) // 10 * 10}s" if found else ""
