"""A whole optimizer step, norm and clipping included: global_norm and adamw_ema_ together, on SiT-XL's parameters.

Not compiled by torch.compile: it takes minutes for hundreds of tensors.
"""

import torch
from torch.optim.adamw import adamw

from bench.kernel_cases.case import KernelCase, random_normal
from sendvae_fast.models.sit.sit import SiT
from sendvae_fast.models.sit.sizes import SiTConfig
from sendvae_fast.ops import adamw_ema_, global_norm

LR, BETAS, EPS, WEIGHT_DECAY, EMA_DECAY, MAX_GRAD_NORM = 1e-4, (0.9, 0.999), 1e-8, 0.01, 0.9999, 1.0
FEW_AND_MANY = [torch.Size((4,))], [torch.Size((4,))] * 200
BYTES_PER_PARAMETER = 40  # the norm reads g; the update reads p, g, m, v, ema and writes all of them but g


def cases(device: torch.device) -> list[KernelCase]:
    return [case(device, *parameter_shapes(device))]


def nearly_empty(device: torch.device) -> list[KernelCase]:
    return [case(device, "4 numbers each", shapes) for shapes in FEW_AND_MANY]


def case(device: torch.device, name: str, shapes: list[torch.Size]) -> KernelCase:
    def inputs(number):
        def draw(index):
            return [
                random_normal(*shape, number=(number * 5 + index) * len(shapes) + i, dtype=torch.float32, device=device)
                for i, shape in enumerate(shapes)
            ]

        params, grads, exp_avg, ema = (draw(index) for index in range(4))
        exp_avg_sq = [x.square_() for x in draw(4)]
        steps = [torch.tensor(100, device=device) for _ in shapes]
        # PyTorch's own step counts: on the CPU for its foreach form, on the device for its fused one.
        float_steps = {"cpu": [torch.tensor(100.0) for _ in shapes], "device": [step.float() for step in steps]}
        return params, grads, exp_avg, exp_avg_sq, ema, steps, float_steps

    return KernelCase(
        name=f"{name}, {len(shapes)} tensors, fp32",
        inputs=inputs,
        eager=foreach_form,
        fused=fused,
        forward_bytes=BYTES_PER_PARAMETER * sum(map(torch.Size.numel, shapes)),
        compiles=False,
        yardsticks={"fused AdamW + foreach EMA + clip": fused_adamw_form},
    )


def parameter_shapes(device: torch.device) -> tuple[str, list[torch.Size]]:
    """A model's name and its parameters' shapes; on the CPU a small stand-in."""
    if device.type == "cpu":
        return "10M", [torch.Size((250, 200))] * 200
    config = SiTConfig.preset("SiT-XL/1", latent_size=16, latent_channels=32, num_classes=1000, repa_dim=768)
    with torch.device("meta"):
        return "SiT-XL/1", [param.shape for param in SiT(config).parameters()]


def fused(params, grads, exp_avg, exp_avg_sq, ema, steps, _):
    adamw_ema_(
        params, grads, exp_avg, exp_avg_sq, ema, steps,
        lr=LR, betas=BETAS, eps=EPS, weight_decay=WEIGHT_DECAY, ema_decay=EMA_DECAY,
        grad_norm=global_norm(grads), max_grad_norm=MAX_GRAD_NORM,
    )  # fmt: skip
    return *params, *exp_avg, *exp_avg_sq, *ema


def foreach_form(*lists_and_steps):
    *lists, _, float_steps = lists_and_steps
    return by_pytorch(*lists, float_steps["cpu"], foreach=True)  # pyright: ignore[reportCallIssue] - five lists


def fused_adamw_form(*lists_and_steps):
    *lists, _, float_steps = lists_and_steps
    return by_pytorch(*lists, float_steps["device"], fused=True)  # pyright: ignore[reportCallIssue] - five lists


def by_pytorch(params, grads, exp_avg, exp_avg_sq, ema, steps, **form):
    norm = torch.nn.utils.get_total_norm(grads)
    torch._foreach_mul_(grads, (MAX_GRAD_NORM / (norm + 1e-6)).clamp_max(1.0))
    adamw(
        params, grads, exp_avg, exp_avg_sq, [], steps, **form,
        amsgrad=False, beta1=BETAS[0], beta2=BETAS[1], lr=LR, weight_decay=WEIGHT_DECAY, eps=EPS, maximize=False,
    )  # fmt: skip
    torch._foreach_lerp_(ema, params, 1.0 - EMA_DECAY)
    return *params, *exp_avg, *exp_avg_sq, *ema
