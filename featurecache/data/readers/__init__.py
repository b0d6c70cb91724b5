"""Readers by name. A reader turns a payload into an array; see `base.Reader`."""

from __future__ import annotations

from typing import Any

from featurecache.data.readers.array import ArrayReader
from featurecache.data.readers.base import Decoded, Reader, ReadFailure, read
from featurecache.data.readers.image import ImageReader
from featurecache.errors import InputError, did_you_mean

__all__ = ["Decoded", "ReadFailure", "Reader", "get_reader", "read", "reader_names"]

_READERS: dict[str, type[ImageReader] | type[ArrayReader]] = {
    ImageReader.name: ImageReader,
    ArrayReader.name: ArrayReader,
}


def reader_names() -> list[str]:
    """All reader names, sorted."""
    return sorted(_READERS)


def get_reader(name: str, **parameters: Any) -> Reader:
    """The reader of that name with these parameters; those left out take the reader's defaults.

    Raises:
        InputError: no such reader or parameter, or a value that the reader does not accept.
    """
    if name not in _READERS:
        known = ", ".join(reader_names())
        raise InputError(f"unknown reader {name!r}.{did_you_mean(name, _READERS)} Known: {known}.")
    kind = _READERS[name]
    accepted = list(kind.__dataclass_fields__)
    for parameter in parameters:
        if parameter not in accepted:
            raise InputError(
                f"reader {name!r}: unknown parameter {parameter!r}.{did_you_mean(parameter, accepted)} "
                f"Known: {', '.join(accepted)}."
            )
    return kind(**parameters)
