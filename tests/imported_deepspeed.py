"""Imports DeepSpeed as the engine does, on a CPU, and what its first engine imports: an optimizer, and so Inductor."""

import importlib

import torch

from sendvae_fast.engine.deepspeed_private import import_deepspeed

import_deepspeed(torch.device("cpu"))
importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
