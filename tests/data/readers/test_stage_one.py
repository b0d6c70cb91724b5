"""Readers through stage one: texts, DICOM and functions of users become features like images do."""

from __future__ import annotations

from pathlib import Path

import extract_kit as kit
import numpy as np
import pytest
import torch
from extract_kit import counts, features, write_manifest

from featurecache.bodies.registry import load_body
from featurecache.data.readers import get_reader
from featurecache.errors import InputError
from featurecache.rundir.recorded import check_bodies
from featurecache.store.store import FeatureStore

CHARACTERS = "featurecache.bodies.small:characters"
TEXTS = {"body": CHARACTERS, "weights": "none", "seed": 0, "reader": "text", "views": {"name": "name"}}


def test_texts_are_cached_by_what_they_say(tmp_path):
    names = ["red apple", "green apple", "red apple", ""]
    rows = [{"sample_id": f"s{number}", "name": name} for number, name in enumerate(names)]
    manifest = write_manifest(tmp_path / "samples.csv", rows)
    assert counts(kit.run(manifest, tmp_path / "store", **TEXTS)) == (2, 1, 0)
    assert counts(kit.run(manifest, tmp_path / "store", **TEXTS)) == (0, 3, 0)
    found = features(tmp_path / "store", view="name")
    assert np.array_equal(found["s0"], found["s2"])
    body = load_body(CHARACTERS, "none", seed=0)
    reader = get_reader("text", length=body.preprocessing.channels)
    image = body.preprocessing.apply(reader.decode(b"green apple", {}))
    with torch.inference_mode():
        live = body.module(body.preprocessing.normalise(image[None]))[0].numpy()
    assert np.abs(found["s1"] - live).max() < 1e-6

    other = {**TEXTS, "reader_settings": {"name": {"alphabet": "aelp"}}}
    assert counts(kit.run(manifest, tmp_path / "store", **other)) == (2, 1, 0)
    assert len(kit.recipe_ids(tmp_path / "store")) == 2


def test_what_does_not_fit_a_text_is_said(tmp_path):
    manifest = write_manifest(tmp_path / "samples.csv", [{"sample_id": "s", "name": "x"}])
    with pytest.raises(InputError, match="a text is one pixel of as many channels as it has places, but body"):
        kit.run(manifest, tmp_path / "store", **{**TEXTS, "body": kit.BODY, "weights": "DEFAULT"})
    with pytest.raises(InputError, match=r"length=9 for reader text, but its body .* takes 24"):
        kit.run(manifest, tmp_path / "store", **TEXTS, reader_settings={"name": {"length": 9}})
    with pytest.raises(InputError, match=r"--reader-set nam=...: there is no view 'nam'"):
        kit.run(manifest, tmp_path / "store", **TEXTS, reader_settings={"nam": {}})


def test_dicom_files_and_what_can_not_be_read_of_them(tmp_path, capsys):
    pydicom = pytest.importorskip("pydicom")
    files = Path(pydicom.__file__).parent / "data" / "test_files"
    names = ["MR_small.dcm", "MR_small_RLE.dcm", "CT_small.dcm", "rtplan.dcm", "SC_rgb_rle_2frame.dcm"]
    rows = [{"sample_id": f"s{number}", "image": name, "frame": ""} for number, name in enumerate(names)]
    rows[4]["frame"] = 1
    manifest = write_manifest(tmp_path / "samples.csv", rows)
    words = ("extract", manifest, "--store", tmp_path / "store", "--root", files, "--view", "image=image", "--frame",
             "image=frame", "--body", kit.BODY, "--engine", "torch", "--precision", "fp32", "--store-dtype", "float32",
             "--json")  # fmt: skip
    status, out, _ = kit.main(*words, capsys=capsys)
    said = kit.json_of(out)
    assert (status, said["computed"], said["n_failed"]) == (3, 4, 1)
    assert said["failed"][0]["error"] == "DICOM without an image: RT Plan Storage"
    found = features(tmp_path / "store")
    assert np.array_equal(found["s0"], found["s1"])  # stored in another way, the same pixels
    recorded = FeatureStore(tmp_path / "store").binding("samples").config
    assert recorded["manifest"]["reader"] == {"*": "dicom"}  # as the files decided
    status, out, _ = kit.main(*words, "--reader", "dicom", capsys=capsys)
    assert (kit.json_of(out)["computed"], kit.json_of(out)["reused"]) == (0, 4)
    assert FeatureStore(tmp_path / "store").binding("samples").config == recorded
    status, out, _ = kit.main(*words, "--dry-run", capsys=capsys)
    assert kit.json_of(out)["reused"] == 4
    status, out, _ = kit.main(*words, "--reader-set", "window=40,400", capsys=capsys)
    assert kit.json_of(out)["computed"] == 4
    with FeatureStore(tmp_path / "store") as store:
        readers = [info.recipe.fields["reader"] for info in store.recipes()]
    assert {"name": "dicom", "version": 1, "parameters": {"channels": 3, "window": [40, 400]}} in readers


def test_a_function_of_the_user_reads_and_is_never_imported_from_a_record(tmp_path):
    (tmp_path / "a.raw").write_bytes(bytes(range(64)) * 16)
    manifest = write_manifest(tmp_path / "samples.csv", [{"sample_id": "s", "image": "a.raw"}])
    assert counts(kit.run(manifest, tmp_path / "store", reader="plugin_readers:raw")) == (1, 0, 0)
    recorded = {"body": {"image": "torchvision/resnet18"}, "reader": {"*": "plugin_readers:raw"}}
    with pytest.raises(InputError, match="repeat its name: --trust-factory plugin_readers:raw"):
        check_bodies("run", ["image"], recorded)
    check_bodies("run", ["image"], recorded, ["plugin_readers:raw"])
    check_bodies("run", ["image"], {**recorded, "trust_factory": ("plugin_readers:raw",)})
