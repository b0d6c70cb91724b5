import copy
import enum
import functools
import importlib
import json
import linecache
import operator
import os
import re
import subprocess
import sys
import threading
import types
from collections import Counter, defaultdict, deque
from datetime import timedelta
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import numpy as np
import plugin_bodies
import pytest
import torch
import torchvision
from torch import nn
from torch.nn.utils import parametrizations

from featurecache.bodies.identity import identify, unused_modules
from featurecache.bodies.program import describe_module
from featurecache.bodies.registry import Body, load_body
from featurecache.bodies.sources import sources
from featurecache.bodies.taps import resolve_taps
from featurecache.config import Tap
from featurecache.data.transforms import Preprocessing
from featurecache.errors import InputError

SIZE = (32, 32)


class Net(nn.Module):
    """One of everything that a state dict does not show."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.act = nn.ReLU()
        self.pool = nn.MaxPool2d(3)
        self.average = nn.AvgPool2d(3)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.register_buffer("table", torch.ones(8), persistent=False)
        self.window = [4, 4]
        self.scale = 1.0
        self._shift = 0
        self.never = nn.Linear(3, 3)
        self.fc = nn.Linear(8, 2)

    def forward(self, x):
        x = self.average(self.pool(self.act(self.bn(self.conv(x)))))
        x = x.flatten(2).transpose(1, 2) * self.table
        x = self.attention(x, x, x, need_weights=False)[0].mean(1) * self.scale + self._shift
        return self.fc(x)


def body_of(module, classifier="fc", size=32):
    return Body("net", "net", module.eval(), Preprocessing(crop=size, resize=size), classifier=classifier)


@pytest.fixture
def body():
    torch.manual_seed(0)
    return body_of(Net())


def digests(body, *names, size=SIZE):
    """The identity of the last of these taps."""
    taps = resolve_taps(body, [Tap.parse(name) for name in names or ("penultimate",)], size)
    return identify(body, taps, size)[-1]


@torch.no_grad()
def nudge(tensor):
    tensor.view(-1)[0] += 1e-3


def test_the_same_body_has_the_same_digests(body):
    weights, program = digests(body)
    assert (weights, program) == digests(body_of(copy.deepcopy(body.module)))
    assert len(weights) == len(program) == 64
    assert int(weights, 16) != int(program, 16)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: nudge(m.conv.weight),
        lambda m: nudge(m.conv.bias),
        lambda m: nudge(m.bn.running_mean),
        lambda m: nudge(m.bn.running_var),
        lambda m: nudge(m.attention.out_proj.weight),
        lambda m: nudge(m.attention.in_proj_weight),
        lambda m: nudge(m.never.weight),
        lambda m: m.conv.to(torch.float64) and m.conv.to(torch.float32) and nudge(m.conv.weight),
    ],
)
def test_one_tensor_changes_the_weights_alone(body, change):
    weights, program = digests(body)
    change(body.module)
    assert digests(body)[0] != weights
    assert digests(body)[1] == program


@pytest.mark.parametrize(
    "change",
    [
        lambda m: setattr(m.conv, "stride", (2, 2)),
        lambda m: setattr(m.conv, "dilation", (2, 2)),
        lambda m: setattr(m.bn, "eps", 1e-3),
        lambda m: setattr(m, "act", nn.GELU()),
        lambda m: setattr(m.pool, "ceil_mode", True),
        lambda m: setattr(m.average, "ceil_mode", True),
        lambda m: setattr(m.average, "count_include_pad", False),
        lambda m: setattr(m.attention, "num_heads", 4) or setattr(m.attention, "head_dim", 2),
        lambda m: nudge(m.table),
        lambda m: m.window.reverse() or m.window.append(5),
        lambda m: setattr(m, "scale", 2.0),
        lambda m: setattr(m, "_shift", 1),
        lambda m: setattr(m.act, "forward", lambda x: x.relu() * 2),
        lambda m: m.act.register_forward_hook(lambda module, args, output: output * 2),
        lambda m: m.conv.register_forward_pre_hook(lambda module, args: (args[0] * 2,)),
        lambda m: parametrizations.weight_norm(m.conv),
    ],
)
def test_what_a_state_dict_does_not_show_changes_the_program(body, change):
    program = digests(body)[1]
    change(body.module)
    assert digests(body)[1] != program


def test_the_unused_classifier_does_not_count(body):
    before = digests(body)
    nudge(body.module.fc.weight)
    assert digests(body) == before
    body.module.fc = nn.Linear(8, 7)
    assert digests(body) == before
    assert digests(body, "fc") != before
    logits = digests(body, "fc")
    nudge(body.module.fc.weight)
    assert digests(body, "fc")[0] != logits[0]


def test_each_tap_depends_on_what_runs_up_to_it():
    body = load_body("torchvision/resnet18", "none", seed=0)
    early, late = digests(body, "layer2"), digests(body)
    taps = resolve_taps(body, [Tap.parse("layer2"), Tap.parse("penultimate")], SIZE)
    assert identify(body, taps, SIZE) == (early, late)
    assert early.weights != late.weights
    assert early.program != late.program
    nudge(body.module.layer3[0].conv1.weight)
    changed = identify(body, taps, SIZE)
    assert changed[0] == early
    assert changed[1].weights != late.weights
    assert changed[1].program == late.program
    body.module.layer3[0].conv1.stride = (1, 1)
    body.module.layer3[0].downsample[0].stride = (1, 1)
    assert digests(body, "layer2") == early
    assert digests(body).program != late.program
    unused = unused_modules(body, taps[0], SIZE)
    assert {"layer3", "layer4.1.conv2", "avgpool", "fc"} <= unused
    assert not {"", "conv1", "layer2", "layer2.1"} & unused


def test_two_passes_tell_all():
    body = load_body("torchvision/resnet18", "none", seed=0)
    passes = []
    body.module.conv1.register_forward_hook(lambda module, args, output: passes.append(len(args[0])))
    taps = resolve_taps(body, [Tap()], SIZE)
    identify(body, taps, SIZE)
    assert passes == [2, 1]


def test_tensors_of_a_timm_body_itself_count_although_its_own_forward_is_left_out():
    body = load_body("timm/vit_tiny_patch16_224", "none", seed=0)
    size = (224, 224)
    (tap,) = resolve_taps(body, [Tap()], size)
    before = identify(body, [tap], size)
    nudge(body.module.head.weight)
    assert identify(body, [tap], size) == before
    nudge(body.module.cls_token)
    assert identify(body, [tap], size)[0].weights != before[0].weights


def test_a_classifier_whose_weight_is_used_before_counts():
    body = load_body("plugin_bodies:tied")
    body.classifier = "fc"
    before = digests(body)
    nudge(body.module.fc.weight)
    assert digests(body)[0] != before[0]


def test_a_body_that_fails_behind_its_taps_counts_as_a_whole():
    body = load_body("plugin_bodies:fragile")
    before = digests(body, "conv", size=(48, 48))
    nudge(body.module.fc.weight)
    assert digests(body, "conv", size=(48, 48))[0] != before[0]


def test_an_argument_that_leaves_torchvision_weights_alone():
    body = load_body("torchvision/googlenet", "none", seed=0)
    weights, program = digests(body, "conv3", size=(64, 64))
    body.module.transform_input = False
    assert digests(body, "conv3", size=(64, 64)) == (weights, digests(body, "conv3", size=(64, 64))[1])
    assert digests(body, "conv3", size=(64, 64))[1] != program


def test_timm_classifier_does_not_count_and_its_weights_do():
    body = load_body("timm/resnet18", "none", seed=0)
    before = digests(body, size=(64, 64))
    nudge(body.module.fc.weight)
    assert digests(body, size=(64, 64)) == before
    nudge(body.module.layer4[1].conv2.weight)
    assert digests(body, size=(64, 64))[0] != before[0]
    tagged = load_body("timm/resnet18.a1_in1k", "none", seed=0)
    assert digests(tagged, size=(64, 64)) == before


def test_whether_parameters_learn_does_not_count(body):
    before = digests(body)
    body.module.requires_grad_(False)
    assert digests(body) == before


@pytest.mark.parametrize("name", ["num_classes", "categories", "preprocessing", "feature_info", "default_cfg"])
def test_labels_count_for_classes_that_may_use_them(name):
    def program(module, value):
        setattr(module, name, value)
        return describe_module(module)

    plugin, library = load_body("plugin_bodies:small").module, torchvision.models.resnet18(weights=None)
    assert program(plugin, [1]) != program(plugin, [2])
    assert program(library, [1]) == program(library, [2])


class Slots:
    __slots__ = ("a", "unset")

    def __init__(self, a):
        self.a = a


class Plain:
    def __init__(self, a):
        self.a = a

    def method(self, x):
        return x * self.a


class Stated(Plain):
    def __init__(self, a):
        super().__init__(a)
        self.lock = threading.Lock()

    def __getstate__(self):
        return {"a": self.a}


class StatedModule(nn.Module):
    def __init__(self, a):
        super().__init__()
        self.a, self.lock = a, threading.Lock()

    def __getstate__(self):
        return {key: value for key, value in vars(self).items() if key != "lock"}


class Color(enum.Enum):
    RED = 1
    BLUE = 2


def nested(value, levels):
    for _ in range(levels):
        value = [value]
    return value


def keyed(value, *, by=1):
    return value * by


def by_default(by):
    def inner(value, *, by=by):
        return value * by

    return inner


def by_closure(by):
    def inner(value):
        return value * by

    return inner


def wrapping(by):
    @functools.wraps(keyed)
    def inner(value):
        return keyed(value) * by

    return inner


def described(value):
    """As an attribute of a class that is neither torch's, torchvision's nor timm's."""
    module = nn.Module.__new__(Empty)
    nn.Module.__init__(module)
    module.value = value
    return json.dumps(describe_module(module)["settings"])


