"""One file from which an operator's folder comes back, made while the server runs.

    backup FILE = line, salt, pieces          line = "penchant-backup/1 sealed\\n" or "penchant-backup/1 plain\\n"
    pieces      = ChaCha20-Poly1305(key, nonce = number of the piece in 11 bytes ‖ 1 at the last, else 0; line ‖ salt)
    key         = scrypt(passphrase, salt; N = 2¹⁷, r = 8, p = 1); plain: SHA-256(line ‖ salt), which anybody knows
    contents    = a tar of the files below, each whole, and backup.json last: size and SHA-256 of each

so that a byte changed, added or cut off anywhere is found. Sealed, it holds the keys; plain, it holds none, and the
pieces show damage and hide nothing. offline/ is in no backup: root and authority keys are kept elsewhere. Left out too:
logs/, run/, and Flower's own state, which holds messages under way and what enrolment registers again.

The order is what makes the copy one of a moment. Statements (channels, manifests, plan, catalogue) are read, then
server.db through SQLite's online backup, then the statements again: had they changed between, all begins anew. Then
what they name by hash, which never changes; and the ledger last. A release is charged before a checkpoint or channel
names it, so a ledger that was read later holds the charge of everything in the copy.

What no copy can know is what was released after it. A restored ledger that lacks those charges would let the same
budget be spent twice: so rounds stay paused after a restore until the operator says otherwise, unless the ledger that
went on is given, and it goes on from the copy's own. Tokens for enrolment do not come back, as one that was used up
since would be good again.

Sources: RFC 7914 (scrypt); RFC 8439; Hoang et al. 2015, https://eprint.iacr.org/2015/189 (STREAM: pieces with a number
and a last one).
"""

from __future__ import annotations

import datetime
import hashlib
import io
import json
import os
import shutil
import sqlite3
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

from penchant.common.artifacts.bundle import Bundle
from penchant.common.artifacts.manifest import Offer, Seen
from penchant.common.cli import version
from penchant.common.errors import Busy, InvalidConfig, MalformedData, PrivacyRefused
from penchant.common.privacy.ledger import Ledger
from penchant.common.privacy.plan import PrivacyPlan
from penchant.server import states
from penchant.server.database import BUSY_S, Database
from penchant.server.folder import Folder, sync
from penchant.server.registry import FLOOR

SCHEMA_VERSION = 1
POINTS = ("begun", "read", "database", "statements", "named", "ledger", "written", "whole")
"""Where a backup calls `at`: tests change the folder there, or stop."""
_SEALED, _PLAIN = b"penchant-backup/1 sealed\n", b"penchant-backup/1 plain\n"
_SALT, _TAG, _PIECE = 16, 16, 64 << 10
_COST = 1 << 17  # N of scrypt: 128 MiB and half a second for each guess
_CONTENTS = "backup.json"
_STATEMENTS = ("server.toml", "plan.json", "task.json", "certificate.json", "catalogue.json", "app.bundle")
_FOLDERS = ("tls", "flower-app", "distribution")
_TOP = {*_STATEMENTS, *_FOLDERS, "keys", "server.db", "ledgers", "states"}
_TRIES = 20


@dataclass(frozen=True, kw_only=True)
class Contents:
    """backup.json.

    Attributes:
        penchant: version that made it.
        app_id, population: whose server.
        keys: whether keys/ is in it.
        done: rounds of the plan in its checkpoint.
        entries, head: of its ledger.
        files: size in bytes and SHA-256 of each, by name.
    """

    penchant: str
    created_ms: int
    app_id: str
    population: str
    keys: bool
    done: int
    entries: int
    head: str
    files: dict[str, tuple[int, str]]
    schema_version: int = SCHEMA_VERSION

    def __str__(self) -> str:
        return f"{len(self.files)} files of {sum(size for size, _ in self.files.values()):,} bytes"

    @property
    def made(self) -> str:
        """When, as a person reads it."""
        at = datetime.datetime.fromtimestamp(self.created_ms / 1000, datetime.UTC)
        return at.isoformat(" ", "seconds").removesuffix("+00:00") + " UTC"


