"""What a catalogue says of its items, as rows of numbers.

    row = [w₁ x₁ | w₂ x₂ | …] / √(Σ w² over the kinds that the item has)

Each kind of column (labels, categories, numbers, texts, titles, vectors) gives one block xₖ whose rows have length 1,
or are zero where nothing is known; several columns of one kind share their block in the same way. So a row has length
1 or is zero, and what is missing takes nothing from what is there. Only the public catalogue is read: it costs no
privacy, and device and server find the same rows.

- Labels: topics, and the decade of a title's year, one column each.
- Categories: one column a word, or hashed where there are more words than the width.
- Numbers: a share to each of the two nearest knots, which are quantiles of the column, so that neither unit, scale nor
  outlier matters.
- Texts and titles: TF-IDF, (1 + ln tf) · (1 + ln((1 + n) / (1 + df))), each term added to one of `width` columns with
  a sign, both from a hash of the term. Scripts with spaces give words, those without give pairs and triples of
  characters.

A row costs the user side p² and p³ work, p its length, so learners take them `condensed` to 64 numbers.

Sources: Salton and Buckley 1988, Term-weighting approaches in automatic text retrieval (TF-IDF, with the smoothing
that keeps a term of every item). Weinberger et al. 2009, Feature hashing for large scale multitask learning,
https://arxiv.org/abs/0902.2206, section 2 (the sign makes inner products unbiased).
"""

from __future__ import annotations

import hashlib
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from penchant.common.arrays import Float32, Float64, Int64
from penchant.common.catalogue import Catalogue, decade
from penchant.common.errors import InvalidConfig

_WEIGHTS = ("labels", "topics", "years", "categories", "numbers", "texts", "titles", "vectors")


@dataclass(frozen=True, kw_only=True)
class ContentConfig:
    """How much each kind of column counts, and how text becomes numbers. Every field is public.

    A weight is 0, which leaves the kind out, or from 1e-6 to 1e6. Only their ratios matter.

    Attributes:
        labels: weight of topics and decade together.
        topics: of one topic, among the labels.
        years: of the decade, among the labels.
        categories: weight of all category columns together.
        numbers: of all number columns together.
        texts: of all text columns together.
        titles: of the titles' words, their year left out.
        vectors: of all given vectors together.
        width: columns of each hashed text column, from 16 to 65,536.
        shortest, longest: characters in a piece of a script without spaces.
        knots: of a number column, from 2 to 64.
    """

    labels: float = 1.0
    topics: float = 1.0
    years: float = 1.0
    categories: float = 1.0
    numbers: float = 1.0
    texts: float = 1.0
    titles: float = 0.0
    vectors: float = 1.0
    width: int = 256
    shortest: int = 2
    longest: int = 3
    knots: int = 8

    def __post_init__(self) -> None:
        for name in _WEIGHTS:
            if getattr(self, name) != 0.0 and not 1e-6 <= getattr(self, name) <= 1e6:  # also refuses NaN
                raise InvalidConfig(f"{name} must be 0 or from 1e-6 to 1e6, not {getattr(self, name)}")
        for name, least, most in (("width", 16, 65_536), ("shortest", 1, 8), ("longest", 1, 8), ("knots", 2, 64)):
            if not least <= getattr(self, name) <= most:
                raise InvalidConfig(f"{name} must be from {least} to {most}, not {getattr(self, name)}")
        if self.shortest > self.longest:
            raise InvalidConfig(f"shortest must be at most longest, not {self.shortest} > {self.longest}")


def features(catalogue: Catalogue, config: ContentConfig | None = None) -> Float32:
    """float32[n_items, p]: each item's row, of length 1 or all zero.

    The first columns are `catalogue.features`, unless labels count 0. A catalogue of titles and topics alone gives
    `catalogue.content`.

    Args:
        config: None takes every default.
    """
    c = config or ContentConfig()
    n = len(catalogue)
    kinds: list[tuple[float, Iterator[Float64]]] = [
        (c.labels, iter([_labels(catalogue, c)])),
        (c.categories, (_one_hot(words, c.width) for words in catalogue.categories.values())),
        (c.numbers, (_knots(values, c.knots) for values in catalogue.numbers.values())),
        (c.texts, (hashed(texts, c) for texts in catalogue.texts.values())),
        (c.titles, iter([hashed([_UNDATED.sub("", title) for title in catalogue.titles], c)] if c.titles else [])),
        (c.vectors, (_unit(rows.astype(np.float64)) for rows in catalogue.vectors.values())),
    ]
    blocks = [(weight, _beside(n, [(1.0, block) for block in columns])) for weight, columns in kinds if weight]
    return _beside(n, blocks).astype(np.float32)


