"""Every sample of a manifest is counted once, where it left; leaks are counted, not assumed away."""

import json

import numpy as np
import polars as pl
import pytest
from stage_two import quick, samples, write_store

from featurecache.config import HeadConfig
from featurecache.crossval import fit_dataset
from featurecache.dataset import FeatureDataset
from featurecache.fit import fit_head
from featurecache.rundir.flow import leak_check, sample_flow, torn_values


def test_each_sample_leaves_once():
    found = sample_flow(
        list("abcdefgh"), np.array(list("11223344")), kept=list("cdefgh"), unreadable=["a", "c"], known=list("defgh"),
        split={"d": "train", "e": "train", "f": "valid", "g": "test", "h": ""},
    )  # fmt: skip
    assert (found["samples"], found["groups"]) == (8, 4)
    assert found["left_out"] == [
        {"why": "unreadable image", "samples": 1, "groups": 1},
        {"why": "no known label", "samples": 1, "groups": 1},
        {"why": "missing view", "samples": 1, "groups": 1},
        {"why": "in no split", "samples": 1, "groups": 1},
    ]
    assert found["used"]["train"] == {"samples": 2, "groups": 2}
    assert found["incomplete"] == 1
    gone = sum(step["samples"] for step in found["left_out"])
    assert gone + sum(side["samples"] for side in found["used"].values()) == 8


def test_torn_groups_and_images_are_counted():
    content = [("x",), ("x", "y"), ("z",), (), ("z",)]
    sides, groups = np.array(["train", "test", "test", "test", ""]), np.array(list("aabcd"))
    found = leak_check(sides, groups, content, level="patient")
    assert found == {
        "level": "patient", "images": 3, "shared": 1, "torn_groups": 1, "torn_images": 1, "without_hash": 1
    }  # fmt: skip


def test_a_run_keeps_both(tmp_path):
    rows = samples(80, missing=0.3)
    for i in (4, 5):
        rows[i]["label"] = ""
    store = write_store(tmp_path, rows=rows, state={"b3.png": "failed", "b7.png": "failed"})
    with quick():
        dataset = FeatureDataset(store, dataset="m", target="label", missing="drop")
        run = fit_head(dataset, head="logistic", group="patient", out=tmp_path / "run", bootstrap=0, images="none")
    flow = run.record["flow"]
    assert flow["samples"] == 80
    assert flow["groups"] == 40
    why = {step["why"]: step["samples"] for step in flow["left_out"]}
    absent = sum(not row["b"] for row in rows)
    unread = sum(rows[i]["b"] != "" for i in (3, 7))
    unlabelled = sum(rows[i]["b"] != "" for i in (4, 5))
    expected = {"unreadable image": unread, "no known label": unlabelled, "missing view": absent}
    assert why == {name: count for name, count in expected.items() if count}
    assert {side: count["samples"] for side, count in flow["used"].items()} == {
        side: run.metrics[side]["n"] for side in ("train", "valid", "test")
    }
    check = run.record["leak_check"]
    assert check["level"] == "patient"
    assert check["torn_groups"] == check["torn_images"] == 0
    assert check["likely"] is None, "a group was given"
    assert run.record["notes"] == []
    assert check["images"] == 2 * sum(run.metrics[side]["n"] for side in ("train", "valid", "test"))
    assert run.record["missing"] == "drop"
    assert not (run.path / "pictures").exists()
    assert json.loads((run.path / "mistakes.json").read_text())["notes"] == ["Pictures were not wanted."]


def test_without_a_group_the_column_that_looks_like_one_is_counted(tmp_path):
    rows = samples(80, missing=0)
    for i, row in enumerate(rows):
        row["kept"] = ("train", "train", "valid", "test")[i // 2 % 4]
    store = write_store(tmp_path, rows=rows)
    with quick():
        options = {"head": "logistic", "bootstrap": 0, "images": "none"}
        dataset = FeatureDataset(store, dataset="m", target="label")
        run = fit_head(dataset, out=tmp_path / "run", **options)
        sides = dict(run.predictions.select("sample_id", "split").iter_rows())
        torn = sum(sides[f"s{i:03d}"] != sides[f"s{i + 1:03d}"] for i in range(0, 80, 2))
        assert run.record["leak_check"]["likely"] == {"column": "patient", "values": 40, "torn": torn}
        (note,) = run.record["notes"]
        assert f"column 'patient' looks like one: {torn} of its 40 values" in note
        kept = fit_head(dataset, out=tmp_path / "kept", split="kept", **options)
        assert kept.record["leak_check"]["likely"] == {"column": "patient", "values": 40, "torn": 0}
        assert kept.record["notes"] == []
        folds = fit_dataset(dataset, HeadConfig.create({**options, "out": tmp_path / "folds"}), cv=2)
        assert folds.record["leak_check"]["likely"]["torn"] > 0


def test_values_of_unused_samples_and_empty_cells_are_not_counted():
    table = pl.DataFrame({"sample_id": list("abcdef"), "patient": ["p", "p", "q", "q", None, None]})
    found = torn_values(table, "patient", list("abcdef"), np.array(["0", "1", "0", "", "0", "1"]))
    assert found == {"column": "patient", "values": 2, "torn": 1}


@pytest.mark.parametrize("target", ["label", "kind", "size", "l0"])
def test_the_listed_mistakes_are_wrong_and_the_surest_first(tmp_path, target):
    store = write_store(tmp_path, 90, missing=0.1)
    with quick():
        columns = ["l0", "l1"] if target == "l0" else target
        dataset = FeatureDataset(store, dataset="m", target=columns)
        run = fit_head(dataset, head="logistic", seed=1, test=0.4, out=tmp_path / "run", bootstrap=0, images=50)
    listed = json.loads((run.path / "mistakes.json").read_text())
    test = run.predictions.filter(split="test")
    if target in ("label", "kind"):
        wrong = test.filter(test["target"] != test["prediction"])["sample_id"].to_list()
        assert sorted(entry["sample_id"] for entry in listed["mistakes"]) == sorted(wrong)
        for entry in listed["one_view_right"]:
            said = {view: one["prediction"] for view, one in entry["single"].items()}
            assert [view for view, name in said.items() if name == entry["target"]] == [entry["view"]]
            assert entry["right"] == (entry["sample_id"] not in wrong)
        assert [entry["right"] for entry in listed["one_view_right"]] == sorted(
            entry["right"] for entry in listed["one_view_right"]
        )
        assert listed["one_view_right"]
    if target == "kind":
        sure = [entry["probability"] for entry in listed["mistakes"]]
        assert sure == sorted(sure, reverse=True)
    if target == "size":
        errors = [abs(float(entry["target"]) - float(entry["prediction"])) for entry in listed["mistakes"]]
        assert errors == sorted(errors, reverse=True)
    if target == "l0":
        for entry in listed["mistakes"]:
            row = test.filter(sample_id=entry["sample_id"]).row(0, named=True)
            assert row[f"target:{entry['label']}"] == entry["target"] != row[f"prediction:{entry['label']}"]
