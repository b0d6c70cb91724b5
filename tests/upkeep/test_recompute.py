"""Rows extracted once more: what drifted is measured, what is gone is counted, what is not trusted is not imported."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from extract_kit import image, json_of, main, read_rows, run, tree, write_images, write_manifest
from PIL import Image

from featurecache.bodies.engines.torch import TorchEngine
from featurecache.errors import InputError
from featurecache.stageone import canary
from featurecache.stageone.canary import versions
from featurecache.store.store import FeatureStore
from featurecache.upkeep import recompute
from featurecache.upkeep.recompute import row_drifts, shares

TRUST = ["plugin_extract:steady", "plugin_extract:strided"]
N = 6


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Two datasets of the same images, other bodies and sizes: one float32 with two taps, one float16 of boxes."""
    folder = tmp_path_factory.mktemp("made")
    manifest = write_images(folder / "data", N, side=40)
    rows = [{**row, "x0": 2, "y0": 3, "x1": 36, "y1": 38} for row in read_rows(manifest)]
    write_manifest(manifest, rows)
    run(manifest, folder / "store", tap=["penultimate", "conv1:avg"], image_size=24)
    half = {"body": "plugin_extract:strided", "store_dtype": "float16", "box": {"image": ("x0", "y0", "x1", "y1")}}
    run(manifest, folder / "store", name="half", **half)
    return folder


@pytest.fixture
def folder(made, tmp_path):
    """A copy in the very place that its datasets name."""
    shutil.copytree(made, tmp_path / "kept")
    yield made
    shutil.rmtree(made)
    shutil.copytree(tmp_path / "kept", made)


def check(folder: Path, rows: int = 2 * N, **options) -> recompute.Recomputation:
    return recompute.recompute(folder / "store", rows, **{"trust": TRUST, **options})


def drifting(monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    """Another kernel: what comes back from the device is off."""
    collect = TorchEngine.collect
    monkeypatch.setattr(TorchEngine, "collect", lambda self, handle: [a * factor for a in collect(self, handle)])


def test_what_did_not_change_does_not_drift(made):
    before = tree(made / "store")
    found = check(made)
    assert found.ok
    assert found.recomputed == 2 * N
    first, second = found.recipes
    assert set(first.drifts) == {"conv1@avg", "penultimate@none"}
    assert max(*first.drifts.values(), *second.drifts.values()) < 1e-5
    assert first.recipe != second.recipe
    assert (first.changed, first.versions_then) == ([], versions())
    assert tree(made / "store") == before, "a look changes nothing"


def test_drift_is_measured_and_named(made, monkeypatch, capsys):
    drifting(monkeypatch, 1.01)
    monkeypatch.setattr(canary, "versions", lambda: {**versions(), "torch": "99.1"})
    found = check(made)
    assert not found.ok
    store = FeatureStore(made / "store")
    for info, recipe in zip(store.recipes(), found.recipes, strict=True):
        for tap, drift in recipe.drifts.items():
            rows = np.float64(store.read(info.id, tap, store.keys(info.id)[0]).reshape(N, -1))
            spread = np.linalg.norm(rows - rows.mean(axis=0), axis=1)
            expected = 0.01 * np.linalg.norm(rows, axis=1) / np.maximum(spread, np.sqrt((spread**2).mean()))
            assert drift == pytest.approx(expected.max(), rel=0.1)
    status, out, _ = main("verify", made / "store", "--recompute", 6, *trusted(), capsys=capsys)
    assert status == 1
    assert out.splitlines()[-1] == "drifted"
    assert "(tolerance 0.001), TOO MUCH; most in sample s000" in out
    assert f"versions: torch {versions()['torch']} then, 99.1 now" in out


def trusted() -> list[str]:
    return [word for name in TRUST for word in ("--trust-factory", name)]


def test_within_tolerance(made, monkeypatch):
    drifting(monkeypatch, 1 + 1e-5)
    found = check(made)
    assert found.ok
    assert 1e-6 < found.recipes[0].drifts["penultimate@none"] < found.recipes[0].tolerance


def test_another_image_is_far_beyond_tolerance(made, monkeypatch):
    """The measure can fail: features of other images are near by length, not by distance from their mean."""
    monkeypatch.setattr(recompute, "decode", lambda reader, preprocessing, data, selector: fixed(reader, preprocessing))

    def fixed(reader, preprocessing):
        return preprocessing.apply(reader.decode((made / "data" / "image0000.png").read_bytes(), {}))

    assert all(max(recipe.drifts.values()) > 0.5 for recipe in check(made).recipes)


def test_the_command(made, capsys):
    status, out, err = main("verify", made / "store", "--recompute", 5, *trusted(), "--json", capsys=capsys)
    assert status == 0, err
    figures = json_of(out)
    assert (figures["recomputed"], figures["not_recomputable"], figures["within_tolerance"]) == (5, 0, True)
    assert [entry["recomputed"] for entry in figures["recomputation"]] == [3, 2]
    assert figures["versions_now"] == versions()
    status, out, _ = main("verify", made / "store", "--recompute", 2, *trusted(), capsys=capsys)
    assert status == 0
    assert out.count("1 rows extracted once more") == 2
    assert out.count("versions: the same as then") == 2
    status, _, err = main("verify", made / "store", "--recompute", 0, capsys=capsys)
    assert status == 2
    assert "--recompute 0: at least 1 is needed" in err


def test_the_draw_depends_on_the_seed_alone(made):
    def drawn(seed: int) -> list[list[recompute.Row]]:
        store, random = FeatureStore(made / "store"), np.random.default_rng(seed)
        return [recompute.draw(store, info, 3, random) for info in store.recipes()]

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)
    assert all(len({row.id for row in rows}) == 3 for rows in drawn(1))


