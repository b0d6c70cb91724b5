"""Readers of users: `package.module:function`, one function from a payload to an array."""

from __future__ import annotations

import hashlib
import importlib
import os
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from featurecache.data.readers.base import Decoded, select
from featurecache.errors import InputError, ReadError, RecipeMismatchError, did_you_mean

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
        return import_function(self.name)

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


def import_function(name: str) -> Callable[[bytes, Mapping[str, Any]], Any]:
    """The function that `package.module:function` names; looked for in the current directory too.

    Raises:
        InputError: there is none.
    """
    path, _, attribute = name.partition(":")
    try:
        try:
            module = importlib.import_module(path)
        except ModuleNotFoundError as error:
            if error.name != path.partition(".")[0] or os.getcwd() in sys.path:
                raise
            sys.path.insert(0, os.getcwd())  # a console script's path lacks it, unlike `python -m`
            module = importlib.import_module(path)
    except ImportError as error:
        raise InputError(f"reader {name!r}: {path!r} can't be imported: {error}") from error
    function = getattr(module, attribute, None)
    if not callable(function):
        near = did_you_mean(attribute, [item for item in dir(module) if not item.startswith("_")])
        raise InputError(f"reader {name!r}: module {path!r} has no function {attribute!r}.{near}")
    found: Callable[[bytes, Mapping[str, Any]], Any] = function
    return found


def _digest(function: Callable[..., Any]) -> str:
    """SHA-256 of the file that holds the function's module."""
    file = getattr(sys.modules.get(getattr(function, "__module__", "")), "__file__", None)
    if file is None:
        raise InputError(f"reader {function!r}: must be defined in a file, so that a change of its code is noticed")
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()
