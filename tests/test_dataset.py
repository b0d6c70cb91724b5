import os
import pickle
import signal

import numpy as np
import pytest
import torch
from stage_two import WIDTH, features_of, samples, write_store, write_table
from torch.utils.data import DataLoader

from featurecache.dataset import FeatureDataset
from featurecache.errors import InputError
from featurecache.features.features import as_float32, feature_names, present
from featurecache.features.stored import choose_mode
from featurecache.store.store import FeatureStore


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return write_store(tmp_path_factory.mktemp("plain"))


@pytest.fixture
def dataset(store):
    return FeatureDataset(store, dataset="m", target="label")


def expected(dataset):
    """What the store was filled with, joined by hand."""
    rows = {row["sample_id"]: row for row in samples(80)}
    x = np.full((len(dataset), 2 * WIDTH), np.nan, np.float32)
    for i, name in enumerate(dataset.sample_ids):
        for k, view in enumerate(("a", "b")):
            if rows[name][view]:
                x[i, k * WIDTH : (k + 1) * WIDTH] = features_of(int(name[1:]), view)
    return x


def test_features_of_all_views_side_by_side_and_nan_where_a_view_is_missing(dataset):
    x, y = dataset.numpy()
    np.testing.assert_array_equal(x, expected(dataset))
    assert np.isnan(x).any()
    np.testing.assert_array_equal(dataset.present, present(x, dataset.blocks))
    assert [(b.view, b.tap, b.start, b.stop) for b in dataset.blocks] == [
        ("a", "penultimate@none", 0, WIDTH),
        ("b", "penultimate@none", WIDTH, 2 * WIDTH),
    ]
    assert feature_names(dataset.blocks)[WIDTH] == "b.penultimate@none.0"
    assert y.tolist() == [int(name[1:]) % 2 for name in dataset.sample_ids]


def test_mapped_in_ram_and_streamed_alike(store):
    rows = np.array([5, 3, 3, 70])
    for memory, mode in (("auto", "mapped"), (10**6, "ram"), (0, "streamed")):
        dataset = FeatureDataset(store, dataset="m", target="label", memory=memory)
        assert dataset.features.mode == mode
        np.testing.assert_array_equal(dataset.features[rows], expected(dataset)[rows])
        np.testing.assert_array_equal(dataset.features.gather(rows), expected(dataset)[rows])
        assert dataset.features[rows[:0]].shape == (0, 2 * WIDTH)
        x, y = dataset[7]
        assert x.dtype == torch.float32
        np.testing.assert_array_equal(x.numpy(), expected(dataset)[7])
        assert int(y) == 1
        assert dataset.features.complete(np.flatnonzero(dataset.present.all(axis=1)))
        assert not dataset.features.complete(np.arange(len(dataset)))


@pytest.mark.parametrize("codec", ["none", "zstd"])
def test_an_epoch_is_the_same_however_it_is_read(tmp_path, monkeypatch, codec):
    """Of several groups of chunks; views are missing, and a view's rows lie in their own chunks."""
    monkeypatch.setattr("featurecache.features.features.GROUP_BYTES", 30 * 2 * WIDTH * 2)
    monkeypatch.setattr("featurecache.features.stored.GROUP_BYTES", 30 * 2 * WIDTH * 2)
    monkeypatch.setattr("featurecache.features.stored.SLICE_ROWS", 8)
    monkeypatch.setattr("featurecache.store.format.LARGEST_CHUNK_ROWS", 16)
    path = write_store(tmp_path, storage_dtype="float16", codec=codec)
    found = {}
    for memory in ("auto", 10**6, 0):
        dataset = FeatureDataset(path, dataset="m", target="label", memory=memory)
        stream = dataset.stream(np.arange(3, len(dataset)), batch_size=7, seed=1)
        assert len(stream.groups()) > 1
        for epoch in (0, 1):
            stream.set_epoch(epoch)
            found[dataset.features.mode, epoch] = [torch.cat(part) for part in zip(*stream, strict=True)]
    modes = {mode for mode, _ in found}
    assert modes == ({"mapped", "ram", "streamed"} if codec == "none" else {"ram", "streamed"})
    whole = dataset.numpy()[0][3:]
    for mode, epoch in found:
        x, y = found[mode, epoch]
        np.testing.assert_array_equal(x.numpy(), found["ram", epoch][0].numpy())
        np.testing.assert_array_equal(y.numpy(), found["ram", epoch][1].numpy())
        order = [[np.nan_to_num(rows).tobytes() for rows in some] for some in (x.numpy(), whole)]
        assert sorted(order[0]) == sorted(order[1])
    assert not np.array_equal(found["ram", 0][0], found["ram", 1][0], equal_nan=True)


