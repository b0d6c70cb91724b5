import json
import warnings

import google_crc32c
import numpy as np
import pytest
import xarray
import zarr

from featurecache.errors import CorruptionError, InputError
from featurecache.store.format import CODECS, Layout, grown, inspect_chunk
from featurecache.store.recipe import Recipe
from featurecache.store.store import FeatureStore

SPEC_CODECS = {"bytes", "zstd", "blosc", "gzip", "crc32c"}


@pytest.mark.parametrize("codec", CODECS)
def test_plain_zarr_and_xarray_read_without_warnings(tmp_path, kit, codec):
    filled = kit.fill(tmp_path / "store", codec=codec)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        root = zarr.open_group(filled.paths.zarr, mode="r")
        group = root[filled.recipe.id]
        data = xarray.open_zarr(filled.paths.zarr, group=filled.recipe.id, consolidated=False)
        loaded = data.load()
    slots = FeatureStore(filled.path).slots(filled.recipe.id, np.arange(40))
    keys = group["key"][:]
    np.testing.assert_array_equal(keys[slots], kit.keys(filled.numbers))
    assert not np.delete(keys, slots, axis=0).any()
    for tap, expected in kit.features(filled.numbers).items():
        np.testing.assert_array_equal(group[tap][:][slots], expected)
        np.testing.assert_array_equal(loaded[tap].values[slots], expected)
        assert group[tap].dtype == np.float16
    assert loaded["penultimate@none"].dims == ("rows", "features")
    assert loaded["layer4@none"].dims == ("rows", "channels", "height", "width")
    assert loaded["key"].dims == ("rows", "key_bytes")
    assert root.attrs["format"] == 1
    assert Recipe.from_json(group.attrs["recipe"]) == filled.recipe


@pytest.mark.parametrize("codec", CODECS)
def test_only_codecs_of_the_specification_and_the_checksum_last(tmp_path, kit, codec):
    filled = kit.fill(tmp_path / "store", codec=codec)
    for path in filled.paths.zarr.glob("*/*/zarr.json"):
        document = json.loads(path.read_bytes())
        names = [entry["name"] for entry in document["codecs"]]
        assert set(names) <= SPEC_CODECS
        assert names[-1] == "crc32c"
        assert document["chunk_key_encoding"]["configuration"]["separator"] == "."


@pytest.mark.parametrize("codec", CODECS)
def test_zarr_reads_what_we_write_and_we_read_what_zarr_writes(tmp_path, kit, codec):
    layout = Layout.create(kit.recipe(), kit.TAPS, codec, 8)
    spec = layout.arrays()["layer4@none"]
    rng = np.random.default_rng(0)
    rows = rng.standard_normal(spec.chunk_shape).astype(np.float16)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "zarr.json").write_bytes(json.dumps(spec.document(2)).encode())
    encoded = spec.encode(rows)
    (tmp_path / "a" / spec.chunk_name(0)).write_bytes(b"".join(bytes(part) for part in encoded.parts))
    array = zarr.open_array(tmp_path / "a", mode="r+")
    np.testing.assert_array_equal(array[:8], rows)
    array[8:] = rows[::-1]
    content = (tmp_path / "a" / spec.chunk_name(1)).read_bytes()
    record, sound = inspect_chunk(content)
    assert sound
    assert record.size == len(content)
    np.testing.assert_array_equal(spec.decode(content), rows[::-1])


def test_an_uncompressed_chunk_is_the_array_and_four_bytes(filled, kit):
    content = filled.chunk(0).read_bytes()
    expected = kit.features(np.arange(16))["penultimate@none"].tobytes()
    assert content[:-4] == expected
    assert int.from_bytes(content[-4:], "little") == google_crc32c.value(expected)


def test_a_chunk_that_can_not_be_decoded_is_an_error(kit):
    spec = Layout.create(kit.recipe(), kit.TAPS, "zstd", 8).arrays()["penultimate@none"]
    with pytest.raises(CorruptionError, match="array penultimate@none: can't decode a chunk"):
        spec.decode(b"not zstd at all")


def test_rows_per_chunk_follow_the_widest_tap(kit):
    def rows(shape, dtype="float16"):
        recipe = Recipe({"storage_dtype": dtype}, ({"name": "a@none"},))
        return Layout.create(
            recipe, {"a@none": (shape, [f"d{i}" for i in range(len(shape))])}, "none", None
        ).rows_per_chunk

    assert rows((1024,)) == 4096
    assert rows((2048,)) == 2048
    assert rows((1024, 7, 7)) == 83
    assert rows((1024, 7, 7), "float32") == 41
    assert rows((64, 512, 512)) == 1  # a row wider than 8 MiB has a chunk of its own
    assert rows((3,)) == 4096


def test_taps_of_different_width_have_dimensions_of_their_own():
    recipe = Recipe({}, ({"name": "a@avg"}, {"name": "b@avg"}, {"name": "c@avg"}))
    shapes = {"a@avg": ((4,), ("features",)), "b@avg": ((8,), ("features",)), "c@avg": ((8,), ("features",))}
    arrays = Layout.create(recipe, shapes, "none", 2).arrays()
    assert [arrays[name].dims for name in shapes] == [("features_4",), ("features_8",), ("features_8",)]


def test_shapes_grow_in_doubling_steps():
    assert [grown(0, n) for n in (0, 1, 4, 5, 9, 1000)] == [4, 4, 4, 8, 16, 1024]
    assert grown(64, 3) == 64


@pytest.mark.parametrize(
    ("names", "shape", "options", "message"),
    [
        (["a b@none"], (4,), {}, "a name has up to 120 letters, digits"),
        ([".a"], (4,), {}, "no leading dot"),
        (["Key"], (4,), {}, "another array has this name, or one that differs in case only"),
        (["Layer@avg", "layer@avg"], (4,), {}, "differs in case only"),
        (["a@none"], (), {}, r"shape \(\) with dimensions \(\) is not the shape of a row"),
        (["a@none"], (0,), {}, r"shape \(0,\)"),
        (["a@none"], (4,), {"codec": "zst"}, "codec 'zst' is unknown. Did you mean 'zstd'?"),
        (["a@none"], (4,), {"rows": 0}, "rows per chunk 0: must be from 1 to 1048576"),
        (["a@none"], (4,), {"dtype": "int8"}, "storage dtype 'int8': use float16 or float32"),
    ],
)
def test_what_can_not_be_stored_is_refused(names, shape, options, message):
    recipe = Recipe({"storage_dtype": options.get("dtype", "float16")}, tuple({"name": name} for name in names))
    taps = {name: (shape, [f"d{i}" for i in range(len(shape))]) for name in names}
    with pytest.raises(InputError, match=message):
        Layout.create(recipe, taps, options.get("codec", "none"), options.get("rows"))


def test_shapes_of_other_taps_are_refused(kit):
    with pytest.raises(
        InputError, match=r"shapes are given for \['x'\], the recipe has \['layer4@none', 'penultimate@none'\]"
    ):
        Layout.create(kit.recipe(), {"x": ((2,), ("features",))}, "none", None)


def test_features_dot_zarr_holds_nothing_that_zarr_does_not_know(filled, kit):
    with FeatureStore(filled.path, write=True) as store, store.appender(filled.recipe.id) as appender:
        for n in range(40, 90, 5):
            appender.append(kit.keys(range(n, n + 5)), kit.features(range(n, n + 5)))
            appender.flush()
    for path in filled.paths.zarr.rglob("*"):
        if path.is_file():
            assert path.name == "zarr.json" or path.name.startswith("c."), path
    filled.check(range(90))
