import os
import pickle
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import store_kit
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from featurecache.errors import InputError, LockedError, MissingFileError, StoreError
from featurecache.store import appender as appender_module
from featurecache.store import files, windows
from featurecache.store.format import CODECS
from featurecache.store.recipe import Recipe
from featurecache.store.store import FeatureStore

TAP = "penultimate@none"
PLUGINS = Path(store_kit.__file__).parent


def snapshot(path: Path) -> dict[str, tuple[int, int]]:
    return {str(p): (p.stat().st_mtime_ns, p.stat().st_size) for p in [path, *path.rglob("*")]}


# ---- rows ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", CODECS)
def test_rows_come_back_in_the_order_asked_for(tmp_path, kit, codec):
    filled = kit.fill(tmp_path / "store", codec=codec)
    filled.check()
    store = FeatureStore(filled.path)
    wanted = np.array([39, 0, 16, 15, 16, 3])
    np.testing.assert_array_equal(store.read(filled.recipe.id, TAP, wanted), kit.features(wanted)[TAP])
    assert store.read(filled.recipe.id, "layer4@none", []).shape == (0, 2, 3, 3)
    assert store.read(filled.recipe.id, TAP, wanted).flags.writeable


def test_unknown_keys_are_minus_one(filled, kit):
    store = FeatureStore(filled.path)
    np.testing.assert_array_equal(store.rows(filled.recipe.id, kit.keys([3, 99, 5])), [3, -1, 5])
    assert store.rows(filled.recipe.id, np.zeros((0, 32), np.uint8)).shape == (0,)


def test_many_keys_are_found_like_few(tmp_path, kit):
    filled = kit.fill(tmp_path / "store", n=2000, rows_per_chunk=256)
    store = FeatureStore(filled.path)
    wanted = np.random.default_rng(0).integers(0, 4000, 3000)
    expected = np.where(wanted < 2000, wanted, -1)
    np.testing.assert_array_equal(store.rows(filled.recipe.id, kit.keys(wanted)), expected)
    np.testing.assert_array_equal(store.rows(filled.recipe.id, kit.keys(wanted[:50])), expected[:50])


def test_row_ids_stay_when_a_partial_chunk_is_rewritten(tmp_path, kit):
    filled = kit.fill(tmp_path / "store", n=5)
    reader = FeatureStore(filled.path)
    rows = reader.rows(filled.recipe.id, kit.keys(range(5)))
    before = reader.read(filled.recipe.id, TAP, rows)
    slots = reader.slots(filled.recipe.id, rows)
    with FeatureStore(filled.path, write=True) as writer, writer.appender(filled.recipe.id) as appender:
        appender.append(kit.keys(range(5, 8)), kit.features(range(5, 8)))
    assert not filled.chunk(0).exists()
    assert filled.chunk(1).exists()
    np.testing.assert_array_equal(reader.rows(filled.recipe.id, kit.keys(range(5))), rows)
    np.testing.assert_array_equal(reader.read(filled.recipe.id, TAP, rows), before)
    # A reader that has mapped nothing yet, but read where the rows were before the rewrite, looks them up once more.
    np.testing.assert_array_equal(
        reader.read(filled.recipe.id, "layer4@none", rows), kit.features(range(5))["layer4@none"]
    )
    np.testing.assert_array_equal(reader.slots(filled.recipe.id, rows), slots + 16)
    filled.check(range(8))


def test_at_most_one_partial_chunk_whatever_the_flushes(tmp_path, kit):
    filled = kit.fill(tmp_path / "store", n=1)
    for n in range(1, 40, 3):
        with FeatureStore(filled.path, write=True) as store, store.appender(filled.recipe.id) as appender:
            appender.append(kit.keys(range(n, n + 3)), kit.features(range(n, n + 3)))
    chunks = len(list(filled.chunk(0).parent.glob("c.*")))
    assert chunks == 3
    filled.check(range(40))


