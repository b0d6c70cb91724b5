"""Looking many keys up at once, where the first bytes of keys are the same, and replicas too."""

import numpy as np

from featurecache.store.store import FeatureStore


def test_keys_that_begin_alike_are_told_apart(tmp_path, kit):
    recipe = kit.recipe(augmentation={"seed": 1})
    keys = kit.keys(range(300))
    keys[100:, :8] = keys[0, :8]
    keys[200:, :31] = keys[0, :31]
    keys[200:, 31] = np.arange(100)
    stored = np.repeat(np.arange(0, 300, 2), 2)
    replicas = np.tile(np.array([0, 1], np.int32), 150)
    with FeatureStore(tmp_path / "store", write=True) as store:
        store.add_recipe(recipe, kit.TAPS, rows_per_chunk=64)
        with store.appender(recipe.id) as appender:
            appender.append(keys[stored], kit.features(stored), replicas)
        asked = np.concatenate([np.arange(300)[::-1], np.arange(300)])
        numbers = np.repeat(np.array([1, 0], np.int32), 300)
        many = store.rows(recipe.id, keys[asked], numbers)
        one_by_one = [
            int(store.rows(recipe.id, keys[[key]], number)[0]) for key, number in zip(asked, numbers, strict=True)
        ]
        assert many.tolist() == one_by_one
        assert ((many >= 0) == (asked % 2 == 0)).all()
        assert (store.rows(recipe.id, keys[asked], numbers + 2) == -1).all()
