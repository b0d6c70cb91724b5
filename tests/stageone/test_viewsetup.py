"""From options to body, reader, preprocessing and engine; `auto` is resolved by rule."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys

import numpy as np
import pytest
from extract_kit import config, counts, features, run, write_images

from featurecache.bodies.engines import openvino
from featurecache.errors import DependencyError, InputError
from featurecache.stageone import viewsetup
from featurecache.stageone.viewsetup import choose_engine, set_up_view, with_taps_of
from featurecache.store.store import FeatureStore

needs_openvino = pytest.mark.skipif(importlib.util.find_spec("openvino") is None, reason="openvino is not installed")


@pytest.fixture
def data(tmp_path):
    return write_images(tmp_path / "data", 2)


@pytest.fixture
def asked(data, tmp_path):
    """A configuration, and the view set up from it."""

    def make(**options):
        stage = config(data, tmp_path / "store", **{"precision": "auto", **options})
        return stage, set_up_view(stage, "image")

    return make


def choice(stage, setup, path) -> tuple[str, str, str]:
    store = FeatureStore(path) if path.exists() else None
    found = choose_engine(stage, setup, store)
    return found.engine, found.precision, found.reason


def test_auto_takes_what_is_fast_where_nothing_is_held(asked, tmp_path, monkeypatch):
    for fast in ("fp32", "bf16"):
        monkeypatch.setattr(viewsetup, "fast_precision", lambda device, fast=fast: fast)
        assert choice(*asked(), tmp_path / "store") == ("torch", fast, f"{fast} is fast here")
    assert choice(*asked(precision="bf16"), tmp_path / "store") == ("torch", "bf16", "as given")
    assert choice(*asked(precision="fp32", engine="torch"), tmp_path / "store") == ("torch", "fp32", "as given")


def test_auto_takes_what_the_store_holds(asked, data, tmp_path, monkeypatch):
    monkeypatch.setattr(viewsetup, "fast_precision", lambda device: "fp32")
    store = tmp_path / "store"
    run(data, store, precision="bf16")
    held = ("torch", "bf16", "the store holds 2 rows made so")
    assert choice(*asked(), store) == held
    assert choice(*asked(engine="torch"), store) == held
    assert choice(*asked(precision="fp32"), store) == ("torch", "fp32", "as given")
    assert str(choose_engine(*asked(), FeatureStore(store))) == "torch bf16 (the store holds 2 rows made so)"
    for other in ({"image_size": 24}, {"tap": "conv1:avg"}, {"store_dtype": "float16"}):
        assert choice(*asked(**other), store) == ("torch", "fp32", "fp32 is fast here"), "not the same but for engine"
    run(data, store, precision="fp32")
    assert choice(*asked(), store) == ("torch", "fp32", "the store holds 2 rows made so"), "of several, what is fast"


def test_auto_takes_a_group_that_holds_more_taps(asked, data, tmp_path, monkeypatch):
    """Taps count as a set: the one asked for need not come first."""
    monkeypatch.setattr(viewsetup, "fast_precision", lambda device: "fp32")
    run(data, tmp_path / "store", precision="bf16", tap=["conv1:avg", "penultimate"])
    assert choice(*asked(tap="penultimate"), tmp_path / "store")[1] == "bf16"


def test_what_is_held_but_can_not_run_here_stops_and_names_the_flags(data, tmp_path, monkeypatch):
    store = tmp_path / "store"
    run(data, store)
    real = viewsetup.choose_engine

    def held(stage, setup, store):
        return dataclasses.replace(real(stage, setup, store), precision="fp16", held=True)

    monkeypatch.setattr("featurecache.stageone.jobs.choose_engine", held)
    with pytest.raises(InputError) as caught:
        run(data, store, precision="auto")
    assert "the store holds 2 rows made so (torch, fp16), but that can't run here" in str(caught.value)
    assert "give --engine and --precision to compute everything anew" in str(caught.value)


def without_openvino(monkeypatch):
    """As if it were not installed: importing it fails."""
    monkeypatch.setitem(sys.modules, "openvino", None)


@pytest.fixture
def bf16(monkeypatch):
    """A CPU that has bf16 in hardware, as far as anybody is told, until `undo`."""
    with monkeypatch.context() as patch:
        patch.setattr(openvino, "openvino_has_bf16", lambda: True)
        patch.setattr(openvino, "effective_precision", lambda compiled: "bf16")
        yield patch
    monkeypatch.setattr(openvino, "openvino_has_bf16", lambda: False)


@needs_openvino
def test_auto_takes_openvino_on_a_cpu_where_nothing_is_held(asked, data, tmp_path, monkeypatch):
    monkeypatch.setattr(openvino, "openvino_has_bf16", lambda: False)
    store = tmp_path / "store"
    fast = ("openvino", "fp32", "fast on a CPU")
    assert choice(*asked(engine="auto"), store) == fast
    assert choice(*asked(engine="auto", precision="fp32"), store) == fast
    assert choice(*asked(engine="openvino"), store) == ("openvino", "fp32", "as given")
    found = choice(*asked(engine="auto", precision="bf16"), store)
    assert found == ("torch", "bf16", "as given; openvino can't compute it here")
    monkeypatch.setattr(openvino, "openvino_has_bf16", lambda: True)
    assert choice(*asked(engine="auto"), store) == ("openvino", "bf16", "fast on a CPU")


@needs_openvino
def test_openvino_gives_what_torch_gives(data, tmp_path):
    summary = run(data, tmp_path / "a", engine="auto", tap=["penultimate", "conv1:max"])
    assert summary.engines == {"image": "openvino fp32 (fast on a CPU)"}
    run(data, tmp_path / "b", tap=["penultimate", "conv1:max"])
    for tap in ("penultimate@none", "conv1@max"):
        found, expected = features(tmp_path / "a", tap=tap), features(tmp_path / "b", tap=tap)
        for name, row in expected.items():
            np.testing.assert_allclose(found[name], row, rtol=1e-4, atol=1e-6)


@needs_openvino
def test_openvino_removed_recomputes_nothing(data, tmp_path, monkeypatch):
    store = tmp_path / "store"
    assert run(data, store, engine="auto", precision="auto").computed == 2
    with monkeypatch.context() as patch:
        without_openvino(patch)
        for check in ("stat", "content"):
            again = run(data, store, engine="auto", precision="auto", check=check)
            assert counts(again) == (0, 2, 0)
            assert again.engines["image"].startswith("openvino")
        more = write_images(tmp_path / "more", 3)
        with pytest.raises(InputError) as caught:
            run(more, store, engine="auto", precision="auto", name="more")
        assert "the store holds 2 rows made so (openvino, " in str(caught.value)
        assert "that can't run here: engine openvino: openvino can't be imported" in str(caught.value)
        assert "give --engine and --precision to compute everything anew" in str(caught.value)
        assert run(more, store, engine="torch", name="more").computed == 3
    assert counts(run(data, store, engine="auto", precision="auto")) == (0, 2, 0)


@needs_openvino
def test_openvino_installed_recomputes_nothing(data, tmp_path, monkeypatch):
    store = tmp_path / "store"
    with monkeypatch.context() as patch:
        without_openvino(patch)
        first = run(data, store, engine="auto")
        assert first.engines == {"image": "torch fp32 (as given; openvino is not installed)"}
        with pytest.raises(DependencyError, match="pip install openvino, or use --engine torch"):
            run(data, tmp_path / "other", engine="openvino", precision="auto")
        assert not (tmp_path / "other").exists()
    assert counts(run(data, store, engine="auto")) == (0, 2, 0)
    assert counts(run(write_images(tmp_path / "data", 3), store, engine="auto")) == (1, 2, 0), "and goes on with torch"


@needs_openvino
def test_a_cpu_without_bf16_recomputes_nothing(bf16, data, tmp_path):
    store = tmp_path / "store"
    assert run(data, store, engine="auto", precision="auto").engines == {"image": "openvino bf16 (fast on a CPU)"}
    bf16.undo()
    assert counts(run(data, store, engine="auto", precision="auto")) == (0, 2, 0)
    with pytest.raises(
        InputError, match=r"\(openvino, bf16\), but that can't run here: precision bf16: this CPU has no"
    ):
        run(write_images(tmp_path / "data", 3), store, engine="auto", precision="auto")
    assert counts(run(data, store, engine="auto", precision="fp32")) == (3, 0, 0)


@needs_openvino
def test_bf16_is_never_claimed_where_fp32_would_run(data, tmp_path, monkeypatch):
    monkeypatch.setattr(openvino, "openvino_has_bf16", lambda: False)
    with pytest.raises(InputError, match="no bfloat16 in hardware, and OpenVINO would compute in fp32 instead"):
        run(data, tmp_path / "store", engine="openvino", precision="bf16")
    assert not (tmp_path / "store").exists()


@needs_openvino
def test_a_body_that_does_not_convert_runs_on_torch(data, tmp_path, monkeypatch):
    store = tmp_path / "store"
    with pytest.raises(InputError, match=r"OpenVINO can't run this body .*Use --engine torch"):
        run(data, store, engine="openvino", body="plugin_extract:breaks")
    assert not store.exists()
    with pytest.warns(
        UserWarning, match="plugin_extract:breaks runs on torch, which is slower on a CPU: OpenVINO can't"
    ):
        first = run(data, store, engine="auto", body="plugin_extract:breaks")
    assert first.engines == {"image": "torch fp32 (as given; openvino can't run this body)"}
    assert counts(run(data, store, engine="auto", body="plugin_extract:breaks")) == (0, 2, 0)


@needs_openvino
def test_most_rows_decide_between_engines(asked, data, tmp_path):
    store = tmp_path / "store"
    run(data, store, engine="openvino")
    run(data, store, engine="torch")
    held = ("openvino", "fp32", "the store holds 2 rows made so")
    assert choice(*asked(engine="auto", precision="fp32"), store) == held, "of equals what is fast"
    run(write_images(tmp_path / "data", 3), store, engine="torch")
    assert choice(*asked(engine="auto"), store) == ("torch", "fp32", "the store holds 3 rows made so")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 64, "crop": 32}, r"--image-size 64 is short for --resize 64 --crop 64, but --crop 32 is given"),
        ({"image_size": 64, "resize": "none"}, r"but --resize none is given too\. Give either\."),
        ({"crop": 48}, r"with resize=\d+ and crop=48 every image would get a black border\. Give --crop \d+ or less"),
        ({"resize": 16}, r"with resize=16 and crop=32 every image would get a black border"),
        ({"crop": "none"}, r"images keep different sizes and can't share a batch\. Give --crop N"),
        ({"crop": "none", "resize": "none", "resize_mode": "pad"}, r"resize_mode 'pad' needs a size"),
        ({"mean": (0.5, 0.5)}, r"mean has 2 values for 3 channels"),
        ({"std": (0.5, 0.0, 0.5)}, r"std=.* must be finite and > 0"),
        ({"tap": "conv3"}, r"tap 'conv3': plugin_extract:steady has no module 'conv3'\. Did you mean 'conv[12]'\?"),
        ({"tap": ["conv1:avg", "conv1:avg"]}, r"two taps would be stored as 'conv1@avg'"),
        ({"tap": "penultimate:rows"}, r"rows"),
        ({"reader": "imag"}, r"unknown reader 'imag'\. Did you mean 'image'\?"),
        ({"body": "plugin_extract:stedy"}, r"stedy"),
        ({"body": "torchvision/resnet19", "weights": "none", "seed": 1}, r"resnet19.*Did you mean"),
        ({"body": "torchvision/resnet18", "weights": "none"}, r"seed"),
        ({"body": "torchvision/resnet18", "weights": "IMAGENET9"}, r"IMAGENET9"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_can_not_be_is_refused_in_words(asked, options, message):
    with pytest.raises(InputError, match=message):
        asked(**options)


@pytest.mark.parametrize(
    ("options", "size"),
    [
        ({}, (32, 32)),
        ({"image_size": 48}, (48, 48)),
        ({"image_size": 48, "crop": 48}, (48, 48)),
        ({"resize": 40, "crop": 24}, (24, 24)),
        ({"resize": "none", "crop": 16}, (16, 16)),
        ({"resize_mode": "pad", "crop": "none", "resize": 20}, (20, 20)),
    ],
)
def test_sizes(asked, options, size):
    assert asked(**options)[1].size == size


def test_views_with_the_same_settings_share_everything(data, tmp_path, monkeypatch):
    hashed = []
    real = viewsetup.identify
    monkeypatch.setattr(viewsetup, "identify", lambda *args: (hashed.append(1), real(*args))[1])
    stage = config(data, tmp_path / "store", image_size={"c": 24})
    shared: dict = {}
    a, b, c = (set_up_view(stage, view, bodies=shared) for view in "abc")
    assert a.body is b.body is c.body
    assert a.taps is b.taps
    assert len(hashed) == 2
    assert a.recipe(engine="torch", precision="fp32", storage_dtype="float16") == b.recipe(
        engine="torch", precision="fp32", storage_dtype="float16"
    )
    assert a.size != c.size


def test_with_taps_of(asked):
    _, setup = asked()
    _, more = asked(tap=["conv1:max", "penultimate"])
    recipe = more.recipe(engine="torch", precision="fp32", storage_dtype="float16")
    wider = with_taps_of(setup, recipe)
    assert wider.recipe(engine="torch", precision="fp32", storage_dtype="float16") == recipe
