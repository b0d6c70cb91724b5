"""Readers that tests name as package.module:function."""

import numpy as np

from featurecache.errors import ReadError


def raw(payload, selector):
    """A square of grey bytes."""
    side = int(len(payload) ** 0.5)
    if side * side != len(payload):
        raise ReadError(f"{len(payload)} bytes are no square")
    return np.frombuffer(payload, np.uint8).reshape(side, side)


def nothing(payload, selector):
    return np.zeros((2, 2, 3), np.int64)


def infinite(payload, selector):
    return np.full((2, 2, 3), np.inf)


def flat(payload, selector):
    return np.zeros(3)
