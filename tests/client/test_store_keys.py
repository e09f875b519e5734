"""Where a store's key comes from: each source makes, gives back and ends its key, and refuses what is unsafe."""

from __future__ import annotations

import os
import shutil
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path

import pytest

from penchant.client import _keys
from penchant.client._keys import KeyFile, KeyringKey, KeySource, PassphraseKey
from penchant.client._store import Event, Store
from penchant.common.errors import InvalidConfig, MissingExtra, StoreDamaged, StoreError, WrongKey

EVENT = Event(item="film:603", kind="watch", at_ms=1)


class Keyring:
    """As a real one, in memory."""

    def __init__(self) -> None:
        self.entries: dict[tuple[str, str], str] = {}

    def set_password(self, service: str, entry: str, password: str) -> None:
        self.entries[service, entry] = password

    def get_password(self, service: str, entry: str) -> str | None:
        return self.entries.get((service, entry))

    def delete_password(self, service: str, entry: str) -> None:
        del self.entries[service, entry]


KEYRING = Keyring()
SOURCES: dict[str, Callable[[Path], KeySource]] = {
    "passphrase": lambda folder: PassphraseKey("pass", n=4, p=1),
    "file": lambda folder: KeyFile(folder / "key"),
    "keyring": lambda folder: KeyringKey(backend=KEYRING),
}


@pytest.mark.parametrize("kind", SOURCES)
def test_every_source_gives_the_key_back_that_it_made_and_a_forget_ends_it(kind: str, tmp_path: Path) -> None:
    KEYRING.entries.clear()
    with Store.open(tmp_path / "s", key=SOURCES[kind](tmp_path)) as store:
        store.append(EVENT)
    with Store.open(tmp_path / "s", key=SOURCES[kind](tmp_path)) as store:
        assert list(store.events()) == [EVENT]
        assert (len(KEYRING.entries), (tmp_path / "key").exists()) == (kind == "keyring", kind == "file")
        assert store.forget(keep=None) == ()
    assert (len(KEYRING.entries), (tmp_path / "key").exists()) == (0, False)


@pytest.mark.parametrize("new", SOURCES)
@pytest.mark.parametrize("old", SOURCES)
def test_a_store_goes_from_any_source_to_any_other_and_the_old_key_ends(old: str, new: str, tmp_path: Path) -> None:
    KEYRING.entries.clear()
    (tmp_path / "old").mkdir()
    (tmp_path / "new").mkdir()
    first, second = SOURCES[old](tmp_path / "old"), SOURCES[new](tmp_path / "new")
    with Store.open(tmp_path / "s", key=first) as store:
        store.append(EVENT)
        before = (tmp_path / "s" / "store.envelope").read_bytes()
        assert store.rewrap(second) == ()
        store.append(EVENT)
    wrapped = (tmp_path / "s" / "store.envelope").read_bytes()
    assert wrapped[:4096] == wrapped[4096:8192] != before[:4096]
    assert len(KEYRING.entries) == (new == "keyring")
    assert not (tmp_path / "old" / "key").exists()
    with Store.open(tmp_path / "s", key=second) as store:
        assert list(store.events()) == [EVENT, EVENT]
        assert store.check() == ()


