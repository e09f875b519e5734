"""Reading files into checked columns: what is accepted, and where a fault is said to be."""

from __future__ import annotations

import math
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penchant.common.errors import MalformedData
from penchant.simulations.data.tables import interaction_rows, item_rows, read, read_text, times_ms

NOON = 1_537_790_400_000  # 2018-09-24 12:00 UTC, worked out with `date -u -d @1537790400`


def rows_of(text: str) -> pl.DataFrame:
    return interaction_rows(read_text(text.encode(), "log.csv")).frame


def fault(text: str) -> str:
    with pytest.raises(MalformedData) as error:
        rows_of(text)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_csv_becomes_text_times_and_strengths() -> None:
    frame = rows_of("userId,movieId,rating,timestamp\n7,a,4.5,1537790400\n8,b,0,1537790401\n")
    assert frame.select("user", "item", "time", "event").rows() == [
        ("7", "a", NOON, "rate"),
        ("8", "b", NOON + 1000, "rate"),
    ]
    assert frame["strength"].to_list() == pytest.approx([0.9, 0.0])
    assert frame["strength"].dtype == pl.Float32


@pytest.mark.parametrize(
    "header", ["user,item", "user_id,item_id", "userId,movieId", "User ID,Item-ID", "user_id:token,item_id:token"]
)
def test_columns_are_found_by_their_usual_names(header: str) -> None:
    assert rows_of(f"{header}\nu,i\n").select("user", "item").rows() == [("u", "i")]


@pytest.mark.parametrize("separator", [",", "\t", ";"])
def test_the_separator_is_the_one_the_header_uses(separator: str) -> None:
    text = "user,item,event\na,b,buy\n".replace(",", separator)
    assert rows_of(text).select("user", "item", "event").rows() == [("a", "b", "buy")]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_line_ends_byte_order_mark_blank_lines_and_spaces_do_not_matter(end: str, mark: str) -> None:
    text = mark + end.join(["user,item", " a ,b", "", "c,d", "", ""])
    assert rows_of(text).select("user", "item").rows() == [("a", "b"), ("c", "d")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("user,item,rating\na,1,3\na,2,x\n", "log.csv, line 3, column 'rating': not a rating from 0 to 5"),
        ("user,item,rating\na,1,3\n\n\na,2,nan\n", "log.csv, line 5, column 'rating': not a rating from 0 to 5"),
        ("user,item,rating\na,1,3\na,,3\n", "log.csv, line 3, column 'item': the value is missing"),
        ("user,item,rating\na,1,3\na,2\n", "log.csv, line 3, column 'rating': the value is missing"),
        ("user,item\na,1\na,2,3\nb\n", "log.csv, line 3: more values than the 2 columns"),
        ("user,item,time\na,1,5\na,2,soon\n", "log.csv, line 3, column 'time': not a time"),
        ("user,item,time\na,1,5\na,2,1e18\n", "log.csv, line 3, column 'time': not a time"),
        ("user,item,strength\na,1,1\na,2,1.01\n", "log.csv, line 3, column 'strength': not a number from 0 to 1"),
        ("user,item,event\na,1,view\n,2,view\na,2,\n", "log.csv, line 3, column 'user': the value is missing"),
        # the quoted line end makes one row of lines 2 and 3
        ('user,item,rating\n"a\nb",1,3\nc,2,x\n', "log.csv, line 4, column 'rating': not a rating"),
        ('user,item,rating\n"a,b",1,3\n\nc,2\n', "log.csv, line 4, column 'rating': the value is missing"),
        ('user,item\n"a",1\nc,"2\nd,3\n', "log.csv, line 3: unexpected end of data"),
        ("user,item,rating\na,1,9\n", "give the scale as rating_scale=(lowest, highest)"),
    ],
)
def test_a_malformed_row_is_named_by_line_column_and_reason(text: str, message: str) -> None:
    assert message in fault(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "log.csv: empty file"),
        ("user,item\n", "log.csv: no rows below the header"),
        ("user,item\ra,1\rb,2\r", "log.csv, line 1: not a header that can be read"),
        ("user,item\n,\n", "log.csv: not one row can be used"),
        ("usr_id,item\na,1\n", "no column for the user; did you mean 'usr_id'?"),
        ("1,2,3\n4,5,6\n", "no column for the user; name it user or userid (it has: 1, 2, 3)"),
        ("user,user,item\na,b,c\n", "two columns are named 'user'"),
        ("user,userId,item\na,b,c\n", "columns 'user' and 'userId' both mean user"),
        ("user,item,rating,strength\na,b,1,1\n", "has both 'rating' and 'strength'"),
    ],
)
def test_a_file_that_cannot_be_read_says_why(text: str, message: str) -> None:
    assert message in fault(text)


