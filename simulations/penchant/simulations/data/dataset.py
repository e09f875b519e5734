"""A data set as every experiment takes it, and what was done to the file to get there.

What cleaning did is part of a result: rows left out, repeats, ties in time and k-core survival all move a metric, and
whatever was decided by looking at people's data is listed as uncharged, because no ε covers it.
"""

from __future__ import annotations

from dataclasses import dataclass

from penchant.common.catalogue import Catalogue
from penchant.common.interactions import Interactions


@dataclass(frozen=True, kw_only=True)
class CleaningReport:
    """What was read, left out and noticed. Counts are of rows unless their name says users or items.

    Attributes:
        rows_read: rows of the interactions file, blank lines not counted.
        missing: rows skipped because a value was missing; only where skipping was asked for.
        malformed: rows skipped for any other fault, in either file; only where skipping was asked for.
        unknown_items: rows left out because their item is not in a catalogue that is closed.
        duplicates: rows left out because an earlier one has the same user, item, time and event.
        repeats: rows of an item that their user already had, each at another time or event.
        repeats_dropped: of these, the earlier ones left out by `repeats="last"`.
        has_times: False when the file has no times, and a person's order is the file's.
        tie_share: share of interactions whose time equals that of a neighbour of the same user, in [0, 1].
        items_unused: catalogue items that nobody interacted with.
        items_appended: catalogue items that only the interactions name.
        items_untitled: items of the items file without a title; their identifier stands in.
        k_core: k, 0 when off.
        core_rows: left out by the k-core.
        core_users: left out by the k-core.
        core_items: left out by the k-core.
        ignored_columns: columns that no role was found for.
        uncharged: what was decided from people's data outside any privacy accounting, in plain words.
    """

    rows_read: int = 0
    missing: int = 0
    malformed: int = 0
    unknown_items: int = 0
    duplicates: int = 0
    repeats: int = 0
    repeats_dropped: int = 0
    has_times: bool = True
    tie_share: float = 0.0
    items_unused: int = 0
    items_appended: int = 0
    items_untitled: int = 0
    k_core: int = 0
    core_rows: int = 0
    core_users: int = 0
    core_items: int = 0
    ignored_columns: tuple[str, ...] = ()
    uncharged: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """The report in plain words, one fact a line; what did not happen is not mentioned.

        >>> CleaningReport(rows_read=3, duplicates=1).lines()
        ['3 rows read', '1 left out: same user, item, time and event as an earlier row']
        """
        said = [f"{self.rows_read:,} rows read"]
        for count, words in (
            (self.missing, "skipped: a value is missing"),
            (self.malformed, "skipped: malformed"),
            (self.unknown_items, "left out: their item is not in the catalogue"),
            (self.duplicates, "left out: same user, item, time and event as an earlier row"),
            (self.repeats - self.repeats_dropped, "kept that repeat an item of the same user"),
            (self.repeats_dropped, "left out: the same user has the item again later"),
            (self.items_unused, "catalogue items that nobody interacted with"),
            (self.items_appended, "catalogue items known only from interactions"),
            (self.items_untitled, "items without a title, shown by their identifier"),
        ):
            if count:
                said.append(f"{count:,} {words}")
        if not self.has_times:
            said.append("no times: each person's order is the file's")
        elif self.tie_share:
            said.append(
                f"{self.tie_share:.1%} share their time with a neighbour of the same user; file order breaks ties"
            )
        if self.k_core:
            said.append(
                f"{self.k_core}-core left out {self.core_rows:,} rows, {self.core_users:,} users and "
                f"{self.core_items:,} items"
            )
        if self.ignored_columns:
            said.append("columns not used: " + ", ".join(self.ignored_columns))
        if self.uncharged:
            said.append("not charged to any privacy budget: " + "; ".join(self.uncharged))
        return said


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """Who did what, and the public catalogue it points into.

    Attributes:
        name: of the data set, for tables and file names.
        interactions: users in order of first appearance, each person's rows by time, ties in file order.
        catalogue: items in the order of the items file, then those that only the interactions name.
        cleaning: what was left out and noticed on the way.
        terms: what may be done with the data, a line or two; to be shown wherever results are.
    """

    name: str
    interactions: Interactions
    catalogue: Catalogue
    cleaning: CleaningReport
    terms: str
