import copy

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor

from featurecache.bodies.engines import choose_batch_size, make_engine
from featurecache.bodies.registry import load_body
from featurecache.bodies.taps import Tapped, resolve_taps
from featurecache.config import Tap
from featurecache.data.transforms import Preprocessing
from featurecache.errors import InputError

NORM = nn.modules.batchnorm._BatchNorm
SMALL = Preprocessing(resize=64, crop=64)


def body_of(name, seed=0):
    body = load_body(name, "none", seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for child in body.module.modules():
        if isinstance(child, NORM):
            child.running_mean.copy_(torch.rand(child.num_features, generator=generator) * 0.4 - 0.2)
            child.running_var.copy_(torch.rand(child.num_features, generator=generator) + 0.5)
    return body


def tapped_of(body, *names, size=(64, 64)):
    return Tapped(body, resolve_taps(body, [Tap.parse(name) for name in names or ("penultimate",)], size))


def pixels(n, size=64, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, 3, size, size), generator=generator, dtype=torch.uint8)


def centred_error(found, expected):
    return np.linalg.norm(found - expected) / np.linalg.norm(expected - expected.mean(0))


def error(found, expected):
    """Not centred: random weights give nearly the same features for all noise images."""
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize(
    ("name", "node"),
    [
        ("torchvision/squeezenet1_1", "classifier.0"),
        ("torchvision/resnet18", "flatten"),
        ("torchvision/densenet121", "flatten"),
        ("timm/resnet18", None),
    ],
)
def test_fp32_equals_the_live_forward_pass(name, node):
    body = body_of(name)
    (found,) = make_engine(tapped_of(body), SMALL, precision="fp32")(pixels(5))
    x = SMALL.normalise(pixels(5))
    with torch.no_grad():
        if node is None:
            expected = body.module.forward_head(body.module.forward_features(x), pre_logits=True)
        else:
            expected = create_feature_extractor(body.module, [node])(x)[node]
    expected = expected.mean((2, 3)) if expected.ndim == 4 else expected
    assert found.dtype == np.float32
    assert np.abs(found - expected.numpy()).max() < 1e-5


