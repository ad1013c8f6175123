"Adapters for published grid tokenizers, on small weights of the published structure."
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from golden_fill import tensor
from toksr.core.weights import save_weights, WeightsError
from toksr.hub.grids import load_cosmos, load_dalle, published_dalle, PublishedCosmos, PublishedKL, PublishedOmni
from toksr.tokenizers.cosmos import FSQ


def dalle_states(hidden=64, codes=512, start=8, std=.15):
    """State dicts of the package DALL-E 0.1, Encoder(n_hid=64, n_blk_per_group=1, vocab_size=512) and Decoder(…,
    n_init=8), filled by name"""
    def net(first, widths, kernels, last):
        shapes = {'blocks.input': first}
        for i, (a, b) in enumerate(zip(widths, widths[1:]), 1):
            key, mid = f'blocks.group_{i}.block_1.', (a, b // 4, b // 4, b // 4, b)
            if a != b: shapes[key + 'id_path'] = (b, a, 1)
            for j, k in enumerate(kernels): shapes[key + f'res_path.conv_{j + 1}'] = (mid[j + 1], mid[j], k)
        shapes['blocks.output.conv'] = last
        fill = lambda k, s: tensor(k, s, -std * 3**.5, std * 3**.5)
        return {f'{k}.{p}': fill(f'{k}.{p}', (o, i, n, n) if p == 'w' else (o,)) for k, (o, i, n) in shapes.items()
                for p in 'wb'}
    w = [hidden * 2**i for i in range(4)]
    return net((hidden, 3, 7), [hidden] + w, (3, 3, 3, 1), (codes, w[-1], 1)), net((start, codes, 1), [start] + w[::-1],
                                                                                   (1, 3, 3, 3), (6, hidden, 1))


def test_dalle_equals_the_package():
    """Golden: dall_e.Encoder and Decoder 0.1 on this picture with these weights (map_pixels, argmax, one-hot,
    sigmoid of the first three channels, unmap without its clamp)"""
    tok, x = published_dalle(*dalle_states(), image=32), tensor('image', (2, 3, 32, 32), 0, 1)
    index = tok.indices(x)
    assert index.flatten()[:8].tolist() == [328, 163, 4, 187, 11, 11, 392, 176] and index.unique().numel() == 17
    y = tok.decode(tok.encode(x))
    assert y[0, :, 5, 7].tolist() == pytest.approx([1.0507630, .9570060, -.1211273], abs=1e-4)
    assert (y.mean().item(), y.std().item()) == (pytest.approx(.3431478, abs=1e-4), pytest.approx(.4487936, abs=1e-4))
    assert (tok.n_tokens, tok.width, tok.bits, tok.low, tok.high) == (16, 8, 16 * 9, .1, .9)


def test_dalle_refuses_what_does_not_fit(tmp_path):
    enc, dec = dalle_states(8, 32)
    with pytest.raises(WeightsError, match="no tensor 'blocks.output.conv.w'"):
        published_dalle({k: v for k, v in enc.items() if 'output' not in k}, dec)
    with pytest.raises(WeightsError, match='blocks.output.conv.w has shape'):
        published_dalle(enc, dec | {'blocks.output.conv.w': torch.zeros(1, 1, 1, 1)})
    with pytest.raises(WeightsError, match='install the package DALL-E'): load_dalle(tmp_path)
    for name, s in (('encoder', enc), ('decoder', dec)): save_weights(tmp_path/f'{name}.safetensors', s, {})
    assert load_dalle(tmp_path, image=32).n_tokens == 16


class Latents(nn.Module):
    "A continuous program: 16 channels in sixteenths of the picture"
    def forward(self, x: torch.Tensor): return (F.avg_pool2d(x, 16).repeat(1, 6, 1, 1)[:, :16],)


class Paint(nn.Module):
    def forward(self, z: torch.Tensor): return z[:, :3].repeat_interleave(16, 2).repeat_interleave(16, 3)


class Codes(nn.Module):
    def forward(self, x: torch.Tensor):
        y = F.avg_pool2d(x, 16)
        return torch.zeros_like(y[:, 0]).long(), torch.cat([(y * 3).round() / 4, (y * 2).round() / 2], 1)


class Unpaint(nn.Module):
    "What the discrete decoder is given: indices b h w"
    def __init__(self):
        super().__init__()
        self.seen = None
    def forward(self, index):
        self.seen = index
        return torch.zeros(len(index), 3, 16 * index.shape[1], 16 * index.shape[2])


def test_cosmos_continuous_program_from_files(tmp_path):
    for name, net in dict(encoder=Latents(), decoder=Paint()).items():
        torch.jit.script(net).save(str(tmp_path/f'{name}.jit'))
    tok, x = load_cosmos(tmp_path, 16, False, image=64), tensor('x', (2, 3, 64, 64), 0, 1)
    z = tok.encode(x)
    assert z.shape == (2, 16, 16) and tok.bits == 16 * 16 * 16 and not tok.is_discrete
    assert torch.allclose(z[:, :, :3], F.avg_pool2d(2 * x - 1, 16).flatten(2).transpose(1, 2),
                          atol=1e-6), 'sees [-1,1], row by row'
    assert torch.allclose(F.avg_pool2d(tok.decode(z), 16), F.avg_pool2d(x, 16), atol=1e-6), 'gives [0,1]'
    with pytest.raises(WeightsError, match='no such file; copy encoder.jit'): load_cosmos(tmp_path/'no', 16, True)
    (tmp_path/'encoder.jit').write_bytes(b'PK')
    with pytest.raises(WeightsError, match='no TorchScript program'): load_cosmos(tmp_path, 16, False)
    with pytest.raises(ValueError, match='no multiple of the factor 16'):
        PublishedCosmos(Latents(), Paint(), 16, False, image=60)


def test_cosmos_discrete_decoder_gets_the_indices():
    decoder = Unpaint()
    tok, x = PublishedCosmos(Codes(), decoder, 16, True, image=64), tensor('x', (2, 3, 64, 64), 0, 1)
    z = tok.encode(x)
    tok.decode(z)
    assert tok.bits == pytest.approx(16 * math.log2(64_000)) and torch.equal(tok.lookup(tok.indices(x)), z)
    assert torch.equal(decoder.seen.flatten(1), FSQ().index(z)) and decoder.seen.shape == (2, 4, 4)


class Omni(nn.Module):
    "The interface of OmniTokenizer's VQGAN module"
    def __init__(self):
        super().__init__()
        self.codebook = nn.Module()
        self.codebook.register_buffer('embeddings', tensor('book', (64, 8)))
        self.lo = self.hi = self.given = None
    def encode(self, x, is_image, include_embeddings=False):
        self.lo, self.hi = x.min().item(), x.max().item()
        index = (F.avg_pool2d(x, 8).mean(1) * 60 + 32).long().clamp(0, 63)[:, None]                # b 1 h w
        return self.codebook.embeddings[index].permute(0, 4, 1, 2, 3), index
    def decode(self, index, is_image):
        self.given = index
        return torch.full((len(index), 3, 32, 32), .5)


def test_omni_passes_range_codes_and_indices():
    model = Omni()
    tok, x = PublishedOmni(model, image=32), tensor('x', (2, 3, 32, 32), 0, 1)
    z = tok.encode(x)
    assert z.shape == (2, 16, 8) and tok.bits == 16 * 6 and -.5 <= model.lo < -.4 and .4 < model.hi <= .5
    assert torch.equal(tok.decode(z), torch.ones(2, 3, 32, 32)) and torch.equal(model.given,
            tok.indices(x)) and torch.equal(tok.lookup(model.given), z)
    with pytest.raises(WeightsError, match='has no encode'): PublishedOmni(nn.Identity())


@pytest.mark.parametrize('extra', [{}, dict(use_quant_conv=False, use_post_quant_conv=False, latent_channels=16)],
                         ids=['SD 1', 'SD 3'])
def test_kl_is_diffusers_autoencoder(extra):
    from diffusers import AutoencoderKL
    torch.manual_seed(0)
    vae = AutoencoderKL(down_block_types=('DownEncoderBlock2D',) * 3, up_block_types=('UpDecoderBlock2D',) * 3,
                        block_out_channels=(8, 8, 16), norm_num_groups=4, layers_per_block=1, **extra).eval()
    x = tensor('x', (2, 3, 32, 32), 0, 1)
    want = vae.decode(vae.encode(2 * x - 1).latent_dist.mode()).sample / 2 + .5
    tok = PublishedKL(vae, image=32)
    assert tok.n_tokens == 64 and tok.width == extra.get('latent_channels',
                                                         4) and torch.allclose(tok.decode(tok.encode(x)),
                                                                               want, atol=1e-5)
    assert tok.scale == vae.config.scaling_factor
