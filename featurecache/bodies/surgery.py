"""Changes to a body: input channels, freezing that lasts, parameter groups from input to output, folding."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from featurecache.bodies.channels import adapt_channels
from featurecache.bodies.folding import fold_batchnorm
from featurecache.errors import InputError

__all__ = ["adapt_channels", "fold_batchnorm", "freeze", "freeze_batchnorm", "parameter_groups", "unfreeze"]


def stay_in_eval(module: nn.Module, args: tuple[Any, ...]) -> None:
    """Forward pre-hook of a frozen module: undoes a `train()` that reached it from above."""
    module.training = False


def freeze(module: nn.Module) -> None:
    """Fix everything that a forward pass in training could move: no gradients, no dropout, no BatchNorm statistics.

    It lasts: when a parent is set to `train()`, each frozen module goes back to eval mode before it runs.
    """
    module.requires_grad_(False)
    _hold(module.modules())


def freeze_batchnorm(module: nn.Module) -> None:
    """Keep only the BatchNorm layers in eval mode for good; their scale and shift still learn."""
    _hold(child for child in module.modules() if isinstance(child, nn.modules.batchnorm._BatchNorm))


def unfreeze(module: nn.Module, *, batchnorm: bool = False) -> None:
    """Let the parameters learn again; BatchNorm layers stay in eval mode unless `batchnorm` is set."""
    module.requires_grad_(True)
    for child in module.modules():
        if batchnorm or not isinstance(child, nn.modules.batchnorm._BatchNorm):
            for key in [key for key, hook in child._forward_pre_hooks.items() if hook is stay_in_eval]:
                del child._forward_pre_hooks[key]


def _hold(modules: Iterator[nn.Module]) -> None:
    for child in modules:
        child.training = False
        if stay_in_eval not in child._forward_pre_hooks.values():
            child.register_forward_pre_hook(stay_in_eval)


def parameter_groups(module: nn.Module, n: int) -> list[list[nn.Parameter]]:
    """Parameters in at most `n` groups of about equally many layers, from the input to the output.

    Blocks are kept together where that is possible, so a convolution and its norm share a learning rate. Every
    parameter is in exactly one group; modules are taken to be registered in the order in which they run.

    Args:
        module: the body.
        n: how many groups; fewer come back where the body has fewer layers.

    Raises:
        InputError: n < 1.
    """
    if n < 1:
        raise InputError(f"{n} parameter groups: at least one is needed")
    units = [(module, True)]
    while len(units) < 4 * n:  # fine enough to split evenly, no finer
        at = max(range(len(units)), key=lambda i: _layers(*units[i]))
        widest = units[at][0]
        if _layers(*units[at]) < 2:
            break
        parts = [(widest, False), *((child, True) for child in widest.children())]
        units[at : at + 1] = [part for part in parts if _layers(*part)]
    groups: list[dict[nn.Parameter, None]] = [{} for _ in range(n)]
    total, done = sum(_layers(*unit) for unit in units), 0
    seen: set[nn.Parameter] = set()
    for unit in units:
        middle = done + _layers(*unit) / 2
        fresh = [p for p in unit[0].parameters(recurse=unit[1]) if p not in seen]
        groups[min(n - 1, int(middle * n / total))] |= dict.fromkeys(fresh)
        seen.update(fresh)
        done += _layers(*unit)
    return [list(group) for group in groups if group]


def _layers(module: nn.Module, recurse: bool) -> int:
    """How many modules hold parameters of their own: the module itself, and those in it if `recurse`."""
    inside = module.modules() if recurse else [module]
    return sum(1 for child in inside if any(True for _ in child.parameters(recurse=False)))