@pytest.mark.parametrize("kind", SOURCES)
def test_another_key_or_another_kind_of_key_is_refused_and_changes_nothing(kind: str, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    Store.open(tmp_path / "s", key=SOURCES[kind](tmp_path)).close()
    files = {path.name: path.read_bytes() for path in (tmp_path / "s").iterdir()}
    KeyFile(tmp_path / "other" / "key").make()
    wrong: dict[str, KeySource] = {
        "passphrase": PassphraseKey("Pass", n=4, p=1),
        "file": KeyFile(tmp_path / "other" / "key"),
        "keyring": KeyringKey(backend=Keyring()),
    }
    for key in wrong.values():
        with pytest.raises(WrongKey):
            Store.open(tmp_path / "s", key=key)
        with pytest.raises(WrongKey):
            Store.salvage(tmp_path / "s", key=key)
    assert {path.name: path.read_bytes() for path in (tmp_path / "s").iterdir()} == files
    with Store.open(tmp_path / "s", key=SOURCES[kind](tmp_path)) as store:
        store.append(EVENT)


def test_a_passphrase_is_the_same_however_its_letters_are_composed_and_is_shown_nowhere(tmp_path: Path) -> None:
    Store.open(tmp_path / "s", key=PassphraseKey("caf\u00e9", n=4)).close()
    Store.open(tmp_path / "s", key=PassphraseKey("cafe\u0301")).close()
    with pytest.raises(WrongKey, match="give it as key"):
        Store.open(tmp_path / "s")
    assert "caf" not in repr(PassphraseKey("caf\u00e9"))
    with pytest.raises(InvalidConfig):
        PassphraseKey("")


@pytest.mark.parametrize("cost", [{"n": 3}, {"n": 1}, {"n": 1 << 24}, {"r": 0}, {"p": 0}])
def test_a_cost_that_scrypt_cannot_take_is_refused(cost: dict[str, int]) -> None:
    with pytest.raises(InvalidConfig):
        PassphraseKey("a", **cost)
    source = PassphraseKey("a", n=2, p=1)
    _, parameters = source.make()
    with pytest.raises(WrongKey):  # and a changed envelope cannot ask for it
        source.load({**parameters, **cost})


@pytest.mark.skipif(os.name != "posix", reason="POSIX file permissions")
def test_a_key_file_that_others_may_read_is_refused(tmp_path: Path) -> None:
    key = KeyFile(tmp_path / "key")
    Store.open(tmp_path / "s", key=key).close()
    assert key.path.stat().st_mode & 0o777 == 0o600
    for mode in (0o640, 0o604, 0o660):
        key.path.chmod(mode)
        with pytest.raises(InvalidConfig, match="chmod 600"):
            Store.open(tmp_path / "s", key=key)
    key.path.chmod(0o600)
    Store.open(tmp_path / "s", key=key).close()


def test_a_key_file_that_is_there_is_never_taken_for_a_new_store_or_overwritten(tmp_path: Path) -> None:
    key = KeyFile(tmp_path / "key")
    with Store.open(tmp_path / "one", key=key) as store:
        with pytest.raises(InvalidConfig, match="another place"):
            Store.open(tmp_path / "two", key=key)
        with pytest.raises(InvalidConfig, match="another place"):
            store.rewrap(KeyFile(tmp_path / "." / "key"))
        assert key.path.exists()


@pytest.mark.parametrize("content", ["", "00" * 31, "zz" * 32, "00" * 33])
def test_a_key_file_without_a_key_in_it_is_the_wrong_key(content: str, tmp_path: Path) -> None:
    key = KeyFile(tmp_path / "key")
    Store.open(tmp_path / "s", key=key).close()
    key.path.write_text(content)
    with pytest.raises(WrongKey):
        Store.open(tmp_path / "s", key=key)
    key.path.unlink()
    with pytest.raises(WrongKey, match="give"):
        Store.open(tmp_path / "s", key=key)


def test_without_a_keyring_a_new_store_keeps_its_key_in_a_file_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "keyring", None)
    with Store.open(tmp_path) as store:
        store.append(EVENT)
        assert (tmp_path / "store.key").exists()
    shutil.move(tmp_path, tmp_path.with_name("moved"))
    with Store.open(tmp_path.with_name("moved")) as store:
        assert list(store.events()) == [EVENT]
        store.rewrap(PassphraseKey("pass", n=2, p=1))
        assert not (store.folder / "store.key").exists()
    with pytest.raises(MissingExtra, match=r"penchant\[keyring\]"):
        KeyringKey()


def system_keyring(monkeypatch: pytest.MonkeyPatch, backend: object) -> None:
    module = types.ModuleType("keyring")
    module.get_keyring = lambda: backend  # type: ignore[attr-defined]  # a fake module
    monkeypatch.setitem(sys.modules, "keyring", module)


def test_with_a_keyring_a_new_store_keeps_its_key_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Keychain(Keyring):
        __module__ = "keyring.backends.macOS"

    class Chain:
        __module__ = "keyring.backends.chainer"
        backends = (Keyring(), Keychain())

    system_keyring(monkeypatch, Chain())
    with Store.open(tmp_path) as store:
        store.append(EVENT)
    assert [len(backend.entries) for backend in Chain.backends] == [0, 1]
    assert not (tmp_path / "store.key").exists()
    with Store.open(tmp_path) as store:
        assert list(store.events()) == [EVENT]
    monkeypatch.setitem(sys.modules, "keyring", None)
    with pytest.raises(WrongKey, match="in a keyring"):
        Store.open(tmp_path)


def test_what_the_package_calls_a_keyring_but_keeps_nothing_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    keyring, fail, null = (
        pytest.importorskip(name) for name in ("keyring", "keyring.backends.fail", "keyring.backends.null")
    )
    for backend in (fail.Keyring(), null.Keyring()):
        with pytest.raises(InvalidConfig, match="keeps nothing"):
            KeyringKey(backend=backend)
        monkeypatch.setattr(keyring, "get_keyring", lambda backend=backend: backend)
        with pytest.raises(InvalidConfig, match="no keyring"):
            KeyringKey()
        with Store.open(tmp_path / type(backend).__module__):
            assert (tmp_path / type(backend).__module__ / "store.key").exists()

    class PlaintextKeyring(Keyring):
        pass

    with pytest.raises(InvalidConfig, match="in clear"):
        KeyringKey(backend=PlaintextKeyring())


