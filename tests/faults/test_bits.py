"""Cases 5 to 7: flipped bits, truncated, lost, swapped and old files; never wrong features, and a way back."""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from store_kit import Filled, fill, make_binding, make_features, make_keys, make_recipe

from featurecache.errors import CorruptionError, FeatureCacheError, StoreError
from featurecache.store import verify as verify_module
from featurecache.store.format import CODECS
from featurecache.store.rebuild import rebuild_index
from featurecache.store.repair import repair
from featurecache.store.store import FeatureStore
from featurecache.store.verify import Problem, verify

N = 40
KEYS, FEATURES = make_keys(range(N)), make_features(range(N))
REBUILD = ("index", "unknown", "keys", "rows")  # kinds of problems for which the command advises a new index


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(verify_module, "_PATIENCE", 0)


def flip(path: Path, rng: np.random.Generator) -> str:
    content = bytearray(path.read_bytes())
    at, bit = int(rng.integers(len(content))), int(rng.integers(8))
    content[at] ^= 1 << bit
    path.write_bytes(content)
    return f"{path.name}: bit {bit} of byte {at}"


def read_known(filled: Filled) -> int:
    """How many rows a new reader finds; each of them must be right.

    Raises:
        FeatureCacheError: whatever the reader says.
    """
    store = FeatureStore(filled.path)
    try:
        rows = store.rows(filled.recipe.id, KEYS)
        known = np.flatnonzero(rows >= 0)
        for tap, expected in FEATURES.items():
            np.testing.assert_array_equal(store.read(filled.recipe.id, tap, rows[known]), expected[known])
        store.resolve(store.binding("birds"), "side")
        store.info()
        return len(known)
    finally:
        store.close()


# ---- chunk files -----------------------------------------------------------------------------------------------------


def flips_in_chunks(filled: Filled, flips: int, seed: int) -> int:
    """Flip one bit at a time, anywhere in the chunk files; how many were found, by a reader and by verify."""
    rng, found = np.random.default_rng(seed), 0
    chunks = sorted(filled.paths.zarr.rglob("c.*"))
    assert len(chunks) == 9  # three arrays of three chunks
    sizes = np.array([path.stat().st_size for path in chunks])
    for _ in range(flips):
        path = chunks[int(rng.choice(len(chunks), p=sizes / sizes.sum()))]
        good = path.read_bytes()
        where = flip(path, rng)
        with pytest.raises(CorruptionError, match="samples bird-"):
            read_known(filled)
        (problem,) = verify(filled.path).problems
        chunk = int(path.name.split(".")[1])
        assert (problem.kind, problem.array, problem.chunk) == ("chunk", path.parent.name, chunk), where
        assert problem.samples == tuple(f"bird-{n}" for n in range(16 * chunk, min(16 * chunk + 16, N)))
        path.write_bytes(good)
        found += 1
    assert read_known(filled) == N
    return found


@pytest.mark.parametrize("codec", CODECS)
def test_flipped_bits_are_found(ram, codec):
    assert flips_in_chunks(fill(ram / "store", codec=codec), 8, seed=1) == 8


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("codec", CODECS)
def test_three_hundred_flipped_bits_are_found(ram, codec, record):
    record("chunk_flips_found", flips_in_chunks(fill(ram / "store", codec=codec), 300, seed=2))


# ---- a valid chunk that is not the one -------------------------------------------------------------------------------


def another(filled: Filled, ram: Path, codec: str) -> tuple[Path, int, int]:
    return filled.path, 0, 1


def of_another_store(filled: Filled, ram: Path, codec: str) -> tuple[Path, int, int]:
    """The same keys in the same chunk, with features of other images."""
    return fill(ram / "other", codec=codec, shift=1).path, 1, 1


