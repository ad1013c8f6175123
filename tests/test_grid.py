"Grid tokenizers: one protocol, exact codes, honest counts, errors that name what is wrong."
import math

import pytest
import torch
import torch.nn.functional as F

from golden_fill import tensor
from toksr.tokenizers.cosmos import FSQ, haar, unhaar
from toksr.tokenizers.dalle import Gumbel
from toksr.tokenizers.grid import build, first_weights, KLf8Config
from toksr.tokenizers.omni import GlobalBlock, SphereVQ, WindowBlock

SMALL = {
    'kl_f8': ('kl_f8', dict(image=32, width=4, channels=(8, 16, 16), blocks=1, groups=4, fold=2)),
    'kl_f8 warm': ('kl_f8', dict(image=32, width=4, channels=(8, 16), blocks=1, groups=4, fold=4, logvar_start=-7.,
                                 linear_path=True)),
    'dalle': ('dalle', dict(image=32, width=8, codes=16, channels=(8, 8, 8, 16), blocks=1)),
    'omni': ('omni', dict(image=32, codes=32, hidden=32, heads=2, window=2, encoder='tw', decoder='t')),
    'cosmos_di': ('cosmos', dict(image=32, factor=8, channels=(8, 16), stem=8, inner=8, blocks=1, attention=4, groups=4,
                                 levels=(8, 5))),
    'cosmos_ci': ('cosmos', dict(image=32, factor=8, channels=(8, 16), stem=8, blocks=1, attention=4, groups=4)),
}
BITS = {'kl_f8': 16 * 4 * 16, 'kl_f8 warm': 16 * 4 * 16, 'dalle': 16 * 4, 'omni': 16 * 5,
        'cosmos_di': 16 * math.log2(40), 'cosmos_ci': 16 * 16 * 16}


def image(b=2, side=32): return F.interpolate(tensor('picture', (b, 3, 6, 6), 0, 1), size=side, mode='bilinear')


def gen(): return torch.Generator().manual_seed(1)


@pytest.mark.parametrize('name', SMALL)
def test_protocol(name):
    tok, x = build(*SMALL[name]).eval(), image()
    z = tok.encode(x)
    assert z.dtype == torch.float32 and z.shape == (2, tok.n_tokens,
                                                    tok.width) and tok.n_tokens == 16 and tok.bits == pytest.approx(BITS[name])
    recon, z2, losses = tok(x)
    assert recon.shape == x.shape and recon.dtype == torch.float32 and torch.allclose(z2, z) and torch.allclose(recon,
            tok.decode(z), atol=1e-5)
    assert all(v.isfinite() for v in losses.values())
    assert torch.allclose(tok.encode(x[:1]), z[:1], atol=1e-5), 'a picture does not depend on its batch'
    if tok.is_discrete:
        index = tok.indices(x)
        assert index.shape == (2, 16) and index.dtype == torch.int64 and 0 <= index.min() and index.max() < round(2**(tok.bits / 16))
        assert torch.allclose(tok.lookup(index), z, atol=1e-6)
    else:
        with pytest.raises(ValueError, match='has no codes'): tok.indices(x)


@pytest.mark.parametrize('name', SMALL)
def test_gradients_reach_every_parameter_and_seeds_decide(name):
    tok, x = build(*SMALL[name], seed=3), image()
    recon, _, losses = tok(x, generator=gen())
    # its networks start silent
    if 'warm' in name: recon = recon + tok.net.decoder(tok.net.post_quant_conv(torch.ones(1, 4, 4, 4))).mean()
    (recon.square().mean() + sum(v for k, v in losses.items() if k in ('kl', 'vq', 'own'))).backward()
    assert not [k for k, p in tok.named_parameters() if p.grad is None]
    again = build(*SMALL[name], seed=3)
    assert all(torch.equal(p, q) for p, q in zip(again.parameters(), build(*SMALL[name], seed=3).parameters()))
    assert any(not torch.equal(p, q) for p, q in zip(again.parameters(), build(*SMALL[name], seed=4).parameters()))