def test_commits_fall_due_after_30_seconds(filled, kit, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(appender_module.time, "monotonic", lambda: now[0])
    reader = FeatureStore(filled.path)
    with FeatureStore(filled.path, write=True) as store, store.appender(filled.recipe.id) as appender:
        appender.append(kit.keys([50]), kit.features([50]))
        now[0] += 29
        appender.append(kit.keys([51]), kit.features([51]))
        assert appender.uncommitted == 2
        assert (reader.rows(filled.recipe.id, kit.keys([50, 51])) == -1).all()
        now[0] += 1
        appender.commit_if_due()
        assert appender.uncommitted == 0
        np.testing.assert_array_equal(reader.rows(filled.recipe.id, kit.keys([50, 51])), [40, 41])
        appender.append(kit.keys([52]), kit.features([52]))
        now[0] += 31
        appender.append(kit.keys([53]), kit.features([53]))
        np.testing.assert_array_equal(reader.rows(filled.recipe.id, kit.keys([52, 53])), [42, 43])
    filled.check([*range(40), 50, 51, 52, 53])


def test_the_rest_is_committed_when_an_exception_passes(filled, kit):
    def interrupted() -> None:
        with FeatureStore(filled.path, write=True) as store, store.appender(filled.recipe.id) as appender:
            appender.append(kit.keys([70]), kit.features([70]))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    filled.check([*range(40), 70])


def test_a_store_closed_while_a_thread_writes_to_it(filled, kit, monkeypatch):
    """As after a second Ctrl-C: whoever closes waits for the commit under way, and does not do it again."""
    writing, go_on, ended = threading.Event(), threading.Event(), []

    def wait(step: str) -> None:
        if step == "chunks-synced":
            writing.set()
            assert go_on.wait(10)

    store = FeatureStore(filled.path, write=True)
    appender = store.appender(filled.recipe.id)
    appender.append(kit.keys([70]), kit.features([70]))
    monkeypatch.setattr(files, "hook", wait)
    threads = [threading.Thread(target=lambda end=end: ended.append(end())) for end in (appender.flush, store.close)]
    threads[0].start()
    assert writing.wait(10)
    threads[1].start()
    threads[1].join(0.1)
    assert threads[1].is_alive()
    go_on.set()
    for thread in threads:
        thread.join(10)
    assert ended == [None, None], "neither raised"
    with pytest.raises(StoreError, match="this appender is closed"):
        appender.append(kit.keys([71]), kit.features([71]))
    filled.check([*range(40), 70])


class Interrupted:
    """A connection at which Ctrl-C comes right after a transaction has begun."""

    def __init__(self, connection) -> None:
        self._connection = connection

    def __getattr__(self, name):
        return getattr(self._connection, name)

    def execute(self, statement, *values):
        self._connection.execute(statement, *values)
        if statement.startswith("BEGIN"):
            raise KeyboardInterrupt


@pytest.mark.parametrize("kind", ["reading", "writing"])
def test_ctrl_c_leaves_no_transaction_open(filled, kit, kind):
    with FeatureStore(filled.path, write=True) as store:
        handle = store._index._handle()
        connection, handle.connection = handle.connection, Interrupted(handle.connection)
        with pytest.raises(KeyboardInterrupt), getattr(store._index, kind)():
            pass
        handle.connection = connection
        assert not connection.in_transaction
        with store.appender(filled.recipe.id) as appender:
            appender.append(kit.keys([70]), kit.features([70]))
    filled.check([*range(40), 70])


def test_a_row_is_stored_once(filled, kit):
    with FeatureStore(filled.path, write=True) as store, store.appender(filled.recipe.id) as appender:
        assert appender.append(kit.keys([3, 41, 41, 42]), kit.features([7, 41, 8, 42])) == 2
        assert appender.append(kit.keys([42, 3, 43]), kit.features([9, 9, 43])) == 1
        assert appender.ignored == 4
    filled.check([*range(40), 41, 42, 43])
    assert FeatureStore(filled.path).recipe(filled.recipe.id).rows == 43


def test_zeros_are_features_like_others(filled, kit):
    zeros = {name: np.zeros((16, *shape), np.float16) for name, (shape, _) in kit.TAPS.items()}
    with FeatureStore(filled.path, write=True) as store, store.appender(filled.recipe.id) as appender:
        appender.append(kit.keys(range(100, 116)), zeros)
    store = FeatureStore(filled.path)
    rows = store.rows(filled.recipe.id, kit.keys(range(100, 116)))
    assert (rows >= 0).all()
    np.testing.assert_array_equal(store.read(filled.recipe.id, TAP, rows), 0)
    assert filled.chunk(3).exists()


def test_what_is_not_finite_is_refused_row_by_row(filled, kit):
    numbers = np.arange(200, 206)
    features = kit.features(numbers, "float32")
    features[TAP][1, 2] = np.nan
    features["layer4@none"][3, 0, 1, 1] = -np.inf
    features[TAP][4, 0] = 70000  # finite, but not in float16
    with FeatureStore(filled.path, write=True) as store, store.appender(filled.recipe.id) as appender:
        assert appender.append(kit.keys(numbers), features) == 3
        assert appender.refused == [
            (kit.keys([201])[0].tobytes(), "penultimate@none: features are not finite in float16"),
            (kit.keys([203])[0].tobytes(), "layer4@none: features are not finite in float16"),
            (kit.keys([204])[0].tobytes(), "penultimate@none: features are not finite in float16"),
        ]
    store = FeatureStore(filled.path)
    assert (store.rows(filled.recipe.id, kit.keys(numbers)) >= 0).tolist() == [True, False, True, False, False, True]
    filled.check([*range(40), 200, 202, 205])


def test_replicas_are_rows_of_their_own(tmp_path, kit):
    recipe = kit.recipe(augmentation={"names": ["flip"], "seed": 3})
    with FeatureStore(tmp_path / "s", write=True) as store:
        info = store.add_recipe(recipe, kit.TAPS, rows_per_chunk=4)
        assert info.replicas
        with store.appender(recipe.id) as appender:
            with pytest.raises(InputError, match="this recipe has replicas, each row needs its number"):
                appender.append(kit.keys([1]), kit.features([1]))
            numbers, replicas = np.repeat(np.arange(5), 3), np.tile(np.arange(3), 5)
            appender.append(kit.keys(numbers), kit.features(numbers * 10 + replicas), replicas)
    store = FeatureStore(tmp_path / "s")
    rows = store.rows(recipe.id, kit.keys(numbers), replicas)
    np.testing.assert_array_equal(rows, np.arange(15))
    np.testing.assert_array_equal(store.rows(recipe.id, kit.keys([0, 1]), 2), [2, 5])
    assert store.rows(recipe.id, kit.keys([0]), 3)[0] == -1
    np.testing.assert_array_equal(store.read(recipe.id, TAP, rows), kit.features(numbers * 10 + replicas)[TAP])
    np.testing.assert_array_equal(store.keys(recipe.id)[2], replicas)
    many = np.tile(rows, 60)
    np.testing.assert_array_equal(store.rows(recipe.id, kit.keys(np.tile(numbers, 60)), np.tile(replicas, 60)), many)


def test_a_row_wider_than_a_chunk(tmp_path, kit):
    recipe = Recipe({}, ({"name": "map@none"},))
    shape = (20, 512, 512)
    rows = np.random.default_rng(0).standard_normal((3, *shape)).astype(np.float16)
    with FeatureStore(tmp_path / "s", write=True) as store:
        info = store.add_recipe(recipe, {"map@none": (shape, ("channels", "height", "width"))})
        assert info.rows_per_chunk == 1
        with store.appender(recipe.id) as appender:
            appender.append(kit.keys(range(3)), {"map@none": rows})
    np.testing.assert_array_equal(FeatureStore(tmp_path / "s").read(recipe.id, "map@none", [2, 0]), rows[[2, 0]])


@pytest.mark.parametrize("width", [1, 3, 7, 100, 1001, 4096])
def test_widths_that_do_not_fit_pages_are_mapped_right(tmp_path, kit, width):
    recipe = Recipe({}, ({"name": "a@none"},))
    rows = np.random.default_rng(0).standard_normal((50, width)).astype(np.float16)
    with FeatureStore(tmp_path / "s", write=True) as store:
        store.add_recipe(recipe, {"a@none": ((width,), ("features",))}, rows_per_chunk=7)
        with store.appender(recipe.id) as appender:
            appender.append(kit.keys(range(50)), {"a@none": rows})
    order = np.random.default_rng(1).permutation(np.repeat(np.arange(50), 2))
    np.testing.assert_array_equal(FeatureStore(tmp_path / "s").read(recipe.id, "a@none", order), rows[order])


def test_few_maps_at_a_time(tmp_path, kit, monkeypatch):
    monkeypatch.setattr("featurecache.store.chunks.MOST_MAPS", 4)
    filled = kit.fill(tmp_path / "store", n=100, rows_per_chunk=4)
    store = FeatureStore(filled.path)
    rng = np.random.default_rng(0)
    for _ in range(30):
        wanted = rng.integers(0, 100, 9)
        tap = TAP if rng.random() < 0.5 else "layer4@none"
        np.testing.assert_array_equal(store.read(filled.recipe.id, tap, wanted), kit.features(wanted)[tap])
    wanted = rng.permutation(100)
    np.testing.assert_array_equal(store.read(filled.recipe.id, TAP, wanted), kit.features(wanted)[TAP])
    assert store._reader._maps <= 5


def test_without_maps_chunks_are_read_whole(filled, monkeypatch):
    monkeypatch.setattr(windows, "AVAILABLE", False)
    filled.check()

    def limited(*arguments):
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(windows, "AVAILABLE", True)
    monkeypatch.setattr(windows.Window, "map", limited)
    filled.check()
    monkeypatch.setattr(windows, "_mmap", limited)
    filled.check()


def test_a_writer_that_closes_while_readers_have_the_index_open(filled, kit):
    reader = FeatureStore(filled.path)
    for n in (40, 50):
        with FeatureStore(filled.path, write=True) as store, store.appender(filled.recipe.id) as appender:
            appender.append(kit.keys(range(n, n + 10)), kit.features(range(n, n + 10)))
            rows = reader.rows(filled.recipe.id, kit.keys(range(n)))
            np.testing.assert_array_equal(reader.read(filled.recipe.id, TAP, rows), kit.features(range(n))[TAP])
    filled.check(range(60))
    reader.close()
    FeatureStore(filled.path, write=True).close()
    assert sorted(p.name for p in filled.path.iterdir()) == ["features.zarr", "index.sqlite", "lock"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([0, -1], "1 of 2 ids are negative"),
        ([40], "no row 40; it ever had 40 rows"),
        ([[0]], "need a vector of integer row ids"),
        ([0.5], "need a vector of integer row ids, found float64"),
    ],
)
def test_rows_that_never_were(filled, rows, message):
    with pytest.raises(InputError, match=message):
        FeatureStore(filled.path).read(filled.recipe.id, TAP, rows)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"keys": np.zeros((2, 32), np.uint8)}, "a key of zeros stands for 'no row'"),
        ({"keys": np.ones((2, 31), np.uint8)}, r"need \(n, 32\) uint8, found \(2, 31\) uint8"),
        (
            {"keys": np.ones((3, 32), np.uint8)},
            r"array penultimate@none: need \(3, 6\) numbers, found \(2, 6\) float16",
        ),
        ({"drop": TAP}, r"given for \['layer4@none'\], the recipe has \['layer4@none', 'penultimate@none'\]"),
        ({"replica": [1, 1]}, "this recipe has no replicas"),
        ({"replica": [-1, 0]}, r"need \(2,\) integers from 0"),
    ],
)
def test_appending_what_does_not_fit(filled, kit, change, message):
    features = {name: rows for name, rows in kit.features([60, 61]).items() if name != change.get("drop")}
    with FeatureStore(filled.path, write=True) as store, store.appender(filled.recipe.id) as appender:
        with pytest.raises(InputError, match=message):
            appender.append(change.get("keys", kit.keys([60, 61])), features, change.get("replica"))
    filled.check()


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.tuples(st.lists(st.integers(0, 60), max_size=20), st.sampled_from(["append", "flush", "close", "reopen"])),
        max_size=10,
    ),
    st.sampled_from(CODECS),
    st.integers(1, 9),
)
def test_a_store_is_a_dict(tmp_path_factory, kit, operations, codec, rows_per_chunk):
    path = tmp_path_factory.mktemp("dict") / "store"
    recipe, model = kit.recipe(), {}
    store = FeatureStore(path, write=True)
    store.add_recipe(recipe, kit.TAPS, codec=codec, rows_per_chunk=rows_per_chunk)
    appender = store.appender(recipe.id)
    for salt, (numbers, operation) in enumerate(operations):
        values = np.array(numbers, int) + 100 * salt
        appender.append(kit.keys(numbers), kit.features(values))
        for number, value in zip(numbers, values, strict=True):
            model.setdefault(number, value)
        if operation == "flush":
            appender.flush()
        elif operation == "close":
            appender.close()
            appender = store.appender(recipe.id)
        elif operation == "reopen":
            store.close()
            store = FeatureStore(path, write=True)
            appender = store.appender(recipe.id)
    store.close()
    reader = FeatureStore(path)
    rows = reader.rows(recipe.id, kit.keys(np.arange(61)))
    assert {n for n in range(61) if rows[n] >= 0} == set(model)
    known = np.array(sorted(model), int)
    for tap, expected in kit.features([model[n] for n in known.tolist()]).items():
        np.testing.assert_array_equal(reader.read(recipe.id, tap, rows[known]), expected)
    assert reader.recipe(recipe.id).rows == len(model)
    reader.close()


