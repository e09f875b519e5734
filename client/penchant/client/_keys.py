"""Where a store's key comes from, and the file that holds it wrapped.

    every record of the store      sealed with the data key, 256 random bits, the same for the store's whole life
    `store.envelope`               the data key, sealed with a key that a `KeySource` gives
    the source                     the system's keyring, a passphrase, or a file that only its owner may read

Another source wraps the same data key anew (`Store.rewrap`), so no record is written again. Without the source or
without the envelope nothing opens the store any more: destroying both is what `Store.forget` means.

The envelope has three slots of 4,096 bytes, each a digest and a JSON object, and is written in place, so that old bytes
are overwritten and a full disk stops nothing. The first two are equal: one is good while the other is written, and one
flipped bit loses no key. The third is empty until a forget begins; from then on the store is never opened again, and
whoever comes next finishes what was begun.

Sources: key wrapping, NIST SP 800-57 part 1 rev. 5, section 6.2; scrypt, RFC 7914, with the settings of the OWASP
Password Storage Cheat Sheet for 32 MiB; ChaCha20-Poly1305, RFC 8439.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import importlib
import json
import os
import queue
import secrets
import threading
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Protocol

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from penchant.common.errors import InvalidConfig, MissingExtra, StoreError, StoreFull, WrongKey

KEY_BYTES, NONCE_BYTES = 32, 12
KEY_FILE = "store.key"
"""Name of the key file in a store's folder where nothing else was chosen."""

Parameters = Mapping[str, Any]
"""What a source needs to give the same key again, besides its secret; stored in clear, of JSON types."""


class KeySource(Protocol):
    """Gives the key that wraps the data key.

    Attributes:
        kind: names the source in the envelope.
    """

    kind: ClassVar[str]

    def make(self) -> tuple[bytes, Parameters]:
        """A new key, kept where this source keeps its keys.

        Raises:
            InvalidConfig: it cannot be kept there.
        """
        ...

    def load(self, parameters: Parameters) -> bytes:
        """The key that was made with these parameters.

        Raises:
            WrongKey: it is not to be had.
        """
        ...

    def destroy(self, parameters: Parameters) -> None:
        """Ends that key, where this source keeps it; again does nothing.

        Raises:
            StoreError: it is still there.
        """
        ...


class PassphraseKey:
    """A key from what a person remembers, by scrypt. The passphrase is kept nowhere: forgotten, the store is lost.

    Args:
        passphrase: its Unicode form (NFC) counts, so that it opens the store from another keyboard too.
        n, r, p: cost: 128·n·r bytes, and p passes. Only for new keys; a key made before says its own.
    """

    kind: ClassVar[str] = "passphrase"

    def __init__(self, passphrase: str, *, n: int = 1 << 15, r: int = 8, p: int = 3) -> None:
        if not passphrase:
            raise InvalidConfig("a passphrase cannot be empty")
        self._passphrase = unicodedata.normalize("NFC", passphrase).encode("utf-8", "surrogatepass")
        self._cost = {"n": n, "r": r, "p": p}
        if not _affordable(**self._cost):
            raise InvalidConfig(f"scrypt cannot take n {n}, r {r}, p {p}: n is a power of 2, and at most 1 GiB is used")

    def make(self) -> tuple[bytes, Parameters]:
        parameters = {**self._cost, "salt": secrets.token_hex(16)}
        return self.load(parameters), parameters

    def load(self, parameters: Parameters) -> bytes:
        try:
            salt = bytes.fromhex(parameters["salt"])
            n, r, p = (int(parameters[name]) for name in ("n", "r", "p"))
        except (KeyError, TypeError, ValueError):
            raise WrongKey("the envelope does not say how the passphrase makes a key") from None
        if not _affordable(n, r, p):  # a changed envelope must not take all memory
            raise WrongKey("the envelope asks for more than 1 GiB to make a key of the passphrase")
        return hashlib.scrypt(self._passphrase, salt=salt, n=n, r=r, p=p, maxmem=128 * r * (n + p + 2), dklen=KEY_BYTES)

    def destroy(self, parameters: Parameters) -> None:
        """Nothing: the passphrase is in no file. Without the envelope it opens nothing."""


