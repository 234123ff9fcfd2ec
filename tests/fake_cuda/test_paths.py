"""The package's own GPU paths on the stand-in: right values in the right order; with a piece of the order taken out it
says what goes wrong.
"""

import inspect
import io
import textwrap
import time

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from bench.step_cases import StepCase
from fake_cuda import FakeCuda
from fake_cuda.memory import CUDA
from sendvae_fast.data import dali_decoder
from sendvae_fast.data import loader as loader_module
from sendvae_fast.data.catalog import Catalog
from sendvae_fast.data.dali_decoder import DaliDecoder
from sendvae_fast.data.decode import examine
from sendvae_fast.data.latents.latent_rows import LatentReader, LatentRows, _Buffers
from sendvae_fast.data.loader import ImageBatch, ImageLoader
from sendvae_fast.data.loader_config import LoaderConfig
from sendvae_fast.data.order import BatchSchedule
from sendvae_fast.engine import build
from sendvae_fast.engine.ddp_engine import DDPEngine
from sendvae_fast.engine.distributed import Distributed, init_distributed
from sendvae_fast.engine.replayed_functions import Replayed
from sendvae_fast.engine.snapshot import Snapshot
from sendvae_fast.engine.streams import CudaGraphRecorder, HandOver, HostMemory, ToHost
from sendvae_fast.models.sit.sit import SiT
from sendvae_fast.models.sit.sizes import SiTConfig
from sendvae_fast.ops import use_attention, use_backend
from sendvae_fast.sampling.generate import LatentSampler
from sendvae_fast.sampling.settings import GenerateConfig, SamplerConfig
from sendvae_fast.train.reporter import MetricsWindow
from sendvae_fast.train.sit.latent_batches import LatentBatch
from sendvae_fast.train.vae.stage import VAEStage

pytestmark = pytest.mark.slow

SIZE, NUM = 16, 12


@pytest.fixture
def cuda():
    with FakeCuda() as cuda, use_backend("reference"), use_attention("math"):
        yield cuda


def plant(monkeypatch, owner, name, old, new):
    """Replace a piece of a method's source, which must be there once."""
    method = inspect.getattr_static(owner, name)
    source = textwrap.dedent(inspect.getsource(method))
    assert source.count(old) == 1, source
    scope = {}
    exec(compile(source.replace(old, new), "planted", "exec"), inspect.unwrap(method).__globals__, scope)
    monkeypatch.setattr(owner, name, scope[name])


def assert_order(cuda, problem):
    """No problem, or nothing but the one that was planted."""
    if problem is None:
        assert not cuda.problems
    else:
        assert cuda.problems and all(problem in said for said in cuda.problems), cuda.problems


# -- pictures ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def catalog(tmp_path_factory):
    """Pictures of the size of their crops, so that a crop is a copy; one is a PNG, which DALI is not given."""
    root, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for i in range(NUM):
        path = root / f"class{i % 2}" / (f"{i:02d}.png" if i == 4 else f"{i:02d}.jpg")
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (SIZE, SIZE, 3), np.uint8)).save(path)
    catalog = Catalog.open(root)
    facts = [examine(catalog.read(i), catalog.names[i]) for i in range(NUM)]
    table = pa.table({"verdict": [fact.verdict for fact in facts], "format": [fact.format for fact in facts]})
    return Catalog(catalog.listing, facts=table)


class Pipeline:
    """DALI as it is used: it works on a stream of its own, into memory that it has back at the next run."""

    def __init__(self, cuda):
        self._cuda, self._stream = cuda, cuda.new_stream()
        with cuda.stream(self._stream):
            self._memory = [torch.zeros(SIZE, SIZE, 3, dtype=torch.uint8, device=CUDA) for _ in range(NUM)]

    def feed_input(self, name, encoded):
        self._fed = [np.array(Image.open(io.BytesIO(data.tobytes()))) for data in encoded]

    def run(self, stream):
        pictures = self._memory[: len(self._fed)]
        with self._cuda.stream(self._stream):
            for memory, pixels in zip(pictures, self._fed, strict=True):
                memory.copy_(torch.from_numpy(pixels))
        stream.wait_stream(self._stream)
        return (pictures,)


def loaded(cuda, catalog, monkeypatch, **settings):
    """Batches as a training step takes them: on the device, as floats, from its own stream."""
    monkeypatch.setattr(loader_module, "ThreadPoolExecutor", cuda.executor)
    monkeypatch.setattr(DaliDecoder, "_build", lambda self: Pipeline(cuda))
    monkeypatch.setattr(torch, "from_dlpack", lambda picture: picture)
    monkeypatch.setattr(dali_decoder.ops, "center_crops", lambda images, size: torch.stack(images).permute(0, 3, 1, 2))
    loader = ImageLoader(catalog, SIZE, LoaderConfig(num_threads=2, read_ahead=2, **settings), CUDA)
    on_device = []
    for batch in loader.batches(BatchSchedule(NUM, 5, seed=1), stop=8):
        on_device.append(batch.images.to(CUDA, non_blocking=True).float() / 255)
        del batch
    return [images.cpu() for images in on_device]


