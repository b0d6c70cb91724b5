"""The reader that nobody named: decided by suffixes, by how files begin, and refused where a column mixes them."""

from __future__ import annotations

import builtins

import polars as pl
import pytest
from manifest_files import LONG, manifest, problems

from featurecache.config import ManifestConfig
from featurecache.data import choice
from featurecache.data.choice import choose_reader, reader_of_file
from featurecache.data.manifest import read_manifest, with_readers
from featurecache.data.tables import Source
from featurecache.errors import InputError

DICOM = bytes(128) + b"DICM and more"
NUMPY = b"\x93NUMPY\x01\x00"


def table(folder, names, **files):
    """A manifest of one view `v`; files hold what is given, else `x`."""
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_bytes(files.get(name.split(".")[0], b"x"))
    return "sample_id,f\n" + "".join(f"{number},{name}\n" for number, name in enumerate(names))


@pytest.mark.parametrize(
    ("names", "reader"),
    [
        (["a.JPG", "b.png", "c.TIFF", "d.webp"], "image"),
        (["a.dcm", "b.DICOM", "c.ima"], "dicom"),
        (["a.npy", "b.NPY"], "array"),
    ],
)
def test_suffixes_decide_and_no_file_is_opened(root, monkeypatch, names, reader):
    text = table(root, names)
    monkeypatch.setattr(choice, "_look", lambda path: pytest.fail(f"{path} was opened"))
    assert manifest(root, text, views={"v": "f"}).readers == {"v": reader}


@pytest.mark.parametrize(
    ("start", "reader"), [(DICOM, "dicom"), (NUMPY, "array"), (b"\xff\xd8\xff", "image"), (b"", "image")]
)
def test_files_without_a_suffix_are_told_by_how_they_begin(root, start, reader):
    names = ["1.2.840.113619", "IM0001"]  # what scanners write: UIDs, and nothing
    text = table(root, names, **{"1": start, "IM0001": start})
    assert manifest(root, text, views={"v": "f"}).readers == {"v": reader}
    assert reader_of_file(root / "IM0001") == reader
    assert reader_of_file(root / "a.png") == "image"


def test_files_with_and_without_a_suffix_may_be_of_one_kind(root):
    text = table(root, ["a.dcm", "IM1"], IM1=DICOM)
    assert manifest(root, text, views={"v": "f"}).readers == {"v": "dicom"}


def test_few_files_are_opened_evenly_over_the_column(root, monkeypatch):
    opened = []
    monkeypatch.setattr(choice, "_look", lambda path: opened.append(path) or "dicom")
    text = table(root, [f"d{k}/IM" for k in range(100)])
    assert manifest(root, text, views={"v": "f"}).readers == {"v": "dicom"}
    assert 8 <= len(opened) <= 16
    assert any(f"d{k}/" in opened[-1] for k in range(90, 100))


def test_a_mixed_column_names_rows(root):
    text = table(root, ["a.png", "b.dcm", "c.jpg", "IM", "e.png", "f.png"], IM=DICOM)
    assert problems(root, text, views={"v": "f"}) == [
        "view 'v': its files are for different readers (lines). dicom: 3 (b.dcm), 5 (IM); "
        "image: 2 (a.png), 4 (c.jpg), 6 (e.png). A view has one: convert the files, make two views of them, or give "
        "--reader v=NAME, and what that one can't read is listed as failed"
    ]
    assert manifest(root, text, views={"v": "f"}, reader="dicom").readers == {"v": "dicom"}


def test_archives_of_arrays_are_refused_with_the_remedy(root):
    text = table(root, ["a.npz"])
    assert problems(root, text, views={"v": "f"}) == [
        "view 'v': 2 (a.npz): an archive of arrays, which no reader takes. Save each array by itself, as .npy "
        "(numpy.save), or give --reader v=package.module:function"
    ]


def test_texts_are_suggested_only_where_nothing_looks_like_a_path(root):
    found = problems(root, "sample_id,f,g\n1,red apple,a.png\n2,pear,b.png\n", views={"name": "f", "v": "g"})
    assert found[0] == (
        "m.csv, column 'f': none of its 2 values is a file, such as 'red apple'. If they are texts, give "
        "--reader name=text"
    )
    assert not any("text" in problem for problem in problems(root, "sample_id,f\n1,img/7\n", views={"v": "f"}))
    assert not any("text" in problem for problem in problems(root, "sample_id,f\n1,gone.png\n", views={"v": "f"}))
    chosen = manifest(
        root, "sample_id,f,g\n1,red apple,a.png\n", views={"name": "f", "v": "g"}, reader={"name": "text"}
    )
    assert chosen.readers == {"name": "text", "v": "image"}


def test_each_view_decides_for_itself_and_the_configuration_says_it_as_if_given(root):
    (root / "x.dcm").write_bytes(b"x")
    text = "sample_id,pos,path\n1,PA,a.png\n1,CT,x.dcm\n"
    found = manifest(root, text, **LONG, views={"frontal": "PA", "slice": "CT"})
    assert found.readers == {"frontal": "image", "slice": "dicom"}
    options = {"manifest": root / "m.csv", **LONG}
    assert with_readers(ManifestConfig.create(options), found).reader == {"frontal": "image", "slice": "dicom"}
    one = {**options, "views": {"frontal": "PA"}}
    config = ManifestConfig.create(one)
    assert with_readers(config, read_manifest(config)) == ManifestConfig.create({**one, "reader": "image"})


def test_a_folder_is_searched_for_all_that_has_a_reader(tmp_path):
    folder = tmp_path / "scans"
    table(folder, ["p/a.dcm", "q/b.dcm"])
    found = read_manifest(ManifestConfig(manifest=folder))
    assert found.readers == {"image": "dicom"}
    assert found.digest == read_manifest(ManifestConfig(manifest=folder, reader={"*": "dicom"})).digest
    table(folder, ["p/c.png"])
    with pytest.raises(InputError, match=r"dicom: 1 \(p/a.dcm\), 3 \(q/b.dcm\); image: 2 \(p/c.png\)"):
        read_manifest(ManifestConfig(manifest=folder))


def test_two_hundred_thousand_rows_are_decided_without_looking_at_files(tmp_path, monkeypatch):
    values = pl.Series("value", [f"p{k // 100}/{k}.dcm" for k in range(200_000)])
    cells = values.to_frame().with_columns(location=pl.col("value"), row=pl.int_range(pl.len()), column=pl.lit("f"))
    monkeypatch.setattr(builtins, "open", lambda *_, **__: pytest.fail("a file was opened"))
    source = Source(tmp_path, "m.csv", "", pl.DataFrame(), pl.Series("row", [], dtype=pl.Int64), "line")
    assert choose_reader(source, "v", cells) == ("dicom", [])