class KeyFile:
    """A random key in a file that only its owner may read: one file, one store.

    In the store's own folder it protects a copy of the database alone, and lets `forget` destroy it. On another medium
    it protects the folder too.
    """

    kind: ClassVar[str] = "file"

    def __init__(self, path: Path) -> None:
        self.path = Path(path)

    def make(self) -> tuple[bytes, Parameters]:
        key = os.urandom(KEY_BYTES)
        try:
            handle = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
            try:
                _write(handle, key.hex().encode() + b"\n")
                os.fsync(handle)
            finally:
                os.close(handle)
            sync(self.path.parent)
        except FileExistsError:
            raise InvalidConfig(f"{self.path} exists, and may be another store's key: take another place") from None
        except OSError as error:
            with contextlib.suppress(OSError):
                self.path.unlink(missing_ok=True)  # half of a key
            raise refused(self.path, error) from None
        return key, {}

    def load(self, parameters: Parameters) -> bytes:
        try:
            with self.path.open("rb") as file:
                if os.name == "posix" and os.fstat(file.fileno()).st_mode & 0o077:
                    raise InvalidConfig(f"others may read {self.path}: chmod 600 it")
                key = bytes.fromhex(file.read(1000).decode("ascii"))
        except OSError as error:
            raise WrongKey(f"no key in {self.path}: {error.strerror}; give key=KeyFile(…) its place") from None
        except ValueError:
            key = b""
        if len(key) != KEY_BYTES:
            raise WrongKey(f"{self.path} holds no key")
        return key

    def destroy(self, parameters: Parameters) -> None:
        try:
            overwrite(self.path)
        except OSError as error:
            raise StoreError(f"{self.path} could not be destroyed: {error.strerror}") from None


class KeyringKey:
    """A random key in the keyring of the system: Keychain, Credential Locker, Secret Service or KWallet.

    Args:
        service: name under which the person sees it there.
        backend: a keyring of the package `keyring` that you vouch for; None takes the system's.
        timeout_s: a keyring that waits longer, say for a person to unlock it, does not answer.

    Raises:
        MissingExtra: the package `keyring` is not installed.
        InvalidConfig: there is no keyring here, or only one that keeps nothing or keeps it in clear.
    """

    kind: ClassVar[str] = "keyring"

    def __init__(self, service: str = "penchant", *, backend: Any = None, timeout_s: float = 10.0) -> None:
        self._backend = _system_keyring() if backend is None else backend
        if _is_unreal(self._backend):
            raise InvalidConfig("this keyring keeps nothing, or keeps it in clear: give another, or a KeyFile")
        self._service, self._timeout_s = service, timeout_s

    def make(self) -> tuple[bytes, Parameters]:
        key, entry = os.urandom(KEY_BYTES), secrets.token_hex(8)
        parameters = {"service": self._service, "entry": entry}
        try:
            self._ask("set_password", self._service, entry, key.hex())
            kept = self.load(parameters)
        except WrongKey as error:
            raise InvalidConfig(f"{error}; unlock it, or give a KeyFile") from None
        if kept != key:
            raise InvalidConfig("the keyring gave another key back than it was given: give a KeyFile")
        return key, parameters

    def load(self, parameters: Parameters) -> bytes:
        found = self._ask("get_password", *self._place(parameters))
        try:
            key = bytes.fromhex(found or "")
        except (TypeError, ValueError):
            key = b""
        if len(key) != KEY_BYTES:
            raise WrongKey("the keyring has no key of this store")
        return key

    def destroy(self, parameters: Parameters) -> None:
        place = self._place(parameters)
        if self._ask("get_password", *place) is not None:
            self._ask("delete_password", *place)
            if self._ask("get_password", *place) is not None:
                raise StoreError(f"the keyring still has the entry {place[1]} of {place[0]}: delete it there")

    def _place(self, parameters: Parameters) -> tuple[str, str]:
        try:
            return str(parameters["service"]), str(parameters["entry"])
        except KeyError:
            raise WrongKey("the envelope does not say where in the keyring the key is") from None

    def _ask(self, method: str, *args: str) -> Any:
        """What the keyring answers, from a thread of its own: it may wait for a person for ever."""
        answers: queue.SimpleQueue[tuple[Any, Exception | None]] = queue.SimpleQueue()

        def ask() -> None:
            try:
                answers.put((getattr(self._backend, method)(*args), None))
            except Exception as error:
                answers.put((None, error))

        threading.Thread(target=ask, daemon=True, name="penchant-keyring").start()
        try:
            answer, error = answers.get(timeout=self._timeout_s)
        except queue.Empty:
            raise WrongKey(f"the keyring did not answer within {self._timeout_s:g} s") from None
        if error is not None:
            raise WrongKey(f"the keyring refused ({type(error).__name__})")
        return answer


