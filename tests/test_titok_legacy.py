"""Released TiTok and TA-TiTok: key lists of the public code, strict loading, numbers of the public code on named
weights."""
import ast
from pathlib import Path

import numpy as np
import pytest
import torch
from golden_fill import fill_, tensor

from toksr.core.weights import save_weights, WeightsError
from toksr.hub.titok import config_of, from_released, LegacyTiTok, load_released
from toksr.tokenizers.titok import Tokenizer
from toksr.tokenizers.towers import TokenizerConfig

GOLDEN = Path(__file__).parent / 'golden'


def meta_state(name: str) -> dict[str, torch.Tensor]:
    rows = [r.split('\t') for r in (GOLDEN / name).read_text().splitlines() if r and not r.startswith('#')]
    return {k: torch.empty(ast.literal_eval(shape), device='meta') for k, shape, _ in rows}


def count(module) -> int: return sum(p.numel() for p in module.parameters())


def test_legacy_titok_l32_loads_strictly():
    "692 tensors of TiTok-L32, listed by the public code (942a96f) on the meta device."
    state = meta_state('titok_l32_keys.txt')
    tok = from_released(state)
    assert isinstance(tok, LegacyTiTok) and {k: v.shape for k, v in tok.state_dict().items()} == {k: v.shape
            for k, v in state.items()} and len(state) == 692
    assert count(tok) == 641_054_735 and (tok.n_tokens, tok.width, tok.bits) == (32, 12, 32 * 12)
    c = tok.config
    assert (c.image, c.patch, c.encoder, c.decoder, c.codes, c.text_in, c.is_legacy) == (256, 16, 'large', 'large',
                                                                                         4096, 'none', True)


def test_tatitok_vq_loads_strictly():
    "463 tensors of TA-TiTok bl32_vq: the KL model's and a codebook with the running share of its codes."
    state = meta_state('tatitok_bl32_vq_keys.txt')
    tok = from_released(state)
    assert type(tok) is Tokenizer and len(state) == 463 and count(tok) == 390_800_532 and 'quantize.embed_prob' in tok.state_dict()
    assert (tok.config.text_in, tok.config.encoder, tok.config.decoder, tok.config.codes, tok.width) == ('decoder',
            'base', 'large', 8192, 64)
    x, text = torch.zeros(2, 3, 256, 256, device='meta'), torch.zeros(2, 77, 768, device='meta')
    assert tok.moments(x, text).shape == (2, 64, 1, 32) and tok.decode(torch.zeros(2, 32, 64, device='meta'),
                                                                       text).shape == x.shape


def test_tatitok_kl_loads_strictly():
    tok = from_released(meta_state('tatitok_bl32_keys.txt'))
    assert count(tok) == 390_202_484 and tok.config.bottleneck == 'kl' and tok.bits == 32 * 16 * 16


@pytest.mark.parametrize('name, key',
                         [('titok_l32_keys.txt', 'pixel_decoder.up.3.block.0.nin_shortcut.weight'),
                          ('tatitok_bl32_vq_keys.txt', 'decoder.conv_out.bias')])
def test_a_missing_tensor_is_named(name, key):
    state = meta_state(name)
    del state[key]
    with pytest.raises(ValueError, match=f'1 keys missing .first: {key}.'): from_released(state)


def test_a_codebook_without_shares_is_a_plain_one():
    state = meta_state('tatitok_bl32_vq_keys.txt')
    del state['quantize.embed_prob']
    assert from_released(state).config.revive == 'none'


def test_golden_legacy():
    """Small/small legacy TiTok at 64 px, 8 tokens, on weights made from their names; the public code (942a96f) gave
    these tokens, indices and image.

    Covers the reshape without transposing, unit codes, the mixture of pixel codes, and the shortcut of the pixel
    decoder's blocks."""
    want = np.load(GOLDEN / 'titok_legacy_small_64.npz')
    tok = fill_(LegacyTiTok(TokenizerConfig(image=64, n_tokens=8, width=12, encoder='small', decoder='small',
                                            text_in='none', bottleneck='vq', codes=64, is_legacy=True)), .05).eval()
    image = tensor('input.image', (1, 3, 64, 64), 0, 1)
    with torch.no_grad():
        tokens, index, codes = tok.moments(image), tok.indices(image), tok.encode(image)
        recon = tok.decode(codes)
    np.testing.assert_allclose(tokens.numpy(), want['tokens'], atol=1e-5)
    assert np.array_equal(index.numpy(), want['indices'][:, 0])
    np.testing.assert_allclose(codes.numpy(), want['codes'][:, :, 0].transpose(0, 2, 1), atol=1e-5)
    assert torch.allclose(tok.lookup(index), codes, atol=1e-6)
    np.testing.assert_allclose(recon[0, :, :16, :16].numpy(), want['image_crop'], atol=2e-4)
    assert abs(recon.mean().item() - want['image_mean']) < 1e-4 and abs(recon.std().item() - want['image_std']) < 1e-4


def test_load_released_reads_a_sealed_file_and_nothing_else(tmp_path):
    c = TokenizerConfig(image=32, patch=8, n_tokens=6, width=4, encoder='d64x1h1', decoder='d64x1h1', text_in='none')
    tok = Tokenizer(c).eval()
    path = save_weights(tmp_path / 'model.safetensors', tok, {})
    x = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(load_released(path).encode(x), tok.encode(x))
    with pytest.raises(WeightsError, match='expected a released TiTok'):
        load_released(save_weights(tmp_path / 'other.safetensors', torch.nn.Linear(2, 2), {}))
    with pytest.raises(FileNotFoundError): load_released(tmp_path / 'none.safetensors')


def test_refusals():
    base = dict(image=32, n_tokens=6, width=4, encoder='d64x1h1', decoder='d64x1h1', text_in='none', bottleneck='vq',
                codes=8, is_legacy=True)
    with pytest.raises(ValueError, match='patch'): LegacyTiTok(TokenizerConfig(**base | dict(patch=8)))
    with pytest.raises(ValueError, match='is_legacy'): LegacyTiTok(TokenizerConfig(**base | dict(is_legacy=False)))