@pytest.mark.parametrize(
    ("nbytes", "memory", "mappable", "mode"),
    [
        (400, "auto", True, "mapped"),
        (1200, "auto", True, "streamed"),
        (400, "auto", False, "ram"),
        (600, "auto", False, "streamed"),
        (600, 600, True, "ram"),
        (601, 600, True, "streamed"),
    ],
)
def test_memory_picks_how_features_are_read(monkeypatch, nbytes, memory, mappable, mode):
    monkeypatch.setattr("featurecache.features.stored.free_memory", lambda: 1000)
    assert choose_mode(nbytes, memory, mappable=mappable) == mode


def test_compressed_features_are_held_in_ram_and_float16_stays_so(tmp_path, store):
    plain = FeatureDataset(store, dataset="m").numpy()[0]
    packed = FeatureDataset(write_store(tmp_path, storage_dtype="float16", codec="zstd"), dataset="m")
    assert packed.features.mode == "ram"
    x = packed.features.gather(np.arange(80))
    assert x.dtype == packed.features.dtype == np.float16
    assert {array.dtype for array in packed.features._ram.values()} == {np.dtype(np.float16)}
    np.testing.assert_array_equal(x, plain.astype(np.float16))
    assert packed.features.nbytes == 2 * WIDTH * int(packed.present.sum())
    assert packed.features.buffer_rows is None


def test_views_of_recipes_with_other_row_orders(tmp_path):
    """The partner view's rows lie in another recipe, in reverse; a third of them is missing."""
    rows = samples(60, missing=0.3)
    write_store(tmp_path, rows=rows)
    write_store(tmp_path, rows=rows[::-1], precision="bf16", replace={"id": "sample_id"})
    recipes = [info.id for info in FeatureStore(tmp_path / "store").recipes()]
    write_table(tmp_path / "m.csv", rows)  # as the first was bound
    dataset = FeatureDataset(tmp_path / "store", dataset="m", recipe={"a": recipes[0], "b": recipes[1]}, memory=0,
                             manifest=tmp_path / "m.csv")  # fmt: skip
    for i, name in enumerate(dataset.sample_ids):
        assert np.array_equal(dataset.features[np.array([i])][0, :WIDTH], features_of(int(name[1:]), "a"))
        if dataset.present[i, 1]:
            assert np.array_equal(dataset.features[np.array([i])][0, WIDTH:], features_of(int(name[1:]), "b"))
    streamed = torch.cat([x for x, _ in dataset.stream(batch_size=7, seed=3)]).numpy()
    whole = dataset.numpy()[0]
    key = np.nan_to_num(whole).sum(axis=1)
    np.testing.assert_array_equal(streamed[np.argsort(np.nan_to_num(streamed).sum(axis=1))], whole[np.argsort(key)])


@pytest.mark.parametrize("memory", ["auto", 10**6, 0])
def test_dataloader_with_workers_equals_plain_indexing(store, memory):
    dataset = FeatureDataset(store, dataset="m", target="label", memory=memory)
    x, y = dataset.numpy() if memory == 10**6 else (expected(dataset), dataset.target.values)
    loader = DataLoader(dataset, batch_size=16, num_workers=2, persistent_workers=True)
    for _ in range(2):
        batches = list(loader)
        np.testing.assert_array_equal(torch.cat([batch[0] for batch in batches]).numpy(), x)
        np.testing.assert_array_equal(torch.cat([batch[1] for batch in batches]).numpy(), y)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("memory", ["auto", 10**6, 0])
def test_a_forked_process_reads_after_its_parent_has(store, memory):
    """OpenMP would wait there for threads that only the parent has; a DataLoader sees to that, others don't."""
    dataset = FeatureDataset(store, dataset="m", target="label", memory=memory)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        as_float32(np.ones(10**6, np.float16))  # starts the parent's threads
        dataset.numpy()
        child = os.fork()
        if child == 0:
            signal.alarm(20)
            same = np.array_equal(dataset.numpy()[0], expected(dataset), equal_nan=True)
            same = same and len(list(dataset.stream(batch_size=16))) == 5
            os._exit(0 if same and as_float32(np.ones(10**6, np.float16)).all() else 1)
        assert os.waitpid(child, 0)[1] == 0
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


