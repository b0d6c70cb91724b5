import json
import math
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from featurecache.config import SplitConfig
from featurecache.errors import InputError, LockedError, MissingFileError, RunError
from featurecache.run import Run, RunWriter, default_run_path, load_run
from featurecache.rundir.predictions import Predictions, read_predictions
from featurecache.rundir.record import plain, portable_command, portable_path

RECORD = {"task": "binary", "classes": ["no", "yes"], "targets": ["ill"], "views": ["a"], "recipes": {}, "config": {}}


def write(path: Path, *, text: str = "model", kind: str = "head", **options) -> Run:
    with RunWriter(path, kind=kind, **options) as writer:
        (writer.path / "bodies").mkdir()
        (writer.path / "bodies" / "a.bin").write_text(text)
        return writer.publish(RECORD)


def fail(path: Path, *, file: str, **options) -> None:
    try:
        with RunWriter(path, **options) as writer:
            (writer.path / file).write_text("1")
            raise ZeroDivisionError
    except ZeroDivisionError:
        pass


def edit(run: Path, **changes) -> None:
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**record, **changes}))


def test_published_whole_or_not_at_all(tmp_path):
    path = tmp_path / "deep" / "down" / "first"
    with RunWriter(path, kind="head") as writer:
        assert writer.path == path.with_name("first.tmp")
        (writer.path / "x").write_text("1")
        assert not path.exists()
        run = writer.publish(RECORD)
    assert isinstance(run, Run)
    assert sorted(p.name for p in path.parent.iterdir()) == ["first"]
    assert sorted(p.name for p in path.iterdir()) == ["run.json", "x"]
    assert load_run(path).files == run.files
    assert len(run.files["x"]) == 64


def test_failure_leaves_nothing(tmp_path):
    with RunWriter(tmp_path / "r", kind="head") as writer:
        (writer.path / "x").write_text("1")
    fail(tmp_path / "r", kind="head", file="x")
    assert list(tmp_path.iterdir()) == []


def test_failed_joint_run_keeps_what_it_can_resume_from(tmp_path):
    fail(tmp_path / "r", kind="joint", file="checkpoint")
    with pytest.raises(MissingFileError, match=r"r\.tmp beside it is an unfinished run: go on with --resume"):
        load_run(tmp_path / "r")
    with RunWriter(tmp_path / "r", kind="joint", resume=True) as writer:
        assert writer.resumed
        assert (writer.path / "checkpoint").read_text() == "1"
    with RunWriter(tmp_path / "r", kind="joint") as writer:
        assert not writer.resumed
        assert not (writer.path / "checkpoint").exists()
    assert list(tmp_path.iterdir()) == []


