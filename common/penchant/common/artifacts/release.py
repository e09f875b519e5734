"""A released model as bytes: what devices train further, and what they score with.

One safetensors file of named arrays: the learner's released state as `state/NAME`, and, where the learner scores by a
taste over item vectors, what `taste.py` reads as `side/NAME`. The operator makes the second out of the first. Of a
network there is the first alone, and `inference/` scores with it. Either way a device recommends with NumPy alone,
whichever learner made the release. No arrays are Python objects: a file that is not what it should be can be wrong, but
runs nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load, save

from penchant.common.arrays import Arrays
from penchant.common.artifacts.signing import checked, from_json
from penchant.common.errors import InvalidConfig, MalformedArtifact
from penchant.common.taste import ItemSide, TasteConfig, Transitions

SCHEMA_VERSION = 1
MAX_WIDTH = 1024
"""Columns of an item's vector that a device takes: its work grows with their cube."""


@dataclass(frozen=True)
class Release:
    """A model on a device.

    Attributes:
        state: the learner's, without what stays on the server.
        side: what a device scores with; None for networks, which score by their state.
    """

    state: Arrays
    side: ItemSide | None

    def to_bytes(self) -> bytes:
        """
        Raises:
            InvalidConfig: an array that stays on the server is among the state's.
        """
        if private := [name for name in self.state if name.startswith("server/")]:
            raise InvalidConfig(f"{private[0]} stays on the server: release Learner.released(state)")
        arrays = {f"state/{name}": values for name, values in self.state.items()}
        record: dict[str, object] = {"schema_version": SCHEMA_VERSION, "taste": None}
        if self.side is not None:
            record |= {"taste": asdict(self.side.config), "content": self.side.content}
            arrays |= {"side/vectors": self.side.vectors, "side/popularity": self.side.popularity}
            if self.side.transitions is not None:
                arrays |= {f"side/{way}": getattr(self.side.transitions, way) for way in ("leave", "arrive")}
        return save({name: np.array(v, order="C") for name, v in arrays.items()}, {"penchant": json.dumps(record)})

    @classmethod
    def from_bytes(cls, data: bytes, n_items: int) -> Release:
        """
        Args:
            n_items: of the release's catalogue.

        Raises:
            MalformedArtifact: not a release, of another schema version, or arrays that do not fit the catalogue.
        """
        try:
            arrays = load(data)
            record = _record(data)
            state = {name.removeprefix("state/"): v for name, v in arrays.items() if name.startswith("state/")}
            side = _side(arrays, record, n_items) if record.get("taste") is not None else None
        except (SafetensorError, ValueError, KeyError, TypeError, InvalidConfig) as error:  # KeyError: an unknown dtype
            raise MalformedArtifact(f"not a release that this version can read: {type(error).__name__}") from None
        if not all(values.dtype.kind in "biuf" and _finite(values) for values in arrays.values()):
            raise MalformedArtifact("a release with numbers that are not finite; ask the operator to withdraw it")
        return cls(state, side)


def _finite(values: npt.NDArray[Any]) -> bool:
    """As np.isfinite(values).all(), without an array of answers."""
    return bool(np.isfinite(values.min(initial=0)) and np.isfinite(values.max(initial=0)))


def _record(data: bytes) -> Mapping[str, object]:
    size = int.from_bytes(data[:8], "little")  # a safetensors file begins with the length of its header, in JSON
    header = from_json(data[8 : 8 + size])  # each name once: `load` keeps the last of two
    return checked(from_json(header["__metadata__"]["penchant"].encode()), SCHEMA_VERSION)


def _side(arrays: Arrays, record: Mapping[str, object], n_items: int) -> ItemSide:
    taste = record["taste"]
    if not isinstance(taste, dict):
        raise TypeError
    known = {f.name: taste[f.name] for f in fields(TasteConfig) if f.name in taste}
    if any(type(value) not in (int, float) for value in known.values()):
        raise TypeError
    config = TasteConfig(**known)
    side = {name: arrays[f"side/{name}"] for name in ("vectors", "popularity")}
    transitions = None
    if "side/leave" in arrays:
        transitions = Transitions(arrays["side/leave"], arrays["side/arrive"])
    tables = (side["vectors"], *((transitions.leave, transitions.arrive) if transitions else ()))
    if side["popularity"].shape != (n_items,) or any(t.ndim != 2 or len(t) != n_items for t in tables):
        raise ValueError
    if any(values.dtype != np.float32 for values in (*tables, side["popularity"])):
        raise ValueError
    if not ((side["popularity"] >= 0) & (side["popularity"] <= 1)).all():
        raise ValueError
    if any(table.shape[1] > MAX_WIDTH for table in tables) or len({table.shape for table in tables[1:]}) > 1:
        raise ValueError
    content = record.get("content", 0)
    if type(content) is not int or not 0 <= content <= side["vectors"].shape[1]:
        raise ValueError
    return ItemSide(side["vectors"], side["popularity"], config, transitions, content)
