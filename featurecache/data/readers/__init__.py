"""Readers by name. A reader turns a payload into an array; see `base.Reader`."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from featurecache.data.readers.array import ArrayReader
from featurecache.data.readers.base import Decoded, Reader, ReadFailure, read
from featurecache.data.readers.dicom import DicomReader
from featurecache.data.readers.image import ImageReader
from featurecache.data.readers.mask import MaskReader
from featurecache.data.readers.plugin import PLUGIN, PluginReader
from featurecache.data.readers.text import TextReader
from featurecache.errors import InputError, did_you_mean

__all__ = ["PLUGIN", "Decoded", "ReadFailure", "Reader", "get_reader", "read", "reader_names"]

Kind = type[ImageReader] | type[ArrayReader] | type[DicomReader] | type[MaskReader] | type[TextReader]
_READERS: dict[str, Kind] = {
    kind.name: kind for kind in (ImageReader, ArrayReader, DicomReader, MaskReader, TextReader)
}


def reader_names() -> list[str]:
    """The names of all readers that are built in, sorted."""
    return sorted(_READERS)


def get_reader(name: str, **parameters: Any) -> Reader:
    """The reader of that name with these parameters; those left out take the reader's defaults.

    Args:
        name: one of `reader_names()`, or `package.module:function`, which is imported: the caller makes sure that a
            person named or allowed it.
        parameters: of the reader.

    Raises:
        InputError: no such reader or parameter, or a value that the reader does not accept.
        DependencyError: it needs a package that is not installed.
    """
    plugin = PLUGIN.fullmatch(name) is not None
    if not plugin and name not in _READERS:
        known = ", ".join(reader_names())
        near = did_you_mean(name, _READERS)
        raise InputError(f"unknown reader {name!r}.{near} Known: {known}, and package.module:function.")
    kind = PluginReader if plugin else _READERS[name]
    accepted = [field.name for field in fields(kind) if field.name != "name"]
    for parameter in parameters:
        if parameter not in accepted:
            raise InputError(
                f"reader {name!r}: unknown parameter {parameter!r}.{did_you_mean(parameter, accepted)} "
                f"Known: {', '.join(accepted)}."
            )
    try:
        return PluginReader(name, **parameters) if plugin else _READERS[name](**parameters)
    except TypeError as error:  # a value of another type, compared with numbers
        raise InputError(f"reader {name!r}: {error}") from None