def condensed(rows: Float32, dims: int = 64) -> Float32:
    """float32[n_items, ≤ dims]: the rows as they are, or their parts along the directions that most of them share.

    Inner products are kept as well as so many numbers can (Eckart and Young 1936); nothing else of the rows is used by
    a taste, whose work grows with p³.

    Args:
        rows: float32[n_items, p].
    """
    if rows.shape[1] <= dims:
        return rows
    wide = rows.astype(np.float64)
    if len(rows) < rows.shape[1]:
        squares, left = np.linalg.eigh(wide @ wide.T)
        few: Float32 = (left * np.sqrt(np.maximum(squares, 0.0)))[:, ::-1][:, :dims].astype(np.float32)
        return few
    _, basis = np.linalg.eigh(wide.T @ wide)
    out: Float32 = (wide @ basis[:, ::-1][:, :dims]).astype(np.float32)
    return out


def terms(text: str, shortest: int = 2, longest: int = 3) -> list[str]:
    """What a text is made of: words, and pieces of what is written without spaces between words.

    Case, width and compatibility forms do not matter (NFKC, case folded). A run shorter than `shortest` is one piece.

    >>> terms("Café at NOON")
    ['café', 'at', 'noon']
    >>> terms("東京物語 1953")
    ['東京', '京物', '物語', '東京物', '京物語', '1953']
    """
    out: list[str] = []
    for word in unicodedata.normalize("NFKC", text).casefold().translate(_SPACED).split():
        if word.isascii():
            out.append(word)
            continue
        for run in _RUNS.findall(word):
            if not _UNSPACED.match(run) or len(run) < shortest:
                out.append(run)
                continue
            for n in range(shortest, longest + 1):
                out += [run[i : i + n] for i in range(len(run) - n + 1)]
    return out


def hashed(texts: Sequence[str], config: ContentConfig) -> Float64:
    """float64[n, width]: TF-IDF of these texts, among these texts; rows of length 1, zero where there is no term."""
    place: dict[str, int] = {}
    counts: list[int] = []
    at: list[int] = []
    row: list[int] = []
    for i, text in enumerate(texts):
        found = Counter(terms(text, config.shortest, config.longest))
        at += [place.setdefault(term, len(place)) for term in found]
        counts += found.values()
        row += [i] * len(found)
    term = np.array(at, np.int64)
    n_texts = np.bincount(term, minlength=len(place))
    rarity = _logs((1 + len(texts)) / (1 + n_texts)) + 1.0
    column, sign = _columns(place, config.width)
    value = (1.0 + _logs(np.array(counts, np.float64))) * (rarity * sign)[term]
    into = np.array(row, np.int64) * config.width + column[term]
    out = np.bincount(into, weights=value, minlength=len(texts) * config.width)
    return _unit(out.reshape(len(texts), config.width).astype(np.float64))  # integers where there is no term at all


def _labels(catalogue: Catalogue, config: ContentConfig) -> Float64:
    """Topics that are not sensitive, and decade; a topic named as the item's decade is one label, the larger weight."""
    column = {name: j for j, name in enumerate(catalogue.features)}
    out = np.zeros((len(catalogue), len(column)))
    for i, (title, topics) in enumerate(zip(catalogue.titles, catalogue.topics, strict=True)):
        if (year := decade(title)) and year in column:
            out[i, column[year]] = config.years
        for topic in topics:
            if topic in column:
                out[i, column[topic]] = max(out[i, column[topic]], config.topics)
    return _unit(out)


