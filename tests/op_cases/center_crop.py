from dataclasses import dataclass

import PIL
import pytest
import torch

from op_cases.common import Example, OpTests, Results, assert_op_within, num_repeats
from sendvae_fast.ops import (
    center_crop,
    center_crop_batch,
    center_crop_batch_reference,
    center_crop_reference,
    use_backend,
)

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's


def require_order_of_passes(height: int, width: int) -> None:
    """Skip the test where the installed Pillow goes over rows and columns in another order than the op."""
    if height > 2 * width and int(PIL.__version__.split(".")[0]) < 13:
        pytest.skip(f"Pillow {PIL.__version__} resizes tall pictures in another order than Pillow 13 and the op")


def statistics(device: str) -> dict[str, torch.Tensor]:
    return {"mean": torch.tensor(MEAN, device=device), "std": torch.tensor(STD, device=device)}


@dataclass(frozen=True)
class CropCase:
    """Pictures of these heights and widths and the side of their crops; every other crop is mirrored."""

    shapes: tuple[tuple[int, int], ...]
    size: int
    layout: str = "packed"
    normalised: bool = True

    def __str__(self) -> str:
        shapes = ",".join(f"{height}x{width}" for height, width in self.shapes)
        return f"{shapes}-to-{self.size}-{self.layout}" + "-normalised" * self.normalised

    def images(self, device: str, number: int) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(3000 + number)
        return [self._image(*shape, generator).to(device) for shape in self.shapes]

    def flips(self) -> list[bool]:
        return [bool(i % 2) for i in range(len(self.shapes))]

    def _image(self, height: int, width: int, generator: torch.Generator) -> torch.Tensor:
        def noise(*shape: int) -> torch.Tensor:
            return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)

        if self.layout == "packed":
            return noise(height, width, 3)
        if self.layout == "window":  # of a larger picture: rows at a stride, misaligned
            return noise(height + 2, width + 5, 3)[1:-1, 3:-2]
        if self.layout == "planes":  # channels first in memory
            return noise(3, height, width).permute(1, 2, 0)
        raise ValueError(self.layout)


CASES = [
    CropCase(((1, 1),), 1),
    CropCase(((1, 1), (1, 1)), 5),
    CropCase(((1, 40), (40, 1)), 8),
    CropCase(((2, 3), (3, 2)), 1),
    CropCase(((64, 64), (64, 64)), 64),
    CropCase(((64, 64), (64, 100)), 64, "window"),
    CropCase(((64, 65), (65, 64)), 64),
    CropCase(((127, 128), (128, 127)), 64),
    CropCase(((128, 128), (129, 129)), 64, "planes"),
    CropCase(((15, 16), (16, 15)), 7, "window"),
    CropCase(((17, 33), (33, 17), (31, 47)), 16),
    CropCase(((200, 100), (201, 100)), 32),
    CropCase(((300, 31), (31, 300)), 31),
    CropCase(((500, 90), (90, 500)), 33, "window"),
    CropCase(((375, 500), (500, 375)), 64),
    CropCase(((375, 500), (500, 333)), 256, "window"),
    CropCase(((37, 43), (45, 39)), 116, normalised=False),
    CropCase(((640, 427),), 96, "planes", normalised=False),
    CropCase(((1023, 769), (769, 1023)), 17),
    CropCase(((20, 31), (63, 200), (1000, 257)), 64, normalised=False),
    CropCase(((1500, 1001),), 224),
    CropCase(tuple((40 + 7 * i, 90 - 5 * i) for i in range(12)), 24),
]
FEW_CASES = CASES[:6]


def check(case: CropCase, dtype: torch.dtype, backend: str, device: str) -> None:
    """uint8 crops are Pillow's; others have the error of plain PyTorch on Pillow's crops."""
    for shape in case.shapes:
        require_order_of_passes(*shape)
    statistic = statistics(device) if case.normalised else {}
    actual, plain, truth = Results(), Results(), Results()
    for number in range(num_repeats(len(case.shapes) * 3 * case.size**2)):
        images, flips = case.images(device, number), case.flips()
        if dtype == torch.uint8:
            for image, flip in zip(images, flips, strict=True):
                with use_backend(backend):
                    crop = center_crop(image, case.size, flip)
                assert crop.is_contiguous() and crop.device == image.device
                assert torch.equal(crop, center_crop_reference(image, case.size, flip))
            continue
        with use_backend(backend):
            batch = center_crop_batch(images, case.size, flips, dtype=dtype, **statistic)
        for results, crops in (
            (actual, batch),
            (plain, center_crop_batch_reference(images, case.size, flips, dtype=dtype, **statistic)),
            (truth, center_crop_batch_reference(images, case.size, flips, dtype=torch.float64, **statistic)),
        ):
            assert (crops.normalised is not None) == case.normalised
            outputs = {name: x for name, x in crops._asdict().items() if x is not None}
            assert all(x.is_contiguous(memory_format=torch.channels_last) for x in outputs.values())
            results.add(outputs, {})
    assert_op_within(actual, plain, truth)


def example(number: int, dtype: torch.dtype, device: str) -> Example:
    def function(*images):
        if dtype == torch.uint8:
            return tuple(center_crop(image, 24, True) for image in images)
        # What a compiler may fuse and lay out as it likes.
        images = [image.bitwise_not() for image in images]
        return tuple(center_crop_batch(images, 24, [True, False], dtype=dtype, **statistics(device)))

    return Example(function, tuple(CropCase(((90, 75), (61, 103)), 24).images(device, number)))


def raw_calls(backend: str, device: str) -> list[tuple[str, tuple]]:
    images = CropCase(((30, 41), (25, 20)), 12, "window").images(device, 0)
    return [
        ("center_crop", (images, 12, [False, True], torch.uint8, None, None)),
        ("center_crop", (images, 12, [False, True], torch.bfloat16, None, None)),
        ("center_crop", (images, 12, [False, True], torch.float32, *statistics(device).values())),
    ]


TESTS = OpTests(
    "center_crop", CASES, FEW_CASES, check, example, raw_calls,
    dtypes=(torch.float32, torch.bfloat16, torch.float16, torch.uint8),
    no_cuda_graph="the plans of the pictures are made on the host and uploaded at every call",
)  # fmt: skip
