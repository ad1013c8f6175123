"""Pixel tokenizers with codes and the guide branch: protocol, exact properties, converters, errors that name what
is wrong."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import SpatialNorm
from torch import nn

from toksr.core.weights import save_weights, WeightsError
from toksr.dual.guide import codebook_use, GuideConfig, GuideRecipe, GuideTokenizer, inject, load_guide, shrink
from toksr.hub.codes import from_compvis, from_published, from_var, load_published_codes, PUBLISHED_CODES
from toksr.layers.bottlenecks import entropies, index_to_signs, LFQ, signs_to_index
from toksr.layers.convnets import ConvConfig, ConvDecoder, ConvEncoder, levels
from toksr.layers.multiscale import MultiScaleVQ, SCALES
from toksr.tokenizers.code_training import balance, build_codes, CodeLoss, CodeRecipe, CodeTask, load_codes
from toksr.tokenizers.grid import build
from toksr.tokenizers.grid_training import save_grid
from toksr.tokenizers.vqgan import CodeConfig, halved, interpolation, MultichannelVQ
from toksr.training.losses import LossConfig

SMALL = dict(image=32, factor=8, base=32, times=(1, 2), layers=1, attention='middle', stem=4, latent=8, width=8,
             codes=32, scales=(1, 2, 3, 4))
KINDS = ('vqgan', 'movq', 'var', 'lfq')


def gen(seed=0): return torch.Generator().manual_seed(seed)
def pictures(b=2, px=32): return torch.rand(b, 3, px, px, generator=gen(1))


@pytest.fixture(scope='module')
def family(): return {k: build(k, SMALL).eval() for k in KINDS}


# -- protocol
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
# ------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('kind', KINDS)
def test_codes_say_all(family, kind):
    "encode = lookup(indices), decode needs nothing else, each picture is on its own"
    tok, x = family[kind], pictures(3)
    with torch.no_grad():
        index, z = tok.indices(x), tok.encode(x)
        assert index.shape == (3, tok.n_tokens) and z.shape == (3, tok.n_tokens, tok.width) and 0 <= index.min() and index.max() < tok.n_codes
        assert torch.allclose(tok.lookup(index), z, atol=1e-5) and tok(x)[0].shape == x.shape
        assert torch.equal(tok.indices(x[1:2]), index[1:2])
    with pytest.raises(ValueError, match='image'): tok.encode(pictures(1, 16))
    with pytest.raises(ValueError, match='z: expected'): tok.decode(z[:, 1:])


def test_counts():
    "Tokens and bits of the published models, on the meta device"
    from toksr.tokenizers.vqgan import VAR, VQGAN
    with torch.device('meta'):
        var, vqgan = VAR(CodeConfig(base=160, latent=32, width=32, codes=4096)), VQGAN(CodeConfig(codes=16384))
        guides = [GuideTokenizer(GuideConfig(factor=f)) for f in (16, 32, 64, 128)]
    assert (var.n_tokens, var.bits, vqgan.n_tokens, vqgan.bits) == (680, 8160, 256, 3584)
    assert [(g.n_tokens, g.guide_px) for g in guides] == [(256, 128), (64, 64), (16, 32), (4, 16)]


@pytest.mark.parametrize('kind', KINDS)
def test_gradient_passes_the_rounding(family, kind):
    "The pixel loss alone reaches every weight of the encoder; the codes' loss reaches the codebook"
    tok = build(kind, SMALL)
    recon, _, losses = tok(pictures())
    tok.zero_grad()
    recon.square().mean().backward(retain_graph=True)
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for n, p in tok.encoder.named_parameters() if not n.endswith('to_k.bias'))   # a key's bias shifts all scores alike
    losses['vq'].backward()
    assert not [n for n, p in tok.named_parameters() if p.grad is None]


def test_recipe_fields_reach_the_model():
    tok = build_codes(CodeRecipe(family='movq', base=32, times=[1, 2], width=8, latent=8, codes=48, chunks=2), 64)
    assert (tok.n_tokens, tok.width, tok.n_codes) == (128, 4, 48)
    guide = build_codes(GuideRecipe(factor=16, up=4, base=32, times=[1, 2], codes=32), 64)
    assert (guide.guide_px, guide.n_tokens) == (16, 16)
    for bad, name in ((CodeRecipe(family='seed'), 'family'), (GuideRecipe(factor=8, up=16), 'up'), (CodeRecipe(width=9, chunks=2), 'chunks'), (CodeRecipe(family='var', scales=(1, 2)), 'scales'), (CodeRecipe(base=48), 'channels'),
                      (CodeRecipe(factor=12), 'factor'), (CodeRecipe(attention='some'), 'attention'), (GuideRecipe(reads='both'), 'reads')):
        with pytest.raises(ValueError, match=name): build_codes(bad, 64)


# -- bottlenecks ---------------------------------------------------------------------------------------------------------------------------


def test_signs_are_little_endian():
    assert signs_to_index(torch.tensor([[1., -1, 1]])).item() == 5 and index_to_signs(torch.tensor([6]), 3).tolist() == [[-1., 1, 1]]
    z = torch.randn(50, 18, generator=gen())
    assert torch.equal(index_to_signs(signs_to_index(z), 18), z.sign())


def test_entropy_of_groups_is_exact_per_token():
    x = .3 * torch.randn(64, 6, generator=gen())
    assert torch.allclose(entropies(x, 1, .7)[0], entropies(x, 6, .7)[0], atol=1e-4)
    p = torch.sigmoid(4 * x / .7)                                    # two codes differ by 2 in one channel: logits by 4 x / t
    h = -(p * p.log() + (1 - p) * (1 - p).log()).sum(1).mean()
    assert torch.allclose(entropies(x, 1, .7)[0], h, atol=1e-3)


def test_multiscale_residuals_telescope():
    "map = what the codes say + what is left; with exact codes the rest is nil; ten scales are 680 tokens"
    vq = MultiScaleVQ(32, 4, (1, 2, 4)).eval()
    f = torch.randn(2, 4, 4, 4, generator=gen())
    with torch.no_grad():
        *_, (_, _, last) = vq.walk(f)
        tokens = f.flatten(2)[:, :, None]
        z, losses = vq(tokens)
        assert torch.allclose(vq.fold(z), last, atol=1e-5) and vq.indices(tokens).shape == (2, 21) and losses['vq'] > 0
        for p in vq.phis:
            nn.init.zeros_(p.bias)
            nn.init.dirac_(p.weight)     # phi = identity
        vq.vq.embedding.weight[0] = 0
        vq.vq.embedding.weight[1] = torch.tensor([1., -2, 3, 0])
        flat = vq.vq.embedding.weight[1][None, :, None, None].expand(1, 4, 4, 4)
        assert torch.allclose(vq.fold(vq.lookup(vq.indices(flat.flatten(2)[:, :, None]))), flat, atol=1e-6)
    assert MultiScaleVQ(8, 2).n_tokens == sum(s * s for s in SCALES) == 680
    with pytest.raises(ValueError, match='scales'): MultiScaleVQ(8, 2, (4, 2))


def test_multichannel_shares_one_codebook():
    vq = MultichannelVQ(16, 8, 4).eval()
    tokens = vq.embedding.weight[torch.tensor([3, 3, 7, 0])].flatten()[None, :, None, None].expand(1, 8, 1, 5)
    assert vq.indices(tokens).view(5, 4).tolist() == [[3, 3, 7, 0]] * 5 and vq.bits(20, 2) == 80


def test_revival_moves_dead_codes_of_scales():
    vq = MultiScaleVQ(16, 4, (1, 2), revive='random').train()
    before, tokens = vq.vq.embedding.weight.detach().clone(), 5 + torch.rand(8, 4, 1, 4, generator=gen())      # far from all codes: few win
    dead = torch.ones(16, dtype=torch.bool).index_fill(0, vq.indices(tokens).unique(), False)
    vq(tokens, gen())
    moved = (vq.vq.embedding.weight.detach() - before).abs().amax(1) > .1
    assert dead.sum() >= 8 and moved[dead].all()
    with pytest.raises(ValueError, match='generator'): vq(torch.randn(2, 4, 1, 4))


# -- towers --------------------------------------------------------------------------------------------------------------------------------


def test_all_norms_of_a_spatial_decoder_are_spatial():
    net = ConvDecoder(ConvConfig((32, 64), 1, 'level', 1, 'spatial'), 4, 4)
    assert not [n for n, m in net.named_modules() if isinstance(m, nn.GroupNorm) and not n.endswith('norm_layer')]
    assert sum(isinstance(m, SpatialNorm) for m in net.modules()) > 10


def test_stem_is_a_layout_of_pixels():
    enc = ConvEncoder(ConvConfig((32,), 1, 'none', 4), 4)
    assert enc(pictures()).shape == (2, 4, 8, 8) and enc.net.conv_in.weight.shape[1] == 48 and ConvConfig(levels(32, 64, 4), stem=4).factor == 64


# -- halved --------------------------------------------------------------------------------------------------------------------------------


def test_halved_is_a_linear_map_of_the_kept_half(family):
    tok, x = family['vqgan'], pictures()
    half = halved(tok)
    with torch.no_grad():
        z, full = half.encode(x), tok.encode(x)
        assert torch.equal(z, full[:, half.kept]) and 2 * half.n_tokens == tok.n_tokens and 2 * half.bits == tok.bits
        grid = torch.einsum('nk,bkd->bnd', half.weights, z).view(2, 4, 4, -1)
        assert torch.allclose(grid[:, 1, 2], (grid[:, 0, 2] + grid[:, 2, 2] + grid[:, 1, 1] + grid[:, 1, 3]) / 4, atol=1e-6)
        assert torch.allclose(half.decode(z), tok.decode(grid.flatten(1, 2)), atol=1e-5)
    for bad, name in ((lambda: halved(family['var']), 'halved'), (lambda: halved(tok, 'spiral'), 'layout'), (lambda: interpolation((1, 1)), 'grid')):
        with pytest.raises(ValueError, match=name): bad()


# -- guide ---------------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def guide(): return build('guide', dict(image=32, factor=16, up=4, base=32, times=(1, 2), layers=1, attention='middle', stem=4, out_stem=2, latent=8, width=8, codes=32)).eval()


def test_guide_paints_its_size(guide):
    x = pictures()
    index = guide.indices(x)
    out = guide.decode_codes(index)
    assert out.shape == guide.target(x).shape == (2, 3, 8, 8) and 0 <= out.min() and out.max() <= 1 and index.shape == (2, 4) and guide.bits == 20
    assert torch.allclose(out, guide(x)[0].clamp(0, 1), atol=1e-5)
    assert torch.allclose(guide.target(x), F.interpolate(x, size=8, mode='bicubic', antialias=True).clamp(0, 1))
    for bad in (index[:, :3], index + 32, index - 32):
        with pytest.raises(ValueError, match='index'): guide.decode_codes(bad)
    use = codebook_use(guide, x)
    assert use['tokens'] == 8 and use['used'] == len(index.unique()) / 32


def test_rival_sees_the_guide_only():
    rival = build('guide', dict(image=32, factor=16, up=4, base=32, times=(1, 2), layers=1, attention='middle', out_stem=2, latent=8, width=8, codes=32, reads='guide')).eval()
    x = pictures()
    with torch.no_grad(): assert torch.equal(rival.analyse(x), rival.quant_conv(rival.encoder(shrink(x, 8, -1, 1))))


def test_task_compares_with_the_shrunk_picture(guide):
    images = (255 * pictures(6)).byte().permute(0, 2, 3, 1).numpy()
    loss, parts = CodeTask(guide, images, None, CodeLoss(LossConfig(perceptual=0.))).loss(0, np.arange(4), gen())
    x = torch.from_numpy(images[:4]).permute(0, 3, 1, 2) / 255
    assert torch.allclose(parts['rec'], F.mse_loss(guide(x)[0], guide.target(x)), atol=1e-6) and torch.allclose(loss, parts['rec'] + parts['vq'])


@pytest.mark.parametrize('mode', ['wrong', 'swapped'])
def test_inject_spoils_exactly_k(mode):
    index = torch.stack([torch.randperm(64, generator=gen(s))[:16] for s in range(20)])
    for k in (0, 2, 16):
        out = inject(index, k, 64, mode, gen())
        assert ((out != index).sum(1) == k).all() and 0 <= out.min() and out.max() < 64
        assert mode == 'wrong' or torch.equal(out.sort(1)[0], index.sort(1)[0])
    assert torch.equal(inject(index, 5, 64, mode, gen()), inject(index, 5, 64, mode, gen()))


@pytest.mark.parametrize('args, name', [((17, 64, 'wrong'), 'k:'), ((-1, 64, 'wrong'), 'k:'), ((1, 64, 'swapped'), 'k:'), ((2, 64, 'lost'), 'mode'), ((2, 1, 'wrong'), 'codes')])
def test_inject_errors(args, name):
    with pytest.raises(ValueError, match=name): inject(torch.zeros(2, 16, dtype=torch.long), *args, generator=gen())


# -- loss and files ------------------------------------------------------------------------------------------------------------------------


def test_balance_is_a_ratio_of_gradients():
    w = torch.nn.Parameter(torch.tensor([3., 4.]))
    assert torch.allclose(balance((w * w).sum(), w.sum(), w), torch.tensor(10 / 2**.5), rtol=1e-3)
    assert balance(1e9 * w.sum(), 0 * w.sum(), w) == 1e4


def test_files(tmp_path, family, guide):
    file = save_grid(tmp_path/'a.safetensors', family['lfq'])
    again = load_codes(file)
    assert again.config == family['lfq'].config and again.kind == 'lfq'
    with pytest.raises(WeightsError, match='expected a guide'): load_guide(file)
    assert load_guide(save_grid(tmp_path/'g.safetensors', guide)).guide_px == 8
    with pytest.raises(WeightsError, match='expected a grid'): load_codes(save_weights(tmp_path/'b.safetensors', nn.Linear(1, 1), {'kind': 'sr'}))


# -- published weights ---------------------------------------------------------------------------------------------------------------------


BACK = (('.net.', '.'), ('conv_shortcut', 'nin_shortcut'), ('conv_norm_out', 'norm_out'), ('mid_block.resnets.0', 'mid.block_1'), ('mid_block.resnets.1', 'mid.block_2'), ('mid_block.attentions.0', 'mid.attn_1'),
        ('downsamplers.0.conv', 'downsample.conv'), ('upsamplers.0.conv', 'upsample.conv'), ('down_blocks', 'down'), ('resnets', 'block'), ('attentions', 'attn'), ('group_norm', 'norm'),
        ('to_q', 'q'), ('to_k', 'k'), ('to_v', 'v'), ('to_out.0', 'proj_out'))


def published_names(state, n):
    "The same tensors as CompVis' code would have saved them"
    out = {}
    for k, v in state.items():
        if '.attentions.' in k and v.ndim == 2: v = v[:, :, None, None]
        for a, b in BACK: k = k.replace(a, b)
        for i in range(n): k = k.replace(f'up_blocks.{i}.', f'up.{n - 1 - i}.')
        out[k] = v
    return out


@pytest.mark.parametrize('name, kind', [('vqgan-f16-1024', 'vqgan'), ('var', 'var')])
def test_compvis_round_trip(name, kind):
    "Weights under the published names give the same pictures; a missing or foreign tensor is named"
    own = dict(image=32, factor=4, base=32, times=(1, 2, 2), layers=2, latent=8, width=8, codes=32) | (dict(scales=(1, 2, 4, 8)) if kind == 'var' else {})
    tok = build(kind, own | dict(attention='level', stem=1), 3).eval()
    state = published_names(tok.state_dict(), 3) | {'loss.discriminator.weight': torch.zeros(1)}
    if kind == 'var':
        state = {k.replace('quantize.vq.', 'quantize.').replace('quantize.phis.', 'quantize.quant_resi.qresi_ls.'): v for k, v in state.items()} | {'quantize.ema_vocab_hit_SV': torch.zeros(4, 32)}
        for stem in {k[:-len('.q.weight')] for k in state if k.endswith('.q.weight')}:
            for end in ('weight', 'bias'): state[f'{stem}.qkv.{end}'] = torch.cat([state.pop(f'{stem}.{n}.{end}') for n in 'qkv'])
    assert any('down.2.attn.1.' in k for k in state) and any('up.2.attn.2.' in k for k in state) and any('up.1.upsample.conv' in k for k in state)
    again, x = from_published(name, state, **own), pictures()
    with torch.no_grad(): assert torch.equal(again.indices(x), tok.indices(x)) and torch.equal(again.decode(tok.encode(x)), tok.decode(tok.encode(x)))
    with pytest.raises(WeightsError, match='conv_in'): from_published(name, {k: v for k, v in state.items() if k != 'encoder.conv_in.weight'}, **own)
    with pytest.raises(WeightsError, match='no place'): from_published(name, state | {'decoder.extra.weight': torch.zeros(1)}, **own)


def test_published_key_lists():
    "Every name that the published VQGAN and VAR must have is reached by some tensor of ours: 16 px, five levels"
    for name, converter, n in (('vqgan-f16-16384', from_compvis, 5), ('var', from_var, 5)):
        with torch.device('meta'): own = PUBLISHED_CODES[name].kind(PUBLISHED_CODES[name].config).state_dict()
        names = published_names(own, n)
        assert {'encoder.down.4.attn.1.q.weight', 'decoder.up.4.attn.2.proj_out.bias', 'decoder.up.0.block.2.conv2.weight', 'encoder.down.3.downsample.conv.weight', 'encoder.mid.attn_1.norm.weight', 'quant_conv.weight'} <= set(names)
        assert len(names) == len(own) and names['encoder.mid.attn_1.q.weight'].shape[2:] == (1, 1)
        assert names['quant_conv.weight'].shape[-1] == (3 if name == 'var' else 1)


def test_pickles_are_not_opened(tmp_path):
    (tmp_path/'vae.pth').write_bytes(b'\x80\x02junk')
    with pytest.raises(WeightsError, match='pickle'): load_published_codes('var', tmp_path/'vae.pth')
    with pytest.raises(WeightsError, match='pickle'): load_published_codes('vqgan-f16-1024')
    with pytest.raises(ValueError, match='name'): load_published_codes('vqgan')
