"""Released tables with one byte a number: a quarter of the size to send and keep, at a loss that is measured.

    q_ij = round(127 x_ij / max_k |x_ik|),   x_ij ≈ q_ij · scale_i,   scale_i = max_k |x_ik| / 127

Each row has a scale of its own, so a faint item keeps its direction: no number is off by more than scale_i / 2. It is
post-processing of what was released and costs no privacy.

Source: Jacob et al. 2018, "Quantization and training of neural networks for efficient integer-arithmetic-only
inference", https://arxiv.org/abs/1712.05877, section 2.1 with a zero point of 0.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from penchant.common.arrays import Float32
from penchant.common.errors import InvalidConfig, MalformedData
from penchant.common.taste import ItemSide, Transitions

_LEVELS = 127


@dataclass(frozen=True, eq=False)
class Quantized:
    """A table of rows.

    Attributes:
        values: int8[n, d], in [−127, 127].
        scales: float32[n], ≥ 0; 0 for a row of zeros.
    """

    values: npt.NDArray[np.int8]
    scales: Float32

    def __post_init__(self) -> None:
        if self.values.dtype != np.int8 or self.values.ndim != 2 or self.scales.shape != self.values.shape[:1]:
            raise MalformedData("a quantized table needs int8[n, d] values and float32[n] scales")
        if not (np.isfinite(self.scales) & (self.scales >= 0)).all():
            raise MalformedData("scales of a quantized table must be finite and ≥ 0")

    @classmethod
    def of(cls, rows: Float32) -> Quantized:
        """Rounded to the nearest of 255 levels.

        Raises:
            InvalidConfig: a number is not finite.
        """
        if not np.isfinite(rows).all():
            raise InvalidConfig("only finite numbers can be quantized")
        scales = (np.abs(rows).max(axis=1, initial=0.0) / np.float32(_LEVELS)).astype(np.float32)
        steps = rows / np.where(scales > 0, scales, np.float32(1))[:, None]
        return cls(np.clip(np.rint(steps), -_LEVELS, _LEVELS).astype(np.int8), scales)

    def rows(self) -> Float32:
        """float32[n, d], as close as one byte a number comes."""
        return self.values.astype(np.float32) * self.scales[:, None]

    @property
    def n_bytes(self) -> int:
        return self.values.nbytes + self.scales.nbytes


def pack(side: ItemSide) -> dict[str, npt.NDArray[Any]]:
    """Named arrays of an item side: every table in int8 with its scales; popularity, one number an item, as it is."""
    tables = {"vectors": side.vectors}
    if side.transitions is not None:
        tables |= {"leave": side.transitions.leave, "arrive": side.transitions.arrive}
    arrays: dict[str, npt.NDArray[Any]] = {"popularity": side.popularity}
    for name, rows in tables.items():
        small = Quantized.of(rows)
        arrays |= {f"{name}.int8": small.values, f"{name}.scales": small.scales}
    return arrays


def unpack(arrays: Mapping[str, npt.NDArray[Any]], like: ItemSide) -> ItemSide:
    """The item side of `pack`, with the public settings of `like`.

    Raises:
        MalformedData: an array is missing or is not what its name says.
    """
    try:
        popularity = arrays["popularity"]
        tables = {name: _table(arrays, name, len(popularity)) for name in ("vectors",)}
        if "leave.int8" in arrays:
            tables |= {name: _table(arrays, name, len(popularity)) for name in ("leave", "arrive")}
    except KeyError as error:
        raise MalformedData(f"a packed item side lacks {error}") from None
    follows = Transitions(tables["leave"], tables["arrive"]) if "leave" in tables else None
    return dataclasses.replace(like, vectors=tables["vectors"], popularity=popularity, transitions=follows)


def _table(arrays: Mapping[str, npt.NDArray[Any]], name: str, n: int) -> Float32:
    table = Quantized(arrays[f"{name}.int8"], arrays[f"{name}.scales"])
    if len(table.values) != n:
        raise MalformedData(f"{name} has {len(table.values)} rows, popularity {n}")
    return table.rows()
