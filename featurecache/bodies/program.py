"""What a module computes beside its tensors, as plain values: settings, source of foreign classes, hidden state."""

from __future__ import annotations

import enum
import functools
import hashlib
import importlib
import inspect
import re
import sys
import sysconfig
import types
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

LIBRARIES = frozenset({"torch", "torchvision", "timm", "builtins", "featurecache"})
# Labels, training-time and environment-dependent choices: none changes what a body computes in inference.
IGNORED = frozenset(
    {"training", "preprocessing", "categories", "num_classes", "pretrained_cfg", "default_cfg", "feature_info"}
    | {"fused_attn", "grad_checkpointing"}
)
_INTERNAL = frozenset(vars(nn.Module()))
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")
_DEPTH = 6


def is_foreign(module: str) -> bool:
    """Whether code of this (Python) module is not that of torch, torchvision, timm or featurecache."""
    return module.partition(".")[0] not in LIBRARIES


def tensor_digest(x: Tensor) -> str:
    """SHA-256 hex over dtype, shape and little-endian bytes in C order."""
    digest = hashlib.sha256(f"{x.dtype} {tuple(x.shape)}\n".encode())
    update_tensor(digest, x)
    return digest.hexdigest()


def update_tensor(digest: Any, x: Tensor) -> None:
    """Feed a tensor's little-endian bytes, in C order, to a hash."""
    x = x.detach().to("cpu").contiguous()
    if sys.byteorder != "little":
        data = x.view(torch.uint8).reshape(-1, x.element_size()).flip(-1).contiguous()
        digest.update(data.numpy().data)
    elif x.numel():
        digest.update(x.reshape(-1).view(torch.uint8).numpy().data)


def describe_module(module: nn.Module) -> dict[str, Any]:
    """Class and settings of one module, without its children and without its stored tensors."""
    kind = type(module)
    found: dict[str, Any] = {
        "class": f"{kind.__module__}.{kind.__qualname__}",
        "repr": _ADDRESS.sub("", module.extra_repr()),
    }
    foreign = is_foreign(kind.__module__)
    state = {
        name: describe_value(value)
        for name, value in vars(module).items()
        # None is what an absent part leaves behind, or nothing at all; it says no more than its absence.
        if value is not None and name not in _INTERNAL | IGNORED and (foreign or not name.startswith("_"))
    }
    hidden = {
        name: tensor_digest(value)
        for name, value in module._buffers.items()
        if value is not None and name in module._non_persistent_buffers_set
    }
    hooks = [
        describe_value(hook)
        for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
        if not getattr(hook, "__module__", "").startswith("featurecache")  # ours only observe, or keep modules frozen
    ]
    code = _code_digest(kind) if foreign and not _text(sys.modules.get(kind.__module__)) else None
    for name, value in (("settings", state), ("buffers", hidden), ("hooks", hooks), ("code", code)):
        if value:
            found[name] = value
    return found


