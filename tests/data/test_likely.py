import polars as pl

from featurecache.config import ManifestConfig
from featurecache.data.likely import likely_target


def guess(views, **columns):
    config = ManifestConfig.create({"manifest": "m.csv", "views": views})
    rows = 12
    table = {
        "sample_id": [f"s{i}" for i in range(rows)],
        **{k: [v[i % len(v)] for i in range(rows)] for k, v in columns.items()},
    }
    return likely_target(pl.DataFrame(table), config)


def test_a_column_that_is_called_so_comes_first():
    assert guess({"a": "front"}, front=["x", "y"], sex=["m", "f"], Label=[0, 1, None]) == "Label"


def test_else_the_first_with_a_few_classes_that_holds_no_images_and_divides_nothing():
    names = [f"n{i}" for i in range(12)]
    assert guess({"a": "front,back"}, front=["x", "y"], back=["x", "y"], split=["train", "test"], name=names,
                 kind=["p", "q"], more=[1, 2]) == "kind"  # fmt: skip


def test_none_where_there_is_nothing_to_tell_apart():
    assert guess({"a": "front"}, front=["x", "y"], same=[1], empty=[None, None]) == ""
