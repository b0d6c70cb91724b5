"""Preprocessing equals torchvision's presets, knows its output size, and round-trips through a recipe."""

from __future__ import annotations

import itertools
import json
import struct

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.models import DenseNet121_Weights, ResNet18_Weights, SqueezeNet1_1_Weights
from torchvision.transforms import InterpolationMode, v2

from featurecache.data.preprocessing import stack
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
    values = json.loads(json.dumps(ours.parameters()))
    assert values == {
        "version": 1,
        "resize": 33,
        "crop": None,
        "resize_mode": "pad",
        "interpolation": "bicubic",
        "antialias": True,
        "mean": [0.5],
        "std": [2.0],
    }
    again = Preprocessing.from_parameters(values)
    assert again.parameters() == values
    assert (again.channels, again.size()) == (1, (33, 33))
    assert Preprocessing.from_parameters(Preprocessing().parameters()) == Preprocessing()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rezise": 3}, r"unknown field 'rezise'\. Did you mean 'resize'\?"),
        ({"version": 2}, "of version 2, but this is version 1"),
        ({"mean": 3}, "preprocessing: object of type 'int' has no len"),
        ({"resize": "256"}, "preprocessing: .*'str'"),
        ({"std": [1.0]}, "^preprocessing: std has 1 values for 3 channels"),
        ({"interpolation": None}, "interpolation=None, but with the other fields it is 'bilinear'"),
        ({"interpolation": "nearest"}, "antialias=True, but with the other fields it is None"),
        ({"resize_mode": "squash"}, "resize=256, but with the other fields it is 224"),
    ],
)
def test_parameters_that_were_not_written_here_are_refused(change, message):
    with pytest.raises(InputError, match=message):
        Preprocessing.from_parameters({**Preprocessing().parameters(), **change})
    with pytest.raises(InputError, match="preprocessing: no version, crop"):
        Preprocessing.from_parameters({"resize": 3} | dict.fromkeys(("resize_mode", "interpolation", "antialias")))


def every_preprocessing() -> list[Preprocessing]:
    choices = {
        "resize": (None, 24, 32),
        "crop": (None, 24, 32),
        "resize_mode": ("crop", "squash", "pad"),
        "interpolation": ("nearest", "bilinear", "bicubic"),
        "antialias": (True, False),
    }
    fields = [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]
    return [Preprocessing(**f) for f in fields if f["resize"] or f["crop"] or f["resize_mode"] == "crop"]


def test_pixels_are_equal_where_parameters_are_and_nowhere_else():
    images = [image(40, 61, seed=1), image(30, 28, seed=2), image(20, 50, dtype=np.uint16, seed=3)]
    pixels_of: dict[str, set[bytes]] = {}
    for ours in every_preprocessing():
        values = ours.parameters()
        again = Preprocessing.from_parameters(json.loads(json.dumps(values)))
        assert again.parameters() == values
        assert again.size() == ours.size()
        found = []
        for one in (ours, again):
            tensors = [one.apply(item) for item in images]
            found.append(b"".join(struct.pack("3i", *t.shape) + t.contiguous().numpy().tobytes() for t in tensors))
        assert found[0] == found[1]
        pixels_of.setdefault(json.dumps(values, sort_keys=True), set()).add(found[0])
    assert {len(found) for found in pixels_of.values()} == {1}
    assert len(set.union(*pixels_of.values())) == len(pixels_of)
    # crop: 6 with a resize at 5 interpolations, 3 without; squash and pad: 2 sides at 5 interpolations.
    assert len(pixels_of) == 6 * 5 + 3 + 2 * 2 * 5


def test_mean_and_std_are_told_apart_as_far_as_float32_goes():
    written = Preprocessing(mean=(0.1 + 0.2, float(np.float32(0.456)), -0.0), std=(0.229, 1 / 3, 1))
    assert written.parameters()["mean"] == [0.3, 0.456, 0.0]
    assert str(written.mean[2]) == "0.0"
    batch = image(8, 8, dtype=np.float32)
    wanted = (torch.from_numpy(batch.array) - torch.tensor([0.1 + 0.2, 0.456, 0])) / torch.tensor([0.229, 1 / 3, 1])
    plain = Preprocessing(resize=None, crop=None, mean=written.mean, std=written.std)
    assert torch.equal(plain.normalise(plain.apply(batch)), wanted.permute(2, 0, 1))
    with pytest.raises(InputError, match="must be finite and > 0"):
        Preprocessing(std=(1, 1, 1e-60))
    with pytest.raises(InputError, match="must be finite"):
        Preprocessing(mean=(1, 1, 1e60))


def test_images_of_several_types_make_one_batch_and_stay_what_they_were():
    ours = Preprocessing(resize=40, crop=32)
    every = torch.arange(256, dtype=torch.uint8).repeat(12).reshape(3, 32, 32)
    eight = [ours.apply(image(60, 50, seed=0)), every, ours.apply(image(33, 50, seed=1))]
    deep = [ours.apply(image(60, 50, dtype=dtype)) for dtype in (np.uint16, np.float32)]
    assert torch.equal(stack(eight), torch.stack(eight))
    assert stack(eight).dtype == torch.uint8
    assert torch.equal(stack(deep), torch.stack(deep))
    mixed = [eight[0], deep[0], *eight[1:], deep[1]]
    batch = stack(mixed)
    assert batch.dtype == torch.float32
    for both, tensor in zip(ours.normalise(batch), mixed, strict=True):
        assert torch.equal(both, ours.normalise(tensor))
        assert torch.equal(both, ours.normalise(stack([tensor]))[0])
    assert torch.equal(ours.normalise(stack(eight)), torch.stack([ours.normalise(tensor) for tensor in eight]))


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


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_normalise_is_bitwise_the_same_in_any_layout_and_leaves_its_input(dtype):
    pixels = torch.randint(0, 256, (3, 5, 7, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
    pixels = pixels if dtype == torch.uint8 else pixels / 255
    before, preprocessing = pixels.clone(), Preprocessing()
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (preprocessing.mean, preprocessing.std))
    expected = ((before / 255 if dtype == torch.uint8 else before) - mean) / std
    for batch in (pixels, pixels.contiguous()):
        assert torch.equal(preprocessing.normalise(batch), expected)
        planar = preprocessing.normalise(batch, torch.contiguous_format)
        assert planar.is_contiguous()
        assert torch.equal(planar, expected)
    assert torch.equal(pixels, before)


def test_a_batch_is_interleaved_in_memory():
    images = [torch.randint(0, 256, (3, 5, 7), dtype=torch.uint8) for _ in range(4)]
    batch = stack(images)
    assert torch.equal(batch, torch.stack(images))
    assert batch.is_contiguous(memory_format=torch.channels_last)
