import pytest
import torch

from featurecache.errors import InputError
from featurecache.features import Block
from featurecache.fusion import Concat, drop_views, fusion_names, get_fusion

BLOCKS = (Block("front", "a", 0, 3, (3,)), Block("side", "a", 3, 5, (2,)), Block("side", "b", 5, 6, (1,)))
EQUAL = (Block("front", "a", 0, 3, (3,)), Block("side", "a", 3, 6, (3,)))
PRESENT = torch.tensor([[True, True], [True, False], [False, True], [False, False]])


def views():
    torch.manual_seed(0)
    return [torch.randn(4, 3, requires_grad=True), torch.randn(4, 3, requires_grad=True)]


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


@pytest.mark.parametrize("name", fusion_names())
def test_gradients_are_finite_whatever_absent_rows_hold(name):
    front, side = views()
    with torch.no_grad():
        side[1] = torch.inf
        front[3] = torch.nan
    fused = get_fusion(name)(EQUAL)([front, side], PRESENT)
    fused.nan_to_num().square().sum().backward()
    assert front.grad.isfinite().all()
    assert side.grad.isfinite().all()
    assert (side.grad[1] == 0).all()
    assert (front.grad[3] == 0).all()


def test_widths_that_do_not_fit():
    blocks = (Block("front", "a", 0, 3, (3,)), Block("side", "a", 3, 5, (2,)))
    with pytest.raises(
        InputError, match=r"fusion 'mean' needs views of one width, found front: 3, side: 2\. Use 'concat'\."
    ):
        get_fusion("mean")(blocks)
    torn = (Block("front", "a", 0, 1, (1,)), Block("side", "a", 1, 2, (1,)), Block("front", "b", 2, 3, (1,)))
    with pytest.raises(InputError, match="the columns of view 'front' are not contiguous"):
        Concat(torn)


def test_an_unknown_fusion_says_the_nearest():
    with pytest.raises(
        InputError, match=r"unknown fusion 'conct'\. Did you mean 'concat'\? Known: concat, mean, max\."
    ):
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
