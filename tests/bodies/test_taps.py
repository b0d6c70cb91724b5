import threading

import pytest
import torch
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor

from featurecache.bodies.registry import Body, load_body
from featurecache.bodies.taps import Tapped, describe, dummy, resolve_taps
from featurecache.config import Tap
from featurecache.data.transforms import Preprocessing
from featurecache.errors import InputError


def randomise(module, seed=0):
    """Normalisation statistics that are not 0 and 1, so that a mistake with them shows."""
    generator = torch.Generator().manual_seed(seed)
    for child in module.modules():
        if isinstance(child, nn.modules.batchnorm._BatchNorm):
            for tensor, low, high in (
                (child.running_mean, -0.2, 0.2),
                (child.running_var, 0.5, 1.5),
                (child.weight.data, 0.7, 1.3),
                (child.bias.data, -0.2, 0.2),
            ):
                tensor.copy_(torch.rand(tensor.shape, generator=generator) * (high - low) + low)


def tap(body, *names, size=(64, 64), **options):
    return Tapped(body, resolve_taps(body, [Tap.parse(name) for name in names], size), **options)


@pytest.fixture(scope="module")
def resnet():
    body = load_body("torchvision/resnet18", "none", seed=0)
    randomise(body.module)
    return body


@pytest.fixture
def small():
    body = load_body("plugin_bodies:small")
    randomise(body.module)
    return body


@pytest.fixture
def several():
    return load_body("plugin_bodies:several")


@pytest.mark.parametrize(
    ("name", "node", "features"),
    [("squeezenet1_1", "classifier.0", 512), ("resnet18", "flatten", 512), ("densenet121", "flatten", 1024)],
)
def test_penultimate_equals_torchvisions_own_extractor(name, node, features):
    body = load_body(f"torchvision/{name}", "none", seed=0)
    randomise(body.module)
    tapped = tap(body, "penultimate")
    x = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        (found,) = tapped(x)
        expected = create_feature_extractor(body.module, [node])(x)[node]
    expected = expected.mean((2, 3)) if expected.ndim == 4 else expected
    assert found.shape == expected.shape == (3, features)
    assert tapped.taps[0].dims == ("features",)
    assert (found - expected).abs().max() < 1e-5


@pytest.mark.parametrize("name", ["resnet18", "convnext_atto"])
def test_penultimate_equals_timms_own_head(name):
    body = load_body(f"timm/{name}", "none", seed=0)
    randomise(body.module)
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    tapped = tap(body, "penultimate")
    with torch.no_grad():
        (found,) = tapped(x)
        expected = body.module.forward_head(body.module.forward_features(x), pre_logits=True)
    assert tapped.taps[0].on == "pre_logits"
    assert found.shape == expected.shape
    assert (found - expected).abs().max() < 1e-5


def test_timm_taps_before_and_inside_the_head():
    body = load_body("timm/resnet18", "none", seed=0)
    tapped = tap(body, "penultimate", "layer1:avg", "fc")
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        penultimate, layer, logits = tapped(x)
        assert torch.allclose(body.module(x), logits)
        assert torch.allclose(body.module.fc(penultimate), logits, atol=1e-5)
        assert layer.shape == (2, 64)


def test_several_taps_in_one_pass(resnet):
    names = ["layer2", "layer4:avgmax", "penultimate", "layer1:rows", "maxpool:none", "layer3:gem", "layer3:flatten"]
    tapped = tap(resnet, *names)
    assert [t.name for t in tapped.taps] == [
        "layer2@avg",
        "layer4@avgmax",
        "penultimate@none",
        "layer1@rows",
        "maxpool@none",
        "layer3@gem",
        "layer3@flatten",
    ]
    assert [t.shape for t in tapped.taps] == [
        (128,),
        (1024,),
        (512,),
        (64, 16),
        (64, 16, 16),
        (256,),
        (256 * 16,),
    ]
    assert tapped.taps[4].dims == ("channels", "height", "width")
    assert tapped.taps[3].dims == ("channels", "height")
    x = torch.randn(2, 3, 64, 64)
    nodes = create_feature_extractor(resnet.module, ["layer1", "layer2", "layer3", "layer4", "maxpool"])
    with torch.no_grad():
        found, maps = tapped(x), nodes(x)
    assert [tuple(f.shape[1:]) for f in found] == [t.shape for t in tapped.taps]
    expected = [
        maps["layer2"].mean((2, 3)),
        torch.cat([maps["layer4"].mean((2, 3)), maps["layer4"].amax((2, 3))], 1),
        maps["layer4"].mean((2, 3)),
        maps["layer1"].mean(3),
        maps["maxpool"],
        maps["layer3"].clamp(min=1e-6).pow(3).mean((2, 3)).pow(1 / 3),
        maps["layer3"].flatten(1),
    ]
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, atol=1e-5)
    assert tapped.taps[5].parameters_for_recipe() == {
        "name": "layer3@gem",
        "tap": "layer3",
        "module": "layer3",
        "on": "output",
        "call": 0,
        "pool": "gem",
        "parameters": {"p": 3.0, "eps": 1e-6},
    }