def test_a_stream_of_a_store_brings_every_sample_with_its_target(store):
    dataset = FeatureDataset(store, dataset="m", target="label", memory=0)
    dataset.features.__dict__["_budget"] = 0
    batches = list(dataset.stream(batch_size=16, seed=1))
    x, y = torch.cat([x for x, _ in batches]).numpy(), torch.cat([y for _, y in batches]).numpy()
    place = [int(np.flatnonzero((expected(dataset)[:, :WIDTH] == row[:WIDTH]).all(axis=1))[0]) for row in x]
    assert sorted(place) == list(range(80))
    assert place != list(range(80))
    np.testing.assert_array_equal(x, expected(dataset)[place])
    np.testing.assert_array_equal(y, dataset.target.values[place])


def test_pairs_of_a_dataset(dataset, store):
    first, second, same = dataset.pairs(np.arange(40), fixed=True)[5]
    np.testing.assert_array_equal(first.numpy(), expected(dataset)[5])
    other = int(np.flatnonzero((expected(dataset)[:, :WIDTH] == second.numpy()[:WIDTH]).all(axis=1))[0])
    assert other < 40
    assert same == (dataset.target.values[5] == dataset.target.values[other])
    with pytest.raises(InputError, match="pairs need a target"):
        FeatureDataset(store, dataset="m").pairs()


def test_it_pickles_without_the_features_and_reads_them_again(store):
    dataset = FeatureDataset(store, dataset="m", target="label", memory=10**6)
    dataset.numpy()
    assert dataset.features._ram
    text = pickle.dumps(dataset)
    assert dataset.numpy()[0][0].tobytes() not in text
    np.testing.assert_array_equal(pickle.loads(text).numpy()[0], dataset.numpy()[0])


def test_without_a_target_items_have_none(store):
    dataset = FeatureDataset(store, dataset="m")
    assert dataset.target is None
    assert dataset.numpy()[1] is None
    assert dataset[0][1].numel() == 0
    assert dataset.__getitems__([0, 1])[1][1].numel() == 0


def test_one_view_and_another_order(store):
    dataset = FeatureDataset(store, dataset="m", views=["b", "a"])
    np.testing.assert_array_equal(
        dataset.numpy()[0], np.roll(expected(FeatureDataset(store, dataset="m")), WIDTH, axis=1)
    )
    alone = FeatureDataset(store, dataset="m", views=["b"])
    assert len(alone) == sum(bool(row["b"]) for row in samples(80))
    assert alone.n_dropped == 80 - len(alone)
    assert not np.isnan(alone.numpy()[0]).any()


def test_missing_views_dropped_or_refused(store):
    kept = FeatureDataset(store, dataset="m", missing="drop")
    assert kept.present.all()
    assert len(kept) == sum(bool(row["b"]) for row in samples(80))
    with pytest.raises(InputError, match=r"samples lack one of a, b \(s\d+.* and --missing error refuses that"):
        FeatureDataset(store, dataset="m", missing="error")


def test_content_is_keys_per_sample(store):
    dataset = FeatureDataset(store, dataset="m")
    assert [len(keys) for keys in dataset.content] == dataset.present.sum(axis=1).tolist()


def test_several_taps_are_chosen_by_name_in_the_order_asked_for(tmp_path):
    store = write_store(tmp_path, 12, taps=("penultimate@none", "layer4@avg", "layer4@max"))
    with pytest.raises(InputError, match=r"holds several taps \(.*layer4@avg.*\). Choose with --tap"):
        FeatureDataset(store, dataset="m")
    x = FeatureDataset(store, dataset="m", tap="penultimate").numpy()[0]
    both = FeatureDataset(store, dataset="m", tap=["layer4:max", "penultimate"])
    assert [block.tap for block in both.blocks] == ["layer4@max", "penultimate@none"] * 2
    np.testing.assert_array_equal(both.numpy()[0][:, :WIDTH], 3 * x[:, :WIDTH])
    assert [b.tap for b in FeatureDataset(store, dataset="m", tap="layer4").blocks] == ["layer4@avg", "layer4@max"] * 2
    apart = FeatureDataset(store, dataset="m", tap={"a": "layer4@avg", "b": ["penultimate"]})
    assert [block.tap for block in apart.blocks] == ["layer4@avg", "penultimate@none"]
    with pytest.raises(InputError, match=r"has no tap 'layer3'\. Did you mean 'layer4'"):
        FeatureDataset(store, dataset="m", tap="layer3")
    with pytest.raises(InputError, match=r"--tap: dataset 'm' has no view 'c'\. It has: a, b"):
        FeatureDataset(store, dataset="m", tap={"c": "layer4"})