class Empty(nn.Module):
    pass


@pytest.mark.parametrize(
    "make",
    [
        lambda n: n,
        float,
        str,
        lambda n: bytes([n]),
        lambda n: bytearray([n]),
        range,
        slice,
        lambda n: slice(0, 9, n),
        lambda n: Path("a") / str(n),
        lambda n: deque([n]),
        lambda n: deque(maxlen=n),
        lambda n: {n, "a"},
        lambda n: frozenset({n, "a", "b"}),
        lambda n: {"a": {n: 1}},
        lambda n: dict(sorted({"a": 1, "b": 2}.items(), reverse=n == 1)),  # branches may be joined in this order
        lambda n: defaultdict(list, a=n),
        lambda n: Counter({n: 1}),
        Fraction,
        Decimal,
        lambda n: timedelta(n),
        lambda n: re.compile(str(n)),
        Color,
        lambda n: torch.full((2,), n),
        lambda n: np.full(2, n),
        lambda n: np.array([None, n], dtype=object),
        np.float32,
        np.random.default_rng,
        lambda n: [torch.float32, torch.float64][n - 1],
        Slots,
        Plain,
        Stated,
        lambda n: Plain(Slots(n)).method,
        lambda n: [n].count,
        lambda n: operator.itemgetter(n),
        lambda n: functools.partial(keyed, by=n),
        lambda n: functools.cache(by_closure(n)),
        by_default,
        by_closure,
        wrapping,
        lambda n: torch.no_grad()(by_closure(n)),
        lambda n: [lambda x: x * 2, lambda x: x * 3][n - 1],
        lambda n: [lambda x: x.exp(), lambda x: x.log()][n - 1],
        lambda n: [torch.relu, torch.tanh][n - 1],
        lambda n: [nn.Conv2d(3, 3, 1, stride=n)],
        lambda n: nested(n, 30),
        lambda n: nested(Plain(n), 12),
    ],
)
def test_values_of_all_kinds_count(make):
    torch.manual_seed(0)
    first = described(make(1))
    torch.manual_seed(0)
    assert described(make(1)) == first
    torch.manual_seed(0)
    assert described(make(2)) != first
    assert "0x" not in first