# ---- recipes ---------------------------------------------------------------------------------------------------------


def test_recipes_of_the_same_base_serve_each_other(tmp_path, kit):
    fields = {"channels": 3}
    a, b = ({"name": "a@avg"}, {"name": "b@avg"})
    shapes = {"a@avg": ((4,), ("features",)), "b@avg": ((8,), ("features",))}
    one, both = Recipe(fields, (a,)), Recipe(fields, (a, b))
    with FeatureStore(tmp_path / "s", write=True) as store:
        store.add_recipe(both, shapes)
        assert [info.recipe for info in store.find(one)] == [both]
        store.add_recipe(one, {"a@avg": shapes["a@avg"]})
        assert [info.recipe for info in store.find(one)] == [one, both]
        assert [info.recipe for info in store.find(both)] == [both]
        assert store.find(Recipe({"channels": 1}, (a,))) == []


def test_adding_a_recipe_again_returns_it(filled, kit):
    with FeatureStore(filled.path, write=True) as store:
        info = store.add_recipe(filled.recipe, kit.TAPS, codec="zstd", rows_per_chunk=99, recorded={"torch": "9"})
        assert (info.rows, info.codec, info.rows_per_chunk, info.recorded) == (40, "none", 16, {})
        other = {**kit.TAPS, "penultimate@none": ((7,), ("features",))}
        with pytest.raises(InputError, match=r"is in the store with the shapes .*\(6,\).* not .*\(7,\)"):
            store.add_recipe(filled.recipe, other)


