"""The other ways to do `penchant bench`'s work, for peers.py: a plain PyTorch loop, and Flower's simulation on Ray.

    w1   each person: a full copy of the model, one epoch of SGD with dense gradients, the difference clipped and added
    w2   each person: 13 steps of Opacus' DP-SGD with ghost clipping, a sample for each group, batches by coins

Both do the same in each message or turn of the loop, `Worker.update`, and differ in how that is called. They draw the
people that penchant's plan draws in the same round, start from its weights and have its histories. A module of its own,
so that Ray's workers find it by name and keep a worker's model and histories between messages.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MessageType, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from torch import Tensor
from torch.func import functional_call

from penchant.common import config
from penchant.common.arrays import Int64
from penchant.common.interactions import Interactions
from penchant.common.learners.neural.models import InterestModel, ModelConfig, build, group_loss
from penchant.common.learners.training import LocalTraining
from penchant.common.learners.training import groups as groups_of
from penchant.common.privacy.plan import task_digest
from penchant.common.privacy.sampling import draw
from penchant.common.streams import Streams
from penchant.server.rounds import Progress
from penchant.simulations import engine
from penchant.simulations._flower import run_flower
from penchant.simulations.bench import histories, machine
from penchant.simulations.bench.workloads import GROUPS, LOCAL, MODEL, NEGATIVES, STEPS, Workload, workload
from penchant.simulations.engine import Population
from penchant.simulations.plans import Federated

Weights = dict[str, Tensor]
LR, CLIP = 0.1, 1.0
EXACT = 1e-6  # a noise multiplier that stands for none, where a mechanism refuses 0


def streams(seed: int) -> Streams:
    """Where the server of `penchant bench` draws from."""
    return Streams(seed).child("bench").child("server")


def cohorts(work: Workload, seed: int) -> list[Int64]:
    """The people of each round, as the plan draws them."""
    plan, taken = work.row().plan, np.zeros(work.shape.users, np.int64)
    return [draw(plan, number, 0, taken, streams(seed)) for number in range(1, work.rounds + 1)]


def first_weights(work: Workload, seed: int) -> Weights:
    model = build(ModelConfig(**MODEL), work.shape.items, streams(seed).seed("weights"))
    return {name: p.detach().clone() for name, p in model.named_parameters()}


# ------------------------------------------------------------------------------------------------------------ a person


class Worker:
    """One model that every person of this process is trained in, in turn.

    Args:
        noise: multiplier of w2's steps.
        clip: of w1's difference or of w2's gradients.
    """

    def __init__(self, unit: str, people: Interactions, *, noise: float = 1.0, clip: float = CLIP) -> None:
        self.people, self.clip, self.steps = people, clip, 0
        self.model = build(ModelConfig(**MODEL), people.n_items, 0)
        self.parameters = dict(self.model.named_parameters())
        self.shared = [name for name in self.parameters if name not in self.model.private]
        self.optimizer: Any = torch.optim.SGD(self.model.parameters(), lr=LR)
        self.own = np.zeros(people.n_items, bool)  # whether an item is the person's
        self.dp = None if unit == "user" else _Opacus(self.model, self.optimizer, noise, clip)

    def update(self, weights: Weights, user: int, random: np.random.Generator, groups: Tensor | None = None) -> Weights:
        """What the person sends: the difference of the shared weights, clipped or private by itself.

        Args:
            groups: int64[n, 1 + k] to train on instead of drawn ones.
        """
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(weights[name])
        items = self.people.history(user).items
        if self.dp is None:
            self._epoch(self._groups(items, random) if groups is None else groups)
        else:
            for _ in range(STEPS):
                chosen = items[random.random(len(items)) < 1 / STEPS]
                drawn = random.integers(0, len(self.own), (len(chosen), NEGATIVES))
                self.dp.step(torch.from_numpy(np.column_stack([chosen, drawn]).astype(np.int64)))
                self.steps += 1
        with torch.no_grad():
            change = {name: self.parameters[name] - weights[name] for name in self.shared}
            if self.dp is None:
                length = torch.stack([part.square().sum() for part in change.values()]).sum().sqrt()
                scale = min(1.0, self.clip / max(float(length), 1e-12))
                change = {name: part * scale for name, part in change.items()}
        return change

    def _epoch(self, groups: Tensor) -> None:
        for batch in torch.split(groups, GROUPS):
            self.optimizer.zero_grad()
            loss = group_loss(self.model(batch[:, :0], batch)).sum() / GROUPS
            loss.backward()  # type: ignore[no-untyped-call]  # torch's
            self.optimizer.step()
            self.steps += 1

    def _groups(self, items: np.ndarray[Any, Any], random: np.random.Generator) -> Tensor:
        """One epoch: each item once, with negatives that are not the person's."""
        self.own[items] = True
        drawn = random.integers(0, len(self.own), (len(items), NEGATIVES))
        while (hit := self.own[drawn]).any():
            drawn[hit] = random.integers(0, len(self.own), int(hit.sum()))
        self.own[items] = False
        return torch.from_numpy(np.column_stack([random.permutation(items), drawn]).astype(np.int64))


