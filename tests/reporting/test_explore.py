import itertools
import json
import re
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
from explore_kit import EVIL, EVIL_ID, write_explored
from stage_two import command, quick
from threadpoolctl import threadpool_limits

from featurecache.data.readers.base import Decoded
from featurecache.dataset import FeatureDataset
from featurecache.errors import InputError
from featurecache.features.features import ArrayFeatures, Block
from featurecache.reporting.embedding import alike_pairs, fit_components, neighbours, tsne
from featurecache.reporting.explore import explore, render
from featurecache.reporting.explorefields import prediction_columns, suspects, table_column
from featurecache.reporting.thumbnails import Pictures, eight_bit, fitting
from featurecache.run import load_run
from featurecache.rundir.predictions import Predictions


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    with quick():
        return write_explored(tmp_path_factory.mktemp("explored"))


@pytest.fixture
def dataset(home):
    data = FeatureDataset(home / "cache", dataset="samples")
    yield data
    data.store.close()


def page_data(path):
    text = path.read_text(encoding="utf-8")
    return text, json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)[1])


def features(x, *widths):
    edges = np.cumsum([0, *(widths or (x.shape[1],))])
    pairs = enumerate(itertools.pairwise(edges.tolist()))
    blocks = tuple(Block(f"v{i}", "t", a, b, (b - a,)) for i, (a, b) in pairs)
    return ArrayFeatures(x.astype(np.float32), blocks)


def test_components_are_those_of_an_svd():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(300, 40)) * 5 * 0.8 ** np.arange(40) + 3
    made, coordinates = fit_components(features(x), np.arange(300), k=3)
    centred = x - x.mean(axis=0)
    _, s, axes = np.linalg.svd(centred, full_matrices=False)
    np.testing.assert_allclose(made.explained, (s**2 / (s**2).sum())[:3], rtol=2e-3)
    np.testing.assert_allclose(np.abs((made.axes * axes[:3].T).sum(axis=0)), 1, atol=2e-3)
    scale = 1 / np.sqrt(centred.var(axis=0).sum())
    np.testing.assert_allclose(np.abs(coordinates[:, 0]), np.abs(centred @ axes[0]) * scale, atol=0.02)


def test_a_loud_view_does_not_drown_a_quiet_one():
    rng = np.random.default_rng(1)
    quiet, loud = rng.normal(size=(200, 1)), rng.normal(size=(200, 1))
    x = np.hstack([quiet, 1000 * loud])
    made, _ = fit_components(features(x, 1, 1), np.arange(200))
    assert np.abs(made.axes).min() > 0.5  # equal weight, whatever the scale
    alone, _ = fit_components(features(x), np.arange(200))
    assert np.abs(alone.axes).min() < 0.01


def test_a_missing_view_is_an_average_one():
    rng = np.random.default_rng(2)
    x = rng.normal(size=(50, 6))
    x[::5, 3:] = np.nan
    made, coordinates = fit_components(features(x, 3, 3), np.arange(50))
    assert np.isfinite(coordinates).all()
    filled = np.where(np.isnan(x), np.nanmean(x, axis=0), x)
    np.testing.assert_allclose(made.project(filled.astype(np.float32)), coordinates, atol=1e-5)


@pytest.mark.parametrize("shape", [(1, 5), (4, 1), (3, 3), (5, 2)])
def test_few_samples_or_features_still_have_a_place(shape):
    _, coordinates = fit_components(features(np.random.default_rng(0).normal(size=shape)), np.arange(shape[0]))
    assert coordinates.shape[0] == shape[0]
    assert coordinates.shape[1] >= 2
    assert np.isfinite(coordinates).all()


def test_neighbours_and_pairs():
    angle = np.deg2rad([0, 2, 90, 93, 180])
    points = np.stack([np.cos(angle), np.sin(angle)], axis=1).astype(np.float32) * [[1], [9], [1], [1], [2]]
    near, cosine = neighbours(points.astype(np.float32), 2)
    assert near[:, 0].tolist() == [1, 0, 3, 2, 3]
    np.testing.assert_allclose(cosine[0, 0], np.cos(np.deg2rad(2)), atol=1e-6)
    assert [pair[:2] for pair in alike_pairs(near, cosine, 0.99)] == [(0, 1), (2, 3)]
    assert neighbours(points[:1].astype(np.float32), 3)[0].shape == (1, 0)


def test_tsne_needs_some_samples():
    with pytest.raises(InputError, match="needs 10 samples or more, found 4"):
        tsne(np.zeros((4, 3), np.float32))


def predictions(true, scores, splits):
    text = np.array([f"s{i}" for i in range(len(true))])
    return Predictions(
        "multiclass", ("kind",), ("p", "q", "r"), np.array(true), np.array(scores, float), text, text,
        np.array(splits), text,
    )  # fmt: skip


