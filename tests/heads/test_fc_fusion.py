from dataclasses import replace

import numpy as np
import pytest

from featurecache.errors import InputError
from featurecache.features.features import ArrayFeatures, Block
from featurecache.fusion import fusion_names
from featurecache.heads.base import load_head
from featurecache.heads.contract import Problem, make_problem
from featurecache.heads.fc import FCHead

MAPS = (Block("front", "m@rows", 0, 6, (2, 3)), Block("side", "m@rows", 6, 12, (2, 3)))


def two_views(missing=0.2):
    """Views of one width, and a target that follows from both."""
    made = make_problem("binary", missing=0.0)
    x = made.x[:, :12].copy()
    rng = np.random.default_rng(0)
    target = replace(made.target, values=(x[:, 0] * x[:, 6] + 0.2 * x[:, 1] > 0).astype(np.int64))
    x[rng.random(len(x)) < missing, 6:] = np.nan
    return Problem(ArrayFeatures(x, MAPS), target)


@pytest.mark.parametrize("name", fusion_names())
def test_every_fusion_trains_on_cached_rows_and_is_saved_with_the_head(tmp_path, name):
    data = two_views()
    settings = {"fusion": name, "epochs": 12, "hidden": [16], "view_dropout": 0.0 if name == "concat" else 0.1}
    head = FCHead(settings).fit(data.train, data.valid)
    assert head.history_[-1]["train_loss"] < head.history_[0]["train_loss"]
    scores = head.scores(data.x)
    assert np.isfinite(scores).all()
    head.save(tmp_path)
    loaded = load_head(tmp_path)
    assert loaded.settings.fusion == name
    assert np.array_equal(loaded.scores(data.x), scores)
    assert loaded.module.indicators


def test_a_product_is_learnt_where_the_fusion_gives_it():
    data = two_views(missing=0.0)
    found = FCHead({"fusion": "difference-product", "epochs": 30, "hidden": []}).fit(data.train, data.valid)
    plain = FCHead({"epochs": 30, "hidden": []}).fit(data.train, data.valid)
    right = [np.mean(head.predict(data.x) == data.target.values) for head in (found, plain)]
    assert right[0] > right[1] + 0.15


def test_fusions_that_do_not_fit_are_refused():
    data = two_views()
    with pytest.raises(InputError, match=r"unknown fusion 'spatail'\. Did you mean 'spatial'"):
        FCHead({"fusion": "spatail"})
    with pytest.raises(InputError, match="leave the head's setting pool at none"):
        FCHead({"fusion": "spatial", "pool": "avg"}).fit(data.train)
