"""What every engine must do, as functions that run alike on one rank and on each of two ranks.

The truth is a plain PyTorch loop over the whole batch in fp64; the tolerance is that of the same loop in fp32.
"""

import copy
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from sendvae_fast.engine.build import build_engine
from sendvae_fast.engine.distributed import init_distributed
from sendvae_fast.engine.engine import Engine
from sendvae_fast.engine.settings import EngineConfig, OptimizerConfig
from sendvae_fast.engine.snapshot import Snapshot
from sendvae_fast.engine.streams import HostMemory
from sendvae_fast.errors import UserError

KINDS = ("model", "ema", "exp_avg", "exp_avg_sq")
ENGINES = {
    "ddp": {"name": "ddp"},
    **{f"zero{stage}": {"name": "deepspeed", "zero_stage": stage} for stage in range(4)},
}
OPTIMIZER = {"learning_rate": 3e-3, "weight_decay": 0.1, "ema_decay": 0.9, "max_grad_norm": 0.05}
GLOBAL_BATCH = 8


class Network(nn.Module):
    """The middle layer is above the size (1e5) from which ZeRO 3 splits a parameter; one parameter is not trained."""

    def __init__(self, batch_norm: bool = False) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(6, 320), nn.Linear(320, 320), nn.Linear(320, 3)
        self.norm = nn.BatchNorm1d(320) if batch_norm else nn.Identity()
        self.fixed = nn.Parameter(torch.linspace(-1, 1, 320), requires_grad=False)

    def forward(self, x):  # [B, 6] -> [B, 3]
        hidden = torch.tanh(self.first(x)) + self.fixed
        return self.last(torch.tanh(self.norm(self.middle(hidden))))


def make_network(seed: int = 0, **options) -> Network:
    torch.manual_seed(seed)
    return Network(**options)


def make_engine(kind: str, network: nn.Module, optimizer: dict = OPTIMIZER, **options) -> Engine:
    config = EngineConfig(**ENGINES[kind], **options)
    return build_engine(network, OptimizerConfig(**optimizer), config, init_distributed("cpu"))


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The whole batch of a step: x [8, 6], y [8, 3] fp64."""
    generator = torch.Generator().manual_seed(100 + step)
    x = torch.randn(GLOBAL_BATCH, 6, generator=generator, dtype=torch.float64)
    return x, torch.stack([x.sum(1).sin(), x[:, 0] * x[:, 1], x[:, 2]], dim=1)


def local(tensor: torch.Tensor, parts: int = 1, part: int = 0) -> torch.Tensor:
    """This rank's share of one micro-batch of the whole batch."""
    ranks = init_distributed("cpu")
    return tensor.chunk(parts)[part].chunk(ranks.world_size)[ranks.rank].float().to(ranks.device)


def train(engine: Engine, steps: range) -> list:
    results, parts = [], engine.config.accumulation_steps
    for step in steps:
        x, y = batch(step)
        for part in range(parts):
            engine.backward((engine(local(x, parts, part)) - local(y, parts, part)).square().mean())
        results.append(engine.step())
    return results


def save(engine: Engine, folder: Path, **options) -> None:
    """An engine's own files of a checkpoint."""
    snapshot = Snapshot(HostMemory())
    write = engine.snapshot(snapshot, **options)
    snapshot.wait()
    write(folder)


def states(engine: Engine) -> dict[str, dict[str, torch.Tensor]]:
    return {kind: engine.full_state(kind) for kind in KINDS}


def assert_equal(actual: dict[str, dict], wanted: dict[str, dict]) -> None:
    """Bit for bit."""
    for kind in KINDS:
        assert actual[kind].keys() == wanted[kind].keys()
        for name in wanted[kind]:
            assert torch.equal(actual[kind][name], wanted[kind][name]), (kind, name)


