import pickle

import numpy as np
import pytest
import torch
from stage_two import WIDTH, features_of, samples, write_store
from torch.utils.data import DataLoader

from featurecache.dataset import FeatureDataset
from featurecache.errors import InputError
from featurecache.features import feature_names, present
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


@pytest.mark.parametrize("memory", ["auto", 0])
def test_in_ram_and_from_disk_alike(store, memory):
    dataset = FeatureDataset(store, dataset="m", target="label", memory=memory)
    assert dataset.features.in_ram == (memory == "auto")
    rows = np.array([5, 3, 3, 70])
    np.testing.assert_array_equal(dataset.features[rows], expected(dataset)[rows])
    x, y = dataset[7]
    assert x.dtype == torch.float32
    np.testing.assert_array_equal(x.numpy(), expected(dataset)[7])
    assert int(y) == 1


@pytest.mark.parametrize("memory", ["auto", 0])
def test_dataloader_with_workers_equals_plain_indexing(store, memory):
    dataset = FeatureDataset(store, dataset="m", target="label", memory=memory)
    x, y = dataset.numpy() if memory == 0 else (expected(dataset), dataset.target.values)
    batches = list(DataLoader(dataset, batch_size=16, num_workers=2))
    np.testing.assert_array_equal(torch.cat([batch[0] for batch in batches]).numpy(), x)
    np.testing.assert_array_equal(torch.cat([batch[1] for batch in batches]).numpy(), y)


def test_it_pickles_without_the_features_and_reads_them_again(dataset):
    dataset.numpy()
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
