"""What a module computes beside its tensors, as plain values: settings, source of foreign classes, hidden state.

What it leaves out of a class that has a text, `sources` covers by that text.
"""

from __future__ import annotations

import copyreg
import enum
import hashlib
import inspect
import re
import sys
import types
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from featurecache.bodies.sources import is_foreign, module_text
from featurecache.errors import InputError

# Labels, training-time and environment-dependent choices: none changes what a class of torch, torchvision or
# timm computes in inference. Any other class may use attributes of these names as it likes.
IGNORED = frozenset(
    {"training", "preprocessing", "categories", "num_classes", "pretrained_cfg", "default_cfg", "feature_info"}
    | {"fused_attn", "grad_checkpointing"}
)
_INTERNAL = frozenset(vars(nn.Module()))
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")
_DEPTH = 6  # for classes of the libraries, whose own names say most
_STRICT_DEPTH = 100
_FUNCTIONS = (types.FunctionType, classmethod, staticmethod)
_SLOTS = (types.MemberDescriptorType, types.GetSetDescriptorType)


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


def describe_module(module: nn.Module, tree: Mapping[int, str] | None = None) -> dict[str, Any]:
    """Class and settings of one module, without its children and without its stored tensors.

    Args:
        module: the module.
        tree: names of the modules of the network by `id`; where a value refers to one of them the name is enough.

    Raises:
        InputError: an attribute of a class outside torch, torchvision and timm holds what can't be told apart.
    """
    kind = type(module)
    name = f"{kind.__module__}.{kind.__qualname__}"
    tree = tree or {id(module): ""}
    found: dict[str, Any] = {"class": name, "repr": _ADDRESS.sub("", module.extra_repr())}
    foreign = is_foreign(kind.__module__)
    ignored = _INTERNAL if foreign else _INTERNAL | IGNORED
    state = {
        key: _Describer(f"{name}.{key}", tree, strict=foreign)(value)
        for key, value in _attributes(module, foreign=foreign).items()
        # None is what an absent part leaves behind, or nothing at all; it says no more than its absence.
        if value is not None and key not in ignored and (foreign or not key.startswith("_"))
    }
    hidden = {
        key: tensor_digest(value)
        for key, value in module._buffers.items()
        if value is not None and key in module._non_persistent_buffers_set
    }
    hooks = [
        _Describer(f"a hook of {name}", tree, strict=is_foreign(_module_of(hook)))(hook)
        for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
        if not _module_of(hook).startswith("featurecache")  # ours only observe
    ]
    code = _Describer(name, tree, strict=True).class_code(kind)
    graph = module.code if isinstance(module, fx.GraphModule | torch.jit.ScriptModule) else None
    for key, part in (("settings", state), ("buffers", hidden), ("hooks", hooks), ("code", code), ("graph", graph)):
        if part:
            found[key] = part
    return found


def _attributes(module: Any, *, foreign: bool) -> Mapping[str, Any]:
    """Attributes of a module, or what its class says that it consists of."""
    custom = any("__getstate__" in vars(base) for base in type(module).__mro__ if base is not object)
    state = module.__getstate__() if foreign and custom else vars(module)
    return state if isinstance(state, dict) else {"__getstate__": state}


def _module_of(hook: Any) -> str:
    return getattr(hook, "__module__", None) or type(hook).__module__


