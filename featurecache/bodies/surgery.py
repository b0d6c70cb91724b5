"""What joint training does to a body: parameter groups, blocks that are recomputed or compiled."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from featurecache.errors import InputError


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