def test_bytes_that_are_not_utf8_are_named_by_line() -> None:
    with pytest.raises(MalformedData, match=r"log.csv, line 3: not UTF-8"):
        read_text("user,item\na,1\né,2\n".encode("latin-1"), "log.csv")


@pytest.mark.parametrize("quote", ["", '"'])
def test_bad_rows_are_skipped_and_counted_when_asked(quote: str) -> None:
    text = f"user,item,rating\n{quote}a{quote},1,3\na,2,x\na,,3\na,4,5,6\n,,\nb,5,5\n"
    read_rows = interaction_rows(read_text(text.encode(), "log.csv"), skip_bad_rows=True)
    assert read_rows.frame.select("user", "item").rows() == [("a", "1"), ("b", "5")]
    assert (read_rows.rows_read, read_rows.missing, read_rows.malformed) == (5, 1, 2)


def test_skipping_bad_rows_does_not_hide_a_wrong_rating_scale() -> None:
    table = read_text(b"user,item,rating\na,1,3\na,2,8\n", "log.csv")
    with pytest.raises(MalformedData, match=r"line 3.*rating_scale"):
        interaction_rows(table, skip_bad_rows=True)
    assert interaction_rows(table, rating_scale=(1, 9)).frame["strength"].to_list() == pytest.approx([0.25, 0.875])
    assert interaction_rows(table, rating_scale=(1, 5), skip_bad_rows=True).malformed == 1


word = st.text(
    st.characters(codec="utf-8", exclude_characters='"\r\n\t,;\x00', exclude_categories=["Z", "C"]), min_size=1
)


@given(values=st.lists(st.tuples(word, word), min_size=1, max_size=8))
def test_quoted_and_plain_text_are_read_alike(values: list[tuple[str, str]]) -> None:
    plain = "user,item\n" + "".join(f"{u},{i}\n" for u, i in values)
    quoted = "user,item\n" + "".join(f'"{u}","{i}"\n' for u, i in values)
    assert rows_of(plain).equals(rows_of(quoted))
    assert rows_of(plain).select("user", "item").rows() == values


@pytest.mark.parametrize(
    "text",
    [
        "1537790400",
        "1537790400000",
        "1537790400.0",
        "2018-09-24T12:00:00Z",
        "2018-09-24 12:00",
        "2018-09-24T12:00:00.000",
        "2018-09-24T14:00:00+02:00",
        "2018-09-24T10:00:00-0200",
    ],
)
def test_times_may_be_seconds_milliseconds_or_iso_text(text: str) -> None:
    assert times_ms(pl.Series([text])).to_list() == [NOON]


def test_a_column_has_one_unit_decided_by_its_median() -> None:
    assert times_ms(pl.Series([1, 1_537_790_400, 1_537_790_400])).to_list() == [1000, NOON, NOON]
    assert times_ms(pl.Series([1, NOON, NOON])).to_list() == [1, NOON, NOON]
    assert times_ms(pl.Series(["2018-09-24", "1537790400", None])).to_list() == [NOON - 43_200_000, None, None]


def test_parquet_is_read_with_its_own_types_and_faults_are_named_by_row(tmp_path: Path) -> None:
    file = tmp_path / "log.parquet"
    frame = pl.DataFrame(
        {
            "user_id": [1, 2],
            "item_id": [3.0, 4.0],
            "ts": [datetime(2018, 9, 24, 12, tzinfo=UTC)] * 2,
            "rating": [5, 4],
        }
    )
    frame.write_parquet(file)
    read_rows = interaction_rows(read(file)).frame
    assert read_rows.select("user", "item", "time").rows() == [("1", "3", NOON), ("2", "4", NOON)]
    frame.with_columns(rating=pl.Series([5, None])).write_parquet(file)
    with pytest.raises(MalformedData, match=r"log.parquet, row 2, column 'rating': the value is missing"):
        interaction_rows(read(file))
    frame.with_columns(user_id=pl.Series([[1], [2]])).write_parquet(file)
    with pytest.raises(MalformedData, match=r"column 'user_id' holds lists"):
        interaction_rows(read(file))
    file.write_text("user,item\n")
    with pytest.raises(MalformedData, match="not a Parquet file"):
        read(file)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(MalformedData, match=r"gone.csv: no such file"):
        read(tmp_path / "gone.csv")


