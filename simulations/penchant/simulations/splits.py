"""Splits of a population's interactions into what learners may use, what tunes them and what tests them.

Leave-last-out is what most papers report and leaks the future: other people's later interactions train the item model.
One cut in time does not. Held-out users test what penchant claims for a device: a person never seen in training needs
none. In every split a target is an item new to the history it is tested on; a last interaction that repeats an earlier
item is no target.

Sources: Meng et al. 2020, "Exploring Data Splitting Strategies for the Evaluation of Recommendation Models",
https://arxiv.org/abs/2007.13237; Ji et al. 2023, "A Critical Study on Data Leakage in Recommender System Offline
Evaluation", https://arxiv.org/abs/2010.11060.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import numpy as np

from penchant.common.arrays import Bool, Int64
from penchant.common.config import did_you_mean
from penchant.common.errors import InvalidConfig
from penchant.common.interactions import Interactions
from penchant.common.streams import Streams

NAMES = ("leave-last-out", "global-time", "held-out-users", "5-fold-users:0")
"""One of each kind that `split` takes; folds are numbered from 0."""


@dataclass(frozen=True, kw_only=True)
class Split:
    """One way to train, tune and test. All four parts have the same people in the same order.

    Attributes:
        name: as `split` takes it.
        train: what learners may use.
        validation: held-out items for tuning, given `train` as history; new to it.
        history: what a device knows when it is tested.
        targets: what it is tested on; new to its history. A user without targets is not scored.
        participants: bool[n_users], who may take part in training; the others have no rows in `train`.
        notes: plain sentences to print beside results.
        uncharged: what was decided from everybody's data outside any accounting, in plain words.
    """

    name: str
    train: Interactions
    validation: Interactions
    history: Interactions
    targets: Interactions
    participants: Bool
    notes: tuple[str, ...]
    uncharged: tuple[str, ...] = ()


def split(name: str, data: Interactions, seed: int = 0) -> Split:
    """The split of this name: "leave-last-out", "global-time", "held-out-users" or "5-fold-users:0".

    Raises:
        InvalidConfig: no such split, or the data cannot be split so.
    """
    if name == "leave-last-out":
        return leave_last_out(data)
    if name == "global-time":
        return global_time(data)
    if name == "held-out-users":
        return held_out_users(data, seed=seed)
    if folds := re.fullmatch(r"(\d+)-fold-users:(\d+)", name):
        return k_fold_users(data, k=int(folds[1]), fold=int(folds[2]), seed=seed)
    raise InvalidConfig(f"no split {name!r}{did_you_mean(name, NAMES)}")


def leave_last_out(data: Interactions) -> Split:
    """Each person's last interaction is the target, the one before it the validation item.

    Whoever has fewer than three interactions keeps all of them in `train` and is not scored.
    """
    from_end = _from_end(data)
    enough = np.repeat(data.lengths >= 3, data.lengths)
    target, validation = enough & (from_end == 0), enough & (from_end == 1)
    notes = [_ties(data, data.lengths >= 3), "Other people's later interactions train the item model."]
    everybody = np.ones(data.n_users, np.bool_)
    return _split("leave-last-out", data, ~target & ~validation, validation, ~target, target, everybody, notes)


def global_time(data: Interactions, *, test_share: float = 0.1, validation_share: float = 0.1) -> Split:
    """One cut in time for everybody: what comes after it is the target of whoever comes.

    Items that nobody had before the cut stay targets. Whoever has no interaction before the validation window is not
    enrolled yet and takes no part in training; whoever has none before the test is scored with an empty history.

    Args:
        data: with times.
        test_share: share of interactions after the cut, in (0, 1); those at the very time of the cut come after it.
        validation_share: share in the window before the cut, in [0, 1).

    Raises:
        InvalidConfig: shares out of range, or so few different times that nothing is left to train on.
    """
    if not (0 < test_share < 1 and 0 <= validation_share < 1 and test_share + validation_share < 1):
        raise InvalidConfig("test_share and validation_share must be positive and sum to less than 1")
    n = len(data)
    ordered = np.sort(data.times)
    if not n or ordered[0] == ordered[-1]:
        raise InvalidConfig("global-time needs interactions at different times; use leave-last-out")
    cut = ordered[int(n * (1 - test_share))]
    window = ordered[int(n * (1 - test_share - validation_share))]
    train, history = data.times < window, data.times < cut
    if not train.any():
        raise InvalidConfig("global-time leaves nothing to train on: too many interactions share the earliest time")
    enrolled = np.bincount(data.rows[train], minlength=data.n_users) > 0
    strangers = np.setdiff1d(data.rows[~history], data.rows[history]).size
    notes = [
        f"Interactions from {_day(cut)} on are the test, those from {_day(window)} to then validation.",
        f"{int(enrolled.sum()):,} of {data.n_users:,} users had come before the validation window and take part.",
        f"{strangers:,} users first come after the cut and are scored with an empty history.",
    ]
    parts = _split("global-time", data, train, history & ~train, history, ~history, enrolled, notes)
    return replace(parts, uncharged=("the cut in time and the roster before it follow from everybody's times",))


def held_out_users(data: Interactions, *, share: float = 0.1, seed: int = 0) -> Split:
    """A share of the people takes no part in training; each is tested on the last item, given all before it.

    Of everybody else the last item is for validation and the rest is in `train` (all of it, where a person has fewer
    than three); they are not scored. A held-out person with fewer than two interactions is not scored.

    Raises:
        InvalidConfig: the share is not in (0, 1), or leaves nobody on one side.
    """
    if not 0 < share < 1:
        raise InvalidConfig(f"share must be in (0, 1), not {share}")
    shuffled = Streams(seed).get("held-out-users").permutation(data.n_users)
    return _without("held-out-users", data, shuffled[: max(1, round(share * data.n_users))])


def k_fold_users(data: Interactions, *, k: int, fold: int, seed: int = 0) -> Split:
    """As `held_out_users`, with the people dealt into k folds of equal size (within one) and one fold held out.

    Raises:
        InvalidConfig: k < 2, more folds than people, or no such fold.
    """
    if not 2 <= k <= data.n_users:
        raise InvalidConfig(f"folds must be from 2 to the number of users, not {k}")
    if not 0 <= fold < k:
        raise InvalidConfig(f"fold must be from 0 to {k - 1}, not {fold}")
    shuffled = Streams(seed).get("k-fold-users").permutation(data.n_users)
    return _without(f"{k}-fold-users:{fold}", data, shuffled[fold::k])


def _without(name: str, data: Interactions, held_out: Int64) -> Split:
    participants = np.ones(data.n_users, np.bool_)
    participants[held_out] = False
    if not participants.any():
        raise InvalidConfig(f"{name} leaves nobody to train on")
    takes_part = np.repeat(participants, data.lengths)
    last = _from_end(data) == 0
    validation = last & takes_part & np.repeat(data.lengths >= 3, data.lengths)
    target = last & ~takes_part & np.repeat(data.lengths >= 2, data.lengths)
    notes = [
        f"{len(held_out):,} of {data.n_users:,} users take no part in training.",
        _ties(data, ~participants & (data.lengths >= 2)),
    ]
    return _split(name, data, takes_part & ~validation, validation, ~target, target, participants, notes)


def _split(
    name: str,
    data: Interactions,
    train: Bool,
    validation: Bool,
    history: Bool,
    targets: Bool,
    participants: Bool,
    notes: list[str],
) -> Split:
    """Builds a split from its masks (each bool[n]), less validation items and targets that are not new."""
    new_targets = _new(data, history, targets)
    scored = np.bincount(data.rows[new_targets], minlength=data.n_users) > 0
    notes.append(f"{int(scored.sum()):,} of {data.n_users:,} users are scored on {int(new_targets.sum()):,} targets.")
    if old := int(targets.sum() - new_targets.sum()):
        notes.append(f"{old:,} held-out interactions repeat an item and are no targets.")
    return Split(
        name=name,
        train=data.keep(train),
        validation=data.keep(_new(data, train, validation)),
        history=data.keep(history),
        targets=data.keep(new_targets),
        participants=participants,
        notes=tuple(notes),
    )


def _new(data: Interactions, history: Bool, held_out: Bool) -> Bool:
    """Held-out rows whose item their user has neither in the history nor in an earlier held-out row."""
    pairs = data.rows.astype(np.int64) * data.n_items + data.items
    at = np.flatnonzero(held_out)
    _, first = np.unique(pairs[at], return_index=True)
    at = at[np.sort(first)]
    out = np.zeros(len(data), np.bool_)
    out[at[~np.isin(pairs[at], pairs[history])]] = True
    return out


def _from_end(data: Interactions) -> Int64:
    """int64[n], how many of their user's interactions come after each."""
    return np.asarray(np.repeat(data.offsets[1:], data.lengths) - 1 - np.arange(len(data)), np.int64)


def _ties(data: Interactions, users: Bool) -> str:
    """Says for how many of `users` (bool[n_users], each with two interactions or more) file order chose the last."""
    last = data.offsets[1:][users] - 1
    tied = int((data.times[last] == data.times[last - 1]).sum())
    share = tied / max(len(last), 1)
    return f"{share:.1%} of tested users have a last item that ties in time with the one before; file order decides."


def _day(time: np.int64) -> str:
    """A time in UTC ms as a date.

    >>> _day(np.int64(0))
    '1970-01-01'
    """
    return str(np.datetime64(int(time), "ms").astype("datetime64[D]"))