def truth(catalog):
    loader = ImageLoader(catalog, SIZE, LoaderConfig(decoder="pillow"))
    return [batch.images.float() / 255 for batch in loader.batches(BatchSchedule(NUM, 5, seed=1), stop=8)]


@pytest.mark.parametrize(("decoder", "cache_mb"), [("pillow", 0), ("pillow", 1), ("dali", 0), ("dali", 1)])
def test_pictures_arrive_in_order(catalog, monkeypatch, decoder, cache_mb):
    expected = truth(catalog)
    with FakeCuda() as cuda:
        arrived = loaded(cuda, catalog, monkeypatch, decoder=decoder, cache_mb=cache_mb)
    assert all(torch.equal(one, other) for one, other in zip(arrived, expected, strict=True))
    assert_order(cuda, None)


@pytest.mark.parametrize(
    ("owner", "name", "old", "new", "problem"),
    [
        # DALI has its memory back while the crops are still being cut from it.
        (DaliDecoder, "_decode", "self.stream.synchronize()", "pass", "overwritten"),
        # The crops are cut on another stream than that of DALI's results.
        (
            DaliDecoder,
            "crops",
            "with self.stream.active():\n            crops.append",
            "if True:\n            crops.append",
            "",
        ),
        (HandOver, "take", "stream.wait_event(self.done)", "pass", "read before it is written"),
        (HandOver, "take", "self.tensor.record_stream(stream)", "pass", "given back while it is used"),
    ],
    ids=["no synchronize", "another stream", "no wait", "no record"],
)
def test_a_fault_in_dalis_order_is_seen(cuda, catalog, monkeypatch, owner, name, old, new, problem):
    plant(monkeypatch, owner, name, old, new)
    loaded(cuda, catalog, monkeypatch, decoder="dali", cache_mb=0)
    assert_order(cuda, problem)


def test_a_pinned_batch_that_is_filled_again_too_early_is_seen(cuda, catalog, monkeypatch):
    buffers, empty = {}, ImageLoader._empty
    monkeypatch.setattr(ImageLoader, "_empty", lambda self, num: buffers.setdefault(num, empty(self, num)))
    loaded(cuda, catalog, monkeypatch, decoder="pillow", cache_mb=0)
    assert any("overwritten while it is read" in problem for problem in cuda.problems)


# -- latents -----------------------------------------------------------------------------------------------------------


def read_latents(cuda, folder):
    values = torch.arange(40.0).view(10, 1, 2, 2)
    save_file({"mean": values}, folder / "a.safetensors")
    plan = [(torch.arange(start, start + 3) % 10, None, None) for start in range(9)]
    reader = LatentReader(LatentRows.of_files([folder / "a.safetensors"], [("mean",)]), read_ahead=1, pin_memory=True)
    with_work = [mean.to(CUDA, non_blocking=True) * 2 for (mean,), _ in reader.read(iter(plan))]
    assert [x.cpu()[:, 0, 0, 0].tolist() for x in with_work] == [(8 * ids).tolist() for ids, *_ in plan]


def test_latents_arrive_in_order(cuda, tmp_path):
    read_latents(cuda, tmp_path)
    assert_order(cuda, None)


@pytest.mark.parametrize(("name", "old"), [("fields", "self._last_use.wait()"), ("note_use", "self._last_use.note()")])
def test_a_fault_in_the_latents_order_is_seen(cuda, tmp_path, monkeypatch, name, old):
    plant(monkeypatch, _Buffers, name, old, "pass")
    read_latents(cuda, tmp_path)
    assert_order(cuda, "overwritten while it is read")


# -- sampling ----------------------------------------------------------------------------------------------------------


def tiny_sit():
    torch.manual_seed(0)
    sit = SiT(SiTConfig(
        latent_size=4, latent_channels=2, patch_size=2, width=16, depth=1, num_heads=2, num_classes=3
    ))  # fmt: skip
    for parameter in sit.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return sit


def draw(device, cuda_graphs):
    config = GenerateConfig(
        guidance_scale=2.0, guidance_interval=(0.2, 0.6), precision="fp32", cuda_graphs=cuda_graphs,
        sampler=SamplerConfig(num_steps=9),
    )  # fmt: skip
    sampler = LatentSampler(tiny_sit().to(device), config, torch.device(device))
    return torch.cat([sampler(torch.tensor(ids).to(device))[1].cpu() for ids in ([0, 1, 2], [7, 4, 9], [5])])


