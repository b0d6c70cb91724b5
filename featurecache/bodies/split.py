"""The part of a body above a module as a network of its own: it takes what that module gives."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from featurecache.bodies.registry import Body
from featurecache.bodies.tapped import BODY, INPUT, OUTPUT, PRE_LOGITS, ResolvedTap, Tapped
from featurecache.bodies.taps import dummy, resolve_taps
from featurecache.config import Tap
from featurecache.errors import InputError

TOLERANCE = 1e-4  # of the largest activation: between the body as a whole and in two parts, on random pixels
SAMPLES = 2
NEARER = "Name a module nearer to the input."


class Upper(nn.Module):
    """What of a tapped body runs above a cut, with the very parameters of the body.

    Args:
        graph: takes what the cut module gives, and gives the raw activations of the taps.
        cut: the tap without pooling whose features come in.
        taps: as in `Tapped`.
    """

    def __init__(self, graph: fx.GraphModule, cut: ResolvedTap, taps: Sequence[ResolvedTap]) -> None:
        super().__init__()
        self.graph = graph
        self.cut, self.taps = cut, tuple(taps)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Of one sample's activation, as it is stored."""
        return self.cut.shape

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Run it.

        Args:
            x: (n, *input_shape), as stored.

        Returns:
            One float32 tensor per tap, (n, *tap.shape), in the order of the taps.
        """
        if self.cut.parameters.get("layout") == "NHWC":  # stored channels first, which the body is not
            x = x.permute(0, 2, 3, 1)
        return tuple(tap.pooling()(value) for tap, value in zip(self.taps, self.graph(x), strict=True))


def split_body(body: Body, taps: Sequence[ResolvedTap], module: str, size: tuple[int, int]) -> Upper:
    """Cut a body above a module.

    torch.fx follows the calls of the modules that the cut and the taps lie in, and takes all other modules as they are.
    What comes of it is compared with the body as a whole, so a body that runs another way than torch.fx sees is found.

    Args:
        body: the network; shared, not changed.
        taps: what is kept, all above the cut.
        module: dotted name (`NAME#CALL` where it runs several times); what it gives is what the upper part takes.
        size: (height, width) of the images.

    Raises:
        InputError: no such module, a tap that lies below it, a body that can't be followed, something above that needs
            more than what the module gives, or that shares parameters with what lies below.
    """
    cut = resolve_taps(body, [Tap(module=module, pool="none")], size)[0]
    where = f"--train-from {module}: {body.name} can't be cut there"
    upper = Upper(_upper_graph(body, cut, taps, where), cut, taps)
    if not any(True for _ in upper.parameters()):
        raise InputError(f"{where}: no parameter works above it, so nothing would learn. {NEARER}")
    _check_alone(body, upper, size, where)
    _check_same(body, upper, size, where)
    return upper


def _upper_graph(body: Body, cut: ResolvedTap, taps: Sequence[ResolvedTap], where: str) -> fx.GraphModule:
    tracer = _Tracer([cut.module, *(tap.module for tap in taps if tap.on in (INPUT, OUTPUT))])
    root: nn.Module = body.module
    vectors = [tap for tap in taps if tap.on == PRE_LOGITS]
    if vectors:
        root = _PreLogits(body.module)
        tracer.prefix = "body."
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            graph = tracer.trace(root)
    except Exception as error:  # control flow on data, and whatever else a body's code does with a proxy
        reason = f"{type(error).__name__}: {error}".split("\n")[0]
        raise InputError(f"{where}: torch.fx can't follow its code ({reason})") from None
    result = next(node for node in graph.nodes if node.op == "output")
    outputs = []
    for tap in taps:
        if tap.on in (BODY, PRE_LOGITS):
            outputs.append(result.args[0])
        else:
            outputs.append(tracer.node(tap.module, tap.on, tap.call, where))
    source = tracer.node(cut.module, OUTPUT, cut.call, where)
    with graph.inserting_before(next(iter(graph.nodes))):
        given = graph.placeholder("activation")
    source.replace_all_uses_with(given)
    graph.erase_node(result)
    below = [tap.tap for tap, node in zip(taps, outputs, strict=True) if given not in _needed([node])]
    if below:
        raise InputError(f"{where}: the tap {', '.join(below)} does not lie above it. {NEARER}")
    needed = _needed(outputs)
    graph.output(tuple(outputs))
    others = [node for node in needed if node.op == "placeholder" and node is not given]
    if others:
        used = ", ".join(sorted({str(user.target) for node in others for user in node.users if user in needed}))
        raise InputError(
            f"{where}: what runs above it needs more than its output ({used} works on what comes from the image). "
            "Name a module that everything passes through, such as a stage or a block of the trunk."
        )
    for node in reversed(list(graph.nodes)):
        if node.op != "output" and node not in needed and node is not given:
            graph.erase_node(node)
    return fx.GraphModule(root, graph).eval()


def _needed(outputs: Sequence[fx.Node]) -> set[fx.Node]:
    """The nodes that the outputs follow from, themselves included."""
    found: set[fx.Node] = set()
    waiting = list(outputs)
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting += node.all_input_nodes
    return found


class _PreLogits(nn.Module):
    """timm's head without its classifier, as `Tapped` runs it."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Any:
        timm: Any = self.body
        return timm.forward_head(timm.forward_features(x), pre_logits=True)


