"""Changes to a body: input channels, freezing that lasts, parameter groups, folding, recomputed or compiled blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from featurecache.bodies.channels import adapt_channels
from featurecache.bodies.folding import fold_batchnorm
from featurecache.errors import InputError

__all__ = [
    "adapt_channels", "blocks", "checkpointed", "compiled", "fold_batchnorm", "freeze", "freeze_batchnorm",
    "parameter_groups", "unfreeze",
]  # fmt: skip


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


def blocks(module: nn.Module, tapped: Iterable[str] = ()) -> list[nn.Module]:
    """The parts of a body that run as a unit: containers of at least two layers, together most of the body.

    Args:
        module: the body.
        tapped: dotted names of modules whose activations are taken: none of them lies inside a block, since a hook
            there would fire again when the block is recomputed, or not at all once it is compiled.
    """
    inner = {module.get_submodule(name) for name in tapped if name}
    most = max(8, _layers(module, True) // 8)
    found: list[nn.Module] = []

    def walk(parent: nn.Module) -> None:
        for child in parent.children():
            size = _layers(child, True)
            inside = set(child.modules()) - {child}
            runs = not isinstance(child, nn.ModuleList | nn.ModuleDict)
            if runs and 2 <= size <= most and not inner & inside:
                found.append(child)
            elif size >= 2:
                walk(child)

    walk(module)
    return found


@contextmanager
def checkpointed(units: Iterable[nn.Module]) -> Iterator[None]:
    """Within it the modules keep no activations for the backward pass, but compute them anew there.

    Raises:
        InputError: while it runs: a module changes its input in place, so that it could not be computed anew.
    """
    with _replaced(units, _recomputed):
        yield


@contextmanager
def compiled(units: Iterable[nn.Module], **options: Any) -> Iterator[None]:
    """Within it the modules run through torch.compile; hooks on a module itself still fire."""
    import torch

    with _replaced(units, lambda module: torch.compile(module.forward, **options)):
        yield


@contextmanager
def _replaced(units: Iterable[nn.Module], make: Callable[[nn.Module], Callable[..., Any]]) -> Iterator[None]:
    """Within it each module's forward is what `make` gives."""
    changed = list(dict.fromkeys(units))
    for module in changed:
        module.forward = make(module)
    try:
        yield
    finally:
        for module in changed:
            del module.forward  # the class's own shows again


def _recomputed(module: nn.Module) -> Callable[..., Any]:
    from torch.utils.checkpoint import checkpoint

    forward = module.forward

    def run(*args: Any, **kwargs: Any) -> Any:
        given = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        before = [value._version for value in given]
        # Bodies run in eval mode: nothing in them draws random numbers.
        output = checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
        if [value._version for value in given] != before:
            raise InputError(
                f"--checkpoint-activations: a {type(module).__name__} of the body changes its input in place, so it "
                "can't be computed anew. Leave the option out."
            )
        return output

    return run
