"""The learner's state after each round, the server's part included, in a file that is named by its bytes.

    states/SHA256.safetensors    SHA256 of the file's bytes, in hex: `sha256sum` says whether one is whole

The same state has the same name, so that writing it again does no harm, and server.db's progress names the one that
counts. A file is on the disk, name and all, before `save` returns: a checkpoint may then name it.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
from safetensors.numpy import load as _load
from safetensors.numpy import save as _save

from penchant.common.errors import InvalidConfig, MalformedData
from penchant.common.learners.contract import State
from penchant.server.folder import Folder, sync, write_secret


def path(folder: Folder, sha256: str) -> Path:
    """Where the state of this name is, or would be."""
    return folder.states / f"{sha256}.safetensors"


def save(folder: Folder, state: State) -> str:
    """Writes a state; its name.

    Raises:
        InvalidConfig: no room for it, or no right to write it.
    """
    data = _save({name: np.array(values, order="C") for name, values in sorted(state.items())})
    name = hashlib.sha256(data).hexdigest()
    try:
        write_secret(path(folder, name), data)
        sync(folder.states)
    except OSError as error:
        raise InvalidConfig(f"cannot write {path(folder, name)}: {error.strerror}; no checkpoint was made") from None
    return name


def load(folder: Folder, sha256: str) -> State:
    """The state of this name.

    Raises:
        MalformedData: no such file, or other bytes than its name says.
    """
    where = path(folder, sha256)
    try:
        data = where.read_bytes()
    except OSError as error:
        raise MalformedData(f"{where}: {error.strerror}; restore it from a backup") from None
    if hashlib.sha256(data).hexdigest() != sha256:
        raise MalformedData(f"{where} is damaged: restore it from a backup")
    return _load(data)
