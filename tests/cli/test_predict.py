import json
import shutil

import pytest
from stage_two import command, hashes, installed, quick, read_table, write_home, write_table

TRUST = ["--trust-factory", "plugin_joint:tiny"]


@pytest.fixture(scope="module", autouse=True)
def _quick():
    with quick():
        yield


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return write_home(tmp_path_factory.mktemp("home"), runs=("head", "joint"))


def test_predictions_are_incremental(home, tmp_path):
    words = ["predict", home / "runs/head", home / "new/samples.csv", "--out", tmp_path / "p.csv", *TRUST]
    first = command(*words, "--store", tmp_path / "store", "--json").json
    assert (first["status"], first["reused"], first["failed"]) == ("done", 0, [])
    assert first["computed"] > 12
    done = command(*words, "--store", tmp_path / "store")
    assert done.out == (
        f"predicted 12 samples into {tmp_path}/p.csv\nimages    computed 0, reused {first['computed']:,}\n"
    )
    shown = done.err.splitlines()[-1].split()
    assert shown[:5] == ["Next:", "featurecache", "evaluate", f"{home}/runs/head", f"{home}/new/samples.csv"]
    assert shown[5:] == [*TRUST, "--store", f"{tmp_path}/store"]
    rows = read_table(home / "new/samples.csv")
    (home / "new/again.csv").write_text("")
    write_table(home / "new/again.csv", rows[:6])
    more = [*words[:2], home / "new/again.csv", *words[3:], "--store", tmp_path / "store", "--quiet"]
    assert command(*more) == (0, f"{tmp_path}/p.csv\n", "")


@pytest.mark.parametrize("run", ["head", "joint"])
def test_files_by_view(home, tmp_path, run):
    images = home / "new/images"
    done = command("predict", home / "runs" / run, f"a={images}/000-a0.png", f"b={images}/000-b0.png",
                   "--out", tmp_path / "p.parquet", *TRUST, "--json")  # fmt: skip
    assert done.status == 0, done.err
    assert done.json["samples"] == 1
    assert (tmp_path / "p.parquet").read_bytes()[:4] == b"PAR1"
    done = command("predict", home / "runs" / run, f"front={images}/000-a0.png", "--out", tmp_path / "p.csv", *TRUST)
    assert done.status == 2
    assert "files are given as a=FILE b=FILE, once per sample" in done.err


def test_options_per_view_mean_the_views_of_the_run(home, tmp_path):
    words = ["predict", home / "runs/head", home / "new/samples.csv", "--out", tmp_path / "p.csv", *TRUST]
    done = command(*words, "--weights", f"b={tmp_path}/gone.safetensors")
    assert done.status == 2
    assert "gone.safetensors' of view 'b': give --weights b=PATH" in done.err
    assert "view 'a'" not in done.err
    done = command(*words, "--body", "b=torchvision/squeezenet1_1", "--weights", "b=shipped")
    assert done.status == 2
    assert "view b: body.architecture 'plugin_joint:tiny' -> 'torchvision/squeezenet1_1'" in done.err


def test_failed_samples_are_status_3(home, tmp_path):
    rows = read_table(home / "new/samples.csv")
    (home / "new/broken.png").write_bytes(b"none")
    rows[0]["a"] = "broken.png"
    write_table(home / "new/broken.csv", rows)
    done = command(
        "predict", home / "runs/head", home / "new/broken.csv", "--out", tmp_path / "p.csv", *TRUST, "--json"
    )
    assert done.status == 3
    assert done.json["status"] == "partly failed"
    assert done.json["failed"][0] == {**done.json["failed"][0], "sample_id": "s000", "view": "a", "path": "broken.png"}


def test_evaluate_with_and_without_manifest(home):
    done = command("evaluate", home / "runs/head")
    assert done.status == 0
    assert done.out.splitlines()[0].startswith("test      n ")
    own = command("evaluate", home / "runs/head", "--json").json
    metrics = json.loads((home / "runs/head/metrics.json").read_text())
    assert own["test_accuracy"] == metrics["test"]["accuracy"]
    before = {name: value for name, value in hashes(home / "runs/head").items() if name != "summary.md"}
    words = ["--store", home / "cache", *TRUST, "--json", "--bootstrap", 10]
    done = command("evaluate", home / "runs/head", home / "new/samples.csv", *words)
    assert done.status == 0, done.err
    found = done.json
    assert found["outputs"] == [f"{home}/runs/head/evaluations/samples"]
    assert found["test_n"] == 12
    after = hashes(home / "runs/head")
    assert {name: after[name] for name in before} == before
    assert command("evaluate", home / "runs/head", "--json").json == own


def test_no_run(home, tmp_path):
    done = command("evaluate", tmp_path / "none")
    assert done.status == 2
    assert "no such run directory" in done.err
    done = command("predict", home / "new/samples.csv", home / "runs/head", "--out", tmp_path / "p.csv")
    assert done.status == 2
    assert f"{home}/new/samples.csv: is a file, not a run directory. Where a command takes both, the run" in done.err


def test_without_a_store_it_says_that_features_are_not_kept(home, tmp_path):
    words = [home / "new/samples.csv", "--out", tmp_path / "p.csv", *TRUST]
    kept = "features are not kept; with --store STORE only new images are computed"
    assert kept in command("predict", home / "runs/head", *words).out
    assert kept not in command("predict", home / "runs/joint", *words).out
    unused = "--store is not used: a joint run's images go through its network each time"
    assert unused in command("predict", home / "runs/joint", *words, "--store", tmp_path / "S").out
    assert unused not in command("predict", home / "runs/head", *words, "--store", tmp_path / "S").out
    again = shutil.copy(home / "new/samples.csv", home / "new/again.csv")
    assert kept in command("evaluate", home / "runs/head", again, *TRUST).out
    assert kept not in command("evaluate", home / "runs/head").out


@pytest.mark.slow
def test_as_installed(home, tmp_path):
    done = installed("predict", home / "runs/head", home / "new/samples.csv", "--out", "p.csv", *TRUST, cwd=tmp_path)
    assert done.status == 0, done.err
    assert len(read_table(tmp_path / "p.csv")) == 12
    done = installed("predict", home / "runs/joint", home / "new/samples.csv", "--out", "q.csv", cwd=tmp_path)
    assert done.status == 2
    assert "Nothing was imported" in done.err
