import pytest
import torch
from plugin_bodies import Deceptive
from plugin_joint import tiny
from torch import nn

from featurecache.bodies.registry import Body, load_body
from featurecache.bodies.split import split_body
from featurecache.bodies.stem import share_stem
from featurecache.bodies.tapped import Tapped
from featurecache.bodies.taps import dummy, map_tap, resolve_taps
from featurecache.config import Tap
from featurecache.data.transforms import Preprocessing
from featurecache.errors import InputError

SIZE = (32, 32)
STATISTICS = {"mean": (0.5,) * 3, "std": (0.25,) * 3}


def body_of(module):
    return Body("mine", "mine:mine", module.eval().requires_grad_(False), Preprocessing(**STATISTICS))


def taps_of(body, *names):
    return resolve_taps(body, [Tap.parse(name) for name in names or ("penultimate",)], SIZE)


class Skip(nn.Module):
    """A block with a way around it; a head whose convolution also works in the stem."""

    def __init__(self, *, tied=False, branch=False):
        super().__init__()
        self.stem, self.block, self.head = (nn.Conv2d(3 if i == 0 else 4, 4, 3, padding=1) for i in range(3))
        self.tied, self.branch = tied, branch

    def forward(self, x):
        x = self.stem(x)
        if self.branch and x.sum() > 0:
            x = -x
        x = self.block(x) + x
        return (self.block if self.tied else self.head)(x)


def test_two_parts_give_what_the_whole_gives_with_the_same_parameters():
    body = body_of(tiny())
    taps = taps_of(body, "features.5:avg", "penultimate")
    upper = split_body(body, taps, "features.3", SIZE)
    assert upper.input_shape == (12, 8, 8)
    x = dummy(body, SIZE, 3)
    lower = Tapped(body, [upper.cut])(x)[0]
    for a, b in zip(Tapped(body, taps)(x), upper(lower), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    names = {id(p): name for name, p in body.module.named_parameters()}
    assert {names[id(p)] for p in upper.parameters()} == {
        "features.4.weight", "features.4.bias", "features.6.weight", "features.6.bias",
    }  # fmt: skip
    with torch.no_grad():
        body.module.features[6].bias.add_(1)
        assert not torch.allclose(upper(lower)[1], Tapped(body, taps)(dummy(body, SIZE, 1))[1])
        torch.testing.assert_close(upper(lower)[1], Tapped(body, taps)(x)[1])


@pytest.mark.parametrize(
    ("make", "module", "message"),
    [
        (Skip, "block", r"mine can't be cut there: what runs above it needs more than its output \(stem works on"),
        (lambda: Skip(tied=True), "stem", None),
        (lambda: Skip(tied=True), "block#0", "needs more than its output"),
        (tiny, "features.6", "no parameter works above it, so nothing would learn"),
        (lambda: Skip(branch=True), "stem", r"torch.fx can't follow its code \(TraceError"),
        (Skip, "head", "the tap penultimate does not lie above it. Name a module nearer"),
        (Skip, "blok", "has no module 'blok'.* Did you mean 'block'"),
        (Deceptive, "conv", "tap penultimate would be another in two parts than as a whole"),
    ],
)
def test_bodies_that_can_not_be_cut(make, module, message):
    body = body_of(make())
    taps = taps_of(body)
    if message is None:
        split_body(body, taps, module, SIZE)
        return
    with pytest.raises(InputError, match=message):
        split_body(body, taps, module, SIZE)


def test_a_module_that_works_on_both_sides_is_not_to_learn():
    class Both(Skip):
        def forward(self, x):
            return self.head(self.block(self.head(self.stem(x))))

    body = body_of(Both())
    with pytest.raises(InputError, match=r"head.bias, head.weight|head.weight, head.bias works below it as well"):
        split_body(body, taps_of(body), "block", SIZE)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "module", "shape"),
    [
        ("densenet121", "features.transition3", (512, 3, 3)), ("resnet18", "layer3.0", (256, 6, 6)),
        ("squeezenet1_1", "features.9", (384, 5, 5)), ("vit_b_32", "encoder.layers.encoder_layer_9", (10, 768)),
        ("convnext_tiny", "features.5", (384, 6, 6)), ("swin_t", "features.5", (384, 6, 6)),
    ],
)  # fmt: skip
def test_bodies_of_torchvision(name, module, shape):
    body = load_body(f"torchvision/{name}", "none", seed=0)
    size = (224, 224) if name == "vit_b_32" else (96, 96)
    shape = (50, 768) if name == "vit_b_32" else shape
    taps = resolve_taps(body, [Tap()], size)
    assert split_body(body, taps, module, size).input_shape == shape


@pytest.mark.slow
def test_the_part_above_in_timm():
    pytest.importorskip("timm")
    body = load_body("timm/resnet18", "none", seed=0)
    taps = resolve_taps(body, [Tap()], (64, 64))
    assert taps[0].on == "pre_logits"
    assert split_body(body, taps, "layer3", (64, 64)).input_shape == (256, 4, 4)


def test_a_stem_is_one_set_of_parameters():
    first, second = body_of(tiny()), body_of(tiny())
    shared = share_stem([first, second], "features.3", [SIZE, SIZE])
    assert shared == ["features.0.weight", "features.1.bias", "features.1.weight", "features.3.weight"]
    one, other = dict(first.module.named_parameters()), dict(second.module.named_parameters())
    assert {name for name in one if one[name] is other[name]} == set(shared)
    changed = tiny()
    changed.features[0].weight.data.add_(1)
    with pytest.raises(InputError, match=r"up to features\.3, mine has other layers or weights than mine"):
        share_stem([first, body_of(changed)], "features.3", [SIZE, SIZE])


def test_the_last_map_of_a_body():
    assert map_tap(body_of(tiny()), SIZE) == Tap(module="features", pool="rows")
    squeezenet = load_body("torchvision/squeezenet1_1", "none", seed=0)
    assert map_tap(squeezenet, (64, 64)) == Tap(pool="rows")
    with pytest.raises(InputError, match=r"gives no map of more than one row on 32x32 images"):
        map_tap(load_body("torchvision/squeezenet1_1", "none", seed=0), (32, 32))