def test_canary_and_recorded_come_back(tmp_path, kit):
    canary = {"penultimate@none": [[0.1, 1e-9, 3.0]], "tolerance": 1e-3}
    recorded = {"versions": {"torch": "2.14.1"}, "batch_size": 32}
    with FeatureStore(tmp_path / "s", write=True) as store:
        store.add_recipe(kit.recipe(), kit.TAPS, canary=canary, recorded=recorded)
    info = FeatureStore(tmp_path / "s").recipe(kit.recipe().id)
    assert (info.canary, info.recorded) == (canary, recorded)
    assert info.taps["layer4@none"] == ((2, 3, 3), "float16", ("channels", "height", "width"))


def test_recipes_are_named_by_the_first_digits(filled):
    store = FeatureStore(filled.path)
    assert store.recipe(filled.recipe.digest[:5]).recipe == filled.recipe
    assert store.recipe(filled.recipe.digest).id == filled.recipe.id
    with pytest.raises(InputError, match=f"no recipe 'zzz'. Recipes of this store: {filled.recipe.id}"):
        store.recipe("zzz")
    with pytest.raises(InputError, match=r"has no tap .layer4.; it has layer4@none, penultimate@none\."):
        store.read(filled.recipe.id, "layer4", [0])


def test_info_tells_everything(filled):
    info = FeatureStore(filled.path).info()
    assert info["format"] == 1
    assert info["recipes"][0]["rows"] == 40
    assert info["recipes"][0]["taps"]["layer4@none"] == {
        "shape": [2, 3, 3], "dtype": "float16", "dims": ["channels", "height", "width"],
    }  # fmt: skip
    assert info["datasets"][0]["name"] == "birds"
    assert info["datasets"][0]["views"]["side"] == {
        "recipe": filled.recipe.id, "done": 40, "absent": 0, "failed": 0, "pending": 0,
    }  # fmt: skip