class _Opacus:
    """A step of DP-SGD as Opacus makes it with ghost clipping."""

    def __init__(self, model: InterestModel, optimizer: torch.optim.Optimizer, noise: float, clip: float) -> None:
        warnings.filterwarnings("ignore", message=".*backward hook.*")  # an embedding's inputs have no gradient
        from opacus.grad_sample import GradSampleModuleFastGradientClipping
        from opacus.optimizers import DPOptimizerFastGradientClipping

        bound: Any = clip  # a float, whatever Opacus' default looks like
        self.module = GradSampleModuleFastGradientClipping(model, max_grad_norm=bound, loss_reduction="mean")
        self.module.train()
        self.optimizer = DPOptimizerFastGradientClipping(
            optimizer, noise_multiplier=noise, max_grad_norm=clip, expected_batch_size=GROUPS, loss_reduction="mean"
        )

    def step(self, groups: Tensor) -> None:
        from opacus.utils.fast_gradient_clipping_utils import DPTensorFastGradientClipping

        self.optimizer.zero_grad()
        if len(groups):
            losses = group_loss(self.module(groups[:, :0], groups))
            DPTensorFastGradientClipping(self.module, self.optimizer, losses, "mean").backward()
        else:  # nobody's coin: noise alone
            for parameter in self.module.parameters():
                parameter.grad = torch.zeros_like(parameter)
        self.optimizer.step()


def applied(weights: Weights, total: Weights, cohort: int, noise: float) -> Weights:
    """The server's step: noise on the sum, its mean added."""
    out = dict(weights)
    for name, part in total.items():
        noised = part + noise * CLIP * torch.randn(part.shape) if noise else part
        out[name] = weights[name] + noised / cohort
    return out


# ------------------------------------------------------------------------------------------------------------ the ways

Sum = Callable[[int, Weights, Int64], Weights]  # round, weights, people: what they send, added


def play(work: Workload, seed: int, ask: Sum, noise: float, weights: Weights) -> dict[str, Any]:
    """Every round, with the clock."""
    everybody = cohorts(work, seed)
    seconds, startup, rss_mb = [], 0.0, 0.0
    for number, users in enumerate(everybody, 1):
        start = time.perf_counter()
        weights = applied(weights, ask(number, weights, users), work.cohort, noise)
        seconds.append(time.perf_counter() - start)
        startup = startup or machine.seconds_since_start()
        rss_mb = max(rss_mb, machine.peak_rss_mb())
    later = slice(1 if len(seconds) > 1 else 0, None)
    rates = [len(users) / s for users, s in zip(everybody[later], seconds[later], strict=True)]
    return {
        "clients": [len(users) for users in everybody],
        "every_round_seconds": seconds,
        "round_seconds": statistics.median(seconds[later]),
        "clients_per_second": statistics.median(rates),
        "startup_seconds": startup,
        "peak_rss_mb": rss_mb,
        "weights": weights,
    }