def test_values_that_refer_to_themselves_or_to_the_network():
    a, b = Plain(1), Plain(1)
    a.a, b.a = [a, 1], [b, 2]
    assert described(a) != described(b)
    module = Empty()
    module.owner = Plain(module)
    assert described(module.owner) == described(module.owner)
    assert describe_module(module)["settings"]["owner"]


@pytest.mark.parametrize("value", [threading.Lock(), [Plain(threading.Lock())], (x for x in ()), nested(1, 200)])
def test_what_cannot_be_told_apart_is_refused_for_foreign_classes_alone(value):
    with pytest.raises(InputError, match=r"Empty\.value: holds a .*__getstate__ that returns what matters"):
        described(value)
    assert describe_module(StatedModule(1)) != describe_module(StatedModule(2))
    library = nn.ReLU()
    library.value = value
    assert describe_module(library)["settings"]["value"]


def test_the_graph_of_a_module_that_torch_made_counts():
    def graph(expression):
        class Traced(nn.Module):
            def forward(self, x):
                return expression(x)

        return describe_module(torch.fx.symbolic_trace(Traced()))

    assert graph(torch.exp) == graph(torch.exp)
    assert graph(torch.exp) != graph(torch.log)


CODE = """
from featurecache.bodies.identity import identify
from featurecache.bodies.registry import load_body
from featurecache.bodies.taps import resolve_taps
from featurecache.config import Tap
body = load_body("plugin_bodies:small", "none", seed=0)
print(*identify(body, resolve_taps(body, [Tap()], (32, 32)), (32, 32))[0])
"""