class _Describer:
    """Values as JSON. What is neither plain nor a function is described as pickle would take it apart.

    Args:
        where: the attribute, for errors.
        tree: modules of the network, by `id`.
        strict: every difference between two values must show, else InputError.
    """

    def __init__(self, where: str, tree: Mapping[int, str], *, strict: bool) -> None:
        self.where, self.tree, self.strict = where, tree, strict
        self.stack: list[int] = []
        self.seen: dict[int, Any] = {}  # functions and classes: once is enough

    def __call__(self, value: Any) -> Any:
        if isinstance(value, enum.Enum):
            return [self._class(type(value)), value.name, self(value.value)]
        if value is None or isinstance(value, bool | int | str):
            return value
        if isinstance(value, float | complex):
            return ["number", repr(value)]
        if isinstance(value, bytes | bytearray):
            return [type(value).__name__, value.hex()]
        if isinstance(value, Tensor):
            return ["tensor", tensor_digest(value)]
        if isinstance(value, torch.dtype | torch.device | np.dtype | PurePath):
            return ["path" if isinstance(value, PurePath) else "dtype or device", str(value)]
        if isinstance(value, np.ndarray | np.generic) and not value.dtype.hasobject:
            data = np.asarray(value)
            return ["array", str(data.dtype), list(data.shape), hashlib.sha256(data.tobytes()).hexdigest()]
        if isinstance(value, types.ModuleType):
            return ["python module", value.__name__]
        if isinstance(value, nn.Module) and id(value) in self.tree:
            return ["module", self.tree[id(value)]]
        if id(value) in self.stack:
            return ["cycle", len(self.stack) - self.stack.index(id(value))]
        if len(self.stack) >= (_STRICT_DEPTH if self.strict else _DEPTH):
            return self._unknown(value, "is nested too deeply")
        self.stack.append(id(value))
        try:
            return self._compound(value)
        finally:
            self.stack.pop()

    def _compound(self, value: Any) -> Any:
        if isinstance(value, type):
            return self._class(value)
        if type(value) in (dict, OrderedDict, types.MappingProxyType):
            return ["dict", *([self(key), self(item)] for key, item in value.items())]
        if isinstance(value, set | frozenset):
            return ["set", *sorted((self(item) for item in value), key=repr)]
        if type(value) in (list, tuple):
            return [type(value).__name__, *map(self, value)]
        if isinstance(value, np.ndarray):
            return ["array", *map(self, value.shape), self(value.tolist())]
        if isinstance(value, nn.Module):
            return self._module(value)
        if isinstance(value, types.CodeType):
            return self._code(value)
        if isinstance(value, types.MethodType):
            return ["method", self(value.__func__), self(value.__self__)]
        if isinstance(value, types.FunctionType):
            return self._function(value)
        if isinstance(value, staticmethod | classmethod):
            return [type(value).__name__, self(value.__func__)]
        if isinstance(value, property):
            return ["property", self(value.fget), self(value.fset)]
        if isinstance(value, torch.jit.ScriptFunction):
            return ["script", value.code]
        if callable(value) and hasattr(value, "__wrapped__"):  # functools.cache and the like
            return ["wrapped", self(value.__wrapped__)]
        if callable(value) and isinstance(getattr(value, "__name__", None), str):
            owner = getattr(value, "__self__", None)  # of a built-in method, a value; of a function, its module
            name = f"{getattr(value, '__module__', None) or ''}.{value.__name__}"
            return name if owner is None or isinstance(owner, types.ModuleType | type) else [name, self(owner)]
        return self._object(value)

    def _object(self, value: Any) -> Any:
        kind = type(value)
        try:
            parts = copyreg.dispatch_table[kind](value) if kind in copyreg.dispatch_table else value.__reduce_ex__(4)
        except Exception:  # TypeError from Python itself, anything from a class's own method
            return self._unknown(value, "can't be taken apart")
        if isinstance(parts, str):
            return [self._class(kind), parts]
        make, arguments, state, items, pairs = (*parts, None, None, None)[:5]
        if type(state) is dict:
            state = dict(sorted(state.items(), key=lambda item: str(item[0])))
        rest = (tuple(arguments), state, list(items or ()), [list(pair) for pair in pairs or ()])
        return [self._class(kind), self(make), *map(self, rest)]

    def _unknown(self, value: Any, reason: str) -> Any:
        kind = f"{type(value).__module__}.{type(value).__qualname__}"
        if not self.strict:
            return kind
        raise InputError(
            f"{self.where}: holds a {kind}, which {reason}, so that features made with one such value can't be told "
            "from those made with another. Make it a plain value (numbers, text, tensors, lists, dicts), or give its "
            "class, or the class of the nn.Module that holds it, a __getstate__ that returns what matters."
        )

    def _module(self, module: nn.Module) -> Any:
        """A module that is not part of the network's tree: all that it is."""
        outer, names = self.tree, {id(child): name for name, child in module.named_modules()}
        inner = {**{key: f"{self.where}.{name}" for key, name in names.items()}, **outer}
        parts = {name: describe_module(child, inner) for name, child in module.named_modules()}
        tensors = {name: tensor_digest(tensor) for name, tensor in sorted(module.state_dict().items())}
        return [self._class(type(module)), parts, tensors]

    def _class(self, kind: type) -> Any:
        name = f"{kind.__module__}.{kind.__qualname__}"
        if id(kind) in self.seen:
            return name
        self.seen[id(kind)] = kind
        code = self.class_code(kind)
        return [name, code] if code else name

    def class_code(self, kind: type) -> dict[str, Any]:
        """Methods and values of a class whose (Python) module has no text: typed into a notebook or a console."""
        return {
            f"{base.__module__}.{base.__qualname__}.{name}": self(value)
            for base in kind.__mro__
            if is_foreign(base.__module__) and not module_text(base.__module__)
            for name, value in sorted(vars(base).items())
            if not isinstance(value, _SLOTS)
            and name != "_abc_impl"
            and (isinstance(value, _FUNCTIONS) or not (name.startswith("__") and name.endswith("__")))
        }

    def _function(self, function: types.FunctionType) -> Any:
        defined = str(function.__globals__.get("__name__", function.__module__))  # functools.wraps changes __module__
        name = f"{defined}.{function.__code__.co_qualname}"
        if not is_foreign(defined):
            wrapped = getattr(function, "__wrapped__", None)  # torch.no_grad() around a function, for one
            return name if wrapped is None else [name, self(wrapped)]
        if id(function) in self.seen:
            return name
        self.seen[id(function)] = function
        before, self.strict = self.strict, True
        try:
            cells = [self(cell.cell_contents) for cell in function.__closure__ or () if _is_filled(cell)]
            parts = [self(part) for part in (function.__defaults__, function.__kwdefaults__)]
            return [name, self._body(function.__code__), *parts, cells, self._globals(function, defined)]
        finally:
            self.strict = before

    def _body(self, code: types.CodeType) -> Any:
        """Source where there is some; several lambdas may share their lines, so that these count by their code."""
        if code.co_name != "<lambda>":
            try:
                return inspect.getsource(code)
            except (OSError, TypeError):
                pass
        return self._code(code)

    def _code(self, code: types.CodeType) -> Any:
        """What a code object does, without file names and line numbers."""
        names = (code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars)
        return [code.co_code.hex(), [list(group) for group in names], self(code.co_consts)]

    def _globals(self, function: types.FunctionType, defined: str) -> dict[str, Any]:
        """What a function uses of a module that has no text."""
        if module_text(defined):
            return {}
        names = set(_names(function.__code__)) & function.__globals__.keys()
        return {name: self(function.__globals__[name]) for name in sorted(names)}


def _names(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)


def _is_filled(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018 - an empty cell raises
    except ValueError:
        return False
    return True
