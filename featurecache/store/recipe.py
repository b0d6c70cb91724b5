"""What features depend on, as canonical JSON, and the digests that name it: recipes, content keys."""

from __future__ import annotations

import hashlib
import json
import math
import numbers
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from functools import cached_property
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from featurecache.errors import InputError

SCHEMA = 1
KEY_BYTES = 32
_DIGEST = re.compile(r"[0-9a-f]{64}")
_LARGEST_INTEGER = 2**53 - 1  # beyond it a JSON number is not exact (RFC 7493)

DEFAULTS: Mapping[str, Any] = MappingProxyType({})
"""Fields that a later version added: dotted path -> the value that reproduces what was done before there was the field.

A field that holds this value is left out before hashing, so that every digest made before stays what it was.
`taps.NAME` stands for a field of each tap. An entry, once released, is never changed or removed.
"""


def canonical_json(value: Any) -> bytes:
    """The one spelling of a JSON value after RFC 8785: sorted keys, no spaces, numbers as ECMAScript writes them.

    Raises:
        InputError: NaN, infinity, an integer that no JSON number expresses exactly, a lone surrogate, or a type that
            JSON doesn't have.
    """
    try:
        return "".join(_tokens(value, "")).encode("utf-8")
    except UnicodeEncodeError:
        raise InputError("canonical JSON: a string holds a lone surrogate, which UTF-8 can't express") from None


def _tokens(value: Any, where: str) -> Iterator[str]:
    if value is None:
        yield "null"
    elif isinstance(value, bool):
        yield "true" if value else "false"
    elif isinstance(value, str):
        yield json.dumps(value, ensure_ascii=False)
    elif isinstance(value, numbers.Integral):
        number = int(value)
        # A whole float that was read back comes here as an integer: beyond 2**53 only its own spelling is accepted.
        if abs(number) > _LARGEST_INTEGER and (abs(number) >= 10**21 or _number(float(number), "") != str(number)):
            raise InputError(f"canonical JSON: {where or 'value'} = {number} is no exact number; write it as a string")
        yield str(number)
    elif isinstance(value, numbers.Real):
        yield _number(float(value), where)
    elif isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise InputError(f"canonical JSON: {where or 'object'} has the key {key!r}, which is not a string")
        opening = "{"
        # RFC 8785 sorts by UTF-16 code units, which differs from code points beyond the basic plane.
        for key in sorted(value, key=lambda text: text.encode("utf-16-be", "surrogatepass")):
            yield f"{opening}{json.dumps(key, ensure_ascii=False)}:"
            yield from _tokens(value[key], f"{where}.{key}" if where else key)
            opening = ","
        yield "{}" if opening == "{" else "}"
    elif isinstance(value, Sequence) and not isinstance(value, bytes | bytearray):
        opening = "["
        for index, item in enumerate(value):
            yield opening
            yield from _tokens(item, f"{where}[{index}]")
            opening = ","
        yield "[]" if opening == "[" else "]"
    else:
        raise InputError(f"canonical JSON: {where or 'value'} is a {type(value).__name__}, which JSON doesn't have")


def _number(value: float, where: str) -> str:
    """Number::toString of ECMAScript (ECMA-262, 6.1.6.1.20): Python has the same shortest digits, other exponents."""
    if not math.isfinite(value):
        raise InputError(f"canonical JSON: {where or 'value'} is {value}, which JSON doesn't have")
    if value == 0:
        return "0"
    sign, digit_tuple, exponent = Decimal(repr(value)).as_tuple()
    digits = "".join(map(str, digit_tuple))
    stripped = digits.rstrip("0")
    point = int(exponent) + len(digits)  # the decimal point stands after so many digits
    minus, digits, count = "-" * sign, stripped, len(stripped)
    if count <= point <= 21:
        return f"{minus}{digits}{'0' * (point - count)}"
    if 0 < point <= 21:
        return f"{minus}{digits[:point]}.{digits[point:]}"
    if -6 < point <= 0:
        return f"{minus}0.{'0' * -point}{digits}"
    fraction = f".{digits[1:]}" if count > 1 else ""
    return f"{minus}{digits[0]}{fraction}e{'+' if point > 0 else '-'}{abs(point - 1)}"


def content_key(kind: str, selector: Mapping[str, Any] | str, payload_sha256: bytes) -> bytes:
    """Identity of a cell's content within a recipe, 32 bytes.

    Args:
        kind: the payload's kind: `file`, `text`, `bytes` or `array`.
        selector: part of the payload (frame, page, box, flip), a mapping or its canonical JSON; `{}` is the whole.
        payload_sha256: SHA-256 of the payload, 32 bytes.
    """
    chosen = selector if isinstance(selector, str) else canonical_json(selector).decode("utf-8")
    return content_keys(kind, [chosen], [payload_sha256]).tobytes()


def content_keys(kind: str, selectors: Sequence[str], payloads: Sequence[bytes]) -> NDArray[np.uint8]:
    """The `content_key` of n cells of one kind, (n, 32) uint8, from their selectors' JSON and SHA-256."""
    begun = {
        selector: hashlib.sha256(b"\n".join((b"key/1", kind.encode("utf-8"), selector.encode("utf-8"), b"")))
        for selector in set(selectors)
    }
    keys = bytearray()
    for selector, payload in zip(selectors, payloads, strict=True):
        if len(payload) != KEY_BYTES:
            raise InputError(f"content key: a SHA-256 has 32 bytes, found {len(payload)}")
        key = begun[selector].copy()
        key.update(payload)
        keys += key.digest()
    return np.frombuffer(keys, np.uint8).reshape(-1, KEY_BYTES)