@torch.no_grad()
def test_recordings_draw_what_the_network_draws(cuda):
    with_graphs = draw(CUDA, True)
    assert len(cuda.graphs) == 4  # guided and unguided, of both batch sizes
    assert torch.equal(with_graphs, draw("cpu", False))
    assert_order(cuda, None)


@torch.no_grad()
def test_a_fault_in_the_recordings_order_is_seen(cuda, monkeypatch):
    plant(monkeypatch, CudaGraphRecorder, "active", "self._side.cuda.wait_stream(current)", "pass")
    draw(CUDA, True)
    assert_order(cuda, "before it is written")


# -- a training step ---------------------------------------------------------------------------------------------------


SIT = StepCase("sit", "tiny", "demo/sit.yaml", {
    "generator": {"width": 16, "depth": 1, "num_heads": 2, "projector_width": 16}, "data": {"image_size": 64},
    "repa": {"weight": 0.5, "block": 1, "foundation": {"name": "demo", "image_size": 64}},
}, 2, (4, 8, 8))  # fmt: skip
VAE = StepCase("vae", "tiny", "demo/vae.yaml", {
    "data": {"image_size": 16},
    "autoencoder": {
        "channel_multipliers": [1, 2], "num_res_blocks": 1, "attention_resolutions": [], "nominal_resolution": 16,
        "latent_channels": 4,
    },
    "alignment": {"method": "send", "foundation": {"name": "demo"}, "send": {"width": 16, "depth": 1, "num_heads": 2}},
    "discriminator": {"base_channels": 8, "num_layers": 1},
    "loss": {
        "perceptual": None, "gan_weight": 0.1, "discriminator_start_step": 0, "gan_start_step": 0,
        "gan_warmup_steps": 20, "gan_adaptive": True,
    },
}, 2)  # fmt: skip


def gradients_of_a_loss(engine, loss):
    """In the place of the backward pass."""
    for number, parameter in enumerate(engine.trained.values()):
        parameter.grad = torch.full_like(parameter, 1e-3 * number) * loss.detach()


def gradients_at_inputs(outputs, inputs, *_, **__):
    """In the place of torch.autograd.grad."""
    inputs = [inputs] if isinstance(inputs, torch.Tensor) else inputs
    return tuple(torch.full_like(x, 1e-3) * outputs.detach().float().mean() for x in inputs)


def batches(stage, folder, pinned):
    """What the stage's steps are given, without end: pictures, and latents of stage 2, in pinned memory."""
    generator, size = torch.Generator().manual_seed(0), stage.config.data.image_size

    def images():
        images = torch.empty(2, 3, size, size, dtype=torch.uint8, pin_memory=pinned)
        images.copy_(torch.randint(256, images.shape, dtype=torch.uint8, generator=generator))
        return images

    plan = ((torch.arange(start, start + 2), None, torch.arange(start, start + 2)) for start in range(8))
    if isinstance(stage, VAEStage):
        for _, _, ids in plan:
            yield ImageBatch(0, ids, images(), ids % 2)
        return
    save_file({"mean": torch.randn(10, *SIT.latent_shape, generator=generator)}, folder / "a.safetensors")
    rows = LatentRows.of_files([folder / "a.safetensors"], [("mean",)])
    for (mean,), ids in LatentReader(rows, read_ahead=1, pin_memory=pinned).read(plan):
        yield LatentBatch(ids, mean, torch.zeros_like(mean), ids % 2, images())


def train(case, device, folder, monkeypatch, num_steps=4, *, cuda_graph=False, start=None):
    """Steps from the beginning, or from the checkpoint `start`: the stage, and the means that they log."""
    monkeypatch.setattr(DDPEngine, "_backward", gradients_of_a_loss)
    monkeypatch.setattr(torch.autograd, "grad", gradients_at_inputs)
    monkeypatch.setattr(build, "NUM_FIRST_STEPS", 2)
    engine = {"name": "ddp", "precision": "fp32", "cuda_graph": cuda_graph}
    stage = case.build(folder, engine, Distributed(device=device))
    if start is not None:
        stage.load(start)
    window = MetricsWindow()
    for step, batch in zip(range(num_steps), batches(stage, folder, device.type == "cuda"), strict=False):
        window.add(stage.train_step(step, batch))
    return stage, window.mean(Distributed())


def save(stage, directory):
    snapshot = Snapshot(HostMemory())
    write = stage.snapshot(snapshot)
    snapshot.wait()
    directory.mkdir()
    write(directory)
    return directory


