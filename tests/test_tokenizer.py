"""The TiTok family against the public implementation's numbers, key lists and parameter counts; the linear path;
bad input."""
import ast
import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from golden_fill import fill_, tensor

from toksr.encoders.text import Text
from toksr.layers.pca import component_scale, fit_pca, pixels
from toksr.tokenizers.titok import PCATokenizer, Tokenizer
from toksr.tokenizers.towers import INITS, size, TokenizerConfig, TOKENIZERS

GOLDEN = Path(__file__).parent / 'golden'
TINY = TokenizerConfig(image=32, patch=8, n_tokens=6, width=4, encoder='d64x2', decoder='d32x2', text_width=20,
                       text_length=7)


def on_meta(config: TokenizerConfig) -> Tokenizer:
    with torch.device('meta'): return Tokenizer(config)


def count(module) -> int: return sum(p.numel() for p in module.parameters())


def batch(c: TokenizerConfig, b: int = 3, seed: int = 0) -> tuple[torch.Tensor, Text]:
    g = torch.Generator().manual_seed(seed)
    words = torch.randint(1, c.text_length + 1, (b, 1), generator=g)
    text = Text(torch.randn(b, c.text_length, c.text_width, generator=g), torch.randn(b, c.text_width, generator=g),
                torch.arange(c.text_length)[None] < words)
    return torch.rand(b, 3, c.image, c.image, generator=g), text


def toys(n: int, side: int, seed: int = 0) -> np.ndarray:
    x = F.interpolate(torch.rand(n, 3, 7, 7, generator=torch.Generator().manual_seed(seed)), size=side, mode='bicubic')
    return (255 * x.clamp(0, 1)).byte().permute(0, 2, 3, 1).contiguous().numpy()


# ---- parity with the public code

@pytest.mark.parametrize('attention', ['math', 'sdpa'])
def test_golden_tatitok(attention):
    "Small/small TA-TiTok at 64 px on weights made from their names: moments, image and KL to 1e-5."
    want = np.load(GOLDEN / 'tatitok_small_small_64.npz')
    tok = fill_(Tokenizer(TokenizerConfig(image=64, encoder='small', decoder='small', text_in='decoder',
                                          attention=attention)), .05)
    image, text = tensor('input.image', (1, 3, 64, 64), 0, 1), tensor('input.text', (1, 77, 768), -1.7, 1.7)
    with torch.no_grad():
        moments = tok.moments(image, text)
        recon, z, losses = tok(image, text)
    assert moments.shape == (1, 32, 1, 32) and z.shape == (1, 32, 16)
    np.testing.assert_allclose(moments.numpy(), want['moments'], atol=1e-5)
    np.testing.assert_allclose(recon[0, :, :16, :16].numpy(), want['image_crop'], atol=1e-5)
    assert abs(recon.mean().item() - want['image_mean']) < 1e-5 and abs(recon.std().item() - want['image_std']) < 1e-5
    assert abs(losses['kl'].item() - want['kl']) < 1e-5 * want['kl']


def key_list(name: str) -> dict[str, tuple]:
    rows = [r.split('\t') for r in (GOLDEN / name).read_text().splitlines() if r and not r.startswith('#')]
    return {k: ast.literal_eval(shape) for k, shape, _ in rows}


def test_released_keys_load_strictly():
    keys = key_list('tatitok_bl32_keys.txt')
    tok = on_meta(TOKENIZERS['ta-titok-bl32'])
    assert {k: tuple(v.shape) for k, v in tok.state_dict().items()} == keys and len(keys) == 461
    tok.load_state_dict({k: torch.empty(s, device='meta') for k, s in keys.items()}, strict=True, assign=True)
    assert count(tok) == 390_202_484
    assert count(tok.decoder) == 304_282_452


def test_parameter_counts():
    tok = on_meta(TOKENIZERS['textok-vae'])
    encoder, decoder = count(tok.encoder) + tok.latent_tokens.numel(), count(tok.decoder)
    assert (encoder, round(decoder / 1e6, 2)) == (86_569_760, 86.53)
    vq = on_meta(TOKENIZERS['textok-vq'])
    assert vq.quantize.embedding.weight.shape == (8192, 64) and vq.bits == 32 * 13
    assert tok.bits == 32 * 16 * 16


@pytest.mark.parametrize('name', TOKENIZERS)
def test_every_named_tokenizer_runs_on_meta(name):
    c = TOKENIZERS[name]
    text = torch.zeros(2, c.text_length, c.text_width, device='meta')
    tok = on_meta(c).eval()
    x = torch.zeros(2, 3, c.image, c.image, device='meta')
    m = tok.moments(x, text)
    assert m.shape == (2, c.width * (2 if c.bottleneck == 'kl' else 1), 1, 32)
    assert tok.decode(torch.zeros(2, 32, c.width, device='meta'), text).shape == x.shape