def older(filled: Filled, ram: Path, codec: str) -> tuple[Path, int, int]:
    """Of a backup: the partial chunk whose rows lie in another one since more were added."""
    shutil.copytree(filled.path, ram / "backup")
    with FeatureStore(filled.path, write=True) as store, store.appender(filled.recipe.id) as appender:
        appender.append(make_keys(range(N, N + 8)), make_features(range(N, N + 8)))
    return ram / "backup", 2, 3


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("source", [another, of_another_store, older])
@pytest.mark.parametrize("arrays", [("penultimate@none",), (*FEATURES, "key")], ids=["one array", "all arrays"])
def test_a_chunk_replaced_by_another_valid_one(ram, codec, source, arrays):
    filled = fill(ram / "store", codec=codec)
    origin, chunk, target = source(filled, ram, codec)
    changed = set()
    for array in arrays:
        path = filled.chunk(target, array)
        replacement = origin / path.relative_to(filled.path).with_name(path.name.replace(f"c.{target}", f"c.{chunk}"))
        if replacement.read_bytes() != path.read_bytes():
            shutil.copyfile(replacement, path)
            changed.add(array)
    assert "penultimate@none" in changed
    first = 32 if target == 3 else 16
    with pytest.raises(CorruptionError, match=rf"chunk {target} of recipe .* samples bird-{first}, bird-{first + 1}, "):
        read_known(filled)
    problems = verify(filled.path).problems
    assert {(problem.kind, problem.array, problem.chunk) for problem in problems} == {
        ("chunk", array, target) for array in changed
    }
    store = FeatureStore(filled.path)  # what lies elsewhere can be read as before
    rows = store.rows(filled.recipe.id, KEYS[:16])
    np.testing.assert_array_equal(store.read(filled.recipe.id, "layer4@none", rows), FEATURES["layer4@none"][:16])
    store.close()


# ---- zarr.json and the index -----------------------------------------------------------------------------------------


def contents(filled: Filled) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in filled.paths.zarr.rglob("c.*")}


def way_back(filled: Filled) -> None:
    """Do as verify advises until nothing is wrong but the dataset, which extract binds again."""
    for _ in range(3):
        try:
            problems = verify(filled.path).problems
        except FeatureCacheError as error:  # without an index there is nothing to check
            problems = [Problem("index", str(error))]
        problems = [problem for problem in problems if problem.kind != "dataset"]
        if not problems:
            return
        assert all(problem.message for problem in problems)
        action = rebuild_index if any(problem.kind in REBUILD for problem in problems) else repair
        report = action(filled.path)
        assert report.kept == N, f"{action.__name__} left only {report.kept} rows: {problems[0]}"
    raise AssertionError(f"not repaired: {problems[0]}")


def survives(filled: Filled, where: str) -> bool:
    """After damage to anything but chunk files: never a wrong feature, nothing deleted, and every row comes back.

    Returns:
        Whether a reader or verify said something; what is left in silence must do no harm.
    """
    try:
        said = read_known(filled) < N
    except FeatureCacheError:
        said = True
    try:
        told = not verify(filled.path).ok
    except FeatureCacheError:
        told = True
    assert told or not said, f"{where}: reading fails, and verify finds nothing"
    before = contents(filled)
    try:
        FeatureStore(filled.path, write=True).close()
    except FeatureCacheError:
        pass
    assert contents(filled) == before, f"{where}: opening for writing took chunks away"
    way_back(filled)
    assert contents(filled) == before, f"{where}: repair took sound chunks away"
    with FeatureStore(filled.path, write=True) as store:
        with store.appender(filled.recipe.id) as appender:
            assert appender.append(KEYS, FEATURES) == 0, f"{where}: rows were lost"
        store.bind(make_binding(filled.recipe.id, range(N)), replace=True)
    assert read_known(filled) == N
    assert verify(filled.path).ok
    return told


def metadata(filled: Filled) -> list[Path]:
    return sorted(filled.paths.zarr.rglob("zarr.json"))


def damaged(ram: Path, files: Callable[[Filled], list[Path]], flips: int, seed: int) -> tuple[int, int]:
    """Flip one bit at a time in one of the files: (survived, found)."""
    rng, found = np.random.default_rng(seed), 0
    fill(ram / "before")
    filled = Filled(ram / "store", FILLED_RECIPE, np.arange(N))
    for _ in range(flips):
        shutil.rmtree(filled.path, ignore_errors=True)
        shutil.copytree(ram / "before", filled.path)
        paths = files(filled)
        found += survives(filled, flip(paths[int(rng.integers(len(paths)))], rng))
    return flips, found


FILLED_RECIPE = make_recipe()
FILES = {"zarr.json": metadata, "index.sqlite": lambda filled: [filled.paths.index]}


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_flipped_bits_in_metadata_and_index(ram, name):
    assert damaged(ram, FILES[name], 12, seed=1)[1] >= 1


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", FILES)
def test_many_flipped_bits_in_metadata_and_index(ram, name, record):
    survived, found = damaged(ram, FILES[name], 400, seed=2)
    if name == "zarr.json":
        assert found > 350, "only a generation that became smaller goes unnoticed"
    record(f"{name}_flips_survived", survived)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def cut_to_nothing(path: Path) -> None:
    os.truncate(path, 0)


def garbage(path: Path) -> None:
    path.write_bytes(b"\xa5" * path.stat().st_size)


