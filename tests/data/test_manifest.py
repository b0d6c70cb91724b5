"""Manifests: what is read from each layout and kind of table."""

from __future__ import annotations

import csv
import hashlib
import io
import json

import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from manifest_files import LONG, LONG_TEXT, cells, manifest, problems

from featurecache.config import ManifestConfig
from featurecache.data.manifest import read_manifest
from featurecache.errors import InputError

TWO = {"front": "f", "side": "s"}


def test_wide_csv(root):
    text = 'sample_id,f,s,age,code,note\n007,a.png,b.png,31,01,"x, ""y"""\n8,c.png,,1.5,02,\n'
    found = manifest(root, text, views=TWO)
    assert found.views == ("front", "side")
    assert found.digest == hashlib.sha256(text.encode()).hexdigest()
    assert found.path == (root / "m.csv").resolve()
    assert found.table.columns == ["sample_id", "f", "s", "age", "code", "note"]
    assert found.table["sample_id"].to_list() == ["007", "8"]
    assert found.table["age"].to_list() == [31.0, 1.5]
    assert found.table["code"].to_list() == ["01", "02"]  # leading zeros are part of a code
    assert found.column("note").to_list() == ['x, "y"', None]
    assert cells(found) == [
        (0, "front", 0, "a.png", 2),
        (0, "side", 0, "b.png", 2),
        (1, "front", 0, "c.png", 3),
        (1, "side", 0, None, 3),
    ]
    assert found.cells.schema == {
        "sample": pl.UInt32,
        "view": pl.String,
        "ordinal": pl.Int32,
        "value": pl.String,
        "location": pl.String,
        "kind": pl.String,
        "selector": pl.String,
        "row": pl.Int64,
    }
    real = str(root.resolve())
    assert found.cells["location"].to_list() == [f"{real}/a.png", f"{real}/b.png", f"{real}/c.png", None]
    assert set(found.cells["selector"]) == {"{}"}
    with pytest.raises(InputError, match=r"m\.csv: no column 'agee'\. Did you mean 'age'\? Columns: sample_id, f"):
        found.column("agee")


def test_numbers_are_numbers_unless_something_would_be_lost(root):
    text = "i,f,big,mixed,nan,ints,empty\n1,a.png,12345678901234567890,1,nan,3,\n2,b.png,1,x,2.5,,\n"
    found = manifest(root, text, views={"v": "f"}, id="i")
    types = dict(found.table.schema)
    assert (types["big"], types["mixed"], types["nan"], types["ints"]) == (pl.String, pl.String, pl.Float64, pl.Int64)
    assert (types["i"], types["sample_id"], types["empty"]) == (pl.String, pl.String, pl.String)
    assert found.table["nan"].to_list() == [None, 2.5]
    assert found.table["sample_id"].to_list() == ["1", "2"]


def test_without_an_id_the_record_number_is_the_id(root):
    found = manifest(root, "image\na.png\nb.png\n")
    assert found.views == ("image",)
    assert found.table["sample_id"].to_list() == ["1", "2"]


def test_parquet_keeps_its_types(root):
    table = pl.DataFrame(
        {
            "sample_id": [1, 2],
            "f": ["a.png", None],
            "y": pl.Series(["p", "q"], dtype=pl.Categorical),
            "z": [1.0, float("nan")],
            "when": [True, False],
        }
    )
    table.write_parquet(root / "m.parquet")
    found = read_manifest(ManifestConfig(manifest=root / "m.parquet", views={"v": "f"}))
    assert dict(found.table.schema) == {
        "sample_id": pl.String,
        "f": pl.String,
        "y": pl.String,
        "z": pl.Float64,
        "when": pl.Boolean,
    }
    assert found.table["z"].to_list() == [1.0, None]
    assert cells(found) == [(0, "v", 0, "a.png", 1), (1, "v", 0, None, 2)]


def test_tab_separated_bom_and_line_breaks(root):
    found = manifest(root, "\ufeffsample_id\tf\n1\ta.png\n", "m.tsv", views={"v": "f"})
    assert found.table["sample_id"].to_list() == ["1"]
    text = 'sample_id,f,note\n\n1,a.png,"two\nlines"\n\n2,b.png,x\n'
    assert cells(manifest(root, text, views={"v": "f"})) == [(0, "v", 0, "a.png", 3), (1, "v", 0, "b.png", 6)]


