"""The alignment of stage 1's latents with a frozen foundation model: its target, loss and weight.

Shape letters: B batch, S image size, N tokens, D width of the foundation model.
"""

from __future__ import annotations

import torch
import torch._functorch.config
from torch import Tensor

from sendvae_fast.engine.distributed import Distributed
from sendvae_fast.losses.adaptive import Tap
from sendvae_fast.models.foundation.foundation import Foundation
from sendvae_fast.models.send_vae import SendVAE
from sendvae_fast.train.vae.adaptive_weight import Balance
from sendvae_fast.train.vae.alignment_methods import build_alignment_loss
from sendvae_fast.train.vae.alignment_settings import AlignmentConfig

ALIGNMENT_LIMIT = 1e8
"""Upper bound of the adaptive alignment weight's factor, VA-VAE's."""


class Aligner:
    """Aligns the mapper's features of a batch with the foundation model's, by one of `alignment_methods`.

    Args:
        config: the method and its weight, λ_align.
        foundation: the frozen foundation model.
        model: the network whose features are aligned; an adaptive weight compares gradients within it.
    """

    def __init__(
        self, config: AlignmentConfig, foundation: Foundation, model: SendVAE, distributed: Distributed
    ) -> None:
        self.foundation, self.loss, self.weight = foundation, build_alignment_loss(config), config.lambda_align
        self._balance = None
        if config.is_adaptive and model.mapper is not None:
            # Compiled blocks may free their saved tensors at the first backward pass, but here a second one follows.
            torch._functorch.config.donated_buffer = False
            self._balance = Balance(model.autoencoder.encoder.conv_out, ALIGNMENT_LIMIT, distributed)
            self._decoder, self._mapper = Tap(model.autoencoder.decoder.conv_out), Tap(model.mapper)

    def __call__(self, images: Tensor, features: Tensor, nll_gradient: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighed alignment loss, a float32 scalar with its graph, and its values to log.

        Args:
            images: uint8 [B, 3, S, S].
            features: the mapper's of the same images [B, N, D], as the engine gives them out.
            nll_gradient: gradient of pixel loss and LPIPS at the reconstruction [B, 3, S, S], which an adaptive weight
                compares with.
        """
        # An alias, so that differentiating the loss runs none of the hooks that an engine hangs on its outputs.
        features = features.view_as(features)
        loss = self.loss(features, self.foundation(images))
        weight = loss.new_full((), self.weight)
        if self._balance is not None:
            weight = weight * self._factor(self._balance, loss, features, nll_gradient)
        return weight * loss, {"align": loss, "align_weight": weight}

    def _factor(self, balance: Balance, loss: Tensor, features: Tensor, nll_gradient: Tensor) -> Tensor:
        """VA-VAE's factor, at the encoder's last layer. Graphs stay for the backward pass."""
        (at_features,) = torch.autograd.grad(loss, features, retain_graph=True)
        encoder = balance.tap
        base = encoder.gradient(self._decoder, nll_gradient)
        return balance.factor(base, encoder.gradient(self._mapper, at_features))
