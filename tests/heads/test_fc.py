import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from featurecache.data.targets import Target
from featurecache.errors import InputError, RunError
from featurecache.features.features import ArrayFeatures, Block
from featurecache.fusion import Concat
from featurecache.heads.base import Fold, load_head
from featurecache.heads.contract import ChunkedFeatures
from featurecache.heads.epochs import batch_bounds
from featurecache.heads.fc import FCHead, FCModule, FCSettings, PresentBatchNorm, build_fc, hide_views
from featurecache.heads.fcmodule import MapPool, mix_rows
from featurecache.heads.losses import HeadLoss, positive_weights, target_tensor
from featurecache.heads.rows import FeatureRows, StreamRows, TensorRows, open_rows

BLOCKS = (Block("front", "a", 0, 4, (4,)), Block("side", "a", 4, 10, (6,)))
CPU = torch.device("cpu")


def seeded(settings, *, indicators=False, n_out=3):
    torch.manual_seed(0)
    return FCModule(BLOCKS, n_out, settings, indicators=indicators)


def test_is_create_head():
    module = seeded(FCSettings.create({}))
    torch.manual_seed(0)
    plain = nn.Sequential(
        nn.BatchNorm1d(10), nn.Dropout(0.25), nn.Linear(10, 512), nn.ReLU(), nn.BatchNorm1d(512), nn.Dropout(0.5),
        nn.Linear(512, 3),
    )  # fmt: skip
    x = torch.randn(20, 10)
    for training in (True, False):
        module.train(training)
        plain.train(training)
        torch.manual_seed(1)
        found = module(x)
        torch.manual_seed(1)
        assert torch.equal(found, plain(x))
    assert sum(p.numel() for p in module.parameters()) == sum(p.numel() for p in plain.parameters())


@pytest.mark.parametrize("hidden", [(), (8,), (8, 5)])
@pytest.mark.parametrize("batch_norm", [True, False])
def test_sizes(hidden, batch_norm):
    module = seeded(FCSettings.create({"hidden": hidden, "batch_norm": batch_norm}), indicators=True)
    assert module(torch.randn(4, 10)).shape == (4, 3)
    linear = [layer for layer in module.modules() if isinstance(layer, nn.Linear)]
    assert [layer.out_features for layer in linear] == [*hidden, 3]
    assert linear[0].in_features == 12
    assert module.n_in == 10
    drops = [layer.p for layer in module.modules() if isinstance(layer, nn.Dropout)]
    assert drops == [0.25] * len(hidden) + [0.5]


