"""PSNR and SSIM against numbers of scikit-image 0.25 on the same images, and by hand."""

import numpy as np
import pytest
import torch

from scalecv.metrics.fidelity import psnr, ssim


def pair():
    """Two bands of 40 x 48 px, and a changed copy."""
    y, x = np.mgrid[:40, :48].astype(float)
    truth = np.stack([120 + 60 * np.sin(x / 3) + 40 * np.cos(y / 5), 3000 + 900 * np.sin((x + y) / 4)])
    changed = np.stack([truth[0] + 12 * np.sin(x * y / 7), truth[1] * 0.9 + 200 * np.cos(x / 2)])
    return torch.from_numpy(truth)[None], torch.from_numpy(changed)[None]


def test_as_scikit_image_has_it():
    """structural_similarity(gaussian_weights=True, sigma=1.5, use_sample_covariance=False), data_range 200 and 1800."""
    truth, changed = pair()
    for band, span, similarity, ratio in (
        (0, 200, 0.9128235067939442, 27.74108832853242),
        (1, 1800, 0.9200152524818593, 14.40290131686593),
    ):
        one, other = changed[:, band : band + 1], truth[:, band : band + 1]
        assert float(ssim(one, other, [span])) == pytest.approx(similarity, abs=1e-9)
        assert float(psnr(one, other, [span])) == pytest.approx(ratio, abs=1e-9)
    assert float(psnr(changed, truth, [200, 1800])) == pytest.approx(17.216373201532132, abs=1e-9)


def test_bands_without_a_range_count_nowhere():
    truth, changed = pair()
    more = [torch.cat([images, torch.randn(1, 1, 40, 48)], 1) for images in (changed, truth)]
    for measure in (psnr, ssim):
        assert float(measure(*more, [200, 1800, 0.0])) == float(measure(changed, truth, [200, 1800]))
    assert float(psnr(changed, truth, [0.0, 0.0])) == 100.0 and float(ssim(changed, truth, [0.0, 0.0])) == 1.0


def test_by_hand():
    black, grey = torch.zeros(2, 1, 4, 4), torch.full((2, 1, 4, 4), 25.5)
    assert psnr(grey, black, [255.0]).tolist() == pytest.approx([20.0, 20.0])
    assert psnr(black, black, [255.0]).tolist() == [100.0, 100.0]
    # Constant images: only brightness differs, (2ab + C1) / (a^2 + b^2 + C1) with a = 0.1, b = 0, in a window of 3 px.
    assert ssim(grey, black, [255.0]).tolist() == pytest.approx([1e-4 / (0.01 + 1e-4)] * 2)


def test_pixels_without_data_count_nowhere():
    """Nor do windows of SSIM that hold one: the rest is scored as if it were cut out."""
    truth, changed = pair()
    gone, wild = truth.clone(), changed.clone()
    gone[..., :20], wild[..., :20] = np.nan, 1e9
    for measure in (psnr, ssim):
        assert float(measure(wild, gone, [200, 1800])) == float(
            measure(changed[..., 20:], truth[..., 20:], [200, 1800])
        ), measure
