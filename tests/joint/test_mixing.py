import numpy as np
import pytest
import torch

from featurecache.joint.images import Batch
from featurecache.joint.mixing import mix


def batch_of(dtype=torch.float32):
    """Four samples; the third has two images of view a, the second no view b. A pixel holds its image's number."""
    owner = {"a": torch.tensor([0, 1, 2, 2, 3]), "b": torch.tensor([0, 2, 3])}
    numbers = {"a": [0, 10, 20, 21, 30], "b": [100, 120, 130]}
    images = {
        view: torch.tensor(values, dtype=dtype)[:, None, None, None].expand(-1, 3, 8, 6).contiguous()
        for view, values in numbers.items()
    }
    present = torch.tensor([[True, True], [True, False], [True, True], [True, True]])
    return Batch(np.arange(4), present, images, owner, ())


def expected_partners(partner):
    a = {0: [0], 1: [10], 2: [20, 21], 3: [30]}
    b = {0: 100, 2: 120, 3: 130}
    of_a = [a[int(partner[i])][k % len(a[int(partner[i])])] for i in a for k in range(len(a[i]))]
    of_b = [b.get(int(partner[i]), b[i]) for i in b]
    return of_a, of_b


@pytest.mark.parametrize("seed", range(6))
def test_mixup_takes_all_views_from_the_same_other_sample(seed):
    batch = batch_of()
    found = mix(batch, ["mixup"], np.random.default_rng(seed))
    assert sorted(found.partner) == [0, 1, 2, 3]
    for view, others in zip("ab", expected_partners(found.partner), strict=True):
        mine = batch.images[view][:, 0, 0, 0]
        blended = found.own * mine + (1 - found.own) * torch.tensor(others, dtype=torch.float32)
        torch.testing.assert_close(found.batch.images[view][:, 1, 3, 2], blended, atol=1e-4, rtol=0)
    assert found.batch.present is batch.present


@pytest.mark.parametrize("seed", range(6))
def test_cutmix_pastes_one_rectangle_into_all_views(seed):
    batch = batch_of(torch.uint8)
    found = mix(batch, ["cutmix"], np.random.default_rng(seed))
    masks = []
    for view, others in zip("ab", expected_partners(found.partner), strict=True):
        mixed, mine = found.batch.images[view], batch.images[view]
        assert mixed.dtype == torch.uint8
        theirs = torch.tensor(others, dtype=torch.uint8)[:, None, None, None]
        assert ((mixed == mine) | (mixed == theirs)).all()
        changed = (mixed != mine)[theirs[:, 0, 0, 0] != mine[:, 0, 0, 0]][:, 0]
        masks += list(changed)
    assert all(torch.equal(mask, masks[0]) for mask in masks)
    assert float(masks[0].float().mean()) == pytest.approx(1 - found.own, abs=0.2)


def test_a_draw_is_that_of_its_generator_and_bytes_become_floats():
    one, two = (mix(batch_of(torch.uint8), ["mixup", "cutmix"], np.random.default_rng(3)) for _ in range(2))
    assert torch.equal(one.batch.images["a"], two.batch.images["a"])
    blended = mix(batch_of(torch.uint8), ["mixup"], np.random.default_rng(0)).batch.images["b"]
    assert blended.dtype == torch.float32
    assert float(blended.max()) <= 130 / 255
    names = {
        mix(batch_of(torch.uint8), ["mixup", "cutmix"], np.random.default_rng(k)).batch.images["a"].dtype
        for k in range(20)
    }
    assert names == {torch.uint8, torch.float32}  # both ways are drawn
