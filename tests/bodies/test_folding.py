import copy
from collections import OrderedDict

import pytest
import torch
from torch import nn

from featurecache.bodies.folding import fold_batchnorm
from featurecache.bodies.registry import load_body
from featurecache.bodies.taps import Tapped, dummy, resolve_taps
from featurecache.config import Tap

NORM = nn.modules.batchnorm._BatchNorm


def randomise(module):
    generator = torch.Generator().manual_seed(0)
    for child in module.modules():
        if isinstance(child, NORM):
            for tensor, low, high in (
                (child.running_mean, -0.2, 0.2),
                (child.running_var, 0.5, 1.5),
                (child.weight.data, 0.7, 1.3),
                (child.bias.data, -0.2, 0.2),
            ):
                tensor.copy_(torch.rand(tensor.shape, generator=generator) * (high - low) + low)


def norms(module):
    return sum(isinstance(child, NORM) for child in module.modules())


@pytest.mark.parametrize(
    ("name", "left", "taps"),
    [
        ("torchvision/squeezenet1_1", 0, ["features.5"]),
        ("torchvision/resnet18", 0, ["layer1", "layer2.0.relu#1", "bn1"]),
        ("torchvision/densenet121", 62, ["features.denseblock2", "features.transition1"]),
        ("torchvision/mobilenet_v3_small", 0, ["features.4"]),
        ("torchvision/efficientnet_b0", 0, ["features.3"]),
        ("timm/resnet18", 0, ["layer3"]),
        ("timm/efficientnet_b0", 0, ["blocks.2", "bn1.act:avg"]),
    ],
)
def test_folding_keeps_features_and_names(name, left, taps):
    body = load_body(name, "none", seed=0)
    randomise(body.module)
    resolved = resolve_taps(body, [Tap(), *(Tap.parse(tap) for tap in taps)], (64, 64))
    tapped = Tapped(body, resolved)
    before = norms(body.module)
    folded = fold_batchnorm(body.module)
    assert norms(body.module) == before
    assert norms(folded) == left
    x = dummy(body, (64, 64), 2)
    with torch.no_grad():
        for tap, one, other in zip(resolved, tapped(x), tapped.with_module(folded)(x), strict=True):
            scale = one.abs().max().clamp(min=1)
            assert (one - other).abs().max() < 2e-5 * scale, tap.name


def test_tapped_modules_are_left_as_they_are():
    body = load_body("plugin_bodies:small")
    randomise(body.module)
    assert norms(fold_batchnorm(body.module)) == 0
    assert norms(fold_batchnorm(body.module, ["conv1"])) == 1
    assert norms(fold_batchnorm(body.module, ["bn1"])) == 1
    assert norms(fold_batchnorm(body.module, ["conv2", ""])) == 0


def test_a_tapped_block_that_ends_between_the_two():
    stem = nn.Sequential(OrderedDict(conv=nn.Conv2d(3, 4, 3)))
    module = nn.Sequential(OrderedDict(stem=stem, bn=nn.BatchNorm2d(4)))
    assert norms(fold_batchnorm(module)) == 0
    assert norms(fold_batchnorm(module, ["stem"])) == 1


def test_pairs_that_only_look_like_pairs():
    assert norms(fold_batchnorm(load_body("plugin_bodies:shared").module)) == 1
    twice = nn.Conv2d(3, 3, 1)
    assert norms(fold_batchnorm(nn.Sequential(twice, nn.BatchNorm2d(3), twice))) == 1
    assert norms(fold_batchnorm(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, track_running_stats=False)))) == 1
    hooked = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    hooked[0].register_forward_hook(lambda module, args, output: output * 2)
    assert norms(fold_batchnorm(hooked)) == 1


def test_a_body_that_can_not_be_traced_stays_as_it_is():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

        def forward(self, x):
            return self.bn(self.conv(x)) if x.sum() > 0 else x

    module = Branches()
    folded = fold_batchnorm(module)
    assert folded is not module
    assert norms(folded) == 1


def test_folding_copies():
    module = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    before = copy.deepcopy(module.state_dict())
    fold_batchnorm(module)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert module.training
