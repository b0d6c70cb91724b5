import json

import numpy as np
import polars as pl
import pytest
import torch
from dense_kit import TAPS, options, square, store_squares, write_squares
from joint_kill import kill_at
from PIL import Image
from stage_two import metrics_from_predictions

from featurecache.config import FitConfig, JointConfig
from featurecache.crossval import fit_from_config
from featurecache.data.dense import IGNORE
from featurecache.data.transforms import Augmentation
from featurecache.errors import InputError
from featurecache.heads.base import load_head
from featurecache.joint.dense import DenseImages
from featurecache.joint.finetune import finetune_joint
from featurecache.joint.images import SampleImages
from featurecache.joint.start import prepare
from featurecache.newsamples import NewSamples
from featurecache.predict import predict
from featurecache.progress import Silent

TRUST = {"trust_factory": ("plugin_joint:tiny",)}


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    return write_squares(tmp_path_factory.mktemp("dense") / "data", 24, without=(3,))


@pytest.fixture(scope="module")
def fitted(manifest):
    torch.set_num_threads(1)
    folder = manifest.parent.parent
    settings = {"epochs": 4, "width": 16, "batch_size": 4, "lr": 0.02}
    values = {"store": store_squares(manifest, folder / "store"), "dataset": "squares", "target": ["mask"],
              "head": "decoder", "tap": ["features.2", "features.7"], "settings": settings, "bootstrap": 0,
              "out": folder / "fit", "device": "cpu", "images": "none"}  # fmt: skip
    return fit_from_config(FitConfig.create(values))


def config(manifest, out, **more):
    base = {**options(manifest), "target": ["mask"], "head": "decoder", "epochs": 1, "freeze_epochs": 1, "out": out,
            "batch_size": 4, "lr": 0.02, "settings": {"width": 16}, "bootstrap": 10, "images": 2}  # fmt: skip
    return JointConfig.create({**base, **more})


@pytest.fixture(scope="module")
def warm(manifest, fitted):
    torch.set_num_threads(1)
    values = {"manifest": manifest, "init": fitted.path, "out": manifest.parent.parent / "warm", "epochs": 1, **TRUST,
              "bootstrap": 10, "device": "cpu", "precision": "fp32", "workers": 1, "batch_size": 4}  # fmt: skip
    return finetune_joint(JointConfig.create(values))


def test_it_goes_on_from_the_cached_decoder(fitted, warm):
    """Judged before the first step, the network says what the decoder said from cached maps."""
    assert warm.record["head"]["name"] == "decoder"
    assert warm.history["epoch"].to_list() == [0, 1]
    best = fitted.history.sort("valid_loss")["valid_loss"][0]
    assert warm.history["valid_loss"][0] == pytest.approx(best, rel=1e-3)
    assert pl.read_csv(warm.path / "splits.csv").equals(pl.read_csv(fitted.path / "splits.csv"))
    assert json.loads(json.dumps(metrics_from_predictions(warm.path))) == warm.metrics
    assert "iou" in warm.metrics["test"]["intervals"]
    assert load_head(warm.path).size == (32, 32)


def test_the_masks_of_a_joint_run(warm):
    table = pl.read_csv(warm.path / "predictions.csv").filter(pl.col("split") == "test")
    for row in table.iter_rows(named=True):
        said = np.asarray(Image.open(warm.path / row["mask"])) == 255
        inside = square(int(row["sample_id"][1:]))[1]
        assert (row["said:255"], row["right:255"]) == (said.sum(), (said & inside).sum())
    assert json.loads((warm.path / "masks.json").read_text())["samples"]


def test_new_samples_and_one_that_can_not_be_read(warm, tmp_path):
    path = write_squares(tmp_path, 4, first=60)
    (tmp_path / "q061.png").write_bytes(b"broken")
    new = NewSamples((str(path),), body=TRUST, device="cpu", workers=1)
    scored, out = predict(warm, new, tmp_path / "p.csv")
    table = pl.read_csv(out)
    assert table["sample_id"].to_list() == ["q060", "q062", "q063"]
    assert [failure["sample_id"] for failure in scored.failures] == ["q061"]
    for row in table.iter_rows(named=True):
        said = np.asarray(Image.open(tmp_path / row["mask"])) == 255
        assert row["share:255"] == pytest.approx(said.mean())
    with pytest.raises(InputError, match=r"--tta 2: masks of augmented versions don't lie on each other"):
        predict(warm, NewSamples((str(path),), body=TRUST, tta=2), tmp_path / "q.csv")


