"""Preprocessing, and random augmentation whose draws are the same in any order and any process.

The geometric draw belongs to a sample and is shared by all its views, so that they keep corresponding; the photometric
one is each view's own. Numbers come from a hash of (seed, epoch or replica, sample, purpose), so they never change with
a library's version.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch.nn.functional import pad

from featurecache.data.preprocessing import IMAGENET_MEAN, IMAGENET_STD, Preprocessing, resize, to_tensor
from featurecache.data.readers.base import Decoded
from featurecache.errors import InputError, did_you_mean

__all__ = ["IMAGENET_MEAN", "IMAGENET_STD", "Augmentation", "Draw", "Preprocessing", "resize", "to_tensor", "uniforms"]

AUGMENTATIONS = ("crop", "flip", "vflip", "rotate", "colour")
STRENGTHS = {"crop": "area", "rotate": "degrees", "colour": "strength"}  # the field that says how strong


def uniforms(count: int, *key: int | str) -> list[float]:
    """`count` (at most 8) numbers in [0, 1) that depend on `key` alone: BLAKE2b, 53 bits each."""
    digest = hashlib.blake2b("\0".join(str(part) for part in ("draw/1", *key)).encode(), digest_size=64).digest()
    return [(int.from_bytes(digest[8 * i : 8 * i + 8], "little") >> 11) / (1 << 53) for i in range(count)]


@dataclass(frozen=True)
class Draw:
    """What was drawn for one sample, in relative coordinates, so that it fits views of any size.

    Attributes:
        area: of the crop, relative to the region that it is taken from.
        ratio: the crop's width to height, relative to that region's.
        x, y: where the crop lies, from 0 (left, upper edge) to 1.
        flip, vflip: whether to mirror left to right, upside down.
        angle: rotation in degrees, counter-clockwise.
        key: seed, epoch and sample; the photometric draw of a view is made from it.
    """

    area: float
    ratio: float
    x: float
    y: float
    flip: bool
    vflip: bool
    angle: float
    key: tuple[int, int, int]


@dataclass(frozen=True)
class Augmentation:
    """Which random changes are made, and how strong they are.

    Attributes:
        names: any of `crop` (random resized crop), `flip`, `vflip`, `rotate`, `colour` (brightness, contrast,
            saturation).
        area: smallest and largest area of the crop.
        ratio: its smallest and largest relative aspect ratio.
        degrees: largest rotation to either side.
        strength: largest relative change of brightness, contrast and saturation.
    """

    names: tuple[str, ...] = ("crop", "flip")
    area: tuple[float, float] = (0.35, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    degrees: float = 10.0
    strength: float = 0.2

    def __post_init__(self) -> None:
        """Check the fields.

        Raises:
            InputError: an unknown name, or a range that can't be.
        """
        for field in ("names", "area", "ratio"):
            object.__setattr__(self, field, tuple(getattr(self, field)))
        for name in self.names:
            if name not in AUGMENTATIONS:
                raise InputError(
                    f"unknown augmentation {name!r}.{did_you_mean(name, AUGMENTATIONS)} "
                    f"Known: {', '.join(AUGMENTATIONS)}."
                )
        if not (0 < self.area[0] <= self.area[1] <= 1):
            raise InputError(f"augmentation: area={self.area}, but 0 < smallest <= largest <= 1 is needed")
        if not (0 < self.ratio[0] <= self.ratio[1]):
            raise InputError(f"augmentation: ratio={self.ratio}, but 0 < smallest <= largest is needed")
        if not (0 <= self.degrees <= 180 and 0 <= self.strength < 1):
            raise InputError(
                f"augmentation: degrees={self.degrees} must be 0 to 180, strength={self.strength} 0 to < 1"
            )

    @classmethod
    def of(cls, words: Iterable[str]) -> Augmentation:
        """From names, of which some may say how strong: `crop:0.7`, `rotate:5`, `colour:0.1`.

        Args:
            words: names as in `names`; after a colon the smallest area of a crop, the largest rotation in degrees, or
                the largest relative change of colours.

        Raises:
            InputError: an unknown name, something that has no strength, or one that can't be.
        """
        strengths: dict[str, Any] = {}
        names: dict[str, None] = {}
        for word in words:
            name, colon, text = word.partition(":")
            names[name] = None
            if not colon or name not in AUGMENTATIONS:  # an unknown name is refused below
                continue
            if name not in STRENGTHS:
                raise InputError(f"augmentation {word!r}: {name} has no strength. Write {name}.")
            try:
                value = float(text)
            except ValueError:
                raise InputError(f"augmentation {word!r}: {text!r} is no number. Write it like {name}:0.5.") from None
            strengths[STRENGTHS[name]] = (value, 1.0) if name == "crop" else value
        return cls(tuple(names), **strengths)

    def parameters(self) -> dict[str, Any]:
        """All fields, as JSON values; `from_parameters` reads them back."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_parameters(cls, values: Mapping[str, Any]) -> Augmentation:
        """Read `parameters()` back.

        Raises:
            InputError: an unknown field, or a value that is not accepted.
        """
        known = [field.name for field in fields(cls)]
        for name in values:
            if name not in known:
                raise InputError(f"augmentation: unknown field {name!r}.{did_you_mean(name, known)}")
        return cls(**values)

    def draw(self, seed: int, epoch: int, sample: int) -> Draw:
        """The geometric draw of a sample in an epoch (or replica). All draws are made whatever `names` holds."""
        area, ratio, x, y, flip, vflip, angle = uniforms(7, "geometry", seed, epoch, sample)
        low, high = math.log(self.ratio[0]), math.log(self.ratio[1])
        return Draw(
            area=self.area[0] + area * (self.area[1] - self.area[0]),
            ratio=math.exp(low + ratio * (high - low)),
            x=x,
            y=y,
            flip=flip < 0.5,
            vflip=vflip < 0.5,
            angle=(2 * angle - 1) * self.degrees,
            key=(seed, epoch, sample),
        )

    def apply(self, image: Decoded, preprocessing: Preprocessing, draw: Draw, view_index: int) -> torch.Tensor:
        """Augment one image and bring it to the size of the preprocessing.

        The crop is taken from the region that the preprocessing's `resize_mode` looks at: with `crop` a square as wide
        and high as the image's shorter side, anywhere in the image; with `squash` the whole image; with `pad` the
        padded square. Without `crop` in `names` the image is preprocessed as usual, then the other changes are made.

        The result depends on the preprocessing's `parameters()` alone. So where nothing is resized without
        augmentation, the crop is resized with the default interpolation.

        Args:
            image: (height, width, channels).
            preprocessing: gives size, interpolation and antialias, and the mean that fills the corners of a rotation.
            draw: of this sample.
            view_index: the view's number (or any other number that is its own); the photometric draw depends on it.

        Returns:
            (channels, height, width) of `preprocessing.size()`, uint8 for uint8, else float32, not normalised.

        Raises:
            InputError: the preprocessing leaves images at sizes of their own.
        """
        if preprocessing.size() == (1, 1):  # a text: its numbers are characters, which are never brighter
            return preprocessing.apply(image)
        if "crop" in self.names:
            tensor = self._crop(to_tensor(image), preprocessing, draw)
        else:
            tensor = preprocessing.apply(image)
        if "flip" in self.names and draw.flip:
            tensor = tensor.flip(-1)
        if "vflip" in self.names and draw.vflip:
            tensor = tensor.flip(-2)
        if "rotate" in self.names and draw.angle:
            from torchvision.transforms import InterpolationMode
            from torchvision.transforms.v2 import functional as tv  # loads torch's compiler: only who augments pays

            whole = tensor.dtype == torch.uint8
            fill = [round(value * 255) if whole else value for value in preprocessing.mean]
            tensor = tv.rotate(tensor, draw.angle, interpolation=InterpolationMode.BILINEAR, fill=fill)
        if "colour" in self.names:
            tensor = self._colour(tensor, uniforms(3, "colour", *draw.key, view_index))
        return tensor

    @staticmethod
    def _crop(tensor: torch.Tensor, preprocessing: Preprocessing, draw: Draw) -> torch.Tensor:
        preprocessing = Preprocessing.from_parameters(preprocessing.parameters())
        size = preprocessing.size()
        if size is None:
            raise InputError("augmentation 'crop' needs a fixed size: give --crop N or --resize-mode squash or pad")
        height, width = tensor.shape[1:]
        if preprocessing.resize_mode == "pad":
            side = max(height, width)
            left, top = (side - width) // 2, (side - height) // 2
            tensor = pad(tensor, (left, side - width - left, top, side - height - top))
            height = width = side
        region = (min(height, width),) * 2 if preprocessing.resize_mode == "crop" else (height, width)
        high = min(height, max(1, round(region[0] * math.sqrt(draw.area / draw.ratio))))
        wide = min(width, max(1, round(region[1] * math.sqrt(draw.area * draw.ratio))))
        top, left = round((height - high) * draw.y), round((width - wide) * draw.x)
        part = tensor[:, top : top + high, left : left + wide]
        return resize(part, size, preprocessing.interpolation, preprocessing.antialias)

    def _colour(self, tensor: torch.Tensor, numbers: Sequence[float]) -> torch.Tensor:
        """Brightness for any channels, contrast for 1 and 3, saturation for 3."""
        from torchvision.transforms.v2 import functional as tv

        factors = [1 + (2 * number - 1) * self.strength for number in numbers]
        if tensor.shape[0] not in (1, 3):
            bright = tensor.to(torch.float32) * factors[0]
            if tensor.dtype == torch.uint8:
                return bright.clamp(0, 255).to(torch.uint8)
            return bright
        tensor = tv.adjust_contrast(tv.adjust_brightness(tensor, factors[0]), factors[1])
        return tv.adjust_saturation(tensor, factors[2]) if tensor.shape[0] == 3 else tensor
