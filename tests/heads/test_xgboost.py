import json
import signal

import numpy as np
import pytest
import torch
import xgboost as xgb

from featurecache.errors import InputError, RunError
from featurecache.features import features as features_module
from featurecache.features.features import ArrayFeatures, Block, feature_names
from featurecache.heads.base import Fold, load_head
from featurecache.heads.importance import importance_record
from featurecache.heads.xgboost import XGBoostHead, column_names

PARAMETERS = {"max_depth": 3, "max_bin": 32, "nthread": 1, "learning_rate": 0.3}
SETTINGS = PARAMETERS | {"n_estimators": 12, "early_stopping_rounds": None}


def trees(booster):
    return [json.loads(tree) for tree in booster.get_dump(dump_format="json", with_stats=True)]


def bare(x, y, *, weight=None, rounds=12, **parameters):
    matrix = xgb.QuantileDMatrix(x, y, max_bin=32, feature_names=FEATURES)
    if weight is not None:
        matrix.set_weight(weight)
    return xgb.train(PARAMETERS | {"tree_method": "hist", "seed": 0} | parameters, matrix, rounds)


FEATURES = feature_names(
    (Block("front", "deep", 0, 6, (6,)), Block("front", "shallow", 6, 9, (3,)), Block("side", "deep", 9, 14, (5,)))
)


@pytest.mark.parametrize("task", ["binary", "multiclass"])
@pytest.mark.parametrize("class_weight", [None, "balanced"])
def test_trees_from_chunks_are_those_of_bare_xgboost(problem, monkeypatch, task, class_weight):
    monkeypatch.setattr(features_module, "MOST_ROWS", 33)  # 140 rows in chunks of 33
    data = problem(task, missing=0.3)
    head = XGBoostHead(SETTINGS | {"class_weight": class_weight}).fit(data.train)
    y = data.train.target.values
    weight = None if class_weight is None else len(y) / (len(np.unique(y)) * np.bincount(y)[y])
    objective = (
        {"objective": "binary:logistic"} if task == "binary" else {"objective": "multi:softprob", "num_class": 3}
    )
    expected = bare(data.x[:140], y, weight=weight, **objective)
    assert trees(head.booster) == trees(expected)
    found = expected.inplace_predict(data.x)
    found = np.stack([1 - found, found], axis=1) if task == "binary" else found
    np.testing.assert_allclose(head.scores(data.x), found, atol=1e-6)


def test_masked_multilabel_equals_one_booster_per_label(problem):
    """On the bins of all rows: what is unknown for a label has no say in its trees."""
    data = problem("multilabel", unknown=0.4, n=400)
    head = XGBoostHead(SETTINGS).fit(data.fold(0, 300))
    known_rows = data.target.known[:300]
    x, values = data.x[:300][known_rows], data.target.values[:300][known_rows]
    for label in range(3):
        y = values[:, label]
        known = ~np.isnan(y)
        booster = bare(
            x, np.nan_to_num(y), weight=known.astype(float), objective="binary:logistic", base_score=y[known].mean()
        )
        np.testing.assert_allclose(head.scores(data.x)[:, label], booster.inplace_predict(data.x), atol=1e-5)


def test_multilabel_class_weights_equal_weights_per_label(problem):
    data = problem("multilabel", n=300)
    head = XGBoostHead(SETTINGS | {"class_weight": {"y0": 5.0}}).fit(data.fold(0, 200))
    y = data.target.values[:200, 0]
    weight = np.where(y == 1, 5.0, 1.0)
    booster = bare(
        data.x[:200], y, weight=weight, objective="binary:logistic", base_score=float(np.average(y, weights=weight))
    )
    np.testing.assert_allclose(head.scores(data.x)[:, 0], booster.inplace_predict(data.x), atol=1e-5)


def test_regression_equals_bare_xgboost(problem):
    data = problem("regression", labels=1)
    head = XGBoostHead(SETTINGS).fit(data.train)
    y = data.train.target.values[:, 0]
    booster = bare(data.x[:140], y, objective="reg:squarederror", base_score=float(y.mean()))
    np.testing.assert_allclose(head.predict(data.x)[:, 0], booster.inplace_predict(data.x), rtol=1e-5)


