"""A vision transformer and its preprocessing written out plainly, as the truth for foundation models: float64, named
tensors and matrix products, nothing of timm or of the package.

Names are those of DINOv2's release, which MAE and I-JEPA share; the layouts of other releases are made from them.
"""

import math

import torch
from torch import Tensor

WIDTH, DEPTH, HEADS = 48, 2, 4
NETWORK = {"embed_dim": WIDTH, "depth": DEPTH, "num_heads": HEADS}  # of timm's networks, to be as small


def random_weights(patch, prefix_positions, grid, hidden=4 * WIDTH, swiglu=False, layer_scale=False):
    """Weights in DINOv2's names; `prefix_positions` of the learned positions (None: there are none) are the class's."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"patch_embed.proj.weight": (WIDTH, 3, patch, patch), "patch_embed.proj.bias": (WIDTH,)}
    if prefix_positions is not None:
        shapes["pos_embed"] = (1, prefix_positions + grid**2, WIDTH)
    for i in range(DEPTH):
        linear = {"attn.qkv": (3 * WIDTH, WIDTH), "attn.proj": (WIDTH, WIDTH)}
        if swiglu:
            linear |= {"mlp.w12": (2 * hidden, WIDTH), "mlp.w3": (WIDTH, hidden)}
        else:
            linear |= {"mlp.fc1": (hidden, WIDTH), "mlp.fc2": (WIDTH, hidden)}
        for name, shape in linear.items():
            shapes |= {f"blocks.{i}.{name}.weight": shape, f"blocks.{i}.{name}.bias": shape[:1]}
        vectors = ["norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias"]
        vectors += ["ls1.gamma", "ls2.gamma"] if layer_scale else []
        shapes |= {f"blocks.{i}.{name}": (WIDTH,) for name in vectors}
    shapes |= {"norm.weight": (WIDTH,), "norm.bias": (WIDTH,)}
    return {name: _random(shape, generator) for name, shape in shapes.items()}


def random_token(count=1, seed=1):
    """Class or register tokens, [1, count, WIDTH]."""
    return torch.randn(1, count, WIDTH, generator=torch.Generator().manual_seed(seed))


def _random(shape, generator):
    """Of a size that keeps activations near one, whatever the layer."""
    fan_in = math.prod(shape[1:]) if len(shape) > 1 else 4
    return torch.randn(shape, generator=generator) / fan_in**0.5


def patch_tokens(weights, x, grid, *, prefix=(), activation, eps, norm_pre=False, final_norm=True, periods=None):
    """Patch tokens [B, grid ** 2, WIDTH] after the last block of normalised images [B, 3, S, S].

    `prefix`: pairs of the tokens before the patches [1, n, WIDTH] and whether they have a learned position. `periods`:
    of DINOv3's rotary positions.
    """
    w = {name: value.double() for name, value in weights.items()}
    kernel = w["patch_embed.proj.weight"]
    patch = kernel.shape[-1]
    patches = x.double().unfold(2, patch, patch).unfold(3, patch, patch)  # [B, 3, grid, grid, patch, patch]
    h = torch.einsum("bcyxij,dcij->byxd", patches, kernel).flatten(1, 2) + w.get("patch_embed.proj.bias", 0)
    positions = w.get("pos_embed", torch.zeros(1, grid**2, WIDTH, dtype=torch.float64))
    own = sum(tokens.shape[1] for tokens, has_position in prefix if has_position)
    h = h + _resized_positions(positions[:, own:], grid)
    tokens = [t.double() + (positions[:, :own] if has else 0) for t, has in prefix]
    h = torch.cat([*(t.expand(len(x), -1, -1) for t in tokens), h], dim=1)
    num_prefix = h.shape[1] - grid**2
    rotation = None if periods is None else _rotation(grid, periods.double())
    h = _norm(h, w, "norm_pre", eps) if norm_pre else h
    for i in range(DEPTH):
        block = {name.removeprefix(f"blocks.{i}."): t for name, t in w.items() if name.startswith(f"blocks.{i}.")}
        h = h + block.get("ls1.gamma", 1) * _attention(_norm(h, block, "norm1", eps), block, rotation, num_prefix)
        h = h + block.get("ls2.gamma", 1) * _mlp(_norm(h, block, "norm2", eps), block, activation)
    h = _norm(h, w, "norm", eps) if final_norm else h
    return h[:, num_prefix:].float()


def _linear(x, w, name):
    return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0)


def _norm(x, w, name, eps):
    x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]


def _attention(x, w, rotation, num_prefix):
    q, k, v = _linear(x, w, "attn.qkv").unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)  # [B, heads, N, d]
    if rotation is not None:
        q, k = _rotated(q, rotation, num_prefix), _rotated(k, rotation, num_prefix)
    scores = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
    return _linear((scores @ v).transpose(1, 2).flatten(2), w, "attn.proj")


def _mlp(x, w, activation):
    if "mlp.w12.weight" in w:
        gate, value = _linear(x, w, "mlp.w12").chunk(2, dim=-1)
        return _linear(gate * gate.sigmoid() * value, w, "mlp.w3")
    return _linear(activation(_linear(x, w, "mlp.fc1")), w, "mlp.fc2")


def gelu(x):
    return 0.5 * x * (1 + torch.erf(x / 2**0.5))


def gelu_tanh(x):
    return 0.5 * x * (1 + torch.tanh((2 / math.pi) ** 0.5 * (x + 0.044715 * x**3)))


def quick_gelu(x):
    return x * torch.sigmoid(1.702 * x)


def _rotation(grid, periods):
    """DINOv3's angles [grid ** 2, d / 2]: patch centres in -1..1, rows then columns, over each period."""
    centres = (torch.arange(grid, dtype=torch.float64) + 0.5) / grid * 2 - 1
    y, x = torch.meshgrid(centres, centres, indexing="ij")
    return torch.cat([2 * math.pi * c.flatten()[:, None] / periods for c in (y, x)], dim=1)