def describe_value(value: Any, depth: int = 0) -> Any:
    """A value as JSON that is the same in every process: no addresses, no order of sets, no paths."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float | complex):
        return repr(value)
    if isinstance(value, Tensor):
        return ["tensor", tensor_digest(value)]
    if isinstance(value, np.ndarray):
        return ["array", str(value.dtype), list(value.shape), hashlib.sha256(value.tobytes()).hexdigest()]
    if isinstance(value, enum.Enum):
        return [type(value).__qualname__, value.name]
    if isinstance(value, torch.dtype | torch.device):
        return str(value)
    if isinstance(value, type):
        return f"{value.__module__}.{value.__qualname__}"
    if depth >= _DEPTH:
        return type(value).__qualname__
    if isinstance(value, functools.partial):
        parts = (value.func, value.args, value.keywords)
        return ["partial", *(describe_value(part, depth + 1) for part in parts)]
    if isinstance(value, Mapping):
        items = {str(key): describe_value(item, depth + 1) for key, item in value.items()}
        return dict(sorted(items.items()))
    if isinstance(value, set | frozenset):
        return sorted((describe_value(item, depth + 1) for item in value), key=repr)
    if isinstance(value, list | tuple):
        return [describe_value(item, depth + 1) for item in value]
    if isinstance(value, nn.Module):
        state = {name: tensor_digest(tensor) for name, tensor in sorted(value.state_dict().items())}
        return [f"{type(value).__module__}.{type(value).__qualname__}", _ADDRESS.sub("", repr(value)), state]
    if isinstance(value, types.FunctionType | types.MethodType):
        return _describe_function(value, depth)
    if callable(value) and hasattr(value, "__name__"):
        return f"{getattr(value, '__module__', '')}.{value.__name__}"
    kind = f"{type(value).__module__}.{type(value).__qualname__}"
    inside = vars(value) if hasattr(value, "__dict__") else {}
    return [kind, describe_value(inside, depth + 1)]


def _describe_function(function: Any, depth: int) -> Any:
    name = f"{function.__module__}.{function.__qualname__}"
    if not is_foreign(function.__module__):
        return name
    plain = inspect.unwrap(getattr(function, "__func__", function))
    try:
        source = inspect.getsource(plain)
    except (OSError, TypeError):
        source = plain.__code__.co_code.hex()
    cells = [cell.cell_contents for cell in plain.__closure__ or () if _is_filled(cell)]
    closure = [describe_value(cell, depth + 1) for cell in cells if not isinstance(cell, nn.Module)]
    return [name, source, describe_value(plain.__defaults__, depth + 1), closure]


def _is_filled(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018 - an empty cell raises
    except ValueError:
        return False
    return True


def foreign_modules(module: nn.Module) -> set[str]:
    """Python modules that define the foreign classes of a network, their bases included."""
    return {
        base.__module__ for child in module.modules() for base in type(child).__mro__ if is_foreign(base.__module__)
    }


def sources(names: Iterable[str]) -> dict[str, str]:
    """SHA-256 of the text of Python modules, and of the user's own ones that they use in turn.

    What is installed (site-packages, the standard library) is not followed, so that installing a package changes
    nothing; where a file lies does not count, its text does.
    """
    found: dict[str, str] = {}
    waiting = sorted(set(names))
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        module = sys.modules.get(name) or importlib.import_module(name)
        found[name] = hashlib.sha256(_text(module).encode()).hexdigest()
        for value in list(vars(module).values()):
            used = value.__name__ if isinstance(value, types.ModuleType) else getattr(value, "__module__", None)
            if isinstance(used, str) and used not in found and is_foreign(used) and _is_own(used):
                waiting.append(used)
    return dict(sorted(found.items()))


def _text(module: types.ModuleType | None) -> str:
    """Source text of a Python module; "" where there is none (a notebook, a console, compiled code)."""
    try:
        return inspect.getsource(module) if module is not None else ""
    except (OSError, TypeError):
        return ""


def _code_digest(kind: type) -> str:
    """SHA-256 of the bytecode of a class's methods, for classes whose module has no text: typed into a notebook."""
    digest = hashlib.sha256()
    for base in kind.__mro__:
        if is_foreign(base.__module__):
            for name, method in sorted(vars(base).items()):
                code = getattr(inspect.unwrap(method), "__code__", None) if callable(method) else None
                if code is not None:
                    digest.update(repr((name, _plain_code(code))).encode())
    return digest.hexdigest()


def _plain_code(code: types.CodeType) -> tuple[Any, ...]:
    """What a code object does, without file names and line numbers."""
    constants = [_plain_code(c) if isinstance(c, types.CodeType) else repr(c) for c in code.co_consts]
    return code.co_code, code.co_names, code.co_varnames, constants


def _is_own(name: str) -> bool:
    file = getattr(sys.modules.get(name), "__file__", None)
    if not file:
        return False
    installed = {sysconfig.get_path(key) for key in ("stdlib", "platstdlib", "purelib", "platlib")}
    path = Path(file).resolve()
    return not any(path.is_relative_to(Path(place).resolve()) for place in installed if place)
