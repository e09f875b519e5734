"""The one place on the server side that knows Flower: our rounds as a strategy, and the ServerApp that runs it.

The strategy subclasses Flower's FedAvg and replaces what that gets wrong for private sums: who is drawn (coins of
users, not a fixed number of nodes), how replies are checked and added (never weighted by what a client says of itself),
and what a failed reply does (it is counted; the round goes on).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from penchant.common.arrays import view_npy, write_npy
from penchant.common.artifacts.sealing import RoundOpener
from penchant.common.artifacts.signing import Envelope, SigningKey
from penchant.common.errors import MalformedContribution, PenchantError
from penchant.common.learners.contract import State
from penchant.common.privacy import noise
from penchant.common.wire import Order, Reply
from penchant.server.rounds import RoundRecord, Rounds

log = logging.getLogger("penchant.server")
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
    """

    def __init__(
        self, rounds: Rounds, shards: dict[int, int], after_round: AfterRound, sealing: Sealing | None = None
    ) -> None:
        super().__init__(fraction_train=1.0, fraction_evaluate=0.0, min_available_nodes=1)
        self._rounds, self._after_round = rounds, after_round
        self._nodes = {shard: node for node, shard in shards.items()}
        self._shards = shards
        self._sealing = sealing
        self._opener: RoundOpener | None = None

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
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        try:
            record = self._rounds.close(self._read(message) for message in replies)
        finally:
            self._opener = None  # from here on nobody can open what was sealed
        if record.refused:
            log.warning("round %d: %s", record.round, dict(record.refused))
        self._after_round(record, self._rounds)
        return to_record(self._rounds.learner.released(self._rounds.state)), None

    def _read(self, message: Message) -> Reply:
        """One Flower message as our reply; whatever is wrong with it becomes a failure, never an exception."""
        shard = self._shards.get(message.metadata.src_node_id, -1)
        number, attempt = self._rounds.asked
        if message.has_error():
            log.warning("a node failed: %s", message.error.reason)
            return Reply(node=shard, round=number, attempt=attempt, arrays=None, failure="error")
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
            log.warning("%d of %d nodes are connected; the others count as absent", here, n_nodes)
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
