"""Convolution and batch normalisation made one: the same numbers in inference, with less to compute."""

from __future__ import annotations

import copy
import warnings
from collections import Counter, OrderedDict
from collections.abc import Collection

import torch
from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def _is_timm_norm(module: nn.Module) -> bool:
    """The batch norm that applies dropout and activation too, timm's `BatchNormAct2d`."""
    return type(module).__name__ == "BatchNormAct2d" and type(module).__module__.startswith("timm.")


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return _is_timm_norm(m) or super().is_leaf_module(m, module_qualified_name)


def fold_batchnorm(module: nn.Module, keep: Collection[str] = ()) -> nn.Module:
    """A copy in eval mode whose batch norms are folded into the convolutions before them.

    A pair is folded where the convolution's output goes to that norm and nowhere else, which torch.fx tells. Names
    stay: the norm becomes an `nn.Identity` (timm's combined norm a `Sequential` of its `drop` and `act`). A body that
    torch.fx can't trace comes back as an unchanged copy.

    Args:
        module: the body; it is not changed.
        keep: dotted names of tapped modules; no pair is folded whose fusing would change what such a tap sees.
    """
    copied = copy.deepcopy(module).eval()
    for conv_name, norm_name in _pairs(copied):
        if not any(_within(conv_name, name) != _within(norm_name, name) for name in keep if name):
            _fold(copied, conv_name, norm_name)
    return copied


def _within(name: str, ancestor: str) -> bool:
    return name == ancestor or name.startswith(f"{ancestor}.")


def _pairs(module: nn.Module) -> list[tuple[str, str]]:
    """Names of (convolution, norm) that may be folded."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            graph = _Tracer().trace(module)
    except Exception:
        # Control flow on data, and whatever else a body's code does with a proxy, may raise anything. Nothing is lost:
        # without pairs the copy stays unfolded, which gives the same features, only slower. A trace that succeeds but
        # took another path is found by the engine, which compares the features and falls back to the unfolded module.
        return []
    modules = dict(module.named_modules())
    calls = Counter(str(node.target) for node in graph.nodes if node.op == "call_module")
    reads = [str(node.target) for node in graph.nodes if node.op == "get_attr"]
    names = Counter(id(child) for _, child in module.named_modules(remove_duplicate=False))
    pairs = []
    for node in graph.nodes:
        if node.op != "call_module" or not node.args or not isinstance(node.args[0], fx.Node):
            continue
        before = node.args[0]
        if before.op != "call_module" or len(before.users) != 1:
            continue
        pair = str(before.target), str(node.target)
        conv, norm = modules[pair[0]], modules[pair[1]]
        if type(conv) not in CONVOLUTIONS or not (type(norm) in NORMS or _is_timm_norm(norm)):
            continue
        plain = all(
            calls[name] == 1
            and names[id(modules[name])] == 1
            and not any(_within(read, name) for read in reads)
            and not _is_modified(modules[name])
            for name in pair
        )
        if plain and getattr(norm, "running_mean", None) is not None:
            pairs.append(pair)
    return pairs


def _is_modified(module: nn.Module) -> bool:
    hooked = module._forward_hooks or module._forward_pre_hooks
    return bool(hooked) or "forward" in vars(module) or hasattr(module, "parametrizations")


@torch.no_grad()
def _fold(module: nn.Module, conv_name: str, norm_name: str) -> None:
    conv, norm = module.get_submodule(conv_name), module.get_submodule(norm_name)
    assert isinstance(conv, CONVOLUTIONS)
    assert isinstance(norm, nn.modules.batchnorm._BatchNorm)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    conv.weight, conv.bias = fuse_conv_bn_weights(
        conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
    )
    replacement: nn.Module = nn.Identity()
    if _is_timm_norm(norm):
        parts = OrderedDict((name, norm.get_submodule(name)) for name in ("drop", "act"))
        replacement = nn.Sequential(parts)
    module.set_submodule(norm_name, replacement.eval())
