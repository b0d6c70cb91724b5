"""The seam: readers by name, failures as values."""

from __future__ import annotations

import pickle

import pytest

from featurecache.data.readers import ReadFailure, get_reader, read, reader_names
from featurecache.data.readers.base import Reader
from featurecache.errors import InputError, ReadError


def test_readers_are_made_by_name_and_are_picklable():
    assert reader_names() == ["array", "dicom", "image", "mask", "text"]
    reader = get_reader("image", channels=1, exif=False)
    assert reader.parameters() == {
        "channels": 1,
        "exif": False,
        "background": [255, 255, 255],
    }
    assert isinstance(reader, Reader)
    assert pickle.loads(pickle.dumps(reader)) == reader
    with pytest.raises(
        InputError, match=r"unknown reader 'imgae'\. Did you mean 'image'\? Known: array, dicom, image, mask, text, and"
    ):
        get_reader("imgae")
    with pytest.raises(InputError, match=r"reader 'image': unknown parameter 'channel'\. Did you mean 'channels'\?"):
        get_reader("image", channel=3)
    with pytest.raises(InputError, match="unknown parameter 'version'"):
        get_reader("image", version=3)
    with pytest.raises(InputError, match="channels=2, but images have 1"):
        get_reader("image", channels=2)
    with pytest.raises(InputError, match="three numbers from 0 to 255"):
        get_reader("image", background=(1, 2, 300))
    with pytest.raises(InputError, match="max_pixels=0"):
        get_reader("image", max_pixels=0)


@pytest.mark.parametrize("name", ["array", "image"])
def test_a_limit_changes_no_recipe_but_what_failures_are_remembered_under(name):
    reader, other = get_reader(name), get_reader(name, max_pixels=9)
    assert reader.identity() == f"{name}/1 max_pixels=100000000"
    assert other.identity() == f"{name}/1 max_pixels=9"
    assert other.parameters() == reader.parameters()
    assert get_reader(name, **reader.parameters()) == reader


def test_a_background_that_nothing_is_composited_onto_is_not_in_the_recipe():
    white, black = (get_reader("image", channels=4, background=(shade,) * 3) for shade in (255, 0))
    assert white.parameters() == black.parameters() == {"channels": 4, "exif": True}
    grey = [get_reader("image", channels=1, background=(shade,) * 3).parameters() for shade in (255, 0)]
    assert grey[0] != grey[1]


class _Broken:
    name, version, kind = "broken", 1, "file"

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def parameters(self):
        return {}

    def identity(self):
        return "broken/1"

    def decode(self, payload, selector):
        raise self.error


def test_failures_are_values_and_say_whether_to_remember_them():
    assert read(_Broken(ReadError("no", deterministic=False)), b"", {}) == ReadFailure("ReadError", "no", False)
    assert read(_Broken(ReadError("no")), b"", {}) == ReadFailure("ReadError", "no", True)
    memory = ReadFailure("MemoryError", "out of memory while reading 3 bytes", False)
    assert read(_Broken(MemoryError()), b"abc", {}) == memory
    assert read(_Broken(OSError("disk\n gone")), b"", {}) == ReadFailure("OSError", "disk gone", False)
    assert read(_Broken(KeyError()), b"", {}) == ReadFailure("KeyError", "no message", False)
    with pytest.raises(KeyboardInterrupt):
        read(_Broken(KeyboardInterrupt()), b"", {})
