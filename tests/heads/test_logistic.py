import json

import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from featurecache.data.targets import Target
from featurecache.errors import InputError, RunError
from featurecache.features import features as features_module
from featurecache.features.features import ArrayFeatures, Block
from featurecache.heads.base import Fold, load_head
from featurecache.heads.lbfgs import minimise_together
from featurecache.heads.linear_stream import Streamed
from featurecache.heads.logistic import GRID, LogisticHead, standardiser


def reference(x, y, *, c=1.0, class_weight=None):
    model = LogisticRegression(C=c, tol=1e-10, max_iter=10_000, class_weight=class_weight)
    return make_pipeline(StandardScaler(), model).fit(x.astype(np.float64), y)


in_ram_and_streamed = pytest.mark.parametrize("memory", [None, 0])


@pytest.fixture(autouse=True)
def _several_chunks(monkeypatch):
    monkeypatch.setattr(features_module, "MOST_ROWS", 33)


@in_ram_and_streamed
@pytest.mark.parametrize("class_weight", [None, "balanced"])
@pytest.mark.parametrize("task", ["binary", "multiclass"])
@pytest.mark.parametrize("c", [0.01, 1.0, 100.0])
def test_is_the_optimum_of_scikit_learn(problem, task, c, class_weight, memory):
    data = problem(task, unknown=0.2)
    head = LogisticHead({"C": c, "class_weight": class_weight}, memory=memory).fit(data.train)
    assert head.fitted_["streamed"] == (memory == 0)
    assert head.fitted_["converged"]
    known = data.train.target.values >= 0
    x, y = data.x[:140][known], data.train.target.values[known]
    expected = reference(x, y, c=c, class_weight=class_weight)
    np.testing.assert_allclose(head.scores(data.x), expected.predict_proba(data.x), atol=1e-3)
    model = expected[-1]
    z = expected[0].transform(x.astype(np.float64))
    weight = np.ones(len(y))
    if class_weight:
        weight = len(y) / (len(np.unique(y)) * np.bincount(y)[y])

    def objective(coef, intercept):
        raw = z @ coef.T + intercept
        raw = np.hstack([np.zeros_like(raw), raw]) if raw.shape[1] == 1 else raw
        losses = np.logaddexp.reduce(raw, axis=1) - raw[np.arange(len(y)), y]
        return c * (weight * losses).sum() + 0.5 * (coef**2).sum()

    ours = objective(head.arrays["coef"], head.arrays["intercept"])
    assert ours == pytest.approx(objective(model.coef_, model.intercept_), rel=1e-6)


@pytest.fixture(scope="module")
def digits():
    """Of a few people's digits, features and classes; C -> probabilities where the objective is lowest."""
    x, y = load_digits(return_X_y=True)
    with threadpool_limits(1):
        best = {c: reference(x[:300], y[:300], c=c).predict_proba(x) for c in (1.0, 100.0)}
    return x.astype(np.float32), y, best


@in_ram_and_streamed
@pytest.mark.parametrize(("c", "atol"), [(1.0, 1e-4), (100.0, 1e-3)])  # 3e-4 and 4e-2 with tol = 1e-6
def test_the_default_tolerance_is_close_enough_on_correlated_features(digits, c, atol, memory):
    x, y, best = digits
    features = ArrayFeatures(x, [Block("a", "t@none", 0, 64, (64,))])
    target = Target("multiclass", ("digit",), tuple("0123456789"), y[:300])
    head = LogisticHead({"C": c}, memory=memory).fit(Fold(features, np.arange(300), target))
    assert head.fitted_["streamed"] == (memory == 0)
    np.testing.assert_allclose(head.scores(x), best[c], atol=atol)


@in_ram_and_streamed
def test_multilabel_is_one_per_label_on_its_known_rows(problem, memory):
    data = problem("multilabel", unknown=0.3)
    head = LogisticHead(memory=memory).fit(data.train)
    scale = StandardScaler().fit(data.x[:140][data.train.target.known].astype(np.float64))
    for label in range(3):
        y = data.train.target.values[:, label]
        known = ~np.isnan(y)
        model = LogisticRegression(tol=1e-10, max_iter=10_000).fit(scale.transform(data.x[:140][known]), y[known])
        expected = model.predict_proba(scale.transform(data.x))[:, 1]
        np.testing.assert_allclose(head.scores(data.x)[:, label], expected, atol=1e-3)