_REAL = tuple(f"keyring.backends.{name}" for name in ("macOS", "Windows", "SecretService", "libsecret", "kwallet"))


def _system_keyring() -> Any:
    try:
        found = importlib.import_module("keyring").get_keyring()
    except ImportError:
        raise MissingExtra("keyring", "keyring") from None
    for backend in getattr(found, "backends", [found]):  # a chain of them, or one
        if type(backend).__module__.startswith(_REAL):
            return backend
    raise InvalidConfig("this system has no keyring: give a KeyFile or a PassphraseKey")


def _is_unreal(backend: Any) -> bool:
    kind = backend if isinstance(backend, type) else type(backend)
    name = f"{kind.__module__}.{kind.__qualname__}".lower()
    return any(word in name for word in (".backends.fail.", ".backends.null.", ".backends.chainer.", "plaintext"))


def _affordable(n: int, r: int, p: int) -> bool:
    return n >= 2 and n & (n - 1) == 0 and r >= 1 and 1 <= p <= 64 and 128 * n * r <= 1 << 30


def chosen(source: str, folder: Path) -> KeySource:
    """The source of a store whose opener gave none.

    Raises:
        WrongKey: it is one that must be given.
    """
    if source == KeyFile.kind:
        return KeyFile(folder / KEY_FILE)
    if source == KeyringKey.kind:
        try:
            return KeyringKey()
        except (MissingExtra, InvalidConfig) as error:
            raise WrongKey(f"the key of this store is in a keyring: {error}") from None
    raise WrongKey(f"the key of this store is a {source}: give it as key=…")


def make_default(folder: Path) -> tuple[KeySource, bytes, Parameters]:
    """A new key in the system's keyring, or where there is none or none that answers in a key file."""
    source: KeySource
    with contextlib.suppress(MissingExtra, InvalidConfig):
        source = KeyringKey()
        return source, *source.make()
    source = KeyFile(folder / KEY_FILE)
    return source, *source.make()


# ----------------------------------------------------------------------------------------------------- envelope

SLOT = 4096
FORGETTING = 2