def test_a_keyring_that_fails_lies_or_waits_for_ever_is_a_typed_error(tmp_path: Path) -> None:
    class Locked(Keyring):
        def get_password(self, service: str, entry: str) -> str | None:
            raise RuntimeError("locked")

    class Lies(Keyring):
        def get_password(self, service: str, entry: str) -> str | None:
            return "00" * 32

    class Waits(Keyring):
        def get_password(self, service: str, entry: str) -> str | None:
            time.sleep(5)
            return None

    for backend in (Locked(), Lies(), Waits()):
        with pytest.raises(InvalidConfig, match="give a KeyFile"):
            Store.open(tmp_path / "s", key=KeyringKey(backend=backend, timeout_s=0.05))
    real = Keyring()
    Store.open(tmp_path / "s", key=KeyringKey(backend=real)).close()
    for cls in (Locked, Lies, Waits):
        backend = cls()
        backend.entries = real.entries
        with pytest.raises(WrongKey):
            Store.open(tmp_path / "s", key=KeyringKey(backend=backend, timeout_s=0.05))


def test_a_key_that_cannot_be_ended_is_named_and_the_store_is_forgotten_all_the_same(tmp_path: Path) -> None:
    class Keeps(Keyring):
        def delete_password(self, service: str, entry: str) -> None:
            pass

    keeps = Keeps()
    store = Store.open(tmp_path / "s", key=KeyringKey(backend=keeps))
    (left,) = store.forget(keep=None)
    ((service, entry),) = keeps.entries
    assert service in left
    assert entry in left
    assert [path.name for path in (tmp_path / "s").iterdir()] == ["store.lock"]


@pytest.mark.parametrize("slot", [0, 1])
def test_a_flipped_bit_in_one_copy_of_the_wrapped_key_is_mended_from_the_other(slot: int, tmp_path: Path) -> None:
    key, path = KeyFile(tmp_path / "key"), tmp_path / "s" / "store.envelope"
    with Store.open(tmp_path / "s", key=key) as store:
        store.append(EVENT)
    good = path.read_bytes()
    for at in (0, 40, 300):
        bad = bytearray(good)
        bad[slot * 4096 + at] ^= 1
        path.write_bytes(bad)
        with Store.open(tmp_path / "s", key=key) as store:
            assert list(store.events()) == [EVENT]
        assert path.read_bytes() == good
    for lost in (bytes(12288), b"", good[:100]):
        path.write_bytes(lost)
        with pytest.raises(StoreDamaged, match="both"):
            Store.open(tmp_path / "s", key=key)
    path.unlink()
    with pytest.raises(StoreDamaged, match="restore it from a copy"):
        Store.open(tmp_path / "s", key=key)
    path.write_bytes(good)
    with Store.open(tmp_path / "s", key=key) as store:
        assert list(store.events()) == [EVENT]


def test_an_envelope_with_other_parameters_than_were_sealed_does_not_open(tmp_path: Path) -> None:
    source = PassphraseKey("a", n=2, p=1)
    wrapping, parameters = source.make()
    record = _keys.wrap(b"d" * 32, wrapping, source.kind, parameters, 1)
    assert _keys.unwrap(record, wrapping) == b"d" * 32
    for change in ({"parameters": {**parameters, "p": 2}}, {"source": "file"}, {"wrapped": "00"}, {"wrapped": 3}):
        with pytest.raises(WrongKey):
            _keys.unwrap({**record, **change}, wrapping)


def test_a_file_of_another_program_with_the_store_s_name_is_not_deleted(tmp_path: Path) -> None:
    (tmp_path / "store.db").write_bytes(b"somebody's data" * 1000)
    with pytest.raises(StoreError):
        Store.open(tmp_path, key=PassphraseKey("a", n=2, p=1))
    assert (tmp_path / "store.db").read_bytes() == b"somebody's data" * 1000


def test_keys_for_other_files_are_of_one_use_and_one_store_and_outlive_its_source(tmp_path: Path) -> None:
    found: list[bytes] = []
    for name in ("a", "b"):
        with Store.open(tmp_path / name, key=PassphraseKey("one", n=4, p=1)) as store:
            found += [store.key_for("x"), store.key_for("y")]
            store.rewrap(PassphraseKey("two", n=4, p=1))
    assert len(set(found)) == 4
    assert {len(key) for key in found} == {32}
    with Store.open(tmp_path / "a", key=PassphraseKey("two")) as store:
        assert [store.key_for("x"), store.key_for("y")] == found[:2]
