"""Damage to chunk files: never wrong numbers, never zeros, and the samples are named."""

import os
import shutil

import numpy as np
import pytest

from featurecache.errors import CorruptionError
from featurecache.store.format import CODECS
from featurecache.store.store import FeatureStore

TAP = "penultimate@none"


def read_all(filled, kit, tap=TAP):
    store = FeatureStore(filled.path)
    return store.read(filled.recipe.id, tap, store.rows(filled.recipe.id, kit.keys(filled.numbers)))


def delete(path, filled):
    path.unlink()
    return "the file is missing"


def truncate(path, filled):
    size = path.stat().st_size
    os.truncate(path, size - 5)
    return f"it has {size - 5} bytes instead of {size}"


def flip_middle(path, filled):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)
    return r"its bytes were changed \(the checksum differs\)"


def flip_checksum(path, filled):
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)
    return "it is not the chunk that was committed"


def swap(path, filled):
    """Another valid chunk of the same size (compressed ones may differ in size)."""
    other = filled.chunk(0)
    differ = other.stat().st_size != path.stat().st_size
    shutil.copyfile(other, path)
    return "bytes instead of" if differ else "it is not the chunk that was committed"


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("damage", [delete, truncate, flip_middle, flip_checksum, swap])
def test_damage_is_found_and_the_samples_are_named(tmp_path, kit, codec, damage):
    filled = kit.fill(tmp_path / "store", codec=codec)
    path = filled.chunk(1)
    message = damage(path, filled)
    named = (
        rf"c\.1\.0: .*{message}.* Array penultimate@none, chunk 1 of recipe {filled.recipe.id} holds 16 rows: samples "
    )
    with pytest.raises(
        CorruptionError, match=named + r"bird-16, bird-17, .*and 6 more. `featurecache verify .* --repair`"
    ):
        read_all(filled, kit)
    store = FeatureStore(filled.path)
    np.testing.assert_array_equal(store.read(filled.recipe.id, TAP, np.arange(16)), kit.features(range(16))[TAP])
    with pytest.raises(CorruptionError):  # the second time as well
        store.read(filled.recipe.id, TAP, [20])
    with pytest.raises(CorruptionError):
        store.read(filled.recipe.id, TAP, [20])
    assert len(read_all(filled, kit, "layer4@none")) == 40


@pytest.mark.parametrize("damage", [delete, truncate, flip_middle, flip_checksum])
def test_damage_to_the_keys_is_found_too(filled, kit, damage):
    damage(filled.chunk(1, "key"), filled)
    with pytest.raises(CorruptionError, match="bird-16, bird-17"):
        read_all(filled, kit)


def test_a_chunk_of_an_older_version_of_the_store(tmp_path, kit):
    filled = kit.fill(tmp_path / "store", n=20)
    shutil.copytree(filled.path, tmp_path / "old")
    with FeatureStore(filled.path, write=True) as store, store.appender(filled.recipe.id) as appender:
        appender.append(kit.keys(range(20, 30)), kit.features(range(20, 30)))
    old = tmp_path / "old" / filled.chunk(1).relative_to(filled.path)
    shutil.copyfile(old, filled.chunk(2))
    with pytest.raises(CorruptionError, match="it is not the chunk that was committed"):
        read_all(filled, kit)


def test_an_index_whose_rows_were_changed(filled, kit):
    """A flip in SQLite that no integrity check finds: two rows that changed places."""
    store = FeatureStore(filled.path, write=True)
    with store._index.writing() as connection:
        connection.execute("UPDATE rows SET slot = 999 WHERE row = 3")
        connection.execute("UPDATE rows SET slot = 3 WHERE row = 4")
        connection.execute("UPDATE rows SET slot = 4 WHERE row = 3")
    store.close()
    with pytest.raises(CorruptionError, match="the keys in it are not those of the index"):
        read_all(filled, kit)


@pytest.mark.slow
@pytest.mark.parametrize("codec", CODECS)
def test_every_flipped_bit_is_found(tmp_path, kit, codec):
    filled = kit.fill(tmp_path / "store", codec=codec)
    rng = np.random.default_rng(0)
    for array in (TAP, "layer4@none", "key"):
        path = filled.chunk(0, array)
        good = path.read_bytes()
        for _ in range(40):
            at, bit = int(rng.integers(len(good))), int(rng.integers(8))
            path.write_bytes(good[:at] + bytes([good[at] ^ (1 << bit)]) + good[at + 1 :])
            with pytest.raises(CorruptionError):
                read_all(filled, kit, TAP if array == "key" else array)
        path.write_bytes(good)
    assert len(read_all(filled, kit)) == 40


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_damaged_chunk_stops_a_forked_worker_with_the_samples_named(filled, kit):
    """polars hangs in a forked process once it was used in the parent: naming samples must do without it."""
    kit.binding(filled.recipe.id, [1])
    flip_middle(filled.chunk(1), filled)
    store = FeatureStore(filled.path)
    store.binding("birds").table.filter(store.binding("birds").table["label"] == 1)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            store.read(filled.recipe.id, TAP, [20])
        except CorruptionError as error:
            code = 0 if "bird-16" in str(error) else 2
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