# ------------------------------------------------------------------------------------------------------ backup


def backup(
    folder: Folder,
    out: Path,
    passphrase: str | None,
    *,
    now_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
    at: Callable[[str], None] = lambda point: None,
) -> Contents:
    """Writes a backup, and reads it again before it is there under its name, whole or not at all; its mode is 0600.

    Args:
        passphrase: that seals it; None leaves keys/ out.

    Raises:
        InvalidConfig: there is such a file, no room for it, or a file of the folder is not there.
        MalformedData: server.db is damaged.
        PrivacyRefused: the ledger's chain is broken.
        Busy: the folder changed faster than it could be read.
    """
    if out.exists():
        raise InvalidConfig(f"{out} is there already: name another file")
    with Ledger.open(folder.ledger) as ledger:
        ledger.verify()
    salt = os.urandom(_SALT)
    key = _key(passphrase, salt)
    beside = out.with_name(f".{out.name}.{os.getpid()}.part")
    try:
        with os.fdopen(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            for _ in range(_TRIES):
                file.seek(0)
                file.truncate()
                try:
                    made = _write(folder, file, key, _line(passphrase), salt, now_ms(), at)
                    break
                except _Changed:
                    time.sleep(0.2)
            else:
                raise Busy(f"{folder.path} changes faster than it can be copied: try again, or pause the rounds")
            at("written")
            file.flush()
            os.fsync(file.fileno())
        with _opened(beside, passphrase, key) as archive:
            if _unpacked(archive, None) != made:
                raise InvalidConfig(f"cannot write {out}: what was read back is not what was written; check the disk")
        at("whole")
        beside.replace(out)
        sync(out.parent.resolve())
    except OSError as error:
        raise InvalidConfig(f"{error.filename or out}: {error.strerror}; no backup was made") from None
    finally:
        beside.unlink(missing_ok=True)
    return made


class _Changed(Exception):
    """The folder changed while it was read."""


def _write(
    folder: Folder, file: IO[bytes], key: bytes, line: bytes, salt: bytes, now_ms: int, at: Callable[[str], None]
) -> Contents:
    at("begun")
    found: dict[str, tuple[int, str]] = {}
    keys = line == _SEALED
    file.write(line + salt)
    sealer = _Sealer(file, key, line + salt)
    with tarfile.open(fileobj=sealer, mode="w|") as tar:  # type: ignore[call-overload]  # it only writes

        def add(name: str, data: bytes | Path) -> None:
            try:
                size, digest = _add(tar, name, data)
            except FileNotFoundError:
                raise _Changed from None
            if isinstance(data, Path) and digest != data.stem:
                raise MalformedData(f"{data} is damaged: restore it from a backup")
            found[name] = size, digest

        statements = _statements(folder, keys)
        at("read")
        with closing(_copied(folder.database)) as database:
            at("database")
            if _statements(folder, keys) != statements:
                raise _Changed
            at("statements")
            rows = database.execute("SELECT plan, done, state FROM progress").fetchall()
            for name, data in statements.items():
                add(name, data)
            add("server.db", database.serialize())
        for _, _, state in rows:
            if (name := f"states/{state}.safetensors") not in found:
                add(name, states.path(folder, state))
        for path in _files(folder.distribution / "blobs"):
            add(path.relative_to(folder.path).as_posix(), path)
        at("named")
        with closing(_copied(folder.ledger)) as ledger:
            entries, head = ledger.execute("SELECT entries, head FROM summary").fetchone()
            add(folder.ledger.relative_to(folder.path).as_posix(), ledger.serialize())
        at("ledger")
        made = Contents(
            penchant=version(),
            created_ms=now_ms,
            app_id=folder.settings.app_id,
            population=folder.settings.population,
            keys=keys,
            done=sum(done for plan, done, _ in rows if plan == folder.plan.digest),
            entries=entries,
            head=head,
            files=found,
        )
        _add(tar, _CONTENTS, json.dumps(vars(made), indent=1).encode())
    sealer.end()
    return made


def _statements(folder: Folder, keys: bool) -> dict[str, bytes]:
    """All that may change and is small, by name; and what init made once."""
    found = {}
    paths = [folder.path / name for name in _STATEMENTS]
    for name in (*_FOLDERS, *(["keys"] if keys else [])):
        paths += [path for path in _files(folder.path / name) if path.parent != folder.distribution / "blobs"]
    for path in paths:
        try:
            found[path.relative_to(folder.path).as_posix()] = path.read_bytes()
        except FileNotFoundError:
            if path.parent == folder.path:
                raise InvalidConfig(f"no {path}: penchant doctor says what is missing") from None
            raise _Changed from None
    return found


def _files(folder: Path) -> list[Path]:
    """What is below a folder, but for what is being written."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix != ".part")


def _copied(path: Path) -> sqlite3.Connection:
    """A database as it is at one moment, in memory, so that no copy of it is left anywhere.

    Raises:
        InvalidConfig: none there, or another process holds it.
        MalformedData: damaged.
    """
    if not path.is_file():
        raise InvalidConfig(f"no {path}: penchant doctor says what is missing")
    copy = sqlite3.connect(":memory:")
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=rw", uri=True, timeout=BUSY_S)) as there:
            there.backup(copy)
        if copy.execute("PRAGMA integrity_check").fetchone() != ("ok",):
            raise sqlite3.DatabaseError("its pages do not fit together")
    except sqlite3.OperationalError as error:
        copy.close()
        raise InvalidConfig(f"{path}: {error}; no backup was made") from None
    except sqlite3.DatabaseError as error:
        copy.close()
        raise MalformedData(f"{path} is damaged ({error}): restore it from a backup") from None
    return copy


def _add(tar: tarfile.TarFile, name: str, data: bytes | Path) -> tuple[int, str]:
    """Size and SHA-256 of what was added."""
    with io.BytesIO(data) if isinstance(data, bytes) else data.open("rb") as file:
        about = tarfile.TarInfo(name)
        about.size, about.mode = file.seek(0, io.SEEK_END), 0o600
        file.seek(0)
        hashed = _Hashed(file)
        tar.addfile(about, hashed)
    return about.size, hashed.digest.hexdigest()


class _Hashed:
    """A file that knows the SHA-256 of what was read of it."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self.digest = file, hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size)
        self.digest.update(data)
        return data


# ------------------------------------------------------------------------------------------------------ sealing


def _line(passphrase: str | None) -> bytes:
    return _PLAIN if passphrase is None else _SEALED


def _key(passphrase: str | None, salt: bytes) -> bytes:
    if passphrase is None:
        return hashlib.sha256(_PLAIN + salt).digest()
    return Scrypt(salt=salt, length=32, n=_COST, r=8, p=1).derive(passphrase.encode("utf-8", "surrogateescape"))


def _nonce(number: int, last: bool) -> bytes:
    return number.to_bytes(11, "big") + bytes([last])


class _Sealer:
    """Writes pieces; `end` writes the last."""

    def __init__(self, file: IO[bytes], key: bytes, about: bytes) -> None:
        self._file, self._aead, self._about = file, ChaCha20Poly1305(key), about
        self._waiting, self._number = bytearray(), 0

    def write(self, data: bytes) -> int:
        self._waiting += data
        while len(self._waiting) > _PIECE:
            self._seal(False)
        return len(data)

    def end(self) -> None:
        self._seal(True)

    def _seal(self, last: bool) -> None:
        piece = bytes(self._waiting[:_PIECE])
        del self._waiting[:_PIECE]
        self._file.write(self._aead.encrypt(_nonce(self._number, last), piece, self._about))
        self._number += 1


class _Opener:
    """Reads pieces; what follows the tar must be the end."""

    def __init__(self, file: IO[bytes], key: bytes, about: bytes, wrong: str) -> None:
        self._file, self._aead, self._about, self._wrong = file, ChaCha20Poly1305(key), about, wrong
        self._waiting, self._number = bytearray(), 0
        self._next = file.read(_PIECE + _TAG)
        self._ended = False

    def read(self, size: int) -> bytes:
        while len(self._waiting) < size and not self._ended:
            piece, self._next = self._next, self._file.read(_PIECE + _TAG)
            self._ended = not self._next
            try:
                self._waiting += self._aead.decrypt(_nonce(self._number, self._ended), piece, self._about)
            except InvalidTag:
                raise MalformedData(self._wrong) from None
            self._number += 1
        data = bytes(self._waiting[:size])
        del self._waiting[:size]
        return data


def is_sealed(file: Path) -> bool:
    """Whether a passphrase opens it, and keys are in it.

    Raises:
        InvalidConfig: no such file.
        MalformedData: no backup of this version.
    """
    with _readable(file) as archive:
        return _header(file, archive)[0] == _SEALED


def _header(file: Path, archive: IO[bytes]) -> tuple[bytes, bytes]:
    line, salt = archive.readline(64), archive.read(_SALT)
    if line not in (_SEALED, _PLAIN) or len(salt) < _SALT:
        raise MalformedData(f"{file} is no backup that this penchant reads, or its beginning is damaged")
    return line, salt


@contextmanager
def _readable(file: Path) -> Iterator[IO[bytes]]:
    try:
        with file.open("rb") as archive:
            yield archive
    except OSError as error:
        raise InvalidConfig(f"{error.filename or file}: {error.strerror}") from None


@contextmanager
def _opened(file: Path, passphrase: str | None, key: bytes | None = None) -> Iterator[_Opener]:
    with _readable(file) as archive:
        line, salt = _header(file, archive)
        if line == _SEALED and passphrase is None:
            raise InvalidConfig(f"{file} is sealed: give its passphrase")
        damaged = f"{file} is damaged or was cut off: take another backup"
        wrong = damaged if line == _PLAIN else f"the passphrase is another one, or {damaged}"
        found = key or _key(passphrase if line == _SEALED else None, salt)
        yield _Opener(archive, found, line + salt, wrong)


def _unpacked(archive: _Opener, to: Path | None, *, keys: bool = True) -> Contents:
    """Reads a backup to its end, into a folder or only to check it.

    Args:
        keys: whether to write keys/ too.

    Raises:
        MalformedData: damaged, or other files than its list says.
        OSError: no room.
    """
    found: dict[str, tuple[int, str]] = {}
    listed = b""
    try:
        with tarfile.open(fileobj=archive, mode="r|") as tar:  # type: ignore[call-overload]  # it only reads
            for about in tar:
                name, data = about.name, tar.extractfile(about) if about.isreg() else None
                if data is None or name in found or listed:
                    raise MalformedData("the backup holds what no backup holds: take another")
                if name == _CONTENTS:
                    listed = data.read()
                    continue
                where = None if to is None or (name.startswith("keys/") and not keys) else to / _named(name)
                found[name] = _kept(data, where)
        while archive.read(_PIECE):
            pass
        record: dict[str, Any] = json.loads(listed)
        files = {name: (int(size), str(digest)) for name, (size, digest) in record.pop("files").items()}
        contents = Contents(files=files, **record)
    except (tarfile.TarError, ValueError, KeyError, TypeError, AttributeError, EOFError):
        raise MalformedData("the backup is damaged, or of a later version: take another, or update penchant") from None
    if contents.schema_version != SCHEMA_VERSION:
        raise MalformedData(f"the backup is of version {contents.schema_version!r}; update penchant")
    if found != contents.files:
        raise MalformedData("the backup's files are not those of its own list: take another")
    return contents


def _named(name: str) -> PurePosixPath:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name or (path.parts or ("",))[0] not in _TOP:
        raise MalformedData("the backup holds what no backup holds: take another")
    return path


def _kept(data: IO[bytes], where: Path | None) -> tuple[int, str]:
    size, digest = 0, hashlib.sha256()
    if where is None:
        while piece := data.read(_PIECE):
            size += len(piece)
            digest.update(piece)
        return size, digest.hexdigest()
    where.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with os.fdopen(os.open(where, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        while piece := data.read(_PIECE):
            size += len(piece)
            digest.update(piece)
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())
    return size, digest.hexdigest()


# ------------------------------------------------------------------------------------------------------ restore


def verify(file: Path, passphrase: str | None) -> list[str]:
    """Checks all of a backup; what was found, in lines. Keys are never written anywhere.

    Raises:
        MalformedData, MalformedArtifact, UntrustedArtifact, PrivacyRefused: what is wrong with it.
        InvalidConfig: no such file, a passphrase that is missing, or no room to unpack it.
    """
    try:
        with tempfile.TemporaryDirectory(prefix="penchant-") as made, _opened(file, passphrase) as archive:
            contents = _unpacked(archive, Path(made), keys=False)
            return _checked(Path(made), contents)
    except OSError as error:
        raise InvalidConfig(f"cannot unpack {file}: {error.strerror}; free some room") from None


def restore(
    file: Path,
    to: Path,
    passphrase: str | None,
    *,
    ledger: Path | None = None,
    now_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
) -> list[str]:
    """Makes the folder of a backup, checked as `verify` does before it is there under its name; lines to tell.

    Rounds are paused in it, with a reason that only `penchant round start --after-restore` takes away, unless the
    ledger that went on is given.

    Args:
        to: a folder that is not there, or is empty.
        ledger: that the server had last, where it outlived the rest. It must hold every entry of the backup's.

    Raises:
        InvalidConfig: `to` holds something, or no room.
        PrivacyRefused: `ledger` does not go on from the backup's.
        MalformedData, MalformedArtifact, UntrustedArtifact: as `verify`.
    """
    to = to.absolute()
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise InvalidConfig(f"{to} is there already: restore to a folder that is new or empty")
    beside = to.with_name(f".{to.name}.{os.getpid()}.part")
    try:
        beside.mkdir(mode=0o700, parents=True)
        with _opened(file, passphrase) as archive:
            contents = _unpacked(archive, beside)
        for name in ("states", "distribution", "ledgers", "flower"):
            (beside / name).mkdir(mode=0o700, exist_ok=True)
        if ledger is not None:
            _go_on_with(ledger, beside)
        lines = _checked(beside, contents)
        _settle(beside, contents, ledger is None, now_ms)
        lines.append("tokens for enrolment are void: mint new ones, and revoke again what was revoked since")
        if ledger is None:
            lines.append(
                f"rounds are paused: what was released after {contents.made} is not charged in this ledger. If the "
                "server went on after that, restore again with its own: --ledger PATH. If not: penchant round start "
                "--after-restore"
            )
        if not contents.keys:
            lines.append("keys/ is not in it: put it back from where it is kept; penchant doctor says what is missing")
        sync(beside)
        beside.replace(to)
        sync(to.parent)
    except OSError as error:
        raise InvalidConfig(f"cannot restore to {to}: {error.strerror}; nothing was restored") from None
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return lines


def _go_on_with(newer: Path, beside: Path) -> None:
    """Puts a ledger in the place of the backup's; `_checked` says whether it goes on from that."""
    if not newer.is_file():
        raise InvalidConfig(f"no ledger {newer}")
    path = Folder(beside).ledger
    path.unlink()
    with closing(_copied(newer)) as copy:
        _kept(io.BytesIO(copy.serialize()), path)


def _settle(beside: Path, contents: Contents, hold: bool, now_ms: Callable[[], int]) -> None:
    """What must not go on as if nothing had been since: a token that was used up then would be good again."""
    with Database(beside / "server.db", now_ms=now_ms) as database:
        with database.transaction() as db:
            db.execute("DELETE FROM tokens")
        database.set_switch(FLOOR, str(now_ms() // 1000))  # above all that a day's moves make: devices saw later ones
        if hold:
            database.set_switch("rounds", "paused")
            why = f"restored from a backup of {contents.made}: what was released since is not charged in its ledger"
            database.set_switch("hold", why)


def _checked(path: Path, contents: Contents) -> list[str]:
    """What holds in an unpacked folder, in lines.

    Raises:
        MalformedData, MalformedArtifact, UntrustedArtifact, PrivacyRefused: what does not.
    """
    folder = Folder(path)
    lines = [f"{contents}, each as it was on {contents.made}; made by penchant {contents.penchant}"]
    with closing(_copied(folder.database)):
        pass
    with Database(folder.database) as database:
        progress = database.rows("SELECT plan, done, state FROM progress")
    for row in progress:
        states.load(folder, row["state"])
    lines.append(f"server.db is whole; its checkpoint is after round {contents.done}, with its state")
    bundle = Bundle.read(folder.bundle)
    if (bundle.app.app_id, bundle.app.population) != (folder.settings.app_id, folder.settings.population):
        raise MalformedData("app.bundle is of another app or population than server.toml: take another backup")
    promised = _offered(folder, bundle)
    lines.append(f"{len(promised)} channels, signed under the app's root key, and the bytes that they name")
    with Ledger.open(folder.ledger) as ledger:
        n = ledger.verify(contents.head)  # an entry's hash covers all before it, the header included
        done = {row["plan"]: row["done"] for row in progress}
        _covers(ledger, folder.plan, done.get(folder.plan.digest, 0), max(promised.values(), default=0.0))
        lines.append(f"the ledger's chain of {n} entries is whole, head {ledger.head}, and holds all that was released")
    return lines


def _offered(folder: Folder, bundle: Bundle) -> dict[str, float]:
    """ε that each channel's manifest promises, by channel; 0 where it names none."""
    found = {}
    for path in _files(folder.distribution / "channels"):
        offer = Offer.from_bytes(path.read_bytes())
        manifest, _ = offer.check(
            bundle.app.root,
            app_id=bundle.app.app_id,
            population=bundle.app.population,
            channel=path.stem,
            now_ms=offer.made_ms,
            seen=Seen(),
        )
        for blob in (manifest.model, manifest.catalogue):
            where = folder.distribution / "blobs" / blob.sha256
            if not where.is_file():
                raise MalformedData(f"channel {path.stem} names bytes that are not in the backup: take another")
            blob.check(where.read_bytes())
        promise = manifest.guarantee or {}
        ours = promise.get("unit") == "user"
        found[path.stem] = float(promise["epsilon"]) if ours else 0.0
    return found


def _covers(ledger: Ledger, plan: PrivacyPlan, done: int, promised: float) -> None:
    """
    Raises:
        PrivacyRefused: a round of the checkpoint was not charged, or a channel's model cost more than the ledger holds.
    """
    released = {(entry.plan, entry.round) for entry in ledger.entries if entry.kind == "release"}
    charged = [number for number in range(1, done + 1) if plan.event(number) is not None]
    if any((plan.digest, number) not in released for number in charged):
        raise PrivacyRefused("this ledger lacks charges of rounds that were released: take the one that they had")
    if promised > (ledger.spent().epsilon if promised else 0.0) * (1 + 1e-9):
        raise PrivacyRefused("a channel's model cost more than this ledger holds: take the one that it was charged to")
