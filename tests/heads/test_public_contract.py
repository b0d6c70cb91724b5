"""Every head of ours, and one from another distribution, against the contract that third parties run theirs through."""

import re
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from featurecache.errors import InputError
from featurecache.heads.base import get_head, head_names
from featurecache.heads.contract import ChunkedFeatures, HeadContract, make_problem

PACKAGE = Path(__file__).parents[1] / "plugins" / "head_package"


class TestFC(HeadContract):
    head = "fc"
    settings: ClassVar = {"epochs": 8, "hidden": (16,), "lr": 0.02}


class TestLogistic(HeadContract):
    head = "logistic"


class TestXGBoost(HeadContract):
    head = "xgboost"
    settings: ClassVar = {"n_estimators": 12, "max_depth": 3, "max_bin": 32, "nthread": 1, "learning_rate": 0.3}


class TestElsewhere(HeadContract):
    """Found by its entry point alone, in a distribution that lies on the path."""

    head = "centroid"
    tasks = ("binary", "multiclass")

    @pytest.fixture(autouse=True)
    def _on_the_path(self, monkeypatch):
        assert "centroid" not in head_names()
        monkeypatch.syspath_prepend(PACKAGE)

    def test_is_listed(self):
        assert "centroid" in head_names()
        with pytest.raises(InputError, match=r"Did you mean 'centroid'\? Known: fc, logistic, xgboost, .*centroid"):
            get_head("centroids")


def guide(name: str) -> str:
    """A file of the guide to plug-ins."""
    text = (Path(__file__).parents[2] / "docs" / "plugins.md").read_text(encoding="utf-8")
    found = re.search(rf"<!-- file: {re.escape(name)} -->\n```python\n(.*?)```", text, re.DOTALL)
    assert found is not None
    return found[1]


def of_the_guide() -> type[HeadContract]:
    """The test that the guide shows."""
    held: dict[str, Any] = {}
    exec(guide("test_centroid.py"), held)
    return held["TestCentroid"]


class TestOfTheGuide(of_the_guide()):
    """The head that the guide shows keeps the contract that it tells of."""

    @pytest.fixture(autouse=True)
    def _on_the_path(self, monkeypatch, tmp_path):
        package = tmp_path / "package"
        (package / "guide-1.0.dist-info").mkdir(parents=True)
        (package / "guide-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: guide\nVersion: 1.0\n")
        (package / "guide-1.0.dist-info" / "entry_points.txt").write_text(
            "[featurecache.heads]\ncentroid = centroid:CentroidHead\n"
        )
        (package / "centroid.py").write_text(guide("centroid.py"), encoding="utf-8")
        monkeypatch.syspath_prepend(package)

    def test_other_tasks_are_refused(self):
        with pytest.raises(
            InputError, match="'centroid' does not predict a regression target; only binary, multiclass"
        ):
            self.make().fit(make_problem("regression").train)


class Broken(HeadContract):
    """The contract's own test: heads that break it in one way each are found out."""

    head = "logistic"
    wrong: type

    def make(self, **options):
        return self.wrong(self.settings, **options)


def test_the_contract_finds_what_is_broken(tmp_path):
    logistic = get_head("logistic")

    class Drifts(logistic):
        def _fit(self, train, valid):
            super()._fit(train, valid)
            self.arrays["intercept"] = self.arrays["intercept"] + np.random.random()

    class Peeks(logistic):
        def _fit(self, train, valid):
            super()._fit(train, valid)
            if valid is not None:
                self.history_[0]["train_loss"] += float(valid.features[valid.rows].mean())

    class Hoards(logistic):
        def _fit(self, train, valid):
            assert len(train.features[train.rows])
            super()._fit(train, valid)

    class Forgets(logistic):
        def _write(self, path):
            kept = self.arrays
            self.arrays = kept | {"intercept": kept["intercept"] + 1}
            super()._write(path)
            self.arrays = kept

    for wrong, test in (
        (Drifts, "test_the_same_seed_gives_the_same_head"),
        (Peeks, "test_validation_rows_teach_nothing"),
        (Hoards, "test_streaming_equals_in_ram"),
        (Forgets, "test_saved_and_loaded_predicts_the_same_bits"),
    ):
        broken = Broken()
        broken.wrong = wrong
        with pytest.raises((AssertionError, MemoryError)):
            getattr(broken, test)(*([tmp_path / wrong.__name__] if "saved" in test else []))


def test_features_in_chunks_refuse_what_there_is_no_room_for():
    data = make_problem("binary")
    features = ChunkedFeatures(data.x, data.features.blocks, most=10)
    assert features[np.arange(10)].shape == (10, 14)
    with pytest.raises(MemoryError, match="11 rows were asked for at a time; there is room for 10"):
        features[np.arange(11)]
