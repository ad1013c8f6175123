"""Every kind of training takes steps on a GPU, and what comes back is on the CPU. Skipped where there is none."""
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import toksr.tokenizers.cosmos
import toksr.tokenizers.omni
from toksr.data.degradations import downscale
from toksr.data.images import to_float
from toksr.dual.diffusion_training import LatentRecipe, train_latent
from toksr.dual.guide import GuideRecipe
from toksr.dual.semantic_training import answers_of, encode_images, SemanticRecipe, train_semantic
from toksr.encoders.text import Text
from toksr.metrics.alignment import AlignerRecipe, train_aligner
from toksr.sr.latent_training import BaselineRecipe, load_space, resolve, train_baseline
from toksr.sr.srresnet import train_upscaler, UpscalerRecipe
from toksr.sr.training import SRRecipe, super_resolve, train_sr
from toksr.sr.variants import conditions, SRVariantRecipe, train_variants
from toksr.tokenizers.code_training import CodeRecipe, paint, train_codes
from toksr.tokenizers.grid_training import GridRecipe, train_grid
from toksr.tokenizers.running import encode_all, reconstruct
from toksr.tokenizers.training import TokenizerRecipe, train_tokenizer
from toksr.tokenizers.variants import code_use, train_variant, train_vq, VariantRecipe as TextArmRecipe, VQRecipe
from toksr.training.splits import home, on_gpu, Split

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU')
CPU, SHORT = torch.device('cpu'), dict(steps=3, batch=4, warmup=1)
PLAIN = SHORT | dict(precision='no')


@pytest.fixture(scope='module')
def split():
    g = torch.Generator().manual_seed(0)
    pixels = F.interpolate(torch.rand(96, 3, 8, 8, generator=g), size=64, mode='bicubic').clamp(0, 1)
    text = lambda n: Text(torch.randn(n, 24, 384, generator=g), F.normalize(torch.randn(n, 384, generator=g), dim=-1),
                          torch.ones(n, 24, dtype=torch.bool))
    return Split('train', (255*pixels).byte().permute(0, 2, 3, 1).numpy(), ['']*96, [], [],
                 replace(text(96), empty=text(1)))


@pytest.fixture(scope='module')
def tok(split, tmp_path_factory):
    recipe = TokenizerRecipe(**SHORT, n_tokens=8, width=8, size='d64x2', linear_path=True, head_width=8,
                             perceptual_start=0., flip=True, adv=.1, adv_start=1)
    return train_tokenizer(recipe, split, root=tmp_path_factory.mktemp('ckpt'))[0]


def sane(*things):
    for x in things:
        if isinstance(x, torch.Tensor): assert x.device == CPU and x.float().isfinite().all()
        else: assert home(x) == CPU and all(p.device == CPU and p.isfinite().all() for p in x.parameters())


def test_models_come_back(tok):
    with on_gpu(tok) as device: assert device.type == 'cuda' and home(tok).type == 'cuda'
    sane(tok)


def test_both_devices_agree(tok, split):
    there = encode_all(tok, split.images, split.text)
    with torch.no_grad(): here = tok.encode(to_float(split.images), split.text)
    torch.testing.assert_close(there, here, atol=5e-2, rtol=1e-2)          # tensor cores round


def test_tokenizer(tok, split): sane(tok, reconstruct(tok, split.images, split.text))


def test_super_resolver(tok, split, tmp_path):
    sr, _ = train_sr(SRRecipe(**SHORT, dit='d128x6', retouch=8, image_start=0.), split, tok, tmp_path)
    sane(sr, sr.tokenizer, super_resolve(sr, downscale(to_float(split.images[:8]), 4), split.text.index(slice(0, 8)),
                                         steps=2, guidance=2.))


def test_upscaler(split, tmp_path):
    sane(train_upscaler(UpscalerRecipe(**SHORT, channels=8, blocks=1, perceptual_start=0.), split, tmp_path)[0])


@pytest.mark.parametrize('kind', ['concat', 'cross'])
def test_arms(tok, split, tmp_path, kind):
    sr, _ = train_variants(SRVariantRecipe(conditioning=kind, dit='d32x1', **PLAIN), [0], split, tok, tmp_path)[0]
    sane(sr, conditions(sr, split.images, split.text))


@pytest.mark.parametrize('kind', ['flow', 'infdit'])
def test_rivals(tok, split, tmp_path, kind):
    how = dict(objective='flow', pretokenise=True) if kind == 'flow' else dict(net='infdit', objective='edm',
                                                                               captions=False, drop=0.)
    sr, _ = train_baseline(BaselineRecipe(**PLAIN, dit='d64x2', fit_on=64, **how), split,
                           tok if kind == 'flow' else load_space('pixels', '', 64, 8), tmp_path)
    sane(sr, resolve(sr, downscale(to_float(split.images[:8]), 4), split.text.index(slice(0, 8)), steps=2))


GRIDS = dict(dalle=dict(width=16, channels=(8, 8, 16, 16), rec=0., codes=64), kl_f8=dict(channels=(8, 16, 16)),
             omni=dict(width=8, hidden=32, heads=2, codes=64),
             cosmos=dict(levels=(8, 8, 8, 5, 5, 5), width=6, channels=(16, 16), stem=16, inner=16))

@pytest.mark.parametrize('family', GRIDS)
def test_grids(split, tmp_path, family):
    t, _ = train_grid(GridRecipe(**PLAIN, family=family, perceptual_start=0., **GRIDS[family]), split, root=tmp_path)
    sane(t, reconstruct(t, split.images, None))


@pytest.mark.parametrize('family', ['vqgan', 'movq', 'var', 'lfq', 'guide'])
def test_codes(split, tmp_path, family):
    wide = 10 if family == 'lfq' else 8
    recipe = GuideRecipe(**PLAIN, base=32, codes=64) if family == 'guide' else CodeRecipe(**PLAIN, family=family,
            base=32, latent=wide, width=wide, codes=64, perceptual_start=0.)
    t, _ = train_codes(recipe, split, tmp_path)
    sane(t, paint(t, split.images))


def test_text_arms(split, tmp_path):
    own = PLAIN | dict(n_tokens=8, width=8, size='d64x2', linear_path=True, perceptual_start=0.)
    vq, _ = train_vq(VQRecipe(bottleneck='vq', codes=64, **own), split, tmp_path)
    sane(train_variant(TextArmRecipe(**own), split, root=tmp_path)[0], vq)
    assert 0 < code_use(vq, split)['used'] <= 1


@pytest.mark.parametrize('kind', ['seed', 'lavit'])
@pytest.mark.parametrize('keep', [True, False])
def test_semantic(split, tmp_path, kind, keep):
    recipe = SemanticRecipe(kind=kind, steps_match=2, steps_codes=2, steps_reverse=2, batch=8, warmup=1, size='d64x2',
                            queries=8, codes=64, code_width=8, decoder_layers=1, reverse_layers=1,
                            distill=1., keep_features=keep)
    m, _ = train_semantic(recipe, split, root=tmp_path)
    sane(m, encode_images(m, split.images), *([answers_of(m, split.images)] if kind == 'seed' else []))


def test_latent_diffusion(split, tmp_path):
    grid, _ = train_grid(GridRecipe(**PLAIN, family='kl_f8', channels=(8, 16, 16)), split, root=tmp_path)
    sane(train_latent(LatentRecipe(**PLAIN, dit='d128x6', patch=1), split, grid, tmp_path)[0])


def test_judge(split, tmp_path): sane(train_aligner(AlignerRecipe(**PLAIN), split, tmp_path)[0])
