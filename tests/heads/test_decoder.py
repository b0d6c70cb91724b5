import json

import numpy as np
import pytest
import torch

from featurecache.data.dense import IGNORE, DenseTarget
from featurecache.data.targets import Target
from featurecache.errors import InputError, RunError
from featurecache.features.features import ArrayFeatures, Block
from featurecache.heads.base import Fold, get_head, head_names, load_head
from featurecache.heads.contract import ChunkedFeatures
from featurecache.heads.decoder import DecoderHead, DecoderModule, DecoderSettings, DenseLoss
from featurecache.heads.decodermodule import Enlarge, class_pixels
from featurecache.heads.losses import target_tensor

SIZE = (16, 16)
FAST = {"epochs": 6, "width": 16, "batch_size": 4, "lr": 0.02}


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def blocks_of(*shapes):
    found, start = [], 0
    for number, shape in enumerate(shapes):
        stop = start + int(np.prod(shape))
        found.append(Block("image", f"t{number}@none", start, stop, shape))
        start = stop
    return tuple(found)


BLOCKS = blocks_of((2, 8, 8), (3, 4, 4))


def dense(masks, classes=("0", "255")):
    n = len(masks)
    known = (masks != IGNORE).any(axis=(1, 2))
    return DenseTarget("dense", ("mask",), classes, masks, np.arange(n), known, np.ones(n, bool))


def problem(n=24, seed=0):
    """Squares; the finer map holds them at half the size, the coarser one noise."""
    random = np.random.default_rng(seed)
    masks = np.zeros((n, *SIZE), np.uint8)
    for mask in masks:
        top, left = 2 * random.integers(0, 4, 2)
        mask[top : top + 8, left : left + 8] = 1
    fine = masks[:, ::2, ::2, None].astype(np.float32).repeat(2, axis=3).transpose(0, 3, 1, 2)
    maps = [fine + random.normal(0, 0.1, fine.shape), random.normal(size=(n, 3, 4, 4))]
    x = np.concatenate([part.reshape(n, -1) for part in maps], axis=1).astype(np.float32)
    return x, dense(masks)


def folds(x, target, features=None):
    features = features or ArrayFeatures(x, BLOCKS)
    rows = np.arange(len(x)), np.arange(len(x) - 6)
    valid = np.setdiff1d(*rows)
    return [Fold(features, part, target.subset(part)) for part in (rows[1], valid)]


def iou(said, true):
    return ((said == 1) & (true == 1)).sum() / ((said == 1) | (true == 1)).sum()


@pytest.fixture(scope="module")
def fitted():
    x, target = problem()
    return DecoderHead(FAST).fit(*folds(x, target)), x, target


@pytest.mark.parametrize("up", ["shuffle", "transposed"])
@pytest.mark.parametrize(
    ("shapes", "size"),
    [
        (((4, 5, 5), (3, 11, 11), (2, 47, 47)), (96, 96)),  # odd sizes, a step of four
        (((4, 3, 3), (5, 3, 3)), (24, 20)),  # two taps of one size, not square
        (((4, 8, 8),), (8, 8)),  # nothing to enlarge
    ],
)
def test_maps_of_any_depth_become_masks(up, shapes, size):
    blocks = blocks_of(*shapes[::-1])  # any order
    module = DecoderModule(blocks, 3, DecoderSettings(width=16, up=up), size)
    x = torch.randn(2, blocks[-1].stop)
    assert module(x).shape == (2, 3, *size)
    module.eval()
    changed = x.clone()
    for block in blocks:
        changed[:, block.start : block.stop] += 1
        assert not torch.equal(module(changed), module(x)), f"{block.tap} has no say"
        changed = x.clone()


def test_enlarging_starts_without_a_checkerboard():
    found = Enlarge(4, 3, "shuffle")(torch.randn(1, 4, 5, 5))
    assert torch.equal(found[:, :, ::2, ::2], found[:, :, 1::2, 1::2])


def test_loss_is_cross_entropy_and_soft_dice_of_known_pixels():
    random = np.random.default_rng(1)
    masks = random.integers(0, 2, (3, *SIZE)).astype(np.uint8)
    masks[0, :4] = IGNORE
    masks[2] = IGNORE
    target, outputs = dense(masks), torch.from_numpy(random.normal(size=(3, 2, *SIZE))).float()
    total, weight = DenseLoss(target).sums(outputs, target_tensor(target))
    expected = 0.0
    for row in (0, 1):
        known = torch.from_numpy(masks[row] != IGNORE)
        y, logits = torch.from_numpy(masks[row].astype(np.int64))[known], outputs[row][:, known]
        p = logits.softmax(dim=0)[1]
        overlap = (2 * (p * y).sum() + 1) / (p.sum() + y.sum() + 1)
        expected += float(torch.nn.functional.cross_entropy(logits.T, y) + 1 - overlap)
    assert float(weight) == 2
    assert float(total) == pytest.approx(expected, rel=1e-5)
    poisoned = outputs.clone()
    poisoned[0, :, :4] += 100
    assert torch.equal(DenseLoss(target).sums(poisoned, target_tensor(target))[0], total)


