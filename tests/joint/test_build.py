import pytest
import torch
from plugin_joint import write_samples

from featurecache.config import JointConfig, Tap
from featurecache.data.manifest import read_manifest
from featurecache.joint.build import BODY_GROUPS, make_groups, make_model, used_parameters
from featurecache.joint.start import make_blocks, set_up


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """SqueezeNet with random weights for view `a`, the tiny body tapped in the middle for view `b`."""
    path = write_samples(tmp_path_factory.mktemp("build"), 2)
    config = JointConfig(
        manifest=path, views={"a": "a", "b": "b"}, body={"a": "torchvision/squeezenet1_1", "b": "plugin_joint:tiny"},
        weights={"a": "none", "b": "DEFAULT"}, image_size={"a": 64}, target=("label",),
    )  # fmt: skip
    taps = {"a": (Tap(),), "b": (Tap.parse("features.4:avg"),)}
    setups = set_up(config, read_manifest(config).views, taps=taps, seed=0)
    model = make_model(setups, make_blocks(setups), torch.nn.Linear(524, 2), multi="error")
    return setups, model


def test_parameters_behind_the_last_tap_are_not_trained(built):
    setups, model = built
    used = used_parameters(model, setups)
    names = {name for name, p in model.bodies[0].module.named_parameters() if id(p) in used}
    assert names == {name for name, _ in model.bodies[0].module.named_parameters() if not name.startswith("classifier")}
    tiny = {name for name, p in model.bodies[1].module.named_parameters() if id(p) in used}
    assert tiny == {
        f"features.{i}.{kind}"
        for i, kind in ((0, "weight"), (1, "weight"), (1, "bias"), (3, "weight"), (4, "weight"), (4, "bias"))
    }
    assert not any(p.requires_grad for p in model.bodies.parameters())


def test_rates_rise_from_the_input_to_the_head(built):
    setups, model = built
    groups = make_groups(model, setups, lr=1e-2, body_lr=1e-5)
    assert [name for name, _, _ in groups.bodies] == [f"bodies.{i}" for i in range(BODY_GROUPS)]
    assert [rate for _, _, rate in groups.bodies] == pytest.approx([1e-5, 1e-4, 1e-3])
    assert [(name, rate) for name, _, rate in groups.head] == [("head", 1e-2)]
    low = {id(p) for p in groups.bodies[0][1]}
    assert id(model.bodies[0].module.features[0].weight) in low
    assert id(model.bodies[1].module.features[0].weight) in low
    every = [id(p) for _, parameters, _ in groups.bodies for p in parameters]
    assert len(every) == len(set(every)) == len(used_parameters(model, setups))
