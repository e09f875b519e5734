"""A released model comes back as it was, and bytes that are not one, or do not fit, are one typed error."""

from __future__ import annotations

import json
import struct
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors.numpy import save

from penchant.common.arrays import Arrays
from penchant.common.artifacts.release import MAX_WIDTH, SCHEMA_VERSION, Release
from penchant.common.errors import InvalidConfig, MalformedArtifact
from penchant.common.interactions import History, Interactions
from penchant.common.taste import ItemSide, TasteConfig, Transitions
from scripts.wire_vectors import CATALOGUE, MODEL

N = len(CATALOGUE)
DATA = MODEL.to_bytes()
SIDE = MODEL.side
assert SIDE is not None
ARRAYS: dict[str, Any] = {
    "state/head": np.arange(3, dtype=np.int32),
    "side/vectors": SIDE.vectors,
    "side/popularity": SIDE.popularity,
    "side/leave": np.ones((N, 2), np.float32),
    "side/arrive": np.ones((N, 2), np.float32),
}
RECORD: dict[str, Any] = {"schema_version": SCHEMA_VERSION, "taste": asdict(SIDE.config), "content": 1}


def file(arrays: Arrays = ARRAYS, **record: Any) -> bytes:
    return save(dict(arrays), {"penchant": json.dumps({**RECORD, **record})})


def raw(header: str | bytes, body: bytes = b"") -> bytes:
    """A safetensors file with this header, whatever it says."""
    text = header.encode() if isinstance(header, str) else header
    return struct.pack("<Q", len(text)) + text + body


def same(a: Arrays, b: Arrays) -> bool:
    return a.keys() == b.keys() and all(
        a[n].dtype == b[n].dtype and a[n].shape == b[n].shape and a[n].tobytes() == b[n].tobytes() for n in a
    )


def side_arrays(side: ItemSide | None) -> Arrays:
    assert side is not None
    follows = side.transitions
    return {
        "vectors": side.vectors,
        "popularity": side.popularity,
        **({} if follows is None else {"leave": follows.leave, "arrive": follows.arrive}),
    }


@given(
    state=st.dictionaries(
        st.text("abz/", min_size=1, max_size=5),
        hnp.arrays(
            st.sampled_from(["<f4", "<f8", "<i4", "<i8", "|u1", "|b1"]),
            hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4),
            elements=st.integers(0, 1),
        ),
        max_size=4,
    )
)
def test_a_state_comes_back_with_its_names_shapes_types_and_values(state: dict[str, Any]) -> None:
    found = Release.from_bytes(Release(state, None).to_bytes(), N)
    assert found.side is None
    assert same(found.state, state)


def test_arrays_laid_out_in_any_way_come_back_with_their_values() -> None:
    values = np.arange(12, dtype=np.float32).reshape(3, 4)
    for view in (values.T, values[::2], values[:, ::-1], np.asfortranarray(values)):
        found = Release.from_bytes(Release({"w": view}, None).to_bytes(), N).state["w"]
        np.testing.assert_array_equal(found, view)


def test_what_devices_score_with_comes_back_and_scores_the_same() -> None:
    found = Release.from_bytes(DATA, N)
    assert found.to_bytes() == DATA  # one release has one hash
    assert same(found.state, MODEL.state)
    assert found.side is not None
    assert SIDE is not None
    assert same(side_arrays(found.side), side_arrays(SIDE))
    assert (found.side.config, found.side.content) == (SIDE.config, SIDE.content)
    histories = Interactions.one(History.of([0, 3]), N)
    np.testing.assert_array_equal(found.side.scores(histories), SIDE.scores(histories))


def test_an_array_that_stays_on_the_server_is_never_written() -> None:
    with pytest.raises(InvalidConfig, match="server/momentum stays on the server"):
        Release({"server/momentum": np.zeros(1)}, None).to_bytes()


def test_every_truncated_release_is_malformed() -> None:
    for end in range(len(DATA)):
        with pytest.raises(MalformedArtifact):
            Release.from_bytes(DATA[:end], N)
    with pytest.raises(MalformedArtifact):
        Release.from_bytes(DATA + b"\0", N)


