"""What every head of ours must do beyond the contract that third parties run (test_public_contract.py)."""

import json
import pickle

import numpy as np
import pytest
import torch

from featurecache.errors import InputError, RunError
from featurecache.heads.base import get_head, head_names, load_head

TASKS = ("binary", "multiclass", "multilabel", "regression")
pytestmark = pytest.mark.parametrize("name", [name for name in head_names() if set(TASKS) <= set(get_head(name).tasks)])
by_task = pytest.mark.parametrize("task", TASKS)


@pytest.fixture
def fitted(problem, fast):
    def fit(name, task, *, seed=0, settings=(), **options):
        data = problem(task, **options)
        return get_head(name)(fast.get(name, {}) | dict(settings), seed=seed).fit(data.train, data.valid), data

    return fit


def quality(head, data):
    """Share of right decisions, or 1 - relative squared error, on test rows with a known target."""
    rows, values = data.test.rows, data.test.target.values
    found = head.predict(data.x[rows])
    if head.task_ == "regression":
        known = ~np.isnan(values)
        return 1 - np.mean((found - values)[known] ** 2) / np.var(values[known])
    known = values >= 0
    return np.mean((found == values)[known])


@by_task
def test_learns(fitted, tmp_path, name, task):
    """And a saved head is the same in all that it says of itself."""
    head, data = fitted(name, task)
    assert quality(head, data) > (0.6 if task != "regression" else 0.35)
    assert head.task_ == task
    assert head.names_ == data.target.names
    assert head.classes_ == data.target.classes
    assert head.skipped_ == ()
    if task == "regression":
        with pytest.raises(InputError, match="a regression has no probabilities: call predict"):
            head.predict_proba(data.x)
    head.save(tmp_path)
    loaded = load_head(tmp_path)
    assert type(loaded) is get_head(name)
    assert np.array_equal(loaded.score_rows(data.features), head.scores(data.x))
    for attribute in ("task_", "classes_", "names_", "blocks_", "skipped_", "settings", "seed", "fitted_"):
        assert getattr(loaded, attribute) == getattr(head, attribute)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["head.json", head.file])


def test_fitting_leaves_the_global_generator_alone(fitted, name):
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    fitted(name, "binary")
    assert torch.equal(torch.rand(3), expected)


def test_a_view_missing_only_after_training(fitted, name):
    head, data = fitted(name, "binary")
    x = data.x.copy()
    x[::2, :9] = np.nan
    scores = head.scores(x)
    assert np.isfinite(scores).all()
    np.testing.assert_allclose(scores[1::2], head.scores(data.x)[1::2], atol=1e-6)


def test_forty_labels_with_unknowns(fitted, name):
    head, data = fitted(name, "multilabel", labels=40, unknown=0.3)
    scores = head.predict_proba(data.x[data.test.rows])
    assert scores.shape == (len(data.test), 40)
    assert np.isfinite(scores).all()
    assert quality(head, data) > 0.45  # unknown values never equal a decision


def test_a_label_without_both_sides_is_skipped(problem, fast, tmp_path, name):
    data = problem("multilabel", labels=4)
    values = data.target.values.copy()
    values[:140, 1] = 0
    values[:140, 3] = np.nan
    data = data.with_values(values)
    head = get_head(name)(fast.get(name, {})).fit(data.train, data.valid)
    assert head.skipped_ == ("y1", "y3")
    scores = head.scores(data.x)
    assert np.isnan(scores[:, [1, 3]]).all()
    assert np.isfinite(scores[:, [0, 2]]).all()
    assert np.isnan(head.predict(data.x)[:, [1, 3]]).all()
    head.save(tmp_path)
    assert np.array_equal(load_head(tmp_path).scores(data.x), scores, equal_nan=True)


def test_a_regression_target_without_values_is_skipped(problem, fast, name):
    data = problem("regression")
    values = data.target.values.copy()
    values[:140, 2] = np.nan
    data = data.with_values(values)
    head = get_head(name)(fast.get(name, {})).fit(data.train, data.valid)
    assert head.skipped_ == ("y2",)
    assert np.isnan(head.predict(data.x)[:, 2]).all()