def test_a_factory_that_only_the_store_names_is_not_imported(made, monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "plugin_extract", raising=False)
    found = check(made, trust=[])
    assert "plugin_extract" not in sys.modules
    assert (found.recomputed, found.ok) == (0, False)
    (reason,) = found.recipes[0].missing
    assert "names the factory 'plugin_extract:steady' as its body. Nothing was imported." in reason
    assert "--trust-factory plugin_extract:steady" in reason
    status, out, _ = main("verify", made / "store", "--recompute", 4, capsys=capsys)
    assert status == 1
    assert out.splitlines()[-1] == "no row could be recomputed"
    found = check(made, trust=TRUST[:1])
    assert found.ok, "what can be looked at is"
    assert [recipe.recomputed for recipe in found.recipes] == [N, 0]


def test_what_is_gone_or_changed_is_counted(folder):
    data = folder / "data"
    (data / "image0000.png").unlink()
    Image.fromarray(255 - np.asarray(image(1, 40))).save(data / "image0001.png")
    write_manifest(
        data / "samples.csv", [row for row in read_rows(data / "samples.csv") if row["sample_id"] != "s0002"]
    )
    found = check(folder)
    assert found.ok
    for recipe in found.recipes:
        assert recipe.recomputed == N - 3
        assert dict(recipe.missing) == {
            "its file is gone or can't be read": 1, "its file has changed": 1, "its manifest no longer lists it": 1,
        }  # fmt: skip
    (data / "samples.csv").unlink()
    (reason,) = check(folder).recipes[0].missing
    assert reason.startswith("the manifest of dataset 'samples' can't be read (")


def test_a_file_under_another_name_will_do(folder):
    """Any cell of the content serves."""
    data = folder / "data"
    shutil.copy(data / "image0000.png", data / "twin.png")
    rows = read_rows(data / "samples.csv")
    more = write_manifest(data / "more.csv", [{**rows[0], "sample_id": "twin", "image": "twin.png"}])
    run(more, folder / "store", tap=["penultimate", "conv1:avg"], image_size=24)
    (data / "image0000.png").unlink()
    assert check(folder).recipes[0].recomputed == N


def test_rows_that_no_dataset_names_and_bodies_that_are_others_now(folder, monkeypatch):
    run(folder / "data" / "samples.csv", folder / "store", name="half", replace=True, image_size=24)
    first, second = check(folder).recipes
    assert (first.recomputed, dict(second.missing)) == (N, {recompute.UNBOUND: N})
    monkeypatch.setattr("plugin_extract.steady", sys.modules["plugin_extract"].strided)
    (reason,) = check(folder).recipes[0].missing
    assert reason.startswith("the body is another one now: taps.conv1@avg.program ")


def test_drift_of_rows():
    then = np.array([[0.0, 0.0], [2.0, 0.0], [4.0, 0.0]])
    assert row_drifts(then, then).tolist() == [0, 0, 0]
    now = then + np.array([[0.0, 0.1], [0.0, 0.1], [0.0, 0.0]])
    # Distances from the mean are 2, 0 and 2: the row in the middle counts as the others do on average.
    assert row_drifts(now, then) == pytest.approx([0.1 / 2, 0.1 / np.sqrt(8 / 3), 0])
    assert row_drifts(np.array([[1.0, np.nan]]), np.array([[1.0, 2.0]])).tolist() == [np.inf]
    assert row_drifts(np.array([[3.3, 4.4]]), np.array([[3.0, 4.0]])) == pytest.approx([0.1])
    assert row_drifts(np.zeros((2, 3)), np.zeros((2, 3))).tolist() == [0, 0]


@pytest.mark.parametrize(
    ("available", "wanted", "expected"),
    [
        ([2, 9], 6, [2, 4]),
        ([9, 9, 9], 2, [1, 1, 0]),
        ([1, 2], 50, [1, 2]),
        ([5], 0, [0]),
        ([], 3, []),
        ([4, 4], 5, [3, 2]),
    ],
)
def test_rows_are_shared_out_evenly(available, wanted, expected):
    assert shares(available, wanted) == expected


def test_no_store(tmp_path):
    with pytest.raises(InputError, match="no such store"):
        recompute.recompute(tmp_path / "none", 3)
