from importlib.metadata import EntryPoint

import numpy as np
import pytest

from featurecache.errors import InputError, RunError
from featurecache.features.features import ArrayFeatures, Block
from featurecache.heads import base
from featurecache.heads.base import Fold, get_head, head_names, load_head
from featurecache.heads.fc import FCHead


class Plugged(FCHead):
    name = "plugged"


class Nothing:
    name = "nothing"


def register(monkeypatch, **values):
    points = [EntryPoint(name.replace("_", "-"), value, base.GROUP) for name, value in values.items()]
    monkeypatch.setattr(base, "entry_points", lambda group: points if group == base.GROUP else [])


def test_names():
    assert set(head_names()) >= {"fc", "logistic", "xgboost"}
    for name in head_names():
        assert get_head(name).name == name


def test_an_unknown_name_says_the_nearest():
    with pytest.raises(
        InputError, match=r"unknown head 'xgbost'\. Did you mean 'xgboost'\? Known: fc, logistic, xgboost"
    ):
        get_head("xgbost")


def test_a_head_from_elsewhere_is_registered_by_entry_point(monkeypatch, problem, fast, tmp_path):
    data = problem("binary")
    head = Plugged(fast["fc"]).fit(data.train)
    head.save(tmp_path)
    with pytest.raises(RunError, match=r"head.json: unknown head 'plugged'"):
        load_head(tmp_path)
    register(monkeypatch, plugged="heads_plugin:Plugged")
    monkeypatch.setitem(__import__("sys").modules, "heads_plugin", __import__("types").SimpleNamespace(Plugged=Plugged))
    assert "plugged" in head_names()
    assert get_head("plugged") is Plugged
    assert np.array_equal(load_head(tmp_path).scores(data.x), head.scores(data.x))


def test_a_name_can_be_taken_once(monkeypatch):
    register(monkeypatch, fc="elsewhere:Head")
    with pytest.raises(
        InputError, match=r"head 'fc' is registered twice: featurecache.heads.fc:FCHead and elsewhere:Head"
    ):
        head_names()


def test_what_is_registered_must_be_a_head_of_that_name(monkeypatch):
    module = __import__("types").SimpleNamespace(Nothing=Nothing, Plugged=Plugged)
    monkeypatch.setitem(__import__("sys").modules, "heads_plugin", module)
    register(monkeypatch, nothing="heads_plugin:Nothing", other="heads_plugin:Plugged")
    for name in ("nothing", "other"):
        with pytest.raises(InputError, match=rf"head '{name}': heads_plugin:\w+ is not a Head of that name"):
            get_head(name)


def test_load_of_another_head(problem, fast, tmp_path):
    FCHead(fast["fc"]).fit(problem("binary").train).save(tmp_path)
    with pytest.raises(RunError, match=r"is of head 'fc' \(head.safetensors\), not 'logistic' \(head.npz\)"):
        get_head("logistic").load(tmp_path)


def test_fold_chunks_and_known():
    blocks = (Block("a", "t", 0, 2, (2,)),)
    features = ArrayFeatures(np.arange(20, dtype=np.float32).reshape(10, 2), blocks)
    from featurecache.data.targets import Target

    values = np.array([0, -1, 1, 1])
    fold = Fold(features, np.array([9, 3, 1, 0]), Target("binary", ("y",), ("0", "1"), values))
    assert len(fold) == 4
    found = [(where, x.tolist()) for where, x in fold.chunks(3)]
    assert found == [(slice(0, 3), [[18, 19], [6, 7], [2, 3]]), (slice(3, 4), [[0, 1]])]
    known = fold.known()
    assert known.rows.tolist() == [9, 1, 0]
    assert known.target.values.tolist() == [0, 1, 1]
    assert known.known() is known


def test_folds_that_do_not_fit(problem, fast):
    data = problem("binary")
    head = FCHead(fast["fc"])
    with pytest.raises(InputError, match="training: 10 rows but 140 targets"):
        head.fit(Fold(data.features, np.arange(10), data.train.target))
    other = ArrayFeatures(data.x[:, :9], data.features.blocks[:2])
    with pytest.raises(InputError, match="training and validation features have different columns"):
        head.fit(data.train, Fold(other, data.valid.rows, data.valid.target))
