"""Data sets by name and by path.

`load` takes, in this order: a name (`embedded`, `ml-100k`, `synthetic`), a MovieLens zip or folder, a RecBole folder,
or any CSV, TSV or Parquet file. Nothing is downloaded. A rating becomes a strength by the scale its data set documents,
never by the lowest and highest value seen, which would be data.

Sources: the README of each MovieLens release, https://grouplens.org/datasets/movielens/; RecBole's atomic files,
https://recbole.io/docs/user_guide/data/atomic_files.html.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import polars as pl

from penchant.common.config import did_you_mean
from penchant.common.errors import InvalidConfig, MalformedData, MissingExtra, PenchantError
from penchant.simulations.data import tables
from penchant.simulations.data.cleaning import Repeats, assemble
from penchant.simulations.data.dataset import Dataset
from penchant.simulations.data.synthetic import synthetic

NAMED = ("embedded", "ml-100k", "synthetic")

GROUPLENS_TERMS = (
    "MovieLens, GroupLens Research, University of Minnesota: research use only, no commercial use without permission.\n"
    "Cite Harper and Konstan 2015, The MovieLens Datasets: History and Context, https://doi.org/10.1145/2827872."
)
UNKNOWN_TERMS = "A file of your own: its terms are not known to penchant."

WHOLE_STARS, HALF_STARS = (1.0, 5.0), (0.5, 5.0)
MOVIELENS_20 = "GroupLens publishes only users with at least 20 ratings"

GENRES_100K = (
    "unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama", "Fantasy",
    "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western",
)  # fmt: skip
"""The genres of ml-100k's u.item, in the order of its last 19 columns."""

Files = Mapping[str, Callable[[], bytes]]
"""What a folder or zip holds: a file's name and how to read it."""


class MissingDataset(MissingExtra):
    """A data set comes in a distribution that is not installed. Run the install line in the message."""

    def __init__(self, missing: str, install: str) -> None:
        PenchantError.__init__(self, f"{missing} is not installed; run: {install}")
        self.extra = install


def load(
    source: str | Path,
    *,
    items: str | Path | None = None,
    rating_scale: tuple[float, float] | None = None,
    skip_bad_rows: bool = False,
    repeats: Repeats = "keep",
    k_core: int = 0,
    seed: int = 0,
) -> Dataset:
    """A data set by name or path.

    Args:
        source: `embedded` (ml-latest-small), `ml-100k` (from an installed recbole), `synthetic` or
            `synthetic:users=6000,items=2000,interactions=165` (a mean per user), or a path: a MovieLens zip or its
            folder, a RecBole folder, a CSV, TSV or Parquet file with columns
            `user, item[, timestamp][, rating | strength][, event]`. Write `./ml-100k` for a folder of that name.
        items: for a CSV, TSV or Parquet file: the catalogue, with the columns of docs/content.md.
        rating_scale: the lowest and highest rating there is; known for MovieLens, else 0 to 5.
        skip_bad_rows: count malformed rows instead of raising.
        repeats: "keep" all of a user's interactions with one item, or only the "last".
        k_core: keep users and items with at least k interactions; 0 keeps all.
        seed: of synthetic data that names none.

    Raises:
        InvalidConfig: an unknown name, or an option that does not go with the source.
        MissingExtra: the data set's distribution is not installed.
        MalformedData: a file is missing or a row malformed; the message names file, line and column.
    """
    if repeats not in ("keep", "last"):
        raise InvalidConfig(f"repeats must be 'keep' or 'last', not {repeats!r}")
    if rating_scale is not None and not rating_scale[0] < rating_scale[1]:
        raise InvalidConfig(f"rating_scale must be (lowest, highest), not {rating_scale}")
    name = source if isinstance(source, str) else str(source.absolute())  # a Path is never a name
    path = Path(source)
    one_file = path.is_file() and path.suffix.lower() != ".zip" and name not in NAMED
    if items is not None and not one_file:
        if path.suffix and not path.exists():
            raise _nowhere(name)
        raise InvalidConfig("items goes with a CSV, TSV or Parquet file only")
    if name.partition(":")[0] == "synthetic":
        if k_core or skip_bad_rows or repeats != "keep" or rating_scale is not None:
            raise InvalidConfig("synthetic data takes only a seed: nothing in it needs cleaning")
        return synthetic(**{"seed": seed, **_options(name)})

    options = _Options(rating_scale=rating_scale, skip_bad_rows=skip_bad_rows, repeats=repeats, k_core=k_core)
    if name == "embedded":
        return _from_files("ml-latest-small", _folder(_embedded_path()), options)
    if name == "ml-100k":
        return _from_files("ml-100k", _folder(_recbole_path()), options)
    if one_file:
        return _from_table(path, Path(items) if items is not None else None, options)
    if path.is_dir():
        return _from_files(path.resolve().name, _folder(path), options)
    if path.is_file():
        return _from_files(path.stem, _zip(path), options)
    raise _nowhere(name)


