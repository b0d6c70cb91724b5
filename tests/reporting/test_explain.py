import csv
import json
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
import torch
import torchvision
from PIL import Image
from plugin_joint import SIDE
from stage_two import TRUST, TWO, command, quick

import featurecache as fc
from featurecache.errors import InputError
from featurecache.newsamples import NewSamples, manifest_config
from featurecache.reporting import attribution
from featurecache.reporting.attribution import METHODS, Network, heat_maps
from featurecache.reporting.explain import choose_samples, explain, load_network, show_features
from featurecache.reporting.heatdrawing import colours, draw_panels, draw_sample, overlay
from featurecache.run import load_run

pytest.importorskip("captum", reason="no captum: pip install 'featurecache[explain]'")
PATCH = 8
CHARACTERS = "featurecache.bodies.small:characters"
HEADS = {
    "logistic": {},
    "fc": {"epochs": 25, "hidden": [16], "lr": 0.02, "dropout": 0.0},
    "xgboost": {"n_estimators": 20, "max_depth": 2, "nthread": 1},
}


def corner(i):
    """Where the patch of sample i is: anywhere."""
    rng = np.random.default_rng([i, 5])
    return [int(v) for v in rng.integers(2, SIDE - PATCH - 2, size=2)]


def write_patches(folder, n=48):
    """Noise in both views; in view `a` of every other sample a bright square, which alone decides the class."""
    (folder / "images").mkdir(parents=True)
    rows = []
    for i in range(n):
        row = {"sample_id": f"s{i:02d}", "label": ("none", "patch")[i % 2], "spot": i % 2, "always": 1,
               "size": 5 + i % 2, "name": f"{'square' if i % 2 else 'nothing'} {i}"}  # fmt: skip
        for view in TWO:
            image = np.random.default_rng([i, ord(view)]).normal(80, 12, size=(SIDE, SIDE, 3))
            if view == "a" and i % 2:
                y, x = corner(i)
                image[y : y + PATCH, x : x + PATCH] += 150
            row[view] = f"images/{i}-{view}.png"
            Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(folder / row[view])
        rows.append(row)
    path = folder / "patches.csv"
    with path.open("w", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("patches")
    with quick():
        data = write_patches(folder / "data")
        fc.extract(data, store=folder / "cache", views=TWO, body="plugin_joint:tiny", engine="torch", precision="fp32")
        for head, settings in HEADS.items():
            dataset = fc.FeatureDataset(folder / "cache", dataset="patches", target="label")
            fc.fit_head(dataset, head=head, settings=settings, out=folder / head, bootstrap=0)
            dataset.store.close()
    return folder


def new(home):
    return NewSamples(sources=(str(home / "data/patches.csv"),), **TRUST)


def inside(entry, slack):
    """Whether the hottest pixel lies in the planted patch, or so near."""
    y, x = corner(int(entry["sample_id"][1:]))
    spot = entry["hottest"]
    return y - slack <= spot["y"] < y + PATCH + slack and x - slack <= spot["x"] < x + PATCH + slack


@pytest.mark.parametrize(
    ("head", "method"),
    [
        ("logistic", "gradcam"),
        pytest.param("xgboost", "occlusion", marks=pytest.mark.slow),
        pytest.param("logistic", "occlusion", marks=pytest.mark.slow),
        pytest.param("logistic", "gradient-shap", marks=pytest.mark.slow),
        pytest.param("fc", "gradcam", marks=pytest.mark.slow),
        pytest.param("fc", "guided-backprop", marks=pytest.mark.slow),
    ],
)
def test_the_map_is_hottest_where_the_deciding_patch_is(home, tmp_path, head, method):
    run = load_run(home / head)
    assert run.metrics["train"]["accuracy"] > 0.9, "the head must have learned it"
    ids = ",".join(f"s{i:02d}" for i in range(1, 17, 2))
    made = explain(run, new(home), method=method, samples=ids, output="patch", out=tmp_path / "heat")
    assert [entry["hottest"]["view"] for entry in made.samples].count("a") >= 7
    assert sum(inside(entry, slack=4) for entry in made.samples) >= 7
    listing = json.loads((tmp_path / "heat/explain.json").read_text(encoding="utf-8"))
    assert listing["method"] == method
    assert listing["samples"] == made.samples
    first = made.samples[0]
    assert (first["sample_id"], first["target"], first["class"]) == ("s01", "patch", "patch")
    assert "s01, labelled patch: a, b with" in first["alt"]
    with Image.open(tmp_path / "heat" / first["file"]) as picture:
        assert picture.width > 2 * 256


def network_of(home, head, tmp_path):
    run = load_run(home / head)
    config = manifest_config(run, new(home), tmp_path)
    fitted, setups, _ = load_network(run, config, new(home), tmp_path)
    return Network.of(setups, fitted), fitted


@pytest.mark.slow
def test_a_joint_run_is_explained_through_the_network(home, tmp_path):
    with quick():
        joint = fc.finetune_joint(
            home / "data/patches.csv", views=TWO, body="plugin_joint:tiny", precision="fp32", target="label",
            out=home / "joint", epochs=6, freeze_epochs=1, lr=0.02, body_lr=0.002, augment=(), view_dropout=0.0,
            settings={"hidden": [8], "dropout": 0.0}, bootstrap=0, workers=1,
        )  # fmt: skip
    assert joint.metrics["train"]["accuracy"] > 0.9
    ids = ",".join(f"s{i:02d}" for i in range(1, 17, 2))
    made = explain(load_run(joint.path), new(home), method="gradcam", samples=ids, output="patch", out=tmp_path / "h")
    assert sum(inside(entry, slack=4) for entry in made.samples) >= 7


@pytest.mark.parametrize("method", METHODS)
def test_random_weights_give_another_map(home, tmp_path, method):
    network, _ = network_of(home, "fc", tmp_path)
    generator = torch.Generator().manual_seed(0)
    images = {view: torch.randn(3, SIDE, SIDE, generator=generator) for view in TWO}
    images["a"][:, 6:14, 18:26] += 3
    before = heat_maps(network, images, 1, method)
    again = heat_maps(network, images, 1, method)
    assert np.array_equal(before["a"], again["a"])
    for module in network.bodies["a"].modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.normal_(module.weight, std=0.3, generator=generator)
    after = heat_maps(network, images, 1, method)
    assert before["a"].max() > 0
    alike = np.corrcoef(before["a"].ravel(), after["a"].ravel())[0, 1] if after["a"].std() else 0
    assert alike < 0.9, "a map that does not depend on the weights explains nothing"


@pytest.mark.parametrize("head", HEADS)
def test_the_network_is_the_head_on_its_features(home, tmp_path, head):
    network, fitted = network_of(home, head, tmp_path)
    images = {"a": torch.randn(3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))}  # b is missing
    features = network.features(images)
    assert features[:, network.columns("b")].isnan().all()
    with torch.no_grad():
        outputs = attribution.ViewPart(network, "a", features)(images["a"][None])
    scores = fitted.scores(features.numpy())
    if head == "xgboost":
        expected = np.log(scores) - np.log1p(-scores)
        np.testing.assert_allclose(outputs.numpy(), expected, atol=1e-4)
    else:
        both = outputs.double()
        assert both[0].argmax() == scores[0].argmax()
        odds = float(both[0, 1] - both[0, 0])
        odds = odds / 2 if head == "logistic" else odds  # binary: the second is the first with the other sign
        assert 1 / (1 + np.exp(-odds)) == pytest.approx(scores[0, 1], abs=1e-5)


