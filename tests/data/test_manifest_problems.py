"""Bad manifests: every complaint with file, row and column, all at once."""

from __future__ import annotations

import polars as pl
import pytest
from manifest_files import LONG, LONG_TEXT, manifest, problems

from featurecache.config import ManifestConfig
from featurecache.data.manifest import read_manifest
from featurecache.errors import InputError, MissingFileError


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
        "A file that is listed has to be there, or its sample would lose a view unnoticed. Restore it, or empty its "
        "cell: the view then counts as missing. (--on-error skip is for files that are there, but unreadable.)",
        "paths that leave the root are refused unless you give --allow-outside",
    ]


def test_the_message_shows_twenty_and_keeps_all(root):
    text = "sample_id,f\n" + "".join(f"{i},no{i}.png\n" for i in range(50))
    with pytest.raises(InputError) as caught:
        manifest(root, text, views={"v": "f"})
    assert len(caught.value.problems) == 51
    assert "m.csv: 50 problems" in str(caught.value)
    assert "... and 30 more" in str(caught.value)
    assert str(caught.value).endswith("give --root DIR."), "what to do is always shown"
    assert caught.value.problems[-1] == (
        f"50 of 50 files are missing. Paths are relative to {root}; if they are relative to another folder, "
        "give --root DIR."
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
        (
            "sample_id;a,b;f\n1;2;a.png\n",
            "m.csv: 1 line not as long as the header. Its cells look separated by ';', but the header also holds ',', "
            "which is taken first: rename the column that has it, or save the table with tabs as .tsv.",
        ),
    ],
)
def test_tables_that_are_none(root, text, message):
    assert problems(root, text, views={"v": "f"})[0] == message


def test_files_that_are_no_manifest(root):
    with pytest.raises(MissingFileError, match=r"gone\.csv: no such file or folder"):
        read_manifest(ManifestConfig(manifest=root / "gone.csv"))
    (root / "m.csv").write_bytes(b"sample_id,f\n1,\xe4.png\n")
    (root / "patients.csv").write_text("")
    for wrong, near in {"m": "m.csv", "patient.csv": "patients.csv"}.items():
        with pytest.raises(MissingFileError, match=rf"{wrong}: no such file or folder\. Did you mean '{near}'\?$"):
            read_manifest(ManifestConfig(manifest=root / wrong))
    with pytest.raises(InputError, match=r"m\.csv, line 2: not UTF-8 \(.*\)\. Save the table as UTF-8\."):
        read_manifest(ManifestConfig(manifest=root / "m.csv"))
    (root / "m.xlsx").write_bytes(b"PK")
    with pytest.raises(InputError, match=r"a manifest is a CSV or Parquet file or a folder of images, not '\.xlsx'"):
        read_manifest(ManifestConfig(manifest=root / "m.xlsx"))
    (root / "m.parquet").write_bytes(b"PAR1 and then nothing PAR1")
    with pytest.raises(InputError, match=r"m\.parquet: not a valid Parquet file"):
        read_manifest(ManifestConfig(manifest=root / "m.parquet"))
    (root / "m.parquet").write_bytes(b"\0\0\0\0 its start is lost PAR1")
    with pytest.raises(InputError, match=r"m\.parquet: not a Parquet file, or a damaged one: .* begin with 'PAR1'"):
        read_manifest(ManifestConfig(manifest=root / "m.parquet"))
    (root / "m.parquet").write_bytes(b"")
    with pytest.raises(InputError, match=r"m\.parquet: the file is empty"):
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