@dataclass(frozen=True, kw_only=True)
class _Options:
    """How to read, as `load` takes it."""

    rating_scale: tuple[float, float] | None
    skip_bad_rows: bool
    repeats: Repeats
    k_core: int


def _from_table(path: Path, items: Path | None, options: _Options) -> Dataset:
    rows = tables.interaction_rows(
        tables.read(path), rating_scale=options.rating_scale, skip_bad_rows=options.skip_bad_rows
    )
    catalogue = tables.item_rows(tables.read(items), skip_bad_rows=options.skip_bad_rows) if items is not None else None
    return assemble(path.stem, rows, catalogue, terms=UNKNOWN_TERMS, repeats=options.repeats, k_core=options.k_core)


def _from_files(name: str, files: Files, options: _Options) -> Dataset:
    """A MovieLens or RecBole data set, told by its files."""
    atomic = next((file for file in sorted(files) if file.endswith(".inter")), None)
    if {"ratings.csv", "movies.csv"} <= files.keys():
        ratings = tables.read_text(files["ratings.csv"](), "ratings.csv")
        movies = tables.read_text(files["movies.csv"](), "movies.csv")
        scale = HALF_STARS
    elif {"ratings.dat", "movies.dat"} <= files.keys():
        ratings = _double_colons(files, "ratings.dat", ("user", "item", "rating", "timestamp"))
        movies = _double_colons(files, "movies.dat", ("item", "title", "genres"))
        scale = HALF_STARS if "tags.dat" in files else WHOLE_STARS  # ml-10m has tags, ml-1m has none
    elif {"u.data", "u.item"} <= files.keys():
        header = ("user", "item", "rating", "timestamp")
        ratings = tables.read_text(files["u.data"](), "u.data", header=header, separator="\t", quoted=False)
        movies = _u_item(files["u.item"]())
        scale = WHOLE_STARS
    elif atomic is not None:
        return _from_recbole(atomic, files, options)
    else:
        raise MalformedData(
            f"{name}: neither MovieLens (ratings.csv and movies.csv, ratings.dat and movies.dat, or u.data and u.item) "
            "nor RecBole (.inter)"
        )
    return _movielens(name, ratings, tables.item_rows(movies, skip_bad_rows=options.skip_bad_rows), scale, options)


def _from_recbole(atomic: str, files: Files, options: _Options) -> Dataset:
    name = atomic.removesuffix(".inter")
    ratings = tables.read_text(files[atomic](), atomic, separator="\t", quoted=False)
    items = None
    if f"{name}.item" in files:
        table = tables.read_text(files[f"{name}.item"](), f"{name}.item", separator="\t", quoted=False)
        items = tables.item_rows(table, between_topics=" ", skip_bad_rows=options.skip_bad_rows)
    if name.startswith("ml-") and items is not None:
        return _movielens(name, ratings, items, WHOLE_STARS if name in ("ml-100k", "ml-1m") else HALF_STARS, options)
    rows = tables.interaction_rows(ratings, rating_scale=options.rating_scale, skip_bad_rows=options.skip_bad_rows)
    return assemble(name, rows, items, terms=UNKNOWN_TERMS, repeats=options.repeats, k_core=options.k_core)


def _movielens(
    name: str, ratings: tables.Table, movies: tables.ItemRows, scale: tuple[float, float], options: _Options
) -> Dataset:
    rows = tables.interaction_rows(
        ratings, rating_scale=options.rating_scale or scale, skip_bad_rows=options.skip_bad_rows
    )
    return assemble(
        name,
        rows,
        movies,
        terms=GROUPLENS_TERMS,
        closed=True,
        repeats=options.repeats,
        k_core=options.k_core,
        uncharged=(MOVIELENS_20,),
    )


