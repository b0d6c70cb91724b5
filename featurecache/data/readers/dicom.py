"""The DICOM reader (extra `dicom`): what a viewer shows of a file, in all the bits that it holds.

Stored values go through the modality LUT or rescale slope and intercept, then through the VOI LUT or window; where the
file has neither, its whole range of stored values counts. MONOCHROME1 (0 is white) is inverted. After a window values
are floats from 0 to 1, else the integers of 8 to 16 bits: nothing is rounded to 8 bits before it is normalised.
"""

from __future__ import annotations

import io
import struct
import threading
import warnings
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from featurecache.data.readers.base import Decoded, FileReader, select
from featurecache.data.readers.pixels import to_channels
from featurecache.data.readers.windows import full_range, look_up, windowed
from featurecache.errors import DependencyError, InputError, ReadError

CONTRASTS = ("auto", "full")
DEFLATED = "1.2.840.10008.1.2.1.99"
MOST_INFLATED = 1 << 30  # bytes; a deflated file of a few kilobytes can name any number
WHITE = (255, 255, 255)
_WARNINGS = threading.Lock()  # filters are global to the process, so one thread at a time may change them


@dataclass(frozen=True)
class DicomReader(FileReader):
    """Reads DICOM files.

    Attributes:
        channels: 1 (grey) or 3 (RGB; grey is repeated).
        contrast: `auto`: the file's first VOI LUT, else its first window, else the full range; `full`: always that.
        window: (centre, width) in the units after rescaling (Hounsfield in CT), in place of the file's.
        max_pixels: larger images (rows x columns) are refused by their header; not part of the recipe.
    """

    name: ClassVar[str] = "dicom"
    version: ClassVar[int] = 1

    channels: int = 3
    contrast: str = "auto"
    window: tuple[float, float] | None = None
    max_pixels: int = 100_000_000

    def __post_init__(self) -> None:
        """Refuse what can't be.

        Raises:
            DependencyError: pydicom is not installed.
            InputError: channels, contrast, window or max_pixels out of range.
        """
        import_pydicom()
        if self.channels not in (1, 3):
            raise InputError(f"dicom reader: channels={self.channels}, but images have 1 (grey) or 3 (RGB)")
        if self.contrast not in CONTRASTS:
            raise InputError(f"dicom reader: contrast={self.contrast!r}, but one of {', '.join(CONTRASTS)} is needed")
        if self.window is not None:
            try:
                centre, width = (float(value) for value in self.window)
            except (TypeError, ValueError):
                raise InputError(f"dicom reader: window={self.window!r}, but centre and width are needed") from None
            if not (np.isfinite(centre) and np.isfinite(width) and width >= 1):
                raise InputError(f"dicom reader: window={self.window!r}: its width must be at least 1")
            object.__setattr__(self, "window", (centre, width))
        if self.max_pixels < 1:
            raise InputError(f"dicom reader: max_pixels={self.max_pixels}, but at least 1 is needed")

    def parameters(self) -> dict[str, Any]:
        """Part of the recipe. A window of one's own leaves the file's contrast without effect."""
        if self.window is not None:
            return {"channels": self.channels, "window": list(self.window)}
        return {"channels": self.channels, "contrast": self.contrast}

    def decode(self, payload: bytes, selector: Mapping[str, Any]) -> Decoded:
        """Decode one image.

        Returns:
            (height, width, channels): float32 with limit 1.0 where a window or an uneven rescaling applies; else uint8
            with limit 255, or uint16 with the largest value of the bits that are stored (4095 for 12).

        Raises:
            ReadError: no DICOM file, without an image, too large, of several frames where none is chosen, damaged, or
                compressed in a way that no installed decoder reads (tried again on the next run).
        """
        dataset = _parse(payload)
        frame = self._check(dataset, selector.get("frame"))
        try:
            array, limit = self._pixels(dataset, frame)
        except (ReadError, MemoryError):
            raise
        except Exception as error:  # decoders raise nearly anything; the payload is in memory, so it will fail again
            raise _undecodable(dataset, error) from None
        array = to_channels(select(array, selector), limit, self.channels, WHITE)
        return Decoded(np.ascontiguousarray(array), limit)

    def _check(self, dataset: Any, frame: int | None) -> int:
        """The frame to read, of a file that holds one that can be read."""
        rows, columns = (_whole(dataset, name) for name in ("Rows", "Columns"))
        if not any(name in dataset for name in ("PixelData", "FloatPixelData", "DoubleFloatPixelData")) or not rows:
            raise ReadError(f"DICOM without an image: {_class_of(dataset)}")
        if rows * columns > self.max_pixels:
            raise ReadError(
                f"DICOM of {columns} x {rows} pixels: {rows * columns:,} exceed the limit of {self.max_pixels:,}"
            )
        frames = _whole(dataset, "NumberOfFrames") or 1
        if frame is None and frames > 1:
            raise ReadError(f"DICOM with {frames} frames: choose one with --frame VIEW=COLUMN, or split the file")
        if frame is not None and not 0 <= frame < frames:
            raise ReadError(f"DICOM has no frame {frame}: it holds {frames}, counted from 0")
        _check_syntax(dataset)
        return frame or 0

    def _pixels(self, dataset: Any, frame: int) -> tuple[np.ndarray, float]:
        """(height, width, 1 or 3) and the value that stands for 1.0."""
        pixels = import_pydicom().pixels
        array = np.asarray(pixels.pixel_array(dataset, index=frame))
        photometric = str(dataset.get("PhotometricInterpretation", ""))
        bits = _whole(dataset, "BitsStored")
        if bits < 1 and array.dtype.kind != "f":
            raise ReadError(f"damaged DICOM: {bits} bits stored")
        if photometric == "PALETTE COLOR":
            array = np.asarray(pixels.apply_color_lut(array, dataset))[:, :, :3]
            return array, 255.0 if array.dtype == np.uint8 else 65535.0
        if array.ndim == 3 and array.shape[2] == 3:
            if not 1 <= bits <= 16 or array.dtype.kind != "u":
                raise ReadError(f"colour of {bits} bits ({array.dtype}): only whole numbers of up to 16 are read")
            return (array, 255.0) if bits == 8 else (array.astype(np.uint16), float(2**bits - 1))
        if photometric not in ("MONOCHROME1", "MONOCHROME2") or array.ndim != 2:
            raise ReadError(f"pixels of kind {photometric or 'unknown'} and shape {array.shape} are not read")
        grey, limit = self._grey(array, dataset, frame, bits)
        if photometric == "MONOCHROME1":
            grey = grey.dtype.type(limit) - grey
        return grey[:, :, None], limit

    def _grey(self, array: np.ndarray, dataset: Any, frame: int, bits: int) -> tuple[np.ndarray, float]:
        """(height, width) of stored values as they are shown, 0 black: MONOCHROME1 is not inverted yet."""
        signed = array.dtype.kind == "i"
        if array.dtype.kind in "iu" and bits < 8 * array.dtype.itemsize and not signed:
            array = array & array.dtype.type(2**bits - 1)  # older files keep overlays in the bits above
        modality = _described(dataset, frame, "PixelValueTransformationSequence", "RescaleSlope")
        values, low, high = full_range(array, bits, signed, dataset, modality)
        if self.window is not None:
            return windowed(values, *self.window, "LINEAR"), 1.0
        if self.contrast == "auto":
            shown = _described(dataset, frame, "FrameVOILUTSequence", "WindowCenter")
            if shown.get("VOILUTSequence"):
                return look_up(values, shown.VOILUTSequence[0]), 1.0
            if shown.get("WindowCenter") is not None and shown.get("WindowWidth") is not None:
                centre, width = (_first(shown[name].value) for name in ("WindowCenter", "WindowWidth"))
                function = str(shown.get("VOILUTFunction") or "LINEAR")
                return windowed(values, centre, width, function), 1.0
        if values.dtype.kind == "f" or bits > 16:
            if not high > low:
                raise ReadError("DICOM of floats without a window: their range is unknown. Set window=centre,width.")
            return ((values - low) / (high - low)).clip(0, 1).astype(np.float32), 1.0
        shifted = (values.astype(np.int32) - int(low)).astype(np.uint16)
        return (shifted.astype(np.uint8), 255.0) if bits == 8 else (shifted, float(high - low))