class Envelope:
    """The file with the wrapped data key; its slots are described above."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def exists(self) -> bool:
        return self.path.exists()

    def slots(self) -> list[dict[str, Any] | None]:
        """What is in the three slots; None for one that is empty or damaged.

        Raises:
            StoreError: it cannot be read.
        """
        try:
            raw = self.path.read_bytes()
        except OSError as error:
            raise refused(self.path, error) from None
        return [_unpacked(raw[i * SLOT : (i + 1) * SLOT]) for i in range(3)]

    def create(self, record: Mapping[str, Any]) -> None:
        """Puts it in place, whole or not at all."""
        replace(self.path, _packed(record) * 2 + bytes(SLOT))

    def write(self, record: Mapping[str, Any] | None, slot: int) -> None:
        """Overwrites one slot in place, with zeros for None, and waits until the disk has it."""
        try:
            handle = os.open(self.path, os.O_RDWR)
            try:
                os.lseek(handle, slot * SLOT, os.SEEK_SET)
                _write(handle, bytes(SLOT) if record is None else _packed(record))
                os.fsync(handle)
            finally:
                os.close(handle)
        except OSError as error:
            raise refused(self.path, error) from None

    def write_both(self, record: Mapping[str, Any], at: Callable[[], None] = lambda: None) -> None:
        """Both copies of the wrapped key, one after the other; `at` is called in between."""
        self.write(record, 0)
        at()
        self.write(record, 1)


def wrap(data_key: bytes, key: bytes, source: str, parameters: Parameters, schema_version: int) -> dict[str, Any]:
    """What stands in the first two slots."""
    bound = {"source": source, "parameters": dict(parameters)}
    nonce = os.urandom(NONCE_BYTES)
    wrapped = nonce + ChaCha20Poly1305(key).encrypt(nonce, data_key, _canonical(bound))
    return {"schema_version": schema_version, **bound, "wrapped": wrapped.hex()}


def unwrap(record: Mapping[str, Any], key: bytes) -> bytes:
    """The data key.

    Raises:
        WrongKey: `key` did not wrap it, or the record is not what was written.
    """
    try:
        wrapped = bytes.fromhex(record["wrapped"])
        bound = {"source": record["source"], "parameters": record["parameters"]}
        return ChaCha20Poly1305(key).decrypt(wrapped[:NONCE_BYTES], wrapped[NONCE_BYTES:], _canonical(bound))
    except (InvalidTag, KeyError, TypeError, ValueError):
        raise WrongKey("this key does not open the store: give the one it was made with") from None


def _packed(record: Mapping[str, Any]) -> bytes:
    text = _canonical(record)
    if len(text) > SLOT - 32:
        raise InvalidConfig(f"{len(text)} bytes do not fit into the {SLOT - 32} of a slot: keep less")
    return (hashlib.sha256(text).digest() + text).ljust(SLOT, b"\0")


def _unpacked(slot: bytes) -> dict[str, Any] | None:
    text = slot[32:].rstrip(b"\0")
    if not text or hashlib.sha256(text).digest() != slot[:32]:
        return None
    record = json.loads(text)
    return record if isinstance(record, dict) else None


def _canonical(record: Mapping[str, Any]) -> bytes:
    try:
        return json.dumps(record, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
    except (TypeError, ValueError):
        raise InvalidConfig("only JSON types can be kept there") from None


# -------------------------------------------------------------------------------------------------------- files

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def refused(path: Path, error: OSError) -> StoreError:
    """An error of the system as ours."""
    if error.errno in _FULL:
        return StoreFull(f"{path}: the disk is full; nothing that was kept is lost")
    return StoreError(f"{path}: {error.strerror}")


def _write(handle: int, data: bytes) -> None:
    while data:
        data = data[os.write(handle, data) :]


def sync(folder: Path) -> None:
    """Waits until the disk has the names in a folder."""
    with contextlib.suppress(OSError):  # a folder cannot be synced everywhere
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def replace(path: Path, data: bytes) -> None:
    """Puts a file at `path`, whole or not at all."""
    beside = path.with_name(f"{path.name}.new")
    try:
        handle = os.open(beside, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o600)
        try:
            _write(handle, data)
            os.fsync(handle)
        finally:
            os.close(handle)
        os.replace(beside, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)
        raise refused(path, error) from None
    sync(path.parent)


def overwrite(path: Path) -> None:
    """Deletes a file after writing zeros over it; one that is not there stays away."""
    try:
        handle = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return
    try:
        _write(handle, bytes(os.fstat(handle).st_size))
        os.fsync(handle)
    finally:
        os.close(handle)
    path.unlink()
    sync(path.parent)


@contextlib.contextmanager
def destroying(left: list[str]) -> Iterator[None]:
    """Notes what could not be destroyed, and goes on."""
    try:
        yield
    except (StoreError, InvalidConfig) as error:
        left.append(str(error))
