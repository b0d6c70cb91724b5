import json

import numpy as np
import polars as pl
import pytest
import torch
from dense_kit import options, square, store_squares, write_squares
from PIL import Image
from stage_two import command, metrics_from_predictions

from featurecache.config import FitConfig
from featurecache.crossval import fit_from_config
from featurecache.data.dense import DenseTarget
from featurecache.dataset import FeatureDataset
from featurecache.errors import InputError
from featurecache.evaluate import evaluate
from featurecache.newsamples import NewSamples
from featurecache.reporting.compare import compare_runs
from featurecache.reporting.report import write_report

FAST = {"epochs": 5, "width": 16, "batch_size": 4, "lr": 0.02}
TAPS = ("features.2", "features.7")


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    return write_squares(tmp_path_factory.mktemp("dense") / "data", 30, without=(4,))


@pytest.fixture(scope="module")
def store(manifest):
    return store_squares(manifest, manifest.parent.parent / "store")


def config(store, out, **more):
    base = {"store": store, "dataset": "squares", "target": ["mask"], "head": "decoder", "settings": FAST, "out": out,
            "tap": list(TAPS), "bootstrap": 50, "device": "cpu", "images": 4}  # fmt: skip
    return FitConfig.create({**base, **more})


@pytest.fixture(scope="module")
def run(store):
    return fit_from_config(config(store, store.parent / "run"), command="featurecache fit-head ...")


def test_a_dataset_gives_features_and_masks(store):
    dataset = FeatureDataset(store, dataset="squares", target="mask", task="dense", tap=TAPS)
    assert isinstance(dataset.target, DenseTarget)
    assert dataset.target.classes == ("0", "255")
    assert [block.shape for block in dataset.blocks] == [(8, 16, 16), (12, 8, 8)]
    features, mask = dataset[7]
    assert features.shape == (8 * 256 + 12 * 64,)
    assert np.array_equal(mask.numpy() == 1, square(7)[1])
    assert not dataset.target.known[4]
    [(x, y)] = dataset.stream(np.arange(6), batch_size=6, shuffle=False)
    assert x.shape[0] == y.shape[0] == 6
    assert y.shape[1:] == (32, 32)


def test_a_run_of_masks(run):
    metrics = run.metrics["test"]
    assert metrics["iou"] > 0.5
    assert {"iou", "dice", "pixel_accuracy", "sample_iou", "sample_dice"} <= metrics["intervals"].keys()
    assert metrics["classes"]["255"]["iou"] == metrics["iou"]
    assert metrics["n_groups"] * 2 == metrics["n"]
    assert run.task == "dense"
    assert run.classes == ("0", "255")
    assert run.record["head"]["name"] == "decoder"
    assert run.record["target_config"] == {"target": ["mask"], "task": "dense", "uncertain": {}, "masks": "index"}
    assert run.threshold["value"] is None
    assert run.predictions["pixels:255"].dtype == pl.Float64
    assert json.loads(json.dumps(metrics_from_predictions(run.path))) == run.metrics


def test_the_table_says_what_the_masks_hold(run):
    table = pl.read_csv(run.path / "predictions.csv")
    assert table.height == 30
    assert table.filter(pl.col("sample_id") == "q004")["pixels:255"].to_list() == [None]
    shown = table.filter(pl.col("mask").is_not_null() & (pl.col("mask") != ""))
    assert set(shown["split"]) == {"test"}
    assert sorted(path.name for path in (run.path / "masks").iterdir()) == sorted(
        name.removeprefix("masks/") for name in shown["mask"]
    )
    for row in shown.iter_rows(named=True):
        said = np.asarray(Image.open(run.path / row["mask"]))
        assert set(np.unique(said)) <= {0, 255}
        inside = square(int(row["sample_id"][1:]))[1]
        assert row["pixels:255"] == inside.sum()
        assert row["said:255"] == (said == 255).sum()
        assert row["right:255"] == (inside & (said == 255)).sum()
        assert row["iou:255"] == pytest.approx((inside & (said == 255)).sum() / (inside | (said == 255)).sum())


def test_the_report_shows_image_true_and_predicted(run):
    write_report(run.path)
    page = (run.path / "report.html").read_text()
    assert page.count("<small>predicted</small>") == page.count("<small>true</small>") == 4
    assert page.count("<small>image</small>") == 4
    assert "Image, true and predicted mask" in page
    assert "Confusion" not in page
    assert "IoU" in (run.path / "README.md").read_text()
    samples = json.loads((run.path / "masks.json").read_text())["samples"]
    assert samples[0]["iou"] == min(entry["iou"] for entry in samples)