def test_semicolons_are_read_and_said(root):
    found = manifest(root, "Fall-Nr.;Alter;f\n1;40,8;a.png\n", views={"v": "f"}, id="Fall-Nr.")
    assert cells(found) == [(0, "v", 0, "a.png", 2)]
    assert found.table["Alter"].to_list() == ["40,8"]
    assert len(found.notes) == 1
    assert found.notes[0].endswith("m.csv: read with ';' between the cells, as its header has it")
    assert manifest(root, "sample_id\tf\n1\ta.png\n", "m.tsv", views={"v": "f"}).notes == ()
    assert manifest(root, "sample_id,f\n1,a.png\n", views={"v": "f"}).notes == ()


def test_folder(root):
    for name in ("cat/1.jpg", "cat/deep/2.PNG", "dog/1.jpg", "dog/.hidden.jpg", ".git/x.jpg", "dog/notes.txt", "0.jpg"):
        (root / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "set" / name).write_bytes(b"x")
    found = read_manifest(ManifestConfig(manifest=root / "set"))
    assert found.views == ("image",)
    assert found.table.columns == ["sample_id", "image", "class"]
    assert found.table["sample_id"].to_list() == ["0", "cat/1", "cat/deep/2", "dog/1"]
    assert found.table["class"].to_list() == [None, "cat", "cat", "dog"]
    assert found.cells["location"][1] == str((root / "set" / "cat" / "1.jpg").resolve())
    renamed = read_manifest(ManifestConfig(manifest=root / "set", views={"photo": "image"}))
    assert renamed.views == ("photo",)
    assert renamed.digest == found.digest
    (root / "set" / "dog" / "1.png").write_bytes(b"x")
    with pytest.raises(InputError, match=r"dog/1\.jpg and dog/1\.png have the same name but for the suffix"):
        read_manifest(ManifestConfig(manifest=root / "set"))
    (root / "none").mkdir()
    with pytest.raises(InputError, match=r"none: the folder holds no images \(\.jpg, \.jpeg"):
        read_manifest(ManifestConfig(manifest=root / "none"))


def test_folder_of_arrays_and_links_in_circles(root):
    (root / "set" / "x").mkdir(parents=True)
    (root / "set" / "x" / "1.npy").write_bytes(b"x")
    (root / "set" / "x" / "again").symlink_to(root / "set")
    found = read_manifest(ManifestConfig.create({"manifest": root / "set", "reader": "array"}))
    assert found.table["sample_id"].to_list() == ["x/1"]


def test_long(root):
    found = manifest(root, LONG_TEXT, **LONG, views={"frontal": "PA,AP", "lateral": "LATERAL,LL"})
    assert found.views == ("frontal", "lateral")
    assert found.table.to_dict(as_series=False) == {"sample_id": ["s2", "s1"], "sex": ["F", "M"]}
    assert cells(found) == [
        (0, "frontal", 0, None, 2),
        (0, "lateral", 0, "c.png", 2),
        (1, "frontal", 0, "a.png", 3),
        (1, "lateral", 0, "b.png", 4),
    ]
    with pytest.raises(InputError, match=r"'dose' differs within a sample.*lines 3 and 4 sample 's1' has '2' and '3'"):
        found.column("dose")
    with pytest.raises(InputError, match=r"column 'path' holds the paths of single images"):
        found.column("path")


def test_long_without_views_takes_every_value(root):
    text = LONG_TEXT.replace("missing.png", "d/e.png")
    found = manifest(root, text, **LONG)
    assert found.views == ("AP", "LATERAL", "LL", "OBLIQUE", "PA")
    assert found.table["sample_id"].to_list() == ["s2", "s1", "s3"]
    assert found.cells.height == 15


def test_several_images_of_a_view(root):
    text = "sample_id,pos,path\n1,PA,a.png\n1,PA,b.png\n2,PA,c.png\n1,PA,d/e.png\n"
    assert problems(root, text, **LONG, views={"v": "PA"}) == [
        "m.csv, lines 2, 3, 5: sample '1' has 3 images of view 'v'; choose with --multi first|mean|max"
    ]
    assert cells(manifest(root, text, **LONG, views={"v": "PA"}, multi="mean")) == [
        (0, "v", 0, "a.png", 2),
        (0, "v", 1, "b.png", 3),
        (0, "v", 2, "d/e.png", 5),
        (1, "v", 0, "c.png", 4),
    ]
    first = manifest(root, text, **LONG, views={"v": "PA"}, multi="first")
    assert cells(first) == [(0, "v", 0, "a.png", 2), (1, "v", 0, "c.png", 4)]
    assert first.multi == "first"