def test_leftover_of_a_killed_process_is_replaced(tmp_path):
    code = (
        "import os, sys; from featurecache.run import RunWriter\n"
        "w = RunWriter(sys.argv[1], kind='head'); (w.path / 'half').write_text('x'); os._exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path / "r")], check=False).returncode == 9
    assert (tmp_path / "r.tmp" / "half").exists()
    assert set(write(tmp_path / "r").files) == {"bodies/a.bin"}
    assert [p.name for p in tmp_path.iterdir()] == ["r"]


def test_existing_run_is_refused(tmp_path):
    write(tmp_path / "r", text="old")
    with pytest.raises(
        InputError, match=r"r: already exists\. Give another name to --out, or --overwrite to replace it"
    ):
        RunWriter(tmp_path / "r", kind="head")
    with pytest.raises(InputError, match=r"this run is finished, there is nothing to resume"):
        RunWriter(tmp_path / "r", kind="joint", resume=True)
    assert [p.name for p in tmp_path.iterdir()] == ["r"]
    write(tmp_path / "r", text="new", overwrite=True)
    assert (tmp_path / "r" / "bodies" / "a.bin").read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["r"]


def test_overwrite_without_exchange_of_names(tmp_path, monkeypatch):
    monkeypatch.setattr("featurecache.run.exchange", lambda one, other: False)
    write(tmp_path / "r", text="old")
    write(tmp_path / "r", text="new", overwrite=True)
    assert (tmp_path / "r" / "bodies" / "a.bin").read_text() == "new"
    (tmp_path / "r").rename(tmp_path / "r.old")  # killed between the two renames
    with pytest.raises(InputError, match="already exists"):
        RunWriter(tmp_path / "r", kind="head")
    assert [p.name for p in tmp_path.iterdir()] == ["r"]


def test_failed_overwrite_keeps_the_old_run(tmp_path):
    write(tmp_path / "r", text="old")
    fail(tmp_path / "r", kind="head", file="x", overwrite=True)
    assert load_run(tmp_path / "r").path == tmp_path / "r"


def test_overwrite_spares_what_is_no_run(tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("years")
    with pytest.raises(InputError, match=r"exists and is not a run \(it holds no run.json\), so --overwrite leaves it"):
        RunWriter(tmp_path / "home", kind="head", overwrite=True)
    assert (tmp_path / "home" / "thesis.txt").exists()
    with pytest.raises(InputError, match="not a name for a run directory"):
        RunWriter("/", kind="head")


def test_one_writer_at_a_time(tmp_path):
    with RunWriter(tmp_path / "r", kind="head"):
        with pytest.raises(LockedError, match="this process is already writing it"):
            RunWriter(tmp_path / "r", kind="head")
    code = (
        "import sys; from featurecache.run import RunWriter\n"
        "w = RunWriter(sys.argv[1], kind='head'); print('ready', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "r")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"ready\n"
        with pytest.raises(LockedError, match=f"process {other.pid} is writing it now") as caught:
            RunWriter(tmp_path / "r", kind="head")
        assert caught.value.pid == other.pid
        other.kill()
        other.wait()
    write(tmp_path / "r")


def test_changed_and_missing_files_are_named(tmp_path):
    run = write(tmp_path / "r").path
    (run / "bodies" / "a.bin").write_text("modeL")
    with pytest.raises(RunError, match=r"bodies/a\.bin has changed since the run was written"):
        load_run(run)
    (run / "bodies" / "a.bin").unlink()
    with pytest.raises(RunError, match=r"bodies/a\.bin is missing"):
        load_run(run)


def test_the_model_card_may_be_completed_and_strange_files_are_left_alone(tmp_path):
    with RunWriter(tmp_path / "r", kind="head") as writer:
        (writer.path / "README.md").write_text("More information needed")
        (writer.path / "report.html").write_text("<p>")
        run = writer.publish(dict(write(tmp_path / "other").record)).path
    (run / "README.md").write_text("Intended use: research")
    (run / "report.html").unlink()
    (run / "Thumbs.db").write_text("?")
    (run / "away").symlink_to(tmp_path)
    assert load_run(run).kind == "head"


def test_later_additions_are_allowed(tmp_path):
    run = write(tmp_path / "r").path
    (run / "evaluations" / "new").mkdir(parents=True)
    (run / "evaluations" / "new" / "metrics.json").write_text("{}")
    (run / ".DS_Store").write_text("")
    load_run(run)


def test_records_that_are_none(tmp_path):
    with pytest.raises(MissingFileError, match="no such run directory"):
        load_run(tmp_path / "none")
    (tmp_path / "plain").mkdir()
    with pytest.raises(RunError, match=r"not a run directory \(it holds no run\.json\)"):
        load_run(tmp_path / "plain")
    run = write(tmp_path / "r").path
    for changes, message in (
        ({"kind": "other"}, r"unknown kind 'other'\. Known: head, joint"),
        ({"schema": 2, "featurecache": "9.1"}, r"has schema 2, written by featurecache 9\.1.*Upgrade featurecache"),
        ({"schema": None}, "it has no schema number"),
        ({"views": "a"}, "views is missing or of the wrong type"),
        ({"recipes": {"a": "b"}}, "recipes must hold a table per view"),
    ):
        good = (run / "run.json").read_text()
        edit(run, **changes)
        with pytest.raises(RunError, match=message):
            load_run(run)
        (run / "run.json").write_text(good)
    (run / "run.json").write_bytes(b"\x80\x04cos\nsystem\n(S'touch pwned'\ntR.")
    with pytest.raises(RunError, match=r"run\.json: not JSON\. Nothing in it was executed"):
        load_run(run)


def test_record_tells_nothing_about_the_machine(tmp_path):
    config = {"store": tmp_path / "cache", "manifest": Path("/srv/secret/m.csv"), "split": SplitConfig(valid=0.2)}
    command = ["featurecache", "fit-head", str(tmp_path / "runs" / "x"), "--view", "a=/srv/secret/p", "--target", "a b"]
    with RunWriter(tmp_path / "runs" / "r", kind="head") as writer:
        run = writer.publish({**RECORD, "config": config, "command": command, "score": math.nan, "note": "/kept"})
    text = (run.path / "run.json").read_text()
    assert str(tmp_path) not in text
    assert "secret" not in text
    assert os.uname().nodename not in text
    assert run.config["store"] == "../cache"
    assert run.config["manifest"] == "m.csv"
    assert run.config["split"]["valid"] == 0.2
    assert run.command == "featurecache fit-head x --view a=p --target 'a b'"
    assert run.record["score"] is None
    assert run.record["note"] == "/kept"
    assert run.record["versions"]["python"].count(".") == 2
    assert run.version == run.record["featurecache"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/data/store", "store"),
        ("/srv/runs/a", "a"),
        ("/srv/cache", "../cache"),
        ("sub/dir", "sub/dir"),
        ("../up", "../up"),
        ("C:\\Users\\ann\\cache", "cache"),
        ("~/x/cache/", "cache"),
    ],
)
def test_portable_path(text, expected):
    assert portable_path(text, Path("/srv/runs")) == expected


def test_portable_command():
    base = Path("/srv/runs")
    assert portable_command("f --body a=run:/home/ann/r1 --split auto", base) == "f --body a=run:r1 --split auto"
    assert portable_command("f https://example.org/a --set lr=0.1", base) == "f https://example.org/a --set lr=0.1"
    assert portable_command("f 'unclosed /home/ann/x", base) == "f ''\"'\"'unclosed' x"


def test_plain_values():
    values = {"a": np.float32(0.5), "b": np.array([1.0, np.nan]), "c": (np.int64(3), float("inf")), 4: {"y", "x"}}
    assert plain(values, Path()) == {"a": 0.5, "b": [1.0, None], "c": [3, None], "4": ["x", "y"]}
    with pytest.raises(TypeError, match="object can't be written as JSON"):
        plain(object(), Path())


def test_default_path_is_the_first_free_one(tmp_path):
    name = default_run_path("emoji set", ("a", "b"), "fc", parent=tmp_path)
    assert name == tmp_path / "emoji_set-a+b-fc-1"
    name.mkdir()
    name.with_name("emoji_set-a+b-fc-2.tmp").mkdir()
    assert default_run_path("emoji set", ("a", "b"), "fc", parent=tmp_path).name == "emoji_set-a+b-fc-3"
    assert default_run_path("d", [str(i) for i in range(40)], "fc") == Path("runs/d-40targets-fc-1")
    assert default_run_path("../..", "x", "fc") == Path("runs/_-x-fc-1")


# predictions


def predictions(task: str) -> Predictions:
    rng = np.random.default_rng(0)
    n = 30
    raw = rng.random((n, 3))
    names, classes, true, scores = ("y",), ("a", "b", "c"), rng.integers(-1, 3, n), raw / raw.sum(1, keepdims=True)
    if task == "binary":
        classes, true, scores = ("no", "yes"), rng.integers(-1, 2, n), np.stack([1 - raw[:, 0], raw[:, 0]], 1)
    elif task == "multilabel":
        names, classes, scores = ("p", "q", "r"), (), raw.copy()
        true = rng.choice([0.0, 1.0, np.nan], (n, 3))
        scores[:, 2] = np.nan
    elif task == "regression":
        names, classes, true, scores = ("y",), (), rng.normal(size=(n, 1)), rng.normal(size=(n, 1)) * 1e-9
    ids = np.array([f"s,{i}\"'" for i in range(n)])
    split = np.array((["train", "valid", "test", ""] * n)[:n])
    views = np.array(["a+b", "a", ""] * 10)
    return Predictions(
        task, names, classes, true, scores, ids, np.array([f"g{i // 2}" for i in range(n)]), split, views
    )


@pytest.mark.parametrize("task", ["binary", "multiclass", "multilabel", "regression"])
def test_predictions_survive_the_file_exactly(tmp_path, task):
    made = predictions(task)
    made.table(0.3).write_csv(tmp_path / "predictions.csv")
    read = read_predictions(tmp_path, {"task": task, "targets": made.names, "classes": made.classes})
    for name in ("true", "scores", "sample_ids", "groups", "splits", "views"):
        np.testing.assert_array_equal(getattr(read, name), getattr(made, name))
    assert read.true.dtype == made.true.dtype


def test_labels_may_hold_whatever_a_table_can(tmp_path):
    classes = ('a "quoted", one', '<b>"</b>\n日本', '""')
    made = replace(predictions("multiclass"), classes=classes)
    made.table().write_csv(tmp_path / "predictions.csv")
    read = read_predictions(tmp_path, {"task": "multiclass", "targets": made.names, "classes": classes})
    np.testing.assert_array_equal(read.scores, made.scores)
    np.testing.assert_array_equal(read.true, made.true)


def test_columns_of_predictions(tmp_path):
    assert predictions("binary").table().columns == [
        "sample_id", "group", "split", "views", "target", "prediction", "p:no", "p:yes",
    ]  # fmt: skip
    labels = predictions("multilabel").table({"p": 0.2, "q": None})
    assert labels.columns[4:] == [
        "target:p",
        "target:q",
        "target:r",
        *[f"prediction:{x}" for x in "pqr"],
        "p:p",
        "p:q",
        "p:r",
    ]
    assert labels["prediction:r"].null_count() == 30
    assert (labels["prediction:p"] == (labels["p:p"] >= 0.2)).all()
    assert (labels["prediction:q"] == (labels["p:q"] >= 0.5)).all()
    assert predictions("regression").table().columns[4:] == ["target", "prediction"]
    yes = predictions("binary").table(0.9)
    assert ((yes["prediction"] == "yes") == (yes["p:yes"] >= 0.9)).all()


def test_predictions_of_another_run_are_refused(tmp_path):
    record = {"task": "binary", "targets": ["y"], "classes": ["no", "maybe"]}
    with pytest.raises(RunError, match=r"predictions\.csv is missing"):
        read_predictions(tmp_path, record)
    predictions("binary").table().write_csv(tmp_path / "predictions.csv")
    with pytest.raises(RunError, match=r"predictions\.csv: not the predictions of this run"):
        read_predictions(tmp_path, record)


def run_with(tmp_path: Path, task: str) -> Run:
    made = predictions(task)
    with RunWriter(tmp_path / task, kind="head") as writer:
        made.table().write_csv(writer.path / "predictions.csv")
        (writer.path / "metrics.json").write_text('{"test": {"roc_auc": 0.5}}')
        pl.DataFrame({"epoch": [1, 2], "train_loss": [0.5, 0.4]}).write_csv(writer.path / "history.csv")
        return writer.publish({**RECORD, "task": task, "classes": made.classes, "targets": made.names})


def test_run_reads_its_files(tmp_path):
    run = run_with(tmp_path, "binary")
    assert run.metrics["test"]["roc_auc"] == 0.5
    assert run.history["train_loss"].to_list() == [0.5, 0.4]
    assert run.predictions.schema["p:yes"] == pl.Float64
    assert run.predictions["sample_id"][0] == "s,0\"'"
    assert (run.kind, run.task, run.classes, run.targets, run.views) == (
        "head",
        "binary",
        ("no", "yes"),
        ("y",),
        ("a",),
    )
    assert (run.recipes, run.bodies, run.binding, run.threshold, run.command) == ({}, {}, {}, None, "")
    assert repr(run) == f"Run({str(run.path)!r}, kind='head', task='binary')"
    assert run_with(tmp_path, "regression").predictions.schema["prediction"] == pl.Float64


def test_plots_are_scikit_learns_displays(tmp_path, monkeypatch):
    from matplotlib.figure import Figure
    from sklearn.metrics import ConfusionMatrixDisplay, PrecisionRecallDisplay, RocCurveDisplay

    def axes():
        return Figure().add_subplot()

    binary = run_with(tmp_path, "binary")
    assert isinstance(binary.plot_roc(ax=axes()), RocCurveDisplay)
    assert isinstance(binary.plot_pr("train", label="no", ax=axes()), PrecisionRecallDisplay)
    matrix = binary.plot_confusion(ax=axes())
    assert isinstance(matrix, ConfusionMatrixDisplay)
    known = binary.predictions.filter((pl.col("split") == "test") & pl.col("target").is_not_null())
    assert matrix.confusion_matrix.sum() == known.height
    several = run_with(tmp_path, "multiclass").plot_roc(ax=axes())
    assert len(several) == 3
    assert len({id(display.ax_) for display in several}) == 1
    labels = run_with(tmp_path, "multilabel")
    assert len(labels.plot_pr(ax=axes())) == 2  # the third was not trained
    assert labels.plot_confusion(label="q", normalize="true", ax=axes()).confusion_matrix.shape == (2, 2)
    with pytest.raises(InputError, match=r"label 'pp' is not one of this run\. Did you mean 'p'\? Known: p, q, r"):
        labels.plot_roc(label="pp")
    with pytest.raises(InputError, match="split 'tset' holds no positive and negative samples"):
        binary.plot_roc("tset")
    with pytest.raises(InputError, match="plot_roc: a regression run has no such curve"):
        run_with(tmp_path, "regression").plot_roc()


def test_a_run_is_never_seen_half_written(tmp_path):
    """Kill writers at random moments: what stands at the final name is always a whole run."""
    code = (
        "import sys; from pathlib import Path; from featurecache.run import RunWriter\n"
        "print('ready', flush=True)\n"
        "for i in range(10**6):\n"
        "    with RunWriter(sys.argv[1], kind='head', overwrite=True) as w:\n"
        "        [(w.path / f'{n}').write_text(str(i) * 1000) for n in range(5)]\n"
        f"        w.publish({RECORD!r})\n"
    )
    for pause in (0.02, 0.05, 0.08, 0.11):
        command = [sys.executable, "-c", code, str(tmp_path / "r")]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as other:
            other.stdout.readline()
            time.sleep(pause + 0.05)
            other.kill()
        if (tmp_path / "r").exists():
            assert len(load_run(tmp_path / "r").files) == 5
    write(tmp_path / "r", overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["r"]
