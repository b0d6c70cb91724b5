"""Format 1 on disk: paths, Zarr metadata documents, rows per chunk, and the bytes of a chunk file."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import google_crc32c
import numcodecs
import numpy as np
from numpy.typing import NDArray

from featurecache.errors import CorruptionError, InputError, did_you_mean
from featurecache.store.recipe import KEY_BYTES, Recipe

FORMAT = 1
FEATURES: frozenset[str] = frozenset()
"""The known additions to format 1 that a store may require; an attribute it doesn't know is ignored."""
CHUNK_BYTES = 8 * 2**20
LARGEST_CHUNK_ROWS = 4096
FIRST_CAPACITY = 4  # chunks that a new array's shape has room for; the shape then doubles
CHECKSUM_BYTES = 4
KEY, REPLICA = "key", "replica"

_NAME = re.compile(r"[A-Za-z0-9._@-]{1,120}")
_ZSTD: dict[str, Any] = {"level": 3, "checksum": False}
_GZIP: dict[str, Any] = {"level": 5}
CODECS = ("none", "zstd", "blosc", "gzip")
DTYPES = ("float16", "float32")
MOST_CHUNK_ROWS = 2**20  # that can be asked for


@dataclass(frozen=True)
class StorePaths:
    """Where things are in a store; `trash` and `incoming` are beside the Zarr hierarchy and on its file system."""

    root: Path

    @property
    def zarr(self) -> Path:
        """The Zarr group."""
        return self.root / "features.zarr"

    @property
    def index(self) -> Path:
        """The SQLite database."""
        return self.root / "index.sqlite"

    @property
    def lock(self) -> Path:
        """The writer's lock."""
        return self.root / "lock"

    @property
    def trash(self) -> Path:
        """What was replaced or never committed; emptied when the next writer opens the store."""
        return self.root / "trash"

    @property
    def incoming(self) -> Path:
        """Files being written, before their rename into place."""
        return self.root / "incoming"

    def array(self, recipe_id: str, array: str) -> Path:
        """The directory of one array."""
        return self.zarr / recipe_id / array


class TapInfo(NamedTuple):
    """Shape of one row, storage dtype, and the names of the row's dimensions."""

    shape: tuple[int, ...]
    dtype: str
    dims: tuple[str, ...]


@dataclass(frozen=True)
class ArraySpec:
    """One array of a recipe's group as it is laid out on disk."""

    name: str
    row_shape: tuple[int, ...]
    dtype: np.dtype[Any]
    dims: tuple[str, ...]
    codec: str
    rows: int

    @property
    def row_bytes(self) -> int:
        """Bytes of one row, uncompressed."""
        return int(math.prod(self.row_shape)) * self.dtype.itemsize

    @property
    def chunk_shape(self) -> tuple[int, ...]:
        """Shape of one chunk."""
        return (self.rows, *self.row_shape)

    def chunk_name(self, chunk: int) -> str:
        """File name of a chunk within the array's directory."""
        return ".".join(["c", str(chunk), *("0" for _ in self.row_shape)])

    def document(self, capacity: int) -> dict[str, Any]:
        """The array's zarr.json, with room for `capacity` chunks."""
        endian = {} if self.dtype.itemsize == 1 else {"configuration": {"endian": "little"}}
        return {
            "zarr_format": 3,
            "node_type": "array",
            "shape": [capacity * self.rows, *self.row_shape],
            "data_type": self.dtype.name,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(self.chunk_shape)}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
            "fill_value": 0 if self.dtype.kind in "iu" else 0.0,
            "codecs": [{"name": "bytes", **endian}, *self._compressor(), {"name": "crc32c"}],
            "attributes": {},
            "dimension_names": ["rows", *self.dims],
            "storage_transformers": [],
        }

    def _compressor(self) -> list[dict[str, Any]]:
        if self.codec == "none":
            return []
        settings = {"zstd": _ZSTD, "gzip": _GZIP, "blosc": self._blosc("shuffle")}[self.codec]
        return [{"name": self.codec, "configuration": settings}]

    def _blosc(self, shuffle: str | int) -> dict[str, Any]:
        return {"typesize": self.dtype.itemsize, "cname": "zstd", "clevel": 5, "shuffle": shuffle, "blocksize": 0}

    def encode(self, data: NDArray[Any]) -> EncodedChunk:
        """The bytes of a chunk file: the rows, compressed where asked, and their CRC-32C.

        Args:
            data: (rows per chunk, *row shape), C-contiguous, of the array's dtype.
        """
        body: Any = data.reshape(-1).view(np.uint8)
        if self.codec == "zstd":
            body = numcodecs.Zstd(**_ZSTD).encode(data)
        elif self.codec == "gzip":
            body = numcodecs.GZip(**_GZIP).encode(data)
        elif self.codec == "blosc":
            body = numcodecs.Blosc(**self._blosc(numcodecs.Blosc.SHUFFLE)).encode(data)
        body = np.frombuffer(body, np.uint8)
        checksum = google_crc32c.value(body)
        tail = checksum.to_bytes(CHECKSUM_BYTES, "little")
        sha256 = hashlib.sha256(body)
        sha256.update(tail)
        return EncodedChunk((body, tail), ChunkRecord(len(body) + CHECKSUM_BYTES, checksum, sha256.digest()))

    def decode(self, content: bytes) -> NDArray[Any]:
        """The rows of a chunk file whose checksum was compared before; read-only.

        Raises:
            CorruptionError: the bytes are not a chunk of this array.
        """
        body: Any = memoryview(content)[:-CHECKSUM_BYTES]
        try:
            if self.codec in ("zstd", "gzip", "blosc"):
                body = getattr(numcodecs, {"zstd": "Zstd", "gzip": "GZip", "blosc": "Blosc"}[self.codec])().decode(body)
            return np.frombuffer(body, self.dtype).reshape(self.chunk_shape)
        except (RuntimeError, ValueError, OSError, EOFError) as error:
            raise CorruptionError(f"array {self.name}: can't decode a chunk: {error}") from error


