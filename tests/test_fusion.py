import pytest
import torch

from featurecache.errors import InputError
from featurecache.features.features import Block
from featurecache.fusion import Concat, drop_views, fusion_names, get_fusion

BLOCKS = (Block("front", "a", 0, 3, (3,)), Block("side", "a", 3, 5, (2,)), Block("side", "b", 5, 6, (1,)))
EQUAL = (Block("front", "a", 0, 3, (3,)), Block("side", "a", 3, 6, (3,)))
MAPS = (Block("front", "m", 0, 20, (4, 5)), Block("side", "m", 20, 40, (4, 5)))
PRESENT = torch.tensor([[True, True], [True, False], [False, True], [False, False]])


def views(width=3, n=4):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(n, width, generator=generator, requires_grad=True) for _ in range(2)]


def made(name, blocks=None):
    """A fusion with random weights, and views that fit it."""
    torch.manual_seed(1)
    blocks = blocks or (MAPS if name == "spatial" else EQUAL)
    fusion = get_fusion(name)(blocks)
    for parameter in fusion.parameters():
        torch.nn.init.normal_(parameter)
    return fusion, views(blocks[0].stop)


def test_concat_leaves_nan_for_a_missing_view():
    fusion = Concat(BLOCKS)
    assert (fusion.views, fusion.widths, fusion.width, fusion.blocks) == (("front", "side"), (3, 3), 6, BLOCKS)
    front, side = views()
    fused = fusion([front, side], PRESENT)
    assert torch.equal(fused[:2, :3], front[:2])
    assert fused[2:, :3].isnan().all()
    assert fused[[1, 3], 3:].isnan().all()
    assert torch.equal(fused[[0, 2], 3:], side[[0, 2]])


@pytest.mark.parametrize("name", ["mean", "max"])
def test_pooled_over_present_views(name):
    fusion = get_fusion(name)(EQUAL)
    assert fusion.width == 3
    assert [block.to_json() for block in fusion.blocks] == [
        {"view": "front+side", "tap": name, "start": 0, "stop": 3, "shape": [3]}
    ]
    front, side = views()
    fused = fusion([front, side], PRESENT)
    both = (front + side) / 2 if name == "mean" else torch.maximum(front, side)
    torch.testing.assert_close(fused[0], both[0])
    assert torch.equal(fused[1], front[1])
    assert torch.equal(fused[2], side[2])
    assert fused[3].isnan().all()


def test_gates_start_at_the_mean_and_learn_what_to_look_at():
    fusion = get_fusion("gated")(EQUAL)
    front, side = views()
    torch.testing.assert_close(
        fusion([front, side], PRESENT)[:3], get_fusion("mean")(EQUAL)([front, side], PRESENT)[:3]
    )
    fusion([front, side], PRESENT)[0].square().sum().backward()
    assert all(gate.weight.grad.abs().sum() > 0 for gate in fusion.gates)
    fusion, _ = made("gated")
    known = torch.stack([front, side], dim=1)
    weights = fusion.weights(known, PRESENT)
    torch.testing.assert_close(weights[:3].sum(dim=1), torch.ones(3))
    assert 0.01 < weights[0, 0] < 0.99
    assert weights[1].tolist() == [1, 0]
    assert weights[2].tolist() == [0, 1]
    fused = fusion([front, side], PRESENT)
    torch.testing.assert_close(fused[0], (weights[0, :, None] * known[0]).sum(dim=0))


def test_a_pair_by_difference_and_product():
    fusion = get_fusion("difference-product")(EQUAL)
    front, side = views()
    fused = fusion([front, side], PRESENT)
    torch.testing.assert_close(fused[0], torch.cat([(front - side).abs()[0], (front * side)[0]]))
    assert torch.equal(fused[0], fusion([side, front], PRESENT)[0])
    assert fused[1:].isnan().all()
    with pytest.raises(InputError, match="'difference-product' compares two views, found 1"):
        get_fusion("difference-product")(EQUAL[:1])


def test_spatial_keeps_the_vertical_axis_that_the_views_share():
    fusion, (front, side) = made("spatial")
    both = torch.ones(4, 2, dtype=torch.bool)
    fused = fusion([front, side], both)
    assert fused.shape == (4, fusion.width) == (4, 8)
    turned = [x.unflatten(1, (4, 5)).flip(2).flatten(1) for x in (front, side)]
    rows = fusion.across.weight.shape[2:]
    assert rows == (2, 3)  # all views, three rows
    # Where one view is turned upside down and the other is not, what lay at one height does so no more.
    assert not torch.allclose(fusion([turned[0], side], both), fused, atol=1e-3)
    with torch.no_grad():  # symmetric in the rows, so turning both views changes nothing
        for layer in (fusion.across, fusion.along):
            layer.weight[..., 2] = layer.weight[..., 0]
        for norm in fusion.norms:
            norm.weight.fill_(1)
            norm.bias.fill_(0)
    torch.testing.assert_close(fusion(turned, both), fusion([front, side], both))