def test_several_regression_targets_with_unknown_values(problem):
    data = problem("regression", unknown=0.3)
    head = XGBoostHead(SETTINGS).fit(data.train)
    known = ~np.isnan(data.train.target.values)
    error = (head.predict(data.x[:140]) - data.train.target.values)[known]
    assert np.var(error) < 0.3 * np.var(data.train.target.values[known])


@pytest.mark.parametrize("task", ["binary", "multiclass", "multilabel", "regression"])
def test_early_stopping_predicts_with_the_best_round(problem, tmp_path, task):
    data = problem(task, unknown=0.2)
    settings = PARAMETERS | {"n_estimators": 200, "early_stopping_rounds": 5, "learning_rate": 0.5}
    head = XGBoostHead(settings).fit(data.train, data.valid)
    losses = [row["valid_loss"] for row in head.history_]
    assert [row["round"] for row in head.history_] == list(range(1, len(losses) + 1))
    assert head.fitted_["rounds"] == int(np.argmin(losses)) + 1
    assert len(losses) == head.fitted_["rounds"] + 5
    scores, values = head.scores(data.x[data.valid.rows]), data.valid.target.values
    if task in ("binary", "multiclass"):
        known = values >= 0
        found = -np.log(scores[known, values[known]]).mean()
    else:
        known = ~np.isnan(values)
        if task == "multilabel":
            found = -np.log(np.where(values == 1, scores, 1 - scores)[known]).mean()
        else:
            found = ((scores - values) ** 2 / np.nanvar(values, axis=0))[known].mean()
    assert found == pytest.approx(min(losses), rel=1e-4)
    head.save(tmp_path)
    assert load_head(tmp_path).fitted_["rounds"] == head.fitted_["rounds"]


def test_never_more_than_a_chunk_is_read(problem, monkeypatch):
    monkeypatch.setattr(features_module, "MOST_ROWS", 20)
    data, sizes = problem("binary"), []

    class Watched(ArrayFeatures):
        def __getitem__(self, rows):
            sizes.append(len(rows))
            return super().__getitem__(rows)

    features = Watched(data.x, data.features.blocks)
    train = Fold(features, data.train.rows, data.train.target)
    head = XGBoostHead(SETTINGS).fit(train, Fold(features, data.valid.rows, data.valid.target))
    assert max(sizes) == 20
    assert np.array_equal(head.scores(data.x), XGBoostHead(SETTINGS).fit(data.train, data.valid).scores(data.x))


@pytest.mark.parametrize("task", ["binary", "multilabel"])
def test_external_memory_gives_the_same_trees_and_leaves_nothing(problem, monkeypatch, tmp_path, task):
    monkeypatch.setattr(features_module, "MOST_ROWS", 40)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    seen = []
    data = problem(task, missing=0.3, unknown=0.2)
    in_ram = XGBoostHead(SETTINGS).fit(data.train, data.valid)
    head = XGBoostHead(SETTINGS, memory=0)
    head.fit(data.train, data.valid, progress=lambda row: seen.append([p.name for p in tmp_path.rglob("*.page")]))
    assert (in_ram.fitted_["external_memory"], head.fitted_["external_memory"]) == (False, True)
    assert any(name.startswith("train") for name in seen[0])
    assert trees(head.booster) == trees(in_ram.booster)
    assert np.array_equal(head.scores(data.x), in_ram.scores(data.x))
    assert not list(tmp_path.iterdir())


def test_importance_is_the_gain_of_each_column(problem):
    data = problem("binary", missing=0.2)
    head = XGBoostHead(SETTINGS).fit(data.train)
    record, gain = importance_record(head), head.importance()
    assert gain.sum() == pytest.approx(sum(split["gain"] for tree in trees(head.booster) for split in splits(tree)))
    assert record["views"] == pytest.approx({"front": gain[:9].sum() / gain.sum(), "side": gain[9:].sum() / gain.sum()})
    assert record["taps"][0]["share"] == pytest.approx(gain[:6].sum() / gain.sum())
    assert record["features"][0] == {"name": FEATURES[gain.argmax()], "value": gain.max()}
    assert record["kind"] == "total gain of the splits on the feature"
    json.dumps(record)