def test_several_taps_and_floats():
    tapped = tapped_of(body_of("torchvision/resnet18"), "layer1:none", "penultimate", "layer4:avgmax")
    engine = make_engine(tapped, SMALL, precision="fp32")
    from_bytes, from_floats = engine(pixels(3)), engine(pixels(3).float() / 255)
    assert [f.shape for f in from_bytes] == [(3, *tap.shape) for tap in tapped.taps]
    for one, other in zip(from_bytes, from_floats, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_batches_in_flight_come_back_as_they_were():
    engine = make_engine(tapped_of(body_of("torchvision/squeezenet1_1")), SMALL, precision="fp32")
    handles = [engine.submit(pixels(2, seed=seed)) for seed in range(3)]
    for seed, handle in enumerate(handles):
        np.testing.assert_array_equal(engine.collect(handle)[0], engine(pixels(2, seed=seed))[0])


@pytest.mark.parametrize(
    "name", [pytest.param("torchvision/resnet18", marks=pytest.mark.slow), "torchvision/squeezenet1_1"]
)
def test_bf16_rows_do_not_depend_on_the_batch(name):
    engine = make_engine(tapped_of(body_of(name)), SMALL, precision="bf16")
    (whole,) = engine(pixels(32))
    for n in (1, 8, 13):
        (part,) = engine(pixels(32)[:n])
        np.testing.assert_array_equal(part, whole[:n])


def test_bf16_is_a_folded_copy():
    body = body_of("torchvision/resnet18")
    before = copy.deepcopy(body.module.state_dict())
    tapped = tapped_of(body, "penultimate", "layer2")
    engine = make_engine(tapped, SMALL, precision="bf16")
    assert not any(isinstance(child, NORM) for child in engine.tapped.modules())
    assert {p.dtype for p in engine.tapped.parameters()} == {torch.bfloat16}
    assert all(torch.equal(value, before[name]) for name, value in body.module.state_dict().items())
    exact = make_engine(tapped, SMALL, precision="fp32")(pixels(8))
    for found, expected in zip(engine(pixels(8)), exact, strict=True):
        assert found.dtype == np.float32
        assert 0 < error(found, expected) < 0.02


def test_bf16_never_folds_a_tapped_norm():
    tapped = tapped_of(body_of("torchvision/resnet18"), "conv1", "layer1.0.bn2")
    engine = make_engine(tapped, SMALL, precision="bf16")
    assert isinstance(engine.tapped.module.bn1, NORM)
    assert isinstance(engine.tapped.module.layer1[0].bn2, NORM)
    exact = make_engine(tapped, SMALL, precision="fp32")(pixels(4))
    for found, expected in zip(engine(pixels(4)), exact, strict=True):
        assert error(found, expected) < 0.02


def test_folding_that_changes_features_is_undone():
    body = body_of("plugin_bodies:deceptive")
    engine = make_engine(tapped_of(body), SMALL, precision="bf16")
    assert isinstance(engine.tapped.module.bn, NORM)


@pytest.mark.slow
def test_bf16_on_real_images_with_pretrained_weights(real_images):
    body, preprocessing = load_body("torchvision/squeezenet1_1", "shipped"), Preprocessing(resize=112, crop=112)
    tapped = tapped_of(body, size=(112, 112))
    (exact,) = make_engine(tapped, preprocessing, precision="fp32")(real_images)
    (found,) = make_engine(tapped, preprocessing, precision="bf16")(real_images)
    assert centred_error(found, exact) <= 0.02


def test_a_body_that_can_not_run_in_low_precision_says_so():
    class Doubles(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)

        def forward(self, x):
            return self.fc(self.conv(x).float().mean((2, 3)))

    body = load_body("plugin_bodies:maps")
    body.module = Doubles().eval()
    engine = make_engine(tapped_of(body), SMALL, precision="bf16")
    with pytest.raises(InputError, match=r"can't run as a whole in bf16 \(.*\). Use --precision fp32"):
        engine(pixels(1))


def test_make_engine_refuses_what_is_not_there():
    tapped = tapped_of(body_of("plugin_bodies:maps"))
    with pytest.raises(InputError, match=r"no engine 'torhc'. Did you mean 'torch'\? Known: torch, openvino"):
        make_engine(tapped, SMALL, engine="torhc")
    with pytest.raises(InputError, match="threads=0: at least one is needed"):
        make_engine(tapped, SMALL, threads=0)


def test_threads():
    before = torch.get_num_threads()
    try:
        make_engine(tapped_of(body_of("plugin_bodies:maps")), SMALL, threads=2)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


class Clock:
    """An engine whose time per image is given by its batch size."""

    device, in_flight = torch.device("cpu"), 1

    def __init__(self, per_image, monkeypatch, fails_from=1000):
        self.per_image, self.now, self.seen, self.fails_from = per_image, 0.0, [], fails_from
        monkeypatch.setattr("featurecache.bodies.engines.trial.time.perf_counter", lambda: self.now)

    def submit(self, batch):
        if len(batch) >= self.fails_from:
            raise torch.OutOfMemoryError("no memory")
        self.seen.append(tuple(batch.shape))
        self.now += self.per_image(len(batch)) * len(batch)

    def collect(self, handle):
        pass


def test_the_fastest_batch_size_wins(monkeypatch):
    clock = Clock(lambda n: 0.001 if n == 32 else 0.002 if n > 32 else 0.004, monkeypatch)
    assert choose_batch_size(clock, (64, 48), 1) == 4  # 8 is no faster than 4
    clock = Clock({4: 0.005, 8: 0.004, 16: 0.003, 32: 0.001, 64: 0.002}.get, monkeypatch)
    assert choose_batch_size(clock, (64, 48), 1) == 32
    assert clock.seen[0] == (4, 1, 64, 48)


def test_the_trial_is_short(monkeypatch):
    clock = Clock(lambda n: 0.15, monkeypatch)
    assert choose_batch_size(clock, (64, 64), 3) == 4
    assert clock.now < 3
    clock = Clock({4: 0.05, 8: 0.04, 16: 0.03}.get, monkeypatch, fails_from=32)
    assert choose_batch_size(clock, (64, 64), 3) == 16


def test_a_real_trial():
    engine = make_engine(tapped_of(body_of("plugin_bodies:maps")), SMALL, precision="fp32")
    assert choose_batch_size(engine, (64, 64), 3, seconds=0.5) in (4, 8, 16, 32, 64)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_cuda_agrees_with_the_cpu(precision):
    tapped = tapped_of(body_of("torchvision/resnet18"), "penultimate", "layer2")
    exact = make_engine(tapped, SMALL, precision="fp32")(pixels(16))
    engine = make_engine(tapped, SMALL, precision=precision, device="cuda")
    handles = [engine.submit(pixels(16)) for _ in range(3)]
    for handle in handles:
        for found, expected in zip(engine.collect(handle), exact, strict=True):
            assert error(found, expected) < (1e-5 if precision == "fp32" else 0.02)
