"""`make results`: the studies behind docs/results.md, run again and written as that page.

A study is simulations over several seeds, or a frontier (`frontier.py`), kept under runs/results/, so that a stopped
`make results` goes on. Figures are paired over people, and over seeds where both sides have them; seeds are resampled
too.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from penchant.common.config import did_you_mean
from penchant.common.errors import InvalidConfig, MissingExtra
from penchant.simulations import frontier
from penchant.simulations.evaluation import Interval, confidence, paired_difference, paired_ratio
from penchant.simulations.frontier import FrontierConfig, epsilon_words, promises
from penchant.simulations.frontier_page import canary, imitated, interval, kept
from penchant.simulations.runs import RunFolder, write_file
from penchant.simulations.settings import SimulationConfig
from penchant.simulations.simulate import Watch, simulate

METRIC = "ndcg@10"
FLOORS = ("popularity", "no-sharing")


@dataclass(frozen=True)
class Study:
    """One table.

    Attributes:
        name: of its folder.
        title, why: what the page says.
        config: of every seed.
        seeds: how many.
        ratios: pairs (row, other row) whose ratio the page gives with its interval.
        beside: another study of the same data and seeds, and its rows that stand in this table too.
    """

    name: str
    title: str
    why: str
    config: SimulationConfig
    seeds: int = 5
    ratios: tuple[tuple[str, str], ...] = ()
    beside: tuple[str, tuple[str, ...]] | None = None


@dataclass(frozen=True)
class FrontierStudy:
    """Accuracy against ε: one table and one figure.

    Attributes:
        name: of its folder and figure.
        title, why: what the page says.
        config: of its cells.
    """

    name: str
    title: str
    why: str
    config: FrontierConfig


def frontiers() -> tuple[FrontierStudy, ...]:
    """The frontiers of `make results`: every learner at every ε, at δ = 1e-5, over five seeds."""

    def one(data: str, **more: Any) -> FrontierConfig:
        return FrontierConfig(base=SimulationConfig(data=data, delta=1e-5, nodes=1), **{"learners": every, **more})

    every = ("cooccurrence", "als", "fedavg", "fedavg:start=co-occurrence")
    scaled = "The same with the noise that 6,040 people, as many as ML-1M has, would get."
    known = ("ease", "truth")
    return (
        FrontierStudy(
            "frontier-ml-latest-small",
            "Accuracy against ε: ml-latest-small",
            "610 people.",
            one("embedded"),
        ),
        FrontierStudy(
            "frontier-ml-100k",
            "Accuracy against ε: ML-100K",
            "943 people.",
            one("ml-100k"),
        ),
        FrontierStudy(
            "frontier-ml-latest-small-as-6040",
            "Accuracy against ε: ml-latest-small, noise as for 6,040 people (a research figure)",
            scaled,
            one("embedded", as_if_users=6040),
        ),
        FrontierStudy(
            "frontier-ml-100k-as-6040",
            "Accuracy against ε: ML-100K, noise as for 6,040 people (a research figure)",
            scaled,
            one("ml-100k", as_if_users=6040),
        ),
        FrontierStudy(
            "frontier-synthetic-6000",
            "Accuracy against ε: 6,000 synthetic people",
            "Their tastes are known: truth is the law that made the data, and nothing scores better in expectation.",
            one("synthetic:users=6000,items=2000,interactions=100,seed=0", references=known),
        ),
        FrontierStudy(
            "frontier-synthetic-50000",
            "Accuracy against ε: 50,000 synthetic people",
            "Their tastes are known: truth is the law that made the data, and nothing scores better in expectation. "
            "Each of FedAvg's people takes part in one of its four private rounds; its warm start would take too long.",
            one(
                "synthetic:users=50000,items=2000,interactions=60,seed=0",
                references=known,
                learners=("cooccurrence", "als", "fedavg:max-participations=1"),
            ),
        ),
    )


def studies() -> tuple[Study | FrontierStudy, ...]:
    """Everything that `make results` runs."""
    exact = SimulationConfig(data="ml-100k", unit="none")
    per_model = tuple(
        Study(
            f"models-{model}",
            f"Model {model}: central and federated without privacy, ml-latest-small",
            "One table for each model; the same split and budgets (40 rounds of 200 people, one seed).",
            SimulationConfig(model=model, unit="none", rounds=40, cohort=200),
            seeds=1,
        )
        for model in ("neumf", "gru", "lstm", "cnn-lstm", "transformer")
    )
    return (
        Study(
            "ml-latest-small",
            "All rows on ml-latest-small, the budgets of `penchant simulate`",
            "610 people. The private rows stand against both floors; whatever they show, they show.",
            SimulationConfig(),
        ),
        Study(
            "ml-100k-exact",
            "ML-100K without privacy: anchors, and FedAvg against the same model trained centrally",
            "943 people, file order on ties. FedAvg: 40 rounds of everybody.",
            replace(exact, rounds=40, cohort=943),
            ratios=(("fedavg", "central"),),
        ),
        Study(
            "ml-100k-transformer",
            "ML-100K without privacy: the Transformer, trained centrally and federated",
            "943 people. Centrally, at most 40 epochs; federated, 600 rounds of 64 people, one step each: 41 passes.",
            replace(exact, model="transformer", rounds=600, cohort=64),
            ratios=(("fedavg", "central"), ("central", "ease"), ("fedavg", "ease")),
            beside=("ml-100k-exact", ("ease", "co-occurrence")),
        ),
        *per_model,
        *frontiers(),
    )


def run(study: Study, root: Path, tell: Callable[[str], None]) -> list[RunFolder]:
    """Every seed of a study, each in its folder; finished ones are kept."""
    folders = []
    for seed in range(study.seeds):
        folder = RunFolder(root / study.name / f"seed-{seed}")
        tell(f"{study.name}, seed {seed}")
        if not (folder.path / "results.json").exists():
            simulate(replace(study.config, seed=seed), folder, Watch(end=lambda row: tell(f"  {row['name']}")))
        folders.append(folder)
    return folders


def table(study: Study, folders: Sequence[RunFolder], others: Sequence[RunFolder] = ()) -> str:
    """The study as a section of Markdown.

    Args:
        others: every seed of the study that `beside` names.

    Raises:
        InvalidConfig: its seeds were not run on the same data, so that people cannot be paired.
    """
    results = [folder.read_results() for folder in folders]
    if len({found["data"]["digest"] for found in (*results, *(other.read_results() for other in others))}) > 1:
        raise InvalidConfig(f"study {study.name}: its seeds were run on different data")
    source = {row["name"]: folders for row in results[0]["runs"]}
    first = {row["name"]: row for row in results[0]["runs"]}
    if others and study.beside:
        source |= dict.fromkeys(study.beside[1], others)
        first |= {row["name"]: row for row in others[0].read_results()["runs"] if row["name"] in study.beside[1]}
    names = list(source)
    values = {name: np.stack([f.per_user(name)[METRIC] for f in source[name]]) for name in names}
    data, split = results[0]["data"], results[0]["split"]
    lines = [
        f"## {study.title}",
        "",
        study.why,
        "",
        f"{data['name']}: {data['users']:,} people, {data['items']:,} items, {data['interactions']:,} interactions; "
        f"{split['name']}, {split['scored_users']:,} people scored, full ranking; {len(folders)} "
        f"seed{'s' if len(folders) > 1 else ''}.",
        "",
        "| row | NDCG@10 % [95 %] | HR@10 % | minus popularity | minus no-sharing | guarantee |",
        "|---|---|---|---|---|---|",
    ]
    notes: list[str] = []
    for name in names:
        low, high = confidence(values[name], seed=0)
        hit = np.mean([folder.per_user(name)["hr@10"].mean() for folder in source[name]])
        against = [
            "–" if floor == name else _points(paired_difference(values[name], values[floor], seed=0))
            for floor in FLOORS
        ]
        mark = ""
        if first[name]["privacy"] is not None:
            notes.append(first[name]["privacy_note"])
            mark = f"({len(notes)})"
        cell = f"{values[name].mean():.2%} [{low:.2%}, {high:.2%}]".replace("%", "")
        lines.append(f"| {name} | {cell} | {hit * 100:.1f} | {against[0]} | {against[1]} | {mark or 'none: exact'} |")
    lines += ["", *(f"({i}) {note}" for i, note in enumerate(notes, 1))]
    for one, other in study.ratios:
        ratio = paired_ratio(values[one], values[other], seed=0)
        lines += [
            "",
            f"Ratio {one} / {other} in NDCG@10, paired over people and seeds: "
            f"**{ratio.mean:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]**.",
        ]
    return "\n".join(lines) + "\n"


def frontier_table(study: FrontierStudy, found: Mapping[str, Any]) -> str:
    """The frontier as a section of Markdown: its figure, its table, and each guarantee in two parts."""
    lines: Sequence[Mapping[str, Any]] = found["rows"]
    shared, own = promises(lines)
    data, split, seeds = found["data"], found["split"], found["seeds"]
    numbers: dict[str, int] = {}
    out = [
        f"## {study.title}",
        "",
        f"![Accuracy against ε, {data['name']}](figures/{study.name}.svg)",
        "",
        study.why,
        "",
        f"{data['name']}: {data['users']:,} people, {data['items']:,} items, {data['interactions']:,} interactions; "
        f"{split['name']}, {split['scored_users']:,} people scored, full ranking; {seeds} "
        f"seed{'s' if seeds > 1 else ''}, references one. "
        f"{canary(found)}",
        "",
    ]
    scaled = bool(found["as_if_users"])
    if scaled:
        out += [f"**{imitated(found)}**", ""]
    if shared:
        out += [f"Every finite ε in this table: {shared}, and its note.", ""]
    imitates = f" ε of {found['as_if_users']:,} |" if scaled else ""
    out += [
        f"| learner |{imitates} ε | NDCG@10 % [95 %] | HR@10 % | minus popularity | minus no-sharing | kept % | note |",
        f"|---|{'---|' if scaled else ''}---|---|---|---|---|---|---|",
    ]
    for line, words in zip(lines, own, strict=True):
        against = [line["against_floors"].get(floor) for floor in FLOORS]
        name = line["name"] + ("" if line["kind"] == "learner" else f" ({line['kind']})")
        asked = f"{line['epsilon']:g}" if line["epsilon"] else "∞" if line["kind"] == "learner" else "–"
        cells = [
            name,
            *((asked,) if scaled else ()),
            epsilon_words(line) if line["kind"] == "learner" else "–",
            interval(line[METRIC]),
            f"{line['hr@10'] * 100:.1f}",
            *("–" if one is None else _points(Interval(**one)) for one in against),
            kept(line),
            f"({numbers.setdefault(words, len(numbers) + 1)})" if line["privacy"] else line["privacy_note"],
        ]
        out.append(f"| {' | '.join(cells)} |")
    out += ["", "kept: NDCG@10 over that of the learner at ε = ∞, paired over people and seeds."]
    out += [f"({n}) {words or 'as above'}." for words, n in numbers.items()]
    return "\n".join(out) + "\n"


def page(sections: Sequence[str]) -> str:
    """docs/results.md."""
    head = (
        "# Results\n\n"
        "Made by `make results`; the runs stay under runs/results/. NDCG@10 and HR@10 in %, full ranking over the "
        "catalogue less seen items, ties against the target (docs/metrics.md). Intervals are 95 % bootstraps over "
        "people and seeds; differences are paired, in points. The two floors are exact popularity, and public features "
        "with a person's own history; a private method that does not beat the second has learned nothing shared. "
        "Settings were chosen on public MovieLens data and this is listed as not charged: co-occurrence's and the "
        "Transformer's on validation items of ML-100K, ml-latest-small and 6,000 synthetic people, those of als on "
        "targets of ML-100K and of these synthetic people, so figures on them are in-sample as to settings. At ε = ∞ a "
        "learner has the settings that suit it without noise: FedAvg other rounds, cohorts, steps and trained parts.\n"
    )
    return "\n".join([head, *sections])


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the studies and writes the page; with --only, prints their sections instead. 1 if one was left out."""
    parser = argparse.ArgumentParser(prog="python -m penchant.simulations.results", description=main.__doc__)
    parser.add_argument("--only", action="append", help="name of a study, printed and not written; may be given again")
    parser.add_argument("--runs", type=Path, default=Path("runs/results"), help="where runs are kept")
    parser.add_argument("--out", type=Path, default=Path("docs/results.md"), help="the page")
    parser.add_argument("--jobs", type=int, default=1, help="processes over the cells of a frontier")
    args = parser.parse_args(argv)
    known = {study.name: study for study in studies()}
    if unknown := [name for name in args.only or () if name not in known]:
        parser.error(f"no study {unknown[0]!r}{did_you_mean(unknown[0], known)}")
    figures = args.out.parent / "figures"
    sections, left_out = [], 0
    for study in known.values():
        if args.only and study.name not in args.only:
            continue
        try:
            if isinstance(study, Study):
                other = known[study.beside[0]] if study.beside else None
                others = run(other, args.runs, tell) if isinstance(other, Study) else ()
                sections.append(table(study, run(study, args.runs, tell), others))
                continue
            folder = args.runs / study.name
            tell(study.name)
            frontier.run(study.config, folder, jobs=args.jobs, tell=lambda words: tell(f"  {words}"))
            found = frontier.record(study.config, folder)
            frontier.write(folder, found)
            sections.append(frontier_table(study, found))
            if not args.only:
                write_file(figures / f"{study.name}.svg", (folder / "frontier.svg").read_bytes())
        except MissingExtra as error:
            left_out += 1
            print(f"{study.name} is left out: {error}", file=sys.stderr)
    if args.only:
        print("\n".join(sections))
    elif not left_out:
        args.out.write_text(page(sections), encoding="utf-8")
    return 1 if left_out else 0


def tell(words: str) -> None:
    """Talk goes to stderr."""
    print(words, file=sys.stderr, flush=True)


def _points(found: Interval) -> str:
    return f"{found.mean * 100:+.2f} [{found.low * 100:+.2f}, {found.high * 100:+.2f}]"


if __name__ == "__main__":
    sys.exit(main())
