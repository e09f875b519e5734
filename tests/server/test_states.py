"""A state comes back as it was, under the name of its bytes, or not at all."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import numpy as np
import pytest

from penchant.common.errors import InvalidConfig, MalformedData
from penchant.server import states
from penchant.server.folder import Folder
from tests.server.operators import an_operator

STATE = {
    "vectors": np.arange(12, dtype=np.float32).reshape(3, 4).T,  # not in C's order, which safetensors would mistake
    "clip/update": np.array(0.5),
    "head": np.array([3, 1, 2], np.int32),
    "seen": np.array([True, False]),
    "none": np.zeros((0, 4), np.float32),
    "server/momentum": np.full(3, 1e-40),
}


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return an_operator(tmp_path / "prod")


def test_a_state_comes_back_as_it_was_under_the_hash_of_its_bytes(folder: Folder) -> None:
    name = states.save(folder, STATE)
    assert hashlib.sha256(states.path(folder, name).read_bytes()).hexdigest() == name
    found = states.load(folder, name)
    assert found.keys() == STATE.keys()
    for key, values in STATE.items():
        assert found[key].dtype == values.dtype
        np.testing.assert_array_equal(found[key], values)
    assert states.save(folder, dict(reversed(STATE.items()))) == name
    assert states.save(folder, {**STATE, "clip/update": np.array(0.6)}) != name
    assert len(list(folder.states.iterdir())) == 3  # the folder's own, before the first round


def test_a_state_that_is_gone_or_damaged_is_not_gone_on_with(folder: Folder) -> None:
    with pytest.raises(MalformedData, match="backup"):
        states.load(folder, "0" * 64)
    name = states.save(folder, STATE)
    data = bytearray(states.path(folder, name).read_bytes())
    data[-1] ^= 1
    states.path(folder, name).write_bytes(data)
    with pytest.raises(MalformedData, match="damaged"):
        states.load(folder, name)
    assert states.save(folder, STATE) == name
    assert states.load(folder, name).keys() == STATE.keys()


def test_a_state_that_finds_no_place_is_no_checkpoint(folder: Folder) -> None:
    shutil.rmtree(folder.states)
    folder.states.write_bytes(b"")
    with pytest.raises(InvalidConfig, match="no checkpoint"):
        states.save(folder, STATE)
