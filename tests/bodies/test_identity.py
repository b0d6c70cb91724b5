import copy
import importlib
import linecache
import os
import subprocess
import sys
import types
from pathlib import Path

import plugin_bodies
import pytest
import torch
import torchvision
from torch import nn
from torch.nn.utils import parametrizations

from featurecache.bodies.identity import identify, unused_modules
from featurecache.bodies.program import sources
from featurecache.bodies.registry import Body, load_body
from featurecache.bodies.surgery import freeze
from featurecache.bodies.taps import resolve_taps
from featurecache.config import Tap
from featurecache.data.transforms import Preprocessing

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
    taps = resolve_taps(body, [Tap.parse(name) for name in names or ("penultimate",)], size)
    return identify(body, taps, size)


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


def test_only_what_runs_up_to_the_last_tap_counts():
    body = load_body("torchvision/resnet18", "none", seed=0)
    early, late = digests(body, "layer2", size=SIZE), digests(body, "layer2", "layer3", size=SIZE)
    nudge(body.module.layer3[0].conv1.weight)
    assert digests(body, "layer2", size=SIZE) == early
    assert digests(body, "layer2", "layer3", size=SIZE)[0] != late[0]
    taps = resolve_taps(body, [Tap.parse("layer2")], SIZE)
    unused = unused_modules(body, taps, SIZE)
    assert {"layer3", "layer4.1.conv2", "avgpool", "fc"} <= unused
    assert not {"", "conv1", "layer2", "layer2.1"} & unused


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


def test_training_mode_gradients_and_freezing_do_not_count(body):
    before = digests(body)
    body.module.requires_grad_(False)
    assert digests(body) == before
    freeze(body.module)
    assert digests(body) == before


def test_preprocessing_and_categories_of_a_plug_in_do_not_count():
    body = load_body("plugin_bodies:small")
    before = digests(body)
    body.module.preprocessing = {"crop": 16}
    body.module.categories = ["x"]
    assert digests(body) == before


CODE = """
import sys
from featurecache.bodies.identity import identify
from featurecache.bodies.program import sources
from featurecache.bodies.registry import load_body
from featurecache.bodies.taps import resolve_taps
from featurecache.config import Tap
for name in ("plugin_bodies:small", "torchvision/squeezenet1_1"):
    body = load_body(name, "none", seed=0)
    print(*identify(body, resolve_taps(body, [Tap()], (32, 32)), (32, 32)))
"""


def test_other_process_hash_seed_and_place_of_the_files(tmp_path):
    expected = []
    for name in ("plugin_bodies:small", "torchvision/squeezenet1_1"):
        expected += digests(load_body(name, "none", seed=0))
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
    def make(expression):
        scope = {"nn": nn, "__name__": "plugin_bodies_console"}
        text = (
            "class Typed(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
            f"        self.conv = nn.Conv2d(3, 4, 1)\n    def forward(self, x):\n        return {expression}\n"
        )
        exec(text, scope)
        torch.manual_seed(0)
        return body_of(scope["Typed"](), None)

    module = types.ModuleType("plugin_bodies_console")
    sys.modules[module.__name__] = module
    try:
        first = digests(make("self.conv(x)"))
        assert digests(make("self.conv(x)")) == first
        assert digests(make("self.conv(x) * 2"))[0] == first[0]
        assert digests(make("self.conv(x) * 2"))[1] != first[1]
        assert digests(make("self.conv(x).exp()"))[1] != first[1]
    finally:
        del sys.modules[module.__name__]
