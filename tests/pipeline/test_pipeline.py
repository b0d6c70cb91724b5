"""A declared pipeline: strict options, stages in order, nothing done twice, and what is stale done again."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from extract_kit import BODY, image, main, read_rows, write_manifest

from featurecache.errors import InputError, MissingFileError
from featurecache.joint import finetune
from featurecache.pipeline.call import run_pipeline
from featurecache.pipeline.config import read_pipeline
from featurecache.pipeline.initial import write_initial
from featurecache.pipeline.makers import check_maker, make, maker_names
from featurecache.pipeline.pipeline import open_pipeline
from featurecache.pipeline.plan import CACHED, TO_RUN
from featurecache.run import load_run

STAGES = f"""
title = "Two views"

[data]
manifest = "samples.csv"
views = {{ left = "left", right = "right" }}
target = ["label"]
group = "patient"

[extract]
body = "{BODY}"
engine = "torch"
precision = "fp32"
store_dtype = "float32"

[[fit]]
head = "logistic"
bootstrap = 20

[[fit]]
name = "left-alone"
head = "logistic"
views = ["left"]
bootstrap = 20
calibrate = "isotonic"

[compare]
bootstrap = 20

[variants.weak]
"fit.settings.C" = 0.001
"""


@pytest.fixture
def study(tmp_path):
    """A pipeline file beside the manifest and images that it names."""
    rows = []
    for number in range(36):
        row = {"sample_id": f"s{number:02d}", "label": number % 2, "patient": f"p{number // 2:02d}"}
        for shift, view in enumerate(("left", "right")):
            row[view] = f"{view}{number:02d}.png"
            image(100 * shift + number).save(tmp_path / row[view])
        rows.append(row)
    write_manifest(tmp_path / "samples.csv", rows)
    (tmp_path / "study.toml").write_text(STAGES, encoding="utf-8")
    return tmp_path


def states(pipeline) -> dict[str, str]:
    return {step.name: step.state for step in pipeline}


def test_done_once_cached_afterwards_and_redone_where_something_changed(study):
    file, out = study / "study.toml", study / "out"
    first = open_pipeline(file, out).run()
    assert states(first) == dict.fromkeys(["features", "logistic", "left-alone", "comparison"], "done")
    assert first[0].figures["computed"] == 72
    assert load_run(out / "study" / "runs" / "left-alone").views == ("left",)
    before = (out / "study" / "runs" / "logistic" / "run.json").read_bytes()
    assert set(states(open_pipeline(file, out).run()).values()) == {CACHED}
    assert (out / "study" / "runs" / "logistic" / "run.json").read_bytes() == before

    plan = {step.name: step for step in open_pipeline(file, out, changes={"fit.left-alone.seed": 1}).plan()}
    assert {name: step.state for name, step in plan.items()} == {
        "features": CACHED, "logistic": CACHED, "left-alone": TO_RUN, "comparison": TO_RUN
    }  # fmt: skip
    assert plan["features"].why == "0 images to compute, 72 reused"
    assert plan["left-alone"].why == "its options or inputs have changed"
    assert plan["comparison"].why == "left-alone runs before"

    image(999).save(study / "left03.png")
    plan = {step.name: (step.state, step.why) for step in open_pipeline(file, out).plan()}
    assert plan["features"] == (TO_RUN, "1 images to compute, 71 reused")
    assert plan["logistic"] == (TO_RUN, "features runs before")
    again = open_pipeline(file, out).run()
    assert states(again) == dict.fromkeys(["features", "logistic", "left-alone", "comparison"], "done")
    assert (again[0].figures["computed"], again[0].figures["reused"]) == (1, 71)


@pytest.mark.slow
def test_a_view_that_some_samples_lack_is_compared_on_those_in_common(study):
    """As `init` writes it: all views, and one of them alone, which leaves out the samples without it."""
    table = read_rows(study / "samples.csv")
    for row in table[::4]:
        row["left"] = ""
    write_manifest(study / "samples.csv", table)
    done = run_pipeline(study / "study.toml", study / "out")
    both, alone = (load_run(done.folder / "runs" / name) for name in ("logistic", "left-alone"))
    figures = done.steps[-1].figures
    n, every = (len(run.arrays.of("test").sample_ids) for run in (alone, both))
    assert 0 < n < every
    assert figures["n"] == n
    said = f"measured on those in common: {n} (logistic {every}, left-alone {n}) for test"
    assert said in figures["notes"][0]
    assert said in done.report.read_text(encoding="utf-8")

    changes = {"fit.left-alone.seed": 3}
    with pytest.raises(InputError, match=r"left-alone: of its \d+ test samples, logistic trained") as caught:
        open_pipeline(study / "study.toml", study / "out", changes=changes).run()
    runs = ", ".join(str(done.folder / "runs" / name) for name in ("logistic", "left-alone"))
    assert str(caught.value).endswith(f"\nDone before, and kept: {runs}. The same command goes on behind them.")


@pytest.mark.slow
def test_a_corrected_label_and_a_damaged_run_are_not_taken_for_done(study):
    file, out = study / "study.toml", study / "out"
    open_pipeline(file, out).run()
    text = (study / "samples.csv").read_text(encoding="utf-8")
    (study / "samples.csv").write_text(text.replace("s00,0,", "s00,1,"), encoding="utf-8")
    assert states(open_pipeline(file, out).plan())["features"] == TO_RUN
    steps = {step.name: step for step in open_pipeline(file, out).run()}
    assert (steps["features"].state, steps["logistic"].state) == (CACHED, "done")
    assert steps["features"].figures["computed"] == 0
    (out / "study" / "runs" / "logistic" / "metrics.json").write_text("{}", encoding="utf-8")
    steps = states(open_pipeline(file, out).run())
    assert (steps["logistic"], steps["left-alone"]) == ("done", CACHED)


@pytest.mark.slow
def test_what_a_kill_leaves_is_gone_on_with(study, monkeypatch):
    """The joint stage is killed after its first epoch: the same command resumes it."""
    from featurecache.joint.loop import Loop

    joint = f'[[joint]]\nbody = "{BODY}"\nepochs = 2\nfreeze_epochs = 0\nbootstrap = 10\naugment = []\nworkers = 1\n'
    file = study / "joint.toml"
    file.write_text(STAGES.partition("[extract]")[0] + joint, encoding="utf-8")
    resumed = []
    real = finetune.finetune_joint

    def watched(config, **rest):
        resumed.append(config.resume)
        return real(config, **rest)

    monkeypatch.setattr(finetune, "finetune_joint", watched)
    with monkeypatch.context() as killing:
        killing.setattr(Loop, "run", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            open_pipeline(file, study / "out").run()
    assert states(open_pipeline(file, study / "out").plan()) == {"joint": TO_RUN}
    assert states(open_pipeline(file, study / "out").run()) == {"joint": "done"}
    assert states(open_pipeline(file, study / "out").run()) == {"joint": CACHED}
    assert resumed == [False, True]


@pytest.mark.slow
def test_the_command_tells_what_it_did(study, capsys):
    words = ("pipeline", study / "study.toml", "--out", study / "out")
    status, out, err = main(*words, "--dry-run", "--json", capsys=capsys)
    assert (status, err) == (0, "")
    assert [stage["state"] for stage in json.loads(out)["stages"]] == [TO_RUN] * 4
    assert not (study / "out").exists()
    status, out, err = main(*words, "--variant", "weak", capsys=capsys)
    assert status == 0, err
    lines = out.splitlines()
    assert lines[0] == "extract   features    done    computed 72, reused 0"
    assert lines[1].startswith("fit       logistic    done    test roc_auc ")
    assert "first of 2 on validation: " in lines[3]
    page = (study / "out" / "study" / "report.html").read_text(encoding="utf-8")
    assert "Two views" in page
    assert 'href="runs/left-alone/report.html"' in page
    assert page.count("<small>left</small>") == page.count("<small>right</small>") == 12, "which view a picture is"
    assert "left-alone: its calibration was fitted on these validation samples" in page
    run = load_run(study / "out" / "study" / "runs" / "logistic")
    assert run.record["head"]["settings"]["C"] == 0.001
    summary = json.loads((study / "out" / "study" / "summary.json").read_text(encoding="utf-8"))
    assert [stage["name"] for stage in summary["stages"]] == ["features", "logistic", "left-alone", "comparison"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fit.logistic.hed": 1}, "fit.0: unknown key 'hed'. Did you mean 'head'?"),
        ({"extrct.body": "x"}, "unknown key 'extrct'. Did you mean 'extract'?"),
        ({"data.targt": "x"}, "data: unknown key 'targt'. Did you mean 'target'?"),
        ({"extract.store": "x"}, "extract.0: 'store' is filled in by the pipeline; leave it out"),
        ({"extract.precision": "fp8"}, "extract.0.precision: Input should be 'auto', 'fp32', 'bf16' or 'fp16'"),
        ({"fit.extract": "featurs"}, "extract = 'featurs' is no extract stage. Did you mean 'features'?"),
        ({"fit.left-alone.name": "logistic"}, "two stages are called 'logistic'"),
        ({"extract": []}, "there is no [extract] whose features it could take"),
        ({"compare.runs": ["logistc"]}, "runs = 'logistc' is no fit or tune or joint stage. Did you mean 'logistic'?"),
        ({"extract.body": "run:joint"}, "body = 'joint' is no joint stage. There is no [joint]."),
        ({"fit.logistic.settings.c": 1}, "fit 'logistic', settings of head logistic"),
        ({"title.x.y": 1}, "title"),
    ],
)
def test_what_is_wrong_is_named_with_file_and_key(study, changes, message):
    with pytest.raises(InputError) as caught:
        open_pipeline(study / "study.toml", study, changes=changes)
    assert message in str(caught.value)
    assert "study.toml" in str(caught.value) or "--set" in str(caught.value)


def test_files_that_are_none_and_stages_in_a_circle(tmp_path):
    with pytest.raises(MissingFileError, match=r"no such file, and no recipe of that name\."):
        read_pipeline(tmp_path / "none.toml")
    file = tmp_path / "p.toml"
    file.write_text("title = ", encoding="utf-8")
    with pytest.raises(InputError, match="not valid TOML"):
        read_pipeline(file)
    file.write_text("[data]\n", encoding="utf-8")
    with pytest.raises(InputError, match="no samples: give manifest = PATH, or maker = NAME"):
        read_pipeline(file)
    file.write_text('[data]\nmaker = "emoji"\n[extract]\nbody = "run:j"\n[[fit]]\n[joint]\nname = "j"\ninit = "fc"\n')
    with pytest.raises(InputError, match="stages that need each other: features, fc, j"):
        read_pipeline(file)
    with pytest.raises(InputError, match=r"no variant 'x'\. It has: none\."):
        read_pipeline(file, variant="x")


def test_makers_are_the_same_every_time_and_checked(tmp_path):
    assert {"digits", "digits-halves", "emoji", "emoji-masks"} <= set(maker_names())
    for name in maker_names():
        options = {"n": 12}
        made, root = make(tmp_path / "a", name, options)
        again, _ = make(tmp_path / "b", name, options)
        files = sorted(path.relative_to(made.parent) for path in made.parent.rglob("*") if path.is_file())
        assert files == sorted(path.relative_to(again.parent) for path in again.parent.rglob("*") if path.is_file())
        for path in files:
            assert (made.parent / path).read_bytes() == (again.parent / path).read_bytes(), path
        assert root is None or root.is_dir()
        assert make(tmp_path / "a", name, options) == (made, root)
    assert not list(tmp_path.glob("*/.*-*"))  # no scratch folders
    with pytest.raises(InputError, match=r"no data maker 'emojo'\. Did you mean 'emoji'\?"):
        check_maker("emojo", {})
    with pytest.raises(InputError, match=r"no option 'm'\. Known: n, missing\."):
        check_maker("emoji", {"m": 1})


def test_masks_lie_on_their_images(tmp_path):
    from PIL import Image

    manifest, _ = make(tmp_path, "emoji-masks", {"n": 3, "size": 48})
    for mask in sorted((manifest.parent / "masks").glob("*.png")):
        with Image.open(mask) as picture:
            inside = np.asarray(picture)
        assert set(np.unique(inside)) <= {0, 255}
        assert 0.02 < (inside > 0).mean() < 0.6
        with Image.open(manifest.parent / "images" / mask.name) as picture:
            assert picture.size == (48, 48)


def test_init_writes_a_pipeline_that_is_valid(tmp_path, capsys):
    status, out, _ = main("init", tmp_path / "study", capsys=capsys)
    assert status == 0
    assert out.splitlines()[0] == f"written   {tmp_path}/study/pipeline.toml"
    opened = open_pipeline(tmp_path / "study" / "pipeline.toml", tmp_path / "out")
    assert [step.name for step in opened.steps] == ["features", "logistic", "fc", "front-alone", "comparison"]
    uncommented = (tmp_path / "study" / "pipeline.toml").read_text(encoding="utf-8").replace("\n# [[", "\n[[")
    for line in ("id =", "root =", "split =", "uncertain =", "reader =", "init =", "epochs =", "freeze_epochs ="):
        uncommented = uncommented.replace(f"\n# {line}", f"\n{line}")
    (tmp_path / "all.toml").write_text(uncommented, encoding="utf-8")
    config = read_pipeline(tmp_path / "all.toml")  # what is commented out is valid too
    assert config.joint[0].called == "joint"
    with pytest.raises(InputError, match="is there already"):
        write_initial(tmp_path / "study")
    status, _, err = main("pipeline", tmp_path / "study" / "pipeline.toml", "--dry-run", capsys=capsys)
    assert status == 2
    assert "images/s1-front.jpg is missing" in err
    assert "another folder, give [data] root." in err
    _, _, err = main("init", tmp_path / "a study", capsys=capsys)
    assert err.endswith(f"then: featurecache pipeline '{tmp_path}/a study/pipeline.toml' --dry-run\n")


def test_a_recipe_that_comes_along_is_found_by_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert read_pipeline(Path("joint")) == read_pipeline(Path("joint.toml"))
    with pytest.raises(MissingFileError, match=r"joimt: no such file.* Did you mean 'joint'\? Recipes: bitmoji-like, "):
        read_pipeline(Path("joimt"))
    with pytest.raises(MissingFileError, match="no such file"):  # a path is a path
        read_pipeline(Path("elsewhere/joint.toml"))
    Path("joint").write_text("unknown = 1")
    with pytest.raises(InputError, match="unknown"):  # a file goes before a recipe
        read_pipeline(Path("joint"))
