"""How a tapped activation becomes features: poolings over maps and token sequences, and what their shapes mean."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from featurecache.errors import InputError

VECTOR, MAP, TOKENS = "vector", "map", "tokens"
GEM = {"p": 3.0, "eps": 1e-6}  # Radenovic et al. 2018, "Fine-tuning CNN image retrieval": generalised mean, p = 3
ACCEPTED = {
    VECTOR: ("none", "flatten"),
    MAP: ("none", "avg", "max", "avgmax", "gem", "rows", "flatten"),
    TOKENS: ("none", "cls", "tokens-avg", "flatten"),
}
AUTO = {VECTOR: "none", MAP: "avg", TOKENS: "tokens-avg"}
KINDS = {2: VECTOR, 3: TOKENS, 4: MAP}


@dataclass(frozen=True)
class Pooling:
    """A pooling with all that it depends on.

    `parameters` holds p and eps of `gem`; `layout: "NHWC"` where the body keeps its channels last (the features are
    channels first all the same); `prefix`, the number of class and register tokens in front of the image's own.
    """

    name: str
    parameters: dict[str, Any] = field(default_factory=dict)

    def __call__(self, x: Tensor) -> Tensor:
        """(n, ...) in any float dtype to (n, *shape) float32, never sharing memory with `x`."""
        x = x.to(torch.float32)
        if self.parameters.get("layout") == "NHWC":
            x = x.permute(0, 3, 1, 2)
        if self.name == "none":
            return x.clone(memory_format=torch.contiguous_format)
        if self.name == "flatten":
            return x.flatten(1).clone(memory_format=torch.contiguous_format)
        if self.name == "avg":
            return x.mean(dim=(2, 3))
        if self.name == "max":
            return x.amax(dim=(2, 3))
        if self.name == "avgmax":
            return torch.cat([x.mean(dim=(2, 3)), x.amax(dim=(2, 3))], dim=1)
        if self.name == "gem":
            p = self.parameters["p"]
            return x.clamp(min=self.parameters["eps"]).pow(p).mean(dim=(2, 3)).pow(1 / p)
        if self.name == "rows":
            return x.mean(dim=3)
        if self.name == "cls":
            return x[:, 0].clone()
        if self.name == "tokens-avg":
            return x[:, self.parameters["prefix"] :].mean(dim=1)
        raise InputError(f"unknown pooling {self.name!r}")

    def dims(self, kind: str) -> tuple[str, ...]:
        """Names of the dimensions of one sample's features."""
        if self.name == "rows":
            return ("channels", "height")
        if self.name == "none" and kind == MAP:
            return ("channels", "height", "width")
        if self.name == "none" and kind == TOKENS:
            return ("tokens", "features")
        return ("features",)


def choose_pooling(
    pool: str, x: Tensor, *, size: tuple[int, int], module: nn.Module, body: nn.Module, where: str
) -> tuple[Pooling, str]:
    """Resolve `auto`, and check that a pooling suits what the tap gives.

    Args:
        pool: as asked for.
        x: (n, ...) what the tap gave.
        size: (height, width) of the images that gave it.
        module: the tapped module.
        body: the whole network.
        where: what to call the tap in an error.

    Returns:
        The pooling, and whether the activation is a vector, a map or tokens.

    Raises:
        InputError: the pooling does not suit the shape, or the order of the dimensions can't be told.
    """
    kind = KINDS.get(x.ndim)
    shape = tuple(x.shape[1:])
    if kind is None:
        raise InputError(
            f"{where}: gives {x.ndim - 1} dimensions per image {shape}; 1, 2 (tokens) or 3 (maps) are known"
        )
    name = AUTO[kind] if pool == "auto" else pool
    if name not in ACCEPTED[kind]:
        raise InputError(
            f"{where}: pooling {name!r} does not suit {'tokens' if kind == TOKENS else f'a {kind}'} of shape {shape}. "
            f"Possible: {', '.join(ACCEPTED[kind])}."
        )
    parameters: dict[str, Any] = dict(GEM) if name == "gem" else {}
    if kind == MAP and _channels_last(shape, size, module, body, where):
        parameters["layout"] = "NHWC"
    if name in ("cls", "tokens-avg"):
        prefix = prefix_tokens(body)
        if name == "cls" and prefix == 0:
            raise InputError(f"{where}: {type(body).__name__} has no class token; use tokens-avg")
        if name == "tokens-avg":
            parameters["prefix"] = prefix if prefix is not None and prefix < shape[0] else 0
    return Pooling(name, parameters), kind


def prefix_tokens(body: nn.Module) -> int | None:
    """How many tokens stand before those of the image: the class token and registers; None where that is unknown."""
    timm = getattr(body, "num_prefix_tokens", None)
    if isinstance(timm, int):
        return timm
    return 1 if isinstance(getattr(body, "class_token", None), Tensor) else None


def _channels_last(
    shape: tuple[int, ...], size: tuple[int, int], module: nn.Module, body: nn.Module, where: str
) -> bool:
    """Whether a map is (height, width, channels).

    Told from the module's own number of channels, else from which two dimensions have the image's aspect ratio; what
    is still open is channels first, as everywhere in torch, unless the body is known to keep channels last somewhere.
    """
    if type(module) in (nn.Linear, nn.LayerNorm):
        return True  # both work on the last dimension
    if isinstance(module, nn.modules.conv._ConvNd | nn.modules.batchnorm._BatchNorm):
        return False
    first, last = _fits(shape[1:], size), _fits(shape[:2], size)
    if first != last:
        return last
    if shape[1] == shape[2] == 1 or shape[0] == shape[1] == 1:
        return shape[0] == shape[1] == 1 and shape[2] != 1
    if not _mixes_layouts(body):
        return False
    raise InputError(
        f"{where}: can't tell whether its map {shape} is (channels, height, width) or (height, width, channels), and "
        f"{type(body).__name__} has both. Tap a neighbour, or use another image size."
    )


def _fits(shape: tuple[int, ...], size: tuple[int, int]) -> bool:
    """Whether (a, b) can be the image's (height, width) divided by one stride, rounded up or down."""
    if size[0] == size[1]:
        return shape[0] == shape[1]
    down, across = size[0] / shape[0], size[1] / shape[1]
    return abs(down - across) <= max(down / shape[0], across / shape[1])


def _mixes_layouts(body: nn.Module) -> bool:
    names = {type(child).__name__ for child in body.modules()}
    last = str(getattr(body, "output_fmt", "")).endswith("NHWC")
    return last or bool(names & {"Permute", "SwinTransformer", "PatchMerging", "ShiftedWindowAttention"})
