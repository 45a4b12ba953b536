"""Small modules that several tests of the core run on."""

from __future__ import annotations

import torch


class Chain(torch.nn.Module):
    """Two layers and a head, one after the other, and a layer that is not called."""

    def __init__(self) -> None:
        super().__init__()
        self.one = torch.nn.Linear(3, 3)
        self.two = torch.nn.Linear(3, 3)
        self.head = torch.nn.Linear(3, 4)
        self.unused = torch.nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.head(self.two(self.one(x)))
        return result


class Autoencoder(torch.nn.Module):
    """What scripts hang on a model and call by themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = torch.nn.Linear(3, 5)
        self.decoder = torch.nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.decoder(self.encoder(x).relu())
        return result


class WithAutoencoder(torch.nn.Module):
    """Two layers, and an autoencoder that stands in the tree without being called by the forward."""

    def __init__(self) -> None:
        super().__init__()
        self.one = torch.nn.Linear(3, 3)
        self.two = torch.nn.Linear(3, 3)
        self.sae = Autoencoder()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.two(self.one(x))
        return result