@pytest.mark.parametrize('name', SMALL)
def test_ranges_are_the_models_own_business(name):
    tok = build(*SMALL[name]).eval()
    assert {'kl_f8': (-1, 1), 'kl_f8 warm': (-1, 1), 'dalle': (.1, .9), 'omni': (-.5, .5)}.get(name,
            (-1, 1)) == (tok.low, tok.high)
    seen = []
    tok.analyse = lambda x, f=tok.analyse: seen.append(x.aminmax()) or f(x)
    x = image()
    x[0, 0, 0, 0], x[0, 0, 0, 1] = 0, 1
    tok.encode(x)
    assert seen[0].min.item() == pytest.approx(tok.low) and seen[0].max.item() == pytest.approx(tok.high)


def test_what_does_not_fit_is_named():
    tok = build(*SMALL['kl_f8'])
    for wrong, words in ((lambda: tok.encode(image(side=64)), 'expected shape'),
                         (lambda: tok.decode(torch.zeros(1, 16, 5)), r'z: expected shape \(b, 16, 4\)'),
                         (lambda: tok.encode(image(), sample=True), 'needs a generator'),
                         (lambda: build('kl_f8', dict(image=60)), 'no multiple of the factor'),
                         (lambda: build('jpeg', {}), 'kind: expected one of'),
                         (lambda: tok.init_linear(None), 'linear_path=True'),
                         (lambda: build('omni', dict(encoder='tx')), 'encoder: expected letters'),
                         (lambda: build('cosmos', dict(factor=64)), 'factor'), (lambda: FSQ((1, 5)), 'levels')):
        with pytest.raises(ValueError, match=words): wrong()


def test_sampling_needs_its_generator_and_follows_it():
    tok, x = build(*SMALL['kl_f8']).eval(), image()
    a, b = (tok.encode(x, sample=True, generator=gen()) for _ in range(2))
    assert torch.equal(a, b) and not torch.equal(a, tok.encode(x))


def test_linear_path_is_the_best_linear_map_of_squares():
    x = F.interpolate(tensor('many', (60, 3, 7, 7), 0, 1), size=32, mode='bicubic').clamp(0, 1)
    x = (x * 255).round() / 255
    tok = build(*SMALL['kl_f8 warm']).init_linear((255 * x).round().byte().permute(0, 2, 3, 1).numpy()).eval()
    squares = F.unfold(x, 8, stride=8).transpose(1, 2).flatten(0, 1)                   # n 192
    centred = squares - squares.mean(0)
    best = centred.square().sum() - torch.linalg.svdvals(centred)[:4].square().sum()
    got = (tok.decode(tok.encode(x)) - x).square().sum()
    # the map's constant is one colour
    grey = (squares.mean(0) - squares.mean(0).reshape(3,
                                                      64).mean(1).repeat_interleave(64)).square().sum() * len(squares)
    assert best * .999 <= got <= (best + grey) * 1.001


def test_gumbel_choice_is_a_distribution_over_codes():
    book = Gumbel(16, 16)
    torch.nn.init.eye_(book.embedding.weight)
    z, _ = book(tensor('logits', (2, 16, 1, 9), -3, 3), gen())
    assert torch.allclose(z.sum(-1), torch.ones(2, 9), atol=1e-5) and z.min() >= 0
    book.at(1.)
    # a low temperature is nearly a choice
    assert book(tensor('logits', (2, 16, 1, 9), -3, 3), gen())[0].max(-1).values.mean() > z.max(-1).values.mean() + .2


def test_gumbel_choices_follow_the_probabilities():
    book = Gumbel(3, 3)
    torch.nn.init.eye_(book.embedding.weight)
    book.tau = 1e-3
    logits = torch.tensor([.2, .3, .5]).log()[None, :, None, None].expand(1, 3, 1, 20000)
    assert torch.allclose(book(logits, gen())[0].mean((0, 1)), torch.tensor([.2, .3, .5]), atol=.015)


