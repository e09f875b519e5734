"""Training in a process of its own, which can be stopped at any time and has bounds that the system holds.

    order, state, history ──► pipe ──► worker (`_worker.py`): the same node, torch loaded there ──► pipe ──► the sum

A learner that trains with PyTorch is computed there; one of NumPy takes milliseconds and stays in the app's process,
which so never loads torch. Cancelled, over its time or without its parent, the worker is killed: no thread must come to
a place where it looks whether it was.

What holds the bounds: time, the parent's clock and SIGKILL; memory, RLIMIT_DATA, which on Linux counts all that a
process can write for itself alone, heap and mappings (`getrlimit(2)`); threads, the settings that OpenMP, MKL and
OpenBLAS read as they start, which are also what torch's pool goes by.
"""

from __future__ import annotations

import logging
import math
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from penchant.client import _pipe
from penchant.common import errors
from penchant.common.arrays import Arrays
from penchant.common.catalogue import Catalogue
from penchant.common.errors import InvalidConfig, PenchantError
from penchant.common.interactions import Interactions
from penchant.common.learners import registry
from penchant.common.learners.contract import State
from penchant.common.wire import Order

log = logging.getLogger("penchant.client")
_LOOK_S = 0.05
"""Between two looks whether to go on."""
_END_S = 1.0
"""That a worker without an answer has to end, and after its end what read from it."""
_KILLED = -9


class TookTooLong(Exception):
    """The training was stopped at its time."""


class TooLittleMemory(Exception):
    """The training needed more memory than it has."""


class TrainingFailed(PenchantError):
    """The worker could not train. The message names an error's type, and nothing of the person."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """How much of the device one training may take. None of it changes what is computed.

    Attributes:
        time_s: from start to end, loading PyTorch (some seconds) included.
        memory_bytes: that the training may write, of which PyTorch itself takes some 300 MB; None for no bound. Linux
            alone holds one.
        threads: that it computes with.

    Raises:
        InvalidConfig: a number out of range, or a bound on memory that this platform does not hold.
    """

    time_s: float = 600.0
    memory_bytes: int | None = None
    threads: int = 1

    def __post_init__(self) -> None:
        if not 0 < self.time_s < math.inf:
            raise InvalidConfig(f"time_s must be positive and finite, not {self.time_s}")
        if self.threads < 1:
            raise InvalidConfig(f"threads must be ≥ 1, not {self.threads}")
        if self.memory_bytes is None:
            return
        if self.memory_bytes < 1:
            raise InvalidConfig(f"memory_bytes must be positive, or None for no bound, not {self.memory_bytes}")
        if sys.platform != "linux":
            raise InvalidConfig(f"{sys.platform} holds no bound on a process's memory: leave memory_bytes out")
        if not can_start():
            raise InvalidConfig("an app with Python inside cannot start a worker to bound: leave memory_bytes out")


def can_start() -> bool:
    """Whether this process's executable is a Python, and not an app that has one inside and would start itself anew."""
    name = Path(sys.executable or "").stem.lower()
    return name.startswith(("python", "pypy")) and not getattr(sys, "frozen", False)


