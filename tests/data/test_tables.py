"""Tables without quotes are read the fast way: what comes out is what the reader of CSV gives."""

from __future__ import annotations

import pytest

from featurecache.data import tables
from featurecache.data.tables import read_source
from featurecache.errors import InputError

PLAIN = "sample_id,image,note\na,1.png, x \nb,,\nc,ü.png,007\n"


@pytest.mark.parametrize(
    ("text", "fast"),
    [
        (PLAIN, True),
        (PLAIN.rstrip("\n"), True),
        (PLAIN.replace("\n", "\r\n"), True),
        ("\ufeff" + PLAIN, True),
        (PLAIN.replace("1.png", '"1.png"'), False),
        (PLAIN.replace("1.png", '"1\n.png"'), False),
        (PLAIN.replace("\nb", "\n\nb"), False),
        ("\n" + PLAIN, False),
        (PLAIN.replace("b,,", "b,"), False),
        (PLAIN.replace("b,,", "b,,,"), False),
        (PLAIN.replace("\nb", "\rb"), False),
        ("image\n1.png\n2.png\n", True),
        ("image\n1.png\n\n2.png\n", False),
    ],
)
def test_both_ways_say_the_same(tmp_path, monkeypatch, text, fast):
    path = tmp_path / "m.csv"
    path.write_bytes(text.encode())
    found, made = [], tables._plain_records

    def watch(*arguments):
        found.append(made(*arguments))
        return found[-1]

    monkeypatch.setattr(tables, "_plain_records", watch)
    quick = read_source(path)
    assert [frame is not None for frame in found] in ([fast], [] if not fast else [True])
    monkeypatch.setattr(tables, "_plain_records", lambda *arguments: None)
    slow = read_source(path)
    assert quick.frame.equals(slow.frame)
    assert quick.frame.schema == slow.frame.schema
    assert quick.rows.to_list() == slow.rows.to_list()
    assert (quick.digest, quick.unit, quick.problems) == (slow.digest, slow.unit, slow.problems)


@pytest.mark.parametrize(("separator", "n"), [(";", 1), ("\t", 1), ("|", 1), (";", 30)])
def test_what_stands_between_the_cells_is_seen_from_the_header(tmp_path, separator, n):
    """As spreadsheets of countries with decimal commas save them."""
    rows = "".join(f"s{i}{separator}40,{i}{separator}{i}.png\n" for i in range(n))
    (tmp_path / "m.csv").write_text(f"sample_id{separator}age{separator}image\n{rows}")
    source = read_source(tmp_path / "m.csv")
    assert source.frame.columns == ["sample_id", "age", "image"]
    assert source.frame.row(0) == ("s0", "40,0", "0.png")
    assert (source.problems, source.separator) == ((), separator)


@pytest.mark.parametrize(
    "header", ["sample_id,findings (a;b;c),image", '"sample_id","a|b|c","image"', "sample_id,x\ty\tz,image"]
)
def test_the_comma_goes_first(tmp_path, header):
    (tmp_path / "m.csv").write_text(f"{header}\ns,1;2;3,i.png\n")
    source = read_source(tmp_path / "m.csv")
    assert source.frame.row(0) == ("s", "1;2;3", "i.png")


@pytest.mark.parametrize("size", ["40", "40,8"])
def test_a_header_with_commas_between_semicolons_is_told_in_one_line(tmp_path, size):
    rows = "".join(f"s{i};{size};{i}.png\n" for i in range(30))
    (tmp_path / "m.csv").write_text(f"sample_id;size, cm;image\n{rows}")
    if size == "40":  # every row has another length than the header
        with pytest.raises(InputError) as caught:
            read_source(tmp_path / "m.csv")
        message = str(caught.value)
    else:
        message = read_source(tmp_path / "m.csv").missing("image", "--view image=image") or ""
    assert "Its cells look separated by ';', but the header also holds ','" in message
    assert message.count("line") <= 1