def test_fsq_matches_the_reference():
    "Values and indices of Cosmos' FSQ module for one token, worked out from its formula in double precision"
    x = [.3, -.9, 2., .1, -.4, 1.1]
    levels, want, index, base = (8, 8, 8, 5, 5, 5), [], 0, 1
    for v, n in zip(x, levels):
        half, offset = (n - 1) * 1.001 / 2, .5 if n % 2 == 0 else 0.
        q = round(math.tanh(v + math.atanh(offset / half)) * half - offset)
        want.append(q / (n // 2))
        index += (q + n // 2) * base
        base *= n
    fsq = FSQ(levels)
    tokens = torch.tensor(x)[None, :, None, None]
    assert fsq(tokens)[0].flatten().tolist() == pytest.approx(want) and fsq.indices(tokens).item() == index


@pytest.mark.parametrize('levels', [(8, 8, 8, 5, 5, 5), (5, 3), (4, 7, 3)])
def test_fsq_matches_the_library(levels):
    "Codes, their numbers, what a number stands for, and gradients are those of vector_quantize_pytorch"
    from vector_quantize_pytorch import FSQ as Library
    ours, theirs, tokens = FSQ(levels), Library(levels), tensor('fsq', (3, len(levels), 1, 50), -3, 3)
    a, b = tokens.clone().requires_grad_(), tokens.clone().requires_grad_()
    z, (want, numbers) = ours(a)[0], theirs(b[:, :, 0].mT)
    (z * torch.arange(z.numel()).view_as(z)).sum().backward()
    (want * torch.arange(z.numel()).view_as(z)).sum().backward()
    assert torch.allclose(z, want, atol=1e-6) and torch.equal(ours.indices(tokens),
            numbers.long()) and torch.allclose(a.grad, b.grad, rtol=1e-4)
    assert torch.allclose(ours.lookup(numbers.long()), theirs.indices_to_codes(numbers), atol=1e-6)


def test_fsq_passes_gradients():
    x = tensor('x', (1, 2, 1, 5)).requires_grad_()
    FSQ((5, 8))(x)[0].sum().backward()
    assert (x.grad > 0).all()


@pytest.mark.parametrize('levels', [1, 2, 3])
def test_haar_inverts_and_keeps_energy(levels):
    x = tensor('x', (2, 3, 32, 32))
    y = haar(x, levels)
    assert torch.allclose(unhaar(y, levels), x, atol=1e-6) and torch.allclose(y[:, :3],
                                                                              F.avg_pool2d(x, 2**levels), atol=1e-6)
    assert y.square().sum() * 4**levels == pytest.approx(x.square().sum().item(), rel=1e-5)


def test_sphere_codes_have_unit_length_and_the_smallest_angle():
    book, x = SphereVQ(64, 8).eval(), F.normalize(tensor('t', (2, 8, 1, 30)), dim=1)
    z = book(x)[0]
    angles = torch.einsum('bdn,kd->bnk', x[:, :, 0], F.normalize(book.embedding.weight, dim=1))
    assert torch.equal(book.indices(x), angles.argmax(-1)) and torch.allclose(z.norm(dim=-1),
                                                                              torch.ones(2, 30), atol=1e-6)


def test_global_block_sees_all_and_window_block_its_window():
    with first_weights(0): blocks = GlobalBlock(16, 2, (4, 4)), WindowBlock(16, 2, (4, 4), 2)
    x = tensor('x', (1, 16, 16))
    moved = x.clone()
    moved[:, 0] = tensor('y', (16,))
    reach = [((b(moved) - b(x)).abs().sum(-1)[0] > 1e-7).reshape(4, 4) for b in blocks]
    assert reach[0].all() and reach[1].sum() == 4 and reach[1][:2, :2].all()


def test_published_sizes_count_their_own_tokens():
    "TokSR's Table 3 says 256 tokens for DALL-E and OmniTokenizer; at 256 pixels they make 1024"
    with torch.device('meta'):
        toks = {k: build(k, {}) for k in ('kl_f8', 'dalle', 'omni')} | {'di': build('cosmos',
                dict(levels=(8, 8, 8, 5, 5, 5))), 'ci': build('cosmos', dict(factor=8))}
    assert {k: t.n_tokens for k, t in toks.items()} == dict(kl_f8=1024, dalle=1024, omni=1024, di=256, ci=1024)
    assert KLf8Config().width == 4 and toks['di'].bits == pytest.approx(256
            * math.log2(64_000)) and toks['dalle'].bits == 1024 * 13
