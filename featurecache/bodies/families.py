"""Where networks come from: torchvision, timm, and factories that the user names."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from featurecache.bodies.names import NO_TIMM
from featurecache.bodies.weights import AUXILIARY, SUFFIXES, load_weights, read_weights
from featurecache.data.shipped import shipped_path
from featurecache.data.transforms import Preprocessing
from featurecache.errors import DependencyError, InputError, did_you_mean
from featurecache.machine.lean import torchvision
from featurecache.named import import_named

T = TypeVar("T")

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
SHIPPED = {"torchvision/squeezenet1_1": "weights/squeezenet1_1.safetensors"}
NO_NETWORK = (
    "Nothing else is tried over the network. Pass a file with --weights FILE.safetensors|.pth, "
    "or random weights with --weights none --seed N"
)


@dataclass
class Built:
    """A network as its family makes it, before input channels are adapted."""

    module: nn.Module
    preprocessing: Preprocessing
    categories: tuple[str, ...] | None = None
    classifier: str | None = None
    pre_logits: bool = False


@dataclass(frozen=True)
class Spec:
    """Which weights: `kind` is hub, none, factory or file; `name` the hub's name for them."""

    kind: str
    name: str = ""
    state: Mapping[str, Tensor] | None = None
    source: str = ""
    channels: int | None = None


def parse_weights(weights: str, architecture: str, *, seed: int | None, channels: int | None) -> Spec:
    """What `--weights` asks for; a file is read here.

    Raises:
        InputError: random weights without a seed, no shipped weights for this body, or the file is no weights file.
    """
    if weights == "none":
        if seed is None:
            raise InputError("weights 'none' means random weights: give --seed N, so that they can be made again")
        return Spec("none")
    if weights == "shipped":
        if architecture not in SHIPPED:
            raise InputError(f"{architecture}: no weights are shipped for it; they are for {', '.join(SHIPPED)}")
        path = shipped_path(SHIPPED[architecture])
        return Spec("file", "shipped", read_weights(path), f"shipped weights {path.name}", channels)
    if weights.endswith(SUFFIXES) or os.sep in weights or Path(weights).is_file():
        return Spec("file", "", read_weights(Path(weights)), weights, channels)
    return Spec("hub", weights)


def seeded(seed: int | None, build: Callable[[], T]) -> T:
    """`build()` with its random numbers from `seed`, leaving the process's generator as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0 if seed is None else seed)
        return build()


class _Undrawn(TorchFunctionMode):
    """Leaves parameters undrawn, which the weights of a file or of the hub replace: 4 s for a ViT-B or a VGG."""

    DRAWS = frozenset({Tensor.uniform_, Tensor.normal_, Tensor.erfinv_})

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        target = args[0] if args else kwargs.get("tensor")
        if isinstance(target, nn.Parameter) and (
            func in self.DRAWS or getattr(func, "__module__", "") == nn.init.__name__
        ):
            return target
        return func(*args, **kwargs)


def _constructed(spec: Spec, seed: int | None, build: Callable[[], T]) -> T:
    """A library's network, its parameters drawn from `seed` where nothing will replace them."""
    with nullcontext() if spec.kind == "none" else _Undrawn():
        return seeded(seed, build)


def build_torchvision(model: str, spec: Spec, seed: int | None) -> Built:
    """A classification model of torchvision, with the preprocessing of its weights."""
    models = torchvision.models
    entries = models.get_model_weights(model)
    chosen = _hub_entry(model, entries, spec.name) if spec.kind == "hub" else None
    options: dict[str, Any] = {} if spec.state is None else _image_size(spec.state)
    if model in ("googlenet", "inception_v3"):
        options["transform_input"] = True  # what the published weights were trained with
        if chosen is None:
            options |= {"aux_logits": False, "init_weights": spec.kind == "none"}
    try:
        module = _constructed(spec, seed, lambda: models.get_model(model, weights=chosen, **options))
    except (OSError, RuntimeError) as error:  # no network, a proxy's refusal, a wrong checksum
        if chosen is None:
            raise
        shipped = " or --weights shipped" if f"torchvision/{model}" in SHIPPED else ""
        raise InputError(
            f"torchvision/{model}: weights {chosen.name} can't be had from {chosen.url} ({error}). "
            f"{NO_NETWORK}{shipped}."
        ) from None
    for head in AUXILIARY:
        if getattr(module, head, None) is not None:  # only training uses them
            setattr(module, head, None)
            module.aux_logits = False
    built = Built(module, _torchvision_preprocessing(entries, chosen, module), classifier=classifier_of(module))
    source = chosen or entries.DEFAULT
    if chosen is not None or spec.name == "shipped":
        built.categories = tuple(source.meta["categories"])
    _load_file(built, spec)
    return built