# ---- the four properties of text in the encoder (no public weights exist)

def test_masked_text_is_no_text():
    full = Tokenizer(replace(TINY, mask_text=True))
    bare = Tokenizer(replace(TINY, text_in='decoder'))
    bare.load_state_dict({k: v for k, v in full.state_dict().items() if not k.startswith('encoder.text')})
    image, text = batch(TINY)
    hidden = replace(text, mask=torch.zeros_like(text.mask))
    for attention in ('math', 'sdpa'):
        for m in full.modules():
            if hasattr(m, 'attention'): m.attention = attention
        torch.testing.assert_close(full.moments(image, hidden), bare.moments(image, text), atol=2e-6, rtol=0)
    assert (full.moments(image, text) - bare.moments(image, text)).abs().max() > 1e-4


def test_only_text_keys_are_missing_from_a_tatitok_encoder():
    with torch.device('meta'): tok = Tokenizer(replace(TOKENIZERS['ta-titok-bl32'], text_in='both'))
    keys = key_list('tatitok_bl32_keys.txt')
    missing, unknown = tok.load_state_dict({k: torch.empty(s, device='meta') for k, s in keys.items()}, strict=False,
                                           assign=True)
    assert unknown == [] and set(missing) == {f'encoder.text_guidance_{k}'
                                              for k in ('proj.weight', 'proj.bias', 'positional_embedding')}


def test_text_changes_latents_and_words_carry_their_position():
    tok, (image, text) = Tokenizer(TINY), batch(TINY)
    z, other = tok.encode(image, text), tok.encode(image, text.index([1, 2, 0]))
    assert ((z - other).abs().amax((1, 2)) > 1e-4).all()
    order = torch.randperm(TINY.text_length, generator=torch.Generator().manual_seed(1))
    twin = Tokenizer(TINY)
    twin.load_state_dict(tok.state_dict())
    twin.encoder.text_guidance_positional_embedding.data = tok.encoder.text_guidance_positional_embedding[order].detach()
    shuffled = replace(text, states=text.states[:, order], mask=text.mask[:, order])
    torch.testing.assert_close(twin.encode(image, shuffled), z, atol=1e-5, rtol=0)
    assert (tok.encode(image, shuffled) - z).abs().max() > 1e-4


def test_text_in_decides_who_reads():
    image, text = batch(TINY)
    other = text.index([1, 2, 0])
    ta, plain = Tokenizer(replace(TINY, text_in='decoder')), Tokenizer(replace(TINY, text_in='none'))
    z = ta.encode(image, text)
    assert torch.equal(z, ta.encode(image, other)) and (ta.decode(z, text) - ta.decode(z, other)).abs().max() > 1e-4
    assert torch.equal(plain(image)[0], plain(image, text)[0])


def test_masked_padding_has_no_influence():
    tok, (image, text) = Tokenizer(replace(TINY, mask_text=True)), batch(TINY)
    spoilt = replace(text, states=torch.where(text.mask[..., None], text.states, torch.tensor(50.)))
    torch.testing.assert_close(tok(image, spoilt)[0], tok(image, text)[0])
    unmasked = Tokenizer(TINY)
    assert (unmasked(image, spoilt)[0] - unmasked(image, text)[0]).abs().max() > 1e-4


def test_legacy_reshape():
    """The first TiTok weights saw channels and tokens scrambled by a reshape: with the read-out the same, latents
    are a permutation of numbers."""
    a, b = Tokenizer(TINY), Tokenizer(replace(TINY, is_legacy=True))
    seen = {}
    for t, k in ((a, 'a'), (b, 'b')): t.encoder.ln_post.register_forward_hook(lambda m, i, o, k=k: seen.update({k: o}))
    image, text = batch(TINY)
    ma, mb = a.moments(image, text), b.moments(image, text)
    torch.testing.assert_close(seen['a'], seen['b'])
    h = seen['b']                                                     # b n d
    scrambled = h.reshape(3, h.shape[2], h.shape[1], 1)               # b d n 1, without the transpose
    torch.testing.assert_close(mb, b.encoder.conv_out(scrambled).reshape(3, 8, 1, 6))
    assert (ma - mb).abs().max() > 1e-3


# ---- start, determinism, precision

@pytest.mark.parametrize('init', INITS)
def test_seed_decides_the_weights(init):
    c = replace(TINY, init=init, head='conv', linear_path=True, bottleneck='vq', codes=16)
    torch.manual_seed(1)
    a = Tokenizer(c, seed=5)
    torch.manual_seed(2)
    b = Tokenizer(c, seed=5)
    other = Tokenizer(c, seed=6)
    assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))
    assert not torch.equal(a.latent_tokens, other.latent_tokens)