def test_what_can_not_be_explained_is_refused(home, tmp_path):
    run = load_run(home / "xgboost")
    with pytest.raises(InputError, match=r"this head has no gradient\. Use --method occlusion"):
        explain(run, new(home), method="gradcam", out=tmp_path / "heat")
    with pytest.raises(InputError, match=r"no such class\. Did you mean 'patch'"):
        explain(run, new(home), method="occlusion", output="pach", out=tmp_path / "heat")
    with pytest.raises(InputError, match="has no sample 's999'"):
        explain(run, new(home), method="occlusion", samples="s999", out=tmp_path / "heat")
    with pytest.raises(InputError, match="no such module"):
        explain(load_run(home / "fc"), new(home), layer="featurs.3", samples="s01", out=tmp_path / "heat")
    assert not (tmp_path / "heat").exists()


def fitted(home, name, **options):
    """A logistic head of its own on a dataset of the cache."""
    dataset = fc.FeatureDataset(home / "cache", dataset=options.pop("dataset", "patches"), **options)
    with quick():
        run = fc.fit_head(dataset, head="logistic", out=home / name, bootstrap=0)
    dataset.store.close()
    return run


def test_labels_are_explained_one_by_one_and_not_where_nothing_was_learnt(home, tmp_path):
    run = fitted(home, "labels", target=["spot", "always"], task="multilabel")
    made = explain(run, new(home), samples="s01,s03,s05,s07", out=tmp_path / "heat")
    assert [(entry["class"], entry["prediction"]) for entry in made.samples] == [("spot", "spot")] * 4
    assert sum(inside(entry, slack=4) for entry in made.samples) >= 3
    with pytest.raises(InputError, match="--class always: the head has no score for it, since it had none to learn"):
        explain(run, new(home), samples="s01", output="always", out=tmp_path / "none")


