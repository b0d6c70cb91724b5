import json
import pickle
import shutil

import numpy as np
import polars as pl
import pytest
from plugin_joint import tiny
from safetensors.torch import save_file
from stage_two import TINY, TRUST, TWO, quick, read_table, write_home, write_table

import featurecache as fc
from featurecache.errors import FeatureCacheError, InputError, MissingFileError, RecipeMismatchError, RunError
from featurecache.store.store import FeatureStore


@pytest.fixture(scope="module", autouse=True)
def _quick():
    with quick():
        yield


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return write_home(tmp_path_factory.mktemp("home"), runs=("head", "kind", "labels", "size", "joint"))


def predict(home, run, sources, out, **options):
    return fc.predict(home / "runs" / run, sources, out, **{**TRUST, **options})


def test_through_the_cache_the_second_time_computes_nothing(home, tmp_path):
    manifest, store = home / "new/samples.csv", tmp_path / "store"
    first = predict(home, "head", manifest, tmp_path / "p.csv", store=store)
    images = sum(bool(row["a"]) + bool(row["b"]) for row in read_table(manifest))
    assert (first.computed, first.reused, first.failures, first.notes) == (images, 0, [], [])
    again = predict(home, "head", manifest, tmp_path / "p.parquet", store=store)
    assert (again.computed, again.reused) == (0, images)
    rows = read_table(tmp_path / "p.csv")
    assert list(rows[0]) == ["sample_id", "views", "prediction", "p:no", "p:yes"]
    assert [row["views"] for row in rows] == ["a+b" if row["b"] else "a" for row in read_table(manifest)]
    table = pl.read_parquet(tmp_path / "p.parquet")
    np.testing.assert_array_equal(table["p:yes"], [float(row["p:yes"]) for row in rows])
    fc.extract(manifest, store=tmp_path / "own", views=TWO, **TINY)
    dataset = fc.FeatureDataset(tmp_path / "own", dataset="samples")
    np.testing.assert_array_equal(fc.load_run(home / "runs/head").predict_proba(dataset), first.scores)


def test_decisions_are_those_of_the_runs_own_threshold(home, tmp_path):
    scored = predict(home, "head", home / "data/samples.csv", tmp_path / "p.csv", store=home / "cache")
    assert scored.computed == 0
    own = {row["sample_id"]: row for row in read_table(home / "runs/head/predictions.csv")}
    for row in read_table(tmp_path / "p.csv"):
        assert {name: own[row["sample_id"]][name] for name in row} == row


@pytest.mark.parametrize(
    ("run", "columns"),
    [
        ("kind", ["prediction", "p:p", "p:q", "p:r"]),
        ("labels", ["prediction:first", "prediction:second", "p:first", "p:second"]),
        ("size", ["prediction"]),
        ("joint", ["prediction", "p:no", "p:yes"]),
    ],
)
def test_every_task_and_kind_of_run(home, tmp_path, run, columns):
    predict(home, run, home / "new/samples.csv", tmp_path / "p.csv", store=home / "cache")
    rows = read_table(tmp_path / "p.csv")
    assert list(rows[0]) == ["sample_id", "views", *columns]
    assert len(rows) == 12
    assert all(row[columns[0]] for row in rows)


@pytest.mark.parametrize("run", ["head", "joint"])
def test_single_files(home, tmp_path, run, monkeypatch):
    monkeypatch.chdir(home / "new/images")
    predict(home, run, ["a=000-a0.png", "b=000-b0.png", "a=001-a0.png"], tmp_path / "p.csv")
    rows = read_table(tmp_path / "p.csv")
    assert [(row["sample_id"], row["views"]) for row in rows] == [("000-a0.png", "a+b"), ("001-a0.png", "a")]
    predict(home, run, home / "new/samples.csv", tmp_path / "all.csv")
    if read_table(home / "new/samples.csv")[0]["b"]:
        assert float(read_table(tmp_path / "all.csv")[0]["p:yes"]) == pytest.approx(float(rows[0]["p:yes"]), abs=1e-6)


