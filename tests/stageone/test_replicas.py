"""Augmented replicas: the same in any order and any process, computed once, trained on and never evaluated on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from extract_kit import BODY, counts, features, image, json_of, main, recipe_ids, run, write_images
from PIL import Image
from zygote import shared

from featurecache.bodies.engines.torch import TorchEngine
from featurecache.config import ExtractConfig
from featurecache.data.readers import get_reader
from featurecache.data.readers.base import Decoded
from featurecache.data.transforms import Preprocessing
from featurecache.dataset import FeatureDataset
from featurecache.errors import InputError, StoreError
from featurecache.fit import fit_head
from featurecache.heads.logistic import LogisticHead
from featurecache.stageone.extraction import Extraction
from featurecache.stageone.replicas import Replica, augmentation
from featurecache.stageone.viewsetup import set_up_view
from featurecache.store.store import FeatureStore
from featurecache.upkeep.maintenance import plan_prune
from featurecache.upkeep.recompute import recompute

N = 5
TAP = "penultimate@none"
ALL = ("crop", "flip", "vflip", "rotate", "colour")
OPTIONS = {"engine": "torch", "augment": ["crop", "flip", "colour"]}
KEYS = bytes(range(32)), bytes(range(1, 33))


def replica_id(store: Path, view: str = "image") -> str:
    return FeatureStore(store).binding("samples").config["replicas"][view]["recipe"]


def drawn(store: Path) -> dict[tuple[bytes, int], np.ndarray]:
    """(key, replica) -> features."""
    opened, recipe = FeatureStore(store), replica_id(store)
    ids, keys, replicas = opened.keys(recipe)
    names = zip((key.tobytes() for key in keys), replicas.tolist(), strict=True)
    return dict(zip(names, opened.read(recipe, TAP, ids), strict=True))


def close(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(np.allclose(one[name], other[name], atol=1e-6) for name in one)


@pytest.fixture
def manifest(tmp_path):
    return write_images(tmp_path / "data", N, side=48)


# ---- what is drawn ---------------------------------------------------------------------------------------------------


def replica(number: int = 0, seed: int = 0, names=ALL, **preprocessing) -> Replica:
    return Replica(Preprocessing(**{"resize": 32, "crop": 32, **preprocessing}), augmentation(names), seed, number)


def test_the_geometric_draw_is_that_of_seed_and_replica():
    """In relative coordinates, so that views of other sizes, and all samples, correspond."""
    first = replica().of(KEYS[0]).draw
    assert replica(resize=64, crop=48).of(KEYS[1]).draw == first
    assert replica(number=1).of(KEYS[0]).draw != first
    assert replica(seed=1).of(KEYS[0]).draw != first
    small, large = (np.zeros((side, side, 3), np.uint8) for side in (64, 128))
    small[20:28, 44:52], large[40:56, 88:104] = 255, 255  # the same place in relative coordinates
    geometry = [name for name in ALL if name != "colour"]
    places = []
    for side, array in ((32, small), (64, large)):
        made = replica(number=3, names=geometry, resize=side, crop=side).of(KEYS[0]).apply(Decoded(array, 255.0))
        rows, columns = np.nonzero(made[0].numpy() > 128)
        places.append((rows.mean() / side, columns.mean() / side))
    np.testing.assert_allclose(*places, atol=0.02)


def test_the_photometric_draw_is_that_of_the_content_too():
    pixels = Decoded(np.array(image(0)), 255.0)

    def made(key: bytes, **options) -> torch.Tensor:
        return replica(names=["colour"], **options).of(key).apply(pixels)

    assert torch.equal(made(KEYS[0]), made(KEYS[0]))
    others = [made(KEYS[1]), made(KEYS[0], number=1), made(KEYS[0], seed=1)]
    assert not any(torch.equal(made(KEYS[0]), other) for other in others)


def test_the_recipe_is_the_plain_one_and_the_augmentation(manifest, tmp_path):
    run(manifest, tmp_path / "plain", engine="torch")
    run(manifest, tmp_path / "store", replicas=1, seed=4, **OPTIONS)
    plain, augmented = FeatureStore(tmp_path / "store").recipes()
    assert plain.recipe == FeatureStore(tmp_path / "plain").recipes()[0].recipe
    assert augmented.replicas
    differences = {name.partition(".")[0] for name, _, _ in plain.recipe.differences(augmented.recipe)}
    assert differences == {"augmentation"}
    found = augmented.recipe.fields["augmentation"]
    assert (found["seed"], found["version"], found["names"]) == (4, 1, ["colour", "crop", "flip"])
    assert augmentation(["flip", "crop"]) == augmentation(["crop", "flip", "crop"]) == augmentation([])
    gentle = augmentation(["flip", "crop:0.7"])
    assert gentle == augmentation(["crop:0.7", "flip"]) != augmentation(["crop", "flip"])
    assert gentle.parameters()["area"] == [0.7, 1.0]


# ---- what is computed ------------------------------------------------------------------------------------------------


def test_only_what_is_new_is_computed(manifest, tmp_path):
    store = tmp_path / "store"

    def again(**options) -> tuple[tuple[int, int, int], int, int]:
        summary = run(manifest, store, **{**OPTIONS, **options})
        return counts(summary), summary.replicas_computed, summary.replicas_reused

    assert again(replicas=2) == ((N, 0, 0), 2 * N, 0)
    two = drawn(store)
    assert len({row.tobytes() for row in two.values()}) == 2 * N
    assert again(replicas=2) == ((0, N, 0), 0, 2 * N)
    assert again(replicas=4) == ((0, N, 0), 2 * N, 2 * N)
    four = drawn(store)
    assert close(two, {name: row for name, row in four.items() if name[1] < 2})
    assert again(replicas=1) == ((0, N, 0), 0, N)
    assert again(replicas=2, augment=["colour", "flip", "crop"]) == ((0, N, 0), 0, 2 * N)
    assert again(replicas=2, seed=1) == ((0, N, 0), 2 * N, 0)
    assert not any(np.allclose(row, two[name], atol=1e-6) for name, row in drawn(store).items())
    assert again(replicas=2, augment=["crop"]) == ((0, N, 0), 2 * N, 0)
    Image.fromarray(255 - np.asarray(image(2, 48))).save(manifest.parent / "image0002.png")
    assert again(replicas=4) == ((1, N - 1, 0), 4, 4 * (N - 1))
    fresh = run(manifest, tmp_path / "fresh", replicas=4, **OPTIONS)
    assert (fresh.computed, fresh.replicas_computed) == (N, 4 * N)
    anew = drawn(tmp_path / "fresh")
    assert close(anew, {name: row for name, row in drawn(store).items() if name in anew})


@pytest.mark.slow
def test_any_order_and_any_process(manifest, tmp_path):
    run(manifest, tmp_path / "store", replicas=2, batch_size=4, **OPTIONS)
    reverse = manifest.parent / "samples2.csv"
    head, *rows = manifest.read_text().splitlines()
    reverse.write_text("\n".join([head, *rows[::-1]]) + "\n")
    run(reverse, tmp_path / "other", name="samples", replicas=2, batch_size=1, workers=1, **OPTIONS)
    done = shared().run(
        tmp_path / "log", "extract", manifest, "--store", tmp_path / "third", "--view", "image=image", "--body", BODY,
        "--precision", "fp32", "--engine", "torch", "--store-dtype", "float32", "--replicas", 2,
        "--augment", "flip,colour,crop", "--json",
    )  # fmt: skip
    assert done.status == 0, done.err
    assert json_of(done.out)["replicas_computed"] == 2 * N
    assert close(drawn(tmp_path / "store"), drawn(tmp_path / "other"))
    assert close(drawn(tmp_path / "store"), drawn(tmp_path / "third"))


def test_rows_are_the_features_of_the_augmented_image(manifest, tmp_path):
    run(manifest, tmp_path / "store", replicas=2, seed=3, **OPTIONS)
    config = ExtractConfig.create({"manifest": manifest, "store": tmp_path, "views": {"image": "image"}, "body": BODY})
    setup = set_up_view(config, "image")
    opened = FeatureStore(tmp_path / "store")
    cells = opened.binding("samples").cells
    engine = TorchEngine(setup.tapped(), setup.preprocessing, precision="fp32", device=torch.device("cpu"))
    for place, number in ((0, 0), (3, 1)):
        key = cells["key"][place]
        pixels = get_reader("image").decode((manifest.parent / f"image{place:04d}.png").read_bytes(), {})
        made = Replica(setup.preprocessing, augmentation(OPTIONS["augment"]), 3, number).of(key).apply(pixels)
        (expected,) = engine(made[None])
        np.testing.assert_allclose(drawn(tmp_path / "store")[key, number], expected[0], atol=1e-6)


def test_what_can_not_be_read_has_no_replicas(manifest, tmp_path):
    (manifest.parent / "image0001.png").write_bytes(b"no image")
    summary = run(manifest, tmp_path / "store", replicas=2, **OPTIONS)
    assert counts(summary) == (N - 1, 0, 1)
    assert summary.replicas_computed == 2 * (N - 1)
    assert len(summary.failures) == 1
    assert FeatureDataset(tmp_path / "store", dataset="samples").replicas.held.all()


def test_a_process_that_drifts_may_not_append_replicas(manifest, tmp_path, monkeypatch):
    run(manifest, tmp_path / "store", replicas=1, **OPTIONS)
    collect = TorchEngine.collect
    monkeypatch.setattr(TorchEngine, "collect", lambda self, handle: [a * 1.02 for a in collect(self, handle)])
    with pytest.raises(StoreError, match="this process computes other features than the one that made it"):
        run(manifest, tmp_path / "store", replicas=2, **OPTIONS)


def test_replicas_are_recomputed_too(manifest, tmp_path):
    run(manifest, tmp_path / "store", replicas=2, **OPTIONS)
    found = recompute(tmp_path / "store", 4 * N, trust=[BODY])
    assert [recipe.recomputed for recipe in found.recipes] == [N, 2 * N]
    assert found.ok
    assert max(found.recipes[1].drifts.values()) < 1e-5


def test_prune_knows_replicas_by_their_dataset(manifest, tmp_path):
    store = tmp_path / "store"
    run(manifest, store, replicas=2, **OPTIONS)
    with FeatureStore(store, write=True) as opened:
        plan = plan_prune(opened)
        assert (plan.parts, plan.notes) == ([], [])
    run(manifest, store)  # makes none, so it is still about these
    with FeatureStore(store, write=True) as opened:
        assert (plan_prune(opened).parts, plan_prune(opened).notes) == ([], [])
    run(manifest, store, replace=True)  # the dataset has no replicas any more
    with FeatureStore(store, write=True) as opened:
        (note,) = plan_prune(opened).notes
        assert f"no dataset was extracted with it last, but its {2 * N} rows are of images of one" in note


def test_the_options_are_checked(manifest, tmp_path):
    for options, message in [
        ({"augment": ["crop"]}, "--augment is for replicas: say how many with --replicas K"),
        ({"replicas": -1}, "--replicas -1: 0 for none"),
        ({"replicas": 1, "augment": ["flop"]}, "unknown augmentation 'flop'. Did you mean 'flip'?"),
    ]:
        with pytest.raises(InputError) as caught:
            run(manifest, tmp_path / "store", **options)
        assert message in str(caught.value)
        assert not (tmp_path / "store").exists()


def test_the_command(manifest, tmp_path, capsys):
    words = ["extract", manifest, "--store", tmp_path / "store", "--view", "image=image", "--body", BODY]
    words += ["--engine", "torch", "--precision", "fp32", "--replicas", 2]
    status, out, err = main(*words, "--dry-run", capsys=capsys)
    assert status == 0, err
    assert f"replicas  2 of each image: to compute {2 * N}" in out
    status, out, err = main(*words, capsys=capsys)
    assert status == 0, err
    assert f"replicas  2 of each image: computed {2 * N}, reused 0" in out
    status, out, _ = main(*words[:-1], 3, "--dry-run", "--json", capsys=capsys)
    assert (json_of(out)["to_compute"], json_of(out)["replicas_to_compute"]) == (0, N)
    status, out, _ = main("info", tmp_path / "store", capsys=capsys)
    assert f"{2 * N} rows of replicas, {BODY}" in out
    assert "            image: 2 replicas of each, recipe " in out


# ---- what is trained on ----------------------------------------------------------------------------------------------


@pytest.fixture
def two_views(tmp_path):
    """Eight samples of two views, the second of another size; float16, two replicas."""
    manifest = write_images(tmp_path / "data", 8, views=("a", "b"), side=48)
    rows = manifest.read_text().splitlines()
    rows[3] = rows[3].rpartition(",")[0] + ","  # sample 2 has no view b
    split = ["split", "train", "train", "train", "train", "train", "train", "valid", "test"]
    split[2] = "test"
    manifest.write_text("\n".join(f"{row},{side}" for row, side in zip(rows, split, strict=True)) + "\n")
    views = {"views": {"a": "a", "b": "b"}, "image_size": {"b": 24}, "store_dtype": "float16"}
    run(manifest, tmp_path / "store", replicas=2, **views, **OPTIONS)
    return manifest, views


def test_heads_learn_from_replicas_and_are_evaluated_without(two_views, tmp_path, monkeypatch):
    seen = []

    def fit(self, train, valid=None, **options):
        seen.append((train, valid))
        return original(self, train, valid, **options)

    original = LogisticHead.fit
    monkeypatch.setattr(LogisticHead, "fit", fit)
    data = FeatureDataset(tmp_path / "store", dataset="samples", target="label")
    options = {"head": "logistic", "split": "split", "bootstrap": 0}
    with_them = fit_head(data, out=tmp_path / "with", **options)
    without = FeatureDataset(tmp_path / "store", dataset="samples", target="label", replicas="none")
    alone = fit_head(without, out=tmp_path / "without", **options)
    (train, valid), (plain, _) = seen
    assert (len(train), len(valid), len(plain)) == (3 * 5, 1, 5)
    x, y = train.features[train.rows], train.target.values
    np.testing.assert_array_equal(x[:5], plain.features[plain.rows])
    np.testing.assert_array_equal(y, np.tile(plain.target.values, 3))
    assert np.isnan(x).any(axis=1).reshape(3, 5).tolist() == [[False, True, False, False, False]] * 3
    store, cells = FeatureStore(tmp_path / "store"), data.binding.cells
    for number in (0, 1):
        for place, sample in enumerate(plain.rows):
            for view, block in zip("ab", data.blocks, strict=True):
                key = cells.filter(sample=sample, view=view)["key"][0]
                if key is not None:
                    held = store.rows(replica_id(tmp_path / "store", view), np.frombuffer(key, "u1")[None], number)
                    expected = store.read(replica_id(tmp_path / "store", view), block.tap, held)[0]
                    np.testing.assert_array_equal(x[5 * (number + 1) + place, block.start : block.stop], expected)
    for found, count in ((with_them, 2), (alone, 0)):
        assert (found.record["replicas"] or {"count": 0})["count"] == count
        assert {side: found.metrics[side]["n"] for side in ("train", "valid", "test")} == {
            "train": 5, "valid": 1, "test": 2,
        }  # fmt: skip
    assert not np.allclose(with_them.predict_proba(data), alone.predict_proba(data), atol=1e-4)


def test_fit_head_says_what_it_learnt_from(two_views, tmp_path, capsys):
    words = ["fit-head", tmp_path / "store", "--dataset", "samples", "--target", "label", "--split", "split"]
    words += ["--head", "logistic", "--bootstrap", 0, "--out", tmp_path / "run"]
    status, out, err = main(*words, capsys=capsys)
    assert status == 0, err
    assert "trained   on 2 replicas of each training image too, evaluated without" in out
    status, out, err = main(*words, "--overwrite", "--replicas", "none", capsys=capsys)
    assert status == 0, err
    assert "replicas" not in out
    status, out, err = main(*words, "--overwrite", "--replicas", "some", capsys=capsys)
    assert status == 2
    assert "replicas: Input should be 'all' or 'none' (found 'some')" in err


@pytest.mark.parametrize("memory", [1, 10**9, "auto"])
def test_stacked_features_say_the_same_however_they_are_read(two_views, tmp_path, memory):
    data = FeatureDataset(tmp_path / "store", dataset="samples", target="label", memory=memory)
    stacked = data.replicas.features
    assert stacked.shape == (3 * 8, data.features.shape[1])
    rows = np.random.default_rng(0).permutation(24)
    expected = FeatureDataset(tmp_path / "store", dataset="samples").replicas.features[np.arange(24)][rows]
    np.testing.assert_array_equal(stacked[rows], expected)
    np.testing.assert_array_equal(stacked.gather(rows).astype(np.float32), expected)
    assert stacked.gather(rows).dtype == np.float16
    assert not stacked.complete(rows)
    assert stacked.complete(np.array([0, 9, 17]))
    chunks = stacked.chunks(np.array([0, 1, 8, 9, 16])).tolist()
    assert chunks[0] == chunks[1] < chunks[2] == chunks[3] == chunks[4]
    assert (stacked.in_ram, stacked.buffer_rows is None) == {1: (False, False), 10**9: (True, True)}.get(
        memory, (False, True)
    )


def test_replicas_that_were_interrupted_are_not_passed_over(two_views, tmp_path, monkeypatch):
    manifest, views = two_views
    original = Extraction.run

    def stop(self):
        if self.job.number == 2:
            raise KeyboardInterrupt
        original(self)

    monkeypatch.setattr(Extraction, "run", stop)
    with pytest.raises(KeyboardInterrupt):
        run(manifest, tmp_path / "store", replicas=3, **views, **OPTIONS)
    monkeypatch.undo()
    with pytest.raises(
        InputError,
        match=r"replicas of view 'a' are not yet extracted \(samples s0000, .*with --replicas again.*--allow-part",
    ):
        _ = FeatureDataset(tmp_path / "store", dataset="samples").replicas
    partial = FeatureDataset(tmp_path / "store", dataset="samples", allow_partial=True).replicas
    assert partial.held.sum(axis=1).tolist() == [8, 8, 0]
    rows, owners = partial.rows_of(np.array([4, 1]))
    assert (rows.tolist(), owners.tolist()) == ([4, 1, 12, 9, 20, 17], [4, 1] * 3)
    run(manifest, tmp_path / "store", replicas=3, **views, **OPTIONS)
    assert FeatureDataset(tmp_path / "store", dataset="samples").replicas.held.all()


def test_replicas_stay_named_while_they_are_there(two_views, tmp_path, capsys):
    manifest, views = two_views
    store, name = tmp_path / "store", replica_id(tmp_path / "store", "b")

    def count(**options) -> int:
        run(manifest, store, **{**views, **options}, engine="torch")
        replicas = FeatureDataset(store, dataset="samples").replicas
        return 0 if replicas is None else replicas.count

    assert count() == count(views={"b": "b"}) == 2
    assert count(image_size={"b": 20}) == 0, "those are of another recipe"
    assert count(replicas=1, augment=["flip"]) == 1
    main("rm", store, replica_id(store, "b"), "--yes", capsys=capsys)
    assert count() == 0
    assert name in recipe_ids(store)


def test_a_view_without_replicas_leaves_them_out(two_views, tmp_path):
    manifest, views = two_views
    run(manifest, tmp_path / "store", **{**views, "views": {"b": "b"}, "image_size": {"b": 20}}, engine="torch")
    assert FeatureDataset(tmp_path / "store", dataset="samples").replicas is None
    assert FeatureDataset(tmp_path / "store", dataset="samples", views=["a"]).replicas.count == 2
    assert len(features(tmp_path / "store", view="a")) == 8, "what the other view has stays"


def test_the_same_body_twice_is_one_recipe_of_replicas(manifest, tmp_path):
    """Views that share a recipe share its replicas; equal content is computed once."""
    summary = run(manifest, tmp_path / "store", views={"left": "image", "right": "image"}, replicas=2, **OPTIONS)
    assert (summary.computed, summary.replicas_computed, summary.replicas_reused) == (N, 2 * N, 2 * N)
    assert replica_id(tmp_path / "store", "left") == replica_id(tmp_path / "store", "right")
