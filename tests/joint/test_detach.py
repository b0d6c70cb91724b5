import numpy as np
import pytest
import torch
from plugin_joint import tiny, write_samples
from safetensors.torch import load_file

from featurecache.config import ExtractConfig, JointConfig
from featurecache.dataset import FeatureDataset
from featurecache.errors import InputError
from featurecache.extract import extract
from featurecache.heads.losses import HeadLoss, target_tensor
from featurecache.joint.build import make_head, make_model
from featurecache.joint.finetune import finetune_joint
from featurecache.joint.images import SampleImages, plan_batches, shuffled
from featurecache.joint.schedule import make_optimizer, one_cycle, set_rates
from featurecache.joint.settings import head_settings
from featurecache.joint.start import prepare
from featurecache.joint.step import draw_seed

BATCH, EPOCHS = 12, 3  # a batch of another size may take another kernel, and round otherwise
SHARED = {"views": {"a": "a", "b": "b"}, "body": "plugin_joint:tiny", "precision": "fp32", "device": "cpu"}
OPTIONS = {
    **SHARED, "target": ("label",), "workers": 1, "batch_size": BATCH, "lr": 5e-3, "epochs": EPOCHS, "detach": True,
    "settings": {"hidden": [16], "dropout": 0.2}, "bootstrap": 0, "augment": (), "clip": 0.0, "view_dropout": 0.0,
    "valid": 0.25, "test": 0.25,
}  # fmt: skip


class Losses:
    """Remembers the loss of every step."""

    def __init__(self):
        self.found = []

    def on_step(self, step, loss, rate):
        self.found.append(float(loss))

    def on_epoch(self, history):
        pass

    def close(self):
        pass


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Samples, and their features as stage one makes them in float32 on torch, where nothing is folded."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("detach")
    write_samples(folder, 48, seed=1, missing=0.15)
    stage = {"manifest": folder / "samples.csv", "store": folder / "store", "engine": "torch", "store_dtype": "float32"}
    extract(ExtractConfig.create({**SHARED, **stage, "batch_size": BATCH}))
    return folder


def config(folder, **changes):
    return JointConfig.create({**OPTIONS, "manifest": folder / "samples.csv", **changes})


def cached(folder):
    return FeatureDataset(folder / "store", dataset="samples", target="label")


@pytest.mark.parametrize("fusion", ["concat", "gated"])
def test_features_and_losses_are_bitwise_those_of_the_cache(folder, tmp_path, fusion):
    options = config(folder, out=tmp_path / "run", fusion=fusion)
    losses = Losses()
    run = finetune_joint(options, callbacks=[losses])
    assert set(run.history["phase"]) == {"frozen"}
    assert all(
        torch.equal(tensor, load_file(run.path / "bodies" / "a.safetensors")[name])
        for name, tensor in tiny().state_dict().items()
    )

    start, data = prepare(options), cached(folder)
    rows = torch.from_numpy(data.features[np.arange(len(data))])
    train = np.flatnonzero(run.predictions["split"].to_numpy() == "train")
    assert len(train) == 2 * BATCH
    target = start.target.subset(train)
    settings = head_settings(start.config, None)
    missing = not data.present[train].all()
    head = make_head(None, start.blocks, target, settings, missing=missing, view_dropout=0.0, seed=0)
    live = make_model(start.setups, start.blocks, head, multi="error", layout=torch.contiguous_format)
    images = SampleImages(start.manifest, start.setups)
    with torch.no_grad():
        for batch in images.batches(plan_batches(np.arange(48), BATCH)):
            ready = {view: start.setups[view].preprocessing.normalise(x) for view, x in batch.images.items()}
            found = live.features(ready, batch.present, batch.owner)
            assert torch.equal(found.nan_to_num(-1), rows[batch.samples].nan_to_num(-1))

    loss, optimizer = HeadLoss(target), make_optimizer(head, [("head", head.parameters(), 5e-3)], weight_decay=0.01)
    targets, expected = target_tensor(start.target), []
    head.train()
    for epoch in range(1, EPOCHS + 1):
        batches = plan_batches(shuffled(train, 0, epoch), BATCH)
        for number, batch in enumerate(batches):
            done = (epoch - 1) * len(batches) + number
            set_rates(optimizer, *one_cycle(done, EPOCHS * len(batches)))
            torch.manual_seed(draw_seed(0, epoch, number, 0))
            total, weight = loss.sums(head(rows[batch]), targets[batch])
            optimizer.zero_grad()
            (total / BATCH).backward()
            for parameter in head.parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(BATCH / weight)
            optimizer.step()
            expected.append(float((total / weight).detach()))
    assert losses.found == expected


def test_detach_without_epochs_is_refused(folder):
    with pytest.raises(InputError, match="--detach trains the head for --epochs, which is 0"):
        prepare(config(folder, epochs=0, freeze_epochs=1))