def splits(node):
    """The inner nodes of a tree."""
    return [] if "leaf" in node else [node, *(split for child in node["children"] for split in splits(child))]


def test_features_are_named_by_view_tap_and_index(problem):
    head = XGBoostHead(SETTINGS).fit(problem("binary").train)
    assert head.booster.feature_names == FEATURES
    assert "front.shallow.2" in FEATURES
    assert column_names((Block("a<b", "t[0]", 0, 1, (1,)),)) == ["a{b.t(0).0"]


def test_the_effective_device_is_recorded(problem):
    assert XGBoostHead(SETTINGS).fit(problem("binary").train).fitted_["device"] == "cpu"
    assert XGBoostHead(SETTINGS, device="mps").fit(problem("binary").train).fitted_["device"] == "cpu"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there(problem):
    with pytest.raises(InputError, match=r"device 'cuda': XGBoost finds no CUDA device here\. Use device 'cpu'\."):
        XGBoostHead(SETTINGS, device="cuda").fit(problem("binary").train)


def test_no_warnings(problem, tmp_path):
    data = problem("multilabel", missing=0.3, unknown=0.2)
    head = XGBoostHead(SETTINGS).fit(data.train, data.valid)
    head.save(tmp_path)
    assert np.array_equal(load_head(tmp_path).scores(data.x), head.scores(data.x))


def test_a_record_that_does_not_fit_the_trees(problem, tmp_path):
    data = problem("multilabel")
    XGBoostHead(SETTINGS).fit(data.train).save(tmp_path)
    record = json.loads((tmp_path / "head.json").read_text())

    def refused(**changes):
        changed = record | {"fitted": record["fitted"] | changes}
        (tmp_path / "head.json").write_text(json.dumps(changed))
        with pytest.raises(RunError) as caught:
            load_head(tmp_path)
        return str(caught.value)

    assert "has 12 rounds, head.json says 13" in refused(rounds=13)
    assert "has 12 rounds, head.json says '3'" in refused(rounds="3")
    assert "'base' of head.json does not hold 3 numbers" in refused(base=[0.5])
    (tmp_path / "head.json").write_text(json.dumps(record | {"names": ["y0", "y1"]}))
    with pytest.raises(RunError, match=r"has 14 features and 3 outputs, head.json 14 and 2"):
        load_head(tmp_path)


@pytest.mark.parametrize("memory", [None, 0])
def test_an_interrupt_while_rows_are_handed_over_ends_the_fit(problem, monkeypatch, tmp_path, memory):
    """XGBoost loses an interrupt in its callback, goes on with fewer rows, and writes beyond its arrays."""
    monkeypatch.setattr(features_module, "MOST_ROWS", 40)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    data = problem("binary")
    before = signal.getsignal(signal.SIGINT)

    class Pressed(ArrayFeatures):
        left = 0

        def __getitem__(self, rows):
            Pressed.left -= 1
            if Pressed.left == 0:
                signal.raise_signal(signal.SIGINT)
            return super().__getitem__(rows)

    features = Pressed(data.x, data.features.blocks)
    Pressed.left = 10**6
    XGBoostHead(SETTINGS, memory=memory).fit(data.fold(0, 140, features), data.fold(140, 190, features))
    reads = 10**6 - Pressed.left
    assert reads > 20  # XGBoost goes through the rows several times
    for number in range(1, reads + 1):
        Pressed.left = number
        with pytest.raises(KeyboardInterrupt):
            XGBoostHead(SETTINGS, memory=memory).fit(data.fold(0, 140, features), data.fold(140, 190, features))
        assert signal.getsignal(signal.SIGINT) is before
    assert not list(tmp_path.iterdir())