def test_an_in_place_activation_does_not_change_a_tap(small):
    tapped = tap(small, "bn1:none")
    with torch.no_grad():
        (found,) = tapped(dummy(small, (32, 32), 2))
    assert found.min() < 0  # the ReLU behind it works in place


def test_repeated_modules_need_a_call_index(small):
    with pytest.raises(
        InputError, match="tap 'act': module 'act' runs 2 times in one pass; say which call: act#0 to act#1"
    ):
        tap(small, "act")
    with pytest.raises(InputError, match="runs 2 times, so the last is act#1"):
        tap(small, "act#2")
    with pytest.raises(InputError, match="'x' is no number of a call"):
        tap(small, "act#x")
    tapped = tap(small, "act#1:none", "act#0:none", "conv2:none", "bn1#0:none")
    assert [t.name for t in tapped.taps] == ["act@1@none", "act@0@none", "conv2@none", "bn1@none"]
    second, first, conv2, bn1 = tapped(dummy(small, (32, 32), 2))
    assert torch.equal(second, conv2.relu())
    assert torch.equal(first, bn1.relu())


def test_unknown_names_name_the_nearest(resnet, small):
    with pytest.raises(
        InputError, match=r"no module 'layr4'. Did you mean 'layer4'\? List taps: featurecache bodies show"
    ):
        tap(resnet, "layr4")
    with pytest.raises(InputError, match="tap 'never': module 'never' never ran in the forward pass"):
        tap(small, "never")
    with pytest.raises(InputError, match="no taps given"):
        tap(small)


def test_names_in_the_store_are_unique(resnet):
    with pytest.raises(InputError, match="two taps would be stored as 'layer4@avg'"):
        tap(resnet, "layer4", "layer4:avg")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("attention", r"gives a tuple of 2 \(Tensor, Tensor\), not one floating-point tensor. Tap a module before"),
        ("best", "gives a tensor of torch.int64, not one floating-point tensor"),
        ("windows", r"the first dimension of \(\d+, 4, 8\) is not the batch of 2"),
        (
            "penultimate",
            r"no known classifier and gives a dict, not a tensor. Name a tap: .*norm.* List all: featurecache",
        ),
        (
            "norm:avg",
            r"pooling 'avg' does not suit tokens of shape \(64, 8\). Possible: none, cls, tokens-avg, flatten",
        ),
        ("stem:cls", r"pooling 'cls' does not suit a map of shape \(8, 8, 8\)"),
    ],
)
def test_values_that_are_no_features(several, name, message):
    with pytest.raises(InputError, match=message):
        tap(several, name, size=(32, 32))


def test_tokens(several):
    tapped = tap(several, "norm", "norm:cls", "norm:none", size=(32, 32))
    average, first, tokens = tapped(dummy(several, (32, 32), 3))
    assert [t.dims for t in tapped.taps] == [("features",), ("features",), ("tokens", "features")]
    assert torch.allclose(average, tokens.mean(1))
    assert torch.equal(first, tokens[:, 0])


def test_a_body_without_classifier_gives_its_pooled_output():
    body = load_body("plugin_bodies:maps")
    tapped = tap(body, "penultimate", "conv:none")
    assert (tapped.taps[0].name, tapped.taps[0].on, tapped.taps[0].shape) == ("penultimate@avg", "body", (5,))
    pooled, maps = tapped(dummy(body, (64, 64), 2))
    assert torch.allclose(pooled, maps.mean((2, 3)))


def test_a_failure_behind_the_last_tap_does_not_matter():
    body = load_body("plugin_bodies:fragile")
    assert tap(body, "conv").taps[0].shape == (2,)
    with pytest.raises(InputError, match="failed on a 64x64 image: RuntimeError: mat1 and mat2 shapes"):
        tap(body, "penultimate")
    with pytest.raises(InputError, match=r"'fc' never ran in the forward pass .*failed on a 64x64 image"):
        tap(body, "fc")


def test_forward_stops_after_the_last_tap(resnet):
    ran = []
    handle = resnet.module.layer3.register_forward_hook(lambda *_: ran.append("layer3"))
    x = dummy(resnet, (64, 64), 1)
    try:
        tap(resnet, "layer2")(x)
        assert len(ran) == 1  # the trial pass of resolve_taps
        tap(resnet, "layer2", early_exit=False)(x)
        assert len(ran) == 3
    finally:
        handle.remove()


def test_the_classifier_is_not_run(resnet):
    class Refuses(nn.Linear):
        def forward(self, x):
            raise AssertionError("the classifier ran")

    tapped = tap(resnet, "penultimate")
    own, resnet.module.fc = resnet.module.fc, Refuses(512, 2)
    try:
        assert tapped(dummy(resnet, (64, 64), 1))[0].shape == (1, 512)
    finally:
        resnet.module.fc = own


def test_hooks_are_removed_whatever_happens(small):
    tapped = tap(small, "conv2", "act#0")
    tapped(dummy(small, (32, 32), 1))
    with pytest.raises(RuntimeError):
        tapped(torch.zeros(1, 5, 8, 8))
    for child in small.module.modules():
        assert not child._forward_hooks
        assert not child._forward_pre_hooks


