"""Preprocessing that a recipe can hold and that gives the same pixels on every machine: resize, crop, normalise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn.functional import interpolate, pad

from featurecache.data.readers.base import Decoded
from featurecache.errors import InputError, ReadError, did_you_mean

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
RESIZE_MODES = ("crop", "squash", "pad")
INTERPOLATIONS = ("nearest", "bilinear", "bicubic")
VERSION = 1  # of the pixel contract: raised whenever equal parameters would give other pixels (kernels, rounding)
MAX_RESIZED = 1 << 26  # pixels; a strip of 10,000 x 1 would otherwise become 2.6 million x 256


def to_tensor(image: Decoded) -> torch.Tensor:
    """(channels, height, width): uint8 as it is (a view, channels interleaved), else float32 with 1.0 as white."""
    array = image.array
    if array.dtype != np.uint8:
        array = array.astype(np.float32) / np.float32(image.limit)
    return torch.from_numpy(array).permute(2, 0, 1)


def resize(image: torch.Tensor, size: tuple[int, int], interpolation: str, antialias: bool) -> torch.Tensor:
    """Resize (channels, height, width) to `size` (height, width), in the type it has.

    This is what torchvision's v2 `resize` does on a CPU with AVX2, called directly so that every machine does the same.
    """
    channels, height, width = image.shape
    if (height, width) == size:
        return image
    batch = image[None]
    if channels > 1 and image.stride(0) == 1:
        # torchvision's way to make the output interleaved too, which saves a copy (pytorch issue 68430).
        batch = batch.as_strided(batch.shape, (image.numel(), *image.stride()))
    if interpolation == "nearest":
        return interpolate(batch, size=size, mode="nearest")[0]
    return interpolate(batch, size=size, mode=interpolation, align_corners=False, antialias=antialias)[0]


def stack(images: Sequence[torch.Tensor], *, pinned: bool = False) -> torch.Tensor:
    """One batch of what `Preprocessing.apply` (or an augmentation) gave for images of one view.

    Images of one type are stacked as they are, so that uint8 travels to the device in a quarter of the space. Where 8
    bit files stand beside 16 bit or float ones, uint8 becomes float32 by the same division that `normalise` does, so
    that each image ends up bitwise as it would in any other batch.

    Args:
        images: one or more of one shape, uint8 or float32, on the CPU.
        pinned: in memory that is locked for copies to a GPU.

    Returns:
        (n, channels, height, width), channels interleaved in memory as decoders give them: channels-last.
    """
    if len({image.dtype for image in images}) > 1:
        images = [_scaled(image) for image in images]
    channels, height, width = images[0].shape
    batch = torch.empty((len(images), height, width, channels), dtype=images[0].dtype, pin_memory=pinned)
    rows = batch.numpy()  # a plain copy: torch would wake its other threads for each image
    for row, image in zip(rows, images, strict=True):
        row[...] = image.permute(1, 2, 0).numpy()
    return batch.permute(0, 3, 1, 2)


def _scaled(tensor: torch.Tensor, layout: torch.memory_format = torch.preserve_format) -> torch.Tensor:
    """A new float32 tensor with 1.0 as white."""
    scaled = tensor.to(torch.float32, memory_format=layout, copy=True)
    # The divisor is a tensor: by a plain number CUDA multiplies with its reciprocal, which rounds unlike a CPU.
    return scaled.div_(torch.full((), 255.0, device=tensor.device)) if tensor.dtype == torch.uint8 else scaled


def _shortest(value: float) -> float:
    """The number of fewest digits that is the same in float32: all that `normalise` uses of it."""
    with np.errstate(over="ignore", under="ignore"):
        return float(str(np.float32(value))) + 0.0  # no negative zero


@dataclass(frozen=True)
class Preprocessing:
    """What is done to an image before a body sees it; `parameters()` is the recipe's form of it.

    For uint8 images the resize runs on uint8, as torchvision's v2 transforms do: separable, in fixed point, rounded to
    whole grey levels after each axis. It is within one grey level of Pillow's and of resizing in float. Images of 16
    bit and floats are resized in float32.

    - `crop`: the shorter side becomes `resize` (the longer one is rounded down), then the centre `crop` x `crop`; an
      image smaller than the crop gets a black border. This is torchvision's classification preset.
    - `squash`: both sides become `crop` (or `resize`, where there is no crop); the aspect ratio changes.
    - `pad`: the longer side becomes `crop` (or `resize`), and the rest is filled with black on both sides.

    Attributes:
        channels: 1, 3, 4 or any other count that reader and body agree on; as many as there are means.
        resize: pixels, or None for no resize.
        crop: pixels, or None for no crop.
        resize_mode: `crop`, `squash` or `pad`.
        interpolation: `nearest`, `bilinear` or `bicubic`.
        antialias: whether shrinking averages over all pixels that it covers.
        mean, std: one per channel, in units of the full range (1.0 = white); kept to the precision of float32.
    """

    channels: int = 3
    resize: int | None = 256
    crop: int | None = 224
    resize_mode: str = "crop"
    interpolation: str = "bilinear"
    antialias: bool = True
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    def __post_init__(self) -> None:
        """Check the fields against each other.

        Raises:
            InputError: says which field can't be, and what is accepted.
        """
        object.__setattr__(self, "mean", tuple(_shortest(value) for value in self.mean))
        object.__setattr__(self, "std", tuple(_shortest(value) for value in self.std))
        if self.channels < 1:
            raise InputError(f"preprocessing: channels={self.channels}, but at least 1 is needed")
        for name in ("mean", "std"):
            values = getattr(self, name)
            if len(values) != self.channels:
                raise InputError(f"preprocessing: {name} has {len(values)} values for {self.channels} channels")
            if not all(np.isfinite(values)) or (name == "std" and min(values) <= 0):
                raise InputError(
                    f"preprocessing: {name}={values} must be finite" + (" and > 0" if name == "std" else "")
                )
        for name in ("resize", "crop"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"preprocessing: {name}={value}, but at least 1 pixel is needed")
        for name, choices in (("resize_mode", RESIZE_MODES), ("interpolation", INTERPOLATIONS)):
            value = getattr(self, name)
            if value not in choices:
                raise InputError(
                    f"preprocessing: unknown {name} {value!r}.{did_you_mean(value, choices)} "
                    f"Known: {', '.join(choices)}."
                )
        if self.resize_mode != "crop" and self.crop is None and self.resize is None:
            raise InputError(f"preprocessing: resize_mode {self.resize_mode!r} needs a size, as crop or resize")

    def parameters(self) -> dict[str, Any]:
        """Part of the recipe: JSON values that are equal if and only if the pixels are.

        What has no effect is null: `crop` for `squash` and `pad` (their side is given as `resize`), `interpolation`
        where nothing is resized, `antialias` there and for `nearest`. The channels are left out: they are the reader's
        to choose, who has them among its own parameters, and there is one mean for each.
        """
        side = self.crop or self.resize
        resize, crop = (self.resize, self.crop) if self.resize_mode == "crop" else (side, None)
        interpolation = self.interpolation if resize is not None else None
        return {
            "version": VERSION,
            "resize": resize,
            "crop": crop,
            "resize_mode": self.resize_mode,
            "interpolation": interpolation,
            "antialias": self.antialias if interpolation in ("bilinear", "bicubic") else None,
            "mean": list(self.mean),
            "std": list(self.std),
        }

    @classmethod
    def from_parameters(cls, values: Mapping[str, Any]) -> Preprocessing:
        """Read `parameters()` back: to the same pixels and parameters. What is null there takes its default.

        Raises:
            InputError: another version, an unknown or missing field, a value that is not accepted, or not as
                `parameters()` would write it.
        """
        known = list(cls().parameters())
        for name in values:
            if name not in known:
                raise InputError(f"preprocessing: unknown field {name!r}.{did_you_mean(name, known)}")
        if missing := [name for name in known if name not in values]:
            raise InputError(f"preprocessing: no {', '.join(missing)}")
        if values["version"] != VERSION:
            raise InputError(
                f"preprocessing of version {values['version']}, but this is version {VERSION}. Use the featurecache "
                "of then, or compute anew."
            )
        given = {
            name: value
            for name, value in values.items()
            if name != "version" and not (name in ("interpolation", "antialias") and value is None)
        }
        try:
            made = cls(channels=len(values["mean"]), **given)
        except InputError:
            raise
        except (TypeError, ValueError) as error:
            raise InputError(f"preprocessing: {' '.join(str(error).split())}") from None
        for name, value in made.parameters().items():
            if value != values[name]:
                raise InputError(f"preprocessing: {name}={values[name]!r}, but with the other fields it is {value!r}")
        return made

    def size(self) -> tuple[int, int] | None:
        """(height, width) that every output has; None where images keep sizes of their own."""
        side = self.crop if self.resize_mode == "crop" else self.crop or self.resize
        return None if side is None else (side, side)

    def apply(self, image: Decoded) -> torch.Tensor:
        """Resize and crop one image; it is not normalised yet.

        Args:
            image: (height, width, channels) with the number of channels given here.

        Returns:
            (channels, height, width): uint8 for uint8, else float32 with 1.0 as white. Not necessarily contiguous;
            `stack` makes a batch.

        Raises:
            InputError: another number of channels.
            ReadError: so elongated that resizing would need more than 67 million pixels.
        """
        self.check_channels(image)
        tensor = self._resized(to_tensor(image))
        if self.interpolation == "bicubic" and image.array.dtype == np.uint16:
            tensor = tensor.clamp(0, 1)  # bicubic overshoots; on uint8 it saturates as well
        if self.resize_mode == "pad":
            return self._fit(tensor, self.crop or self.resize or 0)
        if self.resize_mode == "crop" and self.crop is not None:
            return self._fit(tensor, self.crop)
        return tensor

    def check_channels(self, image: Decoded) -> None:
        """Refuse an image with another number of channels.

        Raises:
            InputError: says both numbers.
        """
        if image.array.shape[2] != self.channels:
            raise InputError(
                f"the reader gave {image.array.shape[2]} channels, but the preprocessing is for {self.channels}. "
                "Give both the same --channels."
            )

    def _resized(self, tensor: torch.Tensor) -> torch.Tensor:
        height, width = tensor.shape[1:]
        if self.resize_mode == "crop":
            if self.resize is None:
                return tensor
            long = int(self.resize * max(height, width) / min(height, width))
            size = (self.resize, long) if height <= width else (long, self.resize)
        else:
            side = self.crop or self.resize or 0
            size = (side, side)
            if self.resize_mode == "pad":
                short = max(1, round(side * min(height, width) / max(height, width)))
                size = (side, short) if height >= width else (short, side)
        if size[0] * size[1] > MAX_RESIZED:
            raise ReadError(
                f"{width} x {height} pixels are too elongated: resized they would be {size[1]} x {size[0]}. "
                "Crop the image, or use --resize-mode squash or pad."
            )
        return resize(tensor, size, self.interpolation, self.antialias)

    @staticmethod
    def _fit(tensor: torch.Tensor, side: int) -> torch.Tensor:
        """The centre side x side, with a black border where the image is smaller (torchvision's center_crop)."""
        height, width = tensor.shape[1:]
        if height < side or width < side:
            left, top = max(0, side - width) // 2, max(0, side - height) // 2
            right, bottom = max(0, side - width + 1) // 2, max(0, side - height + 1) // 2
            tensor = pad(tensor, (left, right, top, bottom))
            height, width = tensor.shape[1:]
        top, left = round((height - side) / 2), round((width - side) / 2)
        return tensor[:, top : top + side, left : left + side]

    def normalise(self, batch: torch.Tensor, layout: torch.memory_format = torch.preserve_format) -> torch.Tensor:
        """(value - mean) / std in float32, where uint8 is divided by 255 first; on the batch's own device.

        Args:
            batch: (n, channels, height, width) or (channels, height, width), uint8 or float with 1.0 as white.
            layout: of the result in memory; the batch's own unless another is given.
        """
        scaled = _scaled(batch, layout)
        mean, std = (torch.tensor(values, dtype=torch.float32, device=batch.device) for values in (self.mean, self.std))
        # In place: fresh memory for each step takes longer than the arithmetic.
        if scaled.ndim == 4 and not scaled.is_contiguous() and scaled.is_contiguous(memory_format=torch.channels_last):
            width = scaled.shape[3]  # whole rows at once: three values at a time take three times as long
            scaled.permute(0, 2, 3, 1).flatten(2).sub_(mean.repeat(width)).div_(std.repeat(width))
        else:
            scaled.sub_(mean.view(-1, 1, 1)).div_(std.view(-1, 1, 1))
        return scaled
