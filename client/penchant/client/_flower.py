"""The one place on the client side that knows Flower: messages in, our orders out, and back.

client_app   the ClientApp that a simulation's workers run
Fleet        the Fleet API of a Flower server, over HTTPS, as our `Transport`: what a device in the field has

Both are part of the installed package, and neither runs code from the network: `Fleet` never asks for an app's bundle.
It is made of Flower's own messages and HTTP client, which are private there: flwr is pinned exactly, and
tests/client/test_fleet_api.py holds what is relied on. Flower's telemetry and update check are off.
"""

from __future__ import annotations

import logging
import math
import os
import ssl
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar, cast

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")

import httpx
import numpy as np
import numpy.typing as npt
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.clientapp import ClientApp
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    DeactivateNodeRequest,
    PullMessagesRequest,
    PushMessagesRequest,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, ObjectTree, PullObjectRequest, PushObjectRequest
from flwr.proto.node_pb2 import Node as FlowerNode
from flwr.proto.run_pb2 import GetRunRequest
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from penchant.client._transport import Answer, Content, Place, Refused, Task, read_node_key
from penchant.client.node import Node
from penchant.common.arrays import Arrays, read_npy, view_npy, write_npy
from penchant.common.errors import InvalidConfig, NotEnrolled, PenchantError, RoundClosed, Unreachable
from penchant.common.wire import Order

log = logging.getLogger("penchant.client")
_COUNTS = "penchant.participations"
REFUSED = 1000  # our own error code; Flower's end far below


_Request = TypeVar("_Request")
_Response = TypeVar("_Response")


def client_app(node: Callable[[int], Node], failed: Callable[[Exception], None] = lambda error: None) -> ClientApp:
    """A ClientApp that answers orders for the people hosted here, and tells which shard of the roster they are.

    Args:
        node: the host of a shard, by its number.
        failed: told of an error that is none of ours; the server hears the same word as of a refusal.
    """
    app = ClientApp()

    @app.query()
    def enrol(message: Message, context: Context) -> Message:
        here = MetricRecord({"partition": shard(context)})
        return Message(RecordDict({"enrolment": here}), reply_to=message)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        try:
            order = Order.from_flat(config(message.content))
            state = {k: read_npy(v.data) for k, v in arrays(message.content, "state").items()}
            host = node(shard(context))
            if _COUNTS in context.state.array_records:  # the worker that serves this node may be another one each round
                host.participations[:] = view_npy(context.state.array_records[_COUNTS]["counts"].data)
            total = host.answer(order, state)
            smallest = np.min_scalar_type(host.participations.max(initial=0))  # a byte a person, mostly
            context.state[_COUNTS] = ArrayRecord({"counts": _array(host.participations.astype(smallest))})
        except PenchantError as error:  # the words of ours name no person and no item
            log.warning("round refused: %s", error)
            return Message(Error(REFUSED, "refused"), reply_to=message)  # why may depend on what people did
        except Exception as error:
            log.warning("round failed: %s", type(error).__name__)
            failed(error)
            return Message(Error(REFUSED, "refused"), reply_to=message)
        content: dict[str, ArrayRecord | MetricRecord | ConfigRecord] = {
            "sum": ArrayRecord({name: _array(values) for name, values in total.items()}),
            "diagnostics": MetricRecord({"round": order.round, "attempt": order.attempt, "users": len(order.users)}),
        }
        return Message(RecordDict(content), reply_to=message)

    return app


def _array(values: npt.NDArray[Any]) -> Array:
    """What `Array(values)` is, but written by us."""
    return Array(values.dtype.name, values.shape, "numpy.ndarray", write_npy(values))


def shard(context: Context) -> int:
    """Which part of the roster this node is."""
    return int(context.node_config["partition-id"])


def config(content: RecordDict) -> ConfigRecord:
    return content.config_records["order"]


def arrays(content: RecordDict, name: str) -> ArrayRecord:
    return content.array_records[name]


