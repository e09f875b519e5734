"""What we rely on in the installed Flower: its Fleet API's client, its messages, and what a status means.

The server here is a function that answers requests; nothing listens. tests/system/test_fleet.py has a real one.
"""

from __future__ import annotations

from base64 import b64decode
from collections.abc import Callable
from typing import Any

import httpx
import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_ssh_public_key
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    ActivateNodeResponse,
    DeactivateNodeResponse,
    PullMessagesResponse,
    PushMessagesRequest,
    PushMessagesResponse,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatResponse
from flwr.proto.message_pb2 import (
    ConfirmMessageReceivedResponse,
    PullObjectRequest,
    PullObjectResponse,
    PushObjectRequest,
    PushObjectResponse,
)
from flwr.proto.run_pb2 import GetRunResponse, Run
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.primitives.asymmetric import bytes_to_public_key, verify_signature
from flwr.supercore.task_identity import TaskIdentity

from penchant.client._flower import REFUSED, Fleet
from penchant.client._transport import Answer, Place, Refused, Sum, new_node_key, public_node_key, read_node_key
from penchant.common.arrays import read_npy
from penchant.common.errors import InvalidConfig, NotEnrolled, PenchantError, RoundClosed, Unreachable

KEY = new_node_key()
NODE, RUN = 77, 5
STATE = {"w": np.arange(6, dtype=np.float32).reshape(2, 3)}
ORDER: dict[str, Any] = {"round": 1, "learner": "als"}


class Server:
    """Holds one message for the node, object by object, and takes its reply apart again.

    Args:
        unready: how often the first object is asked for before it is there.
        taken: whether it wants the reply.
        status: of every answer to these paths, in place of 200.
    """

    def __init__(self, kind: str = MessageType.TRAIN, *, unready: int = 0, taken: bool = True, **status: int) -> None:
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = RUN, 1, 1
        content = RecordDict(
            {"state": ArrayRecord({k: Array(v) for k, v in STATE.items()}), "order": ConfigRecord(ORDER)}
        )
        self.message = Message(content, dst_node_id=NODE, message_type=kind)
        self.message.metadata.__dict__["_message_id"] = self.message.object_id
        self.objects = {name: part.deflate() for name, part in get_all_nested_objects(self.message).items()}
        self.unready, self.taken, self.status = unready, taken, status
        self.calls: list[str] = []
        self.headers: list[httpx.Headers] = []
        self.pushed: dict[str, bytes] = {}
        self.reply: PushMessagesRequest | None = None

    def __call__(self, request: httpx.Request) -> httpx.Response:
        name = request.url.path.removeprefix("/v1/fleet/")
        self.calls.append(name)
        self.headers.append(request.headers)
        if status := self.status.get(name.replace("-", "_"), 0):
            return httpx.Response(status)
        answer: Any = getattr(self, name.replace("-", "_"))(request.content)
        return httpx.Response(200, content=answer.SerializeToString())

    def activate_node(self, body: bytes) -> ActivateNodeResponse:
        assert ActivateNodeRequest.FromString(body).public_key.startswith(b"-----BEGIN PUBLIC KEY")
        return ActivateNodeResponse(node_id=NODE)

    def deactivate_node(self, body: bytes) -> DeactivateNodeResponse:
        return DeactivateNodeResponse()

    def send_node_heartbeat(self, body: bytes) -> SendNodeHeartbeatResponse:
        return SendNodeHeartbeatResponse(success=True)

    def pull_messages(self, body: bytes) -> PullMessagesResponse:
        shown = message_to_proto(remove_content_from_message(self.message))
        return PullMessagesResponse(messages_list=[shown], message_object_trees=[get_object_tree(self.message)])

    def get_run(self, body: bytes) -> GetRunResponse:
        return GetRunResponse(run=Run(run_id=RUN, fab_id="films/rounds"))

    def pull_object(self, body: bytes) -> PullObjectResponse:
        self.unready -= 1
        if self.unready >= 0:
            return PullObjectResponse(object_found=True, object_available=False)
        name = PullObjectRequest.FromString(body).object_id
        here = name in self.objects
        return PullObjectResponse(object_found=here, object_available=here, object_content=self.objects.get(name, b""))

    def confirm_message_received(self, body: bytes) -> ConfirmMessageReceivedResponse:
        return ConfirmMessageReceivedResponse()

    def push_messages(self, body: bytes) -> PushMessagesResponse:
        self.reply = PushMessagesRequest.FromString(body)
        tree = self.reply.message_object_trees[0]
        names, left = [], [tree]
        while left:
            one = left.pop()
            names.append(one.object_id)
            left += one.children
        return PushMessagesResponse(objects_to_push=names if self.taken else [], session_id="s")

    def push_object(self, body: bytes) -> PushObjectResponse:
        sent = PushObjectRequest.FromString(body)
        self.pushed[sent.object_id] = sent.object_content
        return PushObjectResponse(stored=True)

    def received(self) -> Message:
        """The reply, put together as the server's side of Flower does."""
        assert self.reply is not None
        name = self.reply.message_object_trees[0].object_id
        found = inflate_object_from_contents(name, dict(self.pushed))
        assert isinstance(found, Message)
        assert message_from_proto(self.reply.messages_list[0]).metadata.reply_to_message_id == self.message.object_id
        return found


