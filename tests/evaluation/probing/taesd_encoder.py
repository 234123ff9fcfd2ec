"""The encoder of a published tiny autoencoder: TAESD's family, with the pooled middle of the one for FLUX.2."""

import torch
from torch import nn


class Block(nn.Module):
    def __init__(self, pooled):
        super().__init__()
        convolutions = [nn.Conv2d(64, 64, 3, padding=1) for _ in range(3)]
        self.conv = nn.Sequential(convolutions[0], nn.ReLU(), convolutions[1], nn.ReLU(), convolutions[2])
        widen, narrow = nn.Conv2d(64, 256, 1, bias=False), nn.Conv2d(256, 64, 1, bias=False)
        self.pool = nn.Sequential(widen, nn.GroupNorm(4, 256), nn.ReLU(), narrow) if pooled else None

    def forward(self, x):
        x = x if self.pool is None else x + self.pool(x)
        return torch.relu(self.conv(x) + x)


def load_encoder(path):
    """uint8 pictures [B, 3, S, S] to latents [B, 32, S / 8, S / 8]."""
    layers = [nn.Conv2d(3, 64, 3, padding=1), Block(pooled=False)]
    for level in range(3):
        layers += [nn.Conv2d(64, 64, 3, stride=2, padding=1, bias=False), *(Block(level == 2) for _ in range(3))]
    network = nn.Sequential(*layers, nn.Conv2d(64, 32, 3, padding=1))
    network.load_state_dict(torch.load(path, weights_only=True))
    network.float().eval()
    return lambda images: network(images.float() / 255)
