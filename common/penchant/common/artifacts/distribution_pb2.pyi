from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable
from typing import ClassVar as _ClassVar, Optional as _Optional

DESCRIPTOR: _descriptor.FileDescriptor

class GetManifestRequest(_message.Message):
    __slots__ = ("app_id", "population", "channel", "wire_version", "have")
    APP_ID_FIELD_NUMBER: _ClassVar[int]
    POPULATION_FIELD_NUMBER: _ClassVar[int]
    CHANNEL_FIELD_NUMBER: _ClassVar[int]
    WIRE_VERSION_FIELD_NUMBER: _ClassVar[int]
    HAVE_FIELD_NUMBER: _ClassVar[int]
    app_id: str
    population: str
    channel: str
    wire_version: int
    have: str
    def __init__(self, app_id: _Optional[str] = ..., population: _Optional[str] = ..., channel: _Optional[str] = ..., wire_version: _Optional[int] = ..., have: _Optional[str] = ...) -> None: ...

class GetManifestResponse(_message.Message):
    __slots__ = ("certificate", "pointer", "manifest")
    CERTIFICATE_FIELD_NUMBER: _ClassVar[int]
    POINTER_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    certificate: bytes
    pointer: bytes
    manifest: bytes
    def __init__(self, certificate: _Optional[bytes] = ..., pointer: _Optional[bytes] = ..., manifest: _Optional[bytes] = ...) -> None: ...

class GetBlobRequest(_message.Message):
    __slots__ = ("app_id", "population", "sha256", "offset", "accept")
    APP_ID_FIELD_NUMBER: _ClassVar[int]
    POPULATION_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    ACCEPT_FIELD_NUMBER: _ClassVar[int]
    app_id: str
    population: str
    sha256: str
    offset: int
    accept: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, app_id: _Optional[str] = ..., population: _Optional[str] = ..., sha256: _Optional[str] = ..., offset: _Optional[int] = ..., accept: _Optional[_Iterable[str]] = ...) -> None: ...

class Chunk(_message.Message):
    __slots__ = ("data", "size", "encoding")
    DATA_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    ENCODING_FIELD_NUMBER: _ClassVar[int]
    data: bytes
    size: int
    encoding: str
    def __init__(self, data: _Optional[bytes] = ..., size: _Optional[int] = ..., encoding: _Optional[str] = ...) -> None: ...

class EnrolRequest(_message.Message):
    __slots__ = ("app_id", "population", "wire_version", "token", "node_key", "proof")
    APP_ID_FIELD_NUMBER: _ClassVar[int]
    POPULATION_FIELD_NUMBER: _ClassVar[int]
    WIRE_VERSION_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    NODE_KEY_FIELD_NUMBER: _ClassVar[int]
    PROOF_FIELD_NUMBER: _ClassVar[int]
    app_id: str
    population: str
    wire_version: int
    token: str
    node_key: bytes
    proof: bytes
    def __init__(self, app_id: _Optional[str] = ..., population: _Optional[str] = ..., wire_version: _Optional[int] = ..., token: _Optional[str] = ..., node_key: _Optional[bytes] = ..., proof: _Optional[bytes] = ...) -> None: ...

class EnrolResponse(_message.Message):
    __slots__ = ("place", "plan")
    PLACE_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    place: int
    plan: str
    def __init__(self, place: _Optional[int] = ..., plan: _Optional[str] = ...) -> None: ...

class RevokeRequest(_message.Message):
    __slots__ = ("app_id", "population", "node_key", "proof")
    APP_ID_FIELD_NUMBER: _ClassVar[int]
    POPULATION_FIELD_NUMBER: _ClassVar[int]
    NODE_KEY_FIELD_NUMBER: _ClassVar[int]
    PROOF_FIELD_NUMBER: _ClassVar[int]
    app_id: str
    population: str
    node_key: bytes
    proof: bytes
    def __init__(self, app_id: _Optional[str] = ..., population: _Optional[str] = ..., node_key: _Optional[bytes] = ..., proof: _Optional[bytes] = ...) -> None: ...

class RevokeResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