def line(server: Callable[[httpx.Request], httpx.Response], **options: Any) -> Fleet:
    fleet = Fleet("localhost:1", KEY, **options)
    fleet._http._client = httpx.Client(transport=httpx.MockTransport(server))
    return fleet


def answered(answer: Answer, kind: str = MessageType.TRAIN) -> Message:
    server = Server(kind)
    fleet = line(server)
    fleet.join()
    task = fleet.pull()
    assert task is not None
    fleet.fetch(task)
    fleet.reply(task, answer)
    return server.received()


def test_a_message_becomes_an_order_and_a_state() -> None:
    server = Server()
    fleet = line(server)
    assert fleet.join() == NODE
    task = fleet.pull()
    assert task is not None
    assert (task.app, task.kind) == ("films/rounds", "train")
    content = fleet.fetch(task)
    assert content.order == ORDER
    np.testing.assert_array_equal(content.state["w"], STATE["w"])


def test_a_message_is_confirmed_only_once_every_object_is_here() -> None:
    server = Server(unready=2)
    fleet = line(server)
    fleet.join()
    task = fleet.pull()
    assert task is not None
    fleet.fetch(task)
    pulls = [i for i, call in enumerate(server.calls) if call == "pull-object"]
    assert len(pulls) == len(server.objects) + 2
    assert server.calls.index("confirm-message-received") > max(pulls)


def test_an_object_that_is_gone_closes_the_round_and_confirms_nothing() -> None:
    server = Server()
    server.objects.popitem()
    fleet = line(server)
    fleet.join()
    task = fleet.pull()
    assert task is not None
    with pytest.raises(RoundClosed):
        fleet.fetch(task)
    assert "confirm-message-received" not in server.calls


def test_an_answer_sent_again_is_the_same_message_with_what_was_missing() -> None:
    server = Server()
    fleet = line(server)
    fleet.join()
    task = fleet.pull()
    assert task is not None
    answer = Sum(round=1, attempt=0, content={"g": np.ones(3)})
    server.status = {"push_object": 500}
    with pytest.raises(Unreachable):
        fleet.reply(task, answer)
    first, server.status = server.reply, {}
    fleet.reply(task, answer)
    assert first is not None
    assert server.reply == first
    assert server.received().content.array_records["sum"].keys() == {"g"}


def test_an_answer_that_the_server_does_not_take_is_too_late() -> None:
    server = Server(taken=False)
    fleet = line(server)
    fleet.join()
    task = fleet.pull()
    assert task is not None
    with pytest.raises(RoundClosed):
        fleet.reply(task, Place(0))


def test_a_sealed_sum_arrives_as_one_array_of_bytes() -> None:
    found = answered(Sum(round=2, attempt=1, content=b"\x00\xffsealed")).content
    assert read_npy(found.array_records["sealed"]["sum"].data).tobytes() == b"\x00\xffsealed"
    assert "sum" not in found
    assert dict(found.metric_records["diagnostics"]) == {"round": 2, "attempt": 1, "users": 1}


def test_an_unsealed_sum_arrives_as_its_arrays() -> None:
    found = answered(Sum(round=2, attempt=1, content={"g": np.ones(3)})).content
    np.testing.assert_array_equal(read_npy(found.array_records["sum"]["g"].data), np.ones(3))


