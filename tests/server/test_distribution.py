"""The distribution service on real TLS gives what was published, from any offset, to many at once, and nothing else."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf import descriptor_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from penchant.common.artifacts.bundle import catalogue_bytes
from penchant.common.artifacts.distribution_pb2 import (
    Chunk,
    GetBlobRequest,
    GetManifestRequest,
    GetManifestResponse,
    RevokeRequest,
    RevokeResponse,
)
from penchant.common.artifacts.manifest import Blob, Offer
from penchant.common.artifacts.signing import Envelope
from penchant.common.errors import InvalidConfig, MalformedArtifact, StaleArtifact, UntrustedArtifact
from penchant.server import distribution
from penchant.server.distribution import CHUNK, MAX_REQUEST, SERVICE, Distribution, publish
from scripts.wire_vectors import APP, CATALOGUE, MODEL, NEXT, NOW_MS, ROOT, offer, pointer
from tests.certificates import Tls, tls

MODEL_BYTES, CATALOGUE_BYTES = MODEL.to_bytes(), catalogue_bytes(CATALOGUE)
LARGE = np.random.default_rng(0).bytes(3 * CHUNK + 1000)
EVEN = bytes(3 * CHUNK)  # compresses well
BLOBS = {"model": MODEL_BYTES, "catalogue": CATALOGUE_BYTES, "large": LARGE, "even": EVEN, "none": b""}
WHO = {"app_id": APP.app_id, "population": APP.population}


def put(folder: Path, found: Offer, *blobs: bytes) -> None:
    publish(folder, found, blobs or (MODEL_BYTES, CATALOGUE_BYTES), root=ROOT.public, now_ms=NOW_MS)


# ------------------------------------------------------------------------------------------------------ folder


def tree(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_published_folder_is_what_the_document_says(tmp_path: Path) -> None:
    put(tmp_path, offer())
    assert tree(tmp_path) == {
        "channels/stable.json": offer().to_bytes(),
        "certificates/1.json": offer().certificate.to_bytes(),
        f"manifests/{offer().manifest.sha256}.json": offer().manifest.to_bytes(),
        f"blobs/{hashlib.sha256(MODEL_BYTES).hexdigest()}": MODEL_BYTES,
        f"blobs/{hashlib.sha256(CATALOGUE_BYTES).hexdigest()}": CATALOGUE_BYTES,
    }
    before = tree(tmp_path)
    put(tmp_path, offer())
    assert tree(tmp_path) == before


def test_a_channel_is_written_after_all_that_it_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    def noted(path: Path, data: bytes) -> None:
        order.append(path.parent.name)
        path.write_bytes(data)

    monkeypatch.setattr(distribution, "write_whole", noted)
    put(tmp_path, offer())
    assert order == ["blobs", "blobs", "certificates", "manifests", "channels"]


def test_a_channel_goes_only_forward_and_blobs_stay(tmp_path: Path) -> None:
    put(tmp_path, offer(sequence=2))
    with pytest.raises(StaleArtifact):
        put(tmp_path, offer(sequence=1))
    with pytest.raises(UntrustedArtifact, match="two pointers"):
        put(tmp_path, offer(sequence=2, version=2))
    other = b"another model"
    put(tmp_path, offer(sequence=3, version=2, model=Blob.of(other)), other)  # its catalogue is there
    assert len(tree(tmp_path)) == 7  # two models, two manifests
    put(tmp_path, offer(NEXT, serial=2, sequence=1, version=3))  # a new release key
    with pytest.raises(StaleArtifact):
        put(tmp_path, offer(sequence=4))
    assert Offer.from_bytes((tmp_path / "channels/stable.json").read_bytes()) == offer(NEXT, serial=2, version=3)


def test_what_devices_would_refuse_is_not_published(tmp_path: Path) -> None:
    good, both = offer(), (MODEL_BYTES, CATALOGUE_BYTES)
    for found, blobs, error in (
        (Offer(good.certificate, good.pointer, offer(version=2).manifest), both, UntrustedArtifact),
        (Offer(good.certificate, pointer(good.manifest, NEXT), good.manifest), both, UntrustedArtifact),
        (good, (MODEL_BYTES,), InvalidConfig),
        (good, (*both, b"more"), InvalidConfig),
        (good, (MODEL_BYTES + b"x", CATALOGUE_BYTES), InvalidConfig),
        (Offer(good.certificate, pointer(good.manifest, channel="../stable"), good.manifest), both, InvalidConfig),
        (Offer(good.certificate, Envelope("", b"[]", ()), good.manifest), both, MalformedArtifact),
    ):
        with pytest.raises(error):
            publish(tmp_path, found, blobs, root=ROOT.public, now_ms=NOW_MS)
        assert not (tmp_path / "channels/stable.json").exists()


def test_a_full_disk_leaves_the_channel_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, offer())
    before = tree(tmp_path)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        put(tmp_path, offer(sequence=2))
    assert tree(tmp_path) == before


# ----------------------------------------------------------------------------------------------------- service


@dataclass(frozen=True)
class Served:
    """A running service, and how to call it."""

    folder: Path
    port: int
    tls: Tls

    def channel(self, *options: tuple[str, Any]) -> grpc.Channel:
        trusted = grpc.ssl_channel_credentials(self.tls.ca)
        return grpc.secure_channel(f"127.0.0.1:{self.port}", trusted, options=options)

    def manifest(self, **fields: Any) -> GetManifestResponse:
        asked = GetManifestRequest(**{**WHO, "channel": "stable", "wire_version": 1, **fields})
        with self.channel() as channel:
            call = channel.unary_unary(
                f"/{SERVICE}/GetManifest", GetManifestRequest.SerializeToString, GetManifestResponse.FromString
            )
            found: GetManifestResponse = call(asked, timeout=10)
        return found

    def chunks(self, method: str = "GetModel", timeout: float = 20, **fields: Any) -> list[Chunk]:
        with self.channel() as channel:
            return list(stream(channel, method, timeout, **fields))


def stream(channel: grpc.Channel, method: str = "GetModel", timeout: float = 20, **fields: Any) -> Iterator[Chunk]:
    call = channel.unary_stream(f"/{SERVICE}/{method}", GetBlobRequest.SerializeToString, Chunk.FromString)
    return iter(call(GetBlobRequest(**{**WHO, **fields}), timeout=timeout))


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder, keys = tmp_path_factory.mktemp("prod"), tls()
    put(folder, offer())
    for data in (LARGE, EVEN, b""):
        (folder / "blobs" / hashlib.sha256(data).hexdigest()).write_bytes(data)
    (folder / "blobs" / ("ab" * 32)).mkdir()
    folders = {(APP.app_id, APP.population): folder}
    pem: dict[str, Any] = {"private_key": keys.private_key, "chain": keys.chain}
    with Distribution(folders, address="127.0.0.1:0", **pem, services=[(OTHER, echo())]) as made:
        yield Served(folder, made.port, keys)


OTHER = "penchant.v1.Enrolment"


def echo() -> grpc.GenericRpcHandler[Any, Any]:
    """Another service on the same server, that answers everything."""
    revoke = grpc.unary_unary_rpc_method_handler(
        lambda asked, context: RevokeResponse(), RevokeRequest.FromString, RevokeResponse.SerializeToString
    )
    return grpc.method_handlers_generic_handler(OTHER, {"Revoke": revoke})


def status(caught: pytest.ExceptionInfo[grpc.RpcError]) -> str:
    assert isinstance(caught.value, grpc.Call)
    return str(caught.value.code().name)


def named(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def test_the_channel_s_offer_is_given_as_it_was_signed(served: Served) -> None:
    found = served.manifest(have="ab" * 32)
    parts = (Envelope.from_bytes(part) for part in (found.certificate, found.pointer, found.manifest))
    assert Offer(*parts) == offer()


@pytest.mark.parametrize("method", ["GetModel", "GetCatalogue"])
@pytest.mark.parametrize(
    "data", [MODEL_BYTES, CATALOGUE_BYTES, LARGE, EVEN, b""], ids=["model", "text", "large", "even", "none"]
)
def test_a_blob_comes_whole_in_chunks_and_from_any_offset(served: Served, method: str, data: bytes) -> None:
    for offset in {0, 1, CHUNK, len(data) // 2, max(len(data) - 1, 0), len(data)}:
        if offset > len(data):
            continue
        found = served.chunks(method, sha256=named(data), offset=offset)
        assert b"".join(chunk.data for chunk in found) == data[offset:]
        assert (found[0].size, found[0].encoding) == (len(data), "")
        assert all(len(chunk.data) <= CHUNK and not chunk.size for chunk in found[1:])


@pytest.mark.parametrize("data", [CATALOGUE_BYTES, LARGE, EVEN, b""], ids=["text", "large", "even", "none"])
def test_a_compressed_stream_begins_at_the_offset_and_each_chunk_can_be_unpacked_at_once(
    served: Served, data: bytes
) -> None:
    for offset in {0, len(data) // 3, len(data)}:
        found = served.chunks(sha256=named(data), offset=offset, accept=["br", "deflate"])
        assert (found[0].size, found[0].encoding) == (len(data), "deflate")
        unpack, got = zlib.decompressobj(), offset
        for chunk in found:
            got += len(unpack.decompress(chunk.data))
            assert got == min(len(data), (got - offset + CHUNK - 1) // CHUNK * CHUNK + offset)
        assert got == len(data)
        assert unpack.eof
    sent = sum(len(chunk.data) for chunk in served.chunks(sha256=named(EVEN), accept=["deflate"]))
    assert sent < len(EVEN) / 100


def test_a_stream_goes_on_where_it_was_broken_off(served: Served) -> None:
    got = b""
    for _ in range(4):
        with served.channel() as channel:
            for chunk in stream(channel, sha256=named(LARGE), offset=len(got)):
                got += chunk.data
                break  # and the channel is closed under it
    assert got == LARGE
    assert hashlib.sha256(got).hexdigest() == named(LARGE)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"sha256": "00" * 32}, "NOT_FOUND"),
    ({"sha256": "ab" * 32}, "NOT_FOUND"),  # a folder of that name
    ({"sha256": ""}, "INVALID_ARGUMENT"),
    ({"sha256": "../channels/stable.json"}, "INVALID_ARGUMENT"),
    ({"sha256": "/etc/passwd"}, "INVALID_ARGUMENT"),
    ({"sha256": named(MODEL_BYTES).upper()}, "INVALID_ARGUMENT"),
    ({"sha256": named(MODEL_BYTES) + "\n"}, "INVALID_ARGUMENT"),
    ({"sha256": named(MODEL_BYTES)[:-1] + "\0"}, "INVALID_ARGUMENT"),
    ({"sha256": named(MODEL_BYTES), "offset": len(MODEL_BYTES) + 1}, "INVALID_ARGUMENT"),
    ({"sha256": named(MODEL_BYTES), "offset": 2**64 - 1}, "INVALID_ARGUMENT"),
    ({"sha256": named(MODEL_BYTES), "app_id": "books"}, "NOT_FOUND"),
    ({"sha256": named(MODEL_BYTES), "population": "../readers"}, "NOT_FOUND"),
]


@pytest.mark.parametrize(("fields", "expected"), REFUSED, ids=str)
def test_a_blob_that_is_none_is_one_status(served: Served, fields: dict[str, Any], expected: str) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        served.chunks(**fields)
    assert status(caught) == expected
    assert str(served.folder) not in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"app_id": "books"}, "NOT_FOUND"),
        ({"population": ""}, "NOT_FOUND"),
        ({"channel": "candidate"}, "NOT_FOUND"),
        ({"channel": ""}, "INVALID_ARGUMENT"),
        ({"channel": "../blobs/" + named(MODEL_BYTES)}, "INVALID_ARGUMENT"),
        ({"channel": "stable.json"}, "INVALID_ARGUMENT"),
        ({"channel": "a" * 65}, "INVALID_ARGUMENT"),
        ({"wire_version": 0}, "FAILED_PRECONDITION"),
        ({"wire_version": 2}, "FAILED_PRECONDITION"),
        ({"have": "x" * (MAX_REQUEST + 1)}, "RESOURCE_EXHAUSTED"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_channel_that_is_none_a_version_not_spoken_or_too_large_a_request_is_one_status(
    served: Served, fields: dict[str, Any], expected: str
) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        served.manifest(**fields)
    assert status(caught) == expected


def test_an_offer_that_the_operator_broke_is_told_without_its_content(served: Served) -> None:
    (served.folder / "channels/broken.json").write_bytes(b"secret" * 10)
    with pytest.raises(grpc.RpcError) as caught:
        served.manifest(channel="broken")
    assert status(caught) == "INTERNAL"
    assert "secret" not in str(caught.value)


def test_bytes_that_are_no_request_and_methods_that_are_none_are_refused(served: Served) -> None:
    for method, expected in (("GetModel", "INTERNAL"), ("GetSecrets", "UNIMPLEMENTED")):
        with served.channel() as channel, pytest.raises(grpc.RpcError) as caught:
            list(channel.unary_stream(f"/{SERVICE}/{method}", bytes, bytes)(b"\xff\xff\xff", timeout=10))
        assert status(caught) == expected


def test_plain_text_and_another_authority_get_nothing(served: Served) -> None:
    target = f"127.0.0.1:{served.port}"
    with grpc.insecure_channel(target) as channel, pytest.raises(grpc.RpcError) as caught:
        list(stream(channel, timeout=5, sha256=named(MODEL_BYTES)))
    assert status(caught) == "UNAVAILABLE"
    other = grpc.ssl_channel_credentials(tls().ca)
    with grpc.secure_channel(target, other) as channel, pytest.raises(grpc.RpcError) as caught:
        list(stream(channel, timeout=5, sha256=named(MODEL_BYTES)))
    assert status(caught) == "UNAVAILABLE"


def test_health_is_told_of_each_service_and_of_no_other(served: Served) -> None:
    with served.channel() as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        for service in ("", SERVICE, OTHER):
            answer = stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=10)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        with pytest.raises(grpc.RpcError) as caught:
            stub.Check(health_pb2.HealthCheckRequest(service="penchant.v1.Absent"), timeout=10)
        assert status(caught) == "NOT_FOUND"


def test_another_service_answers_on_the_same_port(served: Served) -> None:
    with served.channel() as channel:
        call = channel.unary_unary(f"/{OTHER}/Revoke", RevokeRequest.SerializeToString, RevokeResponse.FromString)
        assert call(RevokeRequest(), timeout=10) == RevokeResponse()


def test_reflection_names_all_services_and_their_messages(served: Served) -> None:
    asked = [
        reflection_pb2.ServerReflectionRequest(list_services=""),
        reflection_pb2.ServerReflectionRequest(file_containing_symbol=OTHER),
    ]
    with served.channel() as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        listed, file = stub.ServerReflectionInfo(iter(asked), timeout=10)
    names = {service.name for service in listed.list_services_response.service}
    assert names == {SERVICE, OTHER, "grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"}
    found = descriptor_pb2.FileDescriptorProto.FromString(file.file_descriptor_response.file_descriptor_proto[0])
    assert [service.name for service in found.service] == ["Distribution", "Enrolment"]
    assert {"EnrolRequest", "Chunk"} <= {message.name for message in found.message_type}


def test_two_hundred_download_at_once_from_one_process(served: Served) -> None:
    start = threading.Barrier(200)

    def download(_: int) -> str:
        with served.channel(("grpc.use_local_subchannel_pool", 1)) as channel:  # a connection of its own
            grpc.channel_ready_future(channel).result(timeout=60)
            start.wait(timeout=60)
            found = hashlib.sha256()
            for chunk in stream(channel, timeout=60, sha256=named(LARGE)):
                found.update(chunk.data)
        return found.hexdigest()

    with ThreadPoolExecutor(200) as pool:
        assert set(pool.map(download, range(200))) == {named(LARGE)}


def test_one_too_many_is_refused_at_once_and_the_others_are_served_slowly(tmp_path: Path) -> None:
    """Who reads nothing holds one place, and nobody else's."""
    keys, data = tls(), np.random.default_rng(1).bytes(64 * CHUNK)
    put(tmp_path, offer())
    (tmp_path / "blobs" / named(data)).write_bytes(data)
    made = Distribution(
        {(APP.app_id, APP.population): tmp_path},
        address="127.0.0.1:0",
        private_key=keys.private_key,
        chain=keys.chain,
        at_once=2,
    )
    with made:
        here = Served(tmp_path, made.port, keys)
        with here.channel() as channel:
            idle = [stream(channel, timeout=60, sha256=named(data)) for _ in range(2)]
            first = [next(one) for one in idle]
            with pytest.raises(grpc.RpcError) as caught:
                here.manifest()
            assert status(caught) == "RESOURCE_EXHAUSTED"
            for chunk, one in zip(first, idle, strict=True):
                assert named(chunk.data + b"".join(more.data for more in one)) == named(data)
        assert Envelope.from_bytes(here.manifest().manifest) == offer().manifest


