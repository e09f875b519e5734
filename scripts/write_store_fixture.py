"""Writes a store of the present schema version for tests/client/test_store.py, which must open it for ever.

One is recorded for each version and never written again: python scripts/write_store_fixture.py
"""

from __future__ import annotations

import sys
from pathlib import Path

from penchant.client._keys import PassphraseKey
from penchant.client._schema import SCHEMA_VERSION
from penchant.client._store import Event, Store

FOLDER = Path(__file__).resolve().parent.parent / "tests" / "client" / "fixtures" / f"store-v{SCHEMA_VERSION}"
NOW_MS = 1_760_000_000_000
PASSPHRASE = "correct horse battery staple"
EVENTS = (
    Event(item="film:603", kind="watch", at_ms=NOW_MS - 2, dwell_s=5400.0, context={"device": "phone"}),
    Event(item="film:78", kind="rate", at_ms=NOW_MS - 1, rating=4.5, strength=0.9),
    Event(item="film:ünïcode", kind="view", at_ms=NOW_MS),
)
RECORDS = {"consent": b'{"text": 1}', "profile": bytes(range(256)) * 64}


def main() -> int:
    if FOLDER.exists():
        print(f"{FOLDER.name} is recorded; a new version is another folder", file=sys.stderr)
        return 1
    with Store.open(FOLDER, key=PassphraseKey(PASSPHRASE, n=1 << 10, p=1), now_ms=lambda: NOW_MS) as store:
        store.append_all(EVENTS)
        for name, value in RECORDS.items():
            store.put(name, value)
    (FOLDER / "store.lock").unlink()
    return 0


if __name__ == "__main__":
    sys.exit(main())