def loop(work: Workload, seed: int) -> dict[str, Any]:
    """One person after another in this process."""
    worker = Worker(work.unit, histories.in_memory(work.shape, seed))

    def ask(number: int, weights: Weights, users: Int64) -> Weights:
        return added(worker, work, seed, number, weights, users)

    return play(work, seed, ask, work.row().plan.sums[0].noise_multiplier, first_weights(work, seed))


def added(
    worker: Worker, work: Workload, seed: int, number: int, weights: Weights, users: Int64, *, replay: bool = False
) -> Weights:
    """What these people send, one after another, added."""
    total = {name: torch.zeros_like(weights[name]) for name in worker.shared}
    for user in users.tolist():
        for name, part in person(worker, work, seed, number, user, weights, replay).items():
            total[name] += part
    return total


def flower(
    work: Workload, seed: int, *, replay: Weights | None = None, noise: float = 1.0, clip: float = CLIP
) -> dict[str, Any]:
    """A message for each person, over nodes that each round uses again.

    Args:
        replay: weights to start from, without noise by the server, and for w1 on penchant's examples.
        noise, clip: as of `Worker`.
    """
    found: dict[str, Any] = {}
    server = ServerApp()
    n_nodes = max(map(len, cohorts(work, seed)))

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        while len(nodes := list(grid.get_node_ids())) < n_nodes:
            time.sleep(0.05)

        def ask(number: int, weights: Weights, users: Int64) -> Weights:
            down = ArrayRecord({name: Array(values.numpy()) for name, values in weights.items()})
            replies = grid.send_and_receive(
                [
                    Message(
                        RecordDict({"weights": down, "who": ConfigRecord({"round": number, "user": user})}),
                        dst_node_id=node,
                        message_type=MessageType.TRAIN,
                    )
                    for node, user in zip(nodes, users.tolist(), strict=False)
                ]
            )
            total: Weights = {}
            heard = 0
            for reply in replies:
                for name, part in reply.content.array_records["update"].items():
                    values = torch.from_numpy(part.numpy())
                    total[name] = total[name] + values if name in total else values.clone()
                heard += 1
            if heard != len(users):
                raise RuntimeError(f"{heard} of {len(users)} people answered")
            return total

        if replay is None:
            found.update(play(work, seed, ask, work.row().plan.sums[0].noise_multiplier, first_weights(work, seed)))
        else:
            found.update(play(work, seed, ask, 0.0, replay))

    with tempfile.TemporaryDirectory(prefix="penchant-peers-") as folder:
        histories.on_disk(work.shape, seed, Path(folder))
        np.save(Path(folder) / "offsets.npy", histories.in_memory(work.shape, seed).offsets)
        run_flower(server, _client(folder, work, seed, replay is not None, noise, clip), n_nodes)
    return found


def _client(folder: str, work: Workload, seed: int, replay: bool, noise: float, clip: float) -> ClientApp:
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        worker = _resident(folder, work.unit, work.shape.items, noise, clip)
        who: Any = message.content.config_records["who"]
        down = message.content.array_records["weights"]
        weights = {name: torch.from_numpy(part.numpy()) for name, part in down.items()}
        change = person(worker, work, seed, who["round"], who["user"], weights, replay)
        up = ArrayRecord({name: Array(part.numpy()) for name, part in change.items()})
        return Message(RecordDict({"update": up}), reply_to=message)

    return app


@lru_cache(maxsize=1)
def _resident(folder: str, unit: str, n_items: int, noise: float, clip: float) -> Worker:
    """The worker of this process, made at its first message."""
    torch.set_num_threads(1)
    columns = {
        name: np.load(Path(folder) / f"{name}.npy", mmap_mode="r")
        for name in ("offsets", "items", "times", "strengths")
    }
    return Worker(unit, Interactions(n_items=n_items, **columns), noise=noise, clip=clip)


