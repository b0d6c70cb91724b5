"""A body with its taps as one module: hooks for one pass, pooling inside the hook, early exit after the last tap."""

from __future__ import annotations

import re
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from featurecache.bodies.pooling import Pooling
from featurecache.bodies.registry import Body
from featurecache.errors import InputError

INPUT, OUTPUT, PRE_LOGITS, BODY = "input", "output", "pre_logits", "body"


@dataclass(frozen=True)
class ResolvedTap:
    """A tap of a certain body, with nothing left to choose.

    Attributes:
        tap: as the user wrote it: `penultimate`, or a dotted name, with `#CALL` where the module runs more than once.
        module: dotted name of the tapped module; "" for the body itself.
        on: `input` or `output` of the module, `pre_logits` (timm's head without its classifier), `body` (own output).
        call: which call of the module, from 0.
        pool: a pooling, never `auto`.
        parameters: of the pooling, see `pooling.Pooling`.
        shape: of one sample's features.
        dims: a name per dimension of `shape`.
        behind: dotted names of the modules that a full pass enters and a pass up to this tap does not.
    """

    tap: str
    module: str
    on: str
    call: int
    pool: str
    parameters: dict[str, Any] = field(default_factory=dict)
    shape: tuple[int, ...] = ()
    dims: tuple[str, ...] = ()
    behind: frozenset[str] = field(default=frozenset(), repr=False)

    @property
    def name(self) -> str:
        """The name of its array in the store: `layer4@avg`; `relu@1@avg` for the second call of `relu`."""
        module, _, call = self.tap.partition("#")
        parts = [re.sub(r"[^A-Za-z0-9._-]", "_", module), *([call] if call else []), self.pool]
        return "@".join(parts)

    def pooling(self) -> Pooling:
        """The pooling with its parameters."""
        return Pooling(self.pool, self.parameters)

    def parameters_for_recipe(self) -> dict[str, Any]:
        """All that the features depend on, as plain values."""
        return {
            "name": self.name,
            "tap": self.tap,
            "module": self.module,
            "on": self.on,
            "call": self.call,
            "pool": self.pool,
            "parameters": dict(self.parameters),
        }


class _AllTapped(BaseException):
    """Ends a forward pass once the last tap has fired; not an Exception, so that no body's `except` swallows it."""


class _Capture:
    """What one forward pass on one thread has given so far; nothing of it is shared with another pass."""

    def __init__(self, taps: Sequence[ResolvedTap], *, early_exit: bool) -> None:
        self.taps = taps
        self.features: dict[int, Tensor] = {}
        self.calls: Counter[tuple[str, str]] = Counter()
        self.early_exit = early_exit
        self.active = True
        self.thread = threading.get_ident()
        self.handles: list[RemovableHandle] = []

    def attach(self, module: nn.Module) -> None:
        wanted: dict[tuple[str, str], list[int]] = {}
        for index, tap in enumerate(self.taps):
            wanted.setdefault((tap.module, tap.on), []).append(index)
        for (name, on), indices in wanted.items():
            if on == OUTPUT:
                self.handles.append(module.get_submodule(name).register_forward_hook(self._output(name, indices)))
            elif on == INPUT:
                # First of the pre-hooks: the input as it was passed, and nothing runs once the pass has ended here.
                hook = self._input(name, indices)
                self.handles.append(
                    module.get_submodule(name).register_forward_pre_hook(hook, prepend=True, with_kwargs=True)
                )

    def detach(self) -> None:
        for handle in self.handles:
            handle.remove()

    def _output(self, name: str, indices: list[int]) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            self._fired(name, OUTPUT, indices, output)

        return hook

    def _input(self, name: str, indices: list[int]) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            self._fired(name, INPUT, indices, first_input(args, kwargs))

        return hook

    def _fired(self, name: str, on: str, indices: list[int], value: Any) -> None:
        if not self.active or threading.get_ident() != self.thread:
            return  # hooks hang on the module, which another thread may be running too
        call = self.calls[name, on]
        self.calls[name, on] += 1
        for index in indices:
            if self.taps[index].call == call:
                self.keep(index, value)
        if self.early_exit and self.done:
            raise _AllTapped

    def keep(self, index: int, value: Any) -> None:
        tap = self.taps[index]
        self.features[index] = tap.pooling()(as_tensor(value, f"tap {tap.tap!r}"))

    @property
    def done(self) -> bool:
        return len(self.features) == len(self.taps)


