"""Weights from files: tensors only, never code; strict, with errors that name what does not fit."""

from __future__ import annotations

import pickle
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from featurecache.bodies.channels import adapt_channels, first_convolution
from featurecache.errors import InputError, MissingFileError

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt")
WRAPPERS = ("state_dict", "model_state_dict", "model")
PREFIXES = ("module.", "_orig_mod.", "model.")  # DistributedDataParallel, torch.compile, Lightning
AUXILIARY = ("aux1", "aux2", "AuxLogits")  # training heads of GoogLeNet and Inception, which no feature needs
# torchvision's published DenseNet files date from before `.` was forbidden in module names (norm.1 -> norm1).
_OLD_DENSENET = re.compile(
    r"^(.*denselayer\d+\.(?:norm|relu|conv))\.((?:[12])\.(?:weight|bias|running_mean|running_var))$"
)


def read_weights(path: Path) -> dict[str, Tensor]:
    """Tensors by name, on the CPU, from a .safetensors file or a torch file that holds nothing but tensors.

    Common wrappers (`state_dict`, `model`, a `module.` before every name) are taken off.

    Raises:
        MissingFileError: there is no such file.
        InputError: it is neither; a pickle with code in it is refused without being executed.
    """
    if not path.is_file():
        raise MissingFileError(f"weights {str(path)!r}: no such file")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise InputError(
                f"{path}: not a safetensors file ({error}). Nothing in it was executed. "
                "A torch checkpoint must be named .pth."
            ) from None
    if path.suffix not in SUFFIXES:
        raise InputError(f"{path}: weights must be one of {', '.join(SUFFIXES)}")
    return _state_dict(_load_torch(path), path)


def _load_torch(path: Path) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of old formats and of TorchScript; both end in an error here
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # The rest of torch's message advises to load the file all the same, code included.
        name = re.search(r"GLOBAL (\S+)", str(error))
        reason = f" (it refers to {name[1]!r})" if name else ""
        raise InputError(
            f"{path}: refused, because it holds more than tensors (a pickle may carry code). Nothing in it was "
            f"executed. Save the state dict alone: safetensors.torch.save_file(model.state_dict(), FILE){reason}"
        ) from None
    except (RuntimeError, EOFError, ValueError, KeyError, AttributeError) as error:
        reason = re.split(r"\.? (?:In PyTorch|Re-running)", str(error).split("\n")[0])[0]
        raise InputError(f"{path}: not a file of torch weights ({reason}). Nothing in it was executed.") from None


def _state_dict(loaded: Any, path: Path) -> dict[str, Tensor]:
    for _ in range(2):
        inner = next((loaded[key] for key in WRAPPERS if isinstance(loaded, Mapping) and key in loaded), None)
        if isinstance(inner, Mapping):
            loaded = inner
    if not isinstance(loaded, Mapping) or not loaded:
        raise InputError(f"{path}: holds a {type(loaded).__name__}, not tensors by name")
    strange = [str(name) for name, value in loaded.items() if not isinstance(value, Tensor)]
    if strange:
        raise InputError(
            f"{path}: {len(strange)} of {len(loaded)} entries are not tensors ({', '.join(strange[:5])}). "
            f"A wrapper must be one of {', '.join(WRAPPERS)}."
        )
    return {str(name): value for name, value in loaded.items()}


def _renamed(state: dict[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Take prefixes and auxiliary heads off, and bring old names up to date."""
    for prefix in PREFIXES:
        if all(name.startswith(prefix) for name in state) and not any(name.startswith(prefix) for name in expected):
            state = {name.removeprefix(prefix): value for name, value in state.items()}
    if not any(name.partition(".")[0] in AUXILIARY for name in expected):
        state = {name: value for name, value in state.items() if name.partition(".")[0] not in AUXILIARY}
    return {_OLD_DENSENET.sub(r"\1\2", name): value for name, value in state.items()}


def load_weights(
    module: nn.Module, state: dict[str, Tensor], *, classifier: str | None, channels: int | None, source: str
) -> bool:
    """Load `state` strictly, in place.

    Only the classifier may differ in its number of classes (as after fine-tuning): it is rebuilt to fit, since it is
    not what features are taken from. And a file of a body that takes `channels` input channels is loaded as it is.

    Args:
        module: the body.
        state: tensors by name, see `read_weights`.
        classifier: dotted name of the body's classifier, or None.
        channels: the number of input channels that is wanted in the end, or None for the body's own.
        source: what to call the weights in an error.

    Returns:
        Whether the classifier was rebuilt.

    Raises:
        InputError: names the first missing, unexpected and mis-shaped tensors.
    """
    expected = module.state_dict()
    state = _renamed(state, expected)
    if channels is not None:
        _fit_channels(module, channels, state)
    rebuilt = classifier is not None and _fit_classifier(module, classifier, state)
    expected = module.state_dict()
    # Files written before torch 0.4.1 lack this counter, and nothing that is computed depends on it.
    missing = [n for n in expected if n not in state and not n.endswith("num_batches_tracked")]
    problems = [
        *(f"missing: {name} {tuple(expected[name].shape)}" for name in missing),
        *(f"unexpected: {name} {tuple(state[name].shape)}" for name in state if name not in expected),
        *(
            f"other shape: {name} is {tuple(state[name].shape)}, the body has {tuple(value.shape)}"
            for name, value in expected.items()
            if name in state and state[name].shape != value.shape
        ),
    ]
    if problems:
        raise InputError.from_problems(
            f"{source}: does not fit {type(module).__name__}: {len(problems)} of {len(expected)} tensors differ",
            problems,
            shown=9,
        )
    module.load_state_dict(state, strict=False)
    return rebuilt


def _fit_channels(module: nn.Module, channels: int, state: Mapping[str, Tensor]) -> None:
    if any(isinstance(child, nn.modules.conv._ConvNd) for child in module.modules()):
        name, _ = first_convolution(module)
        weight = state.get(f"{name}.weight")
        if weight is not None and weight.ndim > 1 and weight.shape[1] == channels:
            adapt_channels(module, channels)


def _fit_classifier(module: nn.Module, classifier: str, state: Mapping[str, Tensor]) -> bool:
    weight, layer = state.get(f"{classifier}.weight"), module.get_submodule(classifier)
    if weight is None or not isinstance(layer, nn.Linear | nn.Conv2d) or weight.shape == layer.weight.shape:
        return False
    if weight.shape[1:] != layer.weight.shape[1:]:
        return False
    bias = f"{classifier}.bias" in state
    new: nn.Module
    if isinstance(layer, nn.Linear):
        new = nn.Linear(layer.in_features, weight.shape[0], bias=bias)
    else:
        kernel = (layer.kernel_size[0], layer.kernel_size[1])
        new = nn.Conv2d(layer.in_channels, weight.shape[0], kernel, bias=bias)
    module.set_submodule(classifier, new.train(layer.training))
    return True