def _hub_entry(model: str, entries: Any, name: str) -> Any:
    name = name.rpartition(".")[2]
    known = [*entries.__members__]
    if name not in known:
        raise InputError(
            f"torchvision/{model}: no weights {name!r}.{did_you_mean(name, known)} "
            f"Known: {', '.join(dict.fromkeys([*known, 'DEFAULT', 'none']))}, or a path to a .safetensors or .pth file."
        )
    return entries[name]


def _image_size(state: Mapping[str, Tensor]) -> dict[str, int]:
    """A vision transformer's image size, which its position embedding fixes."""
    table = next((value for name, value in state.items() if name.endswith("encoder.pos_embedding")), None)
    patch = next((value for name, value in state.items() if name.endswith("conv_proj.weight")), None)
    if table is None or patch is None or table.ndim != 3:
        return {}
    return {"image_size": round((table.shape[1] - 1) ** 0.5) * int(patch.shape[-1])}


def _torchvision_preprocessing(entries: Any, chosen: Any, module: nn.Module) -> Preprocessing:
    """Of the weights; without published ones of the default, or of those for this image size where it is fixed."""
    entry = chosen or entries.DEFAULT
    size = getattr(module, "image_size", None)
    if chosen is None and isinstance(size, int) and entry.transforms().crop_size[0] != size:
        entry = next((other for other in entries if other.transforms().crop_size[0] == size), entry)
    transforms = entry.transforms()
    crop, resize = int(transforms.crop_size[0]), int(transforms.resize_size[0])
    if isinstance(size, int) and crop != size:
        crop, resize = size, size
    return Preprocessing(
        resize=resize,
        crop=crop,
        interpolation=str(transforms.interpolation.value),
        antialias=bool(transforms.antialias),
        mean=tuple(float(v) for v in transforms.mean),
        std=tuple(float(v) for v in transforms.std),
    )


def import_timm() -> Any:
    """The timm package.

    Raises:
        DependencyError: it is not installed.
    """
    try:
        return importlib.import_module("timm")
    except ImportError:
        raise DependencyError(NO_TIMM) from None


def build_timm(model: str, spec: Spec, seed: int | None) -> Built:
    """A timm model with the preprocessing of its weights."""
    timm = import_timm()
    if spec.kind == "hub" and spec.name != "DEFAULT":
        raise InputError(
            f"timm/{model}: no weights {spec.name!r}. timm's weights are part of the name (timm/resnet50.a1_in1k); "
            "else DEFAULT, none, or a path to a .safetensors or .pth file."
        )
    config = timm.get_pretrained_cfg(model)
    if spec.kind == "hub" and not (config and config.has_weights):
        raise InputError(f"timm/{model}: timm publishes no weights for it. {NO_NETWORK}.")
    try:
        module = _constructed(spec, seed, lambda: timm.create_model(model, pretrained=spec.kind == "hub"))
    except Exception as error:  # whatever the hub's client raises, its HTTP library's own exceptions too
        if spec.kind != "hub":
            raise
        reason = str(error).split("\n")[0]
        raise InputError(f"timm/{model}: weights can't be had from the hub ({reason}). {NO_NETWORK}.") from None
    built = Built(module, timm_preprocessing(module), classifier=_timm_classifier(module), pre_logits=_has_head(module))
    _load_file(built, spec)
    return built