def test_a_tap_that_does_not_fire_is_an_error(small):
    tapped = tap(small, "conv2", "bn1")
    small.module.forward = lambda x: small.module.bn1(small.module.conv1(x))
    with pytest.raises(InputError, match="taps that never fired in the forward pass: conv2"):
        tapped(dummy(small, (32, 32), 1))


def test_broad_except_clauses_do_not_swallow_the_early_exit():
    class Careful(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 2, 1), nn.Conv2d(2, 2, 1)

        def forward(self, x):
            try:
                return self.b(self.a(x))
            except Exception:
                return x

    body = Body("careful", "careful", Careful().eval(), Preprocessing(crop=8, resize=8))
    assert tap(body, "a", size=(8, 8))(torch.zeros(1, 3, 8, 8))[0].shape == (1, 2)


def test_gradients_flow_and_tapped_is_a_module(small):
    small.module.requires_grad_(True)
    tapped = tap(small, "penultimate", "conv1", early_exit=False)
    assert "module.conv1.weight" in dict(tapped.named_parameters())
    sum(f.sum() for f in tapped(dummy(small, (32, 32), 2))).backward()
    assert small.module.conv1.weight.grad.abs().sum() > 0
    assert small.module.fc.weight.grad is not None  # its own output is the plug-in's penultimate


def test_passes_on_several_threads_do_not_mix(resnet):
    tapped = tap(resnet, "layer1", "penultimate")
    inputs = [torch.randn(1, 3, 48, 48, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    with torch.no_grad():
        expected = [tapped(x) for x in inputs]
    found = [[] for _ in inputs]

    def run(i):
        with torch.no_grad():
            for _ in range(5):
                found[i].append(tapped(inputs[i]))

    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    for results, want in zip(found, expected, strict=True):
        assert len(results) == 5
        assert all(torch.allclose(a, b, atol=1e-5) for got in results for a, b in zip(got, want, strict=True))


def test_export_with_hooks(small):
    tapped = tap(small, "act#1", "penultimate", early_exit=False)
    x = dummy(small, (32, 32), 2)
    exported = torch.export.export(tapped, (x,), strict=False)
    for one, other in zip(exported.module()(x), tapped(x), strict=True):
        assert torch.allclose(one, other, atol=1e-6)


def test_describe_lists_modules_in_the_order_they_run(resnet, small):
    lines = describe(resnet, (64, 64))
    assert lines[0][:4] == ("penultimate", "input of fc, pooling none", (512,), 1)
    assert [line.name for line in lines if line.penultimate] == ["penultimate", "fc"]
    found = {line.name: line for line in lines}
    assert (found["layer4"].type, found["layer4"].shape) == ("Sequential", (512, 2, 2))
    assert found["layer1.0.relu"].calls == 2
    own = describe(small, (32, 32))
    assert [line.name for line in own] == ["penultimate", "conv1", "bn1", "act", "conv2", "pool", "fc", "never"]
    assert own[-1][2:4] == (None, 0)


def test_describe_a_body_without_penultimate(several):
    lines = {line.name: line for line in describe(several, (32, 32))}
    assert "penultimate" not in lines
    assert lines["attention"].shape is None
    assert lines["norm"].shape == (64, 8)


@pytest.mark.parametrize(
    ("name", "features"),
    [
        ("alexnet", 4096),
        ("vgg11_bn", 4096),
        ("mobilenet_v2", 1280),
        ("mobilenet_v3_small", 1024),
        ("shufflenet_v2_x0_5", 1024),
        ("mnasnet0_5", 1280),
        ("efficientnet_b0", 1280),
        ("regnet_y_400mf", 440),
        ("googlenet", 1024),
        ("convnext_tiny", 768),
        ("swin_t", 768),
    ],
)
@pytest.mark.slow
def test_penultimate_of_other_families(name, features):
    body = load_body(f"torchvision/{name}", "none", seed=0)
    assert tap(body, "penultimate").taps[0].shape == (features,)


@pytest.mark.slow
def test_penultimate_of_families_of_a_fixed_size():
    for name, size, features in (("vit_b_32", 224, 768), ("maxvit_t", 224, 512), ("inception_v3", 96, 2048)):
        body = load_body(f"torchvision/{name}", "none", seed=0)
        assert tap(body, "penultimate", size=(size, size)).taps[0].shape == (features,)


@pytest.mark.slow
def test_class_token_and_prefix():
    body = load_body("torchvision/vit_b_32", "none", seed=0)
    tapped = tap(body, "encoder:cls", "encoder:tokens-avg", "encoder:none", "penultimate", size=(224, 224))
    with torch.no_grad():
        first, average, tokens, penultimate = tapped(dummy(body, (224, 224), 1))
    assert tapped.taps[1].parameters == {"prefix": 1}
    assert torch.equal(first, penultimate)
    assert torch.allclose(average, tokens[:, 1:].mean(1), atol=1e-6)
    timm = load_body("timm/swin_tiny_patch4_window7_224", "none", seed=0)
    with pytest.raises(InputError, match=r"pooling 'cls' does not suit a map"):
        tap(timm, "layers.3:cls", size=(224, 224))
