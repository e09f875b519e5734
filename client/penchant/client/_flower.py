"""The one place on the client side that knows Flower: messages in, our orders out, and back.

The ClientApp is part of the installed package. It runs no code from the network.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from penchant.client.node import Node
from penchant.common.arrays import read_npy, view_npy, write_npy
from penchant.common.errors import PenchantError
from penchant.common.wire import Order

log = logging.getLogger("penchant.client")
_COUNTS = "penchant.participations"
REFUSED = 1000  # our own error code; Flower's end far below


def client_app(node: Callable[[int], Node]) -> ClientApp:
    """A ClientApp that answers orders for the people hosted here, and tells which shard of the roster they are.

    Args:
        node: the host of a shard, by its number.
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
