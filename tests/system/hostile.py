"""A device that is enrolled and answers as none of ours does: over the edge, in real rounds, in Flower's messages."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, Error, Message, MetricRecord, RecordDict
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, PushObjectRequest, PushObjectResponse
from flwr.supercore.protobuf.client import ProtobufRequestContext
from flwr.supercore.protobuf.constants import PROTOBUF_MEDIA_TYPE
from google.protobuf.empty_pb2 import Empty

from penchant.client._enrolment import enrol, revoke
from penchant.client._flower import Fleet
from penchant.client._transport import Place, Task, new_node_key
from penchant.client.node import Node
from penchant.common.artifacts.bundle import App
from penchant.common.artifacts.sealing import RoundKey, seal
from penchant.common.artifacts.signing import Certificate, Envelope
from penchant.common.errors import PenchantError
from penchant.common.interactions import Interactions
from penchant.common.learners import registry as learners
from penchant.common.privacy.plan import PrivacyPlan
from penchant.common.streams import Streams
from penchant.common.wire import Order
from tests.server.operators import CATALOGUE
from tests.system.site import Site

Arrays = Mapping[str, Any]


@dataclass(frozen=True)
class Answer:
    """What a reply is made of.

    Attributes:
        total: what an honest device would send.
        before: the order of an earlier round, where one was kept.
    """

    task: Task
    order: Order
    total: dict[str, Any]
    app: App
    before: Order | None = None

    def sealed(self, total: Arrays | None = None, order: Order | None = None) -> RecordDict:
        order = order or self.order
        statement = Envelope.from_bytes(order.round_key.encode())
        certificate = Certificate.read(Envelope.from_bytes(order.certificate.encode()), self.app.root)
        data = seal(self.total if total is None else total, statement, RoundKey.read(statement, certificate.public_key))
        return self.of(np.frombuffer(data, np.uint8))

    def of(self, data: Any) -> RecordDict:
        array = data if isinstance(data, Array) else Array(data)
        return RecordDict({"sealed": ArrayRecord({"sum": array})})

    def reply(self, content: RecordDict, **told: int) -> Message:
        told = {"round": self.order.round, "attempt": self.order.attempt, "users": 1, **told}
        content["diagnostics"] = MetricRecord(dict(told))
        return Message(content, reply_to=self.task.handle.message)

    def honest(self) -> Message:
        return self.reply(self.sealed())

    def each(self, change: Callable[[Any], Any]) -> Message:
        """With every array changed."""
        return self.reply(self.sealed({name: change(values) for name, values in self.total.items()}))


Way = Callable[[Answer], Message]


def plain(answer: Answer) -> Message:
    arrays = ArrayRecord({name: Array(np.asarray(values)) for name, values in answer.total.items()})
    return answer.reply(RecordDict({"sum": arrays}))


def without_diagnostics(answer: Answer) -> Message:
    return Message(answer.sealed(), reply_to=answer.task.handle.message)


REPLIES: dict[str, tuple[Way, str]] = {
    "wrong keys": (lambda a: a.reply(a.sealed({"other": next(iter(a.total.values()))})), "malformed"),
    "a key too many": (
        lambda a: a.reply(a.sealed({**a.total, "other": np.zeros(3, np.float32)})),
        "malformed",
    ),
    "no arrays": (lambda a: a.reply(a.sealed({})), "malformed"),
    "wrong shape": (lambda a: a.each(lambda v: np.zeros(np.size(v) + 1, np.asarray(v).dtype)), "malformed"),
    "wrong dtype": (lambda a: a.each(lambda v: np.zeros(np.shape(v), np.int64)), "malformed"),
    "NaN": (lambda a: a.each(lambda v: np.full_like(v, np.nan)), "malformed"),
    "infinite": (lambda a: a.each(lambda v: np.full_like(v, np.inf)), "malformed"),
    "8 MB in place of its arrays": (lambda a: a.each(lambda v: np.zeros(2 << 20, np.float32)), "malformed"),
    "of another round": (lambda a: a.reply(a.sealed(), round=a.order.round + 90), "wrong round"),
    "of another try": (lambda a: a.reply(a.sealed(), attempt=a.order.attempt + 7), "wrong round"),
    "not sealed": (plain, "unsealed"),
    "sealed to the round before": (lambda a: a.reply(a.sealed(order=a.before)), "sealed for another round"),
    "random bytes as what is sealed": (
        lambda a: a.reply(a.of(np.frombuffer(secrets.token_bytes(4096), np.uint8))),
        "sealed for another round",
    ),
    "an array that is none": (
        lambda a: a.reply(a.of(Array("uint8", (64,), "numpy.ndarray", b"\x93NUMPY" + secrets.token_bytes(64)))),
        "unreadable",
    ),
    "without its round": (without_diagnostics, "unreadable"),
    "an error of its own": (lambda a: Message(Error(2, "why"), reply_to=a.task.handle.message), "error"),
}
"""Over the wire, each with the reason that it is counted by."""


class Hostile:
    """Enrolled on a place of its own, which is the same each time. `close` it: it is revoked then."""

    def __init__(self, site: Site) -> None:
        self.site, self.key = site, new_node_key()
        found = enrol(site.app, site.token(subject="hostile"), self.key, deadline_s=20.0)
        self.plan = PrivacyPlan.from_json(found.plan)
        self.place = Place(found.place)
        self.line = Fleet(site.app.fleet, self.key, ca=site.app.ca)
        self.line.join()

    def close(self) -> None:
        revoke(self.site.app, self.key, deadline_s=20.0)
        self.line.close()

    def task(self, seconds: float = 60.0, poll_s: float = 0.1) -> Task:
        """The next round's."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            try:
                task = self.line.pull()
            except PenchantError:
                task = None
            if task is not None and task.kind == "train":
                return task
            time.sleep(poll_s)
        raise AssertionError(f"no round within {seconds} s")

    def asked(self) -> Answer:
        """The next round's order, fetched, and what an honest device would answer."""
        task = self.task()
        content = self.line.fetch(task)
        order = Order.from_flat(content.order)
        person = Interactions.of([list(range(20))], len(CATALOGUE))
        node = Node(
            person, lambda name, settings: learners.build(name, settings, CATALOGUE), Streams(0), plan=self.plan
        )
        return Answer(task, order, dict(node.answer(order, content.state)), self.site.app)

    def send(self, task: Task, message: Message) -> None:
        """Any message as the reply to a task."""
        answer: Any = object()
        message.metadata.__dict__["_message_id"] = message.object_id
        task.handle._sent = (answer, message)
        self.line.reply(task, answer)

    def half(self, task: Task, message: Message) -> None:
        """As `send`, but one of its objects is kept back for ever."""
        push, pushed = self.line._http.PushObject, list[PushObjectRequest]()

        def all_but_the_second(request: PushObjectRequest) -> PushObjectResponse:
            pushed.append(request)
            return PushObjectResponse(stored=True) if len(pushed) == 2 else push(request)

        setattr(self.line._http, "PushObject", all_but_the_second)  # noqa: B010  # a method, for mypy
        try:
            self.send(task, message)
        finally:
            setattr(self.line._http, "PushObject", push)  # noqa: B010  # likewise
        assert len(pushed) > 2

    def confirm(self, task: Task) -> None:
        """That all of a task was received, whether or not it was."""
        assert self.line._node is not None
        self.line._http.ConfirmMessageReceived(
            ConfirmMessageReceivedRequest(
                node=self.line._node,
                run_id=task.handle.message.metadata.run_id,
                message_object_id=task.handle.tree.object_id,
            )
        )

    def garbage(self, path: str, size: int = 4096) -> int:
        """Random bytes to one of the fleet's paths, signed as this device's; the status."""
        client = self.line._http
        request = client._client.build_request(
            "POST",
            f"https://{self.site.app.fleet}{path}",
            content=secrets.token_bytes(size),
            headers={"content-type": PROTOBUF_MEDIA_TYPE, "accept": PROTOBUF_MEDIA_TYPE},
        )
        return client._send(ProtobufRequestContext(rpc_method="", message=Empty(), request=request)).status_code