def test_suspects_are_judged_only_where_the_model_did_not_learn():
    sure = [0.9, 0.05, 0.05]
    found = predictions([1, 1, 0, 1, 2], [sure, sure, sure, [0.1, 0.8, 0.1], [0.1, 0.2, 0.7]],
                        ["train", "test", "test", "valid", "test"])  # fmt: skip
    listed = suspects(found, None, found.sample_ids)
    assert [(s.row, s.given, s.said) for s in listed] == [(1, "q", "p")]
    assert listed[0].score == pytest.approx(0.85)


def test_a_model_that_is_seldom_sure_of_a_class_is_not_asked_to_be():
    # Of `p` it is 0.9 sure where that is the label, of `q` 0.5: 0.55 for p is no reason to doubt, 0.5 for q is.
    scores = [[0.9, 0.05, 0.05], [0.55, 0.4, 0.05], [0.3, 0.6, 0.1], [0.35, 0.55, 0.1]]
    found = predictions([0, 1, 1, 0], scores, ["test"] * 4)
    assert [s.row for s in suspects(found, None, found.sample_ids)] == [3]


def several(task, true, scores):
    text = np.array([f"s{i}" for i in range(len(true))])
    splits = np.array(["test"] * (len(true) - 1) + ["train"])
    return Predictions(task, ("l0", "l1"), (), np.array(true, float), np.array(scores, float), text, text, splits, text)


def test_labels_of_a_multilabel_run():
    unknown = np.nan
    found = several("multilabel", [[1, 0], [unknown, 1], [0, 0]], [[0.1, 0.2], [0.9, 0.9], [0.9, 0.9]])
    named = {column.name: column.to_json() for column in prediction_columns(found, None, folds=None)}
    assert [named["labels"]["labels"][i] for i in named["labels"]["values"]] == ["l0", "l1", "none"]
    assert [named["predicted labels"]["labels"][i] for i in named["predicted labels"]["values"]] == [
        "none", "l0, l1", "l0, l1",
    ]  # fmt: skip
    assert named["l0"]["values"] == [1, None, 0]
    assert named["wrong labels"]["values"] == [1.0, 0.0, 2.0]
    assert [(s.row, s.given, s.said) for s in suspects(found, None, found.sample_ids)] == [(0, "l0: yes", "no")]


def test_values_of_a_regression_run():
    true = [[float(i), 0.0] for i in range(30)]
    scores = [[row[0] + (9.0 if i == 4 else 0.1 * (-1) ** i), 0.0] for i, row in enumerate(true)]
    found = several("regression", true, scores)
    named = {column.name: column.to_json() for column in prediction_columns(found, None, folds=None)}
    assert named["absolute error of l0"]["values"][4] == 9.0
    assert (named["l0"]["kind"], named["prediction of l0"]["values"][0]) == ("number", 0.1)
    listed = suspects(found, None, found.sample_ids)
    assert [(s.row, s.given, s.said) for s in listed] == [(4, "l0 4", "13")]
    assert listed[0].score > 5


def test_columns_of_the_manifest():
    table = pl.DataFrame({"age": [30.5, None, 70.0], "sex": ["f", "m", None]})
    age, sex = table_column(table, "age").to_json(), table_column(table, "sex").to_json()
    assert (age["kind"], age["values"]) == ("number", [30.5, None, 70.0])
    assert (sex["labels"], sex["values"]) == (["f", "m"], [0, 1, None])


def test_deep_pixels_are_stretched_for_the_eye():
    ramp = np.linspace(1000, 3000, 16, dtype=np.uint16).reshape(4, 4, 1)
    shown = eight_bit(Decoded(ramp, 65535.0))
    assert (shown.dtype, shown.shape, shown.min(), shown.max()) == (np.uint8, (4, 4), 0, 255)


def test_page(home, dataset, tmp_path):
    made = explore(dataset, tmp_path / "m.html", run=load_run(home / "runs/cv"), by=["kind"])
    text, data = page_data(made.path)
    assert EVIL not in text
    assert EVIL_ID not in text
    assert data["ids"][0] == EVIL_ID
    named = {field["name"]: field for field in data["fields"]}
    assert EVIL in named["class"]["labels"]
    assert named["split"]["labels"] == ["tested in one of 3 folds"]
    assert {"prediction", "error", "kind", "views"} <= set(named)
    assert str(home) not in text
    assert not re.search(r"""(src|href)=["']?(?!data:)\w""", text.split("<script")[0])
    assert "https:" not in text
    assert "http:" not in text
    # s002 is a copy of the first sample under another label.
    first = data["duplicates"][0]
    assert first[:2] == [0, 2]
    assert first[2] > 0.9999
    assert "same files" in first[3]
    assert "no and" in first[3] or "and no" in first[3]
    assert len(data["pictures"][0]) == 2
    assert data["pictures"][0][0][1].startswith("data:image/")
    assert data["near"][0][0] == 2
    assert made.pictures == sum(map(len, data["pictures"])) > 80