@pytest.mark.parametrize(("multi", "reduce"), [("mean", np.mean), ("max", np.max), ("first", lambda v, axis: v[0])])
def test_several_images_of_a_view(tmp_path, multi, reduce):
    rows = [
        {"sample_id": f"s{i}", "view": view, "path": f"{view}{10 * i + k}.png", "label": i % 2}
        for i in range(6)
        for view, count in (("a", 1 + i % 3), ("b", 1))
        for k in range(count)
    ]
    options = {"layout": "long", "view_column": "view", "path_column": "path", "multi": multi}
    store = write_store(tmp_path, rows=rows, replace=options)
    x = FeatureDataset(store, dataset="m", memory=0).numpy()[0]
    for i in range(6):
        images = np.stack([features_of(10 * i + k, "a") for k in range(1 + i % 3)])
        np.testing.assert_allclose(x[i, :WIDTH], reduce(images, axis=0), rtol=1e-6)
        np.testing.assert_array_equal(x[i, WIDTH:], features_of(10 * i, "b"))
    np.testing.assert_array_equal(FeatureDataset(store, dataset="m").numpy()[0], x)


def test_a_recipe_can_be_chosen(tmp_path):
    store = write_store(tmp_path, 12, missing=0)
    other = write_store(tmp_path, 12, missing=0, precision="bf16")
    assert other == store
    ids = [info.id for info in FeatureStore(store).recipes()]
    for name in (ids[0], ids[0][:6], {"a": ids[0], "*": ids[0]}):
        dataset = FeatureDataset(store, dataset="m", recipe=name)
        assert {recipe.id for recipe in dataset.recipes.values()} == {ids[0]}
    assert {recipe.id for recipe in FeatureDataset(store, dataset="m").recipes.values()} == {ids[1]}
    with pytest.raises(InputError, match="ffff"):
        FeatureDataset(store, dataset="m", recipe="ffff")
    with pytest.raises(InputError, match="--recipe: dataset 'm' has no view 'c'"):
        FeatureDataset(store, dataset="m", recipe={"c": ids[0]})


def test_what_is_not_yet_extracted_is_no_missing_view(tmp_path):
    store = write_store(tmp_path, 12, missing=0, state={"b3.png": "pending", "b4.png": "pending"})
    with pytest.raises(InputError, match=r"not yet extracted \(2 of view 'b'; samples s003, s004\).*--allow-partial"):
        FeatureDataset(store, dataset="m")
    dataset = FeatureDataset(store, dataset="m", allow_partial=True)
    assert dataset.present[[3, 4]].tolist() == [[True, False]] * 2
    assert FeatureDataset(store, dataset="m", views=["a"]).present.all()


def test_failed_images_count_as_missing_and_are_listed(tmp_path):
    store = write_store(tmp_path, 12, missing=0, state={"b3.png": "failed"})
    dataset = FeatureDataset(store, dataset="m")
    assert dataset.failed == {"a": [], "b": ["s003"]}
    assert dataset.present[3].tolist() == [True, False]
    assert np.isnan(dataset.numpy()[0][3, WIDTH:]).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dataset": "n"}, "no dataset 'n' in this store. It holds: m"),
        ({"views": ["a", "bb"]}, "has no view 'bb'. Did you mean 'b'"),
        ({"views": ["a", "a"]}, "a given twice"),
        ({"target": "labl"}, "no column 'labl'. Did you mean 'label'"),
        ({"target": "kind", "task": "binary"}, "binary needs two classes, but there are 3"),
    ],
)
def test_what_is_wrong_is_named_with_what_is_near(store, options, message):
    with pytest.raises(InputError, match=message):
        FeatureDataset(store, **{"dataset": "m", **options})


def test_no_features_at_all(tmp_path):
    store = write_store(tmp_path, 4, missing=0, state={f"b{i}.png": "failed" for i in range(4)})
    with pytest.raises(InputError, match="no sample has features of b"):
        FeatureDataset(store, dataset="m", views=["b"])


def test_long_layout_says_why_a_column_is_not_there(tmp_path):
    rows = [
        {"sample_id": f"s{i}", "view": view, "path": f"{view}{i}.png", "dose": f"{i}{view}", "label": i % 2}
        for i in range(6)
        for view in "ab"
    ]
    store = write_store(tmp_path, rows=rows, replace={"layout": "long", "view_column": "view", "path_column": "path"})
    assert FeatureDataset(store, dataset="m", target="label").target.task == "binary"
    with pytest.raises(InputError, match=r"no column 'dose'(.|\n)*differs between the rows of a sample"):
        FeatureDataset(store, dataset="m", target="dose")