def test_items_keep_commas_quotes_and_accents_in_titles() -> None:
    text = 'movieId,title,genres\n1,"Misérables, Les (1995)",Drama|War\n2,"He said ""no"" (2001)",(no genres listed)\n'
    items = item_rows(read_text(text.encode(), "movies.csv"))
    assert items.ids == ("1", "2")
    assert items.titles == ("Misérables, Les (1995)", 'He said "no" (2001)')
    assert items.topics == (("Drama", "War"), ())


def test_a_column_of_years_dates_titles_and_a_missing_title_is_counted() -> None:
    items = item_rows(read_text(b"item,title,year\n1,Alien,1979\n2,Up (2009),2009\n3,,2001\n4,Old,\n", "items.csv"))
    assert items.titles == ("Alien (1979)", "Up (2009)", "3 (2001)", "Old")
    assert items.untitled == 1


def test_an_item_listed_twice_is_refused_or_kept_once() -> None:
    table = read_text(b"item,title\n1,a\n\n2,b\n1,c\n,d\n", "items.csv")
    with pytest.raises(MalformedData, match=r"items.csv, line 5, column 'item': an earlier row"):
        item_rows(table)
    items = item_rows(table, skip_bad_rows=True)
    assert (items.ids, items.titles, items.malformed) == (("1", "2"), ("a", "b"), 2)


def test_topics_may_be_a_parquet_list(tmp_path: Path) -> None:
    pl.DataFrame({"item": [1, 2], "topics": [["a", "b"], []]}).write_parquet(tmp_path / "items.parquet")
    assert item_rows(read(tmp_path / "items.parquet")).topics == (("a", "b"), ())


# -------------------------------------------------------------------------------------------------- typed columns


def items_fault(text: str) -> str:
    with pytest.raises(MalformedData) as error:
        item_rows(read_text(text.encode(), "items.csv"))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_columns_named_by_their_kind_are_read_and_others_are_ignored() -> None:
    text = (
        "item,genres,category:studio,Number: runtime,text:plot,vector:poster,retired,shelf,tag\n"
        '1,a|b,Pixar,81,"Toys, alive",0.5 -1,false,A,slow\n'
        "2,,,,,,,B,slow\n"
        "3,a,Fox,1e2,在太空,  3   4 ,Yes,C,slow\n"
    )
    items = item_rows(read_text(text.encode(), "items.csv"))
    assert items.topics == (("a", "b"), (), ("a",))
    assert items.categories == {"studio": ("Pixar", "", "Fox")}
    assert repr(items.numbers) == repr({"runtime": (81.0, math.nan, 100.0)})
    assert items.texts == {"plot": ("Toys, alive", "", "在太空")}
    assert list(items.vectors) == ["poster"]
    assert items.vectors["poster"].tolist() == [[0.5, -1], [0, 0], [3, 4]]
    assert items.vectors["poster"].dtype == np.float32
    assert items.retired == {"3"}
    assert items.ignored == ("shelf", "tag")


def test_a_topic_that_one_row_names_sensitive_is_so_everywhere_and_a_slip_is_never_passed_over() -> None:
    text = "item,genres,sensitive\n1,Drama|Health,Health\n2,Health|War,\n,War,War\n4,Drama,\n"
    items = item_rows(read_text(text.encode(), "items.csv"), skip_bad_rows=True)
    assert (items.ids, items.malformed) == (("1", "2", "4"), 1)
    assert items.sensitive == {"Health", "War"}  # the row without an item counts too
    assert "sensitive" not in items.ignored
    slip = b"item,genres,sensitive\n1,Health,Health\n2,Drama,Heath\n"
    for skip in (False, True):
        with pytest.raises(MalformedData, match="line 3, column 'sensitive': a topic that this item does not have"):
            item_rows(read_text(slip, "items.csv"), skip_bad_rows=skip)


