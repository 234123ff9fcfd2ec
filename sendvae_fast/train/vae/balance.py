"""The adaptive weights of stage 1: how much of the GAN and of the alignment balances reconstruction and LPIPS.

Gradients are averaged over ranks before their norms are compared, so that the weights, like the step, do not depend on
the number of ranks. With gradient accumulation each micro-batch has its own.
"""

from __future__ import annotations

import torch
import torch._functorch.config
from torch import Tensor

from sendvae_fast.engine.distributed import Distributed
from sendvae_fast.losses.adaptive import Tap, adaptive_weight
from sendvae_fast.models.send_vae import SendVAE
from sendvae_fast.train.vae.settings import VAETrainConfig

GAN_LIMIT, ALIGNMENT_LIMIT = 1e4, 1e8
"""Upper bounds of the weights, VQGAN's and VA-VAE's."""


class GradientBalance:
    """Adaptive factors of losses, from gradients at the pictures [B, 3, S, S] and at the mapper's features.

    `nll_gradient` is that of reconstruction and LPIPS at the pictures, which both factors compare with.
    """

    def __init__(self, model: SendVAE, config: VAETrainConfig, distributed: Distributed) -> None:
        self._distributed = distributed
        self._decoder = self._encoder = self._mapper = None
        if config.loss.gan_adaptive or config.alignment.is_adaptive:
            self._decoder = Tap(model.autoencoder.decoder.conv_out)
        self._is_gan_adaptive = config.loss.gan_adaptive
        if config.alignment.is_adaptive:
            # Compiled blocks may give away what they have saved at their first backward pass: here is a second one.
            torch._functorch.config.donated_buffer = False
            self._encoder, self._mapper = Tap(model.autoencoder.encoder.conv_out), Tap(model.mapper)

    def of_gan(self, nll_gradient: Tensor, gan_gradient: Tensor) -> Tensor | float:
        """VQGAN's factor of the generator's loss, at the decoder's last layer; 1 unless `loss.gan_adaptive`."""
        if not self._is_gan_adaptive:
            return 1.0
        return self._ratio(self._decoder, nll_gradient, gan_gradient, GAN_LIMIT)

    def of_alignment(self, nll_gradient: Tensor, loss: Tensor, features: Tensor) -> Tensor | float:
        """VA-VAE's factor of the alignment, at the encoder's last layer; 1 unless the method is adaptive.

        `loss` is a function of `features`, which are an alias of the engine's output (``output.view_as(output)``), so
        that differentiating runs none of the engine's hooks. Graphs stay for the backward pass.
        """
        if self._encoder is None:
            return 1.0
        (at_features,) = torch.autograd.grad(loss, features, retain_graph=True)
        base = self._encoder.gradient(self._decoder, nll_gradient)
        own = self._encoder.gradient(self._mapper, at_features)
        return self._ratio(self._encoder, base, own, ALIGNMENT_LIMIT)

    def _ratio(self, layer: Tap, base: Tensor, own: Tensor, limit: float) -> Tensor:
        mean = self._distributed.all_reduce_mean
        return adaptive_weight(*(mean(layer.weight_gradient(part)) for part in (base, own)), limit)
