import pytest
import torch
import torchvision
from torch import nn

from featurecache.bodies.channels import adapt_channels, adapt_statistics
from featurecache.bodies.registry import load_body
from featurecache.bodies.surgery import blocks, checkpointed, compiled, parameter_groups
from featurecache.errors import InputError


@pytest.fixture
def resnet():
    torch.manual_seed(0)
    return torchvision.models.resnet18(weights=None)


def test_a_grey_image_gives_what_its_rgb_copy_gave(resnet):
    x = torch.rand(2, 1, 32, 32)
    expected = resnet.eval()(x.expand(-1, 3, -1, -1))
    adapt_channels(resnet, 1)
    assert resnet.conv1.in_channels == 1
    assert torch.allclose(resnet(x), expected, atol=1e-5)


def test_more_channels_keep_the_size_of_activations(resnet):
    weight = resnet.conv1.weight.detach().clone()
    x = torch.rand(2, 3, 32, 32)
    expected = resnet.eval().conv1(x)
    adapt_channels(resnet, 6)
    assert resnet.conv1.weight.shape == (64, 6, 7, 7)
    assert torch.allclose(resnet.conv1(torch.cat([x, x], 1)), expected, atol=1e-5)
    assert torch.allclose(resnet.conv1.weight[:, 4], weight[:, 1] / 2)


def test_the_right_number_changes_nothing(resnet):
    before = resnet.conv1.weight
    adapt_channels(resnet, 3)
    assert resnet.conv1.weight is before


def test_channels_that_can_not_be_adapted(resnet):
    with pytest.raises(InputError, match="channels=0: a body needs at least one"):
        adapt_channels(resnet, 0)
    with pytest.raises(InputError, match="Linear has no convolution"):
        adapt_channels(nn.Linear(3, 3), 1)
    with pytest.raises(
        InputError, match=r"the first convolution '' is grouped .groups=3., so 3 input channels can't be"
    ):
        adapt_channels(nn.Conv2d(3, 3, 1, groups=3), 4)


def test_statistics():
    assert adapt_statistics((1.0, 2.0, 3.0), 1) == (2.0,)
    assert adapt_statistics((1.0, 2.0, 3.0), 5) == (1.0, 2.0, 3.0, 1.0, 2.0)
    assert adapt_statistics((1.0, 2.0, 3.0), 3) == (1.0, 2.0, 3.0)


def test_groups_go_from_input_to_output_and_hold_everything_once(resnet):
    names = {id(parameter): name for name, parameter in resnet.named_parameters()}
    groups = [[names[id(parameter)] for parameter in group] for group in parameter_groups(resnet, 3)]
    assert sorted(name for group in groups for name in group) == sorted(names.values())
    assert groups[0][0] == "conv1.weight"
    assert "bn1.weight" in groups[0]
    assert "fc.bias" in groups[-1]
    assert {name.partition(".")[0] for name in groups[-1]} <= {"layer3", "layer4", "fc"}
    assert len({name.rpartition(".")[0] for name in groups[0]}) == pytest.approx(14, abs=4)


@pytest.mark.parametrize("name", ["torchvision/squeezenet1_1", "timm/convnext_atto", "plugin_bodies:small"])
def test_groups_of_other_bodies(name):
    module = load_body(name, "none", seed=0).module
    groups = parameter_groups(module, 4)
    assert len(groups) == 4
    assert sum(len(group) for group in groups) == len(list(module.parameters()))


def test_few_layers_give_few_groups():
    assert len(parameter_groups(nn.Linear(2, 2), 5)) == 1
    few = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 4))
    assert [len(group) for group in parameter_groups(few, 1)] == [6]
    with pytest.raises(InputError, match="0 parameter groups"):
        parameter_groups(few, 0)


def test_blocks_cover_most_of_a_body_and_hold_no_tap(resnet):
    found = blocks(resnet)
    assert len(found) == len(set(found)) >= 6
    inside = {p for unit in found for p in unit.parameters()}
    assert sum(p.numel() for p in inside) > 0.9 * sum(p.numel() for p in resnet.parameters())
    tapped = blocks(resnet, ["layer4.0.conv2"])
    assert resnet.layer4[0] in found
    assert resnet.layer4[0] not in tapped
    assert resnet.layer4[1] in tapped
    assert resnet.layer4[0] in blocks(resnet, ["layer4.0", ""])  # hooks on the block itself fire outside of it


def test_recomputed_blocks_keep_fewer_activations_and_give_the_same_gradients(resnet):
    resnet.eval()
    x = torch.rand(2, 3, 64, 64)

    def run():
        resnet.zero_grad()
        kept = 0

        def count(tensor):
            nonlocal kept
            kept += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            resnet(x).square().sum().backward()
        return kept, [p.grad.clone() for p in resnet.parameters()]

    most, expected = run()
    with checkpointed(blocks(resnet)):
        fewer, found = run()
    assert fewer < 0.5 * most
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert "forward" not in vars(resnet.layer1)
    assert run()[0] == most


def test_a_block_that_changes_its_input_is_refused():
    unit = nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1))
    with checkpointed([unit]), pytest.raises(InputError, match="a Sequential of the body changes its input in place"):
        unit(torch.randn(1, 3, 4, 4))


@pytest.mark.slow
def test_compiled_blocks_give_the_same_and_hooks_on_them_fire():
    torch.manual_seed(0)
    body = nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)), nn.Flatten())
    x = torch.rand(2, 3, 8, 8)
    expected = body(x)
    seen = []
    with compiled(blocks(body), backend="aot_eager"):
        torch.testing.assert_close(body(x), expected)
        handle = body[0].register_forward_hook(lambda module, args, output: seen.append(output.shape))
        body(x)
        handle.remove()
    assert seen == [(2, 4, 4, 4)]
    assert "forward" not in vars(body[0])
    assert torch.equal(body(x), expected)