def test_upstream_start():
    """Encoder: truncated normal .02; a text decoder keeps the default start (uniform, std 1/sqrt(3 fan-in)): .0180
    against .0200 at width 1024."""
    c = replace(TINY, encoder='d256x2', decoder='d1024x1')
    tok, plain = Tokenizer(c), Tokenizer(replace(c, text_in='none'))
    assert abs(tok.encoder.transformer[0].mlp.c_fc.weight.std().item() - .02) < 5e-4
    assert abs(tok.decoder.transformer[0].mlp.c_fc.weight.std().item() - .0180) < 3e-4
    assert abs(plain.decoder.transformer[0].mlp.c_fc.weight.std().item() - .0200) < 3e-4
    assert abs(tok.latent_tokens.std().item() - 256**-.5) < 5e-3
    assert (tok.encoder.transformer[0].attn.in_proj_bias == 0).all()


def test_forward_mode_sample_and_gradients():
    tok, (image, text) = Tokenizer(TINY), batch(TINY)
    draw = [tok(image, text, torch.Generator().manual_seed(s))[1] for s in (0, 0, 1)]
    assert torch.equal(draw[0], draw[1]) and not torch.equal(draw[0], draw[2])
    assert torch.equal(tok.encode(image, text), tok.encode(image, text)) and torch.equal(tok(image, text)[1],
                                                                                         tok.encode(image, text))
    torch.testing.assert_close(tok.encode(image, text, True, torch.Generator().manual_seed(0)), draw[0])
    recon, _, losses = tok(image, text, torch.Generator().manual_seed(0))
    (F.mse_loss(recon, image) + 1e-6 * losses['kl']).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in tok.parameters())


def test_bf16_autocast_stays_close_and_returns_float32():
    tok, (image, text) = Tokenizer(replace(TINY, init='fan_in_pos', head='conv')), batch(TINY)
    with torch.no_grad():
        want = tok(image, text)[0]
        with torch.autocast('cpu', torch.bfloat16): got, z, losses = tok(image, text)
    assert got.dtype == z.dtype == losses['kl'].dtype == torch.float32
    assert (got - want).abs().max() < .05 * want.std() + .02


def test_vq_tokenizer():
    c = replace(TINY, bottleneck='vq', codes=32, init='fan_in_pos')
    tok, (image, text) = Tokenizer(c).eval(), batch(TINY)
    z = tok.encode(image, text)
    dist = torch.cdist(z.flatten(0, 1).double(), tok.quantize.embedding.weight.double())
    assert dist.min(1).values.max() < 1e-6 and tok.bits == 6 * 5
    tok.train()
    recon, _, losses = tok(image, text)
    (F.mse_loss(recon, image) + losses['vq']).backward()
    assert all(p.grad is not None for p in tok.parameters())


def test_config_survives_json():
    for c in TOKENIZERS.values(): assert TokenizerConfig(**json.loads(json.dumps(asdict(c)))) == c
    assert size({'width': 96, 'layers': 2, 'heads': 3}) == (96, 2, 3)


# ---- the linear path

def test_pca_equals_exact_svd():
    """12,288-dimensional images, 64 components: captured variance within 1e-3 of the exact decomposition,
    orthonormal, repeatable."""
    images = toys(500, 64)
    pca, again = fit_pca(images, 64, seed=3), fit_pca(images, 64, seed=3)
    assert all(torch.equal(a, b) for a, b in zip(pca, again))
    x = pixels(images)
    s = torch.linalg.svdvals((x - x.mean(0)).double())
    torch.testing.assert_close(pca.mean, x.mean(0), atol=1e-6, rtol=0)
    torch.testing.assert_close(pca.basis.T @ pca.basis, torch.eye(64), atol=1e-4, rtol=0)
    exact = (s[:64]**2).sum() / (s**2).sum()
    got = (pca.std.double()**2).sum() / (s**2).sum() * len(x)
    assert -1e-5 < exact - got < 1e-3, (exact, got)


def test_pca_is_exact_on_small_images():
    images = toys(400, 12)
    pca = fit_pca(images, 300)
    s = torch.linalg.svdvals(pixels(images).double() - pixels(images).double().mean(0))[:300]
    torch.testing.assert_close(pca.std.double(), s / 20, atol=1e-4, rtol=1e-3)


