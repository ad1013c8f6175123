"KL against its closed form, vector quantisation against brute force, revival of dead codes."
import pytest
import torch
from torch.distributions import Normal, kl_divergence

from toksr.layers.bottlenecks import anchors, KL, nearest, REVIVALS, usage, VQ


def gen(seed: int = 0) -> torch.Generator: return torch.Generator().manual_seed(seed)


# ---- KL

def test_kl_closed_form():
    moments = 2 * torch.randn(5, 32, 1, 32, generator=gen()).double()
    mean, logvar = moments.chunk(2, 1)
    want = kl_divergence(Normal(mean, (.5 * logvar).exp()), Normal(0., 1.)).sum() / 5
    got = KL()(moments.float())[1]['kl']
    assert abs(got.item() / want.item() - 1) < 1e-6


def test_kl_layout_mode_and_sample():
    kl, moments = KL(), torch.randn(3, 8, 1, 6, generator=gen())
    z, _ = kl(moments)
    assert z.shape == (3, 6, 4) and torch.equal(z[1, 2], moments[1, :4, 0, 2])
    a, b, c = (kl(moments, gen(s))[0] for s in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)
    noise = torch.randn(3, 6, 4, generator=gen(1))
    torch.testing.assert_close(a, z + (.5 * moments[:, 4:, 0].transpose(1, 2)).exp() * noise)


def test_kl_clamps_and_stays_float32():
    moments = torch.zeros(1, 8, 1, 6)
    moments[:, 4:] = 1e4
    with torch.autocast('cpu', torch.bfloat16): z, losses = KL()(moments.bfloat16(), gen())
    assert z.dtype == losses['kl'].dtype == torch.float32 and z.isfinite().all()
    assert losses['kl'].isfinite() and abs(losses['kl'].item() / (24 * .5
                                                                  * (torch.tensor(20.).exp().item() - 21)) - 1) < 1e-5
    assert KL().bits(32, 16) == 8192


# ---- VQ

@pytest.mark.parametrize('codes, width, scale', [(8192, 64, 1.), (512, 8, 1.), (300, 3, 1e-3), (64, 16, 30.)])
def test_nearest_is_brute_force(codes, width, scale):
    "Every index, compared with exact distances in float64."
    x, book = scale * torch.randn(60 if codes > 1000 else 400, width, generator=gen()), scale * torch.randn(codes,
            width, generator=gen(1))
    want = ((x.double()[:, None] - book.double()[None])**2).sum(-1).argmin(1)
    assert torch.equal(nearest(x, book), want)


def test_straight_through_and_losses():
    vq, g = VQ(32, 4), gen()
    torch.nn.init.normal_(vq.embedding.weight, generator=g)
    x = torch.randn(3, 4, 1, 5, generator=g).requires_grad_()
    z, losses = vq(x)
    flat = x.detach()[:, :, 0].transpose(1, 2)
    torch.testing.assert_close(z.detach(), vq.lookup(vq.indices(x)).detach())
    mse = (z.detach() - flat).square().mean()
    torch.testing.assert_close(losses['vq'].detach(), 1.25 * mse)
    torch.testing.assert_close(losses['commit'].detach(), mse)
    upstream = torch.randn(z.shape, generator=g)
    grad, book = torch.autograd.grad(z, (x, vq.embedding.weight), upstream, retain_graph=True, allow_unused=True)
    assert torch.equal(grad[:, :, 0].transpose(1, 2), upstream) and book is None
    toward_tokens, = torch.autograd.grad(losses['codebook'], vq.embedding.weight, retain_graph=True)
    assert (toward_tokens.abs().sum(1) > 0).sum() == vq.indices(x).unique().numel()
    grad, = torch.autograd.grad(losses['vq'], x)
    torch.testing.assert_close(grad[:, :, 0].transpose(1, 2), .25 * 2 * (flat - z.detach()) / z.numel())


def test_usage():
    assert usage(torch.ones(16)) == pytest.approx({'used': 1., 'perplexity': 16.})
    assert usage(torch.tensor([3, 0, 3, 0])) == pytest.approx({'used': .5, 'perplexity': 2.})


@pytest.mark.parametrize('revive', REVIVALS)
def test_revival(revive):
    """Codes far from all tokens end near them when revived (but those that won tokens at first: they count as
    used), else stay."""
    g = gen()
    vq = VQ(64, 4, revive=revive)
    with torch.no_grad(): vq.embedding.weight.copy_(50 + torch.randn(64, 4, generator=g))
    before = vq.embedding.weight.detach().clone()
    batches = torch.randn(3, 16, 4, 1, 8, generator=g)
    winners = vq.indices(batches[0]).unique().numel()
    for x in batches: vq(x, g)
    far = (vq.embedding.weight.norm(dim=1) > 10).sum()
    assert winners < 32 and far <= winners if revive != 'none' else torch.equal(vq.embedding.weight, before)
    still = vq.embedding.weight.detach().clone()
    vq.eval()(torch.randn(16, 4, 1, 8, generator=g), g)
    assert torch.equal(still, vq.embedding.weight), 'evaluation must not move codes'
    assert ('embed_prob' in vq.state_dict()) == (revive != 'none')


def test_used_codes_are_left_alone():
    "A code that gets its share of the tokens hardly moves."
    vq = VQ(4, 2, revive='closest')
    corners = torch.tensor([[1., 1], [1, -1], [-1, 1], [-1, -1]])
    with torch.no_grad():
        vq.embedding.weight.copy_(corners)
        vq.embed_prob.fill_(.25)
    vq((corners + .1)[..., None, None])
    torch.testing.assert_close(vq.embedding.weight.detach(), corners)


def test_refusals():
    with pytest.raises(ValueError, match="revive: expected one of"): VQ(4, 2, revive='sometimes')
    with pytest.raises(ValueError, match='pass a generator'):
        anchors(torch.zeros(3, 2), torch.zeros(4, 2), 'random', None)
