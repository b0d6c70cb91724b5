"""A joint run keeps what a head's run keeps for its report: flow of samples, leak check, mistakes, what was stated."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from plugin_joint import write_samples

from featurecache.config import JointConfig
from featurecache.errors import InputError
from featurecache.joint.finetune import finetune_joint
from featurecache.joint.images import SampleImages
from featurecache.joint.predict import load_joint
from featurecache.joint.runner import Runner, make_fabric
from featurecache.joint.start import prepare
from featurecache.reporting.report import write_report

OPTIONS = {
    "views": {"a": "a", "b": "b"}, "body": "plugin_joint:tiny", "target": ("label",), "precision": "fp32",
    "device": "cpu", "workers": 1, "batch_size": 16, "lr": 1e-3, "freeze_epochs": 1, "epochs": 0, "augment": (),
    "settings": {"hidden": [8]}, "bootstrap": 0, "test": 0.4,
}  # fmt: skip
TRUST = ("plugin_joint:tiny",)


def config(manifest, **changes):
    return JointConfig.create({**OPTIONS, "manifest": manifest, **changes})


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    """60 samples of two to a patient; one is broken, two have no label, some lack view b."""
    path = write_samples(tmp_path_factory.mktemp("shown"), 60, missing=0.3, seed=2)
    header, *rows = path.read_text().splitlines()
    rows = [f"{row},p{i // 2}" for i, row in enumerate(rows)]
    for i in (10, 11):
        rows[i] = rows[i].replace(",no,", ",,").replace(",yes,", ",,")
    path.write_text("\n".join([f"{header},group", *rows]) + "\n")
    (path.parent / "images" / "004-a0.png").write_bytes(b"not an image")
    (path.parent / "about.toml").write_text('intended_use = "tests"\n')
    return path


@pytest.fixture(scope="module")
def run(manifest):
    torch.set_num_threads(1)
    return finetune_joint(
        config(manifest, out=manifest.parent / "run", missing="drop", about=manifest.parent / "about.toml")
    )


def test_every_sample_is_counted_once_and_no_group_or_image_is_torn(run, manifest):
    flow, check = run.record["flow"], run.record["leak_check"]
    why = {step["why"]: step["samples"] for step in flow["left_out"]}
    used = {side: count["samples"] for side, count in flow["used"].items()}
    assert (flow["samples"], flow["groups"]) == (60, 30)
    assert sum(why.values()) + sum(used.values()) == 60
    assert why["unreadable image"] == 1
    assert why["missing view"] > 5
    assert used == {side: run.metrics[side]["n"] for side in ("train", "valid", "test")}
    assert check["level"] == run.record["split"]["group"] == "group"
    assert check["images"] == 2 * sum(used.values())
    assert check["torn_groups"] == check["torn_images"] == check["without_hash"] == 0
    assert run.record["missing"] == "drop"


def test_the_mistakes_are_the_wrong_test_samples_with_their_pictures(run):
    listed = json.loads((run.path / "mistakes.json").read_text())
    test = run.predictions.filter(split="test").drop_nulls("target")
    wrong = test.filter(test["target"] != test["prediction"])["sample_id"].to_list()
    assert wrong
    assert {entry["sample_id"] for entry in listed["mistakes"]} <= set(wrong)
    assert len(listed["mistakes"]) == min(12, len(wrong))
    for entry in listed["mistakes"]:
        assert [picture["view"] for picture in entry["pictures"]] == ["a", "b"]
        assert all((run.path / picture["file"]).is_file() for picture in entry["pictures"])


def test_one_view_alone_is_what_the_network_says_of_a_sample_that_lacks_the_other(run, manifest):
    listed = json.loads((run.path / "mistakes.json").read_text())["one_view_right"]
    assert listed
    loaded = load_joint(run, trust=TRUST)
    fabric = make_fabric(torch.device("cpu"), "fp32")
    model = fabric.setup_module(loaded.model)
    runner = Runner(fabric, model, {view: setup.preprocessing for view, setup in loaded.setups.items()})
    start = prepare(config(manifest))
    ids = start.manifest.table["sample_id"].to_list()
    for view in ("a", "b"):
        one = start.manifest.cells.filter(start.manifest.cells["view"] == view)
        cut = SampleImages(replace(start.manifest, cells=one), loaded.setups)
        rows = np.array([ids.index(entry["sample_id"]) for entry in listed])
        assert cut.present[rows].sum(axis=1).tolist() == [1] * len(rows)
        _, outputs, _ = runner.predict(cut, rows, batch_size=16, workers=1)
        p = torch.softmax(outputs, dim=1)[:, 1].numpy()
        np.testing.assert_allclose([entry["single"][view]["probability"] for entry in listed], p, atol=1e-5)


def test_what_a_person_stated_and_the_flow_are_in_the_report(run):
    assert "tests" in (run.path / "about.toml").read_text()
    page = write_report(run.path).read_text(encoding="utf-8")
    for words in ("From the manifest to the split", "unreadable image", "Most confident mistakes", "time to fit"):
        assert words in page
    assert "data:image/" in page


def test_an_unknown_statement_is_refused_before_training(manifest, tmp_path):
    (tmp_path / "about.toml").write_text('intended = "x"\n')
    with pytest.raises(InputError, match=r"unknown key 'intended'. Did you mean 'intended_use'"):
        finetune_joint(config(manifest, out=tmp_path / "run", about=tmp_path / "about.toml"))
    assert not (tmp_path / "run").exists()


def test_of_pairs_both_are_shown_and_the_samples_counted(manifest, tmp_path):
    run = finetune_joint(config(manifest, out=tmp_path / "run", views={"image": "a"}, pairs=True, test=0.3))
    flow = run.record["flow"]
    assert flow["samples"] == 60
    assert sum(count["samples"] for count in flow["used"].values()) == 57
    assert run.record["leak_check"]["images"] == 57
    listed = json.loads((run.path / "mistakes.json").read_text())
    assert listed["one_view_right"] == []
    for entry in listed["mistakes"]:
        assert [picture["view"] for picture in entry["pictures"]] == ["first", "second"]
        first, second = ((run.path / picture["file"]).read_bytes() for picture in entry["pictures"])
        assert first != second
    assert listed["mistakes"]
    none = finetune_joint(config(manifest, out=tmp_path / "none", images="none"))
    assert json.loads((none.path / "mistakes.json").read_text())["notes"] == ["Pictures were not wanted."]
