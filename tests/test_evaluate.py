import json
import shutil

import numpy as np
import pytest
from stage_two import TINY, TRUST, TWO, command, hashes, quick, read_table, write_home, write_table

import featurecache as fc
from featurecache.config import HeadConfig
from featurecache.crossval import cross_validate
from featurecache.errors import InputError
from featurecache.reporting.compare import compare_runs


@pytest.fixture(scope="module", autouse=True)
def _quick():
    with quick():
        yield


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return write_home(tmp_path_factory.mktemp("home"), runs=("head", "joint"))


def files_of(run):
    """All but the journal, to which each call adds a line."""
    return {name: value for name, value in hashes(run).items() if name.partition("/")[0] not in ("runs", "summary.md")}


@pytest.mark.parametrize("run", ["head", "joint"])
def test_evaluate_measures_new_samples_and_leaves_the_run_alone(home, tmp_path, run):
    shutil.copytree(home / "runs" / run, tmp_path / "run")
    before = files_of(tmp_path / "run")
    found = fc.evaluate(tmp_path / "run", home / "new/samples.csv", bootstrap=10, **TRUST)
    assert found.path == tmp_path / "run/evaluations/samples"
    rows = read_table(found.path / "predictions.csv")
    right = np.mean([row["target"] == row["prediction"] for row in rows])
    assert found.metrics["test"]["accuracy"] == pytest.approx(right)
    assert json.loads((found.path / "metrics.json").read_text()) == found.metrics
    after = files_of(tmp_path / "run")
    assert {name: after[name] for name in before} == before
    assert {name.split("/")[0] for name in after.keys() - before.keys()} == {"evaluations"}
    again = fc.evaluate(fc.load_run(tmp_path / "run"), home / "new/samples.csv", bootstrap=10, **TRUST)
    assert again.metrics == found.metrics
    assert files_of(tmp_path / "run") == after


def test_evaluate_refuses_what_has_no_labels_before_computing(home, tmp_path):
    shutil.copytree(home / "new", tmp_path / "new")
    rows = read_table(tmp_path / "new/samples.csv")
    rows[3]["label"] = "perhaps"
    write_table(tmp_path / "new/samples.csv", rows)
    with pytest.raises(InputError, match=r"column 'label': not one of the classes no, yes: sample 's003'.*'perhaps'"):
        fc.evaluate(home / "runs/head", tmp_path / "new/samples.csv", store=tmp_path / "store", **TRUST)
    write_table(tmp_path / "new/samples.csv", [{"lable": row.pop("label"), **row} for row in rows])
    with pytest.raises(InputError, match=r"no column 'label'. Did you mean 'lable'"):
        fc.evaluate(home / "runs/head", tmp_path / "new/samples.csv", store=tmp_path / "store", **TRUST)
    with pytest.raises(InputError, match="labels are needed: give a manifest"):
        fc.evaluate(home / "runs/head", tmp_path / "new/images/000-a0.png", **TRUST)
    assert not (tmp_path / "store").exists()


def test_evaluate_takes_unknown_labels_for_what_they_are(home, tmp_path):
    shutil.copytree(home / "new", tmp_path / "new")
    shutil.copytree(home / "runs/head", tmp_path / "run")
    rows = read_table(tmp_path / "new/samples.csv")
    rows[3]["label"] = ""
    write_table(tmp_path / "new/samples.csv", rows)
    for view in TWO:
        if rows[5][view]:
            (tmp_path / "new" / rows[5][view]).write_bytes(b"no picture")
    found = fc.evaluate(tmp_path / "run", tmp_path / "new/samples.csv", bootstrap=0, **TRUST)
    assert found.metrics["test"]["n"] == 10
    assert len(read_table(found.path / "predictions.csv")) == 11
    about = json.loads((found.path / "evaluation.json").read_text())
    assert about["flow"]["samples"] == 12
    left = {step["why"]: step["samples"] for step in about["flow"]["left_out"]}
    assert left == {"unreadable image": 1, "no known label": 1}
    assert about["flow"]["used"]["test"]["samples"] == 10
    assert about["command"].startswith("featurecache.evaluate(")


def test_an_evaluation_keeps_the_command_without_paths_of_this_machine(home, tmp_path):
    shutil.copytree(home / "runs/head", tmp_path / "run")
    assert command("evaluate", tmp_path / "run", "--at", "specificity=0.5", "--bootstrap", 0).status == 0
    about = json.loads((tmp_path / "run/evaluations/own-test-at-specificity=0.5/evaluation.json").read_text())
    assert about["command"].startswith("featurecache evaluate ")
    assert about["command"].endswith(" --at specificity=0.5 --bootstrap 0")
    assert str(tmp_path) not in about["command"]
    assert "flow" not in about, "that is the run's own"


