"""The one place on the server side that knows Flower: our rounds as a strategy, and what runs and controls them.

server_app   the ServerApp of a simulation: all rounds, over whatever Grid it is given
operated     the ServerApp of a server in production: rounds of an operator's folder, each phase of them on disk
Control      what the operator's side asks of a SuperLink: register devices, start runs

The strategy subclasses Flower's FedAvg and replaces what that gets wrong for private sums: who is drawn (coins of
users, not a fixed number of nodes), how replies are checked and added (never weighted by what a client says of itself),
and what a failed reply does (it is counted; the round goes on). In production `exchange` takes the place of
`Grid.send_and_receive`: replies are read one at a time, and one faulty node spoils its own message alone.

Private parts of flwr are used here, which is pinned exactly; tests/server/test_flower_api.py holds what is relied on.
Its telemetry, update check and run-time dependency installation are off.
"""

from __future__ import annotations

import hashlib
import logging
import os
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, Self

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
os.environ.setdefault("FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION", "1")

import httpx
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_der_public_key,
    load_pem_public_key,
)
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MessageType, MetricRecord, RecordDict
from flwr.cli.build import build_fab_from_disk
from flwr.common.constant import ErrorCode
from flwr.proto.control_pb2 import (
    ListNodesRequest,
    ListRunsRequest,
    RegisterNodeRequest,
    StartRunRequest,
    StopRunRequest,
    UnregisterNodeRequest,
)
from flwr.proto.fab_pb2 import Fab
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, ObjectTree
from flwr.proto.message_pb2 import Message as ProtoMessage
from flwr.proto.runtime_pb2 import PullAppMessagesRequest
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
from flwr.supercore.inflatable.inflatable_protobuf_utils import make_pull_object_fn_protobuf
from flwr.supercore.inflatable.inflatable_utils import ObjectPullError, inflate_object_from_contents, pull_objects
from flwr.superlink.grid.http_grid import HttpGrid

from penchant.common.arrays import view_npy, write_npy
from penchant.common.artifacts.sealing import RoundOpener
from penchant.common.artifacts.signing import Envelope, SigningKey
from penchant.common.errors import (
    MalformedContribution,
    PenchantError,
    PrivacyRefused,
    Unreachable,
    UntrustedArtifact,
)
from penchant.common.learners.contract import State
from penchant.common.privacy import noise
from penchant.common.wire import Order, Reply
from penchant.server.rounds import RoundRecord, Rounds

log = logging.getLogger("penchant.server")
PULLS, PULL_S, MOST_OBJECTS = 8, 30.0, 64
"""Answers that are fetched at once, seconds that one may take, and pieces (of 5 MiB at most) that one may be in."""
AfterRound = Callable[[RoundRecord, Rounds], None]


@dataclass(frozen=True, kw_only=True)
class Sealing:
    """What has every answer sealed to this process: a key for each round, in memory only, and dropped after the sum.

    Attributes:
        app_id: whose devices.
        key: the release key, which signs the rounds' keys.
        certificate: the root key's word for it.
    """

    app_id: str
    key: SigningKey
    certificate: Envelope

    def opener(self, order: Order) -> RoundOpener:
        plan = order.plan
        return RoundOpener(
            self.key,
            app_id=self.app_id,
            population=plan.population,
            plan=plan.digest,
            round=order.round,
            attempt=order.attempt,
        )

    def ask(self, order: Order, opener: RoundOpener) -> Order:
        """The order with all that a device seals its answer with."""
        key, certificate = opener.statement.to_bytes().decode(), self.certificate.to_bytes().decode()
        return replace(order, round_key=key, certificate=certificate)


