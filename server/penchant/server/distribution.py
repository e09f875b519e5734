"""Gives devices what was released: from a folder of signed statements and content-addressed bytes, over gRPC.

    channels/CHANNEL.json      an offer: certificate, pointer and manifest     written last, in place of the one before
    blobs/SHA256               a model or a catalogue                          never changes
    manifests/SHA256.json      every manifest, for the operator (registry.py)  never changes
    certificates/SERIAL.json   every certificate of a key that signed one      likewise

The same folder behind any web server is a distribution too (docs/wire.md). Nothing here is trusted by devices, which
check signatures and hashes themselves; so this process holds no key but that of its TLS certificate.

Each call has a thread of its own and one message under way: whoever reads slowly is written to slowly, and what waits
is one chunk. One call too many is refused at once (RESOURCE_EXHAUSTED), and a connection is closed after its time, so
that somebody who never reads holds a place for that long and no longer.
"""

from __future__ import annotations

import logging
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, Self, TypeVar

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from penchant.common.artifacts.bundle import WIRE_VERSIONS, write_whole
from penchant.common.artifacts.distribution_pb2 import Chunk, GetBlobRequest, GetManifestRequest, GetManifestResponse
from penchant.common.artifacts.manifest import Blob, Offer, Seen
from penchant.common.artifacts.signing import Envelope, PublicKey, from_json, text
from penchant.common.errors import InvalidConfig, MalformedArtifact, NotServed, PenchantError
from penchant.common.statuses import status_of
from penchant.server.folder import sync

log = logging.getLogger("penchant.server")
SERVICE = "penchant.v1.Distribution"
CHUNK = 256 << 10
"""Bytes of a blob in one message."""
MAX_REQUEST = 64 << 10
_CHANNEL = re.compile("[a-z0-9][a-z0-9-]{0,63}")
_Answer = TypeVar("_Answer")


# ------------------------------------------------------------------------------------------------------ folder


def publish(folder: Path, offer: Offer, blobs: Iterable[bytes], *, root: PublicKey, now_ms: int) -> None:
    """Puts a release into a folder, checked as a device would: the bytes first, the channel's offer last.

    Its manifest and certificate are kept beside, so that the channel can come back to them.

    A device that asks meanwhile gets the offer before or this one, and finds the bytes of either. Doing it again does
    no harm. It is one process's to do at a time.

    Args:
        blobs: the model and the catalogue that the offer's manifest names; what is in the folder may be left out.

    Raises:
        UntrustedArtifact: the offer is one that devices would refuse, also beside the one that is there now.
        MalformedArtifact: likewise.
        InvalidConfig: a blob that the manifest does not name, or one that is nowhere.
        OSError: no place for it; the channel stays as it was.
    """
    told = from_json(offer.pointer.payload)
    who = {name: text(told, name) for name in ("app_id", "population", "channel")}
    place = channel_file(folder, who["channel"])
    seen = Seen()
    if place.exists():
        before = Offer.from_bytes(place.read_bytes())
        _, seen = before.check(root, **who, now_ms=before.made_ms, seen=seen)
    manifest, seen = offer.check(root, **who, now_ms=now_ms, seen=seen)
    wanted, given = {manifest.model, manifest.catalogue}, {Blob.of(data): data for data in blobs}
    if given.keys() - wanted:
        raise InvalidConfig("a blob that the offer's manifest does not name")
    keep_blobs(folder, given.values())
    for blob in wanted - given.keys():
        path = folder / "blobs" / blob.sha256
        if not path.is_file() or path.stat().st_size != blob.size:
            raise InvalidConfig(f"the bytes of {blob.sha256[:16]} are neither given nor in the folder")
    keep_statements(folder, offer.manifest, offer.certificate, seen.serial)
    _write(place, offer.to_bytes())


def keep_blobs(folder: Path, blobs: Iterable[bytes]) -> None:
    """Writes bytes under their hashes; they are on the disk, names and all, when this returns."""
    (folder / "blobs").mkdir(parents=True, exist_ok=True)
    for data in blobs:
        write_whole(folder / "blobs" / Blob.of(data).sha256, data)
    sync(folder / "blobs")


def keep_statements(folder: Path, manifest: Envelope, certificate: Envelope, serial: int) -> None:
    """Keeps a manifest as it was signed first, and before it the certificate of the key that signs now."""
    place = folder / "certificates" / f"{serial}.json"
    if not place.exists() or place.read_bytes() != certificate.to_bytes():
        _write(place, certificate.to_bytes())
    if not any((folder / part / f"{manifest.sha256}.json").exists() for part in MANIFESTS):
        _write(folder / MANIFESTS[0] / f"{manifest.sha256}.json", manifest.to_bytes())


MANIFESTS = ("manifests", "manifests/collected")
"""Where manifests are: those whose bytes are here, and those whose bytes were collected (registry.py)."""


def _write(place: Path, data: bytes) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    write_whole(place, data)
    sync(place.parent)


def channel_file(folder: Path, name: str) -> Path:
    """Where a channel's offer is, or would be.

    Raises:
        InvalidConfig: not the name of a channel.
    """
    if not _CHANNEL.fullmatch(name):
        raise InvalidConfig("a channel's name is 1 to 64 of a-z, 0-9 and -, such as stable")
    return folder / "channels" / f"{name}.json"


# ----------------------------------------------------------------------------------------------------- service