def test_a_number_is_explained_by_what_makes_it_larger(home, tmp_path):
    run = fitted(home, "number", target="size", task="regression")
    made = explain(run, new(home), samples="s01,s03,s05,s07", out=tmp_path / "heat")
    assert [entry["prediction"].split()[0] for entry in made.samples] == ["size"] * 4
    assert sum(inside(entry, slack=4) for entry in made.samples) >= 3


@pytest.mark.slow
def test_dicom_images_are_explained(tmp_path):
    pydicom = pytest.importorskip("pydicom")
    image = pydicom.dcmread(pydicom.data.get_testdata_file("CT_small.dcm"))
    image.WindowCenter, image.WindowWidth = -100, 4000
    rows = []
    for i in range(24):
        y, x = (4 * place for place in corner(i))
        pixels = np.random.default_rng([i, 3]).normal(500, 30, size=(128, 128))
        if i % 2:
            pixels[y : y + 4 * PATCH, x : x + 4 * PATCH] += 900
        image.PixelData = pixels.clip(0).astype("<i2").tobytes()
        image.save_as(tmp_path / f"IM{i:06d}")  # as scanners name them: the reader is found by the content
        rows.append({"sample_id": f"s{i:02d}", "a": f"IM{i:06d}", "label": ("none", "patch")[i % 2]})
    pl.DataFrame(rows).write_csv(tmp_path / "scans.csv")
    options = {"body": "plugin_joint:tiny", "engine": "torch", "precision": "fp32"}
    fc.extract(tmp_path / "scans.csv", store=tmp_path / "cache", views={"a": "a"}, **options)
    run = fitted(tmp_path, "run", dataset="scans", target="label")
    samples = NewSamples(sources=(str(tmp_path / "scans.csv"),), **TRUST)
    made = explain(run, samples, samples="s01,s03,s05,s07", output="patch", out=tmp_path / "heat")
    assert sum(inside(entry, slack=4) for entry in made.samples) >= 3
    with Image.open(tmp_path / "heat" / made.samples[0]["file"]) as picture:
        shown = np.asarray(picture.convert("L"))[60:300, 20:260].astype(int)
    assert shown.max() - shown.min() > 200, "a wide window is no reason for a grey picture"


def test_texts_count_but_are_not_drawn(home, tmp_path):
    both = {"views": {"name": "name", "a": "a"}, "reader": {"name": "text"}, "weights": {"name": "none"}, "seed": 0,
            "body": {"name": CHARACTERS, "a": "plugin_joint:tiny"}, "engine": "torch", "precision": "fp32"}  # fmt: skip
    fc.extract(home / "data/patches.csv", store=home / "cache", name="named", **both)
    trust = {"body": {"trust_factory": ("plugin_joint:tiny", CHARACTERS)}}
    samples = NewSamples(sources=(str(home / "data/patches.csv"),), **trust)
    made = explain(
        fitted(home, "named", dataset="named", target="label"), samples, samples="s01", out=tmp_path / "heat"
    )
    assert made.samples[0]["hottest"]["view"] == "a"
    only = fitted(home, "only", dataset="named", target="label", views=["name"])
    with pytest.raises(InputError, match="its views are texts, which have no heat map"):
        explain(only, samples, samples="s01", method="gradient-shap", out=tmp_path / "none")


class Transformer(torch.nn.Module):
    """Twelve features, as a tapped body gives them, of tokens or of windows."""

    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(0)
        if kind == "vit":
            self.module = torchvision.models.VisionTransformer(SIDE, 8, 1, 2, 12, 16)
            self.module.heads = torch.nn.Identity()
        else:
            self.module = torchvision.models.SwinTransformer([2, 2], 12, [1, 1], [2, 2], [2, 2], num_classes=12)

    def forward(self, x):
        return (self.module(x),)