def test_a_class_without_training_rows(problem, fast, tmp_path, name):
    data = problem("multiclass")
    values = data.target.values.copy()
    values[:140][values[:140] == 1] = 2
    values[140:190][values[140:190] == 1] = 0
    data = data.with_values(values)
    head = get_head(name)(fast.get(name, {})).fit(data.train, data.valid)
    assert head.skipped_ == ("b",)
    scores = head.scores(data.x)
    assert scores.shape == (len(data.x), 3)
    assert (scores[:, 1] == 0).all()
    np.testing.assert_allclose(scores.sum(axis=1), 1, atol=1e-12)
    head.save(tmp_path)
    assert np.array_equal(load_head(tmp_path).scores(data.x), scores)


@pytest.mark.parametrize("task", ["binary", "multiclass", "multilabel"])
def test_balanced_class_weights(problem, fast, name, task):
    data = problem(task, n=400, labels=2)
    rare = np.random.default_rng(0).random(data.target.values.shape) < 0.9
    values = np.where(rare & (data.target.values == 1), 0, data.target.values).astype(data.target.values.dtype)
    data = data.with_values(values)
    column = 1 if task != "multilabel" else slice(None)
    plain, balanced = (
        get_head(name)(fast.get(name, {}) | {"class_weight": weight}).fit(data.train, data.valid).scores(data.x)
        for weight in (None, "balanced")
    )
    assert balanced[:, column].mean() > plain[:, column].mean() + 0.04


def test_class_weights_by_name(problem, fast, name):
    data = problem("binary")
    head = get_head(name)(fast.get(name, {}) | {"class_weight": {"yes": 20.0}}).fit(data.train, data.valid)
    plain = get_head(name)(fast.get(name, {})).fit(data.train, data.valid)
    assert head.scores(data.x)[:, 1].mean() > plain.scores(data.x)[:, 1].mean()
    with pytest.raises(InputError, match=r"class_weight: no class 'yse'\. Did you mean 'yes'\? There are: no, yes\."):
        get_head(name)({"class_weight": {"yse": 2}}).fit(data.train, data.valid)
    with pytest.raises(InputError, match="class_weight: a regression has no classes"):
        get_head(name)({"class_weight": "balanced"}).fit(problem("regression").train, None)


def test_without_validation(problem, fast, name):
    data = problem("binary")
    head = get_head(name)(fast.get(name, {})).fit(data.train)
    assert head.history_[-1]["valid_loss"] is None
    assert quality(head, data) > 0.6


def test_progress_sees_the_history(problem, fast, name):
    data, seen = problem("binary"), []
    head = get_head(name)(fast.get(name, {})).fit(data.train, data.valid, progress=seen.append)
    assert seen == head.history_
    json.dumps(seen)


def test_nothing_is_printed(fitted, capfd, name):
    fitted(name, "multilabel", unknown=0.2)
    assert capfd.readouterr() == ("", "")


def test_validation_teaches_nothing(problem, fast, name):
    """Validation and test rows may hold anything: scaling, imputation and weights come from training rows alone."""
    data = problem("binary", missing=0.2)
    settings = fast.get(name, {})
    if name == "xgboost":
        settings = settings | {"early_stopping_rounds": None}
    if name == "fc":
        settings = settings | {"patience": 1000}
    first = get_head(name)(settings).fit(data.train)
    poisoned = problem("binary", missing=0.2)
    poisoned.x[140:] = np.where(np.isnan(poisoned.x[140:]), np.nan, 1e4)
    head = get_head(name)(settings).fit(poisoned.train, poisoned.valid)
    if name == "fc":  # the best epoch is chosen on validation; what is learned in an epoch is not
        losses = [[row["train_loss"] for row in fitted.history_] for fitted in (first, head)]
        assert losses[0] == losses[1]
    else:
        assert np.array_equal(head.scores(data.x), first.scores(data.x))


def test_unknown_setting(name):
    near = {"fc": ("epoch", "epochs"), "logistic": ("max_iters", "max_iter"), "xgboost": ("max_dept", "max_depth")}
    wrong, right = near.get(name, ("settingz", ""))
    with pytest.raises(
        InputError, match=f"head '{name}': not valid\n  - unknown key '{wrong}'. Did you mean '{right}'"
    ):
        get_head(name)({wrong: 3})