def import_pydicom() -> Any:
    """The module pydicom.

    Raises:
        DependencyError: it is not installed.
    """
    try:
        import pydicom.pixels
    except ImportError:
        raise DependencyError("reading DICOM needs pydicom: pip install 'featurecache[dicom]'") from None
    return pydicom


def _parse(payload: bytes) -> Any:
    """The file's data set, its pixels not decoded."""
    pydicom = import_pydicom()
    if not payload:
        raise ReadError("0 bytes: the file is empty")
    if payload[128:132] != b"DICM":
        raise ReadError("not a DICOM file: it has no 'DICM' at byte 128")
    _check_inflated(payload)
    try:
        with _WARNINGS, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of values that the standard would have otherwise, which readers cope with
            return pydicom.dcmread(io.BytesIO(payload))
    except MemoryError:
        raise
    except Exception as error:
        raise ReadError(f"damaged DICOM: {' '.join(str(error).split()) or type(error).__name__}") from None


def _check_inflated(payload: bytes) -> None:
    """Refuse a deflated file that would fill the memory; pydicom inflates it all at once."""
    try:
        group, element, kind, size, length = struct.unpack_from("<HH2sHI", payload, 132)
    except struct.error:
        raise ReadError(f"truncated DICOM: {len(payload)} bytes") from None
    if (group, element, kind, size) != (2, 0, b"UL", 4) or DEFLATED.encode() not in payload[144 : 144 + length]:
        return
    inflating = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        inflating.decompress(payload[144 + length :], MOST_INFLATED)
    except zlib.error as error:
        raise ReadError(f"damaged DICOM: it can't be inflated: {error}") from None
    if inflating.unconsumed_tail:
        raise ReadError(f"DICOM that inflates to more than {MOST_INFLATED:,} bytes")


