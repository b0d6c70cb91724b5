"""`featurecache extract` as scripts and people meet it: exit statuses, JSON, messages."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from extract_kit import command_environment, json_of, main, read_rows, tree, write_images, write_manifest

from featurecache.store.store import FeatureStore


@pytest.fixture
def data(tmp_path):
    return write_images(tmp_path / "data", 4)


@pytest.fixture
def extract(data, tmp_path, capsys):
    """Run `featurecache extract` on the samples in this process; later options replace earlier ones."""

    def call(*words, view="image=image", body="plugin_extract:steady", manifest=data):
        given = ["--view", view] if view else []
        bodies = ["--body", body] if body else []
        return main("extract", manifest, "--store", tmp_path / "store", *given, *bodies, *words, capsys=capsys)

    return call


def test_the_installed_command(data, tmp_path):
    """One object on stdout, exit status 3 where an image failed, the failure in JSON and in failures.csv."""
    (data.parent / "image0002.png").write_bytes(b"no image at all")
    done = subprocess.run(
        [Path(sys.executable).with_name("featurecache"), "extract", data, "--store", tmp_path / "store", "--json",
         "--view", "image=image", "--body", "plugin_extract:steady", "--precision", "fp32"],
        env=command_environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 3, done.stderr
    found = json_of(done.stdout)
    assert (found["schema"], found["command"], found["status"]) == (1, "extract", "partly failed")
    assert found["outputs"] == [str(tmp_path / "store")]
    (failed,) = found["failed"]
    assert (failed["sample_id"], failed["view"], failed["path"]) == ("s0002", "image", "image0002.png")
    assert failed["error"]
    assert read_rows(tmp_path / "store" / "failures.csv") == [failed]
    assert "Traceback" not in done.stderr
    figures = {"samples": 4, "images": 4, "computed": 3, "reused": 0, "n_failed": 1, "dataset": "samples"}
    assert figures.items() <= found.items()
    numbers = ("images_per_second", "seconds_read", "seconds_decode", "seconds_compute", "seconds_write", "bytes")
    assert all(isinstance(found[name], int | float) for name in numbers)
    assert found["recipes"] == {"image": FeatureStore(tmp_path / "store").recipes()[0].id}


def test_text_for_people(extract, data, tmp_path):
    status, out, err = extract()
    assert status == 0
    assert "dataset   samples: 4 samples, 4 images" in out
    assert "computed  4 (" in out
    assert "reused    0 (0 % reused)" in out
    assert err.splitlines()[-1].startswith("Next: featurecache fit-head ")
    status, out, err = extract()
    assert "computed  0\n" in out
    assert "reused    4 (100 % reused)" in out
    (data.parent / "image0001.png").write_bytes(b"broken")
    status, out, err = extract()
    assert status == 3
    assert f"failed    1, see {tmp_path}/store/failures.csv" in out
    assert "failed: s0001 image image0001.png: " in err


def test_quiet_prints_the_store_only(extract, tmp_path):
    assert extract("--quiet") == (0, f"{tmp_path}/store\n", "")


def test_dry_run(extract, tmp_path):
    status, out, _ = extract("--dry-run")
    assert status == 0
    assert "reused 0, to compute 4" in out
    assert "            4 new" in out
    assert not (tmp_path / "store").exists()
    extract()
    before = tree(tmp_path)
    status, out, _ = extract("--dry-run", "--json")
    assert (status, tree(tmp_path)) == (0, before)
    found = json_of(out)
    assert (found["status"], found["reused"], found["to_compute"], found["failed"]) == ("done", 4, 0, [])


def test_retry_failed(extract, data):
    (data.parent / "image0001.png").write_bytes(b"broken")
    assert [extract(*more)[0] for more in ((), (), ("--retry-failed",))] == [3, 3, 3]


def test_on_error_stop(extract, data, tmp_path):
    (data.parent / "image0001.png").write_bytes(b"broken")
    status, out, err = extract("--on-error", "stop", "--json")
    assert status == 1
    assert json_of(out)["status"] == "failed"
    assert "Error: image0001.png: " in err
    assert "stopped, as --on-error stop asks" in err
    assert FeatureStore(tmp_path / "store").bindings() == ["samples"]


@pytest.mark.parametrize(
    ("words", "options", "message"),
    [
        ([], {"body": "plugin_extract:stedy"}, "stedy"),
        ([], {"body": "torchvision/resnet81"}, "Did you mean 'torchvision/resnet18'?"),
        (["--weights", "none"], {"body": "torchvision/resnet18"}, "--seed"),
        (["--weights", "gone.safetensors"], {"body": "torchvision/resnet18"}, "gone.safetensors"),
        (["--tap", "conv7"], {}, "no module 'conv7'. Did you mean 'conv"),
        (["--tap", "conv1:average"], {}, "unknown pooling 'average'. Did you mean 'avg'?"),
        (["--view", "image=imgae"], {"view": ""}, "Did you mean 'image'?"),
        (["--image-size", "frontal=64"], {"view": "frontla=image"}, "no view 'frontal'. Did you mean 'frontla'?"),
        (["--image-size", "64", "--crop", "32"], {}, "--image-size 64 is short for --resize 64 --crop 64"),
        (["--crop", "none"], {}, "images keep different sizes"),
        (["--image-size", "many"], {}, "image_size"),
        (["--mean", "0.5,x,0.5"], {}, "mean"),
        (["--batch-size", "0"], {}, "--batch-size 0: at least 1 is needed"),
        (["--workers", "-2"], {}, "--workers -2: at least 1 is needed"),
        (["--batch-size", "few"], {}, "batch_size"),
        (["--precision", "fp16", "--device", "cpu"], {}, "precision fp16 needs a GPU"),
        (["--device", "tpu"], {}, "device 'tpu': not a device"),
        (["--reader", "dicm"], {}, "unknown reader 'dicm'"),
        ([], {"manifest": "nothing.csv"}, "nothing.csv"),
        (["--id", "nme"], {}, "nme"),
        (["--name", "a/b"], {}, "a/b"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_use_is_status_2_with_a_message(extract, tmp_path, words, options, message):
    status, out, err = extract(*words, **options)
    assert (status, out) == (2, ""), err
    assert message in err
    assert "Traceback" not in err
    assert not (tmp_path / "store" / "features.zarr").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--codec", "zip"], "zip"),
        (["--check", "dates"], "dates"),
        (["--precison", "fp32"], "--precison"),
        (["--engine", "onnx"], "onnx"),
    ],
)
def test_options_that_typer_refuses(extract, words, message):
    status, out, err = extract(*words)
    assert (status, out) == (2, "")
    assert message in err


def test_debug_shows_the_traceback(extract):
    status, _, err = extract("--tap", "conv7", "--debug")
    assert status == 2
    assert err.startswith("Traceback")
    assert "Error: tap 'conv7'" in err


def test_errors_are_json_too(extract):
    status, out, err = extract("--tap", "conv7", "--json")
    found = json_of(out)
    assert (status, found["status"], found["failed"], found["outputs"]) == (2, "failed", [], [])
    assert "no module 'conv7'" in found["error"]
    assert "no module 'conv7'" in err


def test_something_else_than_a_store(extract, tmp_path):
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "thesis.doc").write_text("mine")
    status, _, err = extract()
    assert status == 2
    assert "store" in err
    assert (tmp_path / "store" / "thesis.doc").read_text() == "mine"


def test_options_per_view(data, tmp_path, capsys):
    rows = [{**row, "second": row["image"]} for row in read_rows(data)]
    write_manifest(data, rows)
    status, out, err = main(
        "extract", data, "--store", tmp_path / "store", "--view", "a=image", "--view", "b=second", "--json",
        "--body", "plugin_extract:steady", "--body", "b=plugin_extract:strided", "--image-size", "b=24",
        "--tap", "a=conv1:avg", "--tap", "a=penultimate", "--tap", "b=conv1:max",
        capsys=capsys,
    )  # fmt: skip
    assert status == 0, err
    recipes = {info.id: info for info in FeatureStore(tmp_path / "store").recipes()}
    a, b = (recipes[json_of(out)["recipes"][view]] for view in "ab")
    assert set(a.taps) == {"conv1@avg", "penultimate@none"}
    assert set(b.taps) == {"conv1@max"}
    assert b.recipe.fields["preprocessing"]["crop"] == 24
    assert b.recipe.fields["body"]["architecture"] == "plugin_extract:strided"