def plain_loop(network: nn.Module, dtype: torch.dtype, steps: int) -> tuple[dict[str, dict], list[float]]:
    """The same training by torch.optim.AdamW and an EMA by hand; states and gradient norms."""
    network = copy.deepcopy(network).to(dtype)
    trained = {name: param for name, param in network.named_parameters() if param.requires_grad}
    optimizer = torch.optim.AdamW(
        trained.values(), lr=OPTIMIZER["learning_rate"], weight_decay=OPTIMIZER["weight_decay"]
    )
    ema = {name: value.clone() for name, value in network.state_dict().items()}
    norms = []
    for step in range(steps):
        x, y = (tensor.to(dtype) for tensor in batch(step))
        optimizer.zero_grad()
        (network(x) - y).square().mean().backward()
        norms.append(nn.utils.clip_grad_norm_(trained.values(), OPTIMIZER["max_grad_norm"]).item())
        optimizer.step()
        for name, param in trained.items():
            ema[name].mul_(OPTIMIZER["ema_decay"]).add_(param.detach(), alpha=1 - OPTIMIZER["ema_decay"])
    moments = {
        key: {name: optimizer.state[param][key] for name, param in trained.items()} for key in ("exp_avg", "exp_avg_sq")
    }
    return {"model": network.state_dict(), "ema": ema, **moments}, norms


def distance(actual: dict[str, torch.Tensor], truth: dict[str, torch.Tensor]) -> float:
    return sum((actual[name].double() - truth[name].double()).square().sum().item() for name in truth) ** 0.5


def equals_plain_loop(kind: str, folder: Path, accumulation_steps: int = 1) -> None:
    steps = 5
    engine = make_engine(kind, make_network(), accumulation_steps=accumulation_steps)
    results = train(engine, range(steps))
    truth, norms = plain_loop(make_network(), torch.float64, steps)
    fp32, _ = plain_loop(make_network(), torch.float32, steps)
    actual = states(engine)
    for key in KINDS:
        assert actual[key].keys() == truth[key].keys()
        assert all(tensor.device.type == "cpu" and tensor.dtype == torch.float32 for tensor in actual[key].values())
        assert distance(actual[key], truth[key]) <= 2 * distance(fp32[key], truth[key]), key
    for result, norm in zip(results, norms, strict=True):
        assert not result.skipped and abs(result.grad_norm - norm) <= 1e-5 * norm
        assert norm > OPTIMIZER["max_grad_norm"], "clipping is not tested"
    assert engine.num_updates == steps and engine.num_skipped == 0
    engine.close()


def counts_backward_passes(kind: str, folder: Path) -> None:
    """A step needs as many backward passes as the configuration says, no fewer and no more."""
    engine = make_engine(kind, make_network(), accumulation_steps=2)
    x, y = (local(tensor) for tensor in batch(0))
    for num_backward in (1, 3):
        for _ in range(num_backward):
            engine.backward((engine(x) - y).square().mean())
        with pytest.raises(RuntimeError, match=f"step after {num_backward} backward passes; accumulation_steps is 2"):
            engine.step()
        engine.close()
        engine = make_engine(kind, make_network(), accumulation_steps=2)
    engine.close()


def accumulates(kind: str, folder: Path) -> None:
    equals_plain_loop(kind, folder, accumulation_steps=2)


def resumes_bit_for_bit(kind: str, folder: Path) -> None:
    straight = make_engine(kind, make_network(batch_norm=True))
    train(straight, range(2))
    weights = straight.full_state("model")
    save(straight, folder / "half")
    init_distributed("cpu").barrier()
    results = train(straight, range(2, 5))

    resumed = make_engine(kind, make_network(seed=1, batch_norm=True))
    train(resumed, range(1))
    resumed.load_model(weights)
    resumed.load(folder / "half")
    assert resumed.num_updates == 2
    assert train(resumed, range(2, 5)) == results
    assert_equal(states(resumed), states(straight))
    straight.close()
    resumed.close()


def save_for_others(kind: str, folder: Path) -> None:
    """Leaves a save and, beside it, the full state it must load as and the weights one step later."""
    engine = make_engine(kind, make_network())
    train(engine, range(2))
    save(engine, folder / "engine")
    truth = states(engine)
    train(engine, range(2, 3))
    truth["next"] = engine.full_state("model")
    if init_distributed("cpu").is_main:
        save_file({f"{key}/{name}": t for key, part in truth.items() for name, t in part.items()}, folder / "truth")
    init_distributed("cpu").barrier()
    engine.close()


