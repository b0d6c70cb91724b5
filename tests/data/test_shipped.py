"""Shipped files are found in a checkout and in an installed package."""

from __future__ import annotations

import pytest

from featurecache.data import shipped
from featurecache.errors import MissingFileError


def test_found_in_the_checkout():
    assert shipped.shipped_path("emoji/manifest.csv").is_file()


def test_found_in_an_installed_package(tmp_path, monkeypatch):
    package = tmp_path / "site-packages" / "featurecache"
    (package / "_shipped" / "weights").mkdir(parents=True)
    (package / "_shipped" / "weights" / "a.safetensors").write_bytes(b"x")
    monkeypatch.setattr(shipped, "PACKAGE", package)
    assert shipped.shipped_path("weights/a.safetensors").read_bytes() == b"x"
    with pytest.raises(MissingFileError, match=r"weights/b\.safetensors: this file should travel with featurecache"):
        shipped.shipped_path("weights/b.safetensors")