@pytest.mark.slow
@pytest.mark.parametrize("damage", [Path.unlink, cut, cut_to_nothing, garbage], ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("name", ["root", "group", "tap", "key", "index"])
def test_lost_and_truncated_metadata_and_index(filled, damage, name):
    group = filled.paths.zarr / filled.recipe.id
    path = {
        "root": filled.paths.zarr / "zarr.json",
        "group": group / "zarr.json",
        "tap": group / "layer4@none" / "zarr.json",
        "key": group / "key" / "zarr.json",
        "index": filled.paths.index,
    }[name]
    damage(path)
    if name in ("root", "index"):
        with pytest.raises(FeatureCacheError, match=r"featurecache verify .* --(repair|rebuild-index)"):
            FeatureStore(filled.path)
    assert survives(filled, f"{name} {damage.__name__}")


def test_an_index_from_an_old_copy(filled):
    """Refused by readers and writers; the rows that it doesn't know come back with a new index."""
    old = filled.paths.index.read_bytes()
    with FeatureStore(filled.path, write=True) as store, store.appender(filled.recipe.id) as appender:
        appender.append(make_keys(range(40, 90)), make_features(range(40, 90)))
    before = contents(filled)
    filled.paths.index.write_bytes(old)
    for write in (False, True):
        with pytest.raises(
            StoreError, match=r"is an older copy .* `featurecache verify .* --rebuild-index`; no feature"
        ):
            FeatureStore(filled.path, write=write)
    with pytest.raises(StoreError, match="--rebuild-index"):
        repair(filled.path)
    assert contents(filled) == before
    assert rebuild_index(filled.path).kept == 90
    assert contents(filled) == before
    filled.check(range(90))
    assert verify(filled.path).ok


def changed_page(filled: Filled, table: str, change: Callable[[bytearray], None]) -> None:
    """Change the page of the index where a table or an index of it begins."""
    with contextlib.closing(sqlite3.connect(filled.paths.index)) as connection:
        (page,) = connection.execute("SELECT rootpage FROM sqlite_master WHERE name = ?", (table,)).fetchone()
        (size,) = connection.execute("PRAGMA page_size").fetchone()
    content = bytearray(filled.paths.index.read_bytes())
    part = content[(page - 1) * size : page * size]
    change(part)
    content[(page - 1) * size : page * size] = part
    filled.paths.index.write_bytes(content)


@pytest.mark.parametrize("many", [False, True])
def test_an_index_that_leads_to_another_row(filled, monkeypatch, many):
    """Case 5 for SQLite, which has no checksums: of two keys each leads to the other's row."""
    monkeypatch.setattr("featurecache.store.index._FEW_KEYS", 0 if many else 512)

    def exchange(page: bytearray) -> None:
        at = [page.index(make_keys([n]).tobytes()) + 32 for n in (3, 4)]  # the row's number follows the key
        assert (page[at[0]], page[at[1]]) == (3, 4)
        page[at[0]], page[at[1]] = 4, 3

    changed_page(filled, "rows_by_key", exchange)
    if many:  # these come from the table itself
        assert read_known(filled) == N
    else:
        with pytest.raises(CorruptionError, match=r"leads from the key of one row to another row.* --rebuild-index"):
            read_known(filled)
    assert survives(filled, "rows_by_key")


def test_what_the_index_says_of_a_sound_file(filled):
    """The file is the one that was committed, so that it stays: only a new index is needed."""
    with contextlib.closing(sqlite3.connect(filled.paths.index, isolation_level=None)) as connection:
        connection.execute("UPDATE chunks SET sha256 = zeroblob(32) WHERE chunk = 1 AND array = 'key'")
        connection.execute("UPDATE chunks SET crc32c = crc32c + 1 WHERE chunk = 2 AND array = 'layer4@none'")
    problems = verify(filled.path).problems
    assert {(problem.kind, problem.chunk, problem.array) for problem in problems} == {
        ("index", 1, "key"), ("index", 2, "layer4@none"),
    }  # fmt: skip
    assert "the file is sound, but what the index says of it was changed; samples bird-16" in str(problems[0])
    assert survives(filled, "chunks")


def test_a_damaged_schema_is_told(filled):
    changed = filled.paths.index.read_bytes().replace(b"digest TEXT NOT NULL UNIQUE", b"digesu TEXT NOT NULL UNIQUE")
    filled.paths.index.write_bytes(changed)
    assert "lacks recipes.digest" in str(verify(filled.path).problems[0])
    assert survives(filled, "schema")