def test_spatial_averages_whole_maps_over_their_width():
    whole = tuple(Block(b.view, "m", 7 * b.start, 7 * b.stop, (4, 5, 7)) for b in MAPS)
    torch.manual_seed(1)
    fusion = get_fusion("spatial")(whole)
    maps = views(140)
    rows = get_fusion("spatial")(MAPS)
    rows.load_state_dict(fusion.state_dict())
    averaged = [x.unflatten(1, (4, 5, 7)).mean(dim=3).flatten(1) for x in maps]
    torch.testing.assert_close(fusion(maps, PRESENT), rows(averaged, PRESENT), equal_nan=True)


def test_a_missing_view_of_spatial_is_as_good_as_zeros():
    fusion, (front, side) = made("spatial")
    fused = fusion([front, side], PRESENT)
    assert torch.equal(fused[1], fusion([front, torch.full_like(side, 7)], PRESENT)[1])
    assert fused[:3].isfinite().all()
    assert fused[3].isnan().all()


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        (EQUAL, r"needs one map per view, \(channels, height\), found front: a \(3,\), side: a \(3,\)"),
        ((*MAPS, Block("side", "n", 40, 60, (4, 5))), "needs one map per view, .* found front: m, side: m, side: n"),
        ((MAPS[0], Block("side", "m", 20, 32, (4, 3))), r"same channels and height .* front: \(4, 5\), side: \(4, 3\)"),
    ],
)
def test_features_that_spatial_can_not_stack(blocks, message):
    with pytest.raises(InputError, match=message):
        get_fusion("spatial")(blocks)


def test_spatial_wants_rows_that_correspond():
    fusion = get_fusion("spatial")
    squash, pad, crop = ({"resize": 64, "crop": 64, "resize_mode": mode} for mode in ("squash", "pad", "crop"))
    fusion.check_preprocessing({"front": squash, "side": squash})
    fusion.check_preprocessing({"front": pad, "side": pad})
    for other in (crop, pad, {**squash, "crop": 32}):
        with pytest.raises(InputError, match="compares the views row by row, so all of them need the same image size"):
            fusion.check_preprocessing({"front": squash, "side": other})
    with pytest.raises(InputError, match=r"front: resize 64, crop 64, resize_mode crop"):
        fusion.check_preprocessing({"front": crop})
    get_fusion("mean").check_preprocessing({"front": crop, "side": squash})


@pytest.mark.parametrize("name", fusion_names())
def test_gradients_are_finite_whatever_absent_rows_hold(name):
    fusion, (front, side) = made(name)
    with torch.no_grad():
        side[1] = torch.inf
        front[3] = torch.nan
    fused = fusion([front, side], PRESENT)
    fused.nan_to_num().square().sum().backward()
    assert front.grad.isfinite().all()
    assert side.grad.isfinite().all()
    assert (side.grad[1] == 0).all()
    assert (front.grad[3] == 0).all()
    assert all(parameter.grad.isfinite().all() for parameter in fusion.parameters())


@pytest.mark.parametrize("name", fusion_names())
def test_cached_rows_are_joined_as_live_ones(name):
    fusion, (front, side) = made(name)
    there = PRESENT.repeat_interleave(front.shape[1], dim=1)
    cached = torch.where(there, torch.cat([front, side], dim=1), torch.nan)
    torch.testing.assert_close(fusion.join(cached, PRESENT), fusion([front, side], PRESENT), equal_nan=True)


def test_widths_that_do_not_fit():
    blocks = (Block("front", "a", 0, 3, (3,)), Block("side", "a", 3, 5, (2,)))
    for name in ("mean", "gated", "difference-product"):
        with pytest.raises(
            InputError, match=rf"fusion '{name}' needs views of one width, found front: 3, side: 2\. Use 'concat'\."
        ):
            get_fusion(name)(blocks)
    torn = (Block("front", "a", 0, 1, (1,)), Block("side", "a", 1, 2, (1,)), Block("front", "b", 2, 3, (1,)))
    with pytest.raises(InputError, match="the columns of view 'front' are not contiguous"):
        Concat(torn)


def test_an_unknown_fusion_says_the_nearest():
    with pytest.raises(InputError, match=r"unknown fusion 'conct'\. Did you mean 'concat'\? Known: concat, mean, max"):
        get_fusion("conct")


def test_drop_views_leaves_every_sample_a_view_that_it_has():
    present = torch.ones(2000, 3, dtype=torch.bool)
    present[:500, 0] = False
    present[500:600, 1:] = False
    present[600:610] = False
    kept = drop_views(present, 0.5, torch.Generator().manual_seed(1))
    assert not (kept & ~present).any()
    assert torch.equal(kept.any(dim=1), present.any(dim=1))
    assert kept[700:].float().mean().item() == pytest.approx(0.5, abs=0.06)
    assert torch.equal(kept, drop_views(present, 0.5, torch.Generator().manual_seed(1)))
    assert torch.equal(drop_views(present, 0.0), present)