def test_batch_norm_statistics_come_from_present_samples():
    x = torch.randn(30, 10) * 3 + 5
    missing = torch.zeros(30, 10, dtype=torch.bool)
    missing[::3, 4:] = True
    norm, front, side = PresentBatchNorm(10), nn.BatchNorm1d(4), nn.BatchNorm1d(6)
    there = ~missing[:, 9]
    for _ in range(3):
        found = norm(torch.where(missing, 0, x), missing)
        torch.testing.assert_close(found[:, :4], front(x[:, :4]), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(found[there, 4:], side(x[there, 4:]), atol=1e-5, rtol=1e-5)
        assert (found[~there, 4:] == 0).all()
    torch.testing.assert_close(norm.running_mean, torch.cat([front.running_mean, side.running_mean]))
    torch.testing.assert_close(norm.running_var, torch.cat([front.running_var, side.running_var]))
    norm.eval()
    side.eval()
    found = norm(torch.where(missing, 0, x), missing)
    torch.testing.assert_close(found[there, 4:], side(x[there, 4:]), atol=1e-5, rtol=1e-5)


def test_batch_norm_with_one_present_sample_keeps_its_statistics():
    norm = PresentBatchNorm(2)
    missing = torch.tensor([[False, False], [False, True], [False, True]])
    found = norm(torch.tensor([[1.0, 7.0], [2.0, 0.0], [3.0, 0.0]]), missing)
    assert norm.running_mean[1] == 0
    assert norm.running_var[1] == 1
    assert found[0, 1].item() == pytest.approx(7, rel=1e-4)
    assert norm.running_mean[0] == pytest.approx(0.2)


@pytest.mark.parametrize("hidden", [False, True])
def test_a_feature_that_is_nearly_always_zero_is_not_blown_up(hidden):
    norm, plain = PresentBatchNorm(2), nn.BatchNorm1d(2)
    missing = torch.zeros(8, 2, dtype=torch.bool) if hidden else None
    torch.manual_seed(0)
    for _ in range(200):
        x = torch.stack([torch.randn(8), torch.zeros(8)], dim=1)
        torch.testing.assert_close(norm(x, missing), plain(x))
    torch.testing.assert_close(norm.running_mean, plain.running_mean)
    torch.testing.assert_close(norm.running_var[0], plain.running_var[0])
    assert norm.num_batches_tracked == plain.num_batches_tracked
    new = torch.tensor([[0.0, 1.0]])
    assert plain.eval()(new)[0, 1].item() > 300
    assert norm.eval()(new)[0, 1].item() == pytest.approx(1, rel=1e-4)


def test_no_gradient_is_nan_where_a_view_is_missing():
    module = seeded(FCSettings.create({}), indicators=True)
    images = torch.randn(6, 10, requires_grad=True)
    present = torch.tensor([[True, True], [True, False], [False, True]] * 2)
    fused = Concat(BLOCKS)([images[:, :4], images[:, 4:]], present)
    module(fused).sum().backward()
    assert images.grad.isfinite().all()
    assert (images.grad[1, 4:] == 0).all()
    assert (images.grad[2, :4] == 0).all()
    assert all(p.grad.isfinite().all() for p in module.parameters())


def test_live_views_through_concat_are_what_the_cache_gives(problem, fast):
    """What joint training feeds the module is what stage two fed it."""
    data = problem("binary", missing=0.5)
    head = FCHead(fast["fc"]).fit(data.train, data.valid)
    x = torch.from_numpy(data.x)
    views = [x[:, :9].nan_to_num(7.0), x[:, 9:].nan_to_num(-7.0)]
    fused = Concat(data.features.blocks)(views, ~x[:, [0, 9]].isnan())
    assert torch.equal(fused.isnan(), x.isnan())
    with torch.no_grad():
        scores = head.module(fused).double().softmax(dim=1).numpy()
    assert np.array_equal(scores, head.scores(data.x))


def test_hide_views_leaves_every_row_one():
    module = seeded(FCSettings.create({}))
    x = torch.randn(500, 10)
    x[:100, :4] = torch.nan
    hidden = hide_views(x, module, 0.6, torch.Generator().manual_seed(0))
    assert (hidden[:100, 4:] == x[:100, 4:]).all()
    gone = hidden[100:, [0, 4]].isnan()
    assert not gone.all(dim=1).any()
    assert gone.any(dim=1).float().mean() > 0.7
    again = hide_views(x, module, 0.6, torch.Generator().manual_seed(0))
    assert torch.equal(hidden.nan_to_num(9), again.nan_to_num(9))
    assert torch.equal(hidden[:, 0].isnan(), hidden[:, 3].isnan())


def test_indicators_are_trained_where_views_are_missing_or_hidden(problem, fast):
    complete, lacking = problem("binary"), problem("binary", missing=0.3)
    assert not FCHead(fast["fc"]).fit(complete.train).module.indicators
    assert FCHead(fast["fc"]).fit(lacking.train).module.indicators
    head = FCHead(fast["fc"] | {"view_dropout": 0.3}).fit(complete.train)
    assert head.module.indicators
    x = complete.x.copy()
    x[:, 9:] = np.nan
    without = FCHead(fast["fc"] | {"patience": 100}).fit(complete.train).scores(x)[:, 1]
    truth = complete.target.values
    assert np.mean((head.scores(x)[:, 1] > 0.5) == truth) >= np.mean((without > 0.5) == truth) - 0.1


@pytest.mark.parametrize("n", [2, 3, 33, 65])
def test_any_number_of_rows_trains(problem, n):
    data = problem("binary")
    values = data.target.values.copy()
    values[:n] = np.arange(n) % 2
    head = FCHead({"epochs": 2, "hidden": (4,), "batch_size": 32}).fit(data.with_values(values).fold(0, n))
    assert np.isfinite(head.scores(data.x)).all()


def test_the_best_epoch_is_restored(problem):
    data = problem("binary")
    settings = {"epochs": 60, "patience": 4, "hidden": (64,), "lr": 0.05, "dropout": 0.0}
    head = FCHead(settings).fit(data.train, data.valid)
    losses = [row["valid_loss"] for row in head.history_]
    best = int(np.argmin(losses))
    assert head.fitted_["epoch"] == best + 1 == head.history_[best]["epoch"]
    assert len(losses) == max(best + 1, 15) + 4  # the learning rate rises in the first 15
    assert len(losses) < 60
    scores = head.scores(data.x[data.valid.rows])
    truth = data.valid.target.values
    assert -np.log(scores[np.arange(len(truth)), truth]).mean() == pytest.approx(losses[best], rel=1e-5)


def linear(n, d, seed):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, d)).astype(np.float32)
    y = 100 + 7 * (x @ rng.normal(size=d) / np.sqrt(d) + 0.3 * rng.normal(size=n))
    features = ArrayFeatures(x, (Block("front", "a", 0, d, (d,)),))
    target = Target("regression", ("y",), (), y[:, None].astype(np.float32))
    folds = [np.arange(*ends) for ends in ((0, n * 3 // 5), (n * 3 // 5, n * 4 // 5), (n * 4 // 5, n))]
    return [Fold(features, rows, target.subset(rows)) for rows in folds], x, y


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_defaults_learn_a_linear_regression_of_few_rows(seed):
    (train, valid, test), x, y = linear(300, 20, seed)
    head = FCHead().fit(train, valid)
    truth = y[test.rows]
    residual = truth - head.scores(x[test.rows])[:, 0]
    assert 1 - (residual**2).sum() / ((truth - truth.mean()) ** 2).sum() > 0.7


def test_every_way_to_read_trains_the_same_head(problem, fast):
    data = problem("multilabel", missing=0.3)
    size = data.x[:190].nbytes

    class Mapped(ArrayFeatures):
        in_ram = False

    chunked = ChunkedFeatures(data.x, data.features.blocks)
    kinds, scores = [], []
    for features, memory in (
        (data.features, None),
        (Mapped(data.x, data.features.blocks), size),
        (Mapped(data.x, data.features.blocks), 0),
        (chunked, size),
        (chunked, 0),
    ):
        train, valid = data.fold(0, 140, features), data.fold(140, 190, features)
        rows = open_rows(train, CPU, memory)
        kinds.append(type(rows))
        assert rows.missing
        assert len(rows) == 140
        scores.append(FCHead(fast["fc"], memory=memory).fit(train, valid).scores(data.x))
        assert np.array_equal(scores[0], scores[-1])
    assert kinds == [FeatureRows, TensorRows, FeatureRows, TensorRows, StreamRows]


def test_streamed_rows_come_once_an_epoch_with_their_targets(problem):
    data = problem("regression", labels=1)
    features = ChunkedFeatures(data.x, data.features.blocks, most=128, buffer_rows=70)
    rows = StreamRows(Fold(features, np.arange(3, 240), data.target.subset(np.arange(3, 240))), CPU)
    bounds = batch_bounds(237, 32)

    def epoch(seed):
        batches = list(rows.epoch(bounds, torch.Generator().manual_seed(seed)))
        assert [len(x) for x, _ in batches] == [stop - start for start, stop in bounds]
        return torch.cat([x for x, _ in batches]).numpy(), torch.cat([y for _, y in batches]).numpy()

    x, y = epoch(0)
    order = np.array([np.flatnonzero((data.x == row).all(axis=1))[0] for row in x])
    assert np.array_equal(np.sort(order), np.arange(3, 240))
    np.testing.assert_array_equal(y, data.target.values[order])
    assert max(features.sizes) <= 70 + 32
    assert np.array_equal(epoch(0)[0], x)
    assert not np.array_equal(epoch(1)[0], x)


def test_float16_features_stay_so_in_ram(problem):
    data = problem("binary")
    half = ChunkedFeatures(data.x.astype(np.float16), data.features.blocks)
    rows = open_rows(data.fold(0, 140, half), CPU, 2 * 140 * 14)
    assert isinstance(rows, TensorRows)
    assert rows.nbytes == 2 * 140 * 14
    x, _ = next(rows.in_order())
    assert x.dtype == torch.float32
    np.testing.assert_array_equal(x, half.x[:140])
    assert isinstance(open_rows(data.fold(0, 140, half), CPU, 2 * 140 * 14 - 1), StreamRows)


@pytest.mark.parametrize("task", ["binary", "multilabel"])
def test_weights_of_positives(problem, fast, task):
    data = problem(task, n=400)
    plain = FCHead(fast["fc"]).fit(data.train, data.valid).scores(data.x)
    heavy = FCHead(fast["fc"] | {"pos_weight": 20}).fit(data.train, data.valid).scores(data.x)
    column = 1 if task == "binary" else slice(None)
    assert heavy[:, column].mean() > plain[:, column].mean() + 0.1


def test_pos_weight_is_that_of_torch(problem):
    data = problem("multilabel", unknown=0.2)
    values = torch.as_tensor(data.target.values)
    outputs = torch.randn(values.shape, generator=torch.Generator().manual_seed(0))
    weight = torch.tensor([3.0, 1.0, 1.0])
    known = ~values.isnan()
    expected = torch.nn.functional.binary_cross_entropy_with_logits(
        outputs, values.nan_to_num(), pos_weight=weight, reduction="none"
    )[known].sum()
    found, _ = HeadLoss(data.target, pos_weight={"y0": 3.0}).sums(outputs, values)
    torch.testing.assert_close(found, expected)
    counts = [(data.target.values == side).sum(axis=0) for side in (0, 1)]
    np.testing.assert_allclose(positive_weights(data.target, "balanced")[:, 1], counts[0] / counts[1])


@pytest.mark.parametrize(
    ("task", "settings", "message"),
    [
        ("multiclass", {"pos_weight": 2.0}, "pos_weight: a multiclass target has no positives; use class_weight"),
        ("multilabel", {"pos_weight": {"y9": 2}}, "pos_weight: no label 'y9'. There are: y0, y1, y2"),
        ("multilabel", {"pos_weight": {"y0": -2}}, "pos_weight: 'y0'=-2.0: must be positive"),
    ],
)
def test_pos_weight_that_does_not_fit(problem, task, settings, message):
    with pytest.raises(InputError, match=message):
        FCHead(settings).fit(problem(task).train)


def test_two_kinds_of_weights_at_once_are_refused():
    with pytest.raises(InputError, match="class_weight and pos_weight weigh the same rows twice"):
        FCHead({"pos_weight": 2, "class_weight": "balanced"})


def test_mixup_mixes_rows_and_their_losses(problem, fast):
    x = torch.arange(24.0).reshape(8, 3)
    x[0, 1:] = torch.nan
    mixed, partner, own = mix_rows(x, 0.4, np.random.default_rng(0), torch.Generator().manual_seed(0))
    assert 0 < own < 1
    blend = own * x + (1 - own) * x[partner]
    whole = ~blend.isnan()
    torch.testing.assert_close(mixed[whole], blend[whole])
    assert mixed[0, 1:].isnan().all()  # what is missing stays so
    other = int((partner == 0).nonzero()[0, 0])
    if other:  # what the partner lacks is the row's own
        torch.testing.assert_close(mixed[other, 1:], x[other, 1:])
    for task in ("multiclass", "multilabel", "regression"):
        data = problem(task, missing=0.2, unknown=0.1)
        first, second, plain = (
            FCHead(fast["fc"] | {"mixup": alpha}).fit(data.train, data.valid) for alpha in (0.4, 0.4, 0)
        )
        assert first.history_ == second.history_
        assert first.history_[-1]["train_loss"] > plain.history_[-1]["train_loss"]


def test_maps_are_pooled_before_the_first_layer(problem, fast, tmp_path):
    rng = np.random.default_rng(0)
    blocks = (Block("front", "map", 0, 24, (4, 3, 2)), Block("side", "deep", 24, 29, (5,)))
    x = rng.normal(size=(200, 29)).astype(np.float32)
    x[::9, :24] = np.nan
    pool = MapPool(blocks, "avgmax")
    assert [(b.start, b.stop, b.shape) for b in pool.blocks] == [(0, 8, (8,)), (8, 13, (5,))]
    maps = x[1:5, :24].reshape(4, 4, 6)
    expected = np.hstack([maps.max(axis=2), maps.mean(axis=2), x[1:5, 24:]])
    np.testing.assert_allclose(pool(torch.from_numpy(x[1:5])), expected, rtol=1e-5, atol=1e-6)
    assert pool(torch.from_numpy(x[:1]))[0, :8].isnan().all()
    features, rows = ArrayFeatures(x, blocks), np.arange(150)
    peaks = np.nan_to_num(x[:, :24]).reshape(200, 4, 6).max(axis=2)[:, 0]
    target = Target("binary", ("y",), ("no", "yes"), (peaks > np.median(peaks)).astype(np.int64))
    for name, n_in in (("none", 29), ("avg", 9), ("max", 9), ("avgmax", 13)):
        head = FCHead(fast["fc"] | {"pool": name, "view_dropout": 0.2}).fit(Fold(features, rows, target.subset(rows)))
        assert head.module.norm.num_features == n_in
        assert np.isfinite(head.scores(x)).all()
        head.save(tmp_path / name)
        assert np.array_equal(load_head(tmp_path / name).scores(x), head.scores(x))


def test_label_smoothing_changes_training_only(problem, fast):
    data = problem("binary")
    smooth = FCHead(fast["fc"] | {"label_smoothing": 0.3}).fit(data.train, data.valid)
    plain = FCHead(fast["fc"]).fit(data.train, data.valid)
    assert np.abs(smooth.scores(data.x) - 0.5).mean() < np.abs(plain.scores(data.x) - 0.5).mean()


def test_regression_is_in_the_unit_of_the_target(problem, fast):
    data = problem("regression", labels=1)
    first = FCHead(fast["fc"]).fit(data.train, data.valid)
    second_data = data.with_values(data.target.values * 1000 - 5)
    second = FCHead(fast["fc"]).fit(second_data.train, second_data.valid)
    assert 80 < first.predict(data.x).mean() < 120
    np.testing.assert_allclose(second.predict(data.x), first.predict(data.x) * 1000 - 5, rtol=1e-3)
    assert first.history_[-1]["valid_loss"] == pytest.approx(second.history_[-1]["valid_loss"], rel=1e-3)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there(problem):
    with pytest.raises(InputError, match="device 'cuda': torch finds no CUDA device here"):
        FCHead(device="cuda").fit(problem("binary").train)


def test_adopt_saves_a_module_trained_elsewhere(problem, tmp_path):
    data = problem("multiclass")
    settings = FCSettings.create({"hidden": (4,)})
    module = build_fc(data.features.blocks, data.target, settings, indicators=True)
    loss = HeadLoss(data.target, class_weight="balanced")
    loss(module(torch.from_numpy(data.x)), target_tensor(data.target)).backward()
    head = FCHead.adopt(module.eval(), data.target, data.features.blocks, settings, seed=5)
    head.save(tmp_path)
    loaded = load_head(tmp_path)
    assert np.array_equal(loaded.scores(data.x), head.scores(data.x))
    assert loaded.seed == 5
    assert loaded.module.indicators


def test_tensors_that_do_not_fit(problem, fast, tmp_path):
    data = problem("binary")
    FCHead(fast["fc"]).fit(data.train).save(tmp_path)
    path = tmp_path / "head.safetensors"
    tensors = load_file(path)

    def refused(**changes):
        save_file({k: v for k, v in (tensors | changes).items() if v is not None}, path)
        record = json.loads((tmp_path / "head.json").read_text())
        import hashlib

        record["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
        (tmp_path / "head.json").write_text(json.dumps(record))
        with pytest.raises(RunError) as caught:
            load_head(tmp_path)
        return str(caught.value)

    name = "layers.0.weight"
    assert f"tensor '{name}' is missing" in refused(**{name: None})
    assert "tensor 'other' is unknown" in refused(other=torch.zeros(1))
    wanted = r"is (16, 13) torch.float32, expected (16, 14) torch.float32"
    assert wanted in refused(**{name: tensors[name][:, 1:].contiguous()})
    assert "torch.float64, expected" in refused(**{name: tensors[name].double()})
