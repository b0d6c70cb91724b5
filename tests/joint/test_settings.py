from pathlib import Path

import pytest

from featurecache.config import JointConfig
from featurecache.errors import InputError
from featurecache.joint.plan import Every
from featurecache.joint.settings import augmentations, batch_size, mixing, rates, with_defaults


def config(**changes):
    return JointConfig.create({"manifest": "m.csv", **changes})


def test_a_fitted_head_learns_more_slowly_and_needs_no_frozen_epoch():
    fresh, warm = with_defaults(config()), with_defaults(config(init=Path("runs/fc")))
    assert (fresh.lr, fresh.body_lr, fresh.freeze_epochs, fresh.view_dropout) == (1e-3, 1e-4, 1, 0.1)
    assert (warm.lr, warm.freeze_epochs, warm.view_dropout) == (3e-4, 0, 0.0)
    assert warm.body_lr == pytest.approx(3e-5)
    assert rates(config(lr=2e-3)) == (2e-3, 2e-4)
    assert rates(config(lr="find")) == (1e-3, 1e-4)
    assert rates(config(body_lr="1e-6:1e-4")) == (1e-3, (1e-6, 1e-4))
    given = config(init=Path("x"), lr=0.5, body_lr=0.25, freeze_epochs=3, view_dropout=0.2)
    assert with_defaults(given) == given


def test_what_is_augmented_is_told_per_view_and_mixing_is_for_all():
    made = config(augment={"*": ["crop", "mixup"], "b": ["colour"], "c": []})
    assert {view: own.names for view, own in augmentations(made, ("a", "b", "c")).items()} == {
        "a": ("crop",), "b": ("colour",),
    }  # fmt: skip
    assert mixing(made) == ("mixup",)
    gentle = augmentations(config(augment={"*": ["crop:0.8", "rotate:3", "cutmix"]}), ("a",))["a"]
    assert (gentle.names, gentle.area, gentle.degrees) == (("crop", "rotate"), (0.8, 1.0), 3.0)
    assert augmentations(config(augment=()), ("a",)) == {}


def test_how_often_to_save():
    assert Every.parse("200").due(400, 0.0)
    assert not Every.parse("200").due(300, 1e9)
    assert Every.parse("2m").due(1, 120.0)
    assert not Every.parse("2m").due(1, 119.0)
    assert not Every.parse("none").due(1000, 1e9)
    with pytest.raises(InputError, match="checkpoint_every='0': give steps"):
        Every.parse("0")


def test_automatic_batches_leave_eight_steps_for_all_processes_together():
    assert [batch_size(config(), n) for n in (10, 100, 1000)] == [4, 12, 32]
    assert batch_size(config(), 400, processes=2) == 25
    assert batch_size(config(batch_size=7), 400, processes=2) == 7
