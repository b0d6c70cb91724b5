import pytest
import torch
from plugin_joint import tiny
from torch import nn

from featurecache.features.features import Block
from featurecache.joint.model import JointModel

BLOCKS = (Block("a", "penultimate@none", 0, 12, (12,)), Block("b", "penultimate@none", 12, 24, (12,)))


class Vector(nn.Module):
    """A body as the model takes it: a tuple of outputs; counts the images it sees."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(*list(tiny().children())[:-1])
        self.seen = []

    def forward(self, x):
        self.seen.append(len(x))
        return (self.net(x),)


class Remember(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(24, 2)
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        self.given = x
        return self.layer(torch.nan_to_num(x))


def make(multi="error", shared=False):
    bodies = [Vector()] if shared else [Vector(), Vector()]
    return JointModel(bodies, {"a": 0, "b": 0 if shared else 1}, BLOCKS, Remember(), multi=multi)


def images(n, seed=0):
    return torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def test_only_images_that_are_there_are_encoded():
    model, present = make(), torch.tensor([[True, True], [True, False], [True, False], [False, True]])
    a, b = images(3), images(2, 1)
    model({"a": a, "b": b}, present)
    assert [body.seen for body in model.bodies] == [[3], [2]]
    given = model.head.given
    assert given.shape == (4, 24)
    assert given.isnan().equal(~present.repeat_interleave(12, dim=1))
    torch.testing.assert_close(given[:3, :12], model.bodies[0].net(a))
    torch.testing.assert_close(given[[0, 3], 12:], model.bodies[1].net(b))


def test_a_view_without_any_image_in_the_batch_runs_no_body():
    model = make()
    logits = model({"a": images(2)}, torch.tensor([[True, False]] * 2), owner={"a": torch.arange(2)})
    assert model.bodies[1].seen == []
    assert logits.isfinite().all()
    logits.sum().backward()
    assert all(p.grad is None for p in model.bodies[1].parameters())


@pytest.mark.parametrize("multi", ["mean", "max"])
def test_several_images_of_a_view_are_joined(multi):
    model = make(multi)
    a, owner = images(3), torch.tensor([0, 0, 1])
    model({"a": a, "b": images(2, 1)}, torch.ones(2, 2, dtype=torch.bool), {"a": owner, "b": torch.arange(2)})
    each = model.bodies[0].net(a)
    first = each[:2].mean(dim=0) if multi == "mean" else each[:2].amax(dim=0)
    torch.testing.assert_close(model.head.given[:, :12], torch.stack([first, each[2]]))


def test_views_that_share_a_body_run_as_one_batch():
    model = make(shared=True)
    a, b = images(3), images(2, 1)
    model({"a": a, "b": b}, torch.tensor([[True, True], [True, False], [True, True]]))
    assert [body.seen for body in model.bodies] == [[5]]
    torch.testing.assert_close(model.head.given[:, :12], model.bodies[0].net(a))
    torch.testing.assert_close(model.head.given[[0, 2], 12:], model.bodies[0].net(b))


def test_bodies_stay_in_eval_mode_and_frozen_ones_get_no_gradient():
    model = make()
    model.train()
    assert model.head.training
    assert not any(module.training for body in model.bodies for module in body.modules())
    before = {name: t.clone() for name, t in model.bodies.state_dict().items()}
    model.frozen = True
    model({"a": images(4), "b": images(4, 1)}, torch.ones(4, 2, dtype=torch.bool)).sum().backward()
    assert all(p.grad is None for p in model.bodies.parameters())
    assert model.head.layer.weight.grad is not None
    model.frozen = False
    model({"a": images(4), "b": images(4, 1)}, torch.ones(4, 2, dtype=torch.bool)).sum().backward()
    assert all(p.grad is not None for p in model.bodies.parameters())
    assert all(torch.equal(t, before[name]) for name, t in model.bodies.state_dict().items())


def test_the_head_runs_in_float32_under_autocast():
    model = make()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model({"a": images(2), "b": images(2, 1)}, torch.ones(2, 2, dtype=torch.bool))
    assert logits.dtype == torch.float32
    assert model.head.given.dtype == torch.float32