def _check_syntax(dataset: Any) -> None:
    """Refuse, by its name, a compression that nothing installed can undo."""
    uid = dataset.file_meta.get("TransferSyntaxUID")
    if uid is None:
        raise ReadError("damaged DICOM: it does not say how its pixels are stored (no transfer syntax)")
    try:
        decoder = import_pydicom().pixels.get_decoder(uid)
    except NotImplementedError:
        raise ReadError(f"DICOM compressed as {uid.name}, which can't be read") from None
    if not decoder.is_available:
        needed = "; ".join(decoder.missing_dependencies)
        raise ReadError(
            f"DICOM compressed as {uid.name}, which nothing installed here decodes ({needed})", deterministic=False
        )


def _undecodable(dataset: Any, error: Exception) -> ReadError:
    """What went wrong; another decoder that could be installed may cope with a compressed file."""
    message = " ".join(str(error).split()) or type(error).__name__
    uid = dataset.file_meta.TransferSyntaxUID
    others = "; ".join(import_pydicom().pixels.get_decoder(uid).missing_dependencies) if uid.is_encapsulated else ""
    if not others:
        return ReadError(f"DICOM can't be decoded: {message}")
    return ReadError(
        f"DICOM compressed as {uid.name} can't be decoded: {message} (not installed: {others})", deterministic=False
    )


def _described(dataset: Any, frame: int, sequence: str, name: str) -> Any:
    """Where the values of a frame are described: the file itself, else the group of the frame, else that of all."""
    if name in dataset:
        return dataset
    for groups, number in (("PerFrameFunctionalGroupsSequence", frame), ("SharedFunctionalGroupsSequence", 0)):
        held = dataset.get(groups) or ()
        if number < len(held) and held[number].get(sequence):
            return held[number][sequence].value[0]
    return dataset


def _whole(dataset: Any, name: str) -> int:
    """A whole number of the data set, 0 where it is absent or empty."""
    value = dataset.get(name)
    try:
        return int(value or 0)
    except (TypeError, ValueError):
        raise ReadError(f"damaged DICOM: {name} is {value!r}") from None


def _first(value: Any) -> float:
    """The first of one or several values."""
    return float(value if isinstance(value, int | float | str) else value[0])


def _class_of(dataset: Any) -> str:
    uid = dataset.get("SOPClassUID")
    return str(getattr(uid, "name", uid)) if uid else "of no known class"
