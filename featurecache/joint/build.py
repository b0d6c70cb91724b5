"""Puts the network together: bodies, fusion, a fitted or fresh head, and which of their parameters learn how fast."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from featurecache.bodies.surgery import parameter_groups
from featurecache.data.targets import Target
from featurecache.errors import InputError
from featurecache.features import Block
from featurecache.fusion import Fusion, get_fusion
from featurecache.heads.fc import FCHead, FCModule, FCSettings, build_fc
from featurecache.joint.loop import Groups
from featurecache.joint.model import JointModel
from featurecache.joint.schedule import discriminative
from featurecache.viewsetup import ViewSetup

BODY_GROUPS = 3  # fastai's number: what is near the input, the middle, and what is near the head


def make_model(setups: Mapping[str, ViewSetup], fusion: Fusion, head: nn.Module, *, multi: str) -> JointModel:
    """The network; views whose setups hold the same body share it."""
    bodies: list[nn.Module] = []
    index: dict[int, int] = {}
    body_of: dict[str, int] = {}
    for view, setup in setups.items():
        if id(setup.body) not in index:
            index[id(setup.body)] = len(bodies)
            bodies.append(setup.tapped())
        body_of[view] = index[id(setup.body)]
    model = JointModel(bodies, body_of, fusion, head, multi=multi)
    model.bodies.to(memory_format=torch.channels_last)
    return model


def make_head(
    fitted: FCHead | None,
    fusion: Fusion,
    target: Target,
    settings: FCSettings,
    *,
    missing: bool,
    view_dropout: float,
    seed: int,
) -> FCModule:
    """The head's module: the fitted one's weights, or random ones.

    Args:
        fitted: what to start from.
        fusion: what the head takes.
        target: of the training rows.
        settings: of the head.
        missing: whether a training sample lacks a view.
        view_dropout: hides views while training, so that the indicators learn.
        seed: of random weights.
    """
    indicators = len(fusion.views) > 1 and (missing or view_dropout > 0)
    if fitted is None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return build_fc(fusion.blocks, target, settings, indicators=indicators or missing)
    module = FCModule(fusion.blocks, len(fitted.outputs), settings, indicators=fitted.module.indicators or indicators)
    state = dict(fitted.module.state_dict())
    if module.indicators and not fitted.module.indicators:
        # Indicators that the head did not need so far start without influence: its predictions stay what they were.
        extra = len(fusion.views)
        for name, new in module.state_dict().items():
            old = state.get(name)
            if old is not None and old.ndim == 2 and old.shape[1] + extra == new.shape[1]:
                state[name] = torch.cat([old, old.new_zeros(len(old), extra)], dim=1)
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise InputError(f"the settings given don't fit the head that training starts from: {reason}") from None
    return module


def make_fusion(name: str, blocks: Sequence[Block]) -> Fusion:
    """The fusion of that name over the columns of the views."""
    return get_fusion(name)(blocks)


def used_parameters(model: JointModel, setups: Mapping[str, ViewSetup]) -> set[int]:
    """Ids of the parameters of the bodies that the taps depend on, so not of a classifier behind the last tap."""
    used: set[int] = set()
    for view, setup in setups.items():
        body = model.bodies[model.body_of[view]]
        parameters = list(body.parameters())
        asked = [parameter.requires_grad for parameter in parameters]
        body.requires_grad_(True)
        image = torch.zeros(1, setup.preprocessing.channels, *setup.size)
        outputs = body(image)
        found = torch.autograd.grad(sum(output.sum() for output in outputs), parameters, allow_unused=True)
        used |= {id(p) for p, gradient in zip(parameters, found, strict=True) if gradient is not None}
        for parameter, flag in zip(parameters, asked, strict=True):
            parameter.requires_grad_(flag)
    return used


def make_groups(model: JointModel, setups: Mapping[str, ViewSetup], *, lr: float, body_lr: float) -> Groups:
    """Head at `lr`; the bodies in groups whose rates rise geometrically from `body_lr` at the input towards `lr`."""
    used = used_parameters(model, setups)
    parts: list[list[nn.Parameter]] = [[] for _ in range(BODY_GROUPS)]
    for body in {id(setup.body): setup.body for setup in setups.values()}.values():
        groups = parameter_groups(body.module, BODY_GROUPS)
        groups = [kept for group in groups if (kept := [p for p in group if id(p) in used])]
        for i, group in enumerate(groups):
            parts[i] += group
    rates = discriminative(body_lr, lr, BODY_GROUPS)
    bodies = [(f"bodies.{i}", part, rate) for i, (part, rate) in enumerate(zip(parts, rates, strict=True)) if part]
    return Groups([("head", list(model.head.parameters()), lr)], bodies)