def test_what_can_not_be_trained_is_said(problem, fast, name):
    data = problem("binary")
    head = get_head(name)(fast.get(name, {}))
    with pytest.raises(InputError, match="training rows of 'y' hold only the class 'yes': nothing to tell apart"):
        head.fit(data.with_values(np.ones_like(data.target.values)).train)
    with pytest.raises(InputError, match="training: none of the 140 rows has a known target"):
        head.fit(data.with_values(np.full_like(data.target.values, -1)).train)
    with pytest.raises(InputError, match="validation: none of the 50 rows has a known target"):
        head.fit(data.train, data.with_values(np.full_like(data.target.values, -1)).valid)
    labels = problem("multilabel")
    with pytest.raises(InputError, match="y0, y1, y2: no label has both a known positive and a known negative"):
        head.fit(labels.with_values(np.ones_like(labels.target.values)).train)
    values = labels.target.values.copy()
    values[:140, 1] = 1
    values[140:190, [0, 2]] = np.nan
    lacking = labels.with_values(values)
    with pytest.raises(InputError, match="validation: no label that can be trained has a known value"):
        head.fit(lacking.train, lacking.valid)
    with pytest.raises(InputError, match=f"head '{name}' is not fitted"):
        head.scores(data.x)
    with pytest.raises(InputError, match="not fitted: there is nothing to save"):
        head.save("nowhere")


def test_wrong_number_of_features(fitted, name):
    head, data = fitted(name, "binary")
    with pytest.raises(InputError, match=r"was fitted on 14 features, got an array of shape \(240, 13\)"):
        head.scores(data.x[:, 1:])


class Bomb:
    def __reduce__(self):
        return (open, ("executed", "w"))


@pytest.mark.parametrize("fix_digest", [False, True])
@pytest.mark.parametrize("kind", ["pickle", "torch"])
def test_a_pickle_executes_nothing_and_says_so(fitted, tmp_path, monkeypatch, name, kind, fix_digest):
    monkeypatch.chdir(tmp_path)
    head, _ = fitted(name, "binary")
    head.save(tmp_path)
    path = tmp_path / head.file
    if kind == "pickle":
        path.write_bytes(pickle.dumps(Bomb()))
    else:
        torch.save({"x": Bomb()}, path)
    if fix_digest:
        _fix_digest(tmp_path, head.file)
    with pytest.raises(
        RunError, match=rf"{head.file}: .*a Python pickle, which heads never are; nothing of it was exec"
    ):
        load_head(tmp_path)
    assert not (tmp_path / "executed").exists()


def test_a_changed_or_damaged_file(fitted, tmp_path, name):
    head, _ = fitted(name, "binary")
    head.save(tmp_path)
    path = tmp_path / head.file
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(RunError, match=rf"{head.file}: changed since it was written"):
        load_head(tmp_path)
    path.write_bytes(b"neither this nor that")
    _fix_digest(tmp_path, head.file)
    with pytest.raises(RunError, match=rf"{head.file}: can't be read as a head of kind '{name}'"):
        load_head(tmp_path)
    path.unlink()
    with pytest.raises(RunError, match=rf"{head.file}: can't be read: No such file"):
        load_head(tmp_path)


def test_a_record_that_does_not_fit(fitted, tmp_path, name):
    head, _ = fitted(name, "multiclass")
    head.save(tmp_path)
    path = tmp_path / "head.json"
    good = json.loads(path.read_text())

    def refused(**changes):
        path.write_text(json.dumps(good | changes))
        with pytest.raises(RunError) as caught:
            load_head(tmp_path)
        return str(caught.value)

    assert "unknown key 'classess'. Did you mean 'classes'?" in refused(classess=["a"])
    assert "schema 2; this version of featurecache reads 1" in refused(schema=2)
    assert "unknown head 'os:system'" in refused(head="os:system")
    assert "unknown key 'sise'" in refused(settings={"sise": 1})
    assert "the columns of the views don't fit together" in refused(blocks=good["blocks"][1:])
    assert "without its classes or names" in refused(classes=[])
    assert head.file in refused(classes=["a", "b", "c", "d", "e"])
    wider = good["blocks"][2] | {"stop": 16, "shape": [7]}
    assert head.file in refused(blocks=[*good["blocks"][:2], wider])
    assert "head.json: can't be read" in _broken(path, "{")
    path.unlink()
    with pytest.raises(RunError, match=r"head.json: no such file; .* holds no saved head"):
        load_head(tmp_path)


def _broken(path, text):
    path.write_text(text)
    with pytest.raises(RunError) as caught:
        load_head(path.parent)
    return str(caught.value)


def _fix_digest(directory, file):
    import hashlib

    path = directory / "head.json"
    record = json.loads(path.read_text())
    record["sha256"] = hashlib.sha256((directory / file).read_bytes()).hexdigest()
    path.write_text(json.dumps(record))