def test_subgroups_of_new_samples_are_the_same_figures_on_their_rows(home, tmp_path):
    shutil.copytree(home / "new", tmp_path / "new")
    shutil.copytree(home / "runs/head", tmp_path / "run")
    rows = read_table(tmp_path / "new/samples.csv")
    for i, row in enumerate(rows):
        row["site"] = ("north", "south", "")[min(i % 4, 2)]
    write_table(tmp_path / "new/samples.csv", rows)
    found = fc.evaluate(tmp_path / "run", tmp_path / "new/samples.csv", by="site", bootstrap=10, **TRUST)
    site = {row["sample_id"]: row["site"] for row in rows}
    said = read_table(found.path / "predictions.csv")
    assert [part.value for part in found.subgroups] == ["", "north", "south"]
    said_lines = str(found).splitlines()
    assert [line.partition(" n ")[0].strip() for line in said_lines[-5:-1]] == [
        "test", "site=(empty)", "site=north", "site=south",
    ]  # fmt: skip
    assert said_lines[-1] == f"written   {found.path}"
    assert str(found.scored).splitlines()[-2:] == ["predicted 12 samples", "images    computed 20, reused 0"]
    for part in found.subgroups:
        mine = [row for row in said if site[row["sample_id"]] == part.value]
        assert part.n == len(mine)
        assert part.metrics["accuracy"] == pytest.approx(np.mean([r["target"] == r["prediction"] for r in mine]))
        assert part.small.startswith(f"{part.n} groups")
    written = json.loads((found.path / "metrics.json").read_text())
    assert written["by"]["column"] == "site"
    assert written["by"]["subgroups"].keys() == {"", "north", "south"}
    assert any("figures on them say too much" in note for note in found.notes)  # ids s000 ... are in both
    with pytest.raises(InputError, match=r"no column 'sitee'. Did you mean 'site'"):
        fc.evaluate(tmp_path / "run", tmp_path / "new/samples.csv", by="sitee", store=tmp_path / "store", **TRUST)
    assert not (tmp_path / "store").exists()


def test_the_runs_own_test_samples_by_a_column_of_its_manifest(home, tmp_path):
    shutil.copytree(home / "runs/head", tmp_path / "run")
    run = fc.load_run(tmp_path / "run")
    test = run.arrays.of("test")
    ids = run.arrays.sample_ids.tolist()
    rows = [{"sample_id": name, "site": "ab"[i % 2]} for i, name in enumerate(ids)]
    table = write_table(tmp_path / "sites.csv", rows)
    found = fc.evaluate(run, by="site", table=table, bootstrap=0)
    assert found.path == tmp_path / "run/evaluations/own-test-by-site"
    assert sum(part.n for part in found.subgroups) == len(test.sample_ids)
    assert found.metrics["test"]["accuracy"] == run.metrics["test"]["accuracy"]
    images = [{"study": row["sample_id"], "site": row["site"]} for row in rows for _ in range(2)]  # a row per image
    long = fc.evaluate(run, by="site", table=write_table(tmp_path / "images.csv", images), id="study", bootstrap=0)
    assert [part.to_json() for part in long.subgroups] == [part.to_json() for part in found.subgroups]
    short = write_table(tmp_path / "short.csv", [{"sample_id": "s999", "site": "a"}])
    with pytest.raises(InputError, match=r"test samples of the run are not there, such as 's\d+'"):
        fc.evaluate(run, by="site", table=short)
    twice = write_table(tmp_path / "twice.csv", [{"sample_id": "s1", "site": s} for s in "ab"])
    with pytest.raises(InputError, match="sample 's1' has several values of 'site'"):
        fc.evaluate(run, by="site", table=twice)


@pytest.mark.parametrize("name", ["head", "joint"])
def test_the_runs_own_manifest_is_where_the_column_is_looked_for(tmp_path, home, name):
    """Found from the run, so that a project folder may be moved."""
    shutil.copytree(home / "runs" / name, tmp_path / "runs" / name)
    shutil.copytree(home / "data", tmp_path / "data")
    run = fc.load_run(tmp_path / "runs" / name)
    group = {row["sample_id"]: row["kind"] for row in read_table(home / "data/samples.csv")}
    found = fc.evaluate(run, by="kind", bootstrap=0)
    assert {part.value for part in found.subgroups} == {group[i] for i in run.arrays.of("test").sample_ids.tolist()}
    with pytest.raises(InputError, match=r"--by kindd: samples\.csv has no such column\. Did you mean 'kind'\?"):
        fc.evaluate(run, by="kindd")