class PrivateSumStrategy(FedAvg):
    """Flower's round loop around our `Rounds`.

    Args:
        rounds: decides and sums.
        shards: which part of the roster each Flower node is, from its enrolment.
        after_round: called once a round is released: the place to keep a checkpoint.
        sealing: has answers sealed; one that is not counts as a failure then.

    Attributes:
        record: of the last round that was closed.
    """

    def __init__(
        self, rounds: Rounds, shards: dict[int, int], after_round: AfterRound, sealing: Sealing | None = None
    ) -> None:
        super().__init__(min_available_nodes=1)
        self.fraction_evaluate = 0.0  # given above, Flower would warn of it each round
        self._rounds, self._after_round = rounds, after_round
        self._nodes = {shard: node for node, shard in shards.items()}
        self._shards = shards
        self._sealing = sealing
        self._opener: RoundOpener | None = None
        self.record: RoundRecord | None = None

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        orders = self._rounds.open()
        if self._sealing is not None and orders:
            self._opener = opener = self._sealing.opener(next(iter(orders.values())))
            orders = {shard: self._sealing.ask(order, opener) for shard, order in orders.items()}
        return [
            Message(
                RecordDict({"state": arrays, "order": ConfigRecord(dict(order.to_flat()))}),
                dst_node_id=self._nodes[shard],
                message_type=MessageType.TRAIN,
            )
            for shard, order in orders.items()
            if shard in self._nodes  # one that never enrolled counts as absent
        ]

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message | Unanswered]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        try:
            record = self._rounds.close(self._read(message) for message in replies)
        finally:
            self._opener = None  # from here on nobody can open what was sealed
        self.record = record
        if record.refused or record.abandoned:
            told = {"round": record.round, "attempt": record.attempt, "refused": dict(record.refused)}
            log.warning("replies were left out", extra={**told, "why": record.abandoned})
        self._after_round(record, self._rounds)
        return to_record(self._rounds.learner.released(self._rounds.state)), None

    def _read(self, message: Message | Unanswered) -> Reply:
        """One Flower message as our reply; whatever is wrong with it becomes a failure, never an exception."""
        number, attempt = self._rounds.asked
        if isinstance(message, Unanswered):
            shard = self._shards[message.node]
            return Reply(node=shard, round=number, attempt=attempt, arrays=None, failure=message.why)
        shard = self._shards.get(message.metadata.src_node_id, -1)
        if message.has_error():
            why = _failure(message)
            shard = self._shards.get(message.metadata.dst_node_id, -1) if shard == -1 else shard
            return Reply(node=shard, round=number, attempt=attempt, arrays=None, failure=why)
        try:
            told: Any = message.content.metric_records["diagnostics"]  # of another type: refused below
            found = message.content.array_records
            if self._sealing is None:
                arrays = {name: view_npy(array.data) for name, array in found["sum"].items()}
            elif self._opener is None or "sealed" not in found:
                return Reply(node=shard, round=number, attempt=attempt, arrays=None, failure="unsealed")
            else:
                arrays = dict(self._opener.open(view_npy(found["sealed"]["sum"].data).tobytes()))
            return Reply(node=shard, round=int(told["round"]), attempt=int(told["attempt"]), arrays=arrays)
        except MalformedContribution:
            return Reply(node=shard, round=number, attempt=attempt, arrays=None, failure="sealed for another round")
        except Exception:  # a hostile .npy raises nearly anything
            return Reply(node=shard, round=number, attempt=attempt, arrays=None, failure="unreadable")


_FAILURES = {
    ErrorCode.NODE_UNAVAILABLE: "unavailable",
    ErrorCode.MESSAGE_UNAVAILABLE: "lost",
    ErrorCode.REPLY_MESSAGE_UNAVAILABLE: "lost",
    1000: "refused",  # our own devices' word, whatever their reason
}


def _failure(message: Message) -> str:
    return _FAILURES.get(message.error.code, "error")


@dataclass(frozen=True)
class Unanswered:
    """In place of a node's answer, where there is none.

    Attributes:
        why: "unsent" where the order could not be put where the node would find it, or what the SuperLink says.
    """

    node: int
    why: str = "unsent"


def server_app(
    rounds: Callable[[], Rounds],
    after_round: AfterRound,
    *,
    timeout_s: float = 3600.0,
    gather_s: float = 60.0,
    sealing: Sealing | None = None,
) -> ServerApp:
    """A ServerApp that runs all rounds that are left.

    Args:
        rounds: called once the app runs.
        timeout_s: how long a round waits for its nodes.
        gather_s: how long the start waits for all nodes of the roster, before it goes on with those that came.
        sealing: has answers sealed; in a simulation nothing leaves the machine, and None does without.
    """
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        noise.self_test()
        run = rounds()
        if run.n_left:
            gather(grid, run.n_nodes, gather_s)
            strategy = PrivateSumStrategy(run, enrol(grid, timeout_s), after_round, sealing)
            first = to_record(run.learner.released(run.state))
            strategy.start(grid=grid, initial_arrays=first, num_rounds=run.n_left, timeout=timeout_s)

    return app


