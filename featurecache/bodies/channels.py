"""Other numbers of input channels: adapts the first convolution of a body."""

from __future__ import annotations

import torch
from torch import nn

from featurecache.errors import InputError


def first_convolution(module: nn.Module) -> tuple[str, nn.modules.conv._ConvNd]:
    """Dotted name and module of the convolution that sees the image.

    Raises:
        InputError: the body has no convolution.
    """
    for name, child in module.named_modules():
        if isinstance(child, nn.modules.conv._ConvNd) and not child.transposed:
            return name, child
    raise InputError(f"{type(module).__name__} has no convolution, so its number of input channels can't be adapted")


def adapt_channels(module: nn.Module, channels: int) -> None:
    """Make a body take `channels` input channels, in place.

    One channel: the kernel is summed over the inputs, so a grey image gives what its RGB copy gave. More: the kernel is
    repeated cyclically and rescaled by old/new, so that activations keep their size (as timm's `adapt_input_conv`).

    Args:
        module: the body; its first convolution is changed, or left alone where the number is right already.
        channels: how many channels the images have.

    Raises:
        InputError: there is no convolution, it is grouped, or the number is not positive.
    """
    if channels < 1:
        raise InputError(f"channels={channels}: a body needs at least one input channel")
    name, conv = first_convolution(module)
    held = conv.in_channels
    if held == channels:
        return
    if conv.groups != 1:
        raise InputError(
            f"the first convolution {name!r} is grouped (groups={conv.groups}), so {held} input channels "
            f"can't be turned into {channels}"
        )
    weight = conv.weight.detach()
    if channels == 1:
        adapted = weight.sum(dim=1, keepdim=True)
    else:
        index = torch.arange(channels) % held
        adapted = weight[:, index] * (held / channels)
    conv.weight = nn.Parameter(adapted.contiguous(), requires_grad=conv.weight.requires_grad)
    conv.in_channels = channels


def adapt_statistics(values: tuple[float, ...], channels: int) -> tuple[float, ...]:
    """Per-channel means or standard deviations for another number of channels: averaged for one, else repeated."""
    if len(values) == channels:
        return values
    if channels == 1:
        return (sum(values) / len(values),)
    return tuple(values[i % len(values)] for i in range(channels))
