"""Tells a person how far a run is: one bar for the rows, one for the rounds of the row at work."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from penchant.simulations.simulate import Watch


@contextmanager
def progress(console: Console, *, rounds: bool = False) -> Iterator[Watch]:
    """A `Watch` that draws on this console; each finished row stays as a line, and with `rounds` each round too."""
    bars = Progress(
        TextColumn("{task.description:<16}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[words]}", style="dim"),
        console=console,
        transient=True,
        disable=not console.is_interactive,  # else it ends with an empty line
    )
    with bars:
        at_work = bars.add_task("reading data", total=None, words="")

        def begin(name: str, steps: int) -> None:
            bars.reset(at_work, total=steps, description=name, words="")

        def step(words: str) -> None:
            bars.update(at_work, advance=1, words=words)
            if rounds and words:
                console.print(f"  {bars.tasks[0].description} {bars.tasks[0].completed:.0f}: {words}", highlight=False)

        def end(row: Mapping[str, Any]) -> None:
            found = f"NDCG@10 {row['metrics']['ndcg@10']:6.2%}"
            console.print(f"{row['name']:<22} {found}  {row['seconds']:6.1f} s", highlight=False)

        yield Watch(begin, step, end)
