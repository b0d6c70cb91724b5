import pytest
import torch
from torch import nn

from featurecache.joint.schedule import (
    Phase,
    body_rates,
    load_optimizer_tensors,
    make_optimizer,
    make_phases,
    one_cycle,
    optimizer_tensors,
    set_rates,
)


def test_phases_without_epochs_are_left_out():
    assert make_phases(2, 3) == (Phase("frozen", 1, 2), Phase("unfrozen", 3, 3))
    assert make_phases(0, 3) == (Phase("unfrozen", 1, 3),)
    assert make_phases(1, 0) == (Phase("frozen", 1, 1),)
    assert make_phases(1, 1)[0].frozen
    assert not make_phases(1, 1)[1].frozen
    assert make_phases(1, 1)[1].last == 2


@pytest.mark.parametrize(
    ("epochs", "depths"), [(1, [3]), (2, [2, 3]), (5, [1, 2, 3, 3, 3]), (8, [1, 1, 2, 2, 3, 3, 3, 3])]
)
def test_gradual_unfreezing_begins_at_the_top_and_has_come_to_the_input_by_half(epochs, depths):
    frozen, phase = make_phases(1, epochs, gradual=True)
    assert [phase.depth(epoch, 3) for epoch in range(2, epochs + 2)] == depths
    assert frozen.depth(1, 3) == 0
    assert {make_phases(0, epochs)[0].depth(epoch, 3) for epoch in range(1, epochs + 1)} == {3}
    assert phase.depth(2, 1) == 1


def test_a_loss_means_something_past_the_peak_and_once_all_learn():
    assert make_phases(2, 8)[1].settled(3, 0.25) == 4
    assert make_phases(2, 8, gradual=True)[1].settled(3, 0.25) == 7
    assert make_phases(2, 8)[0].settled(3, 0.0) == 1


def test_one_cycle_rises_to_the_peak_and_falls_while_momentum_does_the_opposite():
    rates, momenta = zip(*(one_cycle(step, 101) for step in range(101)), strict=True)
    assert rates[0] == pytest.approx(1 / 25)
    assert max(rates) == rates[25] == pytest.approx(1.0)
    assert rates[-1] == pytest.approx(1e-5)
    assert list(rates[:26]) == sorted(rates[:26])
    assert list(rates[25:]) == sorted(rates[25:], reverse=True)
    assert momenta[0] == pytest.approx(0.95)
    assert min(momenta) == momenta[25] == pytest.approx(0.85)
    assert one_cycle(0, 1)[0] <= 1


def test_the_part_in_which_rates_rise_can_be_chosen():
    rates = [one_cycle(step, 101, 0.5)[0] for step in range(101)]
    assert max(rates) == rates[50] == pytest.approx(1.0)
    assert one_cycle(0, 101, 0.0) == (1.0, 0.85)


def test_rates_of_the_bodies_rise_geometrically():
    assert body_rates(1e-5, 1e-2, 3) == pytest.approx([1e-5, 1e-4, 1e-3])
    assert body_rates((1e-6, 1e-4), 1e-2, 3) == pytest.approx([1e-6, 1e-5, 1e-4])
    assert body_rates((1e-6, 1e-4), 1e-2, 1) == pytest.approx([1e-4])


def model_and_optimizer():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2))
    model = model.to(memory_format=torch.channels_last)
    groups = [
        ("low", list(model[0].parameters()) + list(model[1].parameters()), 1e-3),
        ("head", model[4].parameters(), 1e-2),
    ]
    return model, make_optimizer(model, groups, weight_decay=0.1)


def test_norms_and_biases_are_not_decayed():
    model, optimizer = model_and_optimizer()
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert {name: decay[id(p)] for name, p in model.named_parameters()} == {
        "0.weight": 0.1, "0.bias": 0.0, "1.weight": 0.0, "1.bias": 0.0, "4.weight": 0.1, "4.bias": 0.0,
    }  # fmt: skip
    assert set_rates(optimizer, 0.5, 0.9) == pytest.approx(5e-3)
    assert {group["betas"] for group in optimizer.param_groups} == {(0.9, 0.99)}
    assert {group["name"]: group["lr"] for group in optimizer.param_groups} == pytest.approx(
        {"low": 5e-4, "low:plain": 5e-4, "head": 5e-3, "head:plain": 5e-3}
    )


def test_a_parameter_named_twice_is_in_the_first_group_only():
    layer = nn.Linear(2, 2)
    optimizer = make_optimizer(
        layer, [("x", layer.parameters(), 1e-3), ("y", layer.parameters(), 1e-2)], weight_decay=0.0
    )
    assert [group["name"] for group in optimizer.param_groups] == ["x", "x:plain"]


def test_an_optimiser_restored_from_its_tensors_goes_on_bitwise():
    def steps(model, optimizer, n, start):
        for k in range(n):
            torch.manual_seed(start + k)
            optimizer.zero_grad()
            model(torch.randn(4, 3, 4, 4)).square().sum().backward()
            set_rates(optimizer, *one_cycle(start + k, 10))
            optimizer.step()

    model, optimizer = model_and_optimizer()
    steps(model, optimizer, 3, 0)
    names = {id(p): name for name, p in model.named_parameters()}
    saved = {name: tensor.contiguous().clone() for name, tensor in optimizer_tensors(optimizer, names).items()}
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    steps(model, optimizer, 3, 3)

    other, fresh = model_and_optimizer()
    other.load_state_dict(state)
    load_optimizer_tensors(fresh, {id(p): name for name, p in other.named_parameters()}, saved)
    moment = fresh.state[other[0].weight]["exp_avg"]
    assert moment.is_contiguous(memory_format=torch.channels_last)
    steps(other, fresh, 3, 3)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name