def _double_colons(files: Files, file: str, header: tuple[str, ...]) -> tables.Table:
    """A file of ml-1m or ml-10m: `::` between values, no header; ml-1m is Latin-1, ml-10m UTF-8."""
    data = files[file]()
    try:
        data.decode()
    except UnicodeDecodeError:
        data = data.decode("latin-1").encode()
    return tables.read_text(data.replace(b"::", b"\t"), file, header=header, separator="\t", quoted=False)


def _u_item(data: bytes) -> tables.Table:
    """ml-100k's u.item, Latin-1: id | title | release date | video date | address | one flag for each genre."""
    flags = [f"flag{i}" for i in range(len(GENRES_100K))]
    header = ("item", "title", "released", "video", "address", *flags)
    table = tables.read_text(data.decode("latin-1").encode(), "u.item", header=header, separator="|", quoted=False)
    rows = table.columns.select(flags).rows()
    topics = ["|".join(g for g, flag in zip(GENRES_100K, row, strict=True) if flag == "1") for row in rows]
    columns = table.columns.select("item", "title").with_columns(pl.Series("topics", topics, dtype=pl.String))
    return replace(table, columns=columns)


def _folder(path: Path) -> Files:
    """The files of a folder, or of its only subfolder where it has no files of its own."""
    entries = list(path.iterdir())
    if len(entries) == 1 and entries[0].is_dir():
        entries = list(entries[0].iterdir())
    return {entry.name: entry.read_bytes for entry in entries if entry.is_file()}


def _zip(path: Path) -> Files:
    """The files of a zip by their names without folders, whatever its suffix."""
    try:
        archive = zipfile.ZipFile(path)
    except zipfile.BadZipFile as e:
        raise MalformedData(f"{path.name}: not a zip that can be read") from e
    with archive:
        names = [n for n in archive.namelist() if not n.endswith("/") and not n.startswith("__MACOSX")]
    return {name.rpartition("/")[2]: partial(_member, path, name) for name in names}


def _member(path: Path, name: str) -> bytes:
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.read(name)
    except (zipfile.BadZipFile, zlib.error) as e:
        raise MalformedData(f"{path.name}: {name} is damaged") from e


def _embedded_path() -> Path:
    try:
        return Path(importlib.import_module("penchant_movielens").path())
    except ModuleNotFoundError as e:
        raise MissingDataset("penchant-movielens", "pip install ./movielens (in penchant's repository)") from e


def _recbole_path() -> Path:
    """Where RecBole's wheel keeps ml-100k; found without importing it, which would need torch and more."""
    missing = MissingDataset(
        "recbole, whose wheel holds ml-100k,",
        "pip install --no-deps recbole==1.2.1 (or give the path of your own copy)",
    )
    try:
        folder = Path(str(importlib.metadata.distribution("recbole").locate_file("recbole/dataset_example/ml-100k")))
    except importlib.metadata.PackageNotFoundError as e:
        raise missing from e
    if not folder.is_dir():
        raise missing
    return folder


def _options(name: str) -> dict[str, Any]:
    """The arguments in `synthetic:users=6000,zipf=0.9`.

    >>> _options("synthetic:users=6000,zipf=0.9")
    {'users': 6000, 'zipf': 0.9}
    """
    known = inspect.signature(synthetic).parameters
    given: dict[str, Any] = {}
    for part in filter(None, name.partition(":")[2].split(",")):
        key, _, value = (word.strip() for word in part.partition("="))
        if key not in known:
            raise InvalidConfig(f"synthetic has no option {key!r}{did_you_mean(key, known)}")
        kind = type(known[key].default)
        try:
            given[key] = kind(value)
        except ValueError as e:
            raise InvalidConfig(f"synthetic: {key} must be {_KINDS[kind]}, not {value!r}") from e
    return given


_KINDS: Mapping[type, str] = {int: "a whole number", float: "a number"}


def _nowhere(name: str) -> PenchantError:
    """What to say when `name` is neither a known name nor a path that exists."""
    if Path(name).suffix or "/" in name or "\\" in name:
        return MalformedData(f"{name}: no such file or folder")
    if name.startswith("ml-"):
        return InvalidConfig(f"{name!r} does not come with penchant; give the path of GroupLens' zip or its folder")
    return InvalidConfig(f"no data set or file {name!r}{did_you_mean(name.partition(':')[0], NAMED)}")
