"""Tables without quotes are read the fast way: what comes out is what the reader of CSV gives."""

from __future__ import annotations

import pytest

from featurecache.data import tables
from featurecache.data.tables import read_source

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


@pytest.mark.parametrize("separator", [";", "\t", "|"])
def test_a_table_with_other_separators_is_told_so(tmp_path, separator):
    """As spreadsheets of countries with decimal commas save them."""
    (tmp_path / "m.csv").write_text(PLAIN.replace(",", separator))
    message = read_source(tmp_path / "m.csv").missing("image", "--view image=image")
    assert message is not None
    assert f"no column 'image' (--view image=image). Its cells are separated by {separator!r}: save it with" in message
