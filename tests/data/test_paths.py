"""Where the files of a manifest are: links, the way out of the root, long lists."""

from __future__ import annotations

import os

import polars as pl
from manifest_files import manifest, problems

from featurecache.data.paths import locate


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
        "A file that is listed has to be there, or its sample would lose a view unnoticed. Restore it, or empty its "
        "cell: the view then counts as missing. (--on-error skip is for files that are there, but unreadable.)",
    ]


def test_paths_below_the_root_are_told_before_they_are_looked_for(tmp_path):
    told = []
    values = pl.Series(["a.png", "sub/b.png", "a.png", f"{tmp_path}/c.png", "/elsewhere/d.png"])
    located = locate(values, str(tmp_path), allow_outside=False, early=told.append)
    assert sorted(told[0].to_list()) == [f"{tmp_path}/{name}" for name in ("a.png", "c.png", "sub/b.png")]
    assert located["problem"].null_count() == 0, "none of them is there"