class Tapped(nn.Module):
    """A body whose forward pass returns its taps.

    Hooks are registered for the pass and removed whatever happens; each reduces or clones inside the hook, since an
    in-place operation after it may overwrite the activation. Gradients flow. Safe to call from several threads.

    Args:
        body: the network; its module is shared, not copied.
        taps: what to keep, from `resolve_taps`.
        early_exit: end the pass after the last tap; must be off where the pass is exported or traced.
    """

    def __init__(self, body: Body, taps: Sequence[ResolvedTap], *, early_exit: bool = True) -> None:
        super().__init__()
        self.module = body.module
        self.taps = tuple(taps)
        self.early_exit = early_exit

    def with_module(self, module: nn.Module) -> Tapped:
        """The same taps on another module with the same names (a folded or converted copy)."""
        other = Tapped.__new__(Tapped)
        nn.Module.__init__(other)
        other.module, other.taps, other.early_exit = module, self.taps, self.early_exit
        return other.train(module.training)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Run the body.

        Args:
            x: (n, channels, height, width), normalised, in the body's dtype.

        Returns:
            One float32 tensor per tap, (n, *tap.shape), in the order of the taps.

        Raises:
            InputError: a tap never fired, or gave no tensor.
        """
        capture = _Capture(self.taps, early_exit=self.early_exit)
        try:
            capture.attach(self.module)
            self._run(x, capture)
        except _AllTapped:
            if not capture.done:  # a tapped body inside this body ended its own pass
                raise
        finally:
            capture.detach()
        if not capture.done:
            missing = [tap.tap for index, tap in enumerate(self.taps) if index not in capture.features]
            raise InputError(f"taps that never fired in the forward pass: {', '.join(missing)}")
        return tuple(capture.features[index] for index in range(len(self.taps)))

    def _run(self, x: Tensor, capture: _Capture) -> None:
        module: Any = self.module
        heads = [index for index, tap in enumerate(self.taps) if tap.on == PRE_LOGITS]
        if heads:
            features, others = module.forward_features(x), len(self.taps) - len(heads)
            if len(capture.features) < others or not self.early_exit:  # taps inside the head
                before = features.clone()
                module.forward_head(features)
                features = before
            capture.active = False  # the head's modules would be counted twice
            vector = module.forward_head(features, pre_logits=True)
            for index in heads:
                capture.keep(index, vector)
            return
        output = module(x)
        for index, tap in enumerate(self.taps):
            if tap.on == BODY:
                capture.keep(index, output)


def first_input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The first positional argument of a call, else the first keyword argument that is a tensor."""
    return args[0] if args else next((value for value in kwargs.values() if isinstance(value, Tensor)), None)


def as_tensor(value: Any, where: str) -> Tensor:
    """`value` if it is a floating-point tensor.

    Raises:
        InputError: says what came instead.
    """
    if isinstance(value, Tensor) and value.is_floating_point():
        return value
    if isinstance(value, Tensor):
        found = f"a tensor of {value.dtype}"
    elif isinstance(value, Mapping):
        found = f"a {type(value).__name__} with {', '.join(map(str, value))}"
    elif isinstance(value, tuple | list):
        found = f"a {type(value).__name__} of {len(value)} ({', '.join(type(item).__name__ for item in value)})"
    else:
        found = f"a {type(value).__name__}"
    raise InputError(f"{where}: gives {found}, not one floating-point tensor. Tap a module before or inside it.")
