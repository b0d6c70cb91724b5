import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from plugin_joint import tiny, write_samples
from safetensors.torch import load_file
from torch import nn

from featurecache.config import JointConfig
from featurecache.joint.finetune import finetune_joint
from featurecache.joint.parallel import Processes, launched
from featurecache.run import load_run


def process(rank, count):
    return Processes(SimpleNamespace(global_rank=rank, world_size=count))


@pytest.mark.parametrize(("n", "least", "sizes"), [(8, 2, [4, 4]), (5, 2, [3, 2]), (3, 2, [3, 0]), (1, 1, [1, 0])])
def test_a_batch_is_shared_out_and_no_share_is_too_small_for_batchnorm(n, least, sizes):
    batch = np.arange(10, 10 + n)
    shares = [process(rank, 2).share(batch, least) for rank in range(2)]
    assert [len(share) for share in shares] == sizes
    assert np.concatenate(shares).tolist() == batch.tolist()


def test_one_process_needs_no_exchange_and_unused_parameters_keep_no_gradient():
    alone = process(0, 1)
    layer, unused, frozen = nn.Linear(2, 1), nn.Linear(2, 1), nn.Linear(2, 1).requires_grad_(False)
    layer(torch.ones(1, 2)).sum().backward()
    parameters = [*layer.parameters(), *unused.parameters(), *frozen.parameters()]
    assert alone.sum_gradients(parameters, torch.tensor(3.0))
    assert layer.weight.grad.tolist() == [[3.0, 3.0]]
    assert unused.weight.grad is None
    assert not alone.sum_gradients(unused.parameters(), torch.tensor(3.0))
    assert alone.same("x") == "x"
    assert alone.gather([1]) == [1]


def test_what_torchrun_started_is_read_from_its_environment(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert launched() == (1, 1)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert launched() == (4, 2)


OPTIONS = {
    "views": {"a": "a", "b": "b"}, "body": "plugin_joint:tiny", "target": ("first", "second"), "task": "multilabel",
    "precision": "fp32", "device": "cpu", "workers": 1, "lr": 5e-3, "body_lr": 1e-3, "freeze_epochs": 1, "epochs": 2,
    "unfreeze": "gradual", "settings": {"hidden": [8], "dropout": 0.0, "batch_norm": False}, "bootstrap": 0,
    "view_dropout": 0.3, "augment": {"*": ["crop", "flip"], "b": ["flip", "colour"]}, "missing": "zero",
}  # fmt: skip


@pytest.mark.slow
def test_two_processes_train_to_the_weights_of_one_with_the_doubled_batch(tmp_path):
    """fp32, no dropout, BatchNorm of the bodies in eval mode: unknown labels, absent views and an odd last batch."""
    torch.set_num_threads(1)
    manifest = write_samples(tmp_path / "data", 61, missing=0.3, seed=2)
    options = {**OPTIONS, "manifest": manifest}
    one = finetune_joint(JointConfig.create({**options, "out": tmp_path / "one", "batch_size": 16}))
    settings = tmp_path / "joint.toml"
    settings.write_text(JointConfig.create({**options, "out": tmp_path / "two", "batch_size": 8}).to_toml())
    script = tmp_path / "train.py"
    script.write_text(
        "import sys\nfrom featurecache.config import JointConfig\n"
        "from featurecache.joint.finetune import finetune_joint\n"
        "run = finetune_joint(JointConfig.from_toml(sys.argv[1]))\nprint(run.path, run.record['best_epoch'])\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1] / "plugins"), "OMP_NUM_THREADS": "1"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launcher, str(script), str(settings)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(str(tmp_path / "two")) == 2  # both processes return the run
    two = load_run(tmp_path / "two")
    for name in ("head.safetensors", "bodies/a.safetensors", "bodies/b.safetensors"):
        alone, together = load_file(one.path / name), load_file(two.path / name)
        for key, tensor in alone.items():
            torch.testing.assert_close(together[key], tensor, atol=1e-5, rtol=0)
    moved = load_file(two.path / "bodies" / "a.safetensors")["features.0.weight"] - tiny().features[0].weight
    assert float(moved.detach().abs().max()) > 3e-4  # thirty times what the two may differ by
    np.testing.assert_allclose(two.history["valid_loss"], one.history["valid_loss"], atol=1e-5)
    np.testing.assert_allclose(two.history["train_loss"], one.history["train_loss"], atol=1e-5)
    assert not list(tmp_path.glob("two.tmp"))