def checked_keys(keys: ArrayLike) -> NDArray[np.uint8]:
    """Keys as an array (n, 32).

    Raises:
        InputError: another shape or type.
    """
    rows = np.ascontiguousarray(keys)
    if rows.ndim != 2 or rows.shape[1] != KEY_BYTES or rows.dtype != np.uint8:
        raise InputError(f"keys: need (n, {KEY_BYTES}) uint8, found {rows.shape} {rows.dtype}")
    return rows


@dataclass(frozen=True, eq=False)
class Recipe:
    """Everything that one view's features depend on but the content.

    Attributes:
        fields: JSON values: reader, preprocessing, body, engine, precision, storage_dtype, ... Where there is a field
            `augmentation`, rows are told apart by key and replica.
        taps: one JSON object a tap; `name` (`penultimate@none`) is its array in the store. All that only this tap
            depends on is in it: the digests of the weights and of the program, too.
    """

    fields: Mapping[str, Any]
    taps: tuple[Mapping[str, Any], ...]

    def __post_init__(self) -> None:
        fields = json.loads(canonical_json({"schema": SCHEMA, **self.fields}))
        if fields["schema"] != SCHEMA:
            raise InputError(
                f"recipe of schema {fields['schema']}, this version knows schema {SCHEMA}. Update featurecache."
            )
        if "taps" in fields:
            raise InputError("recipe: taps are given as `taps`, not as a field")
        taps = [json.loads(canonical_json(tap)) for tap in self.taps]
        for tap in taps:
            if not isinstance(tap, dict) or not isinstance(tap.get("name"), str):
                raise InputError(f"recipe: a tap needs a name, found {tap!r}")
        names = [tap["name"] for tap in taps]
        if not names or len(set(names)) != len(names):
            raise InputError(f"recipe: needs one tap or more with names of their own, found {names}")
        object.__setattr__(self, "fields", fields)
        object.__setattr__(self, "taps", tuple(sorted(taps, key=lambda tap: tap["name"])))

    @cached_property
    def base(self) -> str:
        """SHA-256, hex, over all but the taps."""
        return hashlib.sha256(canonical_json(_without_defaults(self.fields, ""))).hexdigest()

    @cached_property
    def digest(self) -> str:
        """SHA-256, hex, over everything; taps count as a set."""
        document = {**_without_defaults(self.fields, ""), "taps": self._hashed_taps()}
        return hashlib.sha256(canonical_json(document)).hexdigest()

    @property
    def id(self) -> str:
        """The first 16 digits of the digest, which name the recipe's group in the store."""
        return self.digest[:16]

    @property
    def tap_names(self) -> tuple[str, ...]:
        """The arrays that the recipe fills, sorted."""
        return tuple(tap["name"] for tap in self.taps)

    @property
    def storage_dtype(self) -> str:
        """`float16` or `float32`."""
        return str(self.fields.get("storage_dtype", "float16"))

    @property
    def has_replicas(self) -> bool:
        """Whether rows are told apart by (key, replica) instead of the key alone."""
        return "augmentation" in self.fields

    def holds(self, other: Recipe) -> bool:
        """Whether features of `other` can be read from this recipe: the same base, and all of its taps."""
        mine = {canonical_json(tap) for tap in self._hashed_taps()}
        return self.base == other.base and all(canonical_json(tap) in mine for tap in other._hashed_taps())

    def differences(self, other: Recipe) -> list[tuple[str, Any, Any]]:
        """What differs, as (dotted field, value here, value there); None where a side has no such field."""
        here, there = (
            dict(
                _leaves({**_without_defaults(r.fields, ""), "taps": {tap["name"]: tap for tap in r._hashed_taps()}}, "")
            )
            for r in (self, other)
        )
        return [
            (name, here.get(name), there.get(name))
            for name in sorted({*here, *there})
            if here.get(name) != there.get(name)
        ]

    def to_json(self) -> dict[str, Any]:
        """Plain values: the fields and `taps`."""
        return {**self.fields, "taps": [dict(tap) for tap in self.taps]}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Recipe:
        """The recipe that `to_json` described."""
        taps = values.get("taps")
        if not isinstance(taps, list):
            raise InputError("recipe: no list of taps")
        return cls({name: value for name, value in values.items() if name != "taps"}, tuple(taps))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Recipe) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def _hashed_taps(self) -> list[dict[str, Any]]:
        return [_without_defaults(tap, "taps") for tap in self.taps]


def _without_defaults(fields: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The fields without those that hold the value of DEFAULTS."""
    kept: dict[str, Any] = {}
    for name, value in fields.items():
        path = f"{where}.{name}" if where else name
        if path in DEFAULTS and canonical_json(value) == canonical_json(DEFAULTS[path]):
            continue
        inner = any(default.startswith(f"{path}.") for default in DEFAULTS)
        kept[name] = _without_defaults(value, path) if inner and isinstance(value, Mapping) else value
    return kept


def _leaves(value: Mapping[str, Any], where: str) -> Iterator[tuple[str, Any]]:
    for name, item in value.items():
        path = f"{where}.{name}" if where else name
        if isinstance(item, Mapping) and item:
            yield from _leaves(item, path)
        else:
            yield path, item


def shortened(value: Any) -> str:
    """A value of a recipe for a message: of a digest its first digits, anything else whole."""
    if value is None:
        return "none"
    return f"{value[:12]}..." if isinstance(value, str) and _DIGEST.fullmatch(value) else repr(value)