def test_a_transformer_is_explained_by_what_suits_it(home, tmp_path):
    last = "conv_proj"
    network, _ = network_of(home, "fc", tmp_path)
    network = replace(network, bodies={**network.bodies, "a": Transformer("vit").eval()})
    images = {"a": torch.randn(3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))}
    with pytest.raises(InputError, match=rf"behind '{last}', its last map, this body works on tokens.*--layer {last}"):
        heat_maps(network, images, 1, "gradcam")
    with pytest.raises(InputError, match="it is about ReLUs, and this body has none"):
        heat_maps(network, images, 1, "guided-backprop")
    for method, layer in (("gradcam", last), ("occlusion", ""), ("gradient-shap", "")):
        both = [heat_maps(network, images, output, method, layer=layer)["a"] for output in (0, 1)]
        assert max(heat.max() for heat in both) > 0, "what speaks against one class speaks for the other"


def test_a_windowed_transformer_ends_with_a_map():
    body = Transformer("swin").eval()  # its blocks give (n, height, width, channels), the last module turns that
    assert attribution.last_map(body, torch.zeros(1, 3, SIDE, SIDE)) is body.module.permute
    body.module.permute = torch.nn.Identity()
    body.module.avgpool = torch.nn.Identity()
    body.module.head = torch.nn.Identity()
    with pytest.raises(InputError, match=r"behind 'features.0.0', its last map, this body works on tokens"):
        attribution.last_map(body, torch.zeros(1, 3, SIDE, SIDE))


def test_maps_are_told_from_tokens_by_their_proportions():
    x = torch.zeros(1, 3, 96, 64)
    body = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, stride=16, padding=1), torch.nn.BatchNorm2d(8))
    assert attribution.last_map(body, x) is body[1]
    assert attribution.last_map(torch.nn.Sequential(body, torch.nn.Flatten(), torch.nn.Linear(8 * 24, 2)), x) is body


def test_a_map_that_is_empty_has_no_hottest_place(home, tmp_path, monkeypatch):
    nothing = {view: np.zeros((SIDE, SIDE), np.float32) for view in TWO}
    monkeypatch.setattr("featurecache.reporting.explain.heat_maps", lambda *words, **options: nothing)
    made = explain(load_run(home / "logistic"), new(home), samples="s01", out=tmp_path / "heat")
    assert made.samples[0]["hottest"] is None
    assert made.samples[0]["alt"].endswith("no part of it speaks for that")


def test_other_files_are_not_replaced(home, tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "thesis.txt").write_text("all of it", encoding="utf-8")
    with pytest.raises(InputError, match="holds something else than heat maps"):
        explain(load_run(home / "logistic"), new(home), samples="1", out=folder)
    assert (folder / "thesis.txt").exists()


def test_an_image_that_can_not_be_read_is_listed_and_its_sample_drawn_without(home, tmp_path):
    table = pl.read_csv(home / "data/patches.csv").head(3)
    (tmp_path / "images").symlink_to(home / "data/images")
    (tmp_path / "bad.png").write_bytes(b"no picture")
    table = table.with_columns(pl.when(pl.col("sample_id") == "s01").then(pl.lit("bad.png")).otherwise("a").alias("a"))
    table.write_csv(tmp_path / "new.csv")
    samples = NewSamples(sources=(str(tmp_path / "new.csv"),), manifest={"allow_outside": True}, **TRUST)
    made = explain(load_run(home / "logistic"), samples, samples="s00,s01,s02", out=tmp_path / "heat")
    assert [entry["sample_id"] for entry in made.samples] == ["s00", "s01", "s02"]
    assert [entry["alt"].split(": ")[1].split(" with")[0] for entry in made.samples] == ["a, b", "b", "a, b"]
    assert [(row["sample_id"], row["view"], row["path"]) for row in made.failures] == [("s01", "a", "bad.png")]


def test_samples_by_number_or_id():
    manifest = type("M", (), {"table": pl.DataFrame({"sample_id": [f"{i}" for i in range(10)]}), "path": None})()
    assert choose_samples(manifest, "7") == [7]  # an id comes first
    manifest.table = pl.DataFrame({"sample_id": [f"s{i}" for i in range(10)]})
    assert choose_samples(manifest, "4") == [0, 3, 6, 9]
    assert choose_samples(manifest, "s3, s1,s3") == [3, 1]


