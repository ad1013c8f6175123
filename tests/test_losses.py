"Losses against the public implementation's numbers and their formulas."
import math
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from golden_fill import fill_, tensor

from toksr.training.losses import (
    Blur, Discriminator, hinge_discriminator, hinge_generator, imagenet_logits, LeCam, LossConfig,
    lpips_convnext, TokenizerLoss,
)

GOLDEN = Path(__file__).parent / 'golden'


def pair(n: int = 4, side: int = 32, seed: int = 0) -> torch.Tensor:
    return torch.rand(2, n, 3, side, side, generator=torch.Generator().manual_seed(seed))


def distance(a, b): return (a - b).abs().mean((1, 2, 3))


def test_golden_discriminator():
    want = np.load(GOLDEN / 'disc_64.npz')['logits']
    with torch.no_grad(): got = fill_(Discriminator(), .05)(tensor('input.image', (1, 3, 64, 64), 0, 1))
    assert got.shape == (1, 1, 16, 16)
    np.testing.assert_allclose(got.numpy(), want, atol=1e-5, rtol=0)


def test_discriminator_sizes():
    n = sum(p.numel() for p in Discriminator().parameters())
    assert round(n / 1e6, 2) == 1.91
    assert Discriminator(16, stages=2, groups=8)(torch.rand(2, 3, 64, 64)).shape == (2, 1, 16, 16)
    assert Discriminator(16, groups=8)(torch.rand(1, 3, 50, 70)).shape == (1, 1, 16, 16)
    with pytest.raises(ValueError, match='groups: 32 does not divide channels 48'): Discriminator(48)


@pytest.mark.parametrize('side', [8, 9, 15, 16])
def test_blur_is_a_strided_same_convolution(side):
    x = torch.randn(2, 5, side, side, generator=torch.Generator().manual_seed(0))
    k = torch.tensor([1., 3, 3, 1]) / 8
    total = max((math.ceil(side / 2) - 1) * 2 + 4 - side, 0)
    before = total // 2
    padded = F.pad(x, (before, total - before) * 2)
    want = torch.stack([F.conv2d(padded[:, [c]], torch.outer(k, k)[None, None], stride=2)[:, 0] for c in range(5)], 1)
    torch.testing.assert_close(Blur()(x), want)


def test_hinge():
    r, f = torch.tensor([.5, 2.]), torch.tensor([-.5, 3.])
    assert hinge_discriminator(r, f).item() == pytest.approx(.5 * ((.5 + 0) / 2 + (.5 + 4) / 2))
    assert hinge_generator(f).item() == pytest.approx(-1.25)


def test_lecam_sequence():
    "Three steps by hand: means start at 0, decay .999, and are updated after use."
    lecam, er, ef = LeCam(), 0., 0.
    for r, f in ((2., -1.), (-.5, .4), (1., 1.)):
        want = max(r - ef, 0)**2 + max(er - f, 0)**2
        assert lecam(torch.full((2, 1, 4, 4), r), torch.full((2, 1, 4, 4), f)).item() == pytest.approx(want, abs=1e-6)
        er, ef = .999 * er + .001 * r, .999 * ef + .001 * f
    assert lecam.real.item() == pytest.approx(er, abs=1e-7) and lecam.fake.item() == pytest.approx(ef, abs=1e-7)
    assert set(lecam.state_dict()) == {'real', 'fake'}


def test_lecam_gradient_reaches_scores():
    r = torch.ones(3, requires_grad=True)
    LeCam()(r, torch.zeros(3)).backward()
    torch.testing.assert_close(r.grad, torch.full((3,), 2 / 3))


def test_paper_perceptual_weight():
    "1.1 times the mean is LPIPS plus a tenth of the logits' squared difference."
    a, b = pair()
    lpips, net = lambda x, y: (x - y).square().mean((1, 2, 3), keepdim=True), lambda x: x.mean(-1).flatten(1)
    logits = (imagenet_logits(a, net) - imagenet_logits(b, net)).square().mean(1)
    got = lpips_convnext(a, b, lpips, net)
    assert got.shape == (4,)
    torch.testing.assert_close(1.1 * got, lpips(2 * a, 2 * b).flatten() + .1 * logits)


def test_perceptual_takes_lpips_as_it_is():
    "With the package's VGG metric (random backbone, real linear weights) our call equals normalize=True."
    lpips = pytest.importorskip('lpips')
    torch.manual_seed(0)
    net = lpips.LPIPS(net='vgg', pnet_rand=True, verbose=False).eval()
    a, b = pair(2)
    with torch.no_grad():
        got = lpips_convnext(a, b, net, lambda x: x.flatten(1)[:, :1], (1., 0.))
        want = net(a, b, normalize=True).flatten()
    torch.testing.assert_close(got, want)