def gather(grid: Grid, n_nodes: int, wait_s: float) -> None:
    """Waits until so many nodes are connected, or the time is over: Flower starts the ServerApp before its nodes."""
    until = time.monotonic() + wait_s
    while (here := len(list(grid.get_node_ids()))) < n_nodes:
        if time.monotonic() > until:
            log.warning("nodes that are not connected count as absent", extra={"n": n_nodes - here})
            return
        time.sleep(0.1)


def enrol(grid: Grid, timeout_s: float) -> dict[int, int]:
    """Asks every node which part of the roster it is. One whose answer cannot be read counts as absent.

    Raises:
        PenchantError: no node, or two that claim the same part.
    """
    asked = [Message(RecordDict({}), dst_node_id=node, message_type=MessageType.QUERY) for node in grid.get_node_ids()]
    shards = {}
    for reply in grid.send_and_receive(asked, timeout=timeout_s):
        found = None if reply.has_error() else reply.content.metric_records.get("enrolment")
        where = None if found is None else found.get("partition")
        if isinstance(where, int):
            shards[reply.metadata.src_node_id] = where
        else:
            log.warning("a node does not say which part of the roster it is; it counts as absent")
    if not shards or len(set(shards.values())) != len(shards):
        raise PenchantError(f"{len(shards)} nodes answered, and each must be a part of the roster of its own")
    return shards


def to_record(state: State) -> ArrayRecord:
    """Arrays as Flower has them, which every message of a round shares."""
    return ArrayRecord({name: Array(v.dtype.name, v.shape, "numpy.ndarray", write_npy(v)) for name, v in state.items()})


# -------------------------------------------------------------------------------------------------- in production


class Operated(Protocol):
    """What `operation.py` gives: a folder's rounds, and everything around them that is not Flower's."""

    settings: Any
    key: SigningKey
    certificate: Envelope

    def go_on(self) -> bool: ...
    def hold(self, why: str) -> None: ...
    def nodes(self) -> dict[int, int]: ...
    def rounds(self) -> Rounds: ...
    def publish(self) -> None: ...


