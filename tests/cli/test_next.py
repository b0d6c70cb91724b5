"""The last line of a command is the next command, which can be pasted into a shell."""

import shlex
from pathlib import Path
from types import SimpleNamespace

from stage_two import command, write_store

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
        "--path-column path --id 'study no' --root images --body run:runs/j"
    )
    run.record["manifest_config"] = {"views": {"a": "a"}, "layout": "wide", "multi": "error", "id": None}
    assert cache_tuned(run, {**params, "root": None}, "runs/j") == (
        "featurecache extract m.csv --store cache --view a=a --body run:runs/j"
    )


def test_an_option_without_a_value_is_shown_without_one():
    for words in (("extract",), ("finetune-joint",), ("bodies", "show"), ()):
        assert "<bool>" not in command(*words, "--help").out
    assert "--dry-run" in command("extract", "--help").out