@pytest.mark.slow
def test_other_process_hash_seed_and_place_of_the_files(tmp_path):
    expected = list(digests(load_body("plugin_bodies:small", "none", seed=0)))
    plugins = Path(plugin_bodies.__file__).parent
    for name in ("plugin_bodies.py", "plugin_bodies_helper.py"):
        (tmp_path / name).write_text((plugins / name).read_text())
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "PYTHONHASHSEED": "5"}
    done = subprocess.run(
        [sys.executable, "-c", CODE], env=environment, cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == expected


def test_the_text_of_a_plug_in_and_of_what_it_uses_counts(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    helper, plugin = tmp_path / "plugin_bodies_tmp_helper.py", tmp_path / "plugin_bodies_tmp.py"

    def texts(helper_text, plugin_text=""):
        helper.write_text(f"def double(x):\n    return {helper_text}\n")
        plugin.write_text(f"import torch\nfrom plugin_bodies_tmp_helper import double\n{plugin_text}\n")
        for name in ("plugin_bodies_tmp", "plugin_bodies_tmp_helper"):
            sys.modules.pop(name, None)
        importlib.invalidate_caches()
        linecache.clearcache()
        return sources(["plugin_bodies_tmp"])

    first = texts("x * 2")
    assert sorted(first) == ["plugin_bodies_tmp", "plugin_bodies_tmp_helper"]
    assert texts("x * 2") == first
    assert texts("x + x") != first
    assert texts("x * 2", "# other") != first


def test_all_that_an_installed_plug_in_imports_of_its_own_counts(tmp_path, monkeypatch):
    installed = tmp_path / "site-packages"
    monkeypatch.syspath_prepend(installed)
    texts = {
        "plugin_installed/__init__.py": "",
        "plugin_installed/body.py": "import plugin_other\nfrom torch import nn\nfrom .parts.layers import SCALE\n"
        "def net():\n    from . import late\n    module = nn.Sequential(nn.Conv2d(3, 4, 1))\n    return module\n",
        "plugin_installed/late.py": "A = 1\n",
        "plugin_installed/unused.py": "A = 1\n",
        "plugin_installed/parts/__init__.py": "",
        "plugin_installed/parts/layers.py": "SCALE = 1\n",
        "plugin_other.py": "A = 1\n",
    }

    def program(**changes):
        for name, text in {**texts, **changes}.items():
            (installed / name).parent.mkdir(parents=True, exist_ok=True)
            (installed / name).write_text(text)
        for name in [name for name in sys.modules if name.startswith(("plugin_installed", "plugin_other"))]:
            sys.modules.pop(name)
        importlib.invalidate_caches()
        return digests(load_body("plugin_installed.body:net", "none", seed=0)).program

    first = program()
    assert sorted(sources(["plugin_installed.body"], ["plugin_installed.body"])) == [
        "plugin_installed", "plugin_installed.body", "plugin_installed.late", "plugin_installed.parts.layers",
    ]  # fmt: skip
    assert sorted(sources(["plugin_installed.body"])) == ["plugin_installed.body"]
    importlib.import_module("plugin_installed.unused")
    importlib.import_module("plugin_installed.late")
    assert digests(load_body("plugin_installed.body:net", "none", seed=0)).program == first
    assert program(**{"plugin_installed/parts/layers.py": "SCALE = 2\n"}) != first
    assert program(**{"plugin_installed/late.py": "A = 2\n"}) != first
    assert program(**{"plugin_installed/unused.py": "A = 2\n", "plugin_other.py": "A = 2\n"}) == first


def test_a_torchvision_architecture_made_by_a_factory_includes_the_factorys_text():
    direct = body_of(
        torchvision.models.resnet18(weights=None),
    )
    made = load_body("plugin_bodies:torchvision_resnet")
    assert digests(direct)[1] != digests(made)[1]


def test_googlenet_is_the_same_program_from_the_hub_and_from_a_file(monkeypatch):
    made = torchvision.models.googlenet(weights=None, aux_logits=True, init_weights=False)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda url, **_: made.state_dict())
    hub, none = load_body("torchvision/googlenet"), load_body("torchvision/googlenet", "none", seed=0)
    assert digests(hub, "conv3")[1] == digests(none, "conv3")[1]


def test_a_class_without_source_counts_by_its_code():
    def make(expression, extra="", scale=1):
        scope = {"nn": nn, "__name__": "plugin_bodies_console"}
        text = (
            f"SCALE = {scale}\ndef twice(x):\n    return x * 2{extra}\nclass Typed(nn.Module):\n    factor = 1\n"
            "    def __init__(self):\n        super().__init__()\n        self.conv = nn.Conv2d(3, 4, 1)\n"
            f"    def forward(self, x):\n        return {expression}\n"
        )
        exec(text, scope)
        torch.manual_seed(0)
        return body_of(scope["Typed"](), None)

    module = types.ModuleType("plugin_bodies_console")
    sys.modules[module.__name__] = module
    try:
        first = digests(make("self.conv(x)"))
        assert digests(make("self.conv(x)")) == first
        changed = [
            make("self.conv(x) * 2"), make("self.conv(x) * 3"), make("self.conv(x).exp()"),
            make("twice(self.conv(x))"), make("twice(self.conv(x))", "+ 1"), make("self.conv(x) * SCALE"),
            make("self.conv(x) * SCALE", scale=2), make("(lambda y: y * SCALE)(self.conv(x))"),
            make("(lambda y: y * SCALE)(self.conv(x))", scale=2),
        ]  # fmt: skip
        found = [first, *map(digests, changed)]
        assert {identity.weights for identity in found} == {first.weights}
        assert len({identity.program for identity in found}) == len(found)
        body = make("self.conv(x)")
        type(body.module).factor = 2
        assert digests(body).program != first.program
    finally:
        del sys.modules[module.__name__]