def test_a_recbole_type_is_not_the_name_of_a_typed_column() -> None:
    items = item_rows(read_text(b"item_id:token\tcategory:token_seq\tnumber:float\n1\ta|b\t3\n", "x.item"))
    assert (items.topics, items.categories, items.numbers) == ((("a", "b"),), {}, {})
    assert items.ignored == ("number:float",)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("item,number:age\n1,3\n\n2,old\n", "items.csv, line 4, column 'number:age': not a finite number"),
        ("item,number:age\n1,inf\n", "items.csv, line 2, column 'number:age': not a finite number"),
        ("item,retired\n1,no\n2,maybe\n", "items.csv, line 3, column 'retired': neither true nor false"),
        ("item,vector:v\n1,\n2,1 2\n3,1 2 3\n", "line 4, column 'vector:v': not 2 finite numbers, as the first"),
        ("item,vector:v\n1,1 2\n2,1 x\n", "items.csv, line 3, column 'vector:v': not 2 finite numbers"),
        ("item,vector:v\n1,1 2\n2,1 nan\n", "items.csv, line 3, column 'vector:v': not 2 finite numbers"),
        ("item,vector:v\n1,1 1e39\n", "items.csv, line 2, column 'vector:v': not 1 finite numbers"),
        ("item,number:a,vector:v\n1,1,x\n2,x,1\n", "line 2, column 'vector:v'"),  # the first in the file
        ("item,text:a,Text: a\n1,x,y\n", "items.csv: two columns are text:a; keep one"),
    ],
)
def test_a_wrong_value_of_a_typed_column_is_named_by_line_and_column(text: str, message: str) -> None:
    assert message in items_fault(text)


def test_items_with_a_wrong_value_are_passed_over_when_asked() -> None:
    table = read_text(b"item,number:age,text:t\n1,old,a\n1,5,b\n2,,c\n", "items.csv")
    items = item_rows(table, skip_bad_rows=True)
    assert (items.ids, items.texts, items.malformed) == (("1", "2"), {"t": ("b", "c")}, 1)
    assert repr(items.numbers) == repr({"age": (5.0, math.nan)})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "userId,movieId,tag,timestamp\n2,1,slow,5\n",
            "column 'userId' says who; an items file holds nothing of users",
        ),
        ("item,text:tags\n1,slow\n", "column 'text:tags': what users wrote is data and not part of a catalogue"),
        ("item,category:User-Tag\n1,slow\n", "what users wrote is data"),
        ("item,text:reviews\n1,slow\n", "what users wrote is data"),
    ],
)
@pytest.mark.parametrize("skip", [False, True])
def test_what_users_did_or_wrote_never_becomes_a_catalogue(text: str, message: str, skip: bool) -> None:
    with pytest.raises(MalformedData, match=message):
        item_rows(read_text(text.encode(), "tags.csv"), skip_bad_rows=skip)


def test_typed_columns_of_parquet_keep_their_types_and_lists(tmp_path: Path) -> None:
    file = tmp_path / "items.parquet"
    pl.DataFrame(
        {
            "item": [1, 2, 3],
            "retired": [True, None, False],
            "number:age": [1.5, math.nan, None],
            "category:year": [1995, None, 2001],
            "vector:v": [[1.0, 2.0], None, []],
        }
    ).write_parquet(file)
    items = item_rows(read(file))
    assert items.retired == {"1"}
    assert repr(items.numbers["age"]) == "(1.5, nan, nan)"
    assert items.categories == {"year": ("1995", "", "2001")}
    assert items.vectors["v"].tolist() == [[1, 2], [0, 0], [0, 0]]
    for column, values in (("number:a", [[1]]), ("text:a", [["x"]]), ("retired", [[True]])):
        pl.DataFrame({"item": [1], column: values}).write_parquet(file)
        with pytest.raises(MalformedData, match=f"items.parquet, row 1, column '{column}': a list where one value"):
            item_rows(read(file))
    pl.DataFrame({"item": [1, 2], "vector:v": [[1.0, 2.0], [3.0, None]]}).write_parquet(file)
    with pytest.raises(MalformedData, match=r"items.parquet, row 2, column 'vector:v': not 2 finite"):
        item_rows(read(file))
    pl.DataFrame({"item": [1], "vector:v": [3.0]}).write_parquet(file)
    with pytest.raises(MalformedData, match=r"items.parquet, row 1, column 'vector:v'"):
        item_rows(read(file))


# ----------------------------------------------------------------------------------------------------------- places


def test_places_are_lines_of_the_file() -> None:
    table = read_text(b"user,item\n\na,1\n\nb,2\n", "log.csv")
    assert table.places.tolist() == [3, 5]
    assert table.places.dtype == np.int64
