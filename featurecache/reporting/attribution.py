"""Which pixels of each view speak for an output of a model: Captum's methods, on one view at a time."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, interpolate

from featurecache.errors import DependencyError, InputError, did_you_mean
from featurecache.features.features import Block, present, views_of
from featurecache.heads.base import Head
from featurecache.heads.fc import FCHead
from featurecache.heads.logistic import LogisticHead
from featurecache.stageone.viewsetup import ViewSetup

METHODS = ("gradcam", "occlusion", "gradient-shap", "guided-backprop")
# An occluded window is one of these parts of the image's side and moves by half of itself. Two sizes: small ones draw
# sharper, but trees may not notice what goes until nearly all of a thing is gone.
WINDOWS = (8, 4)
AT_ONCE = 16  # perturbed images in one pass
CPU = torch.device("cpu")
SHAP_SAMPLES, SHAP_NOISE = 24, 0.09

Images = Mapping[str, Tensor]
"""Per view that a sample has, (channels, height, width) float32, normalised."""


class LogisticModule(nn.Module):
    """A logistic head with gradients: the same scores before softmax or sigmoid; regression: the values."""

    def __init__(self, head: LogisticHead) -> None:
        super().__init__()
        self.blocks, self.width = head.blocks_, len(head.outputs)
        self.two = head.task_ == "binary" and len(head.arrays["coef"]) == 1
        self.index = torch.as_tensor(head.arrays["index"])
        self.arrays = {name: torch.as_tensor(array, dtype=torch.float32) for name, array in head.arrays.items()}
        self.indicators = bool(len(head.arrays["indicators"]))

    def forward(self, x: Tensor) -> Tensor:
        """(n, features), NaN where a view is missing -> (n, outputs)."""
        z = torch.nan_to_num((x - self.arrays["mean"]) / self.arrays["scale"], nan=0.0)
        if self.indicators:
            there = torch.as_tensor(present(x.detach().numpy(), self.blocks))
            z = torch.cat([z, (~there).to(z.dtype)], dim=1)
        raw = z @ self.arrays["coef"].T + self.arrays["intercept"]
        if self.two:
            return torch.cat([-raw, raw], dim=1)
        return torch.zeros(len(x), self.width).index_copy(1, self.index, raw)


class ScoresModule(nn.Module):
    """Any head as a module, without gradients: its scores as log-odds, so that differences near 0 and 1 count."""

    def __init__(self, head: Head) -> None:
        super().__init__()
        self.head = head

    def forward(self, x: Tensor) -> Tensor:
        """(n, features) -> (n, outputs)."""
        found = np.nan_to_num(self.head.scores(x.detach().numpy().astype(np.float32)))
        if self.head.task_ != "regression":
            found = np.clip(found, 1e-6, 1 - 1e-6)
            found = np.log(found) - np.log1p(-found)
        return torch.as_tensor(found, dtype=torch.float32)


def head_module(head: Head) -> tuple[nn.Module, bool]:
    """A head as a module, and whether gradients go through it."""
    if isinstance(head, FCHead):
        return head.module.eval(), True
    if isinstance(head, LogisticHead):
        return LogisticModule(head).eval(), True
    return ScoresModule(head), False


@dataclass(frozen=True, eq=False)
class Network:
    """A run as one network, from the images of a sample to the outputs of its head.

    Attributes:
        setups: body and taps of each view.
        bodies: per view its tapped body.
        blocks: the columns that the head takes.
        module: the head.
        gradient: whether gradients go through the head.
        device: where the bodies are; the head, which is small, stays on the CPU.
        at_once: perturbed images in one pass.
    """

    setups: Mapping[str, ViewSetup]
    bodies: Mapping[str, nn.Module]
    blocks: tuple[Block, ...]
    module: nn.Module
    gradient: bool
    device: torch.device
    at_once: int

    @classmethod
    def of(
        cls,
        setups: Mapping[str, ViewSetup],
        head: Head,
        *,
        device: torch.device = CPU,
        at_once: int = AT_ONCE,
    ) -> Network:
        """Put bodies and head together; of each body only the taps that the head takes run.

        The bodies are moved to the device. Nothing in it computes in place any more, since Captum keeps what modules
        take and give.
        """
        chosen, bodies = {}, {}
        for view in views_of(head.blocks_):
            names = [block.tap for block in head.blocks_ if block.view == view]
            taps = {tap.name: (tap, own) for tap, own in zip(setups[view].taps, setups[view].identities, strict=True)}
            kept = [taps[name] for name in names]
            chosen[view] = replace(setups[view], taps=tuple(t for t, _ in kept), identities=tuple(i for _, i in kept))
            bodies[view] = chosen[view].tapped().eval().to(device)
            for module in bodies[view].modules():
                if getattr(module, "inplace", False) is True:
                    module.inplace = False  # type: ignore[assignment]
        module, gradient = head_module(head)
        return cls(chosen, bodies, tuple(head.blocks_), module, gradient, device, at_once)

    def columns(self, view: str) -> slice:
        """The columns that a view fills."""
        mine = [block for block in self.blocks if block.view == view]
        return slice(mine[0].start, mine[-1].stop)

    def pictured(self, views: Iterable[str]) -> list[str]:
        """The views that can be drawn: all but texts."""
        return [view for view in views if self.setups[view].reader.kind != "text"]

    def encode(self, view: str, x: Tensor) -> Tensor:
        """(n, channels, height, width) on the device -> (n, the view's columns) on the CPU."""
        return torch.cat([output.flatten(1).float() for output in self.bodies[view](x)], dim=1).cpu()

    def features(self, images: Images) -> Tensor:
        """(1, features) of a sample, NaN where it lacks a view; without gradients."""
        row = torch.full((1, self.blocks[-1].stop), float("nan"))
        with torch.no_grad():
            for view, image in images.items():
                row[:, self.columns(view)] = self.encode(view, image[None].to(self.device))
        return row


class ViewPart(nn.Module):
    """A network as a function of the image of one view, while the features of the others stay as they are."""

    def __init__(self, network: Network, view: str, features: Tensor) -> None:
        super().__init__()
        self.body, self.module, self.gradient = network.bodies[view], network.module, network.gradient
        self.at_once = network.at_once
        self._encode = partial(network.encode, view)
        self._columns = network.columns(view)
        self._features = features

    def forward(self, x: Tensor) -> Tensor:
        """(n, channels, height, width) -> (n, outputs), where `x` is, as Captum has it."""
        row = self._features.expand(len(x), -1)
        outputs: Tensor = self.module(
            torch.cat([row[:, : self._columns.start], self._encode(x), row[:, self._columns.stop :]], dim=1)
        )
        return outputs.to(x.device)


def check_method(method: str, *, gradient: bool) -> None:
    """Refuse what is unknown, can't work for this head, or is not installed.

    Raises:
        InputError: no such method, or one that needs gradients where there are none.
        DependencyError: Captum is missing.
    """
    if method not in METHODS:
        raise InputError(f"--method {method!r}:{did_you_mean(method, METHODS)} Known: {', '.join(METHODS)}.")
    if method != "occlusion" and not gradient:
        raise InputError(f"--method {method}: this head has no gradient. Use --method occlusion, which works for any.")
    try:
        import captum.attr  # noqa: F401
    except ImportError:
        raise DependencyError("captum is not installed: pip install 'featurecache[explain]'") from None


def heat_maps(
    network: Network, images: Images, output: int, method: str, *, layer: str = "", seed: int = 0
) -> dict[str, NDArray[np.float32]]:
    """How much each pixel of each view speaks for an output.

    Args:
        network: from `Network.of`.
        images: of one sample.
        output: which column of the head's scores.
        method: one of METHODS.
        layer: dotted name of the module that Grad-CAM looks at; default the last that gives a map.
        seed: of what gradient-shap draws.

    Returns:
        Per view that the sample has (height, width) float32 from 0 on, in one unit for all views of it. A view of texts
        has no picture, so no map: its features count as they are.

    Raises:
        InputError: the method does not suit the body.
    """
    features = network.features(images)
    found = {}
    for view in network.pictured(images):
        image, part = images[view], ViewPart(network, view, features).eval()
        with _quiet(seed, network.device):
            heat = _METHODS[method](part, image[None].to(network.device, copy=True), output, layer).cpu()
        heat = interpolate(heat.float(), size=image.shape[1:], mode="bilinear", align_corners=False)
        found[view] = heat.clamp(min=0)[0, 0].detach().numpy()
    return found


def _gradcam(part: ViewPart, x: Tensor, output: int, layer: str) -> Tensor:
    from captum.attr import LayerGradCam

    chosen = last_map(part.body, x) if not layer else _named(part.body, layer)
    given: Tensor = LayerGradCam(part, chosen).attribute(x.requires_grad_(), target=output, relu_attributions=True)
    return given


def _occlusion(part: ViewPart, x: Tensor, output: int, layer: str) -> Tensor:
    """What the score loses when a window is hidden; for a head without gradient also what it gains when it alone shows.

    Trees answer by steps: as long as some of a thing is there, nothing may change.
    """
    from captum.attr import Occlusion

    channels, *sides = x.shape[1:]
    hide, plain = Occlusion(part), _plain(x)
    found = torch.zeros(1, 1, *sides, device=x.device)
    for parts in WINDOWS:
        window = (channels, *(max(side // parts, 1) for side in sides))
        options: dict[str, Any] = {
            "strides": (channels, *(max(side // (2 * parts), 1) for side in sides)),
            "target": output,
            "perturbations_per_eval": part.at_once,
        }
        with torch.no_grad():
            given: Tensor = hide.attribute(x, window, baselines=plain, **options)
            if not part.gradient:  # the plain image, on which a window of the real one is shown
                given = given - hide.attribute(plain, window, baselines=x, **options)
        found += given.mean(dim=1, keepdim=True) / len(WINDOWS)
    return found


def _gradient_shap(part: ViewPart, x: Tensor, output: int, layer: str) -> Tensor:
    from captum.attr import GradientShap

    given: Tensor = GradientShap(part).attribute(
        x, baselines=_plain(x), n_samples=SHAP_SAMPLES, stdevs=SHAP_NOISE, target=output
    )
    return _smooth(given.sum(dim=1, keepdim=True).clamp(min=0))


def _guided_backprop(part: ViewPart, x: Tensor, output: int, layer: str) -> Tensor:
    from captum.attr import GuidedBackprop

    if not any(isinstance(module, nn.ReLU) for module in part.body.modules()):
        raise InputError(
            "--method guided-backprop: it is about ReLUs, and this body has none. "
            "Use --method gradient-shap or occlusion."
        )
    given: Tensor = GuidedBackprop(part).attribute(x.requires_grad_(), target=output)
    return _smooth(given.abs().amax(dim=1, keepdim=True))


_METHODS: dict[str, Callable[[ViewPart, Tensor, int, str], Tensor]] = {
    "gradcam": _gradcam,
    "occlusion": _occlusion,
    "gradient-shap": _gradient_shap,
    "guided-backprop": _guided_backprop,
}


def _plain(x: Tensor) -> Tensor:
    """An image of nothing: one colour, the mean of its own, which is the least surprise to a network."""
    return x.mean(dim=(2, 3), keepdim=True).expand_as(x).contiguous()


def _smooth(heat: Tensor) -> Tensor:
    """Single pixels say little to the eye: the mean over a twentieth of the side."""
    width = 2 * (min(heat.shape[2:]) // 40) + 1
    return avg_pool2d(heat, width, stride=1, padding=width // 2, count_include_pad=False)


@contextmanager
def _quiet(seed: int, device: torch.device) -> Iterator[None]:
    """Captum draws from the global generators and warns of hooks that it sets; both end here."""
    devices = [device] if device.type == "cuda" else []
    state = np.random.get_state()  # Captum's own generator
    try:
        with torch.random.fork_rng(devices=devices), warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="captum")
            torch.manual_seed(seed)
            np.random.seed(seed)
            yield
    finally:
        np.random.set_state(state)


def spatial_modules(body: nn.Module, x: Tensor) -> list[tuple[str, nn.Module, bool]]:
    """The modules of a body that tell places apart, in the order in which they end: name, module, whether it is a map.

    A map is (n, channels, height, width) of the image's proportions and more than one pixel. Else there are tokens:
    (n, tokens, channels), or (n, height, width, channels) as in Swin.
    """
    seen: list[tuple[str, nn.Module, bool]] = []

    def keep(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            first = output[0] if isinstance(output, tuple) and output else output
            if not isinstance(first, Tensor):
                return
            tokens = first.ndim == 3 and min(first.shape[1:]) > 1
            if (is_map := _proportional(first.shape[2:], x)) or tokens or _proportional(first.shape[1:3], x):
                seen.append((name, module, is_map))

        return hook

    handles = [module.register_forward_hook(keep(name)) for name, module in body.named_modules() if name]
    try:
        with torch.no_grad():
            body(x)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _proportional(places: Sequence[int], x: Tensor) -> bool:
    """Whether these are the height and width of a map of `x`."""
    if len(places) != 2 or min(places) < 2:
        return False
    height, width = x.shape[2:]
    step = math.sqrt(places[0] * places[1] / (height * width))
    return abs(places[0] - height * step) <= 1 and abs(places[1] - width * step) <= 1


def last_map(body: nn.Module, x: Tensor) -> nn.Module:
    """The last module of a body that gives a map.

    Raises:
        InputError: none does, or places are mixed by what comes behind it, as in a transformer.
    """
    found = spatial_modules(body, x)
    other = "Use --method occlusion or gradient-shap."
    maps = [(name, module) for name, module, is_map in found if is_map]
    if not maps:
        raise InputError(f"--method gradcam: no module of this body gives a map. {other}")
    if not found[-1][2]:
        name = maps[-1][0].removeprefix("module.")
        raise InputError(
            f"--method gradcam: behind {name!r}, its last map, this body works on tokens, as transformers do, and what "
            f"they attend to is not in that map. {other} (--layer {name} draws it all the same.)"
        )
    return maps[-1][1]


def _named(body: nn.Module, layer: str) -> nn.Module:
    modules: dict[str, nn.Module] = {name: module for name, module in body.named_modules() if name}
    ends: Sequence[str] = [name for name in modules if name == layer or name.endswith(f".{layer}")]
    if not ends:
        names = [name.removeprefix("module.") for name in modules]
        raise InputError(f"--layer {layer!r}: no such module.{did_you_mean(layer, names)}")
    return modules[ends[0]]
