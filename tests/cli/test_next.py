"""The last line of a command is the next command, which can be pasted into a shell."""

import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest
from plugin_joint import write_samples
from stage_two import command, write_store

from featurecache.cli.ablate import best_views
from featurecache.cli.extract import one_tap
from featurecache.cli.joint import cache_tuned
from featurecache.cli.predict import after_predicting


def test_what_comes_next_runs_as_it_stands(tmp_path):
    store = write_store(tmp_path / "my data", 24, missing=0.0)
    done = command("compact", store, "--out", tmp_path / "a copy")
    shown = done.err.splitlines()[-1]
    assert shown == f"Next: featurecache info '{tmp_path}/a copy'"
    assert command(*shlex.split(shown.removeprefix("Next: featurecache "))).status == 0


def test_a_pipeline_that_was_planned_is_run_with_the_same_options(tmp_path):
    done = command("pipeline", "joint", "--set", "joint.epochs=1", "--dry-run", "--out", tmp_path)
    assert done.err.splitlines()[-1] == f"Next: featurecache pipeline joint --set joint.epochs=1 --out {tmp_path}"


def test_new_samples_are_measured_where_they_have_labels():
    typed = "featurecache predict 'r x' m.csv --out p.csv --store c --trust-factory a.b:c"
    found = after_predicting(Path("r x"), typed, measurable=True)
    assert found == "featurecache evaluate 'r x' m.csv --store c --trust-factory a.b:c"
    assert after_predicting(Path("r x"), typed, measurable=False) == "featurecache evaluate 'r x'"


def test_tuned_bodies_are_cached_from_the_same_manifest():
    read = {"views": {"a": "front", "b": "PA,AP"}, "layout": "long", "view_column": "pos", "path_column": "path",
            "multi": "error", "id": "study no", "root": "/where/the/run/read"}  # fmt: skip
    run = SimpleNamespace(record={"manifest_config": read})
    params = {"manifest": Path("m.csv"), "store": None, "root": Path("images")}  # the rest is known from --init
    assert cache_tuned(run, params, "runs/j") == (
        "featurecache extract m.csv --store cache --view a=front --view b=PA,AP --layout long --view-column pos "
        "--path-column path --id 'study no' --root images --body run:runs/j --name m-tuned"
    )
    run.record["manifest_config"] = {"views": {"a": "a"}, "layout": "wide", "multi": "error", "id": None}
    assert cache_tuned(run, {**params, "root": None}, "runs/j") == (
        "featurecache extract m.csv --store cache --view a=a --body run:runs/j --name m-tuned"
    )


def test_tuned_bodies_are_cached_beside_the_features_that_the_start_was_fitted_on(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store = write_store(Path("my data"), 40, missing=0.0)
    fit = ["--head", "fc", "--set", "epochs=1", "--bootstrap", 0, "--out", "runs/fc"]
    assert command("fit-head", "--dataset", "m", store, "--target", "label", *fit).status == 0
    read = {"views": {"a": "a"}, "layout": "wide", "multi": "error", "id": None}
    run = SimpleNamespace(record={"manifest_config": read, "binding": {"dataset": "other"}})
    params = {"manifest": Path("other.csv"), "init": Path("runs/fc"), "store": None, "root": None}
    found = cache_tuned(run, params, "runs/j")
    assert found == f"featurecache extract other.csv --store '{store}' --view a=a --body run:runs/j --name m-tuned"
    assert " --store T " in cache_tuned(run, {**params, "store": Path("T")}, "runs/j")
    monkeypatch.chdir(tmp_path.parent)  # where that name leads nowhere
    assert " --store cache " in cache_tuned(run, {**params, "init": tmp_path / "runs" / "fc"}, "runs/j")


def test_an_option_without_a_value_is_shown_without_one():
    for words in (("extract",), ("finetune-joint",), ("bodies", "show"), ()):
        assert "<bool>" not in command(*words, "--help").out
    assert "--dry-run" in command("extract", "--help").out


def test_what_was_planned_is_extracted_and_fitted_on_one_of_several_taps(tmp_path):
    manifest = write_samples(tmp_path / "data", 24)
    words = ["extract", manifest, "--store", tmp_path / "my cache", "--view", "a=a", "--body", "plugin_joint:tiny",
             "--engine", "torch", "--tap", "features.2:avg", "--tap", "features.7:avg"]  # fmt: skip
    planned = command(*words, "--dry-run").err.splitlines()[-1]
    assert planned == f"Next: featurecache {shlex.join(map(str, words))}"
    made = command(*shlex.split(planned.removeprefix("Next: featurecache ")))
    shown = made.err.splitlines()[-1]
    assert shown.endswith("--target label --head logistic --tap features.2:avg")
    fit = [*shlex.split(shown.removeprefix("Next: featurecache ")), "--bootstrap", 0, "--out", tmp_path / "run"]
    assert command(*fit).status == 0


def test_one_of_several_taps_of_each_view():
    assert one_tap({"*": ["x"], "a": ["y:avg", "z"], "b": ["y"]}) == ["--tap", "a=y:avg"]


def test_after_an_ablation_a_head_is_fitted_on_the_same_division(tmp_path):
    store = write_store(tmp_path / "my data", 40, missing=0.0)
    words = ["ablate", store, "--dataset", "m", "--target", "label", "--head", "logistic,fc", "--group", "patient"]
    words += ["--tap", "a=penultimate", "--tap", "b=penultimate"]
    words += ["--uncertain=no=zero", "--uncertain=yes=one", "--seed", 3, "--allow-partial", "--set", "logistic.C=0.5"]
    done = command(*words, "--set", "fc.epochs=1", "--seeds", 1, "--bootstrap", 5)
    shown = done.err.splitlines()[-1].removeprefix("Next: featurecache ")
    assert shown.startswith(f"fit-head '{store}' --dataset m --target label --views ")
    views = shlex.split(shown)[shlex.split(shown).index("--views") + 1].split(",")
    taps = " ".join(f"--tap={view}=penultimate" for view in views)
    options = f"{taps} --allow-partial --uncertain=no=zero --uncertain=yes=one --group=patient --seed=3 --set C=0.5"
    assert shown.endswith(f" --head logistic {options}")
    assert command(*shlex.split(shown), "--bootstrap", 0, "--out", tmp_path / "run").status == 0


@pytest.mark.parametrize(("words", "views"), [("no gain shown", ["b"]), ("worse", ["b"]), ("better", ["a", "b"])])
def test_views_that_show_no_gain_are_not_joined(words, views):
    arms = [
        SimpleNamespace(head="fc", arm="fused", words=words),
        SimpleNamespace(head="xgboost", arm="late", words="better"),
    ]
    assert best_views(SimpleNamespace(reference={"fc": "b"}, arms=arms), "fc", ("a", "b")) == views


def test_a_list_given_twice_is_refused_and_not_cut(tmp_path):
    done = command("fit-head", tmp_path, "--dataset", "m", "--target", "a", "--target", "b")
    assert done.status == 2
    assert "--target" in done.err
    assert "given twice; several go together: --target COLUMN[,COLUMN...]" in done.err
    assert (
        "given twice"
        not in command("fit-head", tmp_path, "--dataset", "m", "--target", "a", "--seed", 1, "--seed", 2).err
    )
