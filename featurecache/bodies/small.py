"""Small bodies to train from scratch, written as anybody would write one of their own: `package.module:factory`.

Bodies always run in eval mode, so none of these has BatchNorm: its statistics would never be estimated.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

PLACES = 24


class LeNet(nn.Module):
    """LeNet-5 (LeCun et al., 1998) with ReLU and max pooling: grey 32 x 32 images in, 84 features out."""

    def __init__(self) -> None:
        super().__init__()
        self.preprocessing = {"channels": 1, "resize": 32, "crop": 32, "mean": [0.5], "std": [0.5]}
        self.features = nn.Sequential(
            nn.Conv2d(1, 6, 5), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(),
        )  # fmt: skip
        self.dense = nn.Sequential(nn.Linear(16 * 5 * 5, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        """(n, 1, 32, 32) -> (n, 84)."""
        y: Tensor = self.dense(self.features(x))
        return y


class CharacterCNN(nn.Module):
    """Characters to features: an embedding, two convolutions along the text, the most of each over all places.

    Args:
        places: of a text; the reader `text` gives so many.
        width: features.
    """

    def __init__(self, places: int = PLACES, width: int = 128) -> None:
        super().__init__()
        self.preprocessing = {
            "channels": places, "resize": None, "crop": 1, "mean": [0.0] * places, "std": [1.0] * places,
        }  # fmt: skip
        self.embedding = nn.Embedding(256, 24, padding_idx=0)
        self.convolutions = nn.Sequential(
            nn.Conv1d(24, width, 3, padding=1), nn.ReLU(), nn.Conv1d(width, width, 3, padding=1), nn.ReLU()
        )

    def forward(self, x: Tensor) -> Tensor:
        """(n, places, 1, 1), whole numbers from 0 to 255 -> (n, width)."""
        letters = self.embedding(x.flatten(1).round().clamp(0, 255).to(torch.int64))
        pooled: Tensor = self.convolutions(letters.transpose(1, 2)).amax(dim=2)
        return pooled


def lenet() -> nn.Module:
    """LeNet-5 for grey images."""
    return LeNet()


def characters() -> nn.Module:
    """A convolutional network over the characters of a text."""
    return CharacterCNN()