def test_class_weights_count_pixels():
    masks = np.zeros((2, *SIZE), np.uint8)
    masks[0, 0, :16] = 1
    masks[1, 8:] = IGNORE
    target = dense(masks)
    assert class_pixels(target).tolist() == [368, 16]
    weights = DenseLoss(target, class_weight="balanced").weights
    torch.testing.assert_close(weights, torch.tensor([384 / (2 * 368), 12.0]))
    assert DenseLoss(target, class_weight={"255": 3.0}).weights.tolist() == [1, 3]
    with pytest.raises(InputError, match=r"class_weight: no class '254'"):
        DenseLoss(target, class_weight={"254": 3.0})


def test_it_learns_where_squares_are(fitted):
    head, x, target = fitted
    said = head.masks(x[-6:])
    assert said.shape == (6, *SIZE)
    assert iou(said, target.values[-6:]) > 0.7
    assert [row["epoch"] for row in head.history_] == list(range(1, len(head.history_) + 1))
    assert {"train_loss", "valid_loss", "lr"} <= head.history_[0].keys()
    shares = head.scores(x)
    assert shares.shape == (24, 2)
    np.testing.assert_allclose(shares.sum(axis=1), 1)


def test_saved_and_loaded_gives_the_same_masks(fitted, tmp_path):
    head, x, _ = fitted
    head.save(tmp_path)
    loaded = load_head(tmp_path)
    assert isinstance(loaded, DecoderHead)
    assert loaded.size == SIZE
    assert np.array_equal(loaded.scores(x), head.scores(x))
    record = json.loads((tmp_path / "head.json").read_text())
    record["fitted"]["size"] = [16]
    (tmp_path / "head.json").write_text(json.dumps(record))
    with pytest.raises(RunError, match=r"'size' must be two lengths \(found \[16\]\)"):
        load_head(tmp_path)


def test_streamed_by_chunks_gives_the_same_masks(fitted):
    head, x, target = fitted
    streamed = ChunkedFeatures(x, BLOCKS, most=24, buffer_rows=12)
    said = np.empty((24, *SIZE), np.uint8)
    for places, masks in head.mask_rows(streamed):
        said[places] = masks
    assert np.array_equal(said, head.masks(x))
    again = DecoderHead(FAST).fit(*folds(x, target, ChunkedFeatures(x, BLOCKS, buffer_rows=12)))
    assert iou(again.masks(x), target.values) > 0.7


def test_the_same_seed_gives_the_same_decoder(fitted):
    head, x, target = fitted
    again = DecoderHead({**FAST, "epochs": 1}, seed=5).fit(*folds(x, target))
    other = DecoderHead({**FAST, "epochs": 1}, seed=5).fit(*folds(x, target))
    assert np.array_equal(again.scores(x), other.scores(x))
    assert not np.array_equal(again.scores(x), head.scores(x))


def test_what_makes_no_sense_is_refused():
    x, target = problem(8)
    assert "decoder" in head_names()
    for name in ("fc", "logistic", "xgboost"):
        with pytest.raises(
            InputError, match=rf"head '{name}' does not predict a dense target; --head decoder predicts"
        ):
            get_head(name)({}).fit(Fold(ArrayFeatures(x, BLOCKS), np.arange(8), target))
    labels = Target("binary", ("y",), ("0", "1"), np.arange(8) % 2)
    with pytest.raises(InputError, match=r"'decoder' does not predict a binary target; its target is a column of mask"):
        DecoderHead({}).fit(Fold(ArrayFeatures(x, BLOCKS), np.arange(8), labels))
    vector = (Block("image", "penultimate@none", 0, x.shape[1], (x.shape[1],)),)
    with pytest.raises(
        InputError, match=r"has the shape \(176,\), not a map. Extract it unpooled \(--tap penultimate:"
    ):
        DecoderHead({}).fit(Fold(ArrayFeatures(x, vector), np.arange(8), target))
    two = (BLOCKS[0], Block("other", "t", 128, 176, (3, 4, 4)))
    with pytest.raises(InputError, match=r"masks lie on one view; choose it with --views"):
        DecoderHead({}).fit(Fold(ArrayFeatures(x, two), np.arange(8), target))
    with pytest.raises(InputError, match=r"unknown key 'widht'"):
        DecoderHead({"widht": 3})