def test_masks_are_augmented_as_their_images_are(manifest):
    start = prepare(config(manifest, None))
    names = ("crop", "flip", "vflip", "rotate", "colour")
    given = {"seed": 3, "augmentation": {"image": Augmentation(names, degrees=20)}}
    images = DenseImages(start.masks, start.target.classes, start.manifest, start.setups, **given)
    plain = SampleImages(start.manifest, start.setups, **given)
    overlaps = []
    for sample in (0, 1, 2, 5):
        for epoch in (1, 2, 3):
            found = images.load(sample, epoch)
            assert torch.equal(found.images["image"][0], plain.load(sample, epoch).images["image"][0])
            mask = found.mask.numpy()
            bright = found.images["image"][0].float().mean(0).numpy() > 115
            known = mask != IGNORE
            either = ((mask == 1) | bright) & known
            overlaps.append(((mask == 1) & bright & known).sum() / max(either.sum(), 1))
    assert np.median(overlaps) > 0.85
    assert images.load(0).mask is None
    batch = images.collate([images.load(0, 1), images.load(3, 1)])
    assert batch.masks.shape == (2, 32, 32)
    assert set(batch.masks[1].unique().tolist()) == {IGNORE}, "sample 3 has no mask"


def test_from_scratch(manifest, tmp_path):
    run = finetune_joint(config(manifest, tmp_path / "run"))
    assert run.task == "dense"
    assert run.history["phase"].to_list() == ["frozen", "unfrozen"]
    assert [tap.partition("@")[0] for tap in run.record["tap"]["image"]] == [tap.partition(":")[0] for tap in TAPS]
    assert run.record["target_config"]["masks"] == "index"


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"augment": ["mixup"]}, "--augment mixup: not for masks (mask)"),
        ({"fusion": "mean"}, "--fusion mean: not for masks"),
        ({"pairs": True}, "--pairs: not for masks"),
        ({"train_from": "features.2", "store": "s"}, "--train-from: not for masks"),
        ({"task": "binary"}, "--task binary: a decoder predicts masks"),
        ({"tap": {}}, "has the shape (12,), not a map"),
        ({"settings": {"hidden": 3}}, "head 'decoder': not valid"),
    ],
)
def test_what_makes_no_sense_is_refused(manifest, tmp_path, changes, text):
    with pytest.raises(InputError) as caught:
        finetune_joint(config(manifest, tmp_path / "run", **changes))
    assert text in str(caught.value)


@pytest.fixture(scope="module")
def never_killed(manifest, tmp_path_factory):
    torch.set_num_threads(1)
    return finetune_joint(config(manifest, tmp_path_factory.mktemp("whole") / "run", epochs=2))


@pytest.mark.slow
@pytest.mark.parametrize("at", ["epoch 2/3 (unfrozen bodies) step 2", "validation 2/3 step 1", "predict step 1"])
def test_sigkill_and_resume_give_the_weights_and_masks_of_the_uninterrupted_run(manifest, tmp_path, never_killed, at):
    out = tmp_path / "run"
    kill_at(config(manifest, out, epochs=2, checkpoint_every="1"), tmp_path / "joint.toml", at)
    notes = []
    told = type("Told", (Silent,), {"note": lambda self, message: notes.append(message)})()
    resumed = finetune_joint(config(manifest, out, epochs=2, resume=True), reporter=told)
    assert notes[0].startswith("resumed after epoch")
    names = ["head.safetensors", "bodies/image.safetensors", "predictions.csv"]
    masks = sorted(path.relative_to(never_killed.path) for path in (never_killed.path / "masks").rglob("*.png"))
    assert masks
    for name in (*names, *masks):
        assert (resumed.path / name).read_bytes() == (never_killed.path / name).read_bytes(), name
    assert resumed.history.drop("seconds").equals(never_killed.history.drop("seconds"))
