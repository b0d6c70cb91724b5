"""Preprocessing equals torchvision's presets, knows its output size, and round-trips through a recipe."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.models import DenseNet121_Weights, ResNet18_Weights, SqueezeNet1_1_Weights
from torchvision.transforms import InterpolationMode, v2

from featurecache.data.readers.base import Decoded
from featurecache.data.transforms import Preprocessing
from featurecache.errors import InputError, ReadError

GREY_LEVEL = 1 / 255 / 0.224  # one level of 8 bit, after division by the smallest std


def image(height: int, width: int, channels: int = 3, dtype: type = np.uint8, seed: int = 0) -> Decoded:
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (9, 7), dtype=np.uint8)).resize(
        (width, height), Image.Resampling.BICUBIC
    )
    smooth = np.asarray(small)[:, :, None] + rng.integers(-20, 21, (height, width, channels))
    array = np.clip(smooth, 0, 255)
    if dtype == np.uint16:
        return Decoded(np.ascontiguousarray(array * 257, dtype=np.uint16), 65535.0)
    if dtype == np.float32:
        return Decoded(np.ascontiguousarray(array / 255, dtype=np.float32), 1.0)
    return Decoded(np.ascontiguousarray(array, dtype=np.uint8), 255.0)


def preset(weights) -> Preprocessing:
    found = weights.transforms()
    return Preprocessing(
        resize=found.resize_size[0],
        crop=found.crop_size[0],
        interpolation=found.interpolation.value,
        antialias=found.antialias,
        mean=tuple(found.mean),
        std=tuple(found.std),
    )


SIZES = [(375, 500), (500, 375), (256, 256), (224, 300), (100, 90), (257, 999)]


@pytest.mark.parametrize("size", SIZES[:3])
@pytest.mark.parametrize(
    "weights",
    [ResNet18_Weights.IMAGENET1K_V1, DenseNet121_Weights.IMAGENET1K_V1, SqueezeNet1_1_Weights.IMAGENET1K_V1],
    ids=["resnet18", "densenet121", "squeezenet1_1"],
)
def test_equals_the_preset_of_the_weights(weights, size):
    ours = preset(weights)
    decoded = image(*size)
    got = ours.normalise(ours.apply(decoded))
    tensor = torch.from_numpy(decoded.array).permute(2, 0, 1)
    # The preset resizes in float and rounds once; on uint8 (v2) each axis is rounded: one grey level at most.
    theirs = weights.transforms()(tensor)
    assert got.shape == theirs.shape == (3, 224, 224)
    assert (got - theirs).abs().max() <= GREY_LEVEL + 1e-6
    assert (got - theirs).mean().abs() < 1e-3
    from_pillow = weights.transforms()(Image.fromarray(decoded.array))
    assert (got - from_pillow).abs().max() <= GREY_LEVEL + 1e-6


@pytest.mark.skipif("AVX" not in torch.backends.cpu.get_cpu_capability(), reason="v2 resizes in float there")
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "nearest"])
@pytest.mark.parametrize("antialias", [True, False])
def test_equals_torchvision_v2_exactly(size, interpolation, antialias):
    ours = Preprocessing(interpolation=interpolation, antialias=antialias)
    theirs = v2.Compose(
        [
            v2.Resize(256, interpolation=InterpolationMode(interpolation), antialias=antialias),
            v2.CenterCrop(224),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(ours.mean, ours.std),
        ]
    )
    decoded = image(*size)
    tensor = torch.from_numpy(decoded.array).permute(2, 0, 1)
    assert (ours.normalise(ours.apply(decoded)) - theirs(tensor)).abs().max() <= 1e-6


def test_memory_layout_does_not_change_pixels():
    decoded = image(150, 170, 4)
    four = Preprocessing(channels=4, mean=(0.5,) * 4, std=(0.5,) * 4)
    each = Preprocessing(channels=1, mean=(0.5,), std=(0.5,))
    planes = [each.apply(Decoded(np.ascontiguousarray(decoded.array[:, :, i : i + 1]), 255.0)) for i in range(4)]
    assert torch.equal(four.apply(decoded), torch.cat(planes))


@pytest.mark.parametrize("dtype", [np.uint16, np.float32])
def test_other_types_are_resized_in_float_without_losing_bits(dtype):
    plain = Preprocessing(resize=40, crop=32)
    got = plain.apply(image(60, 50, dtype=dtype))
    assert got.dtype == torch.float32
    assert (got * 255 - plain.apply(image(60, 50))).abs().max() <= 1.01
    assert (plain.normalise(got) - plain.normalise(plain.apply(image(60, 50)))).abs().max() <= 1.02 * GREY_LEVEL
    deep = Decoded(np.array([[[0], [1], [256], [65535]]], dtype=np.uint16), 65535.0)
    keep = Preprocessing(channels=1, resize=None, crop=None, mean=(0.0,), std=(1.0,)).apply(deep)
    assert torch.allclose(keep * 65535, torch.tensor([[[0.0, 1.0, 256.0, 65535.0]]]))


def test_modes_and_sizes():
    wide = image(50, 100)
    assert Preprocessing().size() == (224, 224)
    for mode in ("squash", "pad"):
        assert Preprocessing(resize=None, crop=64, resize_mode=mode).apply(wide).shape == (3, 64, 64)
        assert Preprocessing(resize=64, crop=None, resize_mode=mode).size() == (64, 64)
    padded = Preprocessing(resize=None, crop=64, resize_mode="pad").apply(wide)
    assert (padded[:, :16] == 0).all()
    assert (padded[:, 48:] == 0).all()
    assert (padded[:, 17:47].float().mean() > 0).all()
    free = Preprocessing(resize=25, crop=None)
    assert free.size() is None
    assert free.apply(wide).shape == (3, 25, 50)
    assert Preprocessing(resize=None, crop=None).apply(wide).shape == (3, 50, 100)
    small = Preprocessing(resize=None, crop=70).apply(wide)
    assert small.shape == (3, 70, 70)
    assert (small[:, :10] == 0).all()


def test_bicubic_of_sixteen_bit_stays_in_range():
    edge = np.zeros((8, 8, 1), np.uint16)
    edge[:, 4:] = 65535
    got = Preprocessing(channels=1, resize=32, crop=32, interpolation="bicubic", mean=(0.0,), std=(1.0,)).apply(
        Decoded(edge, 65535.0)
    )
    assert got.min() >= 0
    assert got.max() <= 1


def test_round_trip_through_json():
    ours = Preprocessing(
        channels=1, resize=None, crop=33, resize_mode="pad", interpolation="bicubic", mean=(0.5,), std=(2,)
    )
    assert Preprocessing.from_parameters(json.loads(json.dumps(ours.parameters()))) == ours
    with pytest.raises(InputError, match=r"unknown field 'rezise'\. Did you mean 'resize'\?"):
        Preprocessing.from_parameters({"rezise": 3})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"channels": 1}, "mean has 3 values for 1 channels"),
        ({"std": (1, 1, 0)}, "must be finite and > 0"),
        ({"mean": (1, 1, float("nan"))}, "must be finite"),
        ({"resize": 0}, "resize=0, but at least 1 pixel"),
        ({"channels": 0, "mean": (), "std": ()}, "channels=0"),
        ({"resize_mode": "squish"}, r"unknown resize_mode 'squish'\. Did you mean 'squash'\?"),
        ({"interpolation": "bilnear"}, r"unknown interpolation 'bilnear'\. Did you mean 'bilinear'\?"),
        ({"resize_mode": "pad", "resize": None, "crop": None}, "resize_mode 'pad' needs a size"),
    ],
)
def test_what_can_not_be_is_refused(fields, message):
    with pytest.raises(InputError, match=message):
        Preprocessing(**fields)


def test_images_that_do_not_fit():
    with pytest.raises(InputError, match="the reader gave 1 channels, but the preprocessing is for 3"):
        Preprocessing().apply(image(30, 30, 1))
    strip = Decoded(np.zeros((1, 400_000, 3), np.uint8), 255.0)
    with pytest.raises(ReadError, match="400000 x 1 pixels are too elongated: resized they would be 102400000 x 256"):
        Preprocessing().apply(strip)
    assert Preprocessing(resize_mode="squash").apply(strip).shape == (3, 224, 224)
