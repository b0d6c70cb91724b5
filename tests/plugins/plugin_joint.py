"""A tiny CNN with BatchNorm, and two-view samples for it: what the tests of joint training run on."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from PIL import Image
from torch import nn

SIDE = 32


class TinyBody(nn.Module):
    """Three convolutions, 12 features, and a layer that nothing runs."""

    preprocessing: ClassVar = {"resize": SIDE, "crop": SIDE, "mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 5, stride=2, padding=2, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(inplace=True),
            nn.Conv2d(8, 12, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(12),
            nn.ReLU(inplace=True),
            nn.Conv2d(12, 12, 3, padding=1),
            nn.ReLU(inplace=True),
        )
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.spare = nn.Linear(12, 5)
        for module in self.modules():  # statistics of a body that has seen data
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.uniform_(-0.1, 0.1)
                module.running_var.uniform_(0.2, 0.6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.flatten(self.pool(self.features(x)))


def tiny() -> nn.Module:
    """The same weights on every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        return TinyBody()


def stripes(rng: np.random.Generator, positive: bool) -> np.ndarray:
    """Rows or columns of two colours, in noise."""
    wave = (np.arange(SIDE) // 4 + rng.integers(2)) % 2
    plane = np.broadcast_to(wave[:, None] if positive else wave[None, :], (SIDE, SIDE))
    colour = rng.uniform(60, 200, size=3)
    return plane[..., None] * colour + rng.normal(40, 25, size=(SIDE, SIDE, 3))


def blob(rng: np.random.Generator, positive: bool) -> np.ndarray:
    """A disc or a ring, in noise."""
    y, x = np.mgrid[:SIDE, :SIDE]
    radius = np.hypot(y - rng.uniform(13, 19), x - rng.uniform(13, 19))
    plane = radius < 7 if positive else (radius < 12) & (radius > 9)
    return plane[..., None] * rng.uniform(80, 200, size=3) + rng.normal(40, 25, size=(SIDE, SIDE, 3))


def write_samples(folder: Path, n: int = 64, *, seed: int = 0, missing: float = 0.0, extra: int = 0) -> Path:
    """A manifest of `n` samples with the views `a` and `b` as PNG files.

    Columns: sample_id, a, b, label (no, yes), kind (three classes), size (a number), first, second, third (0, 1
    or empty).

    Args:
        folder: where to; made if need be.
        n: samples.
        seed: of all that is random.
        missing: share of the samples that lack view `b`.
        extra: images of view `a` beside the first, in a long manifest (columns sample_id, view, path, label).
    """
    rng = np.random.default_rng(seed)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rows, long = [], []
    for i in range(n):
        positive, third = bool(i % 2), i % 3
        label = "yes" if positive else "no"
        count = 1 + (extra if third == 0 else 0)
        images = {"a": [stripes(rng, positive) for _ in range(count)], "b": [blob(rng, third == 0)]}
        lacks = rng.uniform() < missing
        names = {}
        for view, arrays in images.items():
            for k, array in enumerate(arrays):
                name = f"images/{i:03d}-{view}{k}.png"
                Image.fromarray(array.clip(0, 255).astype(np.uint8)).save(folder / name)
                if view == "a" or not lacks:
                    names.setdefault(view, name)
                    long.append({"sample_id": f"s{i:03d}", "view": view, "path": name, "label": label})
        rows.append(
            {
                "sample_id": f"s{i:03d}", "a": names["a"], "b": names.get("b", ""), "label": label,
                "kind": ("p", "q", "r")[third], "size": f"{2.5 * positive + 10 + 0.1 * rng.normal():.4f}",
                "first": "" if i % 5 == 0 else int(positive), "second": "" if i % 7 == 0 else int(third == 0),
                "third": "",
            }
        )  # fmt: skip
    path = folder / "samples.csv"
    for target, table in ((path, rows), (folder / "long.csv", long)):
        with target.open("w", newline="", encoding="utf-8") as handle:
            writer = csv.DictWriter(handle, list(table[0]))
            writer.writeheader()
            writer.writerows(table)
    return path
