"Down- and upscaling against Pillow, and agreement with the low-resolution image."
import numpy as np
import pytest
import torch
from PIL import Image

from toksr.data.degradations import back_project, downscale, upscale
from toksr.metrics.per_image import lr_consistency

rng = np.random.default_rng(0)


def pillow(x, h, w):
    return np.stack([np.asarray(Image.fromarray(i).resize((w, h), Image.Resampling.BICUBIC)) for i in x])
def floats(x): return torch.from_numpy(x).permute(0, 3, 1, 2).float() / 255
def levels(x): return (x * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy().astype(int)


IMAGES = {
    'noise': rng.integers(0, 256, (3, 64, 64, 3), np.uint8),
    'extremes': rng.choice(np.array([0, 255], np.uint8), (3, 64, 64, 3)),
    'smooth': pillow(rng.integers(0, 256, (3, 6, 6, 3), np.uint8), 64, 64),
    'wide': rng.integers(0, 256, (2, 32, 96, 3), np.uint8),
    'checks': np.tile((np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)[None, :, :, None], (1, 1, 1, 3)),
}


@pytest.mark.parametrize('factor', [2, 4, 8])
@pytest.mark.parametrize('kind', IMAGES)
def test_equal_to_pillow_within_one_level(kind, factor):
    x = IMAGES[kind]
    n, h, w, _ = x.shape
    small = pillow(x, h // factor, w // factor)
    assert np.abs(levels(downscale(floats(x), factor)) - small).max() <= 1
    assert np.abs(levels(upscale(floats(small), factor)) - pillow(small, h, w)).max() <= 1


def test_range_and_precision():
    x = floats(IMAGES['extremes'])
    for y in (downscale(x, 4), upscale(x, 4), back_project(x, downscale(x, 4).flip(0))):
        assert y.dtype == torch.float32 and 0 <= y.min() and y.max() <= 1
    with torch.autocast('cpu', dtype=torch.bfloat16):
        assert torch.equal(downscale(x, 4), downscale(x.clone(), 4)) and downscale(x, 4).dtype == torch.float32
    assert downscale(x.to(torch.bfloat16), 4).dtype == torch.float32
    assert torch.equal(downscale(x, 1), x)


def test_flat_stays_flat():
    for v in (0., .25, 1.):
        assert torch.allclose(upscale(downscale(torch.full((1, 3, 64, 64), v), 8), 8),
                              torch.full((1, 3, 64, 64), v), atol=1e-6)


def test_batch_does_not_matter():
    x = floats(IMAGES['noise'])
    lr = downscale(x, 4)
    assert torch.allclose(back_project(upscale(lr, 4), lr)[1:2], back_project(upscale(lr[1:2], 4), lr[1:2]), atol=1e-6)


def test_consistency():
    x = floats(IMAGES['smooth'])
    lr = downscale(x, 4)
    assert (lr_consistency(x, lr) == 100).all() and lr_consistency(x, lr).shape == (3,)
    off = (lr + .1).clamp(0, 1)
    plain = -10 * (off - lr).square().mean((1, 2, 3)).log10()
    assert torch.allclose(lr_consistency(x, off), plain)
    last = lr_consistency(upscale(lr, 4), lr)
    for n in (1, 2, 3, 6):
        now = lr_consistency(back_project(upscale(lr, 4), lr, n), lr)
        assert (now > last - 1e-3).all()
        last = now
    assert (last > 45).all()


def test_no_rounds_change_nothing():
    x = floats(IMAGES['noise'])
    assert torch.equal(back_project(x, downscale(x, 4), n=0), x)


def test_gradients_flow():
    x = torch.rand(1, 3, 32, 32, requires_grad=True)
    back_project(x, torch.rand(1, 3, 8, 8)).mean().backward()
    assert torch.isfinite(x.grad).all() and x.grad.abs().sum() > 0


@pytest.mark.parametrize('call',
                         [lambda x: downscale(x, 5), lambda x: downscale(x, 0), lambda x: downscale(x, -4),
                          lambda x: upscale(x, 0),
                                  lambda x: lr_consistency(x, x[..., :15]),
                                  lambda x: back_project(x, torch.rand(1, 3, 9, 9)),
                                  lambda x: back_project(x, torch.rand(1, 3, 128, 128))])
def test_errors_name_what_was_expected(call):
    with pytest.raises(ValueError, match='expected .* got'): call(torch.rand(1, 3, 64, 64))
