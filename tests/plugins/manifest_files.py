"""Manifests for tests: written, read, and what is wrong with them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from featurecache.config import ManifestConfig
from featurecache.data.manifest import Manifest, read_manifest
from featurecache.errors import InputError

LONG = {"layout": "long", "view_column": "pos", "path_column": "path"}
LONG_TEXT = """sample_id,pos,path,sex,dose
s2,LL,c.png,F,1
s1,PA,a.png,M,2
s1,LATERAL,b.png,M,3
s3,OBLIQUE,missing.png,M,3
s2,AP,,F,1
"""


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
