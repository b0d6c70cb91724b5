"""Taps as the user writes them, looked up in a body: one trial pass tells names, calls, shapes and poolings."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from featurecache.bodies.pooling import choose_pooling
from featurecache.bodies.registry import Body
from featurecache.bodies.tapped import BODY, INPUT, OUTPUT, PRE_LOGITS, ResolvedTap, Tapped, as_tensor, first_input
from featurecache.config import Tap
from featurecache.errors import InputError, did_you_mean

__all__ = ["ModuleInfo", "ResolvedTap", "Tapped", "describe", "dummy", "map_tap", "resolve_taps"]

PENULTIMATE = "penultimate"
BATCH = 2  # of the trial pass, so that a first dimension that is not the batch shows


class ModuleInfo(NamedTuple):
    """One line of `featurecache bodies show`.

    `shape` is that of one sample's output, None where the module gives no single tensor; `calls` how often it runs.
    """

    name: str
    type: str
    shape: tuple[int, ...] | None
    calls: int
    penultimate: bool


class _Seen(NamedTuple):
    """What a module took or gave in one call, and how many modules had been entered by then."""

    value: Any
    entered: int


class _Trial:
    """One full pass over random pixels: which modules ran, in which order, and what went in and out (shapes only)."""

    def __init__(self, body: Body, size: tuple[int, int]) -> None:
        self.body, self.size = body, size
        self.names = {id(child): name for name, child in body.module.named_modules()}
        self.order: dict[str, None] = {}
        self.inputs: dict[str, list[_Seen]] = {}
        self.outputs: dict[str, list[_Seen]] = {}
        self.result: Any = None
        self.failure = ""
        self.x = dummy(body, size, BATCH)
        handles = [
            handle
            for name, child in body.module.named_modules()
            for handle in (
                child.register_forward_pre_hook(self._enter(name), with_kwargs=True),
                child.register_forward_hook(self._leave(name)),
            )
        ]
        try:
            with torch.no_grad():
                self.result = _shadow(body.module(self.x))
        except Exception as error:  # a body may fail behind the last tap; whether it matters is decided per tap
            self.failure = f"{type(error).__name__}: {error}".split("\n")[0]
        finally:
            for handle in handles:
                handle.remove()

    def pre_logits(self) -> tuple[Any, set[str]]:
        """What timm's head gives without its classifier, and the modules entered for it."""
        timm: Any = self.body.module
        entered: set[str] = set()

        def note(module: nn.Module, args: Any) -> None:
            entered.add(self.names[id(module)])

        handles = [child.register_forward_pre_hook(note) for child in timm.modules()]
        try:
            with torch.no_grad():
                return _shadow(timm.forward_head(timm.forward_features(self.x), pre_logits=True)), entered
        finally:
            for handle in handles:
                handle.remove()

    def behind(self, needed: Collection[str]) -> frozenset[str]:
        """The modules that only the full pass enters; none where it failed, since nothing then shows what it enters."""
        return frozenset() if self.failure else frozenset(self.order.keys() - set(needed))

    def _enter(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            self.inputs.setdefault(name, []).append(_Seen(_shadow(first_input(args, kwargs)), len(self.order)))
            self.order.setdefault(name)

        return hook

    def _leave(self, name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            self.outputs.setdefault(name, []).append(_Seen(_shadow(output), len(self.order)))

        return hook

    def call(self, tap: str, name: str, on: str, call: int | None) -> tuple[Any, int, frozenset[str]]:
        """What a module took or gave in one of its calls, which call that is, and the modules behind it."""
        values = (self.inputs if on == INPUT else self.outputs).get(name, [])
        if not values:
            self.refuse(f"tap {tap!r}: module {name!r} never ran in the forward pass", name, self.outputs)
        if call is None and len(values) > 1:
            raise InputError(
                f"tap {tap!r}: module {name!r} runs {len(values)} times in one pass; say which call: "
                f"{name}#0 to {name}#{len(values) - 1}"
            )
        index = call or 0
        if index >= len(values):
            raise InputError(
                f"tap {tap!r}: module {name!r} runs {len(values)} times, so the last is {name}#{len(values) - 1}"
            )
        seen = values[index]
        return seen.value, index, self.behind([*self.order][: seen.entered])

    def refuse(self, message: str, name: str, choices: Mapping[str, Any]) -> None:
        """Raise with the nearest name, and with what stopped the pass if something did."""
        failed = (
            f" ({self.body.name} failed on a {self.size[0]}x{self.size[1]} image: {self.failure})"
            if self.failure
            else ""
        )
        near = did_you_mean(name, [other for other in choices if other and other != name])
        raise InputError(f"{message}{failed}.{near} List taps: featurecache bodies show {self.body.name}")


def _shadow(value: Any) -> Any:
    """The same structure with tensors that have a shape and dtype but no data."""
    if isinstance(value, Tensor):
        return torch.empty(value.shape, dtype=value.dtype, device="meta")
    if isinstance(value, tuple | list):
        return [_shadow(item) for item in value] if isinstance(value, list) else tuple(_shadow(item) for item in value)
    return value


def dummy(body: Body, size: tuple[int, int], n: int) -> Tensor:
    """Fixed random pixels, (n, channels, *size), where the body's parameters are, in their dtype."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, body.preprocessing.channels, *size, generator=generator)
    own = next((p for p in body.module.parameters() if p.is_floating_point()), x)
    return x.to(device=own.device, dtype=own.dtype)


def resolve_taps(body: Body, taps: Sequence[Tap], size: tuple[int, int]) -> tuple[ResolvedTap, ...]:
    """Look taps up in a body.

    Args:
        body: the network.
        taps: `penultimate`, or dotted names (`NAME#CALL` where a module runs several times), with poolings.
        size: (height, width) of the images.

    Raises:
        InputError: an unknown name, a module that never ran or ran several times, a value that is no tensor, a pooling
            that does not suit it, or two taps of one name.
    """
    if not taps:
        raise InputError(f"{body.name}: no taps given")
    trial = _Trial(body, size)
    resolved = tuple(_resolve(trial, tap) for tap in taps)
    names = [tap.name.casefold() for tap in resolved]
    for index, tap in enumerate(resolved):
        if names[index] in names[:index]:
            raise InputError(
                f"{body.name}: two taps would be stored as {tap.name!r} (names must differ in more than case)"
            )
    return resolved


def _resolve(trial: _Trial, tap: Tap) -> ResolvedTap:
    module = trial.body.module
    text = tap.module
    if text == PENULTIMATE:
        name, on, call, value, behind = _penultimate(trial)
    else:
        path, _, index = text.partition("#")
        if index and not index.isdecimal():
            raise InputError(f"tap {text!r}: {index!r} is no number of a call. Write NAME#0, NAME#1, ...")
        names = dict(module.named_modules(remove_duplicate=False))
        if path not in names or not path:
            trial.refuse(f"tap {text!r}: {trial.body.name} has no module {path!r}", path, names)
        name, on = trial.names[id(names[path])], OUTPUT
        value, call, behind = trial.call(text, name, on, int(index) if index else None)
        text = f"{path}#{call}" if len(trial.outputs[name]) > 1 else path
    where = f"tap {text!r} of {trial.body.name}"
    x = as_tensor(value, where)
    if x.ndim == 0 or x.shape[0] != BATCH:
        raise InputError(
            f"{where}: the first dimension of {tuple(x.shape)} is not the batch of {BATCH}, "
            "so it can't be cut into samples"
        )
    target = module if on in (BODY, PRE_LOGITS) else module.get_submodule(name)
    pooling, kind = choose_pooling(tap.pool, x, size=trial.size, module=target, body=module, where=where)
    shape = tuple(pooling(x).shape[1:])
    return ResolvedTap(text, name, on, call, pooling.name, pooling.parameters, shape, pooling.dims(kind), behind)


def map_tap(body: Body, size: tuple[int, int]) -> Tap:
    """The last map before the classifier, averaged over its width: (channels, height) features.

    Raises:
        InputError: the body gives no map of more than one row on images of this size.
    """
    trial = _Trial(body, size)
    value = _penultimate(trial)[3]
    map_itself = isinstance(value, Tensor) and value.ndim == 4
    if map_itself and value.shape[2] > 1:
        return Tap(pool="rows")
    # In the order in which they ended: of nested ones the outermost comes last.
    for name in () if map_itself else reversed(trial.outputs):
        value = trial.outputs[name][0].value
        if isinstance(value, Tensor) and value.ndim == 3:
            break  # tokens: a map before them is no more than the cut into patches
        if name and len(trial.outputs[name]) == 1 and isinstance(value, Tensor) and value.ndim == 4:
            if value.shape[2] > 1:
                return Tap(module=name, pool="rows")
    raise InputError(
        f"{body.name}: gives no map of more than one row on {size[0]}x{size[1]} images. Use larger images, or name a "
        f"tap: featurecache bodies show {body.name}"
    )


def _penultimate(trial: _Trial) -> tuple[str, str, int, Any, frozenset[str]]:
    body = trial.body
    if body.pre_logits:
        value, needed = trial.pre_logits()
        return "forward_head", PRE_LOGITS, 0, value, trial.behind(needed)
    if body.classifier is not None:
        value, call, behind = trial.call(PENULTIMATE, body.classifier, INPUT, None)
        return body.classifier, INPUT, call, value, behind
    if trial.failure:
        trial.refuse(f"tap {PENULTIMATE!r}: the body gave nothing", "", {})
    if not isinstance(trial.result, Tensor):
        taps = [name for name, values in trial.outputs.items() if name and isinstance(values[0].value, Tensor)]
        raise InputError(
            f"tap 'penultimate': {body.name} has no known classifier and gives a {type(trial.result).__name__}, "
            "not a tensor. "
            f"Name a tap: {', '.join(taps[-5:])}. List all: featurecache bodies show {body.name}"
        )
    return "", BODY, 0, trial.result, frozenset()


def describe(body: Body, size: tuple[int, int]) -> list[ModuleInfo]:
    """The modules of a body in the order in which they run, after a first line for `penultimate`.

    Modules that never run have no shape and 0 calls, and come last.
    """
    trial = _Trial(body, size)
    lines = []
    try:
        tap = _resolve(trial, Tap())
        source = {PRE_LOGITS: "forward_head(pre_logits=True)", BODY: "output of the body"}.get(
            tap.on, f"input of {tap.module}"
        )
        lines.append(ModuleInfo(PENULTIMATE, f"{source}, pooling {tap.pool}", tap.shape, 1, True))
    except InputError:
        pass  # a body without one is listed all the same
    rest = [name for name, _ in body.module.named_modules() if name not in trial.order]
    for name in [*trial.order, *rest]:
        if name:
            outputs = trial.outputs.get(name, [])
            first = outputs[0].value if outputs else None
            shape = tuple(first.shape[1:]) if isinstance(first, Tensor) else None
            kind = type(body.module.get_submodule(name)).__name__
            lines.append(ModuleInfo(name, kind, shape, len(outputs), name == body.classifier))
    return lines