def test_a_place_arrives_as_the_enrolment_that_the_server_reads() -> None:
    found = answered(Place(4), MessageType.QUERY).content
    assert found.metric_records["enrolment"] == MetricRecord({"partition": 4})


def test_a_refusal_arrives_as_an_error_without_a_reason() -> None:
    found = answered(Refused())
    assert (found.error.code, found.error.reason) == (REFUSED, "refused")


@pytest.mark.parametrize(
    ("kind", "ours"), [(MessageType.QUERY, "enrol"), ("train.more", "train"), ("evaluate", "unknown")]
)
def test_messages_have_kinds(kind: str, ours: str) -> None:
    fleet = line(Server(kind))
    fleet.join()
    task = fleet.pull()
    assert task is not None
    assert task.kind == ours


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (401, NotEnrolled),
        (404, NotEnrolled),
        (412, NotEnrolled),
        (403, RoundClosed),
        (500, Unreachable),
        (502, Unreachable),
        (503, Unreachable),
        (504, Unreachable),
        (418, Unreachable),
    ],
)
def test_each_status_is_an_error_of_ours(status: int, error: type[PenchantError]) -> None:
    with pytest.raises(error):
        line(Server(activate_node=status)).join()


@pytest.mark.parametrize("fault", [httpx.ConnectError, httpx.ReadTimeout, httpx.RemoteProtocolError, OSError])
def test_a_broken_line_is_unreachable_and_names_no_address(fault: type[Exception]) -> None:
    def breaks(request: httpx.Request) -> httpx.Response:
        raise fault("localhost:1")

    with pytest.raises(Unreachable) as raised:
        line(breaks).join()
    assert "localhost" not in str(raised.value)


def test_an_answer_that_is_no_protobuf_is_unreachable() -> None:
    with pytest.raises(Unreachable):
        line(lambda request: httpx.Response(200, content=b"\xff\xff")).join()


def test_a_closed_line_is_unreachable() -> None:
    fleet = line(Server())
    fleet.close()
    with pytest.raises(Unreachable):
        fleet.join()


def test_a_known_number_joins_by_a_heartbeat_and_a_lost_one_by_activating() -> None:
    server = Server()
    assert line(server, node_id=12).join() == 12
    assert server.calls == ["send-node-heartbeat"]
    server = Server(send_node_heartbeat=401)
    assert line(server, node_id=12).join() == NODE
    assert server.calls == ["send-node-heartbeat", "activate-node"]


def test_a_node_leaves_with_a_word_unless_a_reply_of_its_own_may_still_wait_there() -> None:
    server = Server()
    fleet = line(server)
    fleet.leave()
    assert server.calls == []
    fleet.join()
    fleet.leave()
    fleet.leave()
    assert server.calls == ["activate-node", "deactivate-node"]

    fleet.join()
    task = fleet.pull()
    assert task is not None
    fleet.reply(task, Refused())
    assert server.calls[-1] == "send-node-heartbeat"
    fleet.leave()
    assert server.calls.count("deactivate-node") == 1


def test_every_request_is_signed_with_the_devices_key() -> None:
    server = Server()
    line(server).join()
    (headers,) = server.headers
    key, signature = (b64decode(headers[f"flwr-{name}"]) for name in ("public-key", "signature"))
    assert bytes_to_public_key(key) == read_node_key(KEY).public_key()
    assert verify_signature(bytes_to_public_key(key), headers["flwr-timestamp"].encode(), signature)


def test_a_node_key_is_read_in_both_forms_and_any_other_key_is_refused() -> None:
    private = read_node_key(KEY)
    openssh = private.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
    assert read_node_key(openssh).private_numbers() == private.private_numbers()
    assert load_ssh_public_key(public_node_key(KEY).encode()) == private.public_key()
    other = ec.generate_private_key(ec.SECP256R1()).private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    for wrong in (other, b"", b"-----BEGIN OPENSSH PRIVATE KEY-----"):
        with pytest.raises(InvalidConfig, match="P-384"):
            Fleet("localhost:1", wrong)
    with pytest.raises(InvalidConfig, match="PEM"):
        Fleet("localhost:1", KEY, ca="none")