class _Tracer(fx.Tracer):
    """Enters only the modules that hold one of those named, and remembers what each of these took and gave."""

    def __init__(self, named: Sequence[str]) -> None:
        super().__init__()
        self.prefix = ""
        self._named = set(named)
        self._entered = {".".join(name.split(".")[:i]) for name in named for i in range(name.count(".") + 1)}
        self._calls: dict[tuple[str, str], list[fx.Node]] = {}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        name = module_qualified_name.removeprefix(self.prefix)
        return name not in self._entered and module_qualified_name != self.prefix.rstrip(".")

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        name = self.path_of_module(m).removeprefix(self.prefix)
        given = next((value for value in (*args, *kwargs.values()) if isinstance(value, fx.Proxy)), None)
        result = super().call_module(m, forward, args, kwargs)
        if name in self._named:
            for on, value in ((INPUT, given), (OUTPUT, result)):
                if isinstance(value, fx.Proxy):
                    self._calls.setdefault((name, on), []).append(value.node)
        return result

    def node(self, module: str, on: str, call: int, where: str) -> fx.Node:
        """What a module took or gave in one of its calls."""
        found = self._calls.get((module, on), [])
        if call >= len(found):
            raise InputError(f"{where}: torch.fx does not see {module!r} run as the body runs it")
        return found[call]


def parameters_below(body: Body, tap: ResolvedTap, size: tuple[int, int]) -> set[str]:
    """Names of the parameters that a tap depends on."""
    named = dict(body.module.named_parameters())
    asked = [p.requires_grad for p in named.values()]
    body.module.requires_grad_(True)
    try:
        below = Tapped(body, [tap])(dummy(body, size, 1))[0].sum()
        found = torch.autograd.grad(below, list(named.values()), allow_unused=True)
    finally:
        for parameter, flag in zip(named.values(), asked, strict=True):
            parameter.requires_grad_(flag)
    return {name for name, gradient in zip(named, found, strict=True) if gradient is not None}


def _check_alone(body: Body, upper: Upper, size: tuple[int, int], where: str) -> None:
    """Refuse parameters that work on both sides: as they learn above, what was computed below would be stale."""
    inside = set(upper.parameters())
    below = parameters_below(body, upper.cut, size)
    shared = [name for name, p in body.module.named_parameters() if p in inside and name in below]
    if shared:
        raise InputError(
            f"{where}: {', '.join(shared[:5])} works below it as well as above, so that learning above would make the "
            "cached activations stale. Train from another module."
        )


@torch.no_grad()
def _check_same(body: Body, upper: Upper, size: tuple[int, int], where: str) -> None:
    """Refuse a body that gives something else in two parts than as a whole."""
    x = dummy(body, size, SAMPLES)
    whole = Tapped(body, upper.taps)(x)
    parts = upper(Tapped(body, [upper.cut])(x)[0].to(x.dtype))
    for tap, a, b in zip(upper.taps, whole, parts, strict=True):
        worst = float((a - b).abs().max()) if a.shape == b.shape else float("inf")
        if not worst <= TOLERANCE * max(1.0, float(a.abs().max())):
            raise InputError(
                f"{where}: tap {tap.tap} would be another in two parts than as a whole (difference {worst:.2g}): the "
                "body does not run as torch.fx sees it. Name another module."
            )
