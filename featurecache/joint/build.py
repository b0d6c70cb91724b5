"""Puts the network together: bodies, a fitted or fresh head, and which of their parameters learn how fast."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from types import MappingProxyType

import torch
from torch import nn

from featurecache.bodies.split import Upper
from featurecache.bodies.surgery import blocks as inner_blocks
from featurecache.bodies.surgery import checkpointed, compiled, parameter_groups
from featurecache.bodies.tapped import Tapped
from featurecache.data.targets import Target
from featurecache.errors import InputError
from featurecache.features.features import Block, views_of
from featurecache.heads.fc import FCHead, FCModule, FCSettings, build_fc
from featurecache.joint.model import JointModel
from featurecache.joint.plan import Groups
from featurecache.joint.schedule import body_rates
from featurecache.stageone.viewsetup import ViewSetup

BODY_GROUPS = 3  # fastai's number: what is near the input, the middle, and what is near the head


def make_model(
    setups: Mapping[str, ViewSetup],
    blocks: Sequence[Block],
    head: nn.Module,
    *,
    multi: str,
    uppers: Mapping[str, Upper] = MappingProxyType({}),
    layout: torch.memory_format = torch.channels_last,
) -> JointModel:
    """The network; views whose setups hold the same body share it.

    Args:
        setups: of the views.
        blocks: the columns that their taps fill.
        head: takes these columns.
        multi: how several images of a view are joined.
        uppers: per view what stands in for its body where activations are given instead of images.
        layout: in which the bodies take them.
    """
    bodies: list[nn.Module] = []
    index: dict[int, int] = {}
    body_of: dict[str, int] = {}
    for view, setup in setups.items():
        if id(setup.body) not in index:
            index[id(setup.body)] = len(bodies)
            bodies.append(uppers[view] if view in uppers else setup.tapped())
        body_of[view] = index[id(setup.body)]
    return JointModel(bodies, body_of, blocks, head, multi=multi, layout=layout)


def make_head(
    fitted: FCHead | None,
    blocks: Sequence[Block],
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
        blocks: the columns that the head takes.
        target: of the training rows.
        settings: of the head.
        missing: whether a training sample lacks a view.
        view_dropout: hides views while training, so that the indicators learn.
        seed: of random weights.
    """
    indicators = len(views_of(tuple(blocks))) > 1 and (missing or view_dropout > 0)
    if fitted is None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return build_fc(blocks, target, settings, indicators=indicators or missing)
    module = FCModule(blocks, len(fitted.outputs), settings, indicators=fitted.module.indicators or indicators)
    state = dict(fitted.module.state_dict())
    if module.indicators and not fitted.module.indicators:
        # Indicators that the head did not need so far start without influence: its predictions stay what they were.
        extra = len(views_of(tuple(blocks)))
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


def used_parameters(model: JointModel, setups: Mapping[str, ViewSetup]) -> set[int]:
    """Ids of the parameters of the bodies that the taps depend on, so not of a classifier behind the last tap."""
    used: set[int] = set()
    for view, setup in setups.items():
        body = model.bodies[model.body_of[view]]
        parameters = list(body.parameters())
        asked = [parameter.requires_grad for parameter in parameters]
        body.requires_grad_(True)
        shape = body.input_shape if isinstance(body, Upper) else (setup.preprocessing.channels, *setup.size)
        outputs = body(torch.zeros(1, *shape))
        found = torch.autograd.grad(sum(output.sum() for output in outputs), parameters, allow_unused=True)
        used |= {id(p) for p, gradient in zip(parameters, found, strict=True) if gradient is not None}
        for parameter, flag in zip(parameters, asked, strict=True):
            parameter.requires_grad_(flag)
    return used


def make_groups(
    model: JointModel, setups: Mapping[str, ViewSetup], *, lr: float, body_lr: float | tuple[float, float]
) -> Groups:
    """Head at `lr`; the bodies in groups whose rates rise geometrically from `body_lr` at the input towards `lr`.

    Each parameter is in one group, also where bodies share it, or where only what lies above a module learns.
    """
    used = used_parameters(model, setups)
    parts: list[dict[nn.Parameter, None]] = [{} for _ in range(BODY_GROUPS)]
    taken: set[nn.Parameter] = set()  # by an earlier body that shares them
    for body in model.bodies:
        groups = parameter_groups(body, BODY_GROUPS)
        groups = [kept for group in groups if (kept := [p for p in group if id(p) in used])]
        for i, group in enumerate(groups):
            parts[i] |= dict.fromkeys(p for p in group if p not in taken)
        taken.update(p for group in groups for p in group)
    rates = body_rates(body_lr, lr, BODY_GROUPS)
    bodies = [(f"bodies.{i}", [*part], rate) for i, (part, rate) in enumerate(zip(parts, rates, strict=True)) if part]
    return Groups([("head", list(model.head.parameters()), lr)], bodies)


@contextmanager
def rebuilt(model: JointModel, *, recompute: bool, compiles: bool) -> Iterator[None]:
    """Within it the blocks of the bodies are recomputed in the backward pass, or run through torch.compile.

    Raises:
        InputError: a body has no blocks.
    """
    units: list[nn.Module] = []
    for body in model.bodies if recompute or compiles else ():
        taps = [f"module.{tap.module}".rstrip(".") for tap in body.taps] if isinstance(body, Tapped) else []
        found = inner_blocks(body, taps)
        if not found:
            option = "--checkpoint-activations" if recompute else "--compile"
            raise InputError(f"{option}: the body has no blocks of several layers that run as one. Leave it out.")
        units += found
    with ExitStack() as stack:
        if compiles:
            stack.enter_context(compiled(units))
        if recompute:
            stack.enter_context(checkpointed(units))
        yield
