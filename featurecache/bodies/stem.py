"""One set of weights for the early blocks of several bodies; what lies above stays each one's own."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from featurecache.bodies.registry import Body
from featurecache.bodies.split import parameters_below
from featurecache.bodies.taps import resolve_taps
from featurecache.config import Tap
from featurecache.errors import InputError


def share_stem(bodies: Sequence[Body], module: str, sizes: Sequence[tuple[int, int]]) -> list[str]:
    """Make all bodies use the first one's parameters up to a module, in place.

    Only parameters: buffers, such as the statistics of BatchNorm, are never changed by training and stay as they are.

    Args:
        bodies: of one architecture, each a module of its own.
        module: dotted name of the last module that is shared.
        sizes: (height, width) of the images of each.

    Returns:
        Names of the shared parameters.

    Raises:
        InputError: no such module, or the bodies differ up to there.
    """
    first, *others = bodies
    shared = [
        sorted(parameters_below(body, resolve_taps(body, [Tap(module=module, pool="none")], size)[0], size))
        for body, size in zip(bodies, sizes, strict=True)
    ]
    own = dict(first.module.named_parameters())
    for body, names in zip(others, shared[1:], strict=True):
        theirs = dict(body.module.named_parameters())
        if names != shared[0] or any(not torch.equal(own[name], theirs[name]) for name in names):
            raise InputError(
                f"--share-bodies stem: up to {module}, {body.name} has other layers or weights than {first.name}. Give "
                "all views one body and weights, or leave --share-bodies out."
            )
        for name in names:
            path, _, leaf = name.rpartition(".")
            setattr(body.module.get_submodule(path), leaf, own[name])
    return shared[0]
