"""Imports DeepSpeed as the engine does, on a CPU."""

import torch

from sendvae_fast.engine.deepspeed_private import import_deepspeed

import_deepspeed(torch.device("cpu"))