def test_a_run_whose_manifest_has_changed_has_to_be_told_where_the_column_is(home, tmp_path):
    data = tmp_path / "data/samples.csv"
    shutil.copytree(home / "data", data.parent)
    fc.extract(data, store=tmp_path / "cache", views=TWO, **TINY)
    dataset = fc.FeatureDataset(tmp_path / "cache", dataset="samples", target="label")
    run = fc.fit_head(dataset, head="logistic", out=tmp_path / "runs/a", bootstrap=0)
    data.write_text(data.read_text() + "\n")
    asked = r"--by kind: say with --table where the column is \(the manifest of the run, samples.csv\)"
    with pytest.raises(InputError, match=asked):
        fc.evaluate(run, by="kind")
    data.unlink()
    with pytest.raises(InputError, match=asked):
        fc.evaluate(run, by="kind")


def test_a_wanted_sensitivity_is_chosen_on_the_runs_validation_samples(home, tmp_path):
    shutil.copytree(home / "runs/head", tmp_path / "run")
    run = fc.load_run(tmp_path / "run")
    found = fc.evaluate(run, at="sensitivity=1", bootstrap=0)
    valid = run.arrays.of("valid")
    cut = json.loads((found.path / "evaluation.json").read_text())["threshold"]
    assert cut["rule"] == "sensitivity=1"
    positive = valid.scores[valid.true == 1, 1]
    assert (positive >= cut["value"]).all()
    assert cut["value"] > valid.scores[:, 1][valid.scores[:, 1] < positive.min()].max(initial=-1)
    rows = read_table(found.path / "predictions.csv")
    assert {row["split"] for row in rows} == {"test"}
    for row in rows:
        assert row["prediction"] == ("yes" if float(row["p:yes"]) >= cut["value"] else "no")


def test_samples_of_a_cross_validation_are_samples_that_the_run_was_fitted_on(home, tmp_path):
    shutil.copytree(home / "data", tmp_path / "data")
    dataset = fc.FeatureDataset(home / "cache", dataset="samples", target="label")
    run = cross_validate(dataset, 3, HeadConfig.create({"head": "logistic", "out": tmp_path / "run", "bootstrap": 0}))
    found = fc.evaluate(run, tmp_path / "data/samples.csv", store=tmp_path / "store", bootstrap=0, **TRUST)
    assert any("48 of these samples have the ids" in note for note in found.notes)
    with pytest.raises(InputError, match="a cross-validation, whose head was fitted on all samples"):
        fc.finetune_joint(tmp_path / "data/samples.csv", init=run.path, views={"a": "a", "b": "b"}, out=tmp_path / "j")
    with pytest.raises(InputError, match="a cross-validation keeps no valid samples"):
        compare_runs([run, run])


def test_another_question_does_not_replace_the_answer_before(home, tmp_path):
    shutil.copytree(home / "runs/head", tmp_path / "run")
    new = home / "new/samples.csv"
    plain = fc.evaluate(tmp_path / "run", new, bootstrap=0, **TRUST)
    before = hashes(plain.path)
    asked = fc.evaluate(tmp_path / "run", new, at="sensitivity=1", bootstrap=0, **TRUST)
    assert asked.path.name == "samples-at-sensitivity=1"
    assert asked.metrics["test"]["sensitivity"] >= plain.metrics["test"]["sensitivity"]
    assert hashes(plain.path) == before
    own = fc.evaluate(tmp_path / "run", at="specificity=0.5", bootstrap=0)
    assert own.path.name == "own-test-at-specificity=0.5"
    for found in (plain, asked, own):
        assert {"metrics.json", "predictions.csv", "curves.json", "evaluation.json", "mistakes.json"} <= {
            path.name for path in found.path.iterdir()
        }
        said = json.loads((found.path / "mistakes.json").read_text())["mistakes"]
        wrong = [row for row in read_table(found.path / "predictions.csv") if row["target"] != row["prediction"]]
        assert {entry["sample_id"] for entry in said} <= {row["sample_id"] for row in wrong}
        assert len(said) == min(len(wrong), 12)
