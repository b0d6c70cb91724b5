import numpy as np
import pytest
import torch
from PIL import Image

from featurecache.data.readers.base import Decoded
from featurecache.data.shipped import shipped_path
from featurecache.data.transforms import Preprocessing
from featurecache.errors import MissingFileError

PREPROCESSING = Preprocessing(resize=112, crop=112)


@pytest.fixture(scope="session")
def real_images():
    """72 different pictures of the shipped data, (72, 3, 112, 112) uint8."""
    try:
        folder = shipped_path("emoji/google")
    except MissingFileError:
        pytest.skip("made by the scripts of data/")
    images = []
    for path in sorted(folder.iterdir())[::15][:72]:
        with Image.open(path) as image:
            picture = Image.new("RGBA", image.size, "white")
            picture.alpha_composite(image.convert("RGBA"))
            images.append(PREPROCESSING.apply(Decoded(np.array(picture.convert("RGB")), 255.0)))
    batch = torch.stack(images)
    assert len({image.numpy().tobytes() for image in batch}) >= 64
    return batch
