"""What an app ships with, so that it recommends before it ever met a server.

One zip file without compression:

    app.json            signed by the root key: who, where, and which root key
    offer.json          the first release's certificate, pointer and manifest
    catalogue.json      the catalogue's record
    model.safetensors   the first release

The root key in it is what everything later is checked against, so the bundle is as trustworthy as the way it came: ship
it inside the app, which its store or package manager signs.
"""

from __future__ import annotations

import hashlib
import hmac
import io
import json
import os
import struct
import threading
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load, save

from penchant.common.artifacts.manifest import MAX_BLOB, Blob, Manifest, Offer, Seen
from penchant.common.artifacts.release import Release
from penchant.common.artifacts.signing import (
    SCHEMA_VERSION,
    Envelope,
    PublicKey,
    SigningKey,
    checked,
    from_json,
    hex32,
    text,
    to_json,
)
from penchant.common.catalogue import Catalogue
from penchant.common.compact import Shared, Strings
from penchant.common.errors import InvalidConfig, MalformedArtifact, MalformedData

APP = "application/vnd.penchant.app+json"
WIRE_VERSIONS = (1, 1)
"""The oldest and the newest wire version that this penchant speaks."""
_FILES = ("app.json", "offer.json", "catalogue.json", "model.safetensors")


@dataclass(frozen=True, kw_only=True)
class App:
    """Who an app's devices talk to, and whom they believe.

    Attributes:
        app_id: names the app; every statement for its devices carries it.
        population: people whose contributions are summed together; its plan counts them.
        channel: that devices follow, "stable" unless they are a canary's.
        distribution: where new releases come from: "host:port" of the gRPC service, or a folder's https: or file: URL;
            "" where there is none.
        fleet: "host:port" of the Flower server that rounds run on; "" where devices take part in none.
        enrolment: "host:port" where a device enrols; "" for none.
        ca: certificates in PEM, that the servers' TLS certificates must chain to; "" trusts the system's.
        root: the key that everything later is checked against.
        publisher: "publisher/name" of the Flower apps whose rounds devices serve.
        wire: the oldest and the newest wire version that the servers speak.
    """

    app_id: str
    population: str
    root: PublicKey
    channel: str = "stable"
    distribution: str = ""
    fleet: str = ""
    enrolment: str = ""
    ca: str = ""
    publisher: str = ""
    wire: tuple[int, int] = WIRE_VERSIONS

    def __post_init__(self) -> None:
        if not (self.app_id and self.population and self.channel):
            raise InvalidConfig("an app needs an app_id, a population and a channel")
        if not 1 <= self.wire[0] <= self.wire[1]:
            raise InvalidConfig(f"wire versions go from the oldest to the newest, not {self.wire}")

    def signed(self, root: SigningKey) -> Envelope:
        if root.public != self.root:
            raise InvalidConfig("an app is signed by its own root key")
        record = {**self.__dict__, "root": self.root.raw.hex(), "wire": list(self.wire)}
        return root.sign(APP, to_json({"schema_version": SCHEMA_VERSION, **record}))

    @classmethod
    def read(cls, envelope: Envelope) -> App:
        """
        Raises:
            MalformedArtifact: not an app that this version can read, or whose servers speak another wire version.
            UntrustedArtifact: not signed by the root key that it names.
        """
        root = PublicKey(hex32(from_json(envelope.payload), "root"))
        record = checked(envelope.opened(root, APP), SCHEMA_VERSION)
        try:
            oldest, newest = record["wire"]
            if type(oldest) is not int or type(newest) is not int:
                raise TypeError
            app = cls(root=root, wire=(oldest, newest), **{name: text(record, name) for name in _WORDS})
        except (ValueError, KeyError, TypeError, InvalidConfig):
            raise MalformedArtifact("app.json is not an app's statement; ask for the bundle again") from None
        if oldest > WIRE_VERSIONS[1] or newest < WIRE_VERSIONS[0]:
            raise MalformedArtifact(f"its servers speak wire versions {oldest} to {newest}; update penchant")
        return app


_WORDS = ("app_id", "population", "channel", "distribution", "fleet", "enrolment", "ca", "publisher")