def saves_what_it_holds(kind: str, folder: Path) -> None:
    """Of w ranks each writes a w-th of the state; and kinds that the caller keeps are left out and given back."""
    engine, ranks = make_engine(kind, make_network()), init_distributed("cpu")
    train(engine, range(2))
    truth = states(engine)
    save(engine, folder / "whole")
    save(engine, folder / "without", beside=("ema",))
    ranks.barrier()
    sizes = [[sum(value.numel() for value in load_file(folder / name / f"optimizer_rank{rank}.safetensors").values())
              for rank in range(ranks.world_size)] for name in ("whole", "without")]  # fmt: skip
    trained = sum(param.numel() for param in make_network().parameters() if param.requires_grad)
    assert [sum(of_ranks) for of_ranks in sizes] == [3 * trained, 2 * trained]
    if kind in ("zero1", "zero2", "zero3"):
        assert max(sizes[0]) - min(sizes[0]) <= 3 * 16 * ranks.world_size, "more than the padding of ZeRO's parts"
    train(engine, range(2, 3))
    engine.load_model(truth["model"])
    engine.load(folder / "without", beside={"ema": truth["ema"], "model": truth["model"]})
    assert_equal(states(engine), truth)
    engine.load(folder / "whole", beside={"ema": truth["model"]})  # its own averages
    assert_equal(states(engine), truth)
    with pytest.raises(UserError, match="missing ema/"):
        engine.load(folder / "without")
    engine.close()


def load_from_others(kind: str, folder: Path) -> None:
    saved = load_file(folder / "truth")
    truth = {
        key: {n.split("/", 1)[1]: t for n, t in saved.items() if n.startswith(key + "/")} for key in (*KINDS, "next")
    }
    engine = make_engine(kind, make_network(seed=1))
    engine.load_model(truth["model"])
    engine.load(folder / "engine")
    assert engine.num_updates == 2
    assert_equal(states(engine), truth)
    # What was loaded is what trains on. Only the order of summation over ranks may differ.
    train(engine, range(2, 3))
    moved = distance(truth["model"], truth["next"])
    assert distance(engine.full_state("model"), truth["next"]) < 1e-4 * moved
    engine.close()


def skips_nan_everywhere(kind: str, folder: Path) -> None:
    engine = make_engine(kind, make_network(batch_norm=True))
    train(engine, range(2))
    before, ranks = states(engine), init_distributed("cpu")
    x, y = batch(2)
    x, y = local(x), local(y)
    if ranks.rank == ranks.world_size - 1:
        x[0, 0] = float("nan")
    engine.backward((engine(x) - y).square().mean())
    result = engine.step()
    assert result.skipped and engine.num_skipped == 1 and engine.num_updates == 2
    engine.backward((engine(x) - y).square().mean())
    engine.see(engine.queue_step())  # and the host looks no further
    assert result.grad_norm != result.grad_norm or result.grad_norm == float("inf")
    assert_equal(states(engine), before)

    unbroken = make_engine(kind, make_network(batch_norm=True))
    train(unbroken, range(2))
    assert train(engine, range(3, 5)) == train(unbroken, range(3, 5))
    assert_equal(states(engine), states(unbroken))
    assert engine.num_skipped == 2
    engine.close()
    unbroken.close()


def statistics_agree(kind: str, folder: Path) -> None:
    """Batch-norm running statistics are the average of the ranks'."""
    network = make_network(batch_norm=True)
    means = []
    for part in range(init_distributed("cpu").world_size):
        one = copy.deepcopy(network)
        one(batch(0)[0].chunk(init_distributed("cpu").world_size)[part].float())
        means.append(one.norm.running_mean)
    engine = make_engine(kind, network)
    train(engine, range(1))
    torch.testing.assert_close(engine.full_state("model")["norm.running_mean"], torch.stack(means).mean(0))
    everyone = init_distributed("cpu").gather_objects(engine.full_state("model"))
    assert all(torch.equal(everyone[0][name], other[name]) for other in everyone for name in other)
    engine.close()


def generator_loss(fake_logits: torch.Tensor) -> torch.Tensor:
    return -fake_logits.mean()


def critic_loss(fake_logits: torch.Tensor, real_logits: torch.Tensor) -> torch.Tensor:
    return torch.relu(1 + fake_logits).mean() + torch.relu(1 - real_logits).mean()


def make_critic() -> nn.Module:
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(3, 320), nn.Tanh(), nn.Linear(320, 320), nn.Tanh(), nn.Linear(320, 1))


def plain_game(dtype: torch.dtype, steps: int) -> list[dict[str, torch.Tensor]]:
    """Weights of generator and critic after playing in plain PyTorch."""
    networks = [make_network().to(dtype), make_critic().to(dtype)]
    optimizers = [
        torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], lr=1e-3, weight_decay=0)
        for network in networks
    ]
    for step in range(steps):
        x, y = (tensor.to(dtype) for tensor in batch(step))
        fake = networks[0](x)
        generator_loss(networks[1](fake)).backward()
        optimizers[1].zero_grad()
        critic_loss(networks[1](fake.detach()), networks[1](y)).backward()
        for optimizer in optimizers:
            optimizer.step()
        for optimizer in optimizers:
            optimizer.zero_grad()
    return [network.state_dict() for network in networks]


