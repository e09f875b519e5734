"""The one place in the simulations that knows Flower: the two engines that run a ServerApp with its ClientApps.

local   our own Grid in this process: a round's messages are answered by a few threads, their order kept
flower  Flower's simulation engine on Ray: the very same apps in worker processes, on one machine or a cluster

Telemetry, update check and run-time dependency installation are off before Flower is imported.
"""

from __future__ import annotations

import logging
import os
import socket
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import count

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
os.environ.setdefault("FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION", "1")

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid, ServerApp
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from penchant.common.errors import InvalidConfig, MissingExtra, PenchantError

_RUN = 1


class LocalGrid(Grid):
    """A Grid without network, processes or polling: nodes are contexts, and sending a message is a call.

    Args:
        app: runs on every node.
        n_nodes: how many; each keeps one Context for the whole run, as real nodes do.
        threads: nodes that answer at the same time. A node answers one message at a time.
    """

    def __init__(self, app: ClientApp, n_nodes: int, threads: int = 1) -> None:
        self._app = app
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="penchant-node")
        self._contexts = {
            node: Context(
                run_id=_RUN,
                node_id=node,
                node_config={"partition-id": node - 1, "num-partitions": n_nodes},
                state=RecordDict(),
                run_config={},
            )
            for node in range(1, n_nodes + 1)
        }
        self._ids, self._replies = count(1), dict[str, Message]()
        self.set_run(Run.create_empty(_RUN))
        # Message() reads this process-wide identity and fails without it
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = _RUN, 1, 1

    def close(self) -> None:
        """Waits for nodes that still answer, and ends their threads."""
        self._pool.shutdown()

    def set_run(self, run: Run) -> None:
        self._run = run

    @property
    def run(self) -> Run:
        return self._run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        return list(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        batch = {f"m{next(self._ids)}": message for message in messages}
        for name, message in batch.items():
            message.metadata.__dict__["_message_id"] = name
        self._replies.update(zip(batch, self._pool.map(self._answer, batch.values()), strict=True))
        return list(batch)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return [self._replies.pop(name) for name in list(message_ids) if name in self._replies]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        return self.pull_messages(self.push_messages(messages))

    def _answer(self, message: Message) -> Message:
        try:
            return self._app(message, self._contexts[message.metadata.dst_node_id])
        except Exception as error:  # as on every engine of Flower's: an error reply, not a crash
            logging.getLogger("penchant.simulations").exception("a node failed")
            return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, type(error).__name__), reply_to=message)


def run_local(server: ServerApp, client: ClientApp, n_nodes: int) -> None:
    """Runs both apps in this process, a thread for each core."""
    with _quiet_flower():
        grid = LocalGrid(client, n_nodes, threads=os.cpu_count() or 1)
        try:
            server(grid, Context(run_id=_RUN, node_id=0, node_config={}, state=RecordDict(), run_config={}))
        finally:
            grid.close()


def run_flower(server: ServerApp, client: ClientApp, n_nodes: int, *, gpus: float = 0.0) -> None:
    """Runs both apps on Flower's simulation engine; an error of the ServerApp is raised here.

    The workers are those of the Ray cluster that RAY_ADDRESS names, or of one that is started for the run.

    Args:
        gpus: share of a GPU that a worker takes.

    Raises:
        MissingExtra: Ray is not installed.
        InvalidConfig: nothing answers at RAY_ADDRESS.
    """
    try:
        import ray  # noqa: F401  # Flower reports its absence only after start-up
        from flwr.simulation import run_simulation
    except ImportError:
        raise MissingExtra("ray", "ray") from None
    _find(os.environ.get("RAY_ADDRESS", ""))
    failures: list[BaseException] = []
    guarded = ServerApp()

    @guarded.main()
    def main(grid: Grid, context: Context) -> None:
        try:
            server(grid, context)
        except BaseException as error:  # Flower would log it and say that all is well
            failures.append(error)
            raise

    with _quiet_flower(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations inside Flower and Ray
        resources = {"client_resources": {"num_cpus": 1, "num_gpus": gpus}}
        try:
            run_simulation(guarded, client, n_nodes, backend_config=resources)  # type: ignore[arg-type]  # invariant dict
        except Exception as error:
            if not failures:
                raise PenchantError(f"Flower's engine failed: {error}") from error
    if failures:
        raise failures[0]


def _find(address: str) -> None:
    """Refuses a HOST:PORT where nothing listens; Ray would try it for minutes, deaf to signals."""
    host, _, port = address.rpartition(":")
    if not (host and port.isdigit()):  # Ray's own words, such as auto
        return
    try:
        socket.create_connection((host.rpartition("/")[2].strip("[]"), int(port)), timeout=5.0).close()
    except OSError:
        raise InvalidConfig(
            f"no Ray cluster answers at RAY_ADDRESS={address}: start it there, or unset RAY_ADDRESS"
        ) from None


@contextmanager
def _quiet_flower() -> Iterator[None]:
    """Flower's own log at warnings only; ours tells the rounds."""
    log = logging.getLogger("flwr")
    level = log.level
    log.setLevel(logging.ERROR if level <= logging.INFO else level)
    try:
        yield
    finally:
        log.setLevel(level)
