"""Turns checked rows into a data set: left out, counted, put in order.

The order is part of every result: items as the items file has them, users by first appearance, each person's rows by
time with ties in file order. A k-core keeps the users and items that have at least k interactions with one another,
repeated until nothing changes; who survives is decided by everybody's data, so it is listed as uncharged.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import chain
from typing import Literal, TypeVar

import numpy as np
import polars as pl

from penchant.common.arrays import Bool, Int64
from penchant.common.catalogue import Catalogue
from penchant.common.errors import InvalidConfig, MalformedData
from penchant.common.interactions import Interactions
from penchant.simulations.data.dataset import CleaningReport, Dataset
from penchant.simulations.data.tables import InteractionRows, ItemRows

Repeats = Literal["keep", "last"]

T = TypeVar("T")


def assemble(
    name: str,
    rows: InteractionRows,
    items: ItemRows | None,
    *,
    terms: str,
    closed: bool = False,
    repeats: Repeats = "keep",
    k_core: int = 0,
    uncharged: tuple[str, ...] = (),
) -> Dataset:
    """The data set of these rows and items.

    Args:
        name: of the data set.
        rows: checked interactions.
        items: the catalogue; None takes it from the interactions.
        terms: of the data.
        closed: leave out interactions with items that the catalogue lacks, instead of appending those.
        repeats: "keep" every interaction of a user with an item, or only the "last".
        k_core: k, 0 for none.
        uncharged: what the publisher decided from the data before us.

    Raises:
        MalformedData: no interaction is with an item of the closed catalogue.
        InvalidConfig: k is negative, or the k-core leaves nobody.
    """
    if k_core < 0:
        raise InvalidConfig(f"k_core must be ≥ 0, not {k_core}")
    frame, n = rows.frame, rows.frame.height
    if closed and items is not None:
        frame = frame.filter(frame["item"].is_in(list(items.ids)))
        if frame.is_empty():
            raise MalformedData(f"{name}: no interaction is with an item of the items file")
    n_unknown, n = n - frame.height, frame.height
    if rows.has_times:  # without times a second row of the same item is a repeat, not a copy
        frame = frame.filter(pl.struct("user", "item", "time", "event").is_first_distinct())
    n_duplicates = n - frame.height

    known = items.ids if items is not None else ()
    ids = pl.Series([*known, *frame["item"].unique(maintain_order=True)], dtype=pl.String).unique(maintain_order=True)
    n_appended = len(ids) - len(known)
    users = frame["user"].unique(maintain_order=True)
    event_names = tuple(frame["event"].unique().sort())
    if len(event_names) > 256:
        raise MalformedData(f"{name}: more than 256 kinds of event")
    who, what = _positions(frame["user"], users), _positions(frame["item"], ids)
    when = frame["time"].to_numpy()
    order = np.lexsort((when, who))  # stable: ties keep file order
    who, what, when = who[order], what[order], when[order]
    strengths = frame["strength"].to_numpy()[order]
    events = _positions(frame["event"], pl.Series(event_names)).astype(np.uint8)[order]

    pairs = pl.Series(who * len(ids) + what)
    n_repeats = len(pairs) - pairs.n_unique()
    keep = pairs.is_last_distinct().to_numpy() if repeats == "last" else np.ones(len(pairs), np.bool_)
    n_dropped = int((~keep).sum())
    n_core_rows = int(keep.sum())
    if k_core:
        keep[keep] = core(who[keep], what[keep], k_core)
    n_core_rows -= int(keep.sum())
    if not keep.any():
        raise InvalidConfig(f"{name}: k_core={k_core} leaves nobody")
    who, what, when = who[keep], what[keep], when[keep]

    user_stays = np.bincount(who, minlength=len(users)) > 0
    used = np.bincount(what, minlength=len(ids)) > 0
    item_stays = used if k_core else np.ones(len(ids), np.bool_)
    appended = np.arange(len(ids)) >= len(known)
    catalogue = _catalogue(name, items or ItemRows(ids=(), titles=(), topics=()), tuple(ids), item_stays)
    counts = np.bincount(who, minlength=len(users))[user_stays]
    interactions = Interactions(
        offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        items=(np.cumsum(item_stays) - 1)[what].astype(np.int32),
        times=when.astype(np.int64),
        strengths=strengths[keep].astype(np.float32),
        n_items=len(catalogue),
        users=_chosen(users, user_stays),
        events=events[keep] if len(event_names) > 1 else None,
        event_names=event_names,
    )
    if n_appended:
        uncharged = (*uncharged, f"{n_appended:,} catalogue items taken from the interactions")
    if k_core:
        uncharged = (*uncharged, f"k-core {k_core} survival")
    report = CleaningReport(
        rows_read=rows.rows_read,
        missing=rows.missing,
        malformed=rows.malformed + (items.malformed if items is not None else 0),
        unknown_items=n_unknown,
        duplicates=n_duplicates,
        repeats=n_repeats,
        repeats_dropped=n_dropped,
        has_times=rows.has_times,
        tie_share=_tie_share(who, when) if rows.has_times else 0.0,
        items_unused=int((item_stays & ~used).sum()),
        items_appended=int((item_stays & appended).sum()),
        items_untitled=items.untitled if items is not None else 0,
        k_core=k_core,
        core_rows=n_core_rows,
        core_users=int((~user_stays).sum()),
        core_items=int((~item_stays).sum()),
        ignored_columns=(*rows.ignored, *(items.ignored if items is not None else ())),
        uncharged=uncharged,
    )
    return Dataset(name=name, interactions=interactions, catalogue=catalogue, cleaning=report, terms=terms)


def _catalogue(name: str, items: ItemRows, ids: tuple[str, ...], stays: Bool) -> Catalogue:
    """The items that stay, of those listed and, after them, those that only the interactions name.

    Args:
        ids: of all; those of `items` come first.
        stays: bool[n].
    """
    n_appended = len(ids) - len(items.ids)

    def column(values: tuple[T, ...], missing: T) -> tuple[T, ...]:
        return _chosen((*values, *[missing] * n_appended), stays)

    chosen, topics = _chosen(ids, stays), column(items.topics, ())
    return Catalogue(
        ids=chosen,
        titles=_chosen((*items.titles, *ids[len(items.ids) :]), stays),
        topics=topics,
        retired=items.retired & set(chosen),
        sensitive=items.sensitive & frozenset(chain(*topics)),
        name=name,
        categories={key: column(values, "") for key, values in items.categories.items()},
        numbers={key: column(values, math.nan) for key, values in items.numbers.items()},
        texts={key: column(values, "") for key, values in items.texts.items()},
        vectors={
            key: np.vstack([rows, np.zeros((n_appended, rows.shape[1]), np.float32)])[stays]
            for key, rows in items.vectors.items()
        },
    )


def core(users: Int64, items: Int64, k: int) -> Bool:
    """Which interactions survive the k-core.

    Args:
        users: int64[n], the person of each interaction.
        items: int64[n], its item.
        k: every user and item left has at least k of the interactions left.

    Returns:
        bool[n], the largest such set; repeats of an item count.
    """
    keep = np.ones(len(users), np.bool_)
    while True:
        few_users = np.bincount(users[keep], minlength=users.max(initial=0) + 1) < k
        few_items = np.bincount(items[keep], minlength=items.max(initial=0) + 1) < k
        drop = keep & (few_users[users] | few_items[items])
        if not drop.any():
            return keep
        keep &= ~drop


def _positions(column: pl.Series, names: pl.Series) -> Int64:
    """int64[n], the place of each value in `names`, which holds them all."""
    at = pl.int_range(len(names), dtype=pl.Int64, eager=True)
    return column.replace_strict(names, at, return_dtype=pl.Int64).to_numpy()


def _tie_share(who: Int64, when: Int64) -> float:
    """Share of rows, sorted by user and time, whose time equals that of the row before or after of the same user."""
    same = (who[1:] == who[:-1]) & (when[1:] == when[:-1])
    tied = np.concatenate([same, [False]]) | np.concatenate([[False], same])
    return float(tied.mean())


def _chosen(values: Iterable[T], mask: Bool) -> tuple[T, ...]:
    return tuple(value for value, stays in zip(values, mask, strict=True) if stays)
