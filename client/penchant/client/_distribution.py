"""Gets what a channel has now, and its bytes, from where the app's bundle says.

    "host:port"            the gRPC service, over TLS
    https://… , file://…   a folder of the same content (docs/wire.md)

TLS trusts the bundle's authority and nothing else, and is not trusted in turn: an offer is the caller's to check, and
bytes are given only once they are those of the hash. A download goes on where it broke off: what came stays in a part
file. Nothing takes longer than its deadline, and nothing that a server sends becomes more than the manifest signed.
"""

from __future__ import annotations

import queue
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, Literal, TypeVar
from urllib.parse import quote, urlsplit

from penchant.client._grpc import channel, left_s, told
from penchant.common.artifacts.bundle import WIRE_VERSIONS, App
from penchant.common.artifacts.manifest import MAX_OFFER, Blob, Offer
from penchant.common.artifacts.signing import Envelope
from penchant.common.errors import InvalidConfig, MalformedArtifact, NotServed, PenchantError, Unreachable
from penchant.common.statuses import error_of

Kind = Literal["model", "catalogue"]
_METHODS = {"model": "GetModel", "catalogue": "GetCatalogue"}
_SERVICE = "penchant.v1.Distribution"
_PIECE = 256 << 10
_NO_ANSWER = "no answer in time from where releases come from; try again later"
_Item = TypeVar("_Item")


def fetch_offer(app: App, *, deadline_s: float, have: str = "") -> Offer:
    """What the app's channel has now, not checked yet.

    Args:
        have: hash of the manifest that is here.

    Raises:
        Unreachable: no answer within the deadline.
        NotServed: the server has no such app, population or channel.
        MalformedArtifact: the answer is no offer, or the server speaks another wire version.
        InvalidConfig: the bundle names no place that releases come from.
    """
    until = time.monotonic() + deadline_s
    name = f"channels/{quote(app.channel, safe='')}.json"
    where = _where(app)
    if where == "file":
        return Offer.from_bytes(_local(app, name, MAX_OFFER))
    if where == "https":
        data = bytearray()
        for _, piece in _in_time(lambda: _https(app, name, 0, until), until):
            data += piece
            if len(data) > MAX_OFFER:
                raise MalformedArtifact(f"an offer of more than {MAX_OFFER} bytes; ask the operator")
        return Offer.from_bytes(bytes(data))

    from penchant.common.artifacts.distribution_pb2 import GetManifestRequest, GetManifestResponse

    asked = GetManifestRequest(
        app_id=app.app_id,
        population=app.population,
        channel=app.channel,
        wire_version=min(app.wire[1], WIRE_VERSIONS[1]),
        have=have,
    )
    with channel(app.distribution, app.ca) as line:
        call = line.unary_unary(
            f"/{_SERVICE}/GetManifest", GetManifestRequest.SerializeToString, GetManifestResponse.FromString
        )
        found = told(lambda: call(asked, timeout=left_s(until)))
    return Offer(*map(Envelope.from_bytes, (found.certificate, found.pointer, found.manifest)))


def fetch_blob(app: App, blob: Blob, kind: Kind, part_file: Path, *, deadline_s: float) -> bytes:
    """The bytes of a model or a catalogue, known to be those of the hash.

    Args:
        part_file: where what came is kept until all of it is here; one for each hash. It is gone when this returns.

    Raises:
        Unreachable: no answer, or not all of it, within the deadline; the part file stays, and a later call goes on.
        NotServed: the server has no such blob (any more); ask for the offer again.
        MalformedArtifact: other bytes than the hash names; the part file is gone.
        InvalidConfig: the bundle names no place that releases come from.
        OSError: no place for the part file.
    """
    until = time.monotonic() + deadline_s
    where = _where(app)
    name = f"blobs/{blob.sha256}"
    have = part_file.stat().st_size if part_file.exists() else 0
    if have > blob.size:
        have = 0
    try:
        if where == "file":
            data = _local(app, name, blob.size)
        else:
            if have < blob.size:
                if where == "https":
                    pieces = _in_time(lambda: _https(app, name, have, until), until)
                else:
                    pieces = _grpc(app, blob, kind, have, until)
                _keep(part_file, pieces, have, blob.size)
            data = part_file.read_bytes() if blob.size else b""
        blob.check(data)
    except (Unreachable, NotServed):
        raise
    except PenchantError:  # nothing that is there can be gone on from
        part_file.unlink(missing_ok=True)
        raise
    part_file.unlink(missing_ok=True)
    return data


def _keep(part_file: Path, pieces: Iterator[tuple[int, bytes]], have: int, size: int) -> None:
    """Writes pieces to where they belong, as they come.

    Args:
        pieces: place of the first byte, and bytes; one piece after the other, from `have` on or from the beginning.
    """
    with part_file.open("r+b" if have else "wb") as file, closing(pieces):  # type: ignore[type-var]  # a generator
        end = file.seek(have)
        for at, data in pieces:
            if at != end:
                file.seek(at)
                file.truncate()
            end = at + len(data)
            if end > size:
                raise MalformedArtifact(f"more than the {size} bytes that the manifest names; ask the operator")
            file.write(data)
    if end < size:
        raise Unreachable(_NO_ANSWER)


