"""A training in a worker gives what the app's process would, stops at once, keeps its bounds, and outlives no app."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from penchant.client import _pipe
from penchant.client._conditions import Refusal
from penchant.client._outcomes import Outcome, Report
from penchant.client._participation import Participation
from penchant.client._training import TookTooLong, TooLittleMemory, Trainer, Training, TrainingFailed
from penchant.client._transport import Answer, Content, Refused, Task
from penchant.client.node import Node
from penchant.common.errors import InvalidConfig, PrivacyRefused
from penchant.common.interactions import Interactions
from penchant.common.learners import registry
from penchant.common.learners.contract import State
from penchant.common.privacy.ledger import Ledger
from penchant.common.privacy.plan import PrivacyPlan
from penchant.common.streams import Streams
from penchant.common.wire import Order
from tests.client.test_participation import (
    CATALOGUE,
    MINE,
    N_ITEMS,
    NONE,
    OWN,
    PLAN,
    WILLING,
    Server,
    device,
    ledger,
    opener,
    order,
)

MF = {"model": {"name": "mf", "dim": 4}}
LONG = {**MF, "local": {"epochs": 40_000, "batch": 1}}  # minutes
LARGE = {"model": {"name": "mf", "dim": 40_000}, "local": {"epochs": 40}}  # whose closed form is a matrix of 13 GB
NOISE = {"clip_norm": 0.5, "noise_multiplier": 2.0, "rate": 0.1, "steps": 8, "divisor": 16.0}  # as in OWN
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, and bounds memory")
ANYBODY = replace(WILLING, trust="anybody")


def started(settings: dict[str, Any]) -> State:
    learner = registry.build("fedavg", settings, CATALOGUE)
    return learner.released(learner.init(Streams(0)))


@dataclass
class Neural(Server):
    """A server that sends this model with each order."""

    state: State = field(default_factory=lambda: started(MF))

    def fetch(self, task: Task) -> Content:
        return replace(super().fetch(task), state=self.state)


def asked(settings: dict[str, Any] = MF, plan: PrivacyPlan = PLAN, round: int = 1) -> Order:
    own = {"device": NOISE} if plan.device else {}
    return order(round, plan, to=opener(round, plan), learner="fedavg", settings={**settings, **own})


def trains(server: Server, counted: Ledger, training: Training | None = None, **changed: Any) -> Participation:
    trainer = Trainer(lambda: CATALOGUE, training or Training(), seed=1)
    return device(server, trainer=trainer, ledger=counted, **{"policy": ANYBODY, **changed})


def workers(parent: int | None = None) -> list[int]:
    """Processes that train for this one, or for another."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            mine = f"PPid:\t{parent or os.getpid()}\n" in (folder / "status").read_text()
            if mine and b"penchant.client._worker" in (folder / "cmdline").read_bytes():
                found.append(int(folder.name))
        except OSError:
            continue
    return found


def until(holds: Callable[[], Any], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.01)


def loaded(pid: int) -> bool:
    """Whether a worker has PyTorch by now."""
    return "libtorch" in Path(f"/proc/{pid}/maps").read_text()


@pytest.fixture
def busy() -> Iterator[tuple[Participation, Neural, list[Outcome], threading.Thread, int, Ledger]]:
    """A device in a long training: its server, the outcome to be, who waits for it, its worker and its ledger."""
    outcomes, counted = list[Outcome](), ledger()
    server = Neural([asked(LONG), asked(round=2)], state=started(LONG))
    part = trains(server, counted)
    caller = threading.Thread(target=lambda: outcomes.append(part.once(120.0)))
    caller.start()
    until(workers)
    (worker,) = workers()
    until(lambda: loaded(worker))
    yield part, server, outcomes, caller, worker, counted
    part.stop(5.0)
    caller.join(5.0)


# --------------------------------------------------------------------------------------------------------- the same sum


@pytest.mark.parametrize("plan", [PLAN, NONE, OWN], ids=["user", "none", "interaction"])
def test_a_worker_answers_to_the_last_bit_what_the_apps_process_would(plan: PrivacyPlan) -> None:
    given = asked(plan=plan)
    state = started(dict(given.settings))
    here = Node(
        MINE,
        lambda name, settings: registry.build(name, settings, CATALOGUE),
        Streams(1),
        plan=plan,
        participations=np.array([2]),
    ).answer(given, state)
    trainer = Trainer(lambda: CATALOGUE, Training(), seed=1)
    there = trainer.answer(given, state, MINE, taken=2, look=lambda: None)
    assert there.keys() == here.keys()
    assert any(values.any() for values in here.values())
    for name, values in here.items():
        assert (there[name].dtype, there[name].tobytes()) == (values.dtype, values.tobytes())


