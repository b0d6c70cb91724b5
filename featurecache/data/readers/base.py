"""The reader seam: one function from a payload to an array with a known value range; failures are values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np

from featurecache.errors import ReadError


@dataclass(frozen=True, eq=False)
class Decoded:
    """One image as it was stored, not yet normalised.

    Attributes:
        array: (height, width, channels), uint8, uint16 or float32, C-contiguous.
        limit: the value that stands for 1.0: 255 for 8 bit, 65535 for 16 bit (4095 for 12 bit), 1.0 for floats.
    """

    array: np.ndarray
    limit: float


@dataclass(frozen=True)
class ReadFailure:
    """Why a payload could not be read; picklable, so that it can cross from a worker to the writer.

    Attributes:
        kind: class name of the error.
        message: what was found, in one line.
        deterministic: True where the same bytes will fail again, so that the failure may be remembered.
    """

    kind: str
    message: str
    deterministic: bool


@runtime_checkable
class Reader(Protocol):
    """What every reader is: frozen, picklable, without state.

    Attributes:
        version: raised whenever the same payload would give other pixels; part of every recipe.
        kind: kind of payload, `file` or `text`.
    """

    version: ClassVar[int]
    kind: ClassVar[str]

    @property
    def name(self) -> str:
        """As the command line and recipes spell it."""

    def parameters(self) -> dict[str, Any]:
        """All that changes the pixels, beside name and version; JSON values, part of the recipe.

        `get_reader(name, **parameters)` gives a reader of the same pixels. A field that has no effect is left out, and
        so is what only decides whether a payload is refused.
        """

    def identity(self) -> str:
        """Name, version, and what decides beside `parameters()` which payloads are refused.

        A failure is remembered per recipe, key and this: `image/1 max_pixels=100000000`. With another limit the payload
        is tried again.
        """

    def decode(self, payload: bytes, selector: Mapping[str, Any]) -> Decoded:
        """Turn a payload into an array.

        Args:
            payload: the bytes of the cell.
            selector: which part of it: `frame` (int), `box` ([x0, y0, x1, y1] in pixels, after EXIF orientation, right
                and lower edge excluded), `flip` (bool, left to right, after the box); empty for the whole.

        Raises:
            ReadError: the payload can't be read; the message says what was found.
        """


class FileReader:
    """What the readers of files share: a limit on pixels, which decides which payloads are refused."""

    name: ClassVar[str]
    version: ClassVar[int]
    kind: ClassVar[str] = "file"

    max_pixels: int

    def identity(self) -> str:
        """Under what failures are remembered; see `Reader`."""
        return f"{self.name}/{self.version} max_pixels={self.max_pixels}"


def read(reader: Reader, payload: bytes, selector: Mapping[str, Any]) -> Decoded | ReadFailure:
    """Decode one payload; whatever goes wrong is returned, never raised (but Ctrl-C and the like).

    A ReadError says itself whether it is deterministic. Everything else (memory, I/O, a defect in a reader) is not
    remembered, but tried again on the next run.
    """
    try:
        return reader.decode(payload, selector)
    except ReadError as error:
        return ReadFailure("ReadError", str(error), error.deterministic)
    except MemoryError:
        return ReadFailure("MemoryError", f"out of memory while reading {len(payload):,} bytes", False)
    except Exception as error:
        return ReadFailure(type(error).__name__, " ".join(str(error).split()) or "no message", False)


def select(array: np.ndarray, selector: Mapping[str, Any]) -> np.ndarray:
    """Apply the selector's box and flip to (height, width, channels).

    Raises:
        ReadError: the box is not inside the image.
    """
    box = selector.get("box")
    if box is not None:
        x0, y0, x1, y1 = box
        height, width = array.shape[:2]
        if not (0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height):
            raise ReadError(f"box {x0},{y0},{x1},{y1} is not inside the image of {width} x {height} pixels")
        array = array[y0:y1, x0:x1]
    if selector.get("flip"):
        array = array[:, ::-1]
    return np.ascontiguousarray(array)
