"""SiT, REPA's and LightningDiT's forward pass, written from their papers and fact sheet for tests to compare with."""

import math

import torch
from torch import Tensor


def plain_sit(state: dict[str, Tensor], z_t: Tensor, t: Tensor, labels: Tensor, *, num_heads: int, repa_block: int = 0):
    """Velocity and projected features (None without `repa_block`); token by token where that is simplest.

    The switches are read off the parameter names. With learned sigma its half of the output is thrown away. Latents in
    one row are a sequence.
    """

    def linear(x, name):
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def silu(x):
        return x / (1 + torch.exp(-x))

    def layer_norm(x, eps=1e-6):
        centred = x - x.mean(-1, keepdim=True)
        return centred / torch.sqrt(centred.pow(2).mean(-1, keepdim=True) + eps)

    def norm(x, name):
        if f"{name}.weight" not in state:
            return layer_norm(x)
        return x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * state[f"{name}.weight"]

    def head_norm(x, name):
        if f"{name}.bias" in state:
            return layer_norm(x, eps=1e-5) * state[f"{name}.weight"] + state[f"{name}.bias"]
        return norm(x, name) if f"{name}.weight" in state else x

    def rotate(x):
        """[B, N, d] as d / 2 complex numbers: the first half turned by the token's row, the second by its column.

        In a sequence all are turned by the token's number.
        """
        half = x.shape[-1] // 2
        angles = [
            [position / 10000 ** (2 * i / half) for position in (n // columns, n % columns) for i in range(half // 2)]
            for n in range(x.shape[1])
        ]
        if rows == 1:
            angles = [[n / 10000 ** (i / half) for i in range(half)] for n in range(x.shape[1])]
        turns = torch.exp(1j * torch.tensor(angles, dtype=torch.float64))
        pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * turns).flatten(-2).to(x.dtype)

    kernel = state["x_embedder.proj.weight"]
    channels, patch = kernel.shape[1:3]
    rows, columns = z_t.shape[-2] // patch, z_t.shape[-1] // patch
    tokens = []
    for row in range(rows):
        for column in range(columns):
            part = z_t[:, :, row * patch : (row + 1) * patch, column * patch : (column + 1) * patch]
            tokens.append(part.flatten(1) @ kernel.flatten(1).T + state["x_embedder.proj.bias"])
    x = torch.stack(tokens, 1) + state["pos_embed"]

    frequencies = torch.tensor([10000 ** (-i / 128) for i in range(128)], dtype=torch.float64)
    angles = t.double()[:, None] * frequencies
    sinusoid = torch.cat([torch.cos(angles), torch.sin(angles)], 1).to(x.dtype)
    condition = linear(silu(linear(sinusoid, "t_embedder.mlp.0")), "t_embedder.mlp.2")
    condition = condition + state["y_embedder.embedding_table.weight"][labels]

    features, index = None, 0
    while f"blocks.{index}.attn.qkv.weight" in state:
        block = f"blocks.{index}"
        modulation = linear(silu(condition), f"{block}.adaLN_modulation.1")[:, None]
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = torch.tensor_split(modulation, 6, dim=-1)
        h = norm(x, f"{block}.norm1") * (1 + scale_a) + shift_a
        q, k, v = torch.tensor_split(linear(h, f"{block}.attn.qkv"), 3, dim=-1)
        attended = []
        for q_h, k_h, v_h in zip(*(torch.tensor_split(part, num_heads, dim=-1) for part in (q, k, v)), strict=True):
            q_h, k_h = head_norm(q_h, f"{block}.attn.q_norm"), head_norm(k_h, f"{block}.attn.k_norm")
            if "feat_rope.freqs_cos" in state:
                q_h, k_h = rotate(q_h), rotate(k_h)
            scores = torch.einsum("bnd,bmd->bnm", q_h, k_h) / math.sqrt(q_h.shape[-1])
            attended.append(torch.softmax(scores, -1) @ v_h)
        x = x + gate_a * linear(torch.cat(attended, -1), f"{block}.attn.proj")
        h = norm(x, f"{block}.norm2") * (1 + scale_m) + shift_m
        if f"{block}.mlp.w12.weight" in state:
            a, b = torch.tensor_split(linear(h, f"{block}.mlp.w12"), 2, dim=-1)
            h = linear(silu(a) * b, f"{block}.mlp.w3")
        else:
            h = linear(h, f"{block}.mlp.fc1")
            h = 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
            h = linear(h, f"{block}.mlp.fc2")
        x = x + gate_m * h
        index += 1
        if index == repa_block:
            h = silu(linear(x, "projectors.0.0"))
            features = linear(silu(linear(h, "projectors.0.2")), "projectors.0.4")

    shift, scale = torch.tensor_split(linear(silu(condition), "final_layer.adaLN_modulation.1")[:, None], 2, dim=-1)
    x = linear(norm(x, "final_layer.norm_final") * (1 + scale) + shift, "final_layer.linear")
    velocity = torch.zeros_like(z_t)
    for n in range(rows * columns):
        top, left = n // columns * patch, n % columns * patch
        pixels = x[:, n].reshape(len(x), patch, patch, -1).permute(0, 3, 1, 2)  # channels, then their sigmas if learned
        velocity[:, :, top : top + patch, left : left + patch] = pixels[:, :channels]
    return velocity, features