def operated(operation: Callable[[], AbstractContextManager[Operated]]) -> ServerApp:
    """A ServerApp that runs the rounds of an operator's folder for as long as the operator wants some."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        try:
            noise.self_test()
            with operation() as here:
                conduct(grid, here)
        except Exception as error:  # Flower writes the traceback where the operator does not look
            log.error("rounds end by an error", exc_info=error)
            raise

    return app


def conduct(grid: Grid, here: Operated, *, sleep: Callable[[float], None] = time.sleep) -> None:
    """Round after round. What the transport does wrong ends a round and no more; what the privacy layer refuses, or our
    own files, ends them all.
    """
    _bound(grid)
    settings, retry_s = here.settings.rounds, here.settings.rounds.retry_s
    sealing = Sealing(app_id=here.settings.app_id, key=here.key, certificate=here.certificate)
    here.publish()  # what was released just before the last process ended
    while here.go_on():
        shards = {node: place for place, node in here.nodes().items()}
        if len(_online(grid) & shards.keys()) < settings.minimum:
            sleep(min(settings.retry_s, 1.0))
            continue
        rounds = strategy = None
        try:
            rounds = here.rounds()
            strategy = PrivateSumStrategy(rounds, shards, lambda record, rounds: None, sealing)
            orders = strategy.configure_train(1, to_record(rounds.learner.released(rounds.state)), ConfigRecord(), grid)
            strategy.aggregate_train(
                1, exchange(grid, orders, settings.deadline_s, minimum=settings.minimum, sleep=sleep)
            )
        except PrivacyRefused as error:
            log.error("no round", extra={"why": str(error)})
            if rounds is not None and rounds.is_open:
                rounds.abandon("refused for privacy")
            here.hold(str(error))
            return
        if strategy.record is not None and not strategy.record.abandoned:
            here.publish()
            retry_s = settings.retry_s
            sleep(settings.pause_s)
        else:
            _rest(here, retry_s, sleep)
            retry_s = min(2 * retry_s, 3600.0)


def exchange(
    grid: Grid,
    messages: Iterable[Message],
    deadline_s: float,
    *,
    minimum: int = 0,
    now: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> Iterator[Message | Unanswered]:
    """Sends orders and gives answers as they come, until all are there or the time is over. It raises nothing.

    An order is sent when its node is connected, and none before so many are, so that no device spends a try on a round
    that cannot be. Each goes out alone: a node that spoils the objects of its message (one that confirms it before they
    are all there does) is one that could not be asked, and no other's. So is each answer fetched, in one of a few
    threads and for PULL_S at most: one that is never whole, or none, is its node's alone.

    An order is good until the deadline, so that one nobody fetched is not trained on later.
    """
    began = now()
    until, due, begun = began + deadline_s, began, minimum == 0
    pending = {message.metadata.dst_node_id: message for message in messages}
    waiting, pulled = dict[str, int](), dict[Future[Message], int]()
    listed = deque[tuple[int, Callable[[], Message]]]()
    pool = ThreadPoolExecutor(PULLS, "penchant-pull")
    try:
        while (pending or waiting or listed or pulled) and now() < until:
            if now() >= due and (pending or waiting):
                here = _online(grid) & pending.keys() if pending else set[int]()
                begun = begun or len(here) >= minimum
                for node in sorted(here) if begun else ():
                    if sent := _sent(grid, pending.pop(node), deadline_s):
                        waiting[sent] = node
                    else:
                        yield Unanswered(node)
                for asked, pull in _answers(grid, list(waiting)) if waiting and not listed else ():
                    if asked in waiting:  # else a second answer to the same order
                        listed.append((waiting.pop(asked), pull))
                due = now() + min(0.2 + (now() - began) / 20, 3.0)
            while listed and len(pulled) < PULLS:  # no more than can be summed soon lie in memory
                node, pull = listed.popleft()
                pulled[pool.submit(pull)] = node
            if (done := next((future for future in pulled if future.done()), None)) is not None:
                yield _answer(done, pulled.pop(done))
            elif pending or waiting or pulled:
                sleep(max(0.0, min(0.05 if pulled else due - now(), until - now())))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    for node in pending:
        yield Unanswered(node, "unavailable")
    for node in (*pulled.values(), *(node for node, _ in listed)):
        yield Unanswered(node, "lost")


def _online(grid: Grid) -> set[int]:
    """Nodes that are connected; none where that cannot be told now."""
    try:
        return set(grid.get_node_ids())
    except Exception as error:  # of Flower's and its HTTP client's many
        log.warning("devices could not be listed", exc_info=error)
        return set()


def _sent(grid: Grid, message: Message, ttl_s: float) -> str:
    """The number of an order that was sent; "" for one that was not."""
    message.metadata.ttl = ttl_s
    try:
        return next(iter(grid.push_messages([message])), "") or ""
    except Exception as error:
        log.warning("an order was not sent", exc_info=error)
        return ""


def _answers(grid: Grid, asked: list[str]) -> list[tuple[str, Callable[[], Message]]]:
    """Which of these orders have an answer, and what fetches it.

    Flower's own `pull_messages` fetches all at once, waits up to two hours for objects that never come, and loses every
    answer where one cannot be read.
    """
    try:
        if not isinstance(grid, HttpGrid):
            found = {one.metadata.reply_to_message_id: one for one in grid.pull_messages(asked)}
            return [(name, partial(found.pop, name)) for name in found]
        told = grid._runtime_client.PullMessages(PullAppMessagesRequest(message_ids=asked))
    except Exception as error:
        log.warning("answers could not be fetched", exc_info=error)
        return []
    pairs = zip(told.messages_list, told.message_object_trees, strict=True)
    return [(one.metadata.reply_to_message_id, partial(_pulled, grid, one, tree)) for one, tree in pairs]


def _pulled(grid: HttpGrid, told: ProtoMessage, tree: ObjectTree) -> Message:
    client, run_id, name = grid._runtime_client, grid.run.run_id, told.metadata.message_id
    objects = [one.object_id for one in islice(iterate_object_tree(tree), MOST_OBJECTS + 1)]
    if len(objects) > MOST_OBJECTS:
        raise MalformedContribution(f"an answer in more than {MOST_OBJECTS} pieces")
    fetch = make_pull_object_fn_protobuf(pull_object_protobuf=client.PullObject, node=grid.node, run_id=run_id)
    contents = pull_objects(objects, fetch, max_time=PULL_S)
    client.ConfirmMessageReceived(ConfirmMessageReceivedRequest(node=grid.node, run_id=run_id, message_object_id=name))
    message = inflate_object_from_contents(name, contents)
    if not isinstance(message, Message):
        raise MalformedContribution("an answer that is no message")
    return message


def _answer(done: Future[Message], node: int) -> Message | Unanswered:
    """What a node answered, if it can be read and is this node's."""
    try:
        message = done.result()
    except ObjectPullError:
        return Unanswered(node, "lost")
    except Exception as error:  # what a hostile answer is inflated to raises nearly anything
        log.warning("an answer could not be read", exc_info=error)
        return Unanswered(node, "unreadable")
    if message.metadata.src_node_id == node:
        return message
    return Unanswered(node, _failure(message) if message.has_error() else "unreadable")  # the SuperLink's, or a lie