@pytest.mark.parametrize("largest", [1 << 30, 0])
@in_ram_and_streamed
def test_regression_is_ridge(problem, monkeypatch, memory, largest):
    monkeypatch.setattr(Streamed.__init__, "__defaults__", (largest,))
    data = problem("regression", unknown=0.2)
    head = LogisticHead({"C": 0.1}, memory=memory).fit(data.train)
    assert head.fitted_.get("passes", 0) == (0 if memory is None else 3) or not largest
    scale = StandardScaler().fit(data.x[:140][data.train.target.known].astype(np.float64))
    for i in range(3):
        y = data.train.target.values[:, i]
        known = ~np.isnan(y)
        ridge = Ridge(alpha=10).fit(scale.transform(data.x[:140][known]), y[known])
        expected = ridge.predict(scale.transform(data.x.astype(np.float64)))
        np.testing.assert_allclose(head.predict(data.x)[:, i], expected, rtol=1e-5)


@pytest.mark.parametrize("task", ["binary", "multiclass", "multilabel", "regression"])
def test_streamed_equals_in_ram_with_missing_views_and_a_chosen_c(problem, task):
    data = problem(task, missing=0.4, unknown=0.2)
    in_ram, streamed = (
        LogisticHead({"C": "auto", "tol": 1e-9, "class_weight": None if task == "regression" else "balanced"},
                     memory=memory).fit(data.train, data.valid)
        for memory in (None, 0)
    )  # fmt: skip
    assert streamed.fitted_["streamed"]
    assert streamed.fitted_["C"] == in_ram.fitted_["C"]
    np.testing.assert_allclose(streamed.scores(data.x), in_ram.scores(data.x), rtol=1e-5, atol=1e-5)
    for mine, other in zip(streamed.history_, in_ram.history_, strict=True):
        assert mine["valid_loss"] == pytest.approx(other["valid_loss"], rel=1e-5)


