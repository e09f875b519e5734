"""The store beside a model of it, through any calls in any order."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from penchant.client._keys import PassphraseKey
from penchant.client._retention import DAY_MS, Retention
from penchant.client._seal import Sealer
from penchant.client._store import Event, Store

T0 = 1_760_000_000_000
DAYS, MOST = 30, 12

texts = st.text(st.characters(), min_size=1, max_size=20)
events = st.builds(
    Event,
    item=texts,
    kind=texts,
    at_ms=st.integers(T0 - 60 * DAY_MS, T0 + 60 * DAY_MS),
    strength=st.floats(0, 1),
    dwell_s=st.none() | st.floats(0, 1e9),
    rating=st.none() | st.floats(-10, 10),
    context=st.dictionaries(texts, st.text(st.characters(), max_size=5), max_size=3),
)
names = st.sampled_from(["profile", "consent", "é", "x" * 200])


class Kept(RuleBasedStateMachine):
    """Runs each call on the store and on a list and a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.now = self.noted = T0
        self.believed = 0
        self.model: dict[int, Event] = {}
        self.records: dict[str, bytes] = {}
        self.last = self.keys = 0
        self.open()

    def open(self) -> None:
        self.store = Store.open(
            self.folder / "s",
            key=PassphraseKey(f"key {self.keys}", n=2, p=1),
            retention=Retention(days=DAYS, max_events=MOST),
            now_ms=lambda: self.now,
        )

    def retain(self) -> None:
        """As the header of the store says."""
        if self.now < self.noted:
            self.noted = self.now
        elif self.now - self.noted >= DAY_MS:
            self.believed, self.noted = self.noted, self.now
        kept = sorted(self.model.items())[-MOST:]
        self.model = {n: event for n, event in kept if event.at_ms >= self.believed - DAYS * DAY_MS}

    def keep(self, some: list[Event]) -> list[int]:
        numbers = list(range(self.last + 1, self.last + 1 + len(some)))
        self.model.update(zip(numbers, some, strict=True))
        self.last += len(some)
        return numbers

    @rule(some=st.lists(events, max_size=15))
    def append(self, some: list[Event]) -> None:
        assert self.store.append_all(some) == self.keep(some)
        self.retain()

    @rule(name=names, value=st.binary(max_size=300))
    def put(self, name: str, value: bytes) -> None:
        self.store.put(name, value)
        self.records[name] = value
        self.retain()

    @rule(name=names)
    def delete(self, name: str) -> None:
        self.store.delete(name)
        self.records.pop(name, None)
        self.retain()

    @rule(event=events, name=names, value=st.binary(max_size=9), fails=st.booleans())
    def transaction(self, event: Event, name: str, value: bytes, fails: bool) -> None:
        try:
            with self.store.transaction():
                self.store.append(event)
                self.store.put(name, value)
                self.store.delete("consent")
                if fails:
                    raise KeyboardInterrupt
        except KeyboardInterrupt:
            return
        self.keep([event])
        self.records[name] = value
        self.records.pop("consent", None)
        self.retain()

    @rule(days=st.sampled_from([0.2, 1.0, 1.5, 29.0, 45.0, 4000.0, -4000.0, -1.0]))
    def time_goes(self, days: float) -> None:
        self.now = max(0, self.now + round(days * DAY_MS))

    @rule()
    def reopen(self) -> None:
        self.store.close()
        self.open()
        if self.now < self.noted or self.now - self.noted >= DAY_MS:
            self.retain()

    @rule()
    def rewrap(self) -> None:
        assert self.store.rewrap(PassphraseKey(f"key {self.keys + 1}", n=2, p=1)) == ()
        self.keys += 1

    @rule()
    def salvage(self) -> None:
        self.store.close()
        key = PassphraseKey(f"key {self.keys}", n=2, p=1)
        assert Store.salvage(self.folder / "s", key=key, now_ms=lambda: self.now).lost == ()
        self.open()
        if self.now < self.noted or self.now - self.noted >= DAY_MS:
            self.retain()

    @precondition(lambda self: self.last > 20)
    @rule()
    def forget(self) -> None:
        self.store.forget(keep=None)
        self.model, self.records, self.last = {}, {}, 0
        self.noted, self.believed = self.now, 0
        self.open()

    @invariant()
    def holds_what_the_model_holds(self) -> None:
        found = {event.number: event for event in self.store.events()}
        assert list(found.items()) == sorted(self.model.items())
        assert {name: self.store.get(name) for name in self.store.names()} == self.records
        assert all(self.store.get(name) is None for name in ("profile", "consent") if name not in self.records)
        assert (self.store.n_events, self.store.last_id) == (len(self.model), self.last)
        assert self.store.check() == ()

    def teardown(self) -> None:
        self.store.close()
        shutil.rmtree(self.folder)


TestKept = Kept.TestCase
TestKept.settings = settings(
    max_examples=12, stateful_step_count=25, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)


@given(text=st.binary(max_size=400), number=st.integers(0, (1 << 63) - 1), flip=st.integers(0))
def test_what_is_sealed_opens_in_its_place_alone_and_only_if_no_bit_of_it_changed(
    text: bytes, number: int, flip: int
) -> None:
    sealer = Sealer(b"k" * 32)
    sealed = sealer.seal("events", number, text)
    assert sealer.open("events", number, sealed) == text
    assert len(sealed) % 128 == 28
    changed = bytearray(sealed)
    changed[flip // 8 % len(sealed)] ^= 1 << flip % 8
    assert sealer.open("events", number, bytes(changed)) is None
    assert sealer.open("records", number, sealed) is None
    assert sealer.open("events", number ^ 1, sealed) is None
    assert Sealer(b"l" * 32).open("events", number, sealed) is None
    assert sealer.seal("events", number, text) != sealed
