"""The public catalogue: what can be recommended, and what anybody may know about it.

Everything here is public and costs no privacy. What users wrote or did (tags, ratings, counts) is data and never
enters a catalogue.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from penchant.common.arrays import Float32
from penchant.common.errors import InvalidConfig

_YEAR = re.compile(r"\((\d{4})\)\s*$")


@dataclass(frozen=True, kw_only=True)
class Catalogue:
    """Items and their public features, in a fixed order that every position elsewhere points into.

    Attributes:
        ids: identifier of each item, unique.
        titles: what a person would call it; as many as ids.
        topics: the item's topics (genres, categories), possibly none; as many as ids.
        name: of the data set or app.
    """

    ids: tuple[str, ...]
    titles: tuple[str, ...] = ()
    topics: tuple[tuple[str, ...], ...] = ()
    name: str = "catalogue"
    extra: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for column in ("titles", "topics"):
            if not getattr(self, column):
                object.__setattr__(self, column, self.ids if column == "titles" else ((),) * len(self.ids))
            if len(getattr(self, column)) != len(self.ids):
                raise InvalidConfig(f"catalogue: {column} must be as many as ids")
        if len(set(self.ids)) != len(self.ids):
            raise InvalidConfig("catalogue: ids must be unique")

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def index(self) -> dict[str, int]:
        """Position of each identifier."""
        return {item: i for i, item in enumerate(self.ids)}

    @cached_property
    def version(self) -> str:
        """Sixteen hex digits that change when any item, title or topic does."""
        digest = hashlib.sha256()
        for item, title, topics in zip(self.ids, self.titles, self.topics, strict=True):
            digest.update("\x1f".join((item, title, *topics)).encode() + b"\x1e")
        return digest.hexdigest()[:16]

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
