import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter

from sendvae_fast.errors import UserError
from sendvae_fast.evaluation.reconstruction_quality import psnr, ssim
from sendvae_fast.models.pixels import to_uint8

PUBLISHED = {  # picture: PSNR in dB, SSIM
    "I03": (21.11, 0.6993),
    "I04": (20.99, 0.9978),
    "I06": (27.01, 0.9989),
    "I08": (23.30, 0.9669),
    "I19": (21.62, 0.6519),
}


def pictures(num=4, size=32, seed=0, noise=0.2):
    """Smooth pictures and noisy copies of them, as the decoder's floats."""
    rng = np.random.default_rng(seed)
    x = gaussian_filter(rng.normal(size=(num, 3, size, size)), (0, 0, 3, 3)) * 6
    images = to_uint8(torch.from_numpy(x), "round")
    return images, torch.from_numpy(x + noise * rng.normal(size=x.shape))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_values(test_data, name):
    folder = test_data / "metrics/iqa_calibra/ResultsCalibra"
    rgb = [np.asarray(Image.open(folder / part / f"{name}.png").convert("RGB")) for part in ("ref_dir", "dist_dir")]
    colour = [torch.from_numpy(image.copy()).permute(2, 0, 1)[None] for image in rgb]
    grey = [
        torch.from_numpy((image @ np.array([0.299, 0.587, 0.114])).round().astype(np.uint8))[None, None]
        for image in rgb
    ]
    expected_psnr, expected_ssim = PUBLISHED[name]
    assert abs(psnr(*colour).item() - expected_psnr) < 0.0051  # published to two places
    assert abs(ssim(*grey).item() - expected_ssim) < 1e-4


def test_psnr_closed_forms():
    x = torch.full((3, 3, 16, 16), 100, dtype=torch.uint8)
    y = x.clone()
    y[1] += 1  # mse 1
    y[2, :, ::2] += 155  # half the pixels off by 155
    expected = [np.inf, 20 * np.log10(255), 10 * np.log10(255**2 / (155**2 / 2))]
    np.testing.assert_allclose(psnr(x, y).numpy(), expected)
    assert psnr(y, x)[1] == psnr(x, y)[1]  # uint8 differences must not wrap around


def gaussian_ssim(x, y, data_range):
    """SSIM of one channel in plain numpy and scipy."""
    kernel = {"sigma": 1.5, "truncate": 5 / 1.5, "mode": "reflect"}
    mean_x, mean_y = gaussian_filter(x, **kernel), gaussian_filter(y, **kernel)
    var_x, var_y = gaussian_filter(x * x, **kernel) - mean_x**2, gaussian_filter(y * y, **kernel) - mean_y**2
    covariance = gaussian_filter(x * y, **kernel) - mean_x * mean_y
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    quality = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    quality /= (mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2)
    return quality[5:-5, 5:-5].mean()


def test_ssim_agrees_with_scipy():
    images, noisy = pictures()
    x, y = images, to_uint8(noisy, "round")
    scaled = [image.double().numpy() / 255 for image in (x, y)]
    expected = [np.mean([gaussian_ssim(scaled[0][i, c], scaled[1][i, c], 1) for c in range(3)]) for i in range(len(x))]
    # Computed in float32: local variances are differences of squares near 1, good to some 1e-7 beside c2 = 9e-4.
    np.testing.assert_allclose(ssim(x, y).numpy(), expected, atol=5e-6)
    assert ssim(x[:1], y[:1]).shape == (1,)


def test_ssim_of_tiny_pictures_is_refused():
    with pytest.raises(UserError, match="11x11"):
        ssim(*torch.zeros(2, 1, 3, 8, 8, dtype=torch.uint8))