def test_single_files_of_one_view(home, tmp_path):
    dataset = fc.FeatureDataset(home / "cache", dataset="samples", target="label", views=["b"])
    fc.fit_head(dataset, head="logistic", out=tmp_path / "run", bootstrap=0)
    files = sorted(str(path) for path in (home / "new/images").glob("*-b0.png"))[:3]
    scored = fc.predict(tmp_path / "run", files, tmp_path / "p.csv", **TRUST)
    assert scored.sample_ids.tolist() == files
    one = fc.predict(tmp_path / "run", f"b={files[0]}", tmp_path / "p.csv", **TRUST)
    np.testing.assert_allclose(one.scores, scored.scores[:1], rtol=1e-12)  # products of one row and of three


@pytest.mark.parametrize(
    ("sources", "error", "message"),
    [
        (["x.png"], InputError, r"'x.png': this run has the views a, b, so files are given as a=FILE b=FILE"),
        (["a=x.png"], MissingFileError, r"x.png: no such file \(view 'a'\)"),
        (["samples.csv", "a=images/000-a0.png"], InputError, "give one manifest or folder, or image files, not both"),
        (["samples.csv", "samples.csv"], InputError, "give one manifest"),
        (["a=images/000-a0.png", "a=images/000-a0.png"], InputError, "images/000-a0.png: is given twice"),
        (["none.csv"], MissingFileError, "none.csv: no such file"),
    ],
)
def test_wrong_sources(home, tmp_path, monkeypatch, sources, error, message):
    monkeypatch.chdir(home / "new")
    with pytest.raises(error, match=message):
        predict(home, "head", sources, tmp_path / "p.csv")
    assert not (tmp_path / "p.csv").exists()


def test_wrong_options(home, tmp_path):
    new = home / "new/samples.csv"
    with pytest.raises(InputError, match=r"--out .*p.json: write .csv or .parquet"):
        predict(home, "head", new, tmp_path / "p.json")
    with pytest.raises(InputError, match=r"unknown option 'stor'. Did you mean 'store'"):
        predict(home, "head", new, tmp_path / "p.csv", stor=1)
    with pytest.raises(InputError, match=r"this run has no view 'c'. It has: a, b"):
        predict(home, "head", new, tmp_path / "p.csv", manifest={"views": {"c": "a"}})
    with pytest.raises(InputError, match="'many': a number above 0, or auto"):
        predict(home, "joint", new, tmp_path / "p.csv", batch_size="many")
    with pytest.raises(MissingFileError, match="no such run directory"):
        predict(home, "haed", new, tmp_path / "p.csv")


@pytest.mark.parametrize("run", ["head", "joint"])
def test_unreadable_images_are_listed_and_the_others_predicted(home, tmp_path, run):
    shutil.copytree(home / "new", tmp_path / "new")
    rows = read_table(tmp_path / "new/samples.csv")
    (tmp_path / "new" / rows[2]["a"]).write_bytes(b"no image")
    rows.append({**rows[0], "sample_id": "none", "a": "", "b": ""})
    write_table(tmp_path / "new/samples.csv", rows)
    scored = predict(home, run, tmp_path / "new/samples.csv", tmp_path / "p.csv")
    assert [(f["sample_id"], f["view"]) for f in scored.failures] == [("s002", "a"), ("none", "")]
    assert scored.failures[1]["error"] == "has none of the views"
    assert "none" not in scored.sample_ids
    assert len(scored.sample_ids) == (12 if run == "head" and rows[2]["b"] else 11)
    for row in rows[:-1]:
        for view in ("a", "b"):
            if row[view]:
                (tmp_path / "new" / row[view]).write_bytes(b"no image")
    with pytest.raises(FeatureCacheError, match=r"no.* image|can be read"):
        predict(home, run, tmp_path / "new/samples.csv", tmp_path / "q.csv")


def test_other_bodies_are_refused_before_anything_is_computed(home, tmp_path):
    state = tiny().state_dict()
    state["features.0.weight"][0] += 1
    save_file(state, tmp_path / "other.safetensors")
    body = {**TRUST["body"], "weights": {"b": str(tmp_path / "other.safetensors")}}
    with pytest.raises(RecipeMismatchError) as caught:
        predict(home, "head", home / "new/samples.csv", tmp_path / "p.csv", store=tmp_path / "store", body=body)
    assert "view b: taps.penultimate@none.weights " in str(caught.value)
    assert "view a" not in str(caught.value)
    assert not (tmp_path / "store").exists()