def test_an_app_that_takes_part_loads_no_torch() -> None:
    code = """
import sys
from tests.client.test_training import Neural, asked, trains
from tests.client.test_participation import ledger
server, loaded = Neural([asked()]), "torch" in sys.modules  # the server makes the model
for name in [name for name in sys.modules if name == "torch" or ".neural" in name]:
    del sys.modules[name]
print(trains(server, ledger()).once(60.0), "torch" in sys.modules, loaded)
"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said == "took part in round 1 False True\n"


def test_what_the_worker_refuses_is_refused_as_here() -> None:
    broken = {**started(MF), "item.weight": np.full((N_ITEMS, 4), np.nan, np.float32)}
    trainer = Trainer(lambda: CATALOGUE, Training())
    with pytest.raises(PrivacyRefused, match="not finite"):
        trainer.answer(asked(), broken, MINE, taken=0, look=lambda: None)
    with pytest.raises(InvalidConfig, match="dim"):
        trainer.answer(asked({"model": {"name": "mf", "dims": 4}}), started(MF), MINE, taken=0, look=lambda: None)


# ------------------------------------------------------------------------------------------------- stopped, and bounded


@LINUX
@pytest.mark.parametrize("how", ["cancel", "stop", "withdraw"])
def test_a_training_that_is_given_up_ends_within_a_second_and_costs_nothing(how: str, busy: Any) -> None:
    part, server, outcomes, caller, worker, counted = busy
    began = time.monotonic()
    if how == "withdraw":
        part.policy = replace(part.policy, consent=False)
    elif how == "cancel":
        part.cancel()
    else:
        part.stop(wait_s=0.2)
    caller.join(1.0)
    until(lambda: not Path(f"/proc/{worker}").exists(), 1.0)
    assert time.monotonic() - began < 1.0
    assert [outcome.refusal for outcome in outcomes] == [Refusal.CANCELLED]
    assert counted.participations(0) == 0
    until(lambda: part.stop(1.0))
    if how != "cancel":
        return
    server.state = started(MF)
    assert part.once(60.0).took_part
    assert counted.participations(0) == 1


@pytest.mark.parametrize(("plan", "charged"), [(PLAN, 0), (OWN, 1)], ids=["user", "interaction"])
def test_a_training_past_its_time_is_stopped_and_charged_only_where_the_silence_may_tell_the_server_something(
    plan: PrivacyPlan, charged: int
) -> None:
    server, counted, journal = Neural([asked(LONG, plan)], state=started(LONG)), ledger(), list[Report]()
    began = time.monotonic()
    outcome = trains(server, counted, Training(time_s=0.5), plan=plan, journal=journal).once(60.0)
    assert outcome.refusal is Refusal.TRAINING_TOO_LONG
    assert time.monotonic() - began < 5.0
    assert (server.answers, journal) == ([Refused()], [])
    assert counted.participations(0) == charged


@pytest.mark.parametrize(("plan", "charged"), [(PLAN, 0), (OWN, 1)], ids=["user", "interaction"])
def test_so_is_one_that_outlives_the_deadline_or_fails(plan: PrivacyPlan, charged: int) -> None:
    counted = ledger()
    part = trains(Neural([asked(LONG, plan)], state=started(LONG)), counted, plan=plan)
    assert part.once(0.5).refusal is Refusal.OUT_OF_TIME
    assert part.stop(5.0)
    assert counted.participations(0) == charged
    counted = ledger()
    assert trains(Neural([asked(plan=plan)], state={}), counted, plan=plan).once(60.0).refusal is Refusal.FAILED
    assert counted.participations(0) == charged


@LINUX
def test_a_training_that_needs_too_much_memory_is_refused_and_the_next_round_goes_on() -> None:
    counted = ledger()
    server = Neural([asked(LARGE), asked(round=2)], state=started(LARGE))
    part = trains(server, counted, Training(memory_bytes=600 << 20))
    assert part.once(60.0).refusal is Refusal.OUT_OF_MEMORY
    assert counted.participations(0) == 0
    server.state = started(MF)
    assert part.once(60.0).took_part


class Says(Trainer):
    """Whose worker is this script."""

    script = ""

    def _started(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-c", self.script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )


READ = "import os, sys, time; from penchant.client import _pipe; _pipe.read(sys.stdin.buffer); "
HEAD = "os.write(1, (7).to_bytes(8, 'big') + b'no JSON'); "
UNREADABLE = {
    "no JSON": READ + HEAD + "time.sleep(60)",
    "no JSON, and ends": READ + HEAD,
    "no head": READ + "os.write(1, (2).to_bytes(8, 'big') + b'[]'); time.sleep(60)",
    "a size past all memory": READ + "os.write(1, b'\\xff' * 8); time.sleep(60)",
    "no array": READ
    + "import json; one = json.dumps({'arrays': ['sum']}).encode(); "
    + "os.write(1, len(one).to_bytes(8, 'big') + one + (5).to_bytes(8, 'big') + b'noise'); time.sleep(60)",
    "half an answer": READ + "os.write(1, (7).to_bytes(8, 'big')); os.close(1); time.sleep(60)",
}


@pytest.mark.parametrize("script", UNREADABLE.values(), ids=UNREADABLE)
def test_an_answer_that_cannot_be_read_fails_the_training_at_once_and_is_no_lack_of_memory(script: str) -> None:
    trainer = Says(
        lambda: CATALOGUE, Training(time_s=30.0, memory_bytes=(1 << 40) if sys.platform == "linux" else None)
    )
    trainer.script = script
    began = time.monotonic()
    with pytest.raises(TrainingFailed, match="cannot be read"):
        trainer.answer(asked(), started(MF), MINE, taken=0, look=lambda: None)
    assert time.monotonic() - began < 10.0


@LINUX
def test_a_worker_that_the_system_killed_had_too_little_memory_and_one_that_ended_failed() -> None:
    trainer = Says(lambda: CATALOGUE, Training())
    trainer.script = READ + "os.kill(os.getpid(), 9)"
    with pytest.raises(TooLittleMemory):
        trainer.answer(asked(), started(MF), MINE, taken=0, look=lambda: None)
    trainer.script = READ + "os._exit(3)"
    with pytest.raises(TrainingFailed, match="ended with 3"):
        trainer.answer(asked(), started(MF), MINE, taken=0, look=lambda: None)


def test_a_process_that_the_worker_left_behind_with_its_pipe_holds_nobody_up() -> None:
    trainer = Says(lambda: CATALOGUE, Training(time_s=3.0))
    trainer.script = READ + "import subprocess; subprocess.Popen(['sleep', '15']); time.sleep(60)"
    began = time.monotonic()
    with pytest.raises(TookTooLong):
        trainer.answer(asked(), started(MF), MINE, taken=0, look=lambda: None)
    assert time.monotonic() - began < 10.0


# -------------------------------------------------------------------------------------------------- charged, then sent


def test_what_was_trained_is_charged_before_it_leaves_and_not_where_the_moment_is_over() -> None:
    counted, seen = ledger(), list[int]()

    def before(call: str) -> None:
        if call == "reply":
            seen.append(counted.participations(0))

    assert trains(Neural([asked()], before=before), counted).once(60.0).took_part
    assert seen == [1]

    holds = [True]

    def history() -> Interactions:
        holds[0] = False
        return MINE

    part = trains(Neural([asked()]), counted, history=history)
    part._conditions = replace(part._conditions, in_window=lambda: holds[0])
    assert part.once(60.0).refusal is Refusal.OUTSIDE_WINDOW
    assert counted.participations(0) == 1


def test_a_cap_that_was_reached_meanwhile_keeps_the_answer_here() -> None:
    counted, journal = ledger(), list[Report]()

    def history() -> Interactions:  # as another process of this device might
        for number in range(PLAN.max_participations):
            counted.participate(0, number + 1, 0, None, plan=PLAN.digest, cap=PLAN.max_participations)
        return MINE

    server = Neural([asked()])
    outcome = trains(server, counted, history=history, journal=journal).once(60.0)
    assert outcome.refusal is Refusal.CAP_REACHED
    assert (server.answers, journal) == (list[Answer]([Refused()]), [])


# ------------------------------------------------------------------------------------------------------ alone and shut


@LINUX
def test_a_worker_shows_nothing_of_the_person_and_computes_with_its_threads_behind_the_app(busy: Any) -> None:
    worker = Path(f"/proc/{busy[4]}")
    shown = (worker / "cmdline").read_bytes() + (worker / "environ").read_bytes()
    columns = (MINE.items.tobytes(), MINE.items.astype("<i8").tobytes(), MINE.times.tobytes())
    assert not any(words in shown for words in (*columns, *map(str.encode, CATALOGUE.ids)))
    assert shown.endswith(b"\0")
    assert b"OMP_NUM_THREADS=1\0" in shown
    assert os.getpriority(os.PRIO_PROCESS, busy[4]) == min(19, os.getpriority(os.PRIO_PROCESS, 0) + 10)
    limits = (worker / "limits").read_text()
    assert limits.split("Max core file size")[1].split()[:2] == ["0", "0"]
    assert (worker / "oom_score_adj").read_text() == "1000\n"
    held = {os.readlink(one) for one in (worker / "fd").iterdir()}
    files = {name for name in held if name.startswith("/") and not name.startswith("/proc/")}
    assert files <= {"/dev/null"}  # else pipes alone: no file of anybody's
    # the one that computes, and the one that waits for the parent's end
    assert len(list((worker / "task").iterdir())) == 2


def test_torch_computes_with_as_many_threads_as_asked() -> None:
    code = "import torch; print(torch.get_num_threads())"
    for threads in range(1, 1 + min(2, os.cpu_count() or 1)):  # it takes no more than there are cores
        env = Trainer(lambda: CATALOGUE, Training(threads=threads)).environment()
        assert (
            int(subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, check=True).stdout)
            == threads
        )


ORPHAN = """
import threading
from tests.client.test_participation import ledger
from tests.client.test_training import LONG, Neural, asked, loaded, started, trains, until, workers
part = trains(Neural([asked(LONG)], state=started(LONG)), ledger())
threading.Thread(target=lambda: part.once(600.0)).start()
until(workers)
(worker,) = workers()
until(lambda: loaded(worker))
print(worker, flush=True)
"""


@LINUX
def test_a_worker_does_not_outlive_an_app_that_is_killed() -> None:
    with subprocess.Popen([sys.executable, "-c", ORPHAN], stdout=subprocess.PIPE, text=True) as app:
        assert app.stdout is not None
        worker = int(app.stdout.readline())
        assert workers(app.pid) == [worker]
        app.send_signal(signal.SIGKILL)
    until(
        lambda: not Path(f"/proc/{worker}").exists() or "\nState:\tZ" in Path(f"/proc/{worker}/status").read_text(), 1
    )


def test_a_worker_ends_with_its_pipe_where_no_signal_tells_it() -> None:
    given = asked(LONG)
    head = {"order": given.to_flat(), "catalogue": CATALOGUE.to_record(), "n_items": N_ITEMS, "taken": 0, "seed": None}
    history = MINE.history(0)
    arrays: State = {"items": history.items, "times": history.times, "strengths": history.strengths}
    process = Trainer(lambda: CATALOGUE, Training())._started()
    assert process.stdin is not None
    assert process.stdout is not None
    _pipe.write(process.stdin, head, {**arrays, **{f"state/{name}": values for name, values in started(LONG).items()}})
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(4)
    process.stdin.close()
    assert process.wait(1) == 1
    process.stdout.close()


# ----------------------------------------------------------------------------------------------------- where it cannot


def test_a_bound_that_nothing_holds_is_refused_where_it_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong: list[dict[str, Any]] = [{"time_s": 0.0}, {"time_s": float("nan")}, {"threads": 0}, {"memory_bytes": 0}]
    for options in wrong:
        with pytest.raises(InvalidConfig, match=next(iter(options))):
            Training(**options)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "platform", "darwin")
        with pytest.raises(InvalidConfig, match="darwin holds no bound"):
            Training(memory_bytes=1 << 30)
        Training(time_s=60.0)
    monkeypatch.setattr(sys, "executable", "/opt/films/films")
    if sys.platform == "linux":
        with pytest.raises(InvalidConfig, match="cannot start a worker"):
            Training(memory_bytes=1 << 30)


@pytest.mark.parametrize("executable", ["", "/opt/films/films"])
def test_an_app_with_python_inside_trains_in_its_own_process_and_says_that_nothing_bounds_it(
    executable: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sys, "executable", executable)
    monkeypatch.setattr(subprocess, "Popen", None)
    counted = ledger()
    assert trains(Neural([asked()]), counted).once(60.0).took_part
    assert counted.participations(0) == 1
    assert "nothing bounds it" in caplog.text


@pytest.mark.parametrize("name", ["als", "cooccurrence", "strengths", "unheard of"])
def test_a_learner_of_numpy_stays_in_the_apps_process(name: str) -> None:
    assert not Trainer(lambda: CATALOGUE, Training()).takes(name)