def _rotated(x, angles, num_prefix):
    first, second = x[:, :, num_prefix:].chunk(2, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return torch.cat([x[:, :, :num_prefix], turned], dim=2)


def _resized_positions(positions, grid):
    """Learned positions [1, n ** 2, D] for another grid, bicubic with antialiasing."""
    old = math.isqrt(positions.shape[1])
    if old == grid:
        return positions
    m = resampling(old, grid, "bicubic", antialias=True)
    square = positions.reshape(old, old, -1)
    return torch.einsum("yi,xj,ijd->yxd", m, m, square).reshape(1, grid**2, -1)


def preprocessed(images: Tensor, size, mean, std, interpolation="bicubic", antialias=False):
    """uint8 [B, 3, S, S] to normalised float64 [B, 3, size, size]: /255, resize, mean and standard deviation."""
    m = resampling(images.shape[-1], size, interpolation, antialias)
    x = torch.einsum("yi,xj,bcij->bcyx", m, m, images.double() / 255)
    mean, std = (torch.tensor(v, dtype=torch.float64).reshape(3, 1, 1) for v in (mean, std))
    return (x - mean) / std


def resampling(old, new, interpolation, antialias):
    """The matrix [new, old] of a resampling. With antialiasing the kernel is as wide as the step and does not leave the
    image; without it, the image's border pixels go on outside."""
    step = old / new
    stretch = max(step, 1.0) if antialias else 1.0
    radius = {"bicubic": 2, "bilinear": 1}[interpolation]
    sharpness = -0.5 if antialias else -0.75
    matrix = torch.zeros(new, old, dtype=torch.float64)
    for i in range(new):
        centre = (i + 0.5) * step - 0.5
        reach = math.ceil(radius * stretch)
        for j in range(math.floor(centre) - reach, math.ceil(centre) + reach + 1):
            distance = abs(j - centre) / stretch
            weight = max(0.0, 1 - distance) if interpolation == "bilinear" else _cubic(distance, sharpness)
            if antialias and not 0 <= j < old:
                continue
            matrix[i, min(max(j, 0), old - 1)] += weight
    return matrix / matrix.sum(1, keepdim=True)


def _cubic(t, a):
    """Keys' cubic convolution."""
    if t < 1:
        return (a + 2) * t**3 - (a + 3) * t**2 + 1
    return a * (t**3 - 5 * t**2 + 8 * t - 4) if t < 2 else 0.0
