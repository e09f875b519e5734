"""What can still be read of a damaged store, copied into a new one.

Pages are read without SQLite (`_pages.py`). A row counts if it opens under the key, for its table and number and no
other place; a record must be the newest that the state names. Where the state is lost, older than an event, or there
twice, all that open are taken; none is known to be the newest, so what is given `instead` takes the place of its name.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from penchant.client import _keys, _pages
from penchant.client._keys import NONCE_BYTES, Envelope, KeySource
from penchant.client._lock import FolderLock
from penchant.client._schema import (
    DAMAGED,
    DATABASE,
    ENVELOPE,
    STATE,
    Damage,
    State,
    fill,
    named,
    prepared,
    recount,
    unlocked,
)
from penchant.client._seal import Sealer
from penchant.common.errors import StoreDamaged


@dataclass(frozen=True, kw_only=True)
class Salvaged:
    """What was saved of a damaged store.

    Attributes:
        n_events: how many events.
        records: names of the records, with those that were put instead of lost ones.
        lost: what could not be read.
    """

    n_events: int
    records: tuple[str, ...]
    lost: tuple[Damage, ...]


def salvage(
    folder: Path,
    key: KeySource | None,
    instead: Mapping[str, bytes],
    now_ms: Callable[[], int],
    at: Callable[[str], None],
) -> Salvaged:
    """As `Store.salvage`."""
    lock = FolderLock(prepared(folder))
    try:
        if not Envelope(folder / ENVELOPE).exists():
            raise StoreDamaged(f"{folder / ENVELOPE} is gone: without it nothing can be read")
        _, _, data_key = unlocked(folder, key)
        at("salvage:before")
        _set_aside(folder)
        at("salvage:moved")
        if not (folder / DAMAGED).exists():
            raise StoreDamaged(f"{folder / DATABASE} is gone: there is nothing to read")
        return _salvaged(folder, Sealer(data_key), instead, now_ms(), at)
    finally:
        lock.release()


def _set_aside(folder: Path) -> None:
    """Moves the database and its log to where it is read from; again moves what is left."""
    moved = (folder / DATABASE).exists()
    for end in ("", "-wal"):
        found, place = folder / f"{DATABASE}{end}", folder / f"{DAMAGED}{end}"
        if found.exists():
            os.replace(found, place)
        elif moved:  # the log of one set aside before
            place.unlink(missing_ok=True)
    _keys.sync(folder)


def _salvaged(
    folder: Path, sealer: Sealer, instead: Mapping[str, bytes], now_ms: int, at: Callable[[str], None]
) -> Salvaged:
    events, records, changed, states = dict[int, bytes](), dict[int, bytes](), set[int](), dict[bytes, State]()
    for number, sealed in _pages.rows(folder / DAMAGED):
        if sealer.open("events", number, sealed) is not None:
            events[number] = sealed
        elif (text := sealer.open("records", number, sealed)) is not None:
            if number == STATE:
                states[sealed] = State(**json.loads(text))
            else:
                records[number] = sealed
        else:
            changed.add(number)
    believed = next(iter(states.values())) if len(states) == 1 else None
    last = max(events, default=0)
    state = None if believed is None or last > believed.last else believed
    last = last if state is None else state.last
    lost = [
        Damage(f"event {number}", "it was changed") for number in sorted(changed - set(events)) if 0 < number <= last
    ]
    if state is None:
        why = "it is an older one" if believed else "it is there more than once" if states else "it cannot be read"
        lost.append(Damage("state", f"{why}; counted again"))
    else:
        for name, nonce in state.records.items():
            found = records.get(sealer.number(name))
            if found is None or found[:NONCE_BYTES].hex() != nonce:
                records.pop(sealer.number(name), None)
                lost.append(Damage(f"record {name!r}", "it cannot be read"))
        if len(events) != state.n:
            lost.append(Damage("events", f"{state.n} were kept, {len(events)} can be read"))
    for name, value in instead.items():
        number = sealer.number(name)
        if state is None or (number not in records and name in state.records):
            records[number] = sealer.seal("records", number, named(name, value))
    new = recount(sealer, sorted(events.items()), records.items(), believed, now_ms)
    rows = [("events", n, s) for n, s in sorted(events.items())] + [("records", n, s) for n, s in records.items()]
    at("salvage:written")
    fill(folder, sealer, new, rows)
    at("salvage:done")
    return Salvaged(n_events=new.n, records=tuple(sorted(new.records)), lost=tuple(lost))
