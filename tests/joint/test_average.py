import pytest
import torch
from torch import nn

from featurecache.joint.average import Average


def test_the_average_follows_and_can_be_shown():
    layer = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        layer.weight.fill_(0.0)
    average = Average(layer, 0.5)
    for value in (1.0, 2.0):
        with torch.no_grad():
            layer.weight.fill_(value)
        average.update()
    first = 1 - 2 / 11  # the first steps keep less: (1 + 1) / (10 + 1), then (1 + 2) / (10 + 2)
    expected = first * 0.25 + 2 * 0.75
    with average.shown():
        assert float(layer.weight.detach()) == pytest.approx(expected)
    assert float(layer.weight.detach()) == 2.0


def test_what_does_not_move_stays_to_the_last_bit_and_buffers_are_averaged():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    still = model[0].weight.detach().clone()
    average = Average(model, 0.999)
    for _ in range(20):
        model[1](torch.randn(4, 4, 5, 5) + 3)
        average.update()
    tensors = average.tensors()
    assert torch.equal(tensors["0.weight"], still)
    assert 0 < float(tensors["1.running_mean"][0]) != float(model[1].running_mean[0])
    assert "1.num_batches_tracked" not in tensors
    other = Average(model, 0.999)
    other.load({name: t.clone() for name, t in tensors.items()}, average.steps)
    other.update()
    average.update()
    assert all(torch.equal(t, other.tensors()[name]) for name, t in average.tensors().items())