class ChunkRecord(NamedTuple):
    """What the index knows of a chunk file: its size in bytes, CRC-32C (its last four bytes) and SHA-256."""

    size: int
    crc32c: int
    sha256: bytes


class EncodedChunk(NamedTuple):
    """A chunk file in parts, and its record."""

    parts: tuple[NDArray[np.uint8], bytes]
    record: ChunkRecord


def inspect_chunk(content: bytes) -> tuple[ChunkRecord, bool]:
    """The record that a chunk file's content would have, and whether its last four bytes are its checksum."""
    tail = int.from_bytes(content[-CHECKSUM_BYTES:], "little")
    sound = len(content) > CHECKSUM_BYTES and google_crc32c.value(content[:-CHECKSUM_BYTES]) == tail
    return ChunkRecord(len(content), tail, hashlib.sha256(content).digest()), sound


@dataclass(frozen=True)
class Layout:
    """How a recipe's features lie on disk: fixed when the recipe is added."""

    taps: Mapping[str, tuple[tuple[int, ...], tuple[str, ...]]]
    dtype: str
    codec: str
    rows_per_chunk: int
    replicas: bool

    @classmethod
    def create(
        cls,
        recipe: Recipe,
        taps: Mapping[str, tuple[Iterable[int], Iterable[str]]],
        codec: str,
        rows_per_chunk: int | None,
    ) -> Layout:
        """The layout for a recipe, its parts checked.

        Args:
            recipe: says the storage dtype and whether there are replicas.
            taps: for each tap of the recipe the shape of a row and the names of its dimensions.
            codec: `none`, `zstd`, `blosc` or `gzip`; a CRC-32C always follows.
            rows_per_chunk: None for as many as make 8 MiB in the widest tap, from 1 to 4,096.

        Raises:
            InputError: names what doesn't fit.
        """
        problems = []
        shapes = {name: (tuple(int(n) for n in shape), tuple(dims)) for name, (shape, dims) in taps.items()}
        if set(shapes) != set(recipe.tap_names):
            problems.append(f"shapes are given for {sorted(shapes)}, the recipe has {list(recipe.tap_names)}")
        folded = [name.lower() for name in [*shapes, KEY, REPLICA]]
        for name, (shape, dims) in shapes.items():
            if not _NAME.fullmatch(name) or name.startswith((".", "__")):
                problems.append(
                    f"tap {name!r}: a name has up to 120 letters, digits or any of . _ @ - and no leading dot"
                )
            if folded.count(name.lower()) > 1:
                problems.append(f"tap {name!r}: another array has this name, or one that differs in case only")
            if not shape or min(shape) < 1 or len(shape) != len(dims) or len(set(dims) | {"rows"}) != len(dims) + 1:
                problems.append(f"tap {name!r}: shape {shape} with dimensions {dims} is not the shape of a row")
        if codec not in CODECS:
            problems.append(f"codec {codec!r} is unknown.{did_you_mean(codec, CODECS)} Known: {', '.join(CODECS)}.")
        if recipe.storage_dtype not in DTYPES:
            problems.append(f"storage dtype {recipe.storage_dtype!r}: use float16 or float32")
        if rows_per_chunk is not None and not 1 <= rows_per_chunk <= MOST_CHUNK_ROWS:
            problems.append(f"rows per chunk {rows_per_chunk}: must be from 1 to {MOST_CHUNK_ROWS}")
        if problems:
            raise InputError.from_problems(f"recipe {recipe.id} can't be stored", problems)
        size = np.dtype(recipe.storage_dtype).itemsize
        widest = max(math.prod(shape) * size for shape, _ in shapes.values())
        rows = rows_per_chunk or min(max(CHUNK_BYTES // widest, 1), LARGEST_CHUNK_ROWS)
        ordered = {name: shapes[name] for name in recipe.tap_names}
        return cls(ordered, recipe.storage_dtype, codec, rows, recipe.has_replicas)

    def arrays(self) -> dict[str, ArraySpec]:
        """All arrays of the group: the taps, `key`, and `replica` where there are replicas."""
        sizes: dict[str, set[int]] = {}
        for shape, dims in self.taps.values():
            for dim, n in zip(dims, shape, strict=True):
                sizes.setdefault(dim, set()).add(n)
        specs = {}
        for name, (shape, dims) in self.taps.items():
            # For xarray a dimension has one size in a group: taps of other widths get `features_512`, `features_1024`.
            unique = tuple(d if len(sizes[d]) == 1 else f"{d}_{n}" for d, n in zip(dims, shape, strict=True))
            specs[name] = ArraySpec(
                name, shape, np.dtype(f"<{np.dtype(self.dtype).str[1:]}"), unique, self.codec, self.rows_per_chunk
            )
        if self.replicas:
            specs[REPLICA] = ArraySpec(REPLICA, (), np.dtype("<i4"), (), "none", self.rows_per_chunk)
        specs[KEY] = ArraySpec(KEY, (KEY_BYTES,), np.dtype("u1"), ("key_bytes",), "none", self.rows_per_chunk)
        return specs

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        taps = {name: {"shape": list(shape), "dims": list(dims)} for name, (shape, dims) in self.taps.items()}
        return {
            "taps": taps,
            "dtype": self.dtype,
            "codec": self.codec,
            "rows_per_chunk": self.rows_per_chunk,
            "replicas": self.replicas,
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Layout:
        """The layout that `to_json` described.

        Raises:
            ValueError: it can't be one; a flipped bit, for which nothing but this looks.
            KeyError: a part is missing. TypeError, AttributeError: a part is of another kind.
        """
        taps = {name: (tuple(tap["shape"]), tuple(tap["dims"])) for name, tap in values["taps"].items()}
        found = cls(taps, values["dtype"], values["codec"], int(values["rows_per_chunk"]), bool(values["replicas"]))
        sound = found.dtype in DTYPES and found.codec in CODECS and 1 <= found.rows_per_chunk <= MOST_CHUNK_ROWS
        if not sound or not all(shape and min(shape) >= 1 and len(shape) == len(dims) for shape, dims in taps.values()):
            raise ValueError(f"no layout: {values}")
        return found


def root_document(uuid: str, generation: int, required_features: Iterable[str]) -> dict[str, Any]:
    """zarr.json of features.zarr."""
    attributes = {
        "software": "featurecache",
        "format": FORMAT,
        "required_features": list(required_features),
        "uuid": uuid,
        "generation": generation,
    }
    return {"zarr_format": 3, "node_type": "group", "attributes": attributes}


def feature_list(value: Any) -> tuple[str, ...]:
    """The names in a list of required features.

    Raises:
        ValueError: it is no list of names.
    """
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise ValueError(f"required_features is {value!r}, which is no list of names")
    return tuple(value)


def agrees(found: Any, expected: Mapping[str, Any]) -> bool:
    """Whether a zarr.json holds what is expected; attributes that a newer version added don't count."""
    plain = json.loads(json.dumps(expected))  # so that tuples and whole floats compare as they are read
    if not isinstance(found, dict) or not isinstance(found.get("attributes"), dict):
        return False
    known = {name: value for name, value in found["attributes"].items() if name in plain["attributes"]}
    return bool({**found, "attributes": known} == plain)


def group_document(
    recipe: Recipe, layout: Layout, canary: Mapping[str, Any] | None, recorded: Mapping[str, Any]
) -> dict[str, Any]:
    """zarr.json of a recipe's group: the whole recipe, readable, the canary, and what is recorded but not hashed."""
    attributes = {
        "format": FORMAT,
        "digest": recipe.digest,
        "base": recipe.base,
        "recipe": recipe.to_json(),
        "layout": layout.to_json(),
        "canary": canary,
        "recorded": dict(recorded),
    }
    return {"zarr_format": 3, "node_type": "group", "attributes": attributes}


def to_bytes(document: Mapping[str, Any]) -> bytes:
    """A metadata document as it is written."""
    return json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False).encode("utf-8")


def grown(capacity: int, needed: int) -> int:
    """Chunks that a shape should have room for, in doubling steps, so that it changes rarely."""
    capacity = max(capacity, FIRST_CAPACITY)
    while capacity < needed:
        capacity *= 2
    return capacity