@pytest.mark.parametrize(("run", "who"), [("fc", "Run fc"), ("", "The model")])
def test_whose_share_of_right_answers_is_told(run, who):
    page = render(
        {}, title="t", run=run, method="pca", variance=0.5, n=9, total=9, views=("a",), notes=[], alike=0.95,
        n_pairs=0, n_doubts=2, listed=200, judged="Judged.", share=0.827, regression=False,
    )  # fmt: skip
    assert f"Judged. {who} is right on 82.7\N{NO-BREAK SPACE}% of the samples judged here; the lower" in page


def test_no_pictures_for_privacy(dataset, tmp_path):
    made = explore(dataset, tmp_path / "m.html", images="none", parquet=tmp_path / "m.parquet")
    text, data = page_data(made.path)
    assert "data:image" not in text
    assert set(map(len, data["pictures"])) == {0}
    assert pl.read_parquet(tmp_path / "m.parquet").columns[:3] == ["sample_id", "x", "y"]
    assert "a" not in pl.read_parquet(tmp_path / "m.parquet").columns


def test_more_samples_than_points_are_drawn_and_all_exported(home, dataset, tmp_path):
    run, file = load_run(home / "runs/cv"), tmp_path / "m.parquet"
    made = explore(dataset, tmp_path / "m.html", run=run, points=20, images=5, parquet=file)
    _, data = page_data(made.path)
    assert (made.points, made.samples, len(data["ids"])) == (20, 48, 20)
    assert sum(bool(pictures) for pictures in data["pictures"]) == 5
    assert made.notes[0].startswith("The map shows 20 of 48 samples")
    table = pl.read_parquet(file)
    assert table.height == 48
    assert table["sample_id"].to_list() == dataset.sample_ids.tolist()
    assert dict(table.schema)["a"] == pl.Struct({"bytes": pl.Binary, "path": pl.String})
    assert table["b"].null_count() == int((~dataset.present[:, 1]).sum()) > 0
    assert set(table["class"]) == {"no", EVIL}
    # The same samples lie in the same places.
    places = dict(zip(table["sample_id"], table.select("x", "y").to_numpy(), strict=True))
    drawn = np.array([places[name] for name in data["ids"]])
    assert np.corrcoef(drawn[:, 0], np.array(data["xy"])[:, 0])[0, 1] > 0.9999


def test_pictures_stay_within_their_budget(dataset):
    pictures = Pictures(dataset.binding, dataset.recipes)
    ids = [str(name) for name in dataset.sample_ids]
    shown, _ = fitting(pictures, ids, 10**7)
    assert all(shown)
    for budget in (20_000, 2_000):
        shown, size = fitting(pictures, ids, budget)
        assert sum(picture.size() for some in shown for picture in some) <= budget
        assert any(shown)
    assert size == 32


def test_a_manifest_that_was_moved_is_told_with_a_way_out(dataset):
    gone = replace(dataset.binding, manifest_path="/nowhere/my samples.csv", name="my samples")
    (note,) = Pictures(gone, dataset.recipes).notes
    assert note.startswith("No pictures: my samples.csv is no longer where it was. Run featurecache extract with it")
    assert "with --name 'my samples'" in note


def test_a_picture_that_changed_since_is_not_shown(home, dataset):
    pictures = Pictures(dataset.binding, dataset.recipes)
    file = home / "data/images/005-a0.png"
    before = file.read_bytes()
    try:
        file.write_bytes((home / "data/images/007-a0.png").read_bytes())
        assert [picture.view for picture in pictures.of("s005", 32)] == ["b"]
    finally:
        file.write_bytes(before)
    assert [picture.view for picture in pictures.of("s005", 32)] == ["a", "b"]


def test_command(home, tmp_path):
    out = tmp_path / "explore.html"
    words = ["explore", home / "cache", "--dataset", "samples", "--run", home / "runs/cv", "--out", out]
    with threadpool_limits(1):
        done = command(*words, "--json")
    assert done.status == 0, done.err
    assert (done.json["points"], done.json["method"], done.json["outputs"]) == (48, "pca", [str(out)])
    again = command(*words)
    assert again.status == 2
    assert f"{out}: exists" in again.err
    wrong = command(*words[:-1], tmp_path / "x.html", "--by", "knid")
    assert wrong.status == 2
    assert "no column 'knid'. Did you mean 'kind'?" in wrong.err
    assert command(*words[:-1], tmp_path / "x.html", "--images", "some").status == 2
    assert not (tmp_path / "x.html").exists()
