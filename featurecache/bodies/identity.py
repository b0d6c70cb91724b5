"""What a body's features depend on: digests of the tensors and of the program that run up to each tap."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from featurecache.bodies.program import describe_module, update_tensor
from featurecache.bodies.registry import FACTORY, Body
from featurecache.bodies.sources import foreign_modules, sources
from featurecache.bodies.tapped import ResolvedTap, Tapped
from featurecache.bodies.taps import dummy


class Identity(NamedTuple):
    """SHA-256, hex, of the weights and of the program that one tap depends on."""

    weights: str
    program: str


def identify(body: Body, taps: Sequence[ResolvedTap], size: tuple[int, int]) -> tuple[Identity, ...]:
    """What each tap depends on, whatever other taps there are.

    Left out are only modules that a full pass enters and a pass up to the tap does not, and whose tensors are
    shown not to matter (the classifier, for `penultimate`). Everything else counts, modules that no pass enters too: a
    parent may use their tensors directly, as `nn.MultiheadAttention` does.

    Args:
        body: the network.
        taps: its taps.
        size: (height, width) of the images.

    Returns:
        One identity a tap. Weights: sorted names, dtypes, shapes and little-endian bytes. Program: classes and settings
        of the modules, source of classes outside torch, torchvision and timm, non-persistent buffers.
    """
    found: dict[frozenset[str], Identity] = {}
    identities, texts = [], _texts(body)
    for tap in taps:
        unused = unused_modules(body, tap, size)
        if unused not in found:
            counted = {name: child for name, child in body.module.named_modules() if name not in unused}
            found[unused] = Identity(_weights(counted), _program(body, counted, texts))
        identities.append(found[unused])
    return tuple(identities)


def unused_modules(body: Body, tap: ResolvedTap, size: tuple[int, int]) -> frozenset[str]:
    """Dotted names of the modules behind a tap, if their tensors are shown not to matter to it; else none."""
    unused = tap.behind - {""}  # timm's penultimate leaves out the root's own forward, yet uses what the root holds
    return unused if _is_unused(Tapped(body, [tap]), unused, dummy(body, size, 1)) else frozenset()


@torch.no_grad()
def _is_unused(tapped: Tapped, unused: Collection[str], x: Tensor) -> bool:
    """Whether the tap stays as it is when the tensors of these modules become NaN."""
    counted, other = set[int](), dict[str, Tensor]()
    for name, child in tapped.module.named_modules():
        for key, tensor in _tensors(child).items():
            if name not in unused:
                counted.add(id(tensor))
            elif tensor.is_floating_point():
                other[f"module.{name}.{key}"] = tensor
    poison = {
        name: torch.full((), float("nan"), dtype=tensor.dtype, device=tensor.device).expand(tensor.shape)
        for name, tensor in other.items()
        if id(tensor) not in counted
    }
    if not poison:
        return True
    (poisoned,) = torch.func.functional_call(tapped, poison, (x,))
    if not poisoned.isnan().any():
        return True
    (features,) = tapped(x)  # it may hold NaN by itself
    return torch.equal(features.isnan(), poisoned.isnan())


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """A module's own parameters and persistent buffers."""
    buffers = {key: value for key, value in module._buffers.items() if key not in module._non_persistent_buffers_set}
    return {key: value for key, value in {**module._parameters, **buffers}.items() if value is not None}


def _weights(counted: dict[str, nn.Module]) -> str:
    tensors = {
        f"{name}.{key}" if name else key: tensor
        for name, child in counted.items()
        for key, tensor in _tensors(child).items()
    }
    digest = hashlib.sha256(b"weights/1\n")
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}\n".encode())
        update_tensor(digest, tensor)
    return digest.hexdigest()


def _program(body: Body, counted: dict[str, nn.Module], texts: dict[str, str]) -> str:
    tree = {id(child): name for name, child in body.module.named_modules()}
    program = {
        "program": 1,
        "modules": {name: describe_module(child, tree) for name, child in counted.items()},
        "sources": texts,
    }
    text = json.dumps(program, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _texts(body: Body) -> dict[str, str]:
    """Of the modules that define foreign classes and the factory, and of the plug-in's own that these import."""
    made = {body.architecture.partition(":")[0]} if FACTORY.fullmatch(body.architecture) else set()
    return sources(foreign_modules(body.module) | made, made or {type(body.module).__module__})