def timm_preprocessing(module: nn.Module) -> Preprocessing:
    """What timm's own evaluation does to an image: resized to size / crop_pct, then cropped to size."""
    config = importlib.import_module("timm.data").resolve_data_config({}, model=module)
    size = int(config["input_size"][-1])
    modes = {"center": "crop", "squash": "squash", "border": "pad"}
    return Preprocessing(
        resize=int(size / float(config["crop_pct"])),
        crop=size,
        resize_mode=modes[config["crop_mode"]],
        interpolation=config["interpolation"] if config["interpolation"] != "random" else "bilinear",
        mean=tuple(float(v) for v in config["mean"]),
        std=tuple(float(v) for v in config["std"]),
    )


def _timm_classifier(module: nn.Module) -> str | None:
    classifier = getattr(module, "get_classifier", lambda: None)()
    return next((name for name, child in module.named_modules() if child is classifier), None)


def _has_head(module: nn.Module) -> bool:
    return hasattr(module, "forward_head") and hasattr(module, "forward_features")


def build_factory(name: str, spec: Spec, seed: int | None) -> Built:
    """The module that `package.module:factory` makes; the caller makes sure that a person named it.

    Raises:
        InputError: it can't be imported or called, or gives no `nn.Module`.
    """
    if spec.kind == "hub" and spec.name != "DEFAULT":
        raise InputError(f"{name}: no weights {spec.name!r}; a factory has DEFAULT (its own), none, or a file")
    factory = import_named("body", name)
    try:
        module = seeded(seed, factory)
    except Exception as error:
        raise InputError(f"body {name!r}: the factory raised {type(error).__name__}: {error}") from error
    if not isinstance(module, nn.Module):
        raise InputError(f"body {name!r}: the factory gave a {type(module).__name__}, not a torch.nn.Module")
    family = type(module).__module__.partition(".")[0]
    pre_logits = family == "timm" and _has_head(module)
    classifier = classifier_of(module) if type(module).__module__.startswith("torchvision.models.") else None
    built = Built(module, _factory_preprocessing(name, module, family), None, classifier, pre_logits)
    categories = getattr(module, "categories", None)
    built.categories = tuple(str(c) for c in categories) if isinstance(categories, list | tuple) else None
    _load_file(built, spec)
    return built


def _factory_preprocessing(name: str, module: nn.Module, family: str) -> Preprocessing:
    given = getattr(module, "preprocessing", None)
    if given is None and family == "timm":
        return timm_preprocessing(module)
    given = dict(given) if isinstance(given, Mapping) else {}
    known = [field.name for field in fields(Preprocessing)]
    for key in given:
        if key not in known:
            raise InputError(
                f"body {name!r}: unknown key {key!r} in its `preprocessing`.{did_you_mean(str(key), known)} "
                f"Known: {', '.join(known)}."
            )
    channels = int(given.get("channels", len(given.get("mean", IMAGENET_MEAN))))
    grey = sum(IMAGENET_MEAN) / 3, sum(IMAGENET_STD) / 3
    rgb = channels == 3
    defaults: dict[str, Any] = {
        "channels": channels,
        "mean": IMAGENET_MEAN if rgb else (grey[0],) * channels,
        "std": IMAGENET_STD if rgb else (grey[1],) * channels,
    }
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in given.items()}
    return Preprocessing(**{**defaults, **values})


def classifier_of(module: nn.Module) -> str | None:
    """Dotted name of a torchvision model's classifier: SqueezeNet's convolution, else its last linear layer."""
    if type(module).__name__ == "SqueezeNet":
        return "classifier.1"
    linear = [name for name, child in module.named_modules() if isinstance(child, nn.Linear)]
    return linear[-1] if linear else None


def _load_file(built: Built, spec: Spec) -> None:
    if spec.state is not None:
        state = dict(spec.state)
        rebuilt = load_weights(
            built.module, state, classifier=built.classifier, channels=spec.channels, source=spec.source
        )
        if rebuilt:
            built.categories = None