def _one_hot(words: Sequence[str], width: int) -> Float64:
    """One column a word in the order of words, or `width` hashed ones; "" has none."""
    names = sorted({word for word in words if word})
    column, sign = (np.arange(len(names)), np.ones(len(names))) if len(names) <= width else _columns(names, width)
    place = {name: j for j, name in enumerate(names)}
    out = np.zeros((len(words), min(len(names), width)))
    for i, word in enumerate(words):
        if word:
            out[i, column[place[word]]] = sign[place[word]]
    return out


def _knots(values: Sequence[float], n: int) -> Float64:
    """Each value shared between the knots on either side of it; beyond the outer knots, all of it to the outer one."""
    x = np.array(values, np.float64)
    known = ~np.isnan(x)
    if not known.any():
        return np.zeros((len(x), 0))
    x = x / (np.abs(x[known]).max() or 1.0)  # so that no difference below is infinite
    knots = np.unique(np.quantile(x[known], np.linspace(0, 1, n), method="lower"))
    out = np.zeros((len(x), len(knots)))
    rows = np.flatnonzero(known)
    if len(knots) == 1:
        out[rows, 0] = 1.0
        return out
    upper = np.clip(np.searchsorted(knots, x[rows]), 1, len(knots) - 1)
    share = (x[rows] - knots[upper - 1]) / (knots[upper] - knots[upper - 1])
    out[rows, upper - 1], out[rows, upper] = 1.0 - share, share
    return _unit(out)


def _beside(n: int, blocks: Iterable[tuple[float, Float64]]) -> Float64:
    """Blocks of unit rows, weighted, side by side; rows of length 1, or zero where every block's is."""
    weighted = [(weight, block, block.any(axis=1)) for weight, block in blocks if block.shape[1]]
    squares = np.zeros(n)
    for weight, _, known in weighted:
        squares += weight**2 * known
    length = np.sqrt(np.where(squares > 0, squares, 1.0))
    return np.hstack([np.zeros((n, 0)), *(block * (weight / length)[:, None] for weight, block, _ in weighted)])


def _unit(rows: Float64) -> Float64:
    """Rows scaled to length 1, zero rows left. Summed in order, so that every machine finds the same."""
    i, j = np.nonzero(rows)
    squares = np.bincount(i, weights=rows[i, j] ** 2, minlength=len(rows))
    return rows / np.sqrt(np.where(squares > 0, squares, 1.0))[:, None]


def _columns(names: Iterable[str], width: int) -> tuple[Int64, Float64]:
    """The hashed column of each name, and its sign."""
    digests = [hashlib.blake2b(name.encode(errors="surrogatepass"), digest_size=8).digest() for name in names]
    bits = np.frombuffer(b"".join(digests), "<u8").astype(np.uint64)
    return (bits % np.uint64(width)).astype(np.int64), np.where(bits >> np.uint64(63), -1.0, 1.0)


def _logs(values: npt.NDArray[np.float64]) -> Float64:
    """Natural logarithms by `math`: NumPy's differ in the last digit from processor to processor."""
    distinct, at = np.unique(values, return_inverse=True)
    return np.array([math.log(value) for value in distinct], np.float64)[at]


class _Spaced(dict[int, str]):
    """Turns what is neither letter, digit nor the mark on one into a space; filled as characters are met."""

    def __missing__(self, code: int) -> str:
        kept = chr(code) if unicodedata.category(chr(code))[0] in "LMN" else " "
        return self.setdefault(code, kept)


_SPACED: Mapping[int, str] = _Spaced()
_UNDATED = re.compile(r"\(\d{4}\)\s*$")

# Thai and Lao, Myanmar, Hangul, Khmer, kana, Han with its extensions. Korean has spaces, but what follows a noun is
# written on to it.
_NO_SPACES = (
    "\u0e00-\u0eff\u1000-\u109f\u1100-\u11ff\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u3130-\u318f\u31f0-\u31ff"
    "\u3400-\u4dbf\u4e00-\u9fff\ua960-\ua97f\uac00-\ud7ff\uf900-\ufaff\U00020000-\U0003ffff"
)
_RUNS = re.compile(f"[{_NO_SPACES}]+|[^{_NO_SPACES}]+")
_UNSPACED = re.compile(f"[{_NO_SPACES}]")