def test_streamed_holds_no_more_than_a_chunk(problem):
    data, sizes = problem("multilabel", unknown=0.2), []

    class Watched(ArrayFeatures):
        def __getitem__(self, rows):
            sizes.append(len(rows))
            return super().__getitem__(rows)

    features = Watched(data.x, data.features.blocks)
    head = LogisticHead(memory=0).fit(Fold(features, data.train.rows, data.train.target))
    assert max(sizes) == 33
    passes = -(-int(data.train.target.known.sum()) // 33)
    assert len(sizes) == passes * (head.fitted_["passes"] + 2)  # all labels in one pass; standardiser and loss besides


def test_importance_is_of_the_standardised_columns(problem):
    head = LogisticHead().fit(problem("binary", missing=0.5).train)
    assert np.array_equal(head.importance(), np.abs(head.arrays["coef"][0, :14]))


def test_searches_side_by_side_find_each_minimum():
    """Rosenbrock's valley and bowls of very different curvature, from far away."""
    curvature = np.array([1e-3, 1.0, 1e3])

    def evaluate(numbers, points):
        asked.append(list(numbers))
        values, gradients = [], []
        for number, (a, b, c) in zip(numbers, points, strict=True):
            if number:
                values.append((curvature * number * (np.array([a, b, c]) - number) ** 2).sum() / 2)
                gradients.append(curvature * number * (np.array([a, b, c]) - number))
            else:
                values.append((1 - a) ** 2 + 100 * (b - a**2) ** 2 + c**2)
                gradients.append([-2 * (1 - a) - 400 * a * (b - a**2), 200 * (b - a**2), 2 * c])
        return np.array(values), np.array(gradients)

    asked = []
    found, passes = minimise_together(evaluate, [np.array([-3.0, 5.0, 9.0])] * 3, tol=1e-9, max_iter=500)
    assert all(minimum.converged for minimum in found)
    np.testing.assert_allclose([minimum.x for minimum in found], [[1, 1, 0], [1, 1, 1], [2, 2, 2]], atol=1e-5)
    assert passes == len(asked)
    assert asked[0] == [0, 1, 2]
    assert asked[-1] == [0]  # the others were done
    stopped, _ = minimise_together(evaluate, [np.array([-3.0, 5.0, 9.0])], tol=1e-9, max_iter=3)
    assert (stopped[0].iterations, stopped[0].converged) == (3, False)


def test_standardiser_is_that_of_scikit_learn_over_present_rows(problem):
    data = problem("binary", missing=0.6)
    x = data.x
    x[:, 2] = 3.25
    x[:, 11] = 1e4 + x[:, 11] / 100
    mean, scale, missing = standardiser(data.train)
    expected = StandardScaler().fit(x[:140].astype(np.float64))  # ignores NaN, too
    np.testing.assert_allclose(mean, expected.mean_, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(scale, expected.scale_, rtol=1e-9)
    assert scale[2] == 1
    assert missing


def test_a_missing_view_is_the_mean_plus_an_indicator(problem):
    data = problem("binary", missing=0.5)
    head = LogisticHead().fit(data.train)
    assert head.arrays["coef"].shape == (1, 14 + 2)
    coef = head.arrays["coef"][0]
    z = (data.x - head.arrays["mean"]) / head.arrays["scale"]
    z = np.nan_to_num(z) @ coef[:14] + np.isnan(data.x[:, [0, 9]]) @ coef[14:] + head.arrays["intercept"]
    np.testing.assert_allclose(head.scores(data.x)[:, 1], 1 / (1 + np.exp(-z)), rtol=1e-9)
    assert LogisticHead().fit(problem("binary").train).arrays["coef"].shape == (1, 14)


def test_a_view_that_no_training_row_has(problem):
    data = problem("binary")
    data.x[:140, 9:] = np.nan
    head = LogisticHead().fit(data.train)
    assert np.isfinite(head.scores(data.x)).all()
    assert (head.arrays["coef"][0, 9:14] == 0).all()


@pytest.mark.parametrize("task", ["binary", "multiclass", "multilabel", "regression"])
def test_c_is_chosen_on_validation(problem, task):
    data = problem(task)
    head = LogisticHead({"C": "auto"}).fit(data.train, data.valid)
    assert tuple(row["C"] for row in head.history_) == GRID
    best = min(head.history_, key=lambda row: row["valid_loss"])
    assert head.fitted_["C"] == best["C"]
    direct = LogisticHead({"C": best["C"]}).fit(data.train, data.valid)
    np.testing.assert_allclose(head.scores(data.x), direct.scores(data.x), rtol=1e-3, atol=1e-4)
    with pytest.raises(InputError, match="C=auto is chosen on validation rows, and there are none"):
        LogisticHead({"C": "auto"}).fit(data.train)


@in_ram_and_streamed
def test_few_samples_of_a_class_are_no_warning(problem, memory):
    data = problem("binary")
    target = Target("multiclass", ("y",), tuple(f"{i:03}" for i in range(100)), np.arange(140) % 100)
    head = LogisticHead({"max_iter": 5}, memory=memory).fit(Fold(data.features, data.train.rows, target))
    assert len(head.outputs) == 100


@in_ram_and_streamed
def test_not_converged_is_recorded(problem, memory):
    data = problem("multiclass")
    head = LogisticHead({"max_iter": 2}, memory=memory).fit(data.train)
    assert head.history_[0]["converged"] is False
    assert head.fitted_["iterations"] == 2
    assert LogisticHead().fit(data.train).fitted_["converged"] is True


def test_settings_that_are_not_accepted():
    with pytest.raises(InputError, match=r"C.*greater than 0"):
        LogisticHead({"C": -1})


def test_arrays_that_do_not_fit(problem, tmp_path):
    head = LogisticHead().fit(problem("multiclass", missing=0.3).train)
    head.save(tmp_path)
    path = tmp_path / "head.npz"
    arrays = dict(head.arrays)

    def refused(**changes):
        with path.open("wb") as file:
            np.savez(file, **{k: v for k, v in (arrays | changes).items() if v is not None})
        record = json.loads((tmp_path / "head.json").read_text())
        import hashlib

        record["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
        (tmp_path / "head.json").write_text(json.dumps(record))
        with pytest.raises(RunError) as caught:
            load_head(tmp_path)
        return str(caught.value)

    assert "array 'mean' is missing" in refused(mean=None)
    assert "array 'extra' is unknown" in refused(extra=np.zeros(2))
    assert "array 'coef' is (3, 15) float64, expected (3, 16) of kind 'f'" in refused(coef=arrays["coef"][:, 1:])
    assert "array 'scale' is (14,) int64, expected (14,) of kind 'f'" in refused(scale=np.ones(14, dtype=np.int64))
    assert "array 'index' does not fit the classes or labels" in refused(index=np.array([0, 1, 7]))
    assert "Object arrays cannot be loaded" in refused(mean=np.array([{}] * 14, dtype=object))


def test_float16_features(problem):
    data = problem("binary")
    half = ArrayFeatures(data.x.astype(np.float16), data.features.blocks)
    head = LogisticHead().fit(Fold(half, data.train.rows, data.train.target))
    np.testing.assert_allclose(head.score_rows(half), LogisticHead().fit(data.train).scores(data.x), atol=1e-2)