@given(bit=st.integers(min_value=0), n_items=st.sampled_from([N, N, N, 0, 1, 10**9]))
def test_a_flipped_bit_in_a_release_is_a_release_or_malformed(bit: int, n_items: int) -> None:
    data = bytearray(DATA)
    data[bit // 8 % len(data)] ^= 1 << bit % 8
    try:
        found = Release.from_bytes(
            bytes(data), n_items
        )  # its hash is checked before; this is what a wrong hash would meet
    except MalformedArtifact:
        return
    if found.side is not None:
        found.side.scores(Interactions.one(History.of([0]), n_items))


@given(data=st.binary(max_size=200))
@example(data=raw(b"[" * 200_000))
@example(data=raw(b'{"__metadata__":{"penchant":"' + b"[" * 100_000 + b'"}}'))
@example(data=raw(b'{"__metadata__":{"penchant":"{\\"schema_version\\":' + b"[" * 100_000 + b'}"}}'))
@example(data=raw('{"__metadata__":{"penchant":"[]"}}'))
@example(data=raw('{"__metadata__":{"penchant":"null"}}'))
@example(data=raw('{"__metadata__":{"penchant":"7"}}'))
@example(data=raw('{"__metadata__":{"other":"{}"}}'))
@example(data=raw("{}"))
@example(data=struct.pack("<Q", 2**64 - 1))
@example(data=struct.pack("<Q", 2**63) + b"{}")
def test_any_bytes_that_are_no_release_are_malformed(data: bytes) -> None:
    with pytest.raises(MalformedArtifact):
        Release.from_bytes(data, N)


@pytest.mark.parametrize("kind", ["BF16", "F8_E4M3", "F8_E8M0", "C64", "F4"])
def test_a_type_of_numbers_that_devices_do_not_know_is_malformed(kind: str) -> None:
    meta = json.dumps({"penchant": json.dumps({**RECORD, "taste": None})})
    width = {"BF16": 2, "C64": 8}.get(kind, 1)
    shape = [2] if kind == "F4" else [1]
    array = {"dtype": kind, "shape": shape, "data_offsets": [0, width]}
    with pytest.raises(MalformedArtifact):
        Release.from_bytes(raw(f'{{"__metadata__":{meta},"state/w":{json.dumps(array)}}}', bytes(width)), N)


def test_two_arrays_of_one_name_are_malformed() -> None:
    meta = json.dumps({"penchant": json.dumps({**RECORD, "taste": None})})
    one = '"state/w":{"dtype":"U8","shape":[1],"data_offsets":[%d,%d]}'
    with pytest.raises(MalformedArtifact):
        Release.from_bytes(raw(f'{{"__metadata__":{meta},{one % (0, 1)},{one % (1, 2)}}}', b"\1\2"), N)


def wide(shape: tuple[int, ...]) -> np.ndarray:
    return np.zeros(shape, np.float32)


UNFIT: dict[str, dict[str, Any]] = {
    "vectors of another catalogue": {"side/vectors": wide((N + 1, 3))},
    "vectors in one dimension": {"side/vectors": wide((N,))},
    "vectors too wide to factorise": {"side/vectors": wide((N, MAX_WIDTH + 1))},
    "vectors of float64": {"side/vectors": np.zeros((N, 3))},
    "popularity of another catalogue": {"side/popularity": wide((N - 1,))},
    "popularity as a table": {"side/popularity": wide((N, 1))},
    "popularity above 1": {"side/popularity": wide((N,)) + np.float32(1.5)},
    "popularity below 0": {"side/popularity": wide((N,)) - np.float32(0.5)},
    "a NaN": {"side/vectors": wide((N, 3)) + np.float32("nan")},
    "an infinity in the state": {"state/w": np.array([np.inf])},
    "an infinity below": {"state/w": np.array([0, -np.inf])},
    "transitions of another catalogue": {"side/leave": wide((N + 1, 2)), "side/arrive": wide((N + 1, 2))},
    "transitions of two widths": {"side/leave": wide((N, 3))},
    "transitions of integers": {"side/leave": np.ones((N, 2), np.int32)},
}


@pytest.mark.parametrize("changes", UNFIT.values(), ids=UNFIT.keys())
def test_arrays_that_do_not_fit_the_catalogue_or_each_other_are_malformed(changes: dict[str, Any]) -> None:
    Release.from_bytes(file(), N)
    with pytest.raises(MalformedArtifact):
        Release.from_bytes(file({**ARRAYS, **changes}), N)


@pytest.mark.parametrize("name", ["side/vectors", "side/popularity", "side/arrive"])
def test_a_side_without_one_of_its_arrays_is_malformed(name: str) -> None:
    with pytest.raises(MalformedArtifact):
        Release.from_bytes(file({key: values for key, values in ARRAYS.items() if key != name}), N)


TASTE = asdict(TasteConfig())


@pytest.mark.parametrize(
    "record",
    [
        {"schema_version": 2},
        {"schema_version": True},
        {"schema_version": None},
        {"content": -1},
        {"content": 4},
        {"content": True},
        {"content": 1.0},
        {"content": float("nan")},
        {"taste": 7},
        {"taste": []},
        {"taste": {**TASTE, "decay": "0.5"}},
        {"taste": {**TASTE, "decay": True}},
        {"taste": {**TASTE, "decay": 2}},
        {"taste": {**TASTE, "ridge": 0}},
        {"taste": {**TASTE, "ridge": float("nan")}},
        {"taste": {**TASTE, "popularity": float("inf")}},
        {"taste": {**TASTE, "unseen": None}},
        {"taste": {**TASTE, "transition": [1]}},
    ],
    ids=str,
)
def test_settings_that_a_device_cannot_score_with_are_malformed(record: dict[str, Any]) -> None:
    with pytest.raises(MalformedArtifact):
        Release.from_bytes(file(**record), N)


def test_a_number_that_no_float_holds_is_malformed() -> None:
    record = json.dumps({**RECORD, "taste": {**TASTE, "ridge": "here"}}).replace('"here"', "1e400")
    data = save(dict(ARRAYS), {"penchant": record})
    with pytest.raises(MalformedArtifact):
        Release.from_bytes(data, N)


def test_what_a_newer_penchant_adds_is_passed_over() -> None:
    found = Release.from_bytes(file({**ARRAYS, "other/x": np.ones(1)}, later=1, taste={**TASTE, "later": "x"}), N)
    assert found.state.keys() == {"head"}


def test_a_release_without_transitions_has_none() -> None:
    assert SIDE is not None
    found = Release.from_bytes(Release({}, replace(SIDE, transitions=None)).to_bytes(), N)
    assert found.side is not None
    assert found.side.transitions is None
    assert isinstance(SIDE.transitions, Transitions)