def test_imagenet_logits_normalise_and_resize():
    seen = {}
    imagenet_logits(torch.full((1, 3, 50, 40), .5), lambda x: seen.update(x=x) or x)
    want = (.5 - torch.tensor([.485, .456, .406])) / torch.tensor([.229, .224, .225])
    assert seen['x'].shape == (1, 3, 224, 224)
    torch.testing.assert_close(seen['x'][0, :, 100, 100], want)


def test_weights_and_start_steps():
    image, recon = pair()
    d = Discriminator(8, groups=4)
    loss = TokenizerLoss(LossConfig(adv_start=5, perceptual_start=2), distance, d)
    extra = {'kl': torch.tensor(400.), 'vq': torch.tensor(3.), 'perplexity': torch.tensor(9.)}
    mse, seen = F.mse_loss(recon, image), distance(recon, image).mean()
    fake = d(recon).mean()
    base = mse + 1e-6 * 400 + 3
    for step, want, names in ((0, base, {'rec', 'kl', 'vq'}), (2, base + 1.1 * seen, {'rec', 'kl', 'vq', 'perceptual'}),
                              (5, base + 1.1 * seen - .1 * fake, {'rec', 'kl', 'vq', 'perceptual', 'adv'})):
        total, terms = loss(image, recon, extra, step)
        torch.testing.assert_close(total, want)
        assert set(terms) == names and not any(t.requires_grad for t in terms.values())
    assert (LossConfig().rec, LossConfig().perceptual, LossConfig().kl, LossConfig().adv, LossConfig().lecam,
            LossConfig().adv_start) == (1., 1.1, 1e-6, .1, .001, 200_000)


def test_discriminator_step():
    image, recon = pair()
    d = Discriminator(8, groups=4)
    loss = TokenizerLoss(LossConfig(adv_start=0), distance, d)
    r, f = d(image), d(recon)
    total, terms = loss.discriminator(image, recon.requires_grad_())
    want = .5 * (F.relu(1 - r).mean() + F.relu(1 + f).mean()) + .001 * (F.relu(r.mean())**2 + F.relu(-f.mean())**2)
    torch.testing.assert_close(total, want)
    total.backward()
    assert recon.grad is None and all(p.grad is not None for p in d.parameters())
    assert {'judge.block_in.0.weight', 'lecam.real'} <= set(loss.state_dict())


def test_losses_ignore_autocast():
    image, recon = pair(side=64)
    loss = TokenizerLoss(LossConfig(adv_start=0), distance, Discriminator(8, groups=4))
    extra = {'kl': torch.tensor(400.)}
    want = loss(image, recon, extra, 0)[0]
    with torch.autocast('cpu', torch.bfloat16):
        got = loss(image, recon.bfloat16().float(), extra, 0)[0]
        same = loss(image, recon, extra, 0)[0]
    assert torch.equal(same, want) and got.dtype == torch.float32


def test_perceptual_share_and_precision():
    image, recon = pair()
    seen = []
    def spy(a, b):
        seen.append((len(a), torch.is_autocast_enabled('cpu')))
        return distance(a, b)
    for share, dtype in ((1., 'float32'), (.5, 'bfloat16'), (.3, 'float32')):
        TokenizerLoss(LossConfig(perceptual_share=share, perceptual_dtype=dtype), spy)(image, recon, {}, 0)
    assert seen == [(4, False), (2, True), (2, False)]


def test_refusals():
    with pytest.raises(ValueError, match='perceptual_share'): LossConfig(perceptual_share=0.)
    with pytest.raises(ValueError, match='perceptual_dtype'): LossConfig(perceptual_dtype='int8')
    with pytest.raises(ValueError, match='perceptual: pass a distance'): TokenizerLoss()
    TokenizerLoss(LossConfig(perceptual=0.))


def test_default_perceptual_distance():
    vision = pytest.importorskip('toksr.encoders.lite0')
    image, recon = pair(2)
    loss = TokenizerLoss(perceptual=partial(vision.lite0_distance, net=vision.Lite0()))
    total, terms = loss(image, recon.requires_grad_(), {}, 0)
    total.backward()
    assert terms['perceptual'] > 0 and recon.grad.isfinite().all()
    assert not any('net' in k or 'stem' in k for k in loss.state_dict()), 'frozen networks stay out of checkpoints'
