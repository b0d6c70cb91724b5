"""Augmentation: draws that depend on names alone, geometry that views share, colours that each view has of its own."""

from __future__ import annotations

import json
import pickle
import re

import numpy as np
import pytest
import torch

from featurecache.data.readers.base import Decoded
from featurecache.data.transforms import AUGMENTATIONS, Augmentation, Draw, Preprocessing, uniforms
from featurecache.errors import InputError

SMALL = Preprocessing(resize=40, crop=32)


def coordinates(height: int, width: int) -> Decoded:
    """Red is x, green is y, both relative, so that an output shows where it was taken from."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    return Decoded(np.dstack([x / (width - 1), y / (height - 1), np.zeros_like(x)]).astype(np.float32), 1.0)


def test_draws_are_pinned_and_so_the_same_in_every_process():
    # A change here changes every cached replica: raise the version within `uniforms` instead.
    torch.manual_seed(1)
    wanted = Draw(
        area=0.4371715570207856,
        ratio=0.8207310196341331,
        x=0.7543309472032212,
        y=0.1352271044360619,
        flip=True,
        vflip=False,
        angle=-4.0298275052101,
        key=(3, 1, 41),
    )
    assert Augmentation().draw(3, 1, 41) == wanted
    assert pickle.loads(pickle.dumps(Augmentation())).draw(3, 1, 41) == pickle.loads(pickle.dumps(wanted))
    assert uniforms(3, "colour", 3, 1, 41, 0) == [0.5962706666876075, 0.20121212965734625, 0.2838180628129714]


def test_draws_differ_by_seed_epoch_and_sample():
    augment = Augmentation()
    draws = {augment.draw(seed, epoch, sample) for seed in range(3) for epoch in range(3) for sample in range(3)}
    assert len(draws) == 27
    many = np.array([uniforms(8, "test", number) for number in range(2000)])
    assert ((many >= 0) & (many < 1)).all()
    assert np.abs(many.mean(axis=0) - 0.5).max() < 0.03
    assert np.abs(np.corrcoef(many.T) - np.eye(8)).max() < 0.1


@pytest.mark.parametrize("mode", ["crop", "squash", "pad"])
def test_views_share_the_geometry(mode):
    augment = Augmentation(names=("crop", "flip", "vflip"))
    prepare = Preprocessing(resize=40, crop=32, resize_mode=mode)
    for sample in range(20):
        draw = augment.draw(0, 0, sample)
        one = augment.apply(coordinates(60, 80), prepare, draw, 0)
        other = augment.apply(coordinates(120, 160), prepare, draw, 1)
        assert one.shape == (3, 32, 32)
        # The same region in relative coordinates, at any size; up to the rounding to whole pixels, and with `pad` to
        # where the picture's edge falls between them.
        difference = (one[:2] - other[:2]).abs()
        assert difference.mean() < 0.02
        assert mode == "pad" or difference.max() < 0.05


def test_crop_is_where_and_as_large_as_drawn():
    augment = Augmentation(names=("crop",), area=(0.25, 0.25), ratio=(1.0, 1.0))
    draw = augment.draw(0, 0, 7)
    out = augment.apply(coordinates(201, 201), Preprocessing(resize=50, crop=50), draw, 0)
    assert out[0, 0, 0] == pytest.approx(draw.x * 0.5, abs=0.02)
    assert out[1, 0, 0] == pytest.approx(draw.y * 0.5, abs=0.02)
    assert out[0, 0, -1] - out[0, 0, 0] == pytest.approx(0.5, abs=0.03)


def test_flip_and_rotation():
    image = coordinates(32, 32)
    plain = SMALL.apply(image)
    augment = Augmentation(names=("flip", "vflip"))
    for sample in range(8):
        draw = augment.draw(0, 0, sample)
        wanted = plain.flip(-1) if draw.flip else plain
        wanted = wanted.flip(-2) if draw.vflip else wanted
        assert torch.equal(augment.apply(image, SMALL, draw, 0), wanted)
    turned = Augmentation(names=("rotate",), degrees=10)
    draw = turned.draw(0, 0, 1)
    assert 0 < abs(draw.angle) <= 10
    assert not torch.equal(turned.apply(image, SMALL, draw, 0), plain)
    assert torch.equal(Augmentation(names=()).apply(image, SMALL, draw, 0), plain)


def test_colours_are_each_views_own():
    rng = np.random.default_rng(0)
    augment = Augmentation(names=("colour",))
    draw = augment.draw(0, 0, 0)
    for channels in (1, 3, 4):
        image = Decoded(rng.integers(0, 256, (40, 40, channels), dtype=np.uint8), 255.0)
        prepare = Preprocessing(channels=channels, resize=40, crop=32, mean=(0.5,) * channels, std=(0.5,) * channels)
        one, same, other = (augment.apply(image, prepare, draw, view) for view in (0, 0, 1))
        assert one.dtype == torch.uint8
        assert torch.equal(one, same)
        assert not torch.equal(one, other)


def test_types_and_sizes_are_those_of_the_preprocessing():
    everything = Augmentation(names=AUGMENTATIONS)
    rng = np.random.default_rng(0)
    for dtype, limit in ((np.uint8, 255.0), (np.uint16, 65535.0)):
        image = Decoded(rng.integers(0, int(limit), (50, 37, 3)).astype(dtype), limit)
        got = everything.apply(image, SMALL, everything.draw(1, 2, 3), 0)
        plain = SMALL.apply(image)
        assert (got.shape, got.dtype) == (plain.shape, plain.dtype)
    with pytest.raises(InputError, match="augmentation 'crop' needs a fixed size"):
        everything.apply(image, Preprocessing(resize=30, crop=None), everything.draw(1, 2, 3), 0)


def test_a_name_may_say_how_strong():
    assert Augmentation.of(["crop", "flip"]) == Augmentation()
    found = Augmentation.of(["crop:0.7", "rotate:5", "flip", "colour:0.1"])
    assert found == Augmentation(("crop", "rotate", "flip", "colour"), area=(0.7, 1.0), degrees=5.0, strength=0.1)
    assert min(found.draw(0, 0, sample).area for sample in range(200)) >= 0.7
    assert max(abs(found.draw(0, 0, sample).angle) for sample in range(200)) <= 5


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("flip:0.5", "'flip:0.5': flip has no strength. Write flip"),
        ("crop:half", "'half' is no number. Write it like crop:0.5"),
        ("crop:", "'' is no number"),
        ("crop:1.5", "0 < smallest <= largest <= 1"),
        ("rotate:nan", "must be 0 to 180"),
        ("crp:0.5", "unknown augmentation 'crp'. Did you mean 'crop'"),
    ],
)
def test_a_strength_that_can_not_be_is_refused(word, said):
    with pytest.raises(InputError, match=re.escape(said)):
        Augmentation.of(["flip", word])


def test_the_result_depends_on_the_parameters_of_the_preprocessing_alone():
    image = coordinates(60, 80)
    augment = Augmentation(names=("crop",))
    for fields in ({"resize_mode": "pad", "interpolation": "nearest"}, {"resize": None, "interpolation": "bicubic"}):
        prepare = Preprocessing(**{"resize": 40, "crop": 32} | fields)
        again = Preprocessing.from_parameters(prepare.parameters())
        assert again != prepare
        draw = augment.draw(0, 0, 3)
        assert torch.equal(augment.apply(image, prepare, draw, 0), augment.apply(image, again, draw, 0))


def test_round_trip_and_errors():
    augment = Augmentation(names=("crop", "colour"), strength=0.3)
    assert Augmentation.from_parameters(json.loads(json.dumps(augment.parameters()))) == augment
    with pytest.raises(InputError, match=r"unknown augmentation 'colur'\. Did you mean 'colour'\?"):
        Augmentation(names=("colur",))
    with pytest.raises(InputError, match="unknown field 'size'"):
        Augmentation.from_parameters({"size": 1})
    for fields, message in (
        ({"area": (0.5, 0.2)}, "area="),
        ({"ratio": (0, 1)}, "ratio="),
        ({"degrees": 200}, "degrees=200"),
    ):
        with pytest.raises(InputError, match=message):
            Augmentation(**fields)
