"""The array reader: types, shapes, and one clear reason for every file that is refused."""

from __future__ import annotations

import io

import numpy as np
import pytest

from featurecache.data.readers import ReadFailure, get_reader, read
from featurecache.data.readers.array import ArrayReader
from featurecache.errors import InputError


def saved(array: np.ndarray, **options) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array, **options)
    return stream.getvalue()


def refusal(payload: bytes, reader: ArrayReader | None = None, **selector) -> str:
    failure = read(reader or ArrayReader(), payload, selector)
    assert isinstance(failure, ReadFailure)
    assert failure.deterministic
    return failure.message


@pytest.mark.parametrize(
    ("dtype", "kept", "limit"),
    [
        (np.uint8, np.uint8, 255.0),
        (np.uint16, np.uint16, 65535.0),
        (">u2", np.uint16, 65535.0),
        (np.float16, np.float32, 1.0),
        (np.float64, np.float32, 1.0),
    ],
)
@pytest.mark.parametrize("order", ["C", "F"])
def test_types_and_their_limits(dtype, kept, limit, order):
    array = np.asarray(np.arange(60).reshape(4, 5, 3), dtype=dtype, order=order)
    decoded = ArrayReader().decode(saved(array), {})
    assert (decoded.array.dtype, decoded.limit) == (np.dtype(kept), limit)
    assert decoded.array.flags.c_contiguous
    assert np.array_equal(decoded.array, array)


def test_grey_is_repeated_and_selected():
    array = np.arange(20, dtype=np.uint8).reshape(4, 5)
    assert np.array_equal(ArrayReader(channels=1).decode(saved(array), {}).array[:, :, 0], array)
    decoded = ArrayReader().decode(saved(array), {"box": [1, 0, 3, 4], "flip": True})
    assert np.array_equal(decoded.array, np.repeat(array[:, 1:3][:, ::-1, None], 3, axis=2))
    assert ArrayReader(channels=7).decode(saved(np.zeros((2, 3, 7), np.uint8)), {}).array.shape == (2, 3, 7)


def test_what_is_refused():
    good = saved(np.zeros((4, 5, 3), np.uint8))
    assert refusal(b"") == "0 bytes: the file is empty"
    assert refusal(b"abc") == "not a .npy file: it does not start with the NumPy magic bytes"
    assert refusal(good[:20]).startswith("the header of the .npy file can't be read")
    assert refusal(good[:-1]) == "truncated: 59 bytes of data where its header promises 60"
    assert refusal(saved(np.array([[object()]]), allow_pickle=True)) == (
        "the .npy file holds Python objects (a pickle), which are never loaded"
    )
    assert refusal(saved(np.zeros((2, 2), np.int64))) == "array of int64: accepted are uint8, uint16 and floats"
    assert refusal(saved(np.zeros(4))) == "array of 4: accepted are (height, width) and (height, width, channels)"
    assert refusal(saved(np.zeros((3, 8, 9), np.uint8))) == (
        "array of 3 x 8 x 9 has 9 channels where 3 are expected; it looks like (channels, height, width): "
        "transpose it to (height, width, channels)"
    )
    assert refusal(saved(np.full((2, 2), np.inf))) == "the array holds NaN or infinite values"
    assert refusal(saved(np.full((2, 2), 1e300))) == "the array holds NaN or infinite values"
    assert refusal(good, ArrayReader(max_pixels=19)) == "5 x 4 pixels exceed the limit of 19"
    assert refusal(good, frame=0) == "an array file has no frames to choose from"
    assert refusal(good, box=[0, 0, 6, 4]) == "box 0,0,6,4 is not inside the image of 5 x 4 pixels"
    for wrong in (b"(4, 5, 3, {", b"(4, 5, 3)} ,"):
        assert refusal(good.replace(b"(4, 5, 3), }", wrong.ljust(12))).startswith(
            "the header of the .npy file can't be"
        )
    assert refusal(good.replace(b"(4, 5, 3), }", b"(4, 5, -3)} ")).startswith("array of 4 x 5 x -3: accepted are")
    assert refusal(good.replace(b"(4, 5, 3), }", b"(4,5,9**9)} ")).startswith("the header of the .npy file can't be")


def test_parameters():
    assert get_reader("array", channels=2).parameters() == {"channels": 2}
    with pytest.raises(InputError, match="channels=0, but at least 1"):
        get_reader("array", channels=0)
    with pytest.raises(InputError, match="max_pixels=0, but at least 1"):
        get_reader("array", max_pixels=0)