def test_one_appender_per_recipe(filled):
    with FeatureStore(filled.path, write=True) as store, store.appender(filled.recipe.id) as appender:
        with pytest.raises(StoreError, match="has an open appender; use one for all views"):
            store.appender(filled.recipe.id)
        appender.close()
        with pytest.raises(StoreError, match="this appender is closed"):
            appender.append(np.ones((1, 32), np.uint8), {})
        store.appender(filled.recipe.id).close()


# ---- opening ---------------------------------------------------------------------------------------------------------


def test_what_is_not_a_store(tmp_path):
    with pytest.raises(MissingFileError, match=r"nothing: no such store. `featurecache extract` makes one."):
        FeatureStore(tmp_path / "nothing")
    (tmp_path / "photos").mkdir()
    with pytest.raises(InputError, match=r"photos: not a feature store yet, empty\."):
        FeatureStore(tmp_path / "photos")
    (tmp_path / "photos" / "cat.jpg").touch()
    for write in (False, True):
        with pytest.raises(
            InputError, match=r"not a feature store: it holds cat.jpg, but no features.zarr and index.sqlite."
        ):
            FeatureStore(tmp_path / "photos", write=write)
        with pytest.raises(InputError, match=r"cat\.jpg: not a feature store but a file\."):
            FeatureStore(tmp_path / "photos" / "cat.jpg", write=write)
    assert [p.name for p in (tmp_path / "photos").iterdir()] == ["cat.jpg"]