def _where(app: App) -> Literal["grpc", "https", "file"]:
    scheme, colon, _ = app.distribution.partition("://")
    if not colon and app.distribution:
        return "grpc"
    if scheme in ("https", "file"):
        return "https" if scheme == "https" else "file"
    raise InvalidConfig("the bundle's distribution is not \"host:port\", nor a folder's https:// or file:// URL")


# -------------------------------------------------------------------------------------------------------- gRPC


def _grpc(app: App, blob: Blob, kind: Kind, at: int, until: float) -> Iterator[tuple[int, bytes]]:
    from penchant.common.artifacts.distribution_pb2 import Chunk, GetBlobRequest

    asked = GetBlobRequest(
        app_id=app.app_id,
        population=app.population,
        sha256=blob.sha256,
        offset=at,
        accept=["deflate"] if kind == "catalogue" else [],  # a model's numbers hardly get shorter
    )
    with channel(app.distribution, app.ca) as line:
        call = line.unary_stream(f"/{_SERVICE}/{_METHODS[kind]}", GetBlobRequest.SerializeToString, Chunk.FromString)
        chunks = iter(call(asked, timeout=left_s(until)))
        first, unpack = True, None
        while True:
            try:
                chunk = told(lambda: next(chunks, None))
            except InvalidConfig:
                if not at:
                    raise
                raise MalformedArtifact("the server's bytes are fewer than what is here; fetch them again") from None
            if chunk is None:
                return
            if first:
                if chunk.size != blob.size or chunk.encoding not in ("", "deflate"):
                    raise MalformedArtifact("the server's bytes are not those that the manifest names")
                unpack = zlib.decompressobj() if chunk.encoding else None
            first, data = False, chunk.data
            if unpack is not None:
                try:
                    data = unpack.decompress(data, blob.size - at + 1)  # one more than there may be, and no more
                except zlib.error:
                    raise MalformedArtifact("a compressed stream that cannot be unpacked; fetch it again") from None
            yield at, data
            at += len(data)


# ------------------------------------------------------------------------------------------------------ folder


def _local(app: App, name: str, size: int) -> bytes:
    """At most one byte more than `size`."""
    from urllib.request import url2pathname

    try:
        with (Path(url2pathname(urlsplit(app.distribution).path)) / name).open("rb") as file:
            return file.read(size + 1)
    except FileNotFoundError:
        raise error_of("NOT_FOUND") from None
    except OSError:
        raise Unreachable(_NO_ANSWER) from None


def _https(app: App, name: str, at: int, until: float) -> Iterator[tuple[int, bytes]]:
    import http.client
    import ssl
    import urllib.error
    import urllib.request

    class HttpsOnly(urllib.request.HTTPRedirectHandler):
        def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
            if urlsplit(newurl).scheme != "https":
                raise urllib.error.HTTPError(req.full_url, code, "", headers, fp)
            return super().redirect_request(req, fp, code, msg, headers, newurl)

    try:
        trusted = ssl.create_default_context(cadata=app.ca or None)
    except ssl.SSLError:
        raise InvalidConfig("the bundle's ca is not certificates in PEM") from None
    asked = urllib.request.Request(f"{app.distribution.rstrip('/')}/{name}", headers={"Cache-Control": "no-cache"})
    if at:
        asked.add_header("Range", f"bytes={at}-")
    opener = urllib.request.build_opener(urllib.request.HTTPSHandler(context=trusted), HttpsOnly)
    try:
        with opener.open(asked, timeout=left_s(until)) as answer:
            if answer.status != 206:
                at = 0
            elif not answer.headers.get("Content-Range", "").startswith(f"bytes {at}-"):
                raise MalformedArtifact("the server sent another part than it was asked for")
            while data := answer.read1(_PIECE):
                yield at, data
                at += len(data)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code in (404, 410):
            raise error_of("NOT_FOUND") from None
        if error.code == 416:
            raise MalformedArtifact("the server's bytes are fewer than the manifest names; fetch them again") from None
        raise Unreachable(_NO_ANSWER) from None
    except (OSError, ValueError, http.client.HTTPException):
        raise Unreachable(_NO_ANSWER) from None


def _in_time(make: Callable[[], Iterator[_Item]], until: float) -> Iterator[_Item]:
    """What an iterator gives that may block for ever, until the deadline.

    It runs in a thread of its own, which is left to itself when the time is over; a name that is looked up, or a server
    that sends a byte a minute, has no deadline of its own.

    Raises:
        Unreachable: the time is over.
    """
    ready: queue.Queue[tuple[_Item | None, BaseException | None]] = queue.Queue(1)
    left = threading.Event()

    def put(item: _Item | None, error: BaseException | None) -> None:
        while not left.is_set():
            try:
                return ready.put((item, error), timeout=0.2)
            except queue.Full:
                continue
        return None

    def run() -> None:
        try:
            with closing(make()) as items:  # type: ignore[type-var]  # a generator
                for item in items:
                    put(item, None)
                    if left.is_set():
                        return
            put(None, StopIteration())
        except BaseException as error:
            put(None, error)

    threading.Thread(target=run, name="penchant-download", daemon=True).start()
    try:
        while True:
            try:
                item, error = ready.get(timeout=left_s(until))
            except queue.Empty:
                raise Unreachable(_NO_ANSWER) from None
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            assert item is not None
            yield item
    finally:
        left.set()
