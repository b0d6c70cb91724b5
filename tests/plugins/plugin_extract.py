"""Small bodies with BatchNorm that the tests of stage one run: steady, slow, with another stride, and NaN for white."""

import time

import torch
from torch import nn


class Steady(nn.Module):
    """Two convolutions, 8 features, a classifier that is not run."""

    def __init__(self, stride=2, pause=0.0):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(6)
        self.act = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(6, 8, 3, stride=2, padding=1)
        self.fc = nn.Linear(8, 3)
        self.pause = pause
        self.preprocessing = {"resize": 32, "crop": 32, "mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}

    def forward(self, x):
        if self.pause:
            time.sleep(self.pause)
        x = self.act(self.bn1(self.conv1(x)))
        return self.fc(self.conv2(x).mean((2, 3)))


class NoWhite(Steady):
    """NaN for an image that is all white."""

    def forward(self, x):
        white = (x > 1.99).flatten(1).all(1)
        return super().forward(torch.where(white[:, None, None, None], float("nan"), x))


class ZeroOrNan(Steady):
    """NaN for an image that is all white, zeros for all others."""

    def forward(self, x):
        white = (x > 1.99).flatten(1).all(1)
        return torch.where(white[:, None], float("nan"), super().forward(x) * 0)


class Breaks(Steady):
    """Fails on batches of more than two: the trial passes do not show it."""

    def forward(self, x):
        if len(x) == 3:
            raise RuntimeError("three is a crowd")
        return super().forward(x)


def seeded(kind, **options):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        module = kind(**options)
        module.bn1.running_mean.uniform_(-0.2, 0.2)
        module.bn1.running_var.uniform_(0.5, 1.5)
    return module


def steady():
    return seeded(Steady)


def strided():
    return seeded(Steady, stride=1)


def slow():
    return seeded(Steady, pause=0.03)


def no_white():
    return seeded(NoWhite)


def zero_or_nan():
    return seeded(ZeroOrNan)


def breaks():
    return seeded(Breaks)


class Unsteady(Steady):
    """NaN for the first of four images: as the canary has them."""

    def forward(self, x):
        x = super().forward(x)
        first = (torch.arange(len(x)) == 0) & (len(x) == 4)
        return torch.where(first[:, None], float("nan"), x)


def unsteady():
    return seeded(Unsteady)