def test_a_store_can_be_made_in_an_empty_directory(tmp_path):
    with FeatureStore(tmp_path, write=True) as store:
        identity = store.uuid
    assert FeatureStore(tmp_path).uuid == identity
    assert sorted(p.name for p in tmp_path.iterdir()) == ["features.zarr", "index.sqlite", "lock"]


def test_reading_writes_nothing(filled, kit):
    before = snapshot(filled.path)
    store = FeatureStore(filled.path)
    store.info()
    rows = store.rows(filled.recipe.id, kit.keys(range(40)))
    store.read(filled.recipe.id, TAP, rows)
    store.resolve(store.binding("birds"), "side")
    assert snapshot(filled.path) == before
    store.close()
    assert snapshot(filled.path) == before


def test_a_reader_may_not_write(filled, kit):
    store = FeatureStore(filled.path)
    for action in (
        lambda: store.appender(filled.recipe.id),
        lambda: store.add_recipe(kit.recipe(channels=1), kit.TAPS),
        lambda: store.bind(kit.binding(filled.recipe.id, [1])),
        lambda: store.add_failures(filled.recipe.id, []),
        lambda: store.remember_payloads([]),
    ):
        with pytest.raises(
            StoreError, match="opened for reading in this process; open it with write=True to change it"
        ):
            action()


READ_ONLY = """
import os, sys
import numpy as np
from featurecache.store.store import FeatureStore
path, recipe, user = sys.argv[1], sys.argv[2], int(sys.argv[3])
def work():
    store = FeatureStore(path)
    keys = np.zeros((1, 32), np.uint8); keys[:, 0] = 1; keys[:, 31] = 7
    rows = store.rows(recipe, keys)
    value = store.read(recipe, "penultimate@none", rows)[0, 0]
    store.info()
    store.close()
    return value
work()  # everything is imported before rights are given up
if os.geteuid() == 0:
    os.setgroups([]); os.setuid(user)
assert not os.access(path, os.W_OK)
print(work())
"""


@pytest.mark.parametrize("log", [False, True])
def test_a_read_only_directory(tmp_path_factory, kit, log, request):
    import shutil
    import tempfile

    root = Path(tempfile.mkdtemp())  # pytest's own are closed to other users
    request.addfinalizer(lambda: shutil.rmtree(root))
    filled = kit.fill(root / "store")
    if log:  # as a killed writer leaves it: the last commits are in the log only
        script = (
            "import os, sys; sys.path.insert(0, sys.argv[2])\n"
            "from store_kit import *; from featurecache.store.store import *\n"
            "s = FeatureStore(sys.argv[1], write=True); a = s.appender(make_recipe().id)\n"
            "a.append(make_keys(range(40, 60)), make_features(range(40, 60))); os._exit(0)"
        )
        subprocess.run([sys.executable, "-c", script, str(filled.path), str(PLUGINS)], check=True)
        assert (filled.path / "index.sqlite-wal").stat().st_size > 0
        (filled.path / "index.sqlite-shm").unlink()
    root.chmod(0o755)
    for path in filled.path.rglob("*"):
        path.chmod(0o555 if path.is_dir() else 0o444)
    filled.path.chmod(0o555)
    request.addfinalizer(lambda: [p.chmod(0o755) for p in [filled.path, *filled.path.rglob("*")] if p.is_dir()])
    arguments = [sys.executable, "-c", READ_ONLY, str(filled.path), filled.recipe.id, "65534"]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == 7.0


