"""What a run says: speed of the window, shares, dates, and the arithmetic of its networks by closed forms."""

import io
import re
import time

import pytest
import torch
from PIL import Image
from rich.cells import cell_len
from rich.console import Console
from torch._subclasses.fake_tensor import FakeTensorMode

from sendvae_fast import ops
from sendvae_fast import progress as progress_module
from sendvae_fast.data.catalog import Catalog
from sendvae_fast.engine import flops
from sendvae_fast.engine.distributed import Distributed
from sendvae_fast.models.autoencoder.autoencoder import Autoencoder
from sendvae_fast.models.autoencoder.autoencoder_config import AutoencoderConfig
from sendvae_fast.models.sit.sit import SiT
from sendvae_fast.models.sit.sizes import SiTConfig
from sendvae_fast.progress import Progress
from sendvae_fast.train.run_words import count_words, picture_words, step_line
from sendvae_fast.train.sit.arithmetic import step_flops
from sendvae_fast.train.step_clock import StepClock
from sendvae_fast.train.vae.arithmetic import autoencoder_flops


def test_a_line_has_speed_losses_and_the_date_of_the_end():
    values = {"loss": 0.5, "grad_norm": 1.5, "img_per_s": 2048.0, "step_ms": 500.0, "data_share": 0.25, "mfu": 0.4}
    now = time.mktime((2030, 1, 1, 12, 0, 0, 0, 0, -1))
    line = step_line(100, 7300, {**values, "learning_rate": 3e-4}, steps_per_s=2.0, now_s=now)
    assert line.split("  ") == [
        "step 100/7,300", "2,048 img/s", "500 ms", "data 25%", "MFU 40%", "lr 0.0003", "|g| 1.5", "loss 0.5",
        "ends Tue 01 Jan 2030 13:00",
    ]  # fmt: skip
    assert "ends" not in step_line(7300, 7300, values, 2.0, now)


@pytest.mark.parametrize(
    ("count", "words"), [(7, "7"), (1234, "1.23 k"), (675_129_632, "675 M"), (2.5e10, "25.0 G"), (1e12, "1.00 T")]
)
def test_large_numbers(count, words):
    assert count_words(count) == words