def _rest(here: Operated, seconds: float, sleep: Callable[[float], None]) -> None:
    """Waits before the next try, and no longer than the operator wants rounds at all."""
    until = time.monotonic() + seconds
    while time.monotonic() < until and here.go_on():
        sleep(min(0.5, seconds))


def _bound(grid: Grid, seconds: float = 120.0) -> None:
    """Flower's calls try for ever when the server is away; ours end."""
    if (retry := getattr(grid, "_retry_invoker", None)) is not None:
        retry.max_time = seconds


# ------------------------------------------------------------------------------------------------------- control


@dataclass(frozen=True)
class Node:
    """A device as Flower knows it. `key`: SubjectPublicKeyInfo in DER. `status`: "online", "offline" or other."""

    id: int
    key: bytes
    status: str


class Control:
    """Flower's Control API, which has no authentication and must be reached over this machine's own address alone.

    Args:
        address: "host:port" of the SuperLink.
        ca: certificates in PEM that its own must chain to.

    Raises:
        Unreachable: of every call; the SuperLink does not answer, or not as it should.
    """

    def __init__(self, address: str, ca: bytes, *, timeout_s: float = 20.0) -> None:
        self._client = ControlHttpClient.from_server_address(address, False, ca, [])
        self._timeout_s = timeout_s

    def register(self, key: bytes) -> int:
        """Lets a device with this key in; the number that Flower gives it, also where it has one.

        Raises:
            UntrustedArtifact: the key was taken out before, and Flower lets no such key in again.
        """
        public = load_der_public_key(key).public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        try:
            return int(self._call(lambda: self._client.RegisterNode(RegisterNodeRequest(public_key=public))).node_id)
        except Unreachable:
            known = [node for node in self._all_nodes() if node.key == key]
            if not known:
                raise
            if known[0].status == "unregistered":
                raise UntrustedArtifact("Flower lets no key in again that was taken out") from None
            return known[0].id  # it was let in before, and the answer was lost

    def unregister(self, node_id: int) -> None:
        """Lets a device in no longer; one that is not there is no error."""
        try:
            self._call(lambda: self._client.UnregisterNode(UnregisterNodeRequest(node_id=node_id)))
        except Unreachable:
            if any(node.id == node_id for node in self.nodes()):
                raise

    def nodes(self) -> list[Node]:
        """Every device that is let in."""
        return [node for node in self._all_nodes() if node.status != "unregistered"]

    def _all_nodes(self) -> list[Node]:
        return [
            Node(
                one.node_id,
                load_pem_public_key(one.public_key).public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo),
                one.status,
            )
            for one in self._call(lambda: self._client.ListNodes(ListNodesRequest())).nodes_info
        ]

    def start(self, app: Path) -> int:
        """Submits a folder that holds a pyproject alone; the run's number."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of flwr's own making
            bundle = build_fab_from_disk(app)
        fab = Fab(hash_str=hashlib.sha256(bundle).hexdigest(), content=bundle)
        return int(self._call(lambda: self._client.StartRun(StartRunRequest(fab=fab))).run_id)

    def stop(self, run_id: int) -> None:
        self._call(lambda: self._client.StopRun(StopRunRequest(run_id=run_id)))

    def status(self, run_id: int) -> str:
        """ "pending", "starting", "running", or how it ended: "completed", "failed", "stopped"; "" for one unknown."""
        found = self._call(lambda: self._client.ListRuns(ListRunsRequest(limit=50))).run_dict  # the newest
        if run_id not in found:
            return ""
        status = found[run_id].status
        return str(status.sub_status if status.status == "finished" else status.status)

    def close(self) -> None:
        self._client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _call(self, ask: Callable[[], Any]) -> Any:
        try:
            return ask()
        except httpx.HTTPError as error:
            raise Unreachable(f"the SuperLink did not do it ({type(error).__name__}): see penchant doctor") from None