def test_a_moved_store_is_the_same_store(filled, tmp_path, kit):
    identity = FeatureStore(filled.path).uuid
    filled.path = filled.path.rename(tmp_path / "elsewhere with a ?#%20 name")
    assert FeatureStore(filled.path).uuid == identity
    filled.check()


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_pickle_and_fork_open_anew(filled, kit):
    store = FeatureStore(filled.path)
    rows = store.rows(filled.recipe.id, kit.keys(range(40)))
    expected = store.read(filled.recipe.id, TAP, rows)
    again = pickle.loads(pickle.dumps(store))
    assert again._index._current is None
    np.testing.assert_array_equal(again.read(filled.recipe.id, TAP, rows), expected)
    child = os.fork()
    if child == 0:
        try:
            inherited = store._index
            good = np.array_equal(store.read(filled.recipe.id, TAP, rows), expected) and store._index is not inherited
        except BaseException:
            good = False
        os._exit(0 if good else 1)
    assert os.waitpid(child, 0)[1] == 0
    np.testing.assert_array_equal(store.read(filled.recipe.id, TAP, rows), expected)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_child_of_the_writer_reads_and_does_not_write(filled, kit):
    store = FeatureStore(filled.path, write=True)
    appender = store.appender(filled.recipe.id)
    appender.append(kit.keys(range(40, 50)), kit.features(range(40, 50)))
    binding = kit.binding(filled.recipe.id, [1])  # polars may not be called in a forked process
    child = os.fork()
    if child == 0:
        code = 1
        try:
            found = store.rows(filled.recipe.id, kit.keys([0, 39]))
            try:
                store.bind(binding)
            except StoreError:
                store.close()
                code = 0 if found.tolist() == [0, 39] else 2
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
    with pytest.raises(LockedError):  # the child's end has not given the lock back
        FeatureStore(filled.path, write=True)
    appender.close()
    store.close()
    filled.check(range(50))


def test_a_writer_looks_up_while_another_thread_appends(tmp_path, kit):
    recipe = kit.recipe()
    with FeatureStore(tmp_path / "s", write=True) as store:
        store.add_recipe(recipe, kit.TAPS, rows_per_chunk=8)

        def write() -> None:
            with store.appender(recipe.id) as appender:
                for n in range(0, 150, 3):
                    appender.append(kit.keys(range(n, n + 3)), kit.features(range(n, n + 3)))

        thread = threading.Thread(target=write)
        thread.start()
        seen = 0
        while thread.is_alive():
            rows = store.rows(recipe.id, kit.keys(range(150)))
            known = np.flatnonzero(rows >= 0)
            assert len(known) >= seen
            seen = len(known)
            np.testing.assert_array_equal(store.read(recipe.id, TAP, rows[known]), kit.features(known)[TAP])
        thread.join()
    store = FeatureStore(tmp_path / "s")
    assert store.recipe(recipe.id).rows == 150


WRITER = """
import sys; sys.path.insert(0, sys.argv[2])
from store_kit import *
with FeatureStore(sys.argv[1], write=True) as store, store.appender(make_recipe().id) as appender:
    for n in range(40, 130, 3):
        appender.append(make_keys(range(n, n + 3)), make_features(range(n, n + 3)))
        appender.flush()
"""


def test_a_reader_sees_whole_commits_while_another_process_writes(filled, kit):
    arguments = [sys.executable, "-c", WRITER, str(filled.path), str(PLUGINS)]
    writer = subprocess.Popen(arguments)
    store, seen = FeatureStore(filled.path), 40
    while writer.poll() is None:
        rows = store.rows(filled.recipe.id, kit.keys(range(130)))
        known = np.flatnonzero(rows >= 0)
        assert len(known) >= seen
        assert (known == np.arange(len(known))).all()
        seen = len(known)
        for tap, expected in kit.features(known).items():
            np.testing.assert_array_equal(store.read(filled.recipe.id, tap, rows[known]), expected)
    assert writer.returncode == 0
    assert store.rows(filled.recipe.id, kit.keys([129]))[0] == 129
    store.close()
    filled.check(range(130))
