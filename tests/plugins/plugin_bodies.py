"""Networks that tests name as package.module:factory."""

from collections import OrderedDict

import torch
import torchvision
from plugin_bodies_helper import scaled
from torch import nn
from torch.nn import functional as F


class Small(nn.Module):
    """Two convolutions, one activation that runs twice, a normalised map, a linear classifier."""

    def __init__(self, stride=1, act=None):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.act = act or nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(4, 6, 3, padding=1)
        self.pool = nn.AvgPool2d(2)
        self.never = nn.Linear(6, 6)
        self.fc = nn.Linear(6, 2)
        self.preprocessing = {"resize": 40, "crop": 32, "mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}
        self.categories = ["a", "b"]
        self.factor = 1.0
        self._offset = 0.0

    def forward(self, x):
        x = self.act(self.bn1(self.conv1(x)))
        x = self.act(self.conv2(x))
        x = scaled(self.pool(x), self.factor) + self._offset
        return self.fc(x.mean((2, 3)))


class Several(nn.Module):
    """Gives a dict; its modules give tuples, integers, tokens and things that are no batch."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, stride=4)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm = nn.LayerNorm(8)
        self.windows = Windows()
        self.best = Best()

    def forward(self, x):
        x = self.stem(x).flatten(2).transpose(1, 2)
        x, _ = self.attention(x, x, x)
        x = self.norm(x)
        return {"tokens": x, "windows": self.windows(x), "best": self.best(x)}


class Windows(nn.Module):
    def forward(self, x):
        return x.reshape(-1, 4, x.shape[-1])


class Best(nn.Module):
    def forward(self, x):
        return x.argmax(-1)


class Maps(nn.Module):
    """No classifier: the output is a map."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3, stride=2, padding=1)

    def forward(self, x):
        return self.conv(x)


class Fragile(nn.Module):
    """Its classifier fits 32 x 32 images only."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 3, padding=1)
        self.fc = nn.Linear(2 * 32 * 32, 3)

    def forward(self, x):
        return self.fc(torch.flatten(self.conv(x), 1))


class Tied(nn.Module):
    """Uses its last module's weight before it runs it."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        x = self.conv(x) * self.fc.weight.sum()
        x = F.relu(x).mean((2, 3))
        return self.fc(x)


class Shared(nn.Module):
    """A convolution whose output goes to the norm and around it, so they must not be folded."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.bn = nn.BatchNorm2d(4)

    def forward(self, x):
        x = self.conv(x)
        return (self.bn(x) + x).mean((2, 3))


class Deceptive(nn.Module):
    """Takes another path when torch.fx traces it than on tensors."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.bn = nn.BatchNorm2d(4)

    def forward(self, x):
        y = self.conv(x)
        z = self.bn(y)
        return ((z + y) if isinstance(x, torch.Tensor) else z).mean((2, 3))


def small():
    return Small()


def small_without_preprocessing():
    module = Small()
    module.preprocessing = None
    return module


def misspelt():
    module = Small()
    module.preprocessing = {"crops": 32}
    return module


def several():
    return Several()


def maps():
    return Maps()


def fragile():
    return Fragile()


def tied():
    return Tied()


def shared():
    return Shared()


def deceptive():
    return Deceptive()


def grey():
    module = nn.Sequential(OrderedDict(conv=nn.Conv2d(1, 4, 3), pool=nn.AdaptiveAvgPool2d(1), flat=nn.Flatten()))
    module.preprocessing = {"channels": 1, "resize": 32, "crop": 32}
    return module


def torchvision_resnet():
    return torchvision.models.resnet18(weights=None, num_classes=5)


def no_module():
    return [1, 2]


def broken():
    raise KeyError("weights.bin")


NOT_CALLABLE = 3