class Fleet:
    """A device's line to a Flower server: a `Transport`.

    A message can be seen before all its objects are there. It is confirmed, upon which the server drops them, only once
    every one was pulled; who confirms early takes them from under whoever uploads them, and ends the whole run.

    A reply waits at the server until the round's process fetches it, some seconds later; if the node is gone by then,
    Flower 1.41 gives an error in its place. So `leave` after a reply says nothing, and the node is gone by its silence.

    Args:
        address: "host:port".
        key: the device's own private key (`_transport.new_node_key`), whose public half is enrolled.
        ca: certificates in PEM that the server's must chain to; "" trusts the system's.
        node_id: what `join` gave before, in an earlier process. The server refuses to activate a node that it takes for
            one that is still there, for a minute after a crash; with the number it goes on at once.
        heartbeat_s: how often `heartbeat` will be called, at least; twice that unheard, and the node counts as gone.
        timeout_s: of one request.

    Raises:
        InvalidConfig: a key or certificates that cannot be read.
    """

    def __init__(
        self,
        address: str,
        key: bytes,
        *,
        ca: str = "",
        node_id: int | None = None,
        heartbeat_s: float = 30.0,
        timeout_s: float = 10.0,
    ) -> None:
        private = read_node_key(key)
        try:
            trusted = ssl.create_default_context(cadata=ca or None)
        except ssl.SSLError:
            raise InvalidConfig("ca is not certificates in PEM") from None
        # without Flower's check of versions, which ends the whole process where they differ
        signs = NodeAuthHttpInterceptor(private, private.public_key())
        self._http = FleetHttpClient(f"https://{address}", interceptors=[signs], verify=trusted, timeout=timeout_s)
        self._public = public_key_to_bytes(private.public_key())
        self._heartbeat_s, self._apps = heartbeat_s, dict[int, str]()
        self._node = None if node_id is None else FlowerNode(node_id=node_id)
        self._joined, self._replied = False, -math.inf

    def join(self) -> int:
        if self._node is not None:
            try:  # a heartbeat also brings back a node that was gone, and one that is there may not be activated again
                self.heartbeat()
            except NotEnrolled:  # another server, or one that lost its database
                self._node = None
        if self._node is None:
            ask = ActivateNodeRequest(public_key=self._public, heartbeat_interval=self._heartbeat_s)
            self._node = FlowerNode(node_id=_asked(self._http.ActivateNode, ask).node_id)
        self._joined = True
        return self._node.node_id

    def pull(self) -> Task | None:
        node = self._here()
        found = _asked(self._http.PullMessages, PullMessagesRequest(node=node))
        if not found.messages_list:
            return None
        message = message_from_proto(found.messages_list[0])
        run = message.metadata.run_id
        if run not in self._apps:
            self._apps[run] = _asked(self._http.GetRun, GetRunRequest(node=node, run_id=run)).run.fab_id
        kind = message.metadata.message_type.partition(".")[0]
        return Task(
            app=self._apps[run],
            kind="enrol" if kind == "query" else "train" if kind == "train" else "unknown",
            handle=_Asked(message, found.message_object_trees[0]),
        )

    def fetch(self, task: Task) -> Content:
        node, tree, run = self._here(), task.handle.tree, task.handle.message.metadata.run_id
        names = dict.fromkeys(part.object_id for part in iterate_object_tree(tree))
        raw = {name: self._object(PullObjectRequest(node=node, run_id=run, object_id=name)) for name in names}
        received = ConfirmMessageReceivedRequest(node=node, run_id=run, message_object_id=tree.object_id)
        _asked(self._http.ConfirmMessageReceived, received)
        try:
            content = cast(Message, inflate_object_from_contents(tree.object_id, raw)).content
            return Content(order=dict(config(content)), state=_read(arrays(content, "state")))
        except Exception:  # whatever it is, it is no order of ours
            return Content(order={}, state={})

    def _object(self, request: PullObjectRequest) -> bytes:
        """One object, once it is there; on this thread alone, as Flower's own helper has others that outlive it."""
        until, pause = time.monotonic() + 60.0, 0.1
        while not (found := _asked(self._http.PullObject, request)).object_available:
            if not found.object_found or time.monotonic() > until:
                raise RoundClosed("the server does not have all that it asks for")
            time.sleep(pause)
            pause = min(2 * pause, 2.0)
        return found.object_content

    def reply(self, task: Task, answer: Answer) -> None:
        node, asked = self._here(), task.handle
        reply, again = asked.reply(answer)  # the same message again when it is sent again, or the server refuses it
        run = asked.message.metadata.run_id
        with no_object_id_recompute():
            pushed = PushMessagesRequest(
                node=node,
                message_object_trees=[get_object_tree(reply)],
                messages_list=[message_to_proto(remove_content_from_message(reply))],
                clientapp_runtime_list=[0.0],
            )
            wanted = _asked(self._http.PushMessages, pushed)
            left = set(wanted.objects_to_push)
            if not (left or again):
                raise RoundClosed("the server takes no answer to this task any more")
            for name, part in get_all_nested_objects(reply).items():
                if name in left:
                    push = PushObjectRequest(
                        node=node,
                        run_id=run,
                        session_id=wanted.session_id,
                        object_id=name,
                        object_content=part.deflate(),
                    )
                    _asked(self._http.PushObject, push)
        self._replied = time.monotonic()
        with suppress(PenchantError):  # from now on it may be silent
            self.heartbeat()

    def heartbeat(self) -> None:
        beat = SendNodeHeartbeatRequest(node=self._here(), heartbeat_interval=self._heartbeat_s)
        if not _asked(self._http.SendNodeHeartbeat, beat).success:
            raise NotEnrolled("the server does not know this node any more")

    def leave(self) -> None:
        silent = time.monotonic() - self._replied < 2 * self._heartbeat_s
        if self._node is not None and self._joined and not silent:
            self._joined = False
            try:
                _asked(self._http.DeactivateNode, DeactivateNodeRequest(node_id=self._node.node_id))
            except PenchantError:
                log.debug("the server did not hear that this device left")

    def close(self) -> None:
        self._http.close()

    def _here(self) -> FlowerNode:
        if self._node is None:
            raise NotEnrolled("join first")
        return self._node