@pytest.mark.parametrize(
    ("case", "cuda_graph", "resumed"),
    [(VAE, False, False), (VAE, True, False), (SIT, False, False), (SIT, True, True)],
    ids=["vae-queued", "vae-replayed", "sit-queued", "sit-resumed-replayed"],
)
def test_steps_are_in_order(tmp_path, monkeypatch, case, cuda_graph, resumed):
    """Also of a run that is resumed: what is recorded then has the checkpoint's weights and moments."""
    init_distributed("cpu")
    cpu, start = torch.device("cpu"), None
    with use_backend("reference"), use_attention("math"):
        if resumed:
            start = save(train(case, cpu, tmp_path, monkeypatch, 2)[0], tmp_path / "start")
        plain, expected = train(case, cpu, tmp_path, monkeypatch, start=start)
        with FakeCuda() as cuda:
            stage, means = train(case, CUDA, tmp_path, monkeypatch, cuda_graph=cuda_graph, start=start)
            found = state_of(stage)
    assert_order(cuda, None)
    assert len(cuda.graphs) == cuda_graph
    assert means == pytest.approx(expected, rel=1e-5) and means["grad_norm"] > 0
    wanted = state_of(plain)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-7)


def state_of(stage):
    """Weights, moments and averages of a stage's networks, on the CPU."""
    return {
        (network, kind, name): value
        for network, engine in stage.engines.items()
        for kind in ("model", *engine.state_keys)
        for name, value in engine.full_state(kind).items()
    }


def test_a_norm_that_is_read_too_early_is_seen(cuda, tmp_path, monkeypatch):
    plant(monkeypatch, ToHost, "wait", "self._arrived.synchronize()", "pass")
    train(SIT, CUDA, tmp_path, monkeypatch, num_steps=2)
    assert_order(cuda, "read before it is written: by thread")


@pytest.mark.parametrize(
    ("owner", "name", "old", "new", "problem"),
    [
        # Parameters are made on the recordings' stream, and read on the other.
        (CudaGraphRecorder, "active", "current.wait_stream(self._side.cuda)", "pass", ""),
        (CudaGraphRecorder, "active", "self._side.cuda.wait_stream(current)", "pass", ""),
        (CudaGraphRecorder, "run", "HandOver.take, handed_over", "lambda x: x.tensor, handed_over", "given back"),
        # The next batch is copied in on a stream of its own, while the replay may still read the last one.
        (
            Replayed,
            "__call__",
            "kind.fill(inputs)",
            "with torch.cuda.stream(torch.cuda.Stream()):\n        kind.fill(inputs)",
            "",
        ),
    ],
    ids=["after", "before", "results", "inputs"],
)
def test_a_fault_in_the_replayed_steps_order_is_seen(cuda, tmp_path, monkeypatch, owner, name, old, new, problem):
    plant(monkeypatch, owner, name, old, new)
    train(SIT, CUDA, tmp_path, monkeypatch, 4, cuda_graph=True)
    assert_order(cuda, problem)


# -- a checkpoint beside the steps -------------------------------------------------------------------------------------


def save_beside(cuda, num_saves=3):
    """What a thread reads of snapshots whose weights are overwritten by the steps that follow."""
    weights = [torch.zeros(3, 2, device=CUDA), torch.zeros(4, device=CUDA)]
    memory, written = HostMemory(), []
    with cuda.executor(max_workers=1) as writer:
        for _ in range(num_saves):
            for weight in weights:
                weight.add_(1.0)
            snapshot = Snapshot(memory)
            copies = [snapshot.copy(str(number), weight) for number, weight in enumerate(weights)]

            def write(snapshot=snapshot, copies=copies):
                snapshot.wait()
                return [copy.sum().item() for copy in copies]

            saved = writer.submit(write)
            for weight in weights:
                weight.mul_(1.0)  # the next step, which waits for nobody
            written.append(saved.result())
    assert written == [[6.0 * step, 4.0 * step] for step in range(1, num_saves + 1)]


def test_a_snapshot_is_read_once_it_is_there(cuda):
    save_beside(cuda)
    assert_order(cuda, None)


def test_a_snapshot_that_is_read_too_early_is_seen(cuda, monkeypatch):
    plant(monkeypatch, HostMemory, "wait", "self._arrived.synchronize()", "pass")
    save_beside(cuda)
    assert any("read before it is written" in problem for problem in cuda.problems)


def test_a_snapshot_that_the_next_one_overwrites_is_seen(cuda):
    """What the saver's "one at a time" is for."""
    memory = HostMemory()
    weight = torch.zeros(3, device=CUDA)
    with cuda.executor(max_workers=1) as writer:
        snapshot = Snapshot(memory)
        copy = snapshot.copy("weight", weight)
        snapshot.wait()
        writer.submit(copy.sum)  # and nobody waits for it
        time.sleep(0.2)
        Snapshot(memory).copy("weight", weight)
    assert any("overwritten while it is read" in problem for problem in cuda.problems)
