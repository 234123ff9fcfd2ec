"""Inception's features as the ADM evaluator takes them, through torch-fidelity, from a local weight file.

The network is the TensorFlow graph of 2015 that FID is defined by; torch-fidelity has its resizing and its pooling,
which torchvision's has not. One pass gives the 2048 pooled features (FID), the first 7 channels of `mixed_6/conv` in
the order rows, columns, channels (sFID), and the logits without their bias (Inception score). Source:
guided-diffusion's evaluations/evaluator.py.

Shape letters: B batch, S picture size.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch_fidelity.feature_extractor_inceptionv3 import BasicConv2d, FeatureExtractorInceptionV3

from sendvae_fast.errors import UserError
from sendvae_fast.evaluation.features import FeatureNetwork, Features
from sendvae_fast.evaluation.inception_file import SHA256, WHERE_FROM
from sendvae_fast.evaluation.result import FeaturesOrigin
from sendvae_fast.files import file_sha256
from sendvae_fast.models.weights import load_weights, read_weights
from sendvae_fast.ops.layout import MEMORY_FORMAT
from sendvae_fast.sampling.generate import tensor_cores

DIM, SPATIAL_CHANNELS, INPUT_PX = 2048, 7, 299
SPATIAL_DIM = SPATIAL_CHANNELS * 17 * 17
Resizing = Literal["adm", "pytorch-fid"]
NAMES = {
    "frechet": "fid",
    "spatial_frechet": "sfid",
    "frechet_infinity": "fid_infinity",
    "rfrechet": "rfid",
    **{name: name for name in ("inception_score", "precision", "recall", "kid", "mind")},
}


class InceptionFeatures(FeatureNetwork):
    """Inception of 2015 in float32, frozen; metrics are called FID and so on only with the published weights.

    Args:
        weights: local file, `WHERE_FROM`.
        resizing: ``adm``, TensorFlow's bilinear resizing within the graph and (x - 128) / 128; or ``pytorch-fid``,
            PyTorch's bilinear resizing and x / 127.5 - 1, as LightningDiT measures rFID.

    Raises:
        UserError: the file is missing, broken, or of another network.
    """

    def __init__(self, weights: str | Path, resizing: Resizing = "adm") -> None:
        state, sha256 = read_weights(weights), file_sha256(Path(weights))
        published = sha256 == SHA256
        remark = f"Inception's weights are not the published file (sha256 {SHA256[:8]}...): this is no FID"
        super().__init__(
            FeaturesOrigin(
                name="inception" if published else f"inception_{sha256[:8]}",
                dim=DIM,
                weights=str(weights),
                sha256=sha256,
            ),
            protocol=resizing,
            remarks=() if published else (remark,),
            names=NAMES if published else {},
        )
        self.resizing: Resizing = resizing
        self.network = _load(state, weights).to(memory_format=MEMORY_FORMAT)  # pyright: ignore[reportCallIssue] - as documented
        self._spatial: list[Tensor] = []
        self.network.Mixed_6d.branch1x1.register_forward_hook(
            lambda module, inputs, output: self._spatial.append(output)
        )
        self._resized: list[Tensor] = []
        self.network.Conv2d_1a_3x3.register_forward_pre_hook(lambda module, inputs: self._first_input(*inputs))

    @torch.no_grad()
    def forward(self, images: Tensor) -> Features:
        """Pooled [B, 2048], spatial [B, 2023] and logits [B, 1008] of uint8 images [B, 3, S, S], all float32."""
        self._spatial.clear()
        self._resized[:] = [images]
        with tensor_cores(False):
            pooled, logits = self.network(images)
        first = self._spatial.pop()[:, :SPATIAL_CHANNELS]
        return Features(pooled, first.permute(0, 2, 3, 1).flatten(1).float(), logits)

    def _first_input(self, resized: Tensor) -> Tensor:
        """What the first convolution sees: torch-fidelity's own resized pictures, or pytorch-fid's."""
        images = self._resized.pop()
        if self.resizing == "adm":
            return resized.contiguous(memory_format=MEMORY_FORMAT)
        size = (INPUT_PX, INPUT_PX)
        scaled = F.interpolate(images.float() / 255, size=size, mode="bilinear", align_corners=False)
        return (2 * scaled - 1).contiguous(memory_format=MEMORY_FORMAT)


def _load(state: dict[str, Tensor], path: str | Path) -> Any:
    """torch-fidelity's network with these weights and its batch norms folded into the convolutions before them."""
    # Its constructor downloads, or unpickles a file with everything in it: it gets our own copy of checked tensors.
    copy = io.BytesIO()
    torch.save({key: value for key, value in state.items() if isinstance(value, Tensor)}, copy)
    copy.seek(0)
    try:
        features = ["2048", "logits_unbiased"]
        network = FeatureExtractorInceptionV3("inception-v3-compat", features, feature_extractor_weights_path=copy)
    except RuntimeError as error:
        raise UserError(f"{path} does not hold FID's Inception; give {WHERE_FROM}") from error
    load_weights(network, state, path)  # says which weights are not finite
    for block in _blocks(network):
        block.conv, block.bn = fuse_conv_bn_eval(block.conv, block.bn), nn.Identity()
    return network


def _blocks(network: nn.Module) -> Iterator[Any]:
    return (module for module in network.modules() if isinstance(module, BasicConv2d))