def test_new_samples_get_masks_beside_the_table(run, tmp_path):
    write_squares(tmp_path, 4, first=100)
    done = command("predict", run.path, tmp_path / "squares.csv", "--out", tmp_path / "p.csv", "--trust-factory",
                   "plugin_joint:tiny", "--device", "cpu", "--workers", "1", "--json")  # fmt: skip
    assert done.status == 0, done.err
    table = pl.read_csv(tmp_path / "p.csv")
    assert table.columns == ["sample_id", "views", "mask", "share:0", "share:255"]
    overlaps = []
    for row in table.iter_rows(named=True):
        said = np.asarray(Image.open(tmp_path / row["mask"])) == 255
        inside = square(int(row["sample_id"][1:]))[1]
        assert row["share:255"] == pytest.approx(said.mean())
        overlaps.append((said & inside).sum() / (said | inside).sum())
    assert np.mean(overlaps) > 0.4
    (tmp_path / "p.masks" / "notes.txt").write_text("mine")
    again = command("predict", run.path, tmp_path / "squares.csv", "--out", tmp_path / "p.csv", "--trust-factory",
                    "plugin_joint:tiny")  # fmt: skip
    assert again.status == 2
    assert "p.masks: masks would go there, but it holds something else" in again.err
    assert (tmp_path / "p.masks" / "notes.txt").exists()


def test_evaluated_on_new_masks(run, tmp_path):
    path = write_squares(tmp_path / "new", 6, first=200, without=(5,))
    new = NewSamples((str(path),), body={"trust_factory": ("plugin_joint:tiny",)}, device="cpu", workers=1)
    found = evaluate(run, new, by="site", bootstrap=20)
    assert found.metrics["test"]["n"] == 5
    assert {part.value for part in found.subgroups} == {"a", "b"}
    assert all(part.metrics["iou"] is not None for part in found.subgroups)
    table = pl.read_csv(found.path / "predictions.csv")
    assert all((found.path / name).is_file() for name in table["mask"])
    assert (found.path / "report.html").read_text().count("<small>predicted</small>") == 5
    three = write_squares(tmp_path / "three", 3, inside=7)
    with pytest.raises(InputError, match=r"pixel value 7 is none of 0, 255"):
        evaluate(run, NewSamples((str(three),), body={"trust_factory": ("plugin_joint:tiny",)}))


def test_two_runs_are_compared_in_pairs(run, store, tmp_path):
    worse = fit_from_config(config(store, tmp_path / "worse", settings={**FAST, "epochs": 1}, images="none"))
    found = compare_runs([worse, run], n=50)
    assert found.metric == "iou"
    assert [row.run for row in found.runs] == [str(run.path), str(worse.path)]
    assert found.runs[1].difference < 0
    assert found.runs[1].low < found.runs[1].high


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"calibrate": "isotonic"}, "--calibrate isotonic: probabilities of pixels are not calibrated"),
        ({"at": "sensitivity=0.9"}, "a dense target has no threshold; it is for yes-or-no questions"),
        ({"cv": 3}, "--cv: not for masks (mask): a dense target is fitted on one division only"),
        ({"head": "xgboost", "settings": {}, "task": "dense"}, "head 'xgboost' does not predict a dense target"),
        ({"head": "logistic", "settings": {}}, "Give another --target, or --head decoder if these are mask images"),
        ({"task": "binary"}, "binary needs two classes"),
        ({"task": "multiclass", "target": ["label"]}, "head 'decoder' does not predict a multiclass target"),
        ({"target": ["mask", "label"]}, "a dense target is one column of masks"),
        ({"target": ["label"]}, "no such file"),
        ({"uncertain": {"grey": "ignore"}}, "of masks, give a pixel value and ignore, zero or one: 255=ignore"),
    ],
)
def test_options_that_make_no_sense_are_refused(store, tmp_path, changes, text):
    with pytest.raises(InputError) as caught:
        fit_from_config(config(store, tmp_path / "run", **changes))
    assert text in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_the_option_says_how_to_read_masks(store, tmp_path):
    words = ("fit-head", store, "--dataset", "squares", "--target", "mask", "--head", "decoder", "--masks", "inside",
             "--tap", "features.2", "--set", "epochs=1", "--set", "width=16", "--bootstrap", "0", "--images", "none",
             "--out", tmp_path / "r", "--json")  # fmt: skip
    done = command(*words)
    assert done.status == 0, done.err
    assert done.json["task"] == "dense"
    assert 0 <= done.json["test_iou"] <= 1


def test_replicas_have_no_masks(manifest, tmp_path):
    from featurecache.config import ExtractConfig
    from featurecache.extract import extract

    extract(ExtractConfig.create(options(manifest, store=tmp_path / "s", engine="torch", replicas=1)))
    with pytest.raises(InputError, match=r"masks lie on the plain images only: give --replicas none"):
        fit_from_config(config(tmp_path / "s", tmp_path / "run"))


def test_what_shows_scores_of_samples_refuses_masks(run, manifest, tmp_path):
    shown = command("explain", run.path, manifest, "--out", tmp_path / "x")
    assert shown.status == 2
    assert "predicts masks, which say themselves where" in shown.err
    found = command("explore", run.path.parent / "store", "--dataset", "squares", "--run", run.path, "--tap",
                    "features.2", "--out", tmp_path / "e.html")  # fmt: skip
    assert found.status == 2
    assert "predicts masks; the map shows labels and scores" in found.err
    tuned = command("tune", run.path.parent / "store", "--dataset", "squares", "--target", "mask", "--head", "decoder")
    assert tuned.status == 2
    assert "head 'decoder': nothing to tune" in tuned.err