def person(
    worker: Worker, work: Workload, seed: int, number: int, user: int, weights: Weights, replay: bool
) -> Weights:
    """What one person sends in a round, the same in whichever process.

    Args:
        replay: train on the examples that penchant's node draws for the person in their first round.
    """
    groups = None
    if replay and work.unit == "user":
        own = Streams(Streams(seed).child("bench").seed("clients")).scope("local", number, 0, user, 1)
        training = config.decode(LocalTraining, LOCAL)
        drawn = groups_of(worker.people.history(user).items, work.shape.items, training, own.word("examples"))
        groups = torch.from_numpy(drawn.astype(np.int64))
    return worker.update(weights, user, np.random.default_rng((seed, number, user)), groups)


# -------------------------------------------------------------------------------------------------------------- checks


def check(cohort: int, seeds: int = 6) -> dict[str, Any]:
    """Whether all do the same arithmetic, noise aside, in one round of so many people; each part says so in `same`."""
    few = min(cohort, 20)
    return {
        "w1": check_w1(workload("w1", users=cohort, cohort=cohort, rounds=1)),
        "w2": check_w2(workload("w2", users=few, cohort=few, rounds=1), seeds),
    }


def check_w1(work: Workload, clip: float = 0.1, tolerance: float = 1e-4) -> dict[str, Any]:
    """On the same examples: largest difference of a weight over the largest movement of any.

    The clip is shorter than the workload's, so that it bites; a loop without it must be a hundred times further away.
    """
    people, before, users = histories.in_memory(work.shape, 0), first_weights(work, 0), np.arange(work.cohort)
    worker, unclipped = (Worker(work.unit, people, clip=bound) for bound in (clip, math.inf))
    after = {
        "loop": applied(before, added(worker, work, 0, 1, before, users, replay=True), work.cohort, 0.0),
        "unclipped": applied(before, added(unclipped, work, 0, 1, before, users, replay=True), work.cohort, 0.0),
        "penchant": penchant(work, people, before, 0, clip),
        "flower": flower(work, 0, replay=before, clip=clip)["weights"],
    }
    far = {way: furthest(weights, after["loop"], before) for way, weights in after.items()}
    steps = sum(math.ceil(n / GROUPS) for n in people.lengths.tolist())
    return {
        "people": work.cohort,
        "steps": {"expected": steps, "loop": worker.steps},
        "difference_from_loop": far,
        "tolerance": tolerance,
        "loss_before": loss(people, before),
        "loss": {way: loss(people, weights) for way, weights in after.items()},
        "same": worker.steps == steps
        and max(far["penchant"], far["flower"]) <= tolerance
        and far["unclipped"] > 100 * tolerance,
    }


def check_w2(work: Workload, seeds: int) -> dict[str, Any]:
    """How far the round moves the weights, and the loss after it, over several draws of the coins.

    penchant and the loop draw differently, so that their means are compared: they may lie 4 standard errors apart, and
    those of a loop that does not clip must lie further. Flower's workers draw as the loop does: there the weights
    themselves are compared. All start from weights five times larger than usual, under which gradients are longer than
    the clip.
    """
    people, users = histories.in_memory(work.shape, 0), np.arange(work.cohort)
    before = {name: 5 * values for name, values in first_weights(work, 0).items()}
    worker = Worker(work.unit, people, noise=EXACT)
    unclipped = Worker(work.unit, people, noise=EXACT / 1e3, clip=1e3)
    moved: dict[str, list[float]] = {"penchant": [], "loop": [], "unclipped": []}
    losses: dict[str, list[float]] = {way: [] for way in moved}
    of_loop = []
    for seed in range(seeds):
        after = {
            "penchant": penchant(work, people, before, seed),
            "loop": applied(before, added(worker, work, seed, 1, before, users), work.cohort, 0.0),
            "unclipped": applied(before, added(unclipped, work, seed, 1, before, users), work.cohort, 0.0),
        }
        of_loop.append(after["loop"])
        for way, weights in after.items():
            moved[way].append(math.sqrt(sum(float((weights[n] - before[n]).square().sum()) for n in worker.shared)))
            losses[way].append(loss(people, weights))
    far = furthest(flower(work, 0, replay=before, noise=EXACT)["weights"], of_loop[0], before)
    apart = {
        way: {"moved": _apart(moved[way], moved["loop"]), "loss": _apart(losses[way], losses["loop"])}
        for way in ("penchant", "unclipped")
    }
    steps = STEPS * work.cohort * seeds
    return {
        "people": work.cohort,
        "seeds": seeds,
        "steps": {"expected": steps, "loop": worker.steps},
        "moved": {way: statistics.mean(values) for way, values in moved.items()},
        "loss_before": loss(people, before),
        "loss": {way: statistics.mean(values) for way, values in losses.items()},
        "standard_errors_from_loop": apart,
        "flower_difference_from_loop": far,
        "same": worker.steps == steps
        and max(apart["penchant"].values()) <= 4
        and apart["unclipped"]["moved"] > 4
        and far <= 1e-3,
    }