def test_features_of_another_recipe_or_tap_are_refused_and_of_another_precision_noted(home, tmp_path):
    run = fc.load_run(home / "runs/head")
    manifest = home / "new/samples.csv"
    fc.extract(manifest, store=tmp_path / "store", views=TWO, **{**TINY, "mean": [0.4, 0.5, 0.5]}, name="other")
    with pytest.raises(
        RecipeMismatchError, match=r"view a, b: preprocessing.mean \[0.5, 0.5, 0.5\] -> \[0.4, 0.5, 0.5\]"
    ):
        run.predict_proba(fc.FeatureDataset(tmp_path / "store", dataset="other"))
    with pytest.raises(RecipeMismatchError, match="the head expects a penultimate@none"):
        run.predict_proba(fc.FeatureDataset(home / "cache", dataset="samples", views=["a"]))
    fc.extract(manifest, store=tmp_path / "low", views=TWO, **{**TINY, "precision": "bf16"}, store_dtype="float32")
    dataset = fc.FeatureDataset(tmp_path / "low", dataset="samples")
    with pytest.warns(UserWarning, match="view a, b: features differ .* precision 'fp32' -> 'bf16'"):
        scores = run.predict_proba(dataset)
    scored = predict(home, "head", manifest, tmp_path / "p.csv", store=tmp_path / "low")
    assert scored.computed == 0
    assert len(scored.notes) == 1
    np.testing.assert_array_equal(scored.scores, scores)


def test_a_factory_that_only_the_run_names_is_not_imported(home, tmp_path):
    shutil.copytree(home / "runs/head", tmp_path / "run")
    with pytest.raises(InputError, match=r"names the factory 'plugin_joint:tiny'.*Nothing was imported"):
        fc.predict(tmp_path / "run", home / "new/samples.csv", tmp_path / "p.csv")
    record = json.loads((tmp_path / "run/run.json").read_text())
    record["body_config"]["body"] = {"a": "os:system", "b": "os:system"}
    record["body_config"]["trust_factory"] = ["os:system"]
    (tmp_path / "run/run.json").write_text(json.dumps(record))
    with pytest.raises(InputError, match=r"names the factory 'os:system'.*Nothing was imported"):
        fc.predict(tmp_path / "run", home / "new/samples.csv", tmp_path / "p.csv")
    del record["body_config"]
    (tmp_path / "run/run.json").write_text(json.dumps(record))
    with pytest.raises(RunError, match=r"run.json holds no body_config"):
        fc.predict(tmp_path / "run", home / "new/samples.csv", tmp_path / "p.csv")


def test_a_pickle_disguised_as_weights_executes_nothing(home, tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "executed"), "w"))

    for name in ("evil.pth", "evil.safetensors"):
        (tmp_path / name).write_bytes(pickle.dumps(Evil()))
        body = {**TRUST["body"], "weights": str(tmp_path / name)}
        with pytest.raises(InputError, match=r"(?s)evil.*Nothing in it was executed"):
            predict(home, "head", home / "new/samples.csv", tmp_path / "p.csv", body=body)
    assert not (tmp_path / "executed").exists()