@dataclass(frozen=True)
class Bundle:
    """A bundle that was checked, and what is in it.

    Attributes:
        offer: the first release's statements, as they were signed.
        model: its bytes.
    """

    app: App
    offer: Offer
    manifest: Manifest
    seen: Seen
    catalogue: Catalogue
    release: Release
    model: bytes = field(repr=False)

    @staticmethod
    def write(path: Path, app: App, root: SigningKey, offer: Offer, *, catalogue: Catalogue, model: bytes) -> None:
        """Writes a bundle, and reads it as a device would before it is there under its name.

        Args:
            root: signs `app`, and has certified the offer's release key.
            model: the bytes that the offer's manifest names.

        Raises:
            PenchantError: any that reading it back gives.
            OSError: no place to write it; what was there stays.
        """
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w") as archive:
            for name, data in zip(
                _FILES, (app.signed(root).to_bytes(), offer.to_bytes(), catalogue_bytes(catalogue), model), strict=True
            ):
                archive.writestr(zipfile.ZipInfo(name), data)  # ZipInfo: no time of day, the same bytes each time
        Bundle.from_bytes(out.getvalue())
        write_whole(path, out.getvalue())

    @classmethod
    def read(cls, path: Path) -> Self:
        """
        Raises:
            MalformedArtifact: no such file, or not a bundle.
            UntrustedArtifact: a signature or hash in it is wrong.
        """
        try:
            return cls.from_bytes(path.read_bytes())
        except OSError as error:
            raise MalformedArtifact(f"{path}: {error.strerror}; give the app's .bundle file") from None

    @staticmethod
    def app_of(path: Path) -> App:
        """Only whose bundle it is, without a look at its release.

        Raises:
            MalformedArtifact, UntrustedArtifact: as `read`.
        """
        try:
            with path.open("rb") as file:  # a small part of it
                return App.read(Envelope.from_bytes(_unzipped(file, _FILES[:1])[_FILES[0]]))
        except OSError as error:
            raise MalformedArtifact(f"{path}: {error.strerror}; give the app's .bundle file") from None

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """As `read`. An expiry that has passed is none here: what the app shipped with is better than nothing."""
        files = _unzipped(io.BytesIO(data))
        app = App.read(Envelope.from_bytes(files["app.json"]))
        offer = Offer.from_bytes(files["offer.json"])
        manifest, seen = offer.check(
            app.root,
            app_id=app.app_id,
            population=app.population,
            channel=app.channel,
            now_ms=offer.made_ms,
            seen=Seen(),
        )
        catalogue = read_catalogue(manifest, files["catalogue.json"])
        model = manifest.model.check(files["model.safetensors"])
        return cls(app, offer, manifest, seen, catalogue, Release.from_bytes(model, len(catalogue)), model)


def catalogue_bytes(catalogue: Catalogue) -> bytes:
    """The catalogue's record as JSON: what a manifest names by hash."""
    return to_json(catalogue.to_record())


def read_catalogue(manifest: Manifest, data: bytes) -> Catalogue:
    """The catalogue of a release.

    Raises:
        MalformedArtifact: other bytes than the manifest names, or no catalogue.
    """
    record = from_json(manifest.catalogue.check(data))
    text(record, "name")
    try:
        catalogue = Catalogue.from_record(record)
        version = catalogue.version
    except (ValueError, TypeError, AttributeError, OverflowError, MalformedData, InvalidConfig):
        raise MalformedArtifact("the release's catalogue cannot be read; ask the operator") from None
    if version != manifest.catalogue_version:
        raise MalformedArtifact("the release's catalogue is not of the version that its manifest says")
    return catalogue