def test_who_never_reads_loses_the_place_when_the_connection_s_time_is_over(tmp_path: Path) -> None:
    keys, data = tls(), np.random.default_rng(1).bytes(64 * CHUNK)
    put(tmp_path, offer())
    (tmp_path / "blobs" / named(data)).write_bytes(data)
    folders = {(APP.app_id, APP.population): tmp_path}
    pem: dict[str, Any] = {"private_key": keys.private_key, "chain": keys.chain}
    with Distribution(folders, address="127.0.0.1:0", **pem, at_once=1, connection_s=1.0) as made:
        here = Served(tmp_path, made.port, keys)
        with here.channel(("grpc.use_local_subchannel_pool", 1)) as channel:
            idle = stream(channel, timeout=60, sha256=named(data))
            next(idle)
            until = time.monotonic() + 20
            while time.monotonic() < until:
                try:
                    assert here.manifest().manifest
                    break
                except grpc.RpcError:
                    time.sleep(0.1)
            else:
                pytest.fail("the place was never given back")
            with pytest.raises(grpc.RpcError):
                list(idle)


def test_a_service_that_cannot_listen_says_so(served: Served, tmp_path: Path) -> None:
    keys = tls()
    for address, chain in ((f"127.0.0.1:{served.port}", keys.chain), ("127.0.0.1:0", b"no certificate")):
        with pytest.raises(InvalidConfig, match="can't listen"):
            Distribution({}, address=address, private_key=keys.private_key, chain=chain)


def test_the_service_needs_no_flower() -> None:
    code = "import sys; sys.modules['flwr'] = None; import penchant.server.distribution"
    subprocess.run([sys.executable, "-c", code], check=True)