class _Asked:
    """A message of the server's without its content, the tree of its objects, and the reply once there is one."""

    def __init__(self, message: Message, tree: ObjectTree) -> None:
        message.metadata.__dict__["_message_id"] = tree.object_id
        self.message, self.tree = message, tree
        self._sent: tuple[Answer, Message] | None = None

    def reply(self, answer: Answer) -> tuple[Message, bool]:
        """The reply, and whether it was made before."""
        if self._sent is not None and self._sent[0] is answer:
            return self._sent[1], True
        made = _message(answer, self.message)
        made.metadata.__dict__["_message_id"] = made.object_id
        self._sent = answer, made
        return made, False


def _message(answer: Answer, to: Message) -> Message:
    if isinstance(answer, Refused):
        return Message(Error(REFUSED, "refused"), reply_to=to)
    if isinstance(answer, Place):
        return Message(RecordDict({"enrolment": MetricRecord({"partition": answer.number})}), reply_to=to)
    told = MetricRecord({"round": answer.round, "attempt": answer.attempt, "users": 1})
    if isinstance(answer.content, bytes):
        sealed = ArrayRecord({"sum": Array(np.frombuffer(answer.content, np.uint8))})
        return Message(RecordDict({"sealed": sealed, "diagnostics": told}), reply_to=to)
    total = ArrayRecord({name: Array(values) for name, values in answer.content.items()})
    return Message(RecordDict({"sum": total, "diagnostics": told}), reply_to=to)


def _read(record: ArrayRecord) -> Arrays:
    return {name: read_npy(array.data) for name, array in record.items()}


def _asked(method: Callable[[_Request], _Response], request: _Request) -> _Response:
    """What the server answers; what goes wrong as our errors, which carry neither an address nor a body.

    A 500 is one that may pass, like 502 to 504: the server gives it while its database is busy.
    """
    try:
        return method(request)
    except httpx.HTTPStatusError as error:
        status = error.response.status_code
        if status in (401, 404, 412):
            raise NotEnrolled(
                f"the server does not take this device ({status}): enrol it, set its clock, or end what runs as it"
            ) from None
        if status == 403:
            raise RoundClosed("the run that the task is of is over") from None
        raise Unreachable(f"the server answered {status}") from None
    except (httpx.HTTPError, OSError, RuntimeError, ValueError) as error:  # RuntimeError: closed by another thread
        raise Unreachable(f"no answer from the server: {type(error).__name__}") from None
