"""The subcommand `penchant plan`: solves for noise, ε or rounds and prints the promise with all that belongs to it."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from penchant.common.cli import Command
from penchant.common.errors import InvalidConfig, MissingExtra

if TYPE_CHECKING:
    from penchant.common.privacy.planning import Solved

SCHEMA_VERSION = 1
_PLOTS = (".png", ".svg")
_PLOT_POINTS = 24


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--users", type=int, required=True, metavar="N", help="people on the roster")
    parser.add_argument("--delta", type=float, required=True, help="δ, below 1 over the users")
    asked = parser.add_argument_group("two of these, the third is solved for")
    asked.add_argument("--rounds", type=int, metavar="T", help="how many sums are released")
    asked.add_argument("--epsilon", type=float, help="ε that must be kept")
    asked.add_argument("--noise-multiplier", type=float, metavar="SIGMA", help="σ, noise over clip")
    more = parser.add_argument_group("who takes part")
    more.add_argument("--cohort", type=int, metavar="N", help="users expected in a round (default: everybody)")
    more.add_argument(
        "--max-participations", type=int, metavar="K", help="rounds that one profile may be in (default: all)"
    )
    more.add_argument("--unit", choices=("user", "interaction"), default="user", help="what is protected")
    more.add_argument(
        "--sampling",
        choices=("poisson", "none"),
        help="poisson: a coin for each user in each round (default with unit user, a smaller --cohort and no cap)",
    )
    more.add_argument("--open-fleet", action="store_true", help="nobody counts participations")
    more.add_argument(
        "--clip", type=float, default=1.0, help="L2 bound on a contribution (default: 1); no ε depends on it"
    )
    device = parser.add_argument_group("training on the device, with --unit interaction")
    device.add_argument(
        "--rate", type=float, default=1.0, help="share of the interactions that a step draws (default: 1)"
    )
    device.add_argument("--steps", type=int, default=1, help="steps in a participation (default: 1)")
    out = parser.add_argument_group("output")
    out.add_argument("--size", type=int, default=1, metavar="D", help="numbers in the vector, for its noise-to-signal")
    out.add_argument("--json", action="store_true", help="one JSON object instead of the tables")
    out.add_argument("--plot", type=Path, metavar="FILE", help="write ε over rounds as .png or .svg")


def _run(args: argparse.Namespace) -> int:
    from penchant.common.privacy.planning import solve

    if args.plot is not None and args.plot.suffix.lower() not in _PLOTS:
        raise InvalidConfig(f"--plot writes {' or '.join(_PLOTS)}, not {args.plot.suffix or 'a file without ending'}")
    solved = solve(
        users=args.users,
        delta=args.delta,
        rounds=args.rounds,
        epsilon=args.epsilon,
        noise_multiplier=args.noise_multiplier,
        cohort=args.cohort,
        max_participations=args.max_participations,
        unit=args.unit,
        sampling=args.sampling,
        clip=args.clip,
        open_fleet=args.open_fleet,
        rate=args.rate,
        steps=args.steps,
        size=args.size,
    )
    if args.plot is not None:
        _plot(solved, args.plot)
    print(json.dumps(record(solved), ensure_ascii=False, allow_nan=False) if args.json else words(solved))
    return 0


def record(solved: Solved) -> dict[str, Any]:
    """The plan and its promise as plain JSON types; `rate` is null where no coin is claimed."""
    from dataclasses import asdict

    from penchant.common.privacy.events import encode

    plan, promise = solved.plan, solved.guarantee
    rate = plan.device.rate if plan.device else plan.rate if plan.sampling == "poisson" else None
    return {
        "schema_version": SCHEMA_VERSION,
        "epsilon": promise.epsilon,
        "delta": plan.delta,
        "noise_multiplier": solved.noise_multiplier,
        "rounds": plan.rounds,
        "users": plan.n_users,
        "cohort": plan.cohort,
        "rate": rate,
        "steps": plan.device.steps if plan.device else None,
        "unit": plan.unit,
        "neighbours": promise.neighbours,
        "sampling": plan.sampling,
        "sampler": promise.sampler,
        "max_participations": plan.max_participations,
        "enforced_by": plan.enforced_by,
        "accountant": promise.accountant,
        "opinions": solved.opinions,
        "clip": promise.clip[0],
        "divisor": plan.divisor,
        "trust": promise.trust,
        "uncharged": list(plan.uncharged),
        "noise_to_signal": asdict(solved.noise_to_signal),
        "events": [encode(event) for event in plan.events()],
        "epsilon_after": [{"rounds": n, "epsilon": value} for n, value in _course(solved)],
        "solved_for": solved.solved_for,
        "assumed": list(solved.assumed),
        "guarantee": str(promise),
        "plan": json.loads(plan.to_json()),
        "plan_digest": plan.digest,
    }


def words(solved: Solved) -> str:
    """The same for people, as plain text."""
    from penchant.common.privacy.plan import rounded_up
    from penchant.common.privacy.planning import advice

    plan, promise, noise = solved.plan, solved.guarantee, solved.noise_to_signal
    found = solved.solved_for
    coin = f", each by a coin of {plan.rate:.4g}" if plan.sampling == "poisson" and plan.rate < 1 else ""
    said = [f"{name} {rounded_up(value)}" for name, value in solved.opinions.items()]
    rows = [
        ("noise multiplier σ", f"{solved.noise_multiplier:.10g}", found == "noise_multiplier"),
        ("ε", rounded_up(promise.epsilon), found == "epsilon"),
        ("δ", f"{plan.delta:.10g}", False),
        ("rounds", f"{plan.rounds:,}", found == "rounds"),
        ("users", f"{plan.n_users:,}", False),
        ("cohort, and divisor", f"{plan.cohort:,} expected{coin}", False),
        ("participations", f"at most {plan.max_participations:,}, held by {plan.enforced_by}", False),
    ]
    if plan.device is not None:
        rows.append(("on the device", f"{plan.device.steps:,} steps a round, rate {plan.device.rate:g}", False))
    rows += [
        ("clip", f"{promise.clip[0]:.10g}", False),
        ("accountants", ", ".join(said), False),
        ("noise-to-signal", f"{noise.per_round:.3g} a round, {noise.over_rounds:.3g} over all rounds", False),
    ]
    if noise.size > 1:
        rows.append(("", f"{noise.vector:.3g} a round for a vector of {noise.size:,} numbers", False))
    wide = max(len(name) for name, _, _ in rows)
    table = [f"{name:<{wide}}  {value}{'  <- solved for' if new else ''}" for name, value, new in rows]
    course = [(f"{n:,}", rounded_up(value)) for n, value in _course(solved)]
    lines = [*table, "", f"{'after round':>{wide}}  ε"]
    lines += [f"{n:>{wide}}  {value}" for n, value in course]
    lines += ["", str(promise), ""]
    lines.append("Noise-to-signal: length of the noise over that of the sum, if all contributions had one direction.")
    if solved.assumed:
        lines.append(f"Assumed: {'; '.join(solved.assumed)}.")
    if better := advice(solved):
        lines.append(f"Better: {better}.")
    return "\n".join(line.rstrip() for line in lines)


def _course(solved: Solved) -> list[tuple[int, float]]:
    """ε after 1, T/4, T/2 and T rounds."""
    total = solved.plan.rounds
    return _epsilons(solved, sorted({1, max(1, total // 4), max(1, total // 2), total}))


def _epsilons(solved: Solved, rounds: list[int]) -> list[tuple[int, float]]:
    from penchant.common.privacy.accounting import epsilon

    return [(n, epsilon(solved.plan.events(n), solved.plan.delta).epsilon) for n in rounds]


def _plot(solved: Solved, path: Path) -> None:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtra("simulations", "matplotlib") from None
    from penchant.common.privacy.plan import rounded_up

    plan, promise = solved.plan, solved.guarantee
    total = plan.rounds
    spread = {max(1, round(total * (n / _PLOT_POINTS) ** 2)) for n in range(_PLOT_POINTS + 1)}  # ε grows fastest early
    rounds, epsilons = zip(*_epsilons(solved, sorted(spread | {plan.max_participations})), strict=True)
    figure = Figure(figsize=(7.0, 4.2), layout="constrained")
    axes = figure.subplots()
    axes.plot(rounds, epsilons, color="#2b6cb0", linewidth=1.8)
    mark = f"the plan: ε = {rounded_up(promise.epsilon)} after {total:,} rounds"
    axes.plot([total], [promise.epsilon], "o", color="#c05621", markersize=7, clip_on=False, label=mark)
    axes.legend(loc="lower right", frameon=False)
    axes.set(
        xlabel="rounds", ylabel=f"ε at δ = {plan.delta:g}", xlim=(0, None), ylim=(0, 1.08 * promise.epsilon or 1.0)
    )
    axes.set_title(
        f"unit {promise.unit} ({promise.neighbours}), δ = {plan.delta:g}, accountant {promise.accountant}\n"
        f"sampling {promise.sampler}",
        fontsize=9,
        loc="left",
    )
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    try:
        figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix.lower() == ".svg" else None)
    except OSError as error:
        raise InvalidConfig(f"--plot cannot write {path}: {error.strerror}") from None


plan = Command(
    "Solve a privacy plan for noise, ε or rounds, and say what it promises.",
    "  penchant plan --users 50000 --rounds 200 --delta 1e-6 --epsilon 3 --cohort 1000\n"
    "  penchant plan --users 50000 --rounds 200 --delta 1e-6 --noise-multiplier 20 --max-participations 10\n"
    "  penchant plan --users 50000 --delta 1e-6 --epsilon 3 --noise-multiplier 1.1 --cohort 1000 --plot epsilon.svg",
    _configure,
    _run,
)