class Trainer:
    """Starts a worker for each training.

    Args:
        catalogue: in use now.
        seed: of the worker's streams, in tests alone; None asks the operating system.
    """

    def __init__(self, catalogue: Callable[[], Catalogue], training: Training, *, seed: int | None = None) -> None:
        self._catalogue, self._training, self._seed = catalogue, training, seed
        if not can_start():
            log.warning("no Python to start a worker with: training stays in the app's process, and nothing bounds it")

    def takes(self, learner: str) -> bool:
        """Whether this learner is trained in a worker here."""
        return registry.is_neural(learner) and can_start()

    def answer(
        self, order: Order, state: State, histories: Interactions, *, taken: int, look: Callable[[], None]
    ) -> Arrays:
        """The sum that one person's node answers with. Nothing of it is charged.

        Args:
            histories: a population of one.
            taken: how often this person took part under the plan before.
            look: called again and again; the worker is killed when it raises, and what it raised is raised.

        Raises:
            TookTooLong, TooLittleMemory: a bound was met.
            TrainingFailed: the worker failed otherwise.
            PenchantError: as `Node.answer`.
        """
        history = histories.history(0)
        head = {
            "order": order.to_flat(),
            "catalogue": self._catalogue().to_record(),
            "n_items": histories.n_items,
            "taken": taken,
            "seed": self._seed,
        }
        arrays = {
            "items": history.items,
            "times": history.times,
            "strengths": history.strengths,
            **{f"state/{name}": values for name, values in state.items()},
        }
        end = time.monotonic() + self._training.time_s
        found: queue.SimpleQueue[tuple[dict[str, Any], Arrays] | None] = queue.SimpleQueue()
        process, ended = self._started(), None
        talk = threading.Thread(target=_talk, args=(process, head, arrays, found), daemon=True)
        try:
            talk.start()
            while True:
                with suppress(queue.Empty):
                    answer = found.get(timeout=_LOOK_S)
                    break
                look()
                if time.monotonic() >= end:
                    raise TookTooLong
            if answer is None:
                with suppress(subprocess.TimeoutExpired):
                    ended = process.wait(_END_S)  # as it does by itself, which says why
        finally:
            process.kill()
            process.wait()
            if talk.is_alive():
                talk.join(_END_S)
            if not talk.is_alive():  # else another process has the pipes: whoever reads closes them after it
                _close(process)
        if answer is not None:
            return _read(*answer)
        if not ended:  # it goes on, or thinks that it answered
            raise TrainingFailed("the worker's answer cannot be read")
        if self._training.memory_bytes or ended == _KILLED:
            raise TooLittleMemory  # where no Python could say so any more: C++ aborts, and the system kills
        raise TrainingFailed(f"the worker ended with {ended} before it answered")

    def environment(self) -> dict[str, str]:
        """A worker's: this process's, the number of threads, and where it finds what is imported here."""
        names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
        threads = dict.fromkeys(names, str(self._training.threads))
        return {**os.environ, **threads, "PYTHONPATH": os.pathsep.join(part for part in sys.path if part)}

    def _started(self) -> subprocess.Popen[bytes]:
        quiet = 0
        if sys.platform == "win32":
            quiet = subprocess.BELOW_NORMAL_PRIORITY_CLASS | subprocess.CREATE_NO_WINDOW
        return subprocess.Popen(
            [sys.executable, "-P", "-m", "penchant.client._worker", str(self._training.memory_bytes or 0)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # a traceback may hold values
            env=self.environment(),
            creationflags=quiet,
        )


def _talk(
    process: subprocess.Popen[bytes],
    head: dict[str, Any],
    arrays: Arrays,
    found: queue.SimpleQueue[tuple[dict[str, Any], Arrays] | None],
) -> None:
    """Gives a worker its work and waits for what it says; None where that is nothing that can be read."""
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        _pipe.write(process.stdin, head, arrays)
        found.put(_pipe.read(process.stdout))
    except Exception:  # whatever it is, the training is over
        found.put(None)
    if process.poll() is not None:  # nobody may wait for this any more
        _close(process)


def _close(process: subprocess.Popen[bytes]) -> None:
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with suppress(OSError):  # what was not read any more
                pipe.close()


def _read(said: dict[str, Any], total: Arrays) -> Arrays:
    """The sum that was answered; else as `Trainer.answer` raises."""
    if "error" not in said:
        return total
    if said["error"] == "MemoryError":
        raise TooLittleMemory
    kind = getattr(errors, said["error"], None) if said["error"] else None
    if kind is None:
        raise TrainingFailed(said["detail"])
    error: PenchantError = kind.__new__(kind, said["detail"])  # some take more to make than their words
    raise error