def test_several_columns_of_a_view(root):
    text = "sample_id,x,y\n1,a.png,b.png\n2,,c.png\n3,,\n"
    found = manifest(root, text, views={"v": "x,y"}, multi="max")
    assert cells(found) == [
        (0, "v", 0, "a.png", 2),
        (0, "v", 1, "b.png", 2),
        (1, "v", 0, "c.png", 3),
        (2, "v", 0, None, 4),
    ]
    assert problems(root, text, views={"v": "x,y"}) == [
        "m.csv, line 2: sample '1' has 2 images of view 'v' in columns x, y; choose with --multi first|mean|max"
    ]
    comma = 'sample_id,"x,y"\n1,a.png\n'
    assert cells(manifest(root, comma, views={"v": "x,y"})) == [(0, "v", 0, "a.png", 2)]


def test_selectors(root):
    text = (
        "sample_id,f,x0,y0,x1,y1,n,side\n1,a.png,1,2,30,40,,R\n2,b.png,,,,,3,L\n3,c.png,0,0,5,5,0,R\n4,,9,9,1,1,x,R\n"
    )
    found = manifest(
        root,
        text,
        views={"v": "f", "w": "f"},
        box={"v": ["x0", "y0", "x1", "y1"]},
        frame={"v": "n"},
        flip_if={"v": "side=R"},
    )
    mine = found.cells.filter(pl.col("view") == "v")["selector"].to_list()
    assert mine == ['{"box":[1,2,30,40],"flip":true}', '{"frame":3}', '{"box":[0,0,5,5],"flip":true,"frame":0}', "{}"]
    assert [json.dumps(json.loads(text), sort_keys=True, separators=(",", ":")) for text in mine] == mine
    assert set(found.cells.filter(pl.col("view") == "w")["selector"]) == {"{}"}


def test_flip_matches_numbers_too(root):
    found = manifest(root, "sample_id,f,n\n1,a.png,1.0\n2,b.png,2\n", views={"v": "f"}, flip_if={"v": "n=1"})
    assert found.cells["selector"].to_list() == ['{"flip":true}', "{}"]


def test_selectors_of_the_long_layout(root):
    text = "sample_id,pos,path,n\n1,PA,a.png,2\n1,LL,b.png,5\n"
    found = manifest(root, text, **LONG, views={"p": "PA", "l": "LL"}, frame={"p": "n"})
    assert found.cells["selector"].to_list() == ['{"frame":2}', "{}"]


def test_text_cells_have_no_location(root):
    found = manifest(root, "sample_id,f,t\n1,a.png,hello\n2,b.png,\n", views={"v": "f", "t": "t"}, reader={"t": "text"})
    assert found.cells.select("kind", "value", "location").rows()[1::2] == [
        ("text", "hello", None),
        ("text", None, None),
    ]


TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0\r"), max_size=6)
NAME = st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Z")), max_size=5)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    names=st.lists(NAME, max_size=3, unique=True),
    rows=st.lists(st.tuples(TEXT, *[st.none() | TEXT] * 3), min_size=1, max_size=5),
)
def test_any_table_survives_csv_and_parquet(tmp_path, names, rows):
    """Quotes, commas, line breaks, any script; a letter in front keeps cells text and not blank."""
    height = len(rows)
    ids = [f"{number}.{row[0]}" for number, row in enumerate(rows)]
    table = {"sample_id": ids, "view": ["x.png"] * height}
    for position, name in enumerate(names, 1):
        table[f"c{name}"] = [None if row[position] is None else f"_{row[position]}" for row in rows]
    (tmp_path / "x.png").write_bytes(b"x")
    frame = pl.DataFrame(table, schema=dict.fromkeys(table, pl.String))
    stream = io.StringIO(newline="")
    writer = csv.writer(stream)
    writer.writerow(table)
    writer.writerows([["" if cell is None else cell for cell in row] for row in frame.rows()])
    (tmp_path / "m.csv").write_text(stream.getvalue(), encoding="utf-8", newline="")
    frame.write_parquet(tmp_path / "m.parquet")
    for name in ("m.csv", "m.parquet"):
        found = read_manifest(ManifestConfig(manifest=tmp_path / name, views={"v": "view"}))
        assert found.table.to_dict(as_series=False) == table
        assert found.cells.height == height
    lines = read_manifest(ManifestConfig(manifest=tmp_path / "m.csv", views={"v": "view"})).cells["row"].to_list()
    records = [row.count("\n") + 1 for row in ("".join(cell or "" for cell in row) for row in frame.rows())]
    assert lines == [2 + sum(records[:i]) for i in range(height)]
