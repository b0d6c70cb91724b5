"""The text reader: the characters of a cell as numbers, a fixed count of them, for bodies that begin with an embedding.

A text is one pixel of as many channels as it has places, so that everything behind the reader (preprocessing, engines,
recipes, replicas) treats it like an image: the body gets (n, length, 1, 1) whole numbers as floats.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np

from featurecache.data.readers.base import Decoded
from featurecache.errors import InputError, ReadError

ALPHABET = "abcdefghijklmnopqrstuvwxyz0123456789 -_'.,&"
MOST_CHARACTERS = 254  # indices up to 255 are whole numbers in every precision that bodies run in, bf16 too


@dataclass(frozen=True)
class TextReader:
    """Turns a text into the indices of its characters.

    0 stands for no character (after the end), 1 for the first of the alphabet and so on, one more than the alphabet is
    long for any other character. What is longer than `length` is cut.

    Attributes:
        length: places; as many as the body has input channels.
        alphabet: the characters that are told apart, each once.
        lower: whether letters become small ones first.
    """

    name: ClassVar[str] = "text"
    version: ClassVar[int] = 1
    kind: ClassVar[str] = "text"

    length: int = 32
    alphabet: str = ALPHABET
    lower: bool = True

    def __post_init__(self) -> None:
        """Refuse what can't be.

        Raises:
            InputError: no place, an alphabet that is empty, too long, or has a character twice or never used.
        """
        if self.length < 1:
            raise InputError(f"text reader: length={self.length}, but at least 1 is needed")
        if not 1 <= len(self.alphabet) <= MOST_CHARACTERS:
            raise InputError(f"text reader: an alphabet of {len(self.alphabet)}, but 1 to {MOST_CHARACTERS} are needed")
        twice = sorted({c for c in self.alphabet if self.alphabet.count(c) > 1})
        if twice:
            raise InputError(f"text reader: the alphabet has {twice[0]!r} more than once")
        unused = [c for c in self.alphabet if self.lower and c.lower() != c]
        if unused:
            raise InputError(
                f"text reader: the alphabet has {unused[0]!r}, which no text holds once its letters are small: "
                "leave it out, or set lower=false"
            )

    def parameters(self) -> dict[str, Any]:
        """Part of the recipe."""
        return {"length": self.length, "alphabet": self.alphabet, "lower": self.lower}

    def identity(self) -> str:
        """Under what failures are remembered; see `base.Reader`."""
        return f"{self.name}/{self.version}"

    @cached_property
    def _index(self) -> dict[str, int]:
        return {character: number for number, character in enumerate(self.alphabet, 1)}

    def decode(self, payload: bytes, selector: Mapping[str, Any]) -> Decoded:
        """The indices of a text.

        Returns:
            (1, 1, length) uint16 with limit 1.0: the numbers stay what they are.

        Raises:
            ReadError: not UTF-8, nothing but white space, or a part is asked for.
        """
        if selector:
            raise ReadError(f"a text has no {', '.join(selector)} to choose")
        try:
            text = payload.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ReadError(f"not UTF-8: {error.reason} at byte {error.start}") from None
        if not text.strip():
            raise ReadError("the text is empty")
        text = text.lower() if self.lower else text
        other = len(self.alphabet) + 1
        indices = [self._index.get(character, other) for character in text[: self.length]]
        array = np.zeros((1, 1, self.length), np.uint16)
        array[0, 0, : len(indices)] = indices
        return Decoded(array, 1.0)
