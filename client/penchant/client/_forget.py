"""The end of a store: its key first, then its files, finished by whoever opens the folder next if it was cut short."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from penchant.client import _keys, _schema
from penchant.client._keys import Envelope, KeySource
from penchant.client._lock import FolderLock
from penchant.client._schema import DAMAGED, DATABASE, ENVELOPE, TOMBSTONE, prepared
from penchant.client._seal import packed
from penchant.common.errors import StoreDamaged


def forget(folder: Path, *, keep: Mapping[str, Any] | None, key: KeySource | None = None) -> tuple[str, ...]:
    """As `Store.forget`, of a store that need not open: its key is lost, or it is damaged.

    Args:
        key: where the key lies, to destroy it there as well; None finds a keyring and the folder's own key file.
    """
    lock = FolderLock(prepared(folder))
    try:
        if not Envelope(folder / ENVELOPE).exists():
            Envelope(folder / ENVELOPE).create({"schema_version": _schema.SCHEMA_VERSION})
        mark(folder, keep, lambda point: None)
        return finish(folder, key, lambda point: None)
    finally:
        lock.release()


def tombstone(folder: Path) -> dict[str, Any] | None:
    """What the last forget kept; None where there was none.

    Raises:
        StoreDamaged: it cannot be read.
    """
    try:
        kept = json.loads((folder / TOMBSTONE).read_bytes())["kept"]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError):
        kept = None
    if not isinstance(kept, dict):
        raise StoreDamaged(f"{folder / TOMBSTONE} is damaged: restore it from a copy")
    return kept


def mark(folder: Path, keep: Mapping[str, Any] | None, at: Callable[[str], None]) -> None:
    """From here on there is no way back."""
    record = {"forget": True, "kept": None if keep is None else dict(keep)}
    at("forget:before")
    Envelope(folder / ENVELOPE).write(record, _keys.FORGETTING)
    at("forget:begun")


def finish(folder: Path, key: KeySource | None, at: Callable[[str], None]) -> tuple[str, ...]:
    """Goes on with a forget that was begun, from wherever it came to; what could not be destroyed."""
    envelope = Envelope(folder / ENVELOPE)
    if not envelope.exists():
        return ()
    *copies, mark = envelope.slots()
    if mark is None:
        return ()
    left: list[str] = []
    for record in copies:
        if record and record.get("source", _keys.PassphraseKey.kind) != _keys.PassphraseKey.kind:
            with _keys.destroying(left):
                source = key if key and key.kind == record["source"] else _keys.chosen(record["source"], folder)
                source.destroy(record["parameters"])
    at("forget:key")
    for slot in range(_keys.FORGETTING):
        envelope.write(None, slot)
    at("forget:envelope")
    remove(folder)
    at("forget:files")
    if mark["kept"] is None:
        (folder / TOMBSTONE).unlink(missing_ok=True)
    else:
        _keys.replace(folder / TOMBSTONE, packed({"schema_version": 1, "kept": mark["kept"]}))
    at("forget:tombstone")
    envelope.path.unlink()
    _keys.sync(folder)
    at("forget:done")
    return tuple(dict.fromkeys(left))


def remove(folder: Path) -> None:
    for name in (DATABASE, f"{DATABASE}.new", DAMAGED):
        for end in ("", "-wal", "-shm", "-journal"):
            (folder / f"{name}{end}").unlink(missing_ok=True)
    for name in (ENVELOPE, TOMBSTONE):  # one that was cut short
        (folder / f"{name}.new").unlink(missing_ok=True)
