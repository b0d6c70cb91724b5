"""The text reader: characters as numbers, and what is refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from featurecache.data.readers import ReadFailure, get_reader, read
from featurecache.data.readers.text import MOST_CHARACTERS, TextReader
from featurecache.data.transforms import Augmentation, Preprocessing
from featurecache.errors import InputError

SHORT = TextReader(length=5, alphabet="abc")


def indices(text: str, reader: TextReader = SHORT) -> list[int]:
    decoded = reader.decode(text.encode(), {})
    assert (decoded.array.shape, decoded.limit) == ((1, 1, reader.length), 1.0)
    return decoded.array[0, 0].tolist()


def test_characters_become_their_places():
    assert indices("abc") == [1, 2, 3, 0, 0]
    assert indices("A-b") == [1, 4, 2, 0, 0]
    assert indices("aaaaabbb") == [1, 1, 1, 1, 1]
    assert indices("Ab", TextReader(length=2, alphabet="abA", lower=False)) == [3, 2]
    assert indices("Ωμέγα", TextReader(length=5, alphabet="αβγδεζηθικλμνξοπρστυφχψω")) == [24, 12, 25, 3, 1]


@given(st.text(), st.integers(1, 40))
def test_any_text_gives_known_numbers_or_a_reason(text, length):
    reader = TextReader(length=length)
    found = read(reader, text.encode("utf-8", "surrogatepass"), {})
    if isinstance(found, ReadFailure):
        assert found.deterministic
        assert not text.strip() or any("\ud800" <= c <= "\udfff" for c in text)
        return
    numbers = found.array[0, 0]
    kept = min(length, len(text.lower()))
    assert (numbers[:kept] >= 1).all()
    assert (numbers[:kept] <= len(reader.alphabet) + 1).all()
    assert not numbers[kept:].any()


def test_what_is_refused():
    assert read(SHORT, b"", {}) == ReadFailure("ReadError", "the text is empty", True)
    assert read(SHORT, b" \n", {}) == ReadFailure("ReadError", "the text is empty", True)
    assert read(SHORT, b"ab\xff", {}).message == "not UTF-8: invalid start byte at byte 2"
    assert read(SHORT, b"ab", {"frame": 1}).message == "a text has no frame to choose"


def test_preprocessing_and_augmentation_leave_the_numbers_alone():
    steps = Preprocessing(channels=5, resize=None, crop=1, mean=(0,) * 5, std=(1,) * 5)
    image = SHORT.decode(b"cab", {})
    augmentation = Augmentation(("crop", "flip", "vflip", "rotate", "colour"))
    drawn = augmentation.apply(image, steps, augmentation.draw(0, 1, 2), 0)
    for tensor in (steps.apply(image), drawn):
        assert steps.normalise(tensor).flatten().tolist() == [3, 1, 2, 0, 0]


def test_parameters():
    assert get_reader("text", **SHORT.parameters()) == SHORT
    assert SHORT.parameters() == {"length": 5, "alphabet": "abc", "lower": True}
    assert SHORT.identity() == "text/1"
    for wrong, message in [
        ({"length": 0}, "length=0, but at least 1"),
        ({"alphabet": ""}, "an alphabet of 0, but 1 to 254"),
        ({"alphabet": "".join(map(chr, range(200, 201 + MOST_CHARACTERS)))}, "an alphabet of 255"),
        ({"alphabet": "aba"}, "has 'a' more than once"),
        ({"alphabet": "aB"}, "has 'B', which no text holds"),
        ({"alphabet": 3}, "reader 'text'"),
    ]:
        with pytest.raises(InputError, match=message):
            get_reader("text", **wrong)
