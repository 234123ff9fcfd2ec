"""Weights in the layout that MAETok's authors publish, by a formula: names, shapes and numbers, no random ones."""

import torch
from torch import Tensor

SMALL = dict(image_size=32, patch_size=8, num_tokens=5, channels=3, encoder=(128, 2), decoder=(64, 1))
BASE = dict(image_size=256, patch_size=16, num_tokens=128, channels=32, encoder=(768, 12), decoder=(768, 12))
"""MAETok-B-128."""


def published_shapes(image_size, patch_size, num_tokens, channels, encoder, decoder, *, rope=True, class_token=False):
    """Names and shapes of a published checkpoint; encoder and decoder are (width, depth)."""
    num_patches = (image_size // patch_size) ** 2
    shapes = {}
    for part, (width, depth) in (("encoder", encoder), ("decoder", decoder)):
        shapes |= {f"{part}.latent_pos_embed": (1, num_tokens, width), f"{part}.mask_token": (1, 1, width)}
        if part == "encoder":
            shapes[f"{part}.latent_tokens"] = (1, num_tokens, width)
        if rope:
            shapes[f"{part}.freqs"] = (2, depth, width // 2)
            shapes |= {f"{part}.freqs_t_{axis}": (num_patches,) for axis in "xy"}
        if part == "encoder" or class_token:
            shapes[f"{part}.model.cls_token"] = (1, 1, width)
        shapes[f"{part}.model.pos_embed"] = (1, 1 + num_patches, width)
        shapes |= _layer(f"{part}.model.patch_embed.proj", width, (3, patch_size, patch_size))
        for i in range(depth):
            block = f"{part}.model.blocks.{i}"
            shapes |= _layer(f"{block}.norm1", width) | _layer(f"{block}.norm2", width)
            shapes |= _layer(f"{block}.attn.qkv", 3 * width, (width,)) | _layer(f"{block}.attn.proj", width, (width,))
            shapes |= _layer(f"{block}.mlp.fc1", 4 * width, (width,)) | _layer(f"{block}.mlp.fc2", width, (4 * width,))
            shapes |= {f"{block}.ls1.gamma": (width,), f"{block}.ls2.gamma": (width,)}
        shapes |= _layer(f"{part}.model.norm", width)
    shapes |= _layer("quant_conv", channels, encoder[:1]) | _layer("post_quant_conv", decoder[0], (channels,))
    return shapes | _layer("decoder.to_pixel.model", 3 * patch_size**2, decoder[:1])


def _layer(name, size, fan_in=()):
    return {f"{name}.weight": (size, *fan_in), f"{name}.bias": (size,)}


def filled(shapes) -> dict[str, Tensor]:
    """A sine of the place in a tensor and of the tensor's number, float64, of a size that keeps activations near 1."""
    state = {}
    for number, (name, shape) in enumerate(sorted(shapes.items())):
        count = torch.Size(shape).numel()
        fan_in = count // shape[0] if len(shape) > 1 and shape[0] > 2 else 4
        values = torch.sin(0.7 * torch.arange(count, dtype=torch.float64).square() + number) * (2 / fan_in) ** 0.5
        state[name] = values.reshape(shape)
    return state


def picture(image_size) -> Tensor:
    """Float64 [1, 3, S, S] in [-1, 1]."""
    places = torch.arange(3 * image_size**2, dtype=torch.float64)
    return torch.sin(0.3 * places + 1e-4 * places.square()).reshape(1, 3, image_size, image_size)
