"""What training above a module costs an epoch from cached activations, and with the frozen part below run every time.

    python benchmarks/prefix.py --model densenet121 --precision fp32

Prints one JSON object; per module, where training starts above it: `cached` and `live`, the medians of the seconds of
an epoch, and `ratio`, live over cached. Live is the frozen part under no_grad on images that lie in memory, decoded
and normalised, so that nothing but the forward pass is compared with reading; `decode` is what it would take besides.
Both then take the very same steps: forward, backward and AdamW on all that lies above. The store is written by stage
one, and read as `finetune-joint --train-from` reads it; its files are in the page cache.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as the command line sets it, before torch is loaded

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from featurecache.bodies.tapped import Tapped
from featurecache.config import JointConfig
from featurecache.heads.fc import FCSettings
from featurecache.joint.build import make_groups, make_head, make_model
from featurecache.joint.images import SampleImages, plan_batches
from featurecache.joint.prefix import StoredMaps, cache_lower_part
from featurecache.joint.schedule import make_optimizer
from featurecache.joint.start import Start, prepare
from featurecache.progress import Silent

CUTS = {
    "densenet121": ("features.transition1", "features.transition2", "features.transition3"),
    "resnet18": ("layer1", "layer2", "layer3"),
    "squeezenet1_1": ("features.4", "features.7", "features.10"),
}


def write_pictures(folder: Path, n: int) -> Path:
    """A manifest of n JPEG files of 256 x 256 pixels, in two classes."""
    rng = np.random.default_rng(0)
    lines = ["sample_id,image,label"]
    for i in range(n):
        coarse = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((256, 256), Image.Resampling.BICUBIC).save(folder / f"{i}.jpg", quality=90)
        lines.append(f"s{i},{i}.jpg,{'ab'[i % 2]}")
    (folder / "pictures.csv").write_text("\n".join(lines) + "\n")
    return folder / "pictures.csv"


class Steps:
    """Optimiser steps on the part of a body above a cut, with a head on it."""

    def __init__(self, start: Start, precision: str) -> None:
        head = make_head(None, start.blocks, start.target, FCSettings(), missing=False, view_dropout=0.0, seed=0)
        self.model = make_model(start.setups, start.blocks, head, multi="error", uppers=start.uppers).train()
        groups = make_groups(self.model, start.setups, lr=1e-3, body_lr=1e-4)
        parts = [*groups.bodies, *groups.head]
        for _, parameters, _ in parts:
            for parameter in parameters:
                parameter.requires_grad_(True)
        self.optimizer = make_optimizer(self.model, parts, weight_decay=0.01)
        self.low: Any = torch.autocast("cpu", torch.bfloat16) if precision == "bf16" else nullcontext()
        self.labels = torch.from_numpy(start.target.values)

    def epoch(self, batches: Iterable[tuple[Tensor, Any]]) -> None:
        """A step for each (activations, samples)."""
        for activations, samples in batches:
            present = torch.ones(len(samples), 1, dtype=torch.bool)
            with self.low:
                outputs = self.model({"image": activations.float()}, present)
            self.optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(torch.nn.functional.cross_entropy(outputs, self.labels[samples]))
            self.optimizer.step()


def median(work: Callable[[], None], rounds: int) -> float:
    """Median seconds, after one time to warm up."""
    times = []
    for _ in range(rounds + 1):
        begun = time.perf_counter()
        work()
        times.append(time.perf_counter() - begun)
    return statistics.median(times[1:])


def measure(config: JointConfig, precision: str, rounds: int, batch_size: int) -> dict[str, Any]:
    """One cut."""
    start = prepare(config)
    cache_lower_part(start, Silent())
    maps, images = StoredMaps(start), SampleImages(start.manifest, start.setups)
    setup, upper = start.setups["image"], start.uppers["image"]
    plan = plan_batches(np.random.default_rng(0).permutation(len(images)).astype(np.int64), batch_size)
    steps, lower = Steps(start, precision), Tapped(setup.body, [upper.cut])
    lower.module.to(memory_format=torch.channels_last)
    begun = time.perf_counter()
    ready = [
        (setup.preprocessing.normalise(batch.images["image"], torch.channels_last), batch.samples)
        for batch in images.batches(plan, workers=os.cpu_count() or 1)
    ]
    decode = time.perf_counter() - begun

    def below() -> Iterable[tuple[Tensor, Any]]:
        for x, samples in ready:
            with torch.no_grad(), steps.low:
                activations = lower(x)[0]
            yield activations, samples

    live = median(lambda: steps.epoch(below()), rounds)
    cached = median(lambda: steps.epoch((batch.images["image"], batch.samples) for batch in maps.batches(plan)), rounds)
    return {
        "live": round(live, 3),
        "cached": round(cached, 3),
        "ratio": round(live / cached, 2),
        "decode": round(decode, 3),
        "parameters": sum(p.numel() for p in upper.parameters()),
        "kilobytes_an_image": round(maps.batch(plan[0]).images["image"][0].nbytes / 1e3, 1),
    }


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="densenet121", choices=tuple(CUTS))
    parser.add_argument("--from", dest="cuts", action="append", help="module; default one after each stage")
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--store-dtype", default="float16", choices=("float16", "float32"))
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        manifest = write_pictures(Path(folder), options.images)
        for cut in options.cuts or CUTS[options.model]:
            config = JointConfig.create(
                {
                    "manifest": manifest, "views": {"image": "image"}, "target": ("label",), "weights": "none",
                    "body": f"torchvision/{options.model}", "image_size": options.size, "train_from": cut,
                    "store": Path(folder) / "store", "store_dtype": options.store_dtype, "engine": "torch",
                    "precision": options.precision, "device": "cpu", "augment": (), "view_dropout": 0.0,
                }
            )  # fmt: skip
            found[cut] = measure(config, options.precision, options.rounds, options.batch_size)
            print(cut, found[cut], file=sys.stderr)
    print(json.dumps({"threads": torch.get_num_threads(), **vars(options), "cuts": found}))


if __name__ == "__main__":
    main()