def compact_bytes(catalogue: Catalogue, of: Blob, key: bytes) -> bytes:
    """A catalogue in the form that a device reads quickest, made once of a release's JSON and kept beside it.

    Args:
        catalogue: what `read_catalogue` gave.
        of: the JSON.
        key: of this device alone; the first 32 bytes are an HMAC-SHA256 under it of the rest, the JSON's hash and both
            versions.
    """
    topics, numbers = Shared.of(catalogue.topics), catalogue.numbers
    words = {name: Shared.of(column) for name, column in catalogue.categories.items()}
    texts = {"ids": catalogue.ids, "titles": catalogue.titles} | {f"texts/{k}": v for k, v in catalogue.texts.items()}
    record = {
        "name": catalogue.name,
        "retired": sorted(catalogue.retired),
        "sensitive": sorted(catalogue.sensitive),
        "topics": topics.values,
        "categories": {name: column.values for name, column in words.items()},
    }
    arrays: dict[str, npt.NDArray[Any]] = {
        "record": np.frombuffer(to_json(record), np.uint8),
        "keys": Strings.of(catalogue.ids).keys,
        "topics": topics.codes,
        **{name: np.frombuffer(Strings.of(column).text, np.uint8) for name, column in texts.items()},
        **{f"categories/{name}": column.codes for name, column in words.items()},
        **{f"numbers/{name}": np.array(column, np.float64) for name, column in numbers.items()},
        **{f"vectors/{name}": rows for name, rows in catalogue.vectors.items()},
    }
    data = save(arrays)
    return _tag(key, of, catalogue.version, data) + data


def read_compact(manifest: Manifest, data: bytes, key: bytes) -> Catalogue | None:
    """What `compact_bytes` was given, of this manifest's catalogue and under this key; None for any other bytes.

    Nobody signs them: that they were made here, of bytes that were signed, is what the key shows, before anything else
    of them is read.
    """
    tag = _tag(key, manifest.catalogue, manifest.catalogue_version, memoryview(data)[32:])
    if not hmac.compare_digest(tag, data[:32]):
        return None
    try:
        return _uncompact(load(data[32:]), manifest.catalogue_version)
    except Exception:  # what it is made of is at hand, so that it is never worth an error
        return None


def _tag(key: bytes, of: Blob, version: str, data: bytes | memoryview) -> bytes:
    code = hmac.new(key, digestmod=hashlib.sha256)
    code.update(to_json({"schema_version": _COMPACT, "of": of.sha256, "version": version}) + b"\0")  # no JSON has a 0
    code.update(data)
    return code.digest()


def _uncompact(arrays: Mapping[str, npt.NDArray[Any]], version: str) -> Catalogue:
    record = json.loads(arrays["record"].tobytes())

    def columns(kind: str) -> dict[str, npt.NDArray[Any]]:
        return {name.removeprefix(kind): values for name, values in arrays.items() if name.startswith(kind)}

    catalogue = Catalogue(
        name=record["name"],
        ids=Strings(arrays["ids"].tobytes(), arrays["keys"]),
        titles=Strings(arrays["titles"].tobytes()),
        topics=Shared(map(tuple, record["topics"]), arrays["topics"]),
        retired=frozenset(record["retired"]),
        sensitive=frozenset(record["sensitive"]),
        categories={k: Shared(record["categories"][k], codes) for k, codes in columns("categories/").items()},
        numbers={k: tuple(values.tolist()) for k, values in columns("numbers/").items()},
        texts={k: Strings(text.tobytes()) for k, text in columns("texts/").items()},
        vectors=columns("vectors/"),
    )
    catalogue.__dict__["version"] = version  # worked out of these columns before they were written
    return catalogue


_COMPACT = 1


def write_whole(path: Path, data: bytes) -> None:
    """Writes a file that is there whole or not at all, also when the machine stops.

    Raises:
        OSError: no place for it; what was there stays.
    """
    beside = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident()}.part")  # two may write the same
    try:
        with beside.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def _unzipped(file: BinaryIO, wanted: Sequence[str] = _FILES) -> Mapping[str, bytes]:
    try:
        with zipfile.ZipFile(file) as archive:
            found = {info.filename: info for info in archive.infolist()}
            if len(found) < len(archive.infolist()):
                raise MalformedArtifact("a bundle with two files of one name; ask for it again")
            if missing := [name for name in wanted if name not in found]:
                raise MalformedArtifact(f"a bundle without {missing[0]}; ask for it again")
            if any(found[name].file_size > MAX_BLOB or found[name].compress_type for name in wanted):
                raise MalformedArtifact("a bundle with a compressed or far too large file; ask for it again")
            return {name: archive.read(found[name]) for name in wanted}
    except (  # all that zipfile raises for bytes that are no archive, or of a kind that it does not read
        zipfile.BadZipFile,
        struct.error,
        ValueError,
        OSError,
        NotImplementedError,
        RuntimeError,
        EOFError,
    ):
        raise MalformedArtifact("not a bundle, or one cut short; ask for it again") from None
