"""Manifests: what is read from each layout, and every complaint with file, row and column, all at once."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
from pathlib import Path

import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from featurecache.config import ManifestConfig
from featurecache.data.manifest import Manifest, read_manifest
from featurecache.errors import InputError, MissingFileError


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in ("a.png", "b.png", "c.png", "d/e.png"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"x")
    return tmp_path


def manifest(folder: Path, text: str, name: str = "m.csv", **options) -> Manifest:
    (folder / name).write_text(text, encoding="utf-8")
    return read_manifest(ManifestConfig.create({"manifest": folder / name, **options}))


def problems(folder: Path, text: str, name: str = "m.csv", **options) -> list[str]:
    with pytest.raises(InputError) as caught:
        manifest(folder, text, name, **options)
    found = list(caught.value.problems) or [str(caught.value)]
    return [problem.replace(f"{folder}{os.sep}", "").replace(str(folder), "ROOT") for problem in found]


def cells(found: Manifest) -> list[tuple]:
    return list(found.cells.select("sample", "view", "ordinal", "value", "row").iter_rows())


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


LONG = {"layout": "long", "view_column": "pos", "path_column": "path"}
LONG_TEXT = """sample_id,pos,path,sex,dose
s2,LL,c.png,F,1
s1,PA,a.png,M,2
s1,LATERAL,b.png,M,3
s3,OBLIQUE,missing.png,M,3
s2,AP,,F,1
"""


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


def test_wrong_selectors(root):
    text = "sample_id,f,x0,y0,x1,y1,n\n1,a.png,1,2,1,40,1.5\n2,b.png,1,,3,4,-1\n3,c.png,a,1,3,4,2\n"
    options = {"views": {"v": "f"}, "box": {"v": ["x0", "y0", "x1", "y1"]}, "frame": {"v": "n"}}
    assert sorted(problems(root, text, **options)) == [
        "m.csv, line 2, column 'n': frame '1.5' is not a whole number from 0",
        "m.csv, line 2, column 'x0,y0,x1,y1': box 1,2,1,40 is not left,upper,right,lower in whole pixels",
        "m.csv, line 3, column 'n': frame '-1' is not a whole number from 0",
        "m.csv, line 3, column 'x0,y0,x1,y1': box 1,,3,4 is not left,upper,right,lower in whole pixels",
        "m.csv, line 4, column 'x0,y0,x1,y1': box a,1,3,4 is not left,upper,right,lower in whole pixels",
    ]
    wrong = {"views": {"v": "f"}, "box": {"v": ["x0", "y9", "x1"]}, "frame": {"w": "n"}, "flip_if": {"v": "n"}}
    assert problems(root, "sample_id,f,x0,x1,n\n1,a.png,1,2,3\n", **wrong)[:3] == [
        "--box v: 3 columns, but four are needed: left, upper, right, lower",
        "--flip-if v=n: write --flip-if VIEW=COLUMN=VALUE",
        "m.csv: no column 'y9' (--box v). Columns: sample_id, f, x0, x1, n",
    ]
    unknown = problems(
        root, "sample_id,f,n\n1,a.png,3\n", views={"view": "f"}, frame={"veiw": "n"}, reader={"x": "text"}
    )
    assert unknown == [
        "--frame veiw=...: there is no view 'veiw'. Did you mean 'view'? Views: view",
        "--reader x=...: there is no view 'x'. Views: view",
    ]


def test_text_cells_have_no_location(root):
    found = manifest(root, "sample_id,f,t\n1,a.png,hello\n2,b.png,\n", views={"v": "f", "t": "t"}, reader={"t": "text"})
    assert found.cells.select("kind", "value", "location").rows()[1::2] == [
        ("text", "hello", None),
        ("text", None, None),
    ]


def test_all_problems_are_found_at_once(root):
    text = "sample_id,f,g\n1,a.png,zz.png\n1,b.png,../out.png\n,nope/x.png,d\n4,a.png\n"
    (root.parent / "out.png").write_bytes(b"x")
    assert problems(root, text, views={"front": "f", "side": "g", "top": "h"}) == [
        "m.csv, line 5: 2 cells where the header has 3",
        "m.csv, line 4, column 'sample_id': the id is empty",
        "m.csv, line 3, column 'sample_id': the id '1' is already that of line 2",
        "m.csv: no column 'h' (--view top=h). Columns: sample_id, f, g",
        "m.csv, line 2, column 'g': zz.png is missing: no such file in ROOT",
        f"m.csv, line 3, column 'g': ../out.png leaves the root ROOT: it is in {root.parent.resolve()}",
        "m.csv, line 4, column 'f': nope/x.png is missing: no such file: there is no folder nope",
        "m.csv, line 4, column 'g': d is a folder, not a file",
        "paths that leave the root are refused unless you give --allow-outside",
    ]


def test_the_message_shows_twenty_and_keeps_all(root):
    text = "sample_id,f\n" + "".join(f"{i},no{i}.png\n" for i in range(50))
    with pytest.raises(InputError) as caught:
        manifest(root, text, views={"v": "f"})
    assert len(caught.value.problems) == 51
    assert "m.csv: 51 problems" in str(caught.value)
    assert "... and 31 more" in str(caught.value)
    assert caught.value.problems[-1] == (
        f"50 of 50 files are missing. Paths are relative to {root}; if they are relative to another folder, give --root DIR."
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "m.csv: the file is empty"),
        ("sample_id,f\n", "m.csv: the table is empty: a header, but no rows"),
        ("sample_id,f\n\n\n", "m.csv: the table is empty: a header, but no rows"),
        ("sample_id,f,f\n1,a.png,b.png\n", "m.csv, line 1: column 'f' is there 2 times"),
        ('sample_id,f\n1,"a.png\n', "m.csv, line 2: not valid CSV: unexpected end of data"),
        ('sample_id,f\n1,"a"b\n', "m.csv, line 2: not valid CSV: ',' expected after '\"'"),
        ("sample_id,f\n1,\0\n", "m.csv: not a text file (it holds zero bytes); a CSV must be UTF-8"),
        ("sample_id;f\n1;a.png\n", "m.csv: no column 'f' (--view v=f). Columns: sample_id;f"),
    ],
)
def test_tables_that_are_none(root, text, message):
    assert problems(root, text, views={"v": "f"})[0] == message


def test_files_that_are_no_manifest(root):
    with pytest.raises(MissingFileError, match=r"gone\.csv: no such file or folder"):
        read_manifest(ManifestConfig(manifest=root / "gone.csv"))
    (root / "m.csv").write_bytes(b"sample_id,f\n1,\xe4.png\n")
    with pytest.raises(InputError, match=r"m\.csv, line 2: not UTF-8 \(.*\)\. Save the table as UTF-8\."):
        read_manifest(ManifestConfig(manifest=root / "m.csv"))
    (root / "m.xlsx").write_bytes(b"PK")
    with pytest.raises(InputError, match=r"a manifest is a CSV or Parquet file or a folder of images, not '\.xlsx'"):
        read_manifest(ManifestConfig(manifest=root / "m.xlsx"))
    (root / "m.parquet").write_bytes(b"PAR1 and then nothing PAR1")
    with pytest.raises(InputError, match=r"m\.parquet: not a valid Parquet file"):
        read_manifest(ManifestConfig(manifest=root / "m.parquet"))
    pl.DataFrame({"a": pl.Series([], dtype=pl.String)}).write_parquet(root / "m.parquet")
    with pytest.raises(InputError, match=r"m\.parquet: the table is empty: columns, but no rows"):
        read_manifest(ManifestConfig(manifest=root / "m.parquet"))


def test_options_that_do_not_fit(root):
    assert (
        "which columns hold images? Give --view NAME=COLUMN for each view. Columns: sample_id, f"
        in (problems(root, "sample_id,f\n1,a.png\n")[0])
    )
    assert problems(root, "sample_id,f\n1,a.png\n", views={"a b": "f"})[0].startswith("--view a b=...: a view's name")
    assert problems(root, "sample_id,f\n1,a.png\n", views={"v": "f"}, root=root / "no")[0].endswith(
        "no: no such folder"
    )
    assert problems(root, "sample_id,k,f\n1,2,a.png\n", views={"v": "f"}, id="k") == [
        "m.csv: it has a column 'sample_id' beside --id k; rename one of them"
    ]
    assert problems(root, "sample_id,f\n1,a.png\n", views={"v": "f"}, id="smaple_id")[0] == (
        "m.csv: no column 'smaple_id' (--id). Did you mean 'sample_id'? Columns: sample_id, f"
    )
    assert problems(root, LONG_TEXT, layout="long")[0] == (
        "m.csv: the long layout needs --view-column COLUMN and --path-column COLUMN"
    )
    assert problems(root, LONG_TEXT, layout="long", view_column="poss", path_column="path", id="x") == [
        "m.csv: no column 'poss' (--view-column). Did you mean 'pos'? Columns: sample_id, pos, path, sex, dose",
        "m.csv: no column 'x' (--id). Columns: sample_id, pos, path, sex, dose",
    ]
    assert problems(root, LONG_TEXT, **LONG, views={"f": "PA,APP", "g": "PA"}) == [
        "m.csv, column 'pos': no row holds 'APP' (--view f=PA,APP). Did you mean 'AP'? "
        "Values: AP, LATERAL, LL, OBLIQUE, PA",
        "--view g=PA: 'PA' already stands for view 'f'",
    ]
    assert problems(root, "sample_id,pos,path\n1,,a.png\n2,PA,b.png\n", **LONG) == [
        "m.csv, line 2, column 'pos': the view is empty; choose with --view NAME=VALUE"
    ]


def test_wrong_types_in_parquet(root):
    pl.DataFrame({"sample_id": [1.5], "f": [7]}).write_parquet(root / "m.parquet")
    with pytest.raises(InputError) as caught:
        read_manifest(ManifestConfig(manifest=root / "m.parquet", views={"v": "f"}))
    name = root / "m.parquet"
    assert caught.value.problems == (
        f"{name}, column 'sample_id': ids must be text or whole numbers, not Float64",
        f"{name}, column 'f': paths (or texts) are expected, but it holds Int64",
    )


def test_root_links_and_the_way_out(root):
    outside = root.parent / f"outside-of-{root.name}"
    outside.mkdir()
    (outside / "o.png").write_bytes(b"x")
    (root / "link.png").symlink_to(outside / "o.png")
    (root / "inner.png").symlink_to(root / "a.png")
    (root / "broken.png").symlink_to(root / "gone.png")
    (root / "far").symlink_to(outside)
    text = f"sample_id,f\n1,link.png\n2,inner.png\n3,broken.png\n4,far/o.png\n5,{outside}/o.png\n6,d/../a.png\n"
    out = outside.resolve()
    assert problems(root, text, views={"v": "f"}) == [
        f"m.csv, line 2, column 'f': link.png leaves the root ROOT: it is a link to {out}/o.png",
        "m.csv, line 4, column 'f': broken.png is a broken link, to gone.png",
        f"m.csv, line 5, column 'f': far/o.png leaves the root ROOT: it is in {out}",
        f"m.csv, line 6, column 'f': {outside}/o.png leaves the root ROOT: it is in {out}",
        "paths that leave the root are refused unless you give --allow-outside",
    ]
    allowed = manifest(root, text.replace("3,broken.png\n", ""), views={"v": "f"}, allow_outside=True)
    real = root.resolve()
    assert allowed.cells["location"].to_list() == [
        f"{out}/o.png",
        f"{real}/a.png",
        f"{out}/o.png",
        f"{out}/o.png",
        f"{real}/a.png",
    ]
    other = manifest(root, "sample_id,f\n1,o.png\n", views={"v": "f"}, root=outside)
    assert other.cells["location"].to_list() == [f"{out}/o.png"]


def test_many_files_of_one_folder_are_listed(root):
    many = root / "many"
    many.mkdir()
    for number in range(30):
        (many / f"{number}.png").write_bytes(b"x")
    (many / "sub").mkdir()
    (many / "l.png").symlink_to(many / "0.png")
    os.mkfifo(many / "pipe")
    names = [*(f"{n}.png" for n in range(32)), "sub", "l.png", "pipe"]
    text = "sample_id,f\n" + "".join(f"{i},many/{name}\n" for i, name in enumerate(names))
    assert problems(root, text, views={"v": "f"}) == [
        "m.csv, line 32, column 'f': many/30.png is missing: no such file in many",
        "m.csv, line 33, column 'f': many/31.png is missing: no such file in many",
        "m.csv, line 34, column 'f': many/sub is a folder, not a file",
        "m.csv, line 36, column 'f': many/pipe is not a regular file",
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
