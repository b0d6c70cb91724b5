import pytest
import torch
from torch import nn

from featurecache.bodies.pooling import Pooling, choose_pooling
from featurecache.bodies.registry import load_body
from featurecache.bodies.taps import resolve_taps
from featurecache.config import POOLS, Tap
from featurecache.errors import InputError


def choose(pool, shape, *, size=(64, 64), module=None, body=None):
    x = torch.zeros(2, *shape)
    plain = nn.Identity()
    return choose_pooling(pool, x, size=size, module=module or plain, body=body or plain, where="tap 'x'")


def test_auto():
    assert choose("auto", (5,))[0].name == "none"
    assert choose("auto", (5, 4, 4))[0].name == "avg"
    assert choose("auto", (4, 5))[0] == Pooling("tokens-avg", {"prefix": 0})


def test_every_pooling_that_can_be_configured_is_known():
    x = {1: torch.rand(2, 6), 2: torch.rand(2, 5, 6), 3: torch.rand(2, 6, 4, 3)}
    for pool in set(POOLS) - {"auto"}:
        suited = 2 if pool in ("cls", "tokens-avg") else 3
        chosen, kind = choose(pool, tuple(x[suited].shape[1:]))
        features = chosen(x[suited].to(torch.bfloat16))
        assert features.dtype == torch.float32
        assert features.ndim - 1 == len(chosen.dims(kind))


def test_features_never_share_memory():
    x = torch.rand(2, 6, 4, 3)
    for pool in ("none", "flatten"):
        features = Pooling(pool)(x)
        before = features.clone()
        x.neg_()
        assert torch.equal(features, before)


def test_gem_between_average_and_maximum():
    x = torch.rand(2, 6, 4, 3)
    gem = Pooling("gem", {"p": 3.0, "eps": 1e-6})(x)
    assert (gem > x.mean((2, 3))).all()
    assert (gem < x.amax((2, 3))).all()


@pytest.mark.parametrize(
    ("shape", "size", "last"),
    [
        ((512, 7, 7), (224, 224), False),
        ((7, 7, 512), (224, 224), True),
        ((512, 7, 9), (224, 288), False),
        ((7, 9, 512), (224, 288), True),
        ((512, 1, 1), (32, 32), False),
        ((1, 1, 512), (32, 32), True),
        ((8, 8, 8), (64, 64), False),
    ],
)
def test_order_of_dimensions(shape, size, last):
    chosen, _ = choose("none", shape, size=size)
    assert chosen.parameters == ({"layout": "NHWC"} if last else {})
    want = (shape[2], *shape[:2]) if last else shape
    assert tuple(chosen(torch.zeros(2, *shape)).shape[1:]) == want


def test_modules_that_tell_their_order():
    assert choose("avg", (8, 8, 8), module=nn.LayerNorm(8))[0].parameters == {"layout": "NHWC"}
    assert choose("avg", (4, 4, 8), module=nn.Conv2d(3, 4, 1))[0].parameters == {}


def test_an_order_that_can_not_be_told_is_an_error():
    class Permute(nn.Module):
        pass

    body = nn.Sequential(nn.Conv2d(3, 8, 1), Permute())
    with pytest.raises(InputError, match=r"can't tell whether its map \(8, 8, 8\) is \(channels, height, width\)"):
        choose("avg", (8, 8, 8), body=body)


def test_swin_keeps_its_channels_last():
    body = load_body("torchvision/swin_t", "none", seed=0)
    (tap,) = resolve_taps(body, [Tap.parse("features.3:none")], (64, 64))
    assert tap.shape == (192, 8, 8)
    assert tap.parameters == {"layout": "NHWC"}


def test_too_many_dimensions():
    with pytest.raises(InputError, match=r"tap 'x': gives 4 dimensions per image \(2, 3, 4, 5\)"):
        choose("auto", (2, 3, 4, 5))


def test_no_class_token():
    body = nn.Identity()
    body.num_prefix_tokens = 0
    with pytest.raises(InputError, match="Identity has no class token; use tokens-avg"):
        choose("cls", (5, 8), body=body)