def two_engines_play(kind: str, folder: Path) -> None:
    """A GAN whose players learn from one forward of the critic on the fake, as plain PyTorch's do from two."""
    settings = {"learning_rate": 1e-3, "max_grad_norm": 0.0}
    generator = make_engine(kind, make_network(), settings)
    if kind == "zero3":
        splits_parameters = make_engine(kind, make_critic(), settings)
        with pytest.raises(ValueError, match="ZeRO stage 3"):
            splits_parameters.input_gradient(local(batch(0)[1]), generator_loss)
        splits_parameters.close()
        kind = "zero2"
    critic = make_engine(kind, make_critic(), settings)
    for step in range(3):
        x, y = (local(tensor) for tensor in batch(step))
        fake = generator(x)
        logits, gradient = critic.input_gradient(fake, generator_loss)
        assert all(param.grad is None for param in critic.module.parameters())
        critic.backward(critic_loss(logits, critic(y)))
        assert not critic.step().skipped
        generator.backward((fake * gradient).sum())
        assert not generator.step().skipped
    truths, fp32s = plain_game(torch.float64, 3), plain_game(torch.float32, 3)
    for engine, truth, fp32 in zip((generator, critic), truths, fp32s, strict=True):
        error, plain_error = distance(engine.full_state("model"), truth), distance(fp32, truth)
        assert error <= 2 * plain_error, (error, plain_error)
        assert "ema" not in engine.state_keys
    assert plain_error < 1e-2 * distance(make_critic().state_dict(), truth)
    generator.close()
    critic.close()


def autocasts(kind: str, folder: Path) -> None:
    """bf16 computes in bfloat16 and keeps everything that lasts in fp32."""
    engine = make_engine(kind, make_network(), precision="bf16")
    assert engine(local(batch(0)[0])).dtype == torch.bfloat16
    train(engine, range(3))
    actual, (truth, _) = states(engine), plain_loop(make_network(), torch.float64, 3)
    assert all(tensor.dtype == torch.float32 for part in actual.values() for tensor in part.values())
    moved = distance(make_network().state_dict(), truth["model"])
    assert 1e-6 * moved < distance(actual["model"], truth["model"]) < 0.2 * moved
    engine.close()


def refuses_wrong_weights(kind: str, folder: Path) -> None:
    engine = make_engine(kind, make_network())
    weights, before = engine.full_state("model"), states(engine)
    for wrong, hint in (
        ({name: tensor for name, tensor in weights.items() if name != "last.bias"}, "missing last.bias"),
        ({**weights, "head.weight": torch.zeros(1)}, "unexpected head.weight"),
        ({**weights, "last.bias": torch.zeros(4)}, "last.bias has shape [4] and the model wants [3]"),
    ):
        with pytest.raises(UserError, match=re.escape(hint)):
            engine.load_model(wrong)
    assert_equal(states(engine), before)
    engine.close()


def accumulating_costs_no_communication(kind: str, folder: Path) -> None:
    """Ranks talk once a step, however many backward passes it has; at stages 2 and 3 that is not so (they split)."""
    if kind in ("zero2", "zero3"):
        return
    counts = []
    for accumulation_steps in (1, 3):
        engine = make_engine(kind, make_network(), accumulation_steps=accumulation_steps)
        parts = [local(tensor) for tensor in batch(0)]

        def step(engine=engine, parts=parts):
            for _ in range(engine.config.accumulation_steps):
                engine.backward((engine(parts[0]) - parts[1]).square().mean())
            engine.step()

        for _ in range(2):  # DDP arranges its buckets in the second
            step()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            step()
        counts.append(sum(event.name.startswith("c10d::") for event in profiler.events()))
        engine.close()
    assert counts[0] == counts[1] and (counts[0] > 0 or init_distributed("cpu").world_size == 1), counts


CASES = [
    equals_plain_loop,
    accumulates,
    counts_backward_passes,
    accumulating_costs_no_communication,
    resumes_bit_for_bit,
    saves_what_it_holds,
    skips_nan_everywhere,
    statistics_agree,
    two_engines_play,
    autocasts,
    refuses_wrong_weights,
]