def penchant(work: Workload, people: Interactions, weights: Weights, seed: int, clip: float = CLIP) -> Weights:
    """The weights after a round of everybody by the engine, without noise."""
    row = work.row()
    settings, plan = dict(row.settings), replace(row.plan, sampling="none")
    if plan.device is None:
        sums = tuple(replace(spec, noise_multiplier=0.0, clip_norm=clip) for spec in plan.sums)
        plan = replace(plan, unit="none", sums=sums)
    else:
        device = replace(plan.device, noise_multiplier=EXACT)
        settings["device"] = config.encode(device)
        plan = replace(plan, device=device, task=task_digest(row.learner, settings))
    state = {name: values.numpy() for name, values in weights.items()}
    done = engine.run(
        Federated(learner=row.learner, settings=settings, plan=plan),
        Population(histories=people, catalogue=histories.catalogue(people.n_items)),
        name="bench",
        seed=seed,
        nodes=1,
        engine="local",
        where="cpu",
        after_round=lambda record, rounds: None,
        progress=Progress(state, np.zeros(people.n_users, np.int64)),
    )
    return {name: torch.from_numpy(np.asarray(done.state[name])) for name in weights}


def furthest(one: Weights, two: Weights, before: Weights) -> float:
    """Largest difference of two trained models over the largest movement of the second."""
    largest = max(float((two[name] - before[name]).abs().max()) for name in two)
    return max(float((one[name] - two[name]).abs().max()) for name in two) / largest


def loss(people: Interactions, weights: Weights) -> float:
    """Mean over groups of the first 50 people's histories, with negatives that are the same for every model."""
    random = np.random.default_rng(0)
    items = people.select(range(min(50, people.n_users))).items
    drawn = random.integers(0, people.n_items, (len(items), NEGATIVES))
    groups = torch.from_numpy(np.column_stack([items, drawn]).astype(np.int64))
    model = build(ModelConfig(**MODEL), people.n_items, 0)
    with torch.no_grad():
        return float(group_loss(functional_call(model, weights, (groups[:, :0], groups))).mean())


def _apart(one: list[float], two: list[float]) -> float:
    """Difference of two means, in its standard errors."""
    error = math.sqrt(statistics.variance(one) / len(one) + statistics.variance(two) / len(two))
    return abs(statistics.mean(one) - statistics.mean(two)) / error


def main() -> None:
    parser = argparse.ArgumentParser(description="One other way, once, as JSON; peers.py runs them in turns.")
    parser.add_argument("way", choices=("loop", "flower", "check"))
    parser.add_argument("--workload", default="w1")
    for name in ("cohort", "rounds", "users", "items"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.way == "check":
        print(json.dumps(check(args.cohort or 100)))
        return
    work = workload(args.workload, users=args.users, items=args.items, cohort=args.cohort, rounds=args.rounds)
    found = {"loop": loop, "flower": flower}[args.way](work, args.seed)
    del found["weights"]
    print(json.dumps(found))
