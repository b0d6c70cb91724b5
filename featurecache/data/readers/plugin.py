"""Readers of users: `package.module:function`, one function from a payload to an array."""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from featurecache.data.readers.base import Decoded, select
from featurecache.errors import InputError, ReadError, RecipeMismatchError
from featurecache.named import import_named

PLUGIN = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")
LIMITS = {"uint8": 255.0, "uint16": 65535.0}


@dataclass(frozen=True)
class PluginReader:
    """Calls `function(payload, selector)`, whose result is (height, width[, channels]) uint8, uint16 or floats.

    `selector` holds what the manifest says of the cell (`frame`); box and flip are applied afterwards. What the
    function raises makes the cell fail, by a ReadError for good, by any other error until the next run.

    Attributes:
        name: `package.module:function`, imported when the reader is made: so only what a person typed or allowed.
        channels: that must come out; a result of one is repeated for 3.
        source: SHA-256 of the file that holds the function: with other code a recipe is another one.
    """

    name: str
    channels: int = 3
    source: str = ""

    version: ClassVar[int] = 1
    kind: ClassVar[str] = "file"

    def __post_init__(self) -> None:
        """Import the function.

        Raises:
            InputError: it can't be imported or called.
            RecipeMismatchError: its code is not what `source` says.
        """
        found = _digest(self._function())
        if self.source and self.source != found:
            raise RecipeMismatchError(
                f"reader {self.name!r}: its file has changed ({self.source[:12]}... then, {found[:12]}... now)"
            )
        object.__setattr__(self, "source", found)

    def _function(self) -> Callable[[bytes, Mapping[str, Any]], Any]:
        return import_named("reader", self.name)

    def parameters(self) -> dict[str, Any]:
        """Part of the recipe."""
        return {"channels": self.channels, "source": self.source}

    def identity(self) -> str:
        """Under what failures are remembered; see `base.Reader`."""
        return f"{self.name}/{self.source[:16]}"

    def decode(self, payload: bytes, selector: Mapping[str, Any]) -> Decoded:
        """Call the function and check what it gives.

        Raises:
            ReadError: another type, shape or number of channels; NaN; what the function itself refuses.
        """
        array = np.asarray(self._function()(payload, selector))
        if array.ndim == 2:
            array = array[:, :, None]
        if array.ndim != 3 or min(array.shape) < 1:
            raise ReadError(f"reader {self.name!r} gave an array of shape {array.shape}, not (height, width, channels)")
        if array.shape[2] == 1 and self.channels == 3:
            array = np.repeat(array, 3, axis=2)
        if array.shape[2] != self.channels:
            raise ReadError(f"reader {self.name!r} gave {array.shape[2]} channels where {self.channels} are expected")
        if array.dtype.kind == "f":
            array = array.astype(np.float32)
            if not np.isfinite(array).all():
                raise ReadError(f"reader {self.name!r} gave NaN or infinite values")
        elif array.dtype.name not in LIMITS:
            raise ReadError(f"reader {self.name!r} gave {array.dtype}: accepted are uint8, uint16 and floats")
        return Decoded(select(array, selector), LIMITS.get(array.dtype.name, 1.0))


def _digest(function: Callable[..., Any]) -> str:
    """SHA-256 of the file that holds the function's module."""
    file = getattr(sys.modules.get(getattr(function, "__module__", "")), "__file__", None)
    if file is None:
        raise InputError(f"reader {function!r}: must be defined in a file, so that a change of its code is noticed")
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()