def test_the_clock_counts_windows_without_pauses(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def slow():
        while True:
            now[0] += 0.25
            yield None

    clock, batches = StepClock(torch.device("cpu"), 100, flops_per_image=1e9, peak_flops=1e12), slow()
    for _ in range(4):
        clock.fetch(batches)
        now[0] += 0.75
    now[0] += 10.0
    clock.leave_out(10.0)
    assert clock.read() == pytest.approx({"img_per_s": 100.0, "step_ms": 1000.0, "data_share": 0.25, "mfu": 0.1})
    clock.fetch(batches)
    now[0] += 1.75
    assert clock.read()["step_ms"] == pytest.approx(2000.0)  # of this window alone


def test_the_arithmetic_of_a_sit_is_that_of_its_matrices():
    """2 multiply-adds for each weight and token, 4 n^2 width for attention; a foundation model beside it: none here."""
    config = SiTConfig(width=32, depth=3, num_heads=2, patch_size=1, latent_channels=4, latent_size=8, num_classes=5)
    n, w = 64, 32
    block = 2 * n * (3 * w * w + w * w + 8 * w * w) + 4 * n * n * w + 2 * 6 * w * w
    embed = 2 * n * 4 * w + 2 * (256 * w + w * w)
    final = 2 * 2 * w * w + 2 * n * w * 4
    network = SiT(config)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    assert step_flops(network, None, 64, torch.device("cpu")) == {"SiT": 3 * (3 * block + embed + final)}
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_arithmetic_that_cannot_be_counted_ends_nothing():
    assert flops.flops_by_part(lambda: {"nothing": 1 // 0}, "a network") is None
    assert flops.flops_by_part(lambda: {"something": 1}, "a network") == {"something": 1}


def test_arithmetic_is_counted_once_for_the_same_settings():
    first, again, other = (
        flops.flops_by_part(lambda number=number: {"part": number}, "a SiT", width)
        for number, width in ((1, 32), (2, 32), (3, 48))
    )
    assert (first, again, other) == ({"part": 1}, {"part": 1}, {"part": 3})


def test_the_arithmetic_of_an_autoencoder_is_that_of_a_real_pass():
    config = AutoencoderConfig(
        channel_multipliers=(1, 2), base_channels=8, num_res_blocks=1, num_groups=4, attention_resolutions=(128,)
    )
    network, x = Autoencoder(config), torch.zeros(1, 3, 16, 16)
    with ops.use_attention("math"), torch.no_grad():
        real = flops.count_flops(lambda: network.decode(network.encode(x).chunk(2, dim=1)[0]))
    assert autoencoder_flops(network, 16, torch.device("cpu")) == real > 1e5


def test_arithmetic_that_nobody_reads_is_not_counted(monkeypatch):
    main, other = Distributed(), Distributed(rank=1, world_size=2)
    assert flops.flops_are_read(main, torch.float32)
    assert not flops.flops_are_read(other, torch.float32)
    with Progress.silenced():
        assert not flops.flops_are_read(main, torch.float32)
    with FakeTensorMode():  # `plan`
        assert flops.flops_are_read(other, torch.float32)
    monkeypatch.setattr(flops, "peak_flops", lambda device, dtype: 1e15)
    assert flops.flops_are_read(other, torch.bfloat16)
    assert flops.flops_by_part(pytest.fail, "anything", are_read=False) is None


def test_the_peak_is_known_for_named_gpus_in_bf16_alone(monkeypatch):
    names = {"NVIDIA H200": 989.5e12, "NVIDIA H100 PCIe": 756.5e12, "NVIDIA A100-SXM4-80GB": 312e12, "Tesla T4": None}
    for name, peak in names.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _, name=name: name)
        assert flops.peak_flops(torch.device("cuda"), torch.bfloat16) == peak
        assert flops.peak_flops(torch.device("cuda"), torch.float32) is None
    assert flops.peak_flops(torch.device("cpu"), torch.bfloat16) is None


def test_a_folder_of_two_repositories_is_doubted(tmp_path):
    for repository in ("ade", "coco"):
        for name in ("cat", "dog"):
            (tmp_path / repository / name).mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(tmp_path / repository / name / "a.png")
    words = picture_words(Catalog.open(tmp_path))
    assert words.startswith("4 in 2 classes (ade, coco)") and f"give the folder above them, {tmp_path}/ade" in words
    words = picture_words(Catalog.open(tmp_path / "ade"))
    assert words == f"2 in 2 classes (cat, dog) of {tmp_path}/ade"


@pytest.mark.parametrize("width", [80, 100, 200])
def test_the_bar_keeps_the_time_left(monkeypatch, width):
    """10 steps in 2 s, with 2,769,170 of 4,003,200 left: 553,834 s. Where it is narrow the values alone are cut off."""
    now = [0.0]
    out = io.StringIO()
    console = Console(
        file=out, width=width, force_terminal=True, color_system=None, legacy_windows=False, get_time=lambda: now[0]
    )
    monkeypatch.setattr(progress_module, "Console", lambda **_: console)
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: now[0])
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    values = {"loss": 0.123456, "psnr": 23.456, "velocity": 0.98765, "align": 0.54321}
    with Progress("train sit", 4_003_200, "step", start=1_234_000) as bar:
        for _ in range(3):
            now[0] += 2.0
            bar.advance(10, **values)
        bar._bar.refresh()
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.getvalue())
    line = [line for line in re.split(r"[\r\n]+", text) if "1234030/4003200" in line][-1]
    assert cell_len(line) <= width
    found = re.fullmatch(r"train sit +[^\d ]+ +31% +1234030/4003200 +5\.0 step/s +153:50:34 +(\S.*?) *", line)
    assert found, line
    whole = "loss 0.1235 psnr 23.46 velocity 0.9877 align 0.5432"
    assert found[1] == whole if width == 200 else found[1].endswith("…") and whole.startswith(found[1][:-1])