class Distribution:
    """A gRPC server with this service, and with others beside it. `start` and `stop` it, or use it as a context.

    It tells of each whether it is healthy (grpc.health.v1) and what its messages are (gRPC server reflection).

    Args:
        folders: by app and population.
        services: the others: each one's full name, and what handles its methods.
        address: "host:port" to listen on; port 0 takes a free one.
        private_key, chain: of the server's TLS certificate, in PEM.
        at_once: calls that are served at the same time.
        connection_s: after so long a connection is closed once its calls are done, or a twentieth of it later.

    Attributes:
        port: that it listens on.

    Raises:
        InvalidConfig: a key, certificate or address that cannot be used.
    """

    def __init__(
        self,
        folders: Mapping[tuple[str, str], Path],
        *,
        address: str,
        private_key: bytes,
        chain: bytes,
        services: Iterable[tuple[str, grpc.GenericRpcHandler[Any, Any]]] = (),
        at_once: int = 256,
        connection_s: float = 600.0,
    ) -> None:
        self._folders = dict(folders)
        self._server = grpc.server(
            ThreadPoolExecutor(at_once, "distribution"),
            maximum_concurrent_rpcs=at_once,
            options=[
                ("grpc.max_receive_message_length", MAX_REQUEST),
                ("grpc.max_concurrent_streams", 32),  # of one connection
                ("grpc.max_connection_age_ms", int(connection_s * 1000)),
                ("grpc.max_connection_age_grace_ms", int(connection_s * 50)),
                ("grpc.so_reuseport", 0),
            ],
        )
        blobs = grpc.unary_stream_rpc_method_handler(self._blob, GetBlobRequest.FromString, Chunk.SerializeToString)
        handlers = {
            "GetManifest": grpc.unary_unary_rpc_method_handler(
                self._manifest, GetManifestRequest.FromString, GetManifestResponse.SerializeToString
            ),
            "GetModel": blobs,
            "GetCatalogue": blobs,  # a hash names one thing
        }
        served = {SERVICE: grpc.method_handlers_generic_handler(SERVICE, handlers), **dict(services)}
        self._server.add_generic_rpc_handlers(tuple(served.values()))
        self._names = ("", *served)
        self._health = health.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection((*served, health.SERVICE_NAME, reflection.SERVICE_NAME), self._server)
        try:
            tls = grpc.ssl_server_credentials([(private_key, chain)])
            self.port = self._server.add_secure_port(address, tls)
        except (RuntimeError, ValueError):
            raise InvalidConfig(f"can't listen on {address}: it is taken, or the TLS key and chain are none") from None

    def start(self) -> None:
        self._server.start()
        for service in self._names:
            self._health.set(service, health_pb2.HealthCheckResponse.SERVING)

    def stop(self, grace_s: float = 5.0) -> None:
        """Takes no more calls, and ends those under way after the grace."""
        self._health.enter_graceful_shutdown()
        self._server.stop(grace_s).wait()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop(0.0)

    def _manifest(self, request: GetManifestRequest, context: grpc.ServicerContext) -> GetManifestResponse:
        def answer() -> GetManifestResponse:
            if not WIRE_VERSIONS[0] <= request.wire_version <= WIRE_VERSIONS[1]:
                raise MalformedArtifact(f"wire versions {WIRE_VERSIONS[0]} to {WIRE_VERSIONS[1]} are spoken here")
            place = channel_file(self._folder(request), request.channel)
            try:
                data = place.read_bytes()
            except FileNotFoundError:
                raise NotServed("no such channel") from None
            try:
                offer = Offer.from_bytes(data)
            except MalformedArtifact:  # the operator's to mend, and no fault of who asks
                raise RuntimeError(f"{place} is no offer; publish it again") from None
            parts = {name: getattr(offer, name).to_bytes() for name in ("certificate", "pointer", "manifest")}
            return GetManifestResponse(**parts)

        return told(SERVICE, answer, context)

    def _blob(self, request: GetBlobRequest, context: grpc.ServicerContext) -> Iterator[Chunk]:
        def opened() -> tuple[BinaryIO, int]:
            try:
                blob = Blob(request.sha256, 0)
            except MalformedArtifact:
                raise InvalidConfig("a blob is named by 64 hex digits") from None
            try:
                file = (self._folder(request) / "blobs" / blob.sha256).open("rb")
            except (FileNotFoundError, IsADirectoryError):
                raise NotServed("no such blob") from None
            size = os.fstat(file.fileno()).st_size
            if request.offset > size:
                file.close()
                raise InvalidConfig(f"offset {request.offset} is beyond the blob's {size} bytes")
            return file, size

        file, size = told(SERVICE, opened, context)
        with file:
            file.seek(request.offset)
            packer, started = zlib.compressobj() if "deflate" in request.accept else None, False
            while (data := told(SERVICE, lambda: file.read(CHUNK), context)) or not started:
                if packer:  # flushed, so that a break loses no more than one chunk
                    data = packer.compress(data) + packer.flush(zlib.Z_SYNC_FLUSH)
                about: dict[str, Any] = {} if started else {"size": size, "encoding": "deflate" if packer else ""}
                yield Chunk(data=data, **about)
                started = True
            if packer:
                yield Chunk(data=packer.flush())

    def _folder(self, request: GetManifestRequest | GetBlobRequest) -> Path:
        if (found := self._folders.get((request.app_id, request.population))) is None:
            raise NotServed("no such app or population")
        return found


def told(service: str, answer: Callable[[], _Answer], context: grpc.ServicerContext) -> _Answer:
    """The answer, or in its place the status of the error; what is the operator's to mend is for the log alone."""
    try:
        return answer()
    except PenchantError as error:
        return context.abort(grpc.StatusCode[status_of(error)], str(error))
    except Exception as error:
        log.error("%s: %s: %s", service, type(error).__name__, error)
        return context.abort(grpc.StatusCode.INTERNAL, "")