def test_linear_start_is_pca():
    images = toys(300, 32)
    image = pixels(images[:4]).view(4, 3, 32, 32)
    _, text = batch(TINY, 4)
    pca = fit_pca(images, 24)
    floor = PCATokenizer.fit(images, 6, 4)
    for whiten in (0., .5, 1.):
        for init in INITS:
            tok = Tokenizer(replace(TINY, linear_path=True, head='conv', init=init, logvar_start=-6.)).init_linear(pca,
                    component_scale(pca.std, whiten))
            with torch.no_grad(): recon, z, losses = tok(image, text)
            torch.testing.assert_close(recon, floor.decode(floor.encode(image)), atol=2e-4, rtol=0)
            assert (tok.moments(image, text)[:, 4:] == -6).all()
            recon, _, losses = tok(image, text)
            (F.mse_loss(recon, image) + losses['kl'] * 1e-6).backward()
            assert tok.encoder.conv_out.weight.grad.abs().sum() > 0 or tok.decoder.ffn[0].weight.grad.abs().sum() > 0
    assert floor.bits == 6 * 4 * 16 and abs(component_scale(pca.std, 1.) / pca.std - 1).max() < 1e-5


def test_pca_tokens_hold_the_largest_first():
    images = toys(300, 32)
    floor = PCATokenizer.fit(images, 6, 4)
    spread = floor.encode(pixels(images).view(-1, 3, 32, 32)).std((0, 2))
    assert (spread.diff() < 0).all()


# ---- bad input

@pytest.mark.parametrize('change, says', [
    (lambda x, t: (x[:, :1], t), r'image: expected shape \(b, 3, 32, 32\), got \(3, 1, 32, 32\)'),
    (lambda x, t: (x[..., :16], t), 'image: expected shape'),
    (lambda x, t: (x[0], t), 'image: expected shape'),
    (lambda x, t: (2 * x - 1, t), r'image: expected values in \[0,1\]'),
    (lambda x, t: (255 * x, t), r'image: expected values in \[0,1\]'),
    (lambda x, t: (x.where(x > .5, torch.nan), t), r'image: expected values in \[0,1\]'),
    (lambda x, t: ((255 * x).byte(), t), 'divide by 255'),
    (lambda x, t: (x, None), r"text: this tokenizer reads captions \(text_in='both'\)"),
    (lambda x, t: (x, t.states[..., :5]), r'text: expected states of shape \(3, up to 7, 20\), got \(3, 7, 5\)'),
    (lambda x, t: (x, t.index([0])), 'text: expected states'),
    (lambda x, t: (x, torch.cat([t.states] * 2, 1)), 'text: expected states'),
])
def test_bad_input(change, says):
    with pytest.raises(ValueError, match=says) as e: Tokenizer(TINY)(*change(*batch(TINY)))
    assert '\n' not in str(e.value)


def test_bad_weights():
    tok, state = Tokenizer(TINY), Tokenizer(replace(TINY, n_tokens=5)).state_dict()
    with pytest.raises(ValueError, match=r'weights: latent_tokens has shape \(5, 64\), this tokenizer needs \(6, 64\)'):
        tok.load_state_dict(state)
    state = tok.state_dict()
    state.pop('latent_tokens')
    state['foo'] = torch.zeros(1)
    with pytest.raises(ValueError, match=r'weights: 1 keys missing \(first: latent_tokens\), 1 unknown \(first: foo\)'):
        tok.load_state_dict(state)


@pytest.mark.parametrize('bad, says', [
    (dict(text_in='encoder'), 'text_in: expected one of'), (dict(bottleneck='fsq'), 'bottleneck: expected one of'),
    (dict(patch=7), 'patch: 7 does not divide'),
    (dict(n_tokens=0), 'n_tokens'), (dict(encoder='huge'), 'size: expected one of'),
    (dict(encoder='d65x2h4'), 'heads: 4 does not divide'),
])
def test_bad_config(bad, says):
    with pytest.raises(ValueError, match=says): Tokenizer(replace(TINY, **bad))


def test_bad_latents_and_pca():
    tok, (_, text) = Tokenizer(TINY), batch(TINY)
    with pytest.raises(ValueError, match=r'z: expected shape \(b, 6, 4\), got \(3, 4, 6\)'):
        tok.decode(torch.zeros(3, 4, 6), text)
    with pytest.raises(ValueError, match='init_linear: this tokenizer has no linear path'):
        tok.init_linear(fit_pca(toys(50, 32), 24))
    with pytest.raises(ValueError, match='pca: expected 24 components'):
        Tokenizer(replace(TINY, linear_path=True)).init_linear(fit_pca(toys(50, 32), 20))
    with pytest.raises(ValueError, match='fit_pca: 24 components need more than 24 images'): fit_pca(toys(24, 32), 24)