def test_weights_files_are_found_again_where_run_and_file_moved_together(home, tmp_path, monkeypatch):
    here = tmp_path / "here"
    shutil.copytree(home / "data", here / "data")
    save_file(tiny().state_dict(), here / "tiny.safetensors")
    monkeypatch.chdir(here)
    fc.extract("data/samples.csv", store="cache", views=TWO, **TINY, weights="tiny.safetensors")
    dataset = fc.FeatureDataset("cache", dataset="samples", target="label")
    fc.fit_head(dataset, head="fc", out="runs/head", settings={"epochs": 1, "hidden": [8]}, bootstrap=0)
    assert json.loads((here / "runs/head/run.json").read_text())["body_config"]["weights"]["a"] == "../tiny.safetensors"
    monkeypatch.chdir(tmp_path)
    here.rename(tmp_path / "there")
    new, run = home / "new/samples.csv", tmp_path / "there/runs/head"
    scored = fc.predict(run, new, tmp_path / "p.csv", **TRUST)
    joint = {"target": "label", "init": run, "epochs": 1, "freeze_epochs": 0, "workers": 1, "bootstrap": 0,
             "trust_factory": ["plugin_joint:tiny"], "settings": {"hidden": [8]}}  # fmt: skip
    made = fc.finetune_joint("there/data/samples.csv", out=tmp_path / "joint", **joint)
    assert made.kind == "joint"
    (tmp_path / "there/tiny.safetensors").rename(tmp_path / "moved.safetensors")
    for act in (
        lambda: fc.predict(run, new, tmp_path / "p.csv", **TRUST),
        lambda: fc.finetune_joint("there/data/samples.csv", out=tmp_path / "again", **joint),
    ):
        with pytest.raises(MissingFileError, match=r"tiny.safetensors' of view 'a': give --weights a=PATH"):
            act()
    moved = {"body": {**TRUST["body"], "weights": str(tmp_path / "moved.safetensors")}}
    np.testing.assert_array_equal(fc.predict(run, new, tmp_path / "p.csv", **moved).scores, scored.scores)


def test_a_head_on_tuned_bodies_predicts_after_both_runs_moved(home, tmp_path):
    shutil.copytree(home / "runs/joint", tmp_path / "one/joint")
    trust = {"trust_factory": ["plugin_joint:tiny"]}
    fc.extract(
        home / "data/samples.csv", store=tmp_path / "cache", views=TWO, body=f"run:{tmp_path}/one/joint", **trust
    )
    dataset = fc.FeatureDataset(tmp_path / "cache", dataset="samples", target="label")
    fc.fit_head(dataset, head="xgboost", out=tmp_path / "one/head", bootstrap=0,
                settings={"n_estimators": 3, "nthread": 1, "max_bin": 8})  # fmt: skip
    (tmp_path / "one").rename(tmp_path / "two")
    scored = fc.predict(tmp_path / "two/head", home / "new/samples.csv", tmp_path / "p.csv", **TRUST)
    assert len(scored.sample_ids) == 12
    (tmp_path / "two/joint").rename(tmp_path / "elsewhere")
    with pytest.raises(MissingFileError, match="of view 'a': give --body a=run:PATH"):
        fc.predict(tmp_path / "two/head", home / "new/samples.csv", tmp_path / "p.csv", **TRUST)
    moved = {"body": {**TRUST["body"], "body": f"run:{tmp_path}/elsewhere"}}
    again = fc.predict(tmp_path / "two/head", home / "new/samples.csv", tmp_path / "p.csv", **moved)
    np.testing.assert_array_equal(again.scores, scored.scores)


def test_the_store_holds_no_more_than_was_asked_for(home, tmp_path):
    predict(home, "head", home / "new/samples.csv", tmp_path / "p.csv", store=tmp_path / "store")
    with FeatureStore(tmp_path / "store") as store:
        assert store.bindings() == ["predict-samples"]
        assert [info.recipe.base for info in store.recipes()] == [
            recipe.base for recipe in list(fc.load_run(home / "runs/head").view_recipes.values())[:1]
        ]


def test_moving_the_run_that_a_body_came_from_computes_nothing(home, tmp_path):
    options = {
        "views": TWO,
        "body": f"run:{home / 'runs/joint'}",
        "store": tmp_path / "store",
        "store_dtype": "float32",
    }
    first = fc.extract(home / "new/samples.csv", trust_factory=["plugin_joint:tiny"], **options)
    shutil.copytree(home / "runs/joint", tmp_path / "elsewhere")
    options["body"] = f"run:{tmp_path / 'elsewhere'}"
    second = fc.extract(home / "new/samples.csv", trust_factory=["plugin_joint:tiny"], **options)
    assert first.computed > 0
    assert (second.computed, second.recipes) == (0, first.recipes)