def test_command_writes_into_the_run_and_leaves_it_whole(home):
    words = ["explain", home / "logistic", home / "data/patches.csv", "--samples", 2]
    words += ["--trust-factory", "plugin_joint:tiny"]
    done = command(*words, "--json")
    assert done.status == 0, done.err
    assert len(done.json["samples"]) == 2
    assert (home / "logistic/explain/explain.json").is_file()
    load_run(home / "logistic")
    again = command(*words)
    assert again.status == 0, again.err
    assert "hottest in" in again.out
    assert "samples, taken evenly from the manifest; --samples ID,ID chooses others, --samples N how many" in again.out
    assert done.json["notes"][-1].startswith("2 of ")
    assert sorted(path.suffix for path in (home / "logistic/explain").iterdir()) == [".json", ".png", ".png"]


def test_options_of_where_and_how_it_runs(home, tmp_path):
    words = ["explain", home / "logistic", home / "data/patches.csv", "--samples", "s01"]
    words += ["--trust-factory", "plugin_joint:tiny", "--out", tmp_path / "heat"]
    done = command(*words, "--device", "cpu", "--workers", 2, "--batch-size", 4)
    assert done.status == 0, done.err
    for option, message in (
        (["--device", "cuda:99"], "device 'cuda:99': there is none on this machine"),
        (["--batch-size", "none"], "batch_size: Input should be a valid integer"),
        (["--workers", 0], "'0': a number above 0, or auto"),
    ):
        done = command(*words, *option)
        assert done.status == 2
        assert message in done.err


def test_how_many_images_go_at_once_changes_no_map(home, tmp_path):
    network, _ = network_of(home, "logistic", tmp_path)
    image = torch.randn(3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    sizes = []
    handle = network.bodies["a"].register_forward_hook(lambda module, given, out: sizes.append(len(given[0])))
    many = heat_maps(network, {"a": image}, 1, "occlusion")["a"]
    assert max(sizes) == attribution.AT_ONCE
    sizes.clear()
    few = heat_maps(replace(network, at_once=3), {"a": image}, 1, "occlusion")["a"]
    handle.remove()
    assert max(sizes) == 3
    np.testing.assert_allclose(few, many, atol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("method", METHODS)
def test_maps_of_a_gpu_are_those_of_the_cpu(home, tmp_path, method):
    head = "fc" if method == "guided-backprop" else "logistic"
    for device in ("cpu", "cuda"):
        made = explain(
            load_run(home / head), replace(new(home), device=device), method=method, samples="s01", output="patch",
            out=tmp_path / device,
        )  # fmt: skip
        assert made.samples[0]["hottest"]["view"] == "a"


def test_feature_maps(home, tmp_path):
    image = home / "data/images/1-a.png"
    found = show_features(image, tmp_path / "maps.png", body="plugin_joint:tiny", tap="features.3", most=5)
    assert found["shape"] == [12, 8, 8]
    assert len(found["shown"]) == 5
    assert found["strength"] == sorted(found["strength"], reverse=True)
    with Image.open(tmp_path / "maps.png") as picture:
        assert picture.format == "PNG"
    with pytest.raises(InputError, match=r"gives \(12,\), which is no map"):
        show_features(image, tmp_path / "none.png", body="plugin_joint:tiny", tap="flatten")


def test_views_share_one_scale(tmp_path):
    black = {view: np.zeros((1, 16, 16), np.uint8) for view in TWO}
    heats = {"a": np.full((16, 16), 2.0), "b": np.full((16, 16), 0.1)}
    draw_sample(tmp_path / "x.png", black, heats, title="t", subtitle="")
    with Image.open(tmp_path / "x.png") as picture:
        pixels = np.asarray(picture).astype(int)
    tall = pixels.shape[0]
    left, right = pixels[tall - 150, 100], pixels[tall - 150, 12 + 256 + 12 + 100]
    assert left.sum() > 3 * right.sum()
    assert colours(np.array(0.0)).tolist() == [0, 0, 4]
    assert overlay(np.full((2, 2, 3), 100, np.uint8), np.zeros((2, 2))).shape == (2, 2, 3)


def test_names_of_classes_are_drawn_in_many_scripts(tmp_path):
    panel = [("a", [np.zeros((8, 8, 3), np.uint8)])]

    def drawn(title):
        draw_panels(tmp_path / "x.png", panel, title=title)
        return np.asarray(Image.open(tmp_path / "x.png")).tobytes()

    letters = "\u00e4\u00df\u0142\u0417\u03a9"
    assert len({drawn(letter) for letter in letters}) == len(letters), "an empty box for each would be the same picture"
