"Conditioning arms: what each model is told, positions, held-out losses, files."
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml

from toksr.core.weights import WeightsError
from toksr.data.degradations import downscale
from toksr.encoders.text import Text
from toksr.encoders.vision import DinoFeatures
from toksr.metrics.effects import over_seeds
from toksr.sr.conditioning import build_dit, ConditionedConfig, stretch, VARIANT_SIZES
from toksr.sr.variants import (
    conditions, held_out_loss, load_variants, save_variants, SRVariantConfig, SRVariantRecipe, SRVariantTask,
    train_variants, VariantResolver,
)
from toksr.tokenizers.running import encode_all
from toksr.tokenizers.titok import PCATokenizer, save_tokenizer, Tokenizer
from toksr.tokenizers.towers import TokenizerConfig
from toksr.training.loop import step_generator
from toksr.training.recipes import take
from toksr.training.splits import Split

ROOT = Path(__file__).resolve().parents[1]
KINDS = dict(concat=dict(), separate=dict(positions='separate'), interpolated=dict(positions='interpolated'),
             cross=dict(conditioning='cross'))


@pytest.fixture(scope='module')
def toy():
    g = torch.Generator().manual_seed(0)
    pixels = F.interpolate(torch.rand(80, 3, 7, 7, generator=g), size=64, mode='bicubic').clamp(0, 1)
    empty = Text(torch.zeros(1, 5, 16), torch.zeros(1, 16), torch.ones(1, 5, dtype=torch.bool))
    text = Text(torch.randn(80, 5, 16, generator=g), torch.randn(80, 16, generator=g),
                torch.ones(80, 5, dtype=torch.bool), empty)
    images = (255 * pixels).byte().permute(0, 2, 3, 1).numpy()
    return Split('toy', images, [''] * 80, [[]] * 80, [''] * 80, text), PCATokenizer.fit(images, 8, 8)


def random_dit(**changes):
    m = build_dit(ConditionedConfig.named('d32x1', n_tokens=6, token_dim=4, text_dim=16, features=(5, 3), **changes))
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in m.parameters(): p.copy_(torch.randn(p.shape, generator=g) * .2)
    return m


def inputs(kind, b=3):
    g = torch.Generator().manual_seed(2)
    text = Text(torch.randn(b, 4, 16, generator=g), torch.randn(b, 16, generator=g), torch.ones(b, 4, dtype=torch.bool))
    lr = torch.randn(b, 8, generator=g) if kind == 'cross' else torch.randn(b, 6, 4, generator=g)
    return torch.randn(b, 6, 4, generator=g), torch.tensor([3, 400, 999])[:b], text, lr


@pytest.mark.parametrize('kind', KINDS)
def test_every_parameter_learns_and_a_picture_is_alone(kind):
    m, (x, t, text, lr) = random_dit(**KINDS[kind]), inputs(kind)
    y = m(x, t, text, lr)
    y.square().sum().backward()
    dead = [n for n, p in m.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert y.shape == x.shape and not dead, dead
    assert torch.allclose(m(x[1:2], t[1:2], text.index([1]), lr[1:2]), y[1:2], atol=1e-5)


def test_drops_are_independent():
    m, (x, t, text, lr) = random_dit(conditioning='cross'), inputs('cross')
    yes, no = torch.ones(3, dtype=torch.bool), torch.zeros(3, dtype=torch.bool)
    y = m(x, t, text, lr)
    assert torch.equal(y, m(x, t, text, lr, drop_text=no, drop_lr=no))
    other = text.index([1, 2, 0])
    assert torch.allclose(m(x, t, text, lr, drop_text=yes), m(x, t, other, lr, drop_text=yes),
                          atol=1e-6) and not torch.allclose(m(x, t, text, lr, drop_lr=yes),
                                                            m(x, t, other, lr, drop_lr=yes))
    assert torch.equal(m(x, t, text, lr, drop_lr=yes), m(x, t, text, lr.flip(0) * 3, drop_lr=yes))


def test_cross_attention_reads_exactly_three_tokens():
    from toksr.layers.dit import attention_maps
    m, (x, t, text, lr) = random_dit(conditioning='cross'), inputs('cross')
    maps = attention_maps(m, x, t, 'cross', text=text, lr=lr)
    assert maps[0].shape[-2:] == (6, 3) and torch.allclose(maps[0].sum(-1), torch.ones_like(maps[0].sum(-1)), atol=1e-5)


def test_positions_differ_and_share_what_they_should():
    shared, inter = random_dit(), random_dit(positions='interpolated')
    x, t, text, lr = inputs('concat')
    assert shared.state_dict().keys() == inter.state_dict().keys() and random_dit(positions='separate').lr_pos_embed is not None
    assert not torch.allclose(shared(x, t, text, lr), inter(x, t, text, lr))
    rows = inter.rows(x, lr, None, None)
    expected = torch.cat([inter.x_embedder(x), inter.x_embedder(lr)], 1) + stretch(inter.pos_embed, 12)
    assert torch.allclose(rows, expected, atol=1e-5)
    table = torch.arange(6.)[None, :, None]
    assert torch.equal(stretch(table, 6), table) and (stretch(table, 12).diff(dim=1) >= 0).all()


@pytest.mark.parametrize('named, wrong',
                         [('conditioning', dict(conditioning='sum')), ('positions', dict(positions='none')),
                          ('positions', dict(conditioning='cross', positions='interpolated')),
                                          ('conditioning', dict(conditioning='cross', text_dim=0)),
                                          ('heads', dict(heads=5))])
def test_wrong_configs_are_named(named, wrong):
    with pytest.raises(ValueError, match=named): ConditionedConfig.named('d32x1', **wrong)


def test_wrong_sizes_and_inputs_are_named():
    with pytest.raises(ValueError, match='dit: expected one of'): ConditionedConfig.named('d7x7')
    m, (x, t, text, lr) = random_dit(conditioning='cross'), inputs('cross')
    with pytest.raises(ValueError, match='lr must have shape'): m(x, t, text, lr[:, :3])
    with pytest.raises(ValueError, match='lr must have shape'): m(x, t, text, None)
    with pytest.raises(ValueError, match='text is missing'): m(x, t, None, lr)
    for wrong in (dict(base='ridge'), dict(retouch=4), dict(features='clip'), dict(positions='none')):
        with pytest.raises(ValueError, match=next(iter(wrong))): SRVariantConfig(**wrong)


def test_paper_size_on_meta():
    with torch.device('meta'):
        concat, cross = (build_dit(ConditionedConfig.named('B', text_dim=768, features=(768, 768), conditioning=k))
                         for k in ('concat', 'cross'))
        assert cross(torch.zeros(2, 32, 16), torch.zeros(2, dtype=torch.long),
                     Text(torch.zeros(2, 77, 768), torch.zeros(2, 768)), torch.zeros(2, 1536)).shape == (2, 32, 16)
    count = lambda m: sum(p.numel() for p in m.parameters())
    assert VARIANT_SIZES['B'] == (768, 12, 12) and count(cross) - count(concat) == 2 * (768 * 768 + 768)


def test_dinov2_gives_two_vectors(tmp_path):
    from transformers import Dinov2Config, Dinov2Model
    torch.manual_seed(0)
    Dinov2Model(Dinov2Config(hidden_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=28,
                             patch_size=14)).save_pretrained(tmp_path)
    see = DinoFeatures(str(tmp_path))
    f = see(torch.rand(2, 3, 32, 32))
    assert see.dims == (24, 24) and f.shape == (2, 48) and not torch.allclose(f[:, :24], f[:, 24:])
    with pytest.raises(FileNotFoundError, match='DINOv2'): DinoFeatures(str(tmp_path/'nowhere'))


@pytest.mark.parametrize('kind', ['concat', 'cross'])
def test_task_measures_unit_variance_and_reaches_the_transformer(toy, kind):
    split, tok = toy
    sr = VariantResolver(tok, SRVariantConfig(dit='d32x1', text_dim=16, conditioning=kind))
    hr, lr = encode_all(tok, split.images, split.text), conditions(sr, split.images, split.text)
    r = sr.measure(hr, lr).residual(hr, lr)
    assert abs(r.square().mean() - 1) < .05 and torch.allclose(sr.finish(r, lr), hr, atol=1e-4)
    task = SRVariantTask(sr, hr, lr, split.text, 0., 0.)
    a, b = (task.loss(0, np.arange(8), step_generator(0, 0))[0] for _ in range(2))
    assert torch.equal(a, b)
    a.backward()
    assert sr.dit.final_layer.linear.weight.grad.abs().sum() > 0


def test_held_out_loss_of_a_model_that_says_nothing(toy):
    split, tok = toy
    sr = VariantResolver(tok, SRVariantConfig(dit='d32x1', text_dim=16, prediction='epsilon', schedule='linear'))
    hr, lr = encode_all(tok, split.images, split.text), conditions(sr, split.images, split.text)
    loss = held_out_loss(sr.measure(hr, lr), hr, lr, split.text, draws=3)
    assert {k: v.shape for k, v in loss.items()} == dict.fromkeys(('loss', 'epsilon', 'raw', 'relative'), (80,))
    # answers 0: the noise itself is the error
    assert np.allclose(loss['loss'], loss['epsilon'], atol=1e-5) and abs(loss['epsilon'].mean() - 1) < .05
    some = held_out_loss(sr, hr[:5], lr[:5], split.text.index(slice(0, 5)), draws=3)
    assert np.allclose(some['raw'], loss['raw'][:5], rtol=1e-4)  # noise belongs to the picture


def test_arms_survive_the_file_and_know_their_tokenizer(toy, tmp_path):
    split, _ = toy
    tok = Tokenizer(TokenizerConfig(image=64, patch=32, n_tokens=4, width=4, encoder='d64x2', decoder='d64x2',
                                    text_in='none'))
    save_tokenizer(tmp_path/'a.safetensors', tok)
    from toksr.tokenizers.titok import load_tokenizer
    tok = load_tokenizer(tmp_path/'a.safetensors')
    recipe = SRVariantRecipe(steps=2, batch=4, dit='d32x1', precision='no', warmup=1, conditioning='concat',
                             positions='separate')
    runs = {s: sr for s, (sr, _) in train_variants(recipe, [0, 3], split, tok, tmp_path/'ckpt').items()}
    assert not torch.equal(runs[0].dit.pos_embed, runs[3].dit.pos_embed)
    save_variants(tmp_path/'arm.safetensors', runs, tmp_path/'a.safetensors', arm='x')
    back = load_variants(tmp_path/'arm.safetensors', tmp_path/'a.safetensors')
    assert list(back) == [0, 3] and back[3].config == runs[3].config
    for s in back:
        for k, v in runs[s].state_dict().items():
            assert torch.allclose(back[s].state_dict()[k], v, atol=2e-3, rtol=2e-3), k
    save_tokenizer(tmp_path/'b.safetensors', Tokenizer(tok.config, 1))
    with pytest.raises(WeightsError, match='another tokenizer'):
        load_variants(tmp_path/'arm.safetensors', tmp_path/'b.safetensors')
    with pytest.raises(WeightsError, match='expected arms'):
        load_variants(tmp_path/'a.safetensors', tmp_path/'a.safetensors')


def test_guidance_zero_ignores_the_condition(toy):
    split, tok = toy
    sr = VariantResolver(tok, SRVariantConfig(dit='d32x1', text_dim=16))
    with torch.no_grad():
        for p in sr.dit.parameters(): p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(3)) * .1)
    lr, noise, text = encode_all(tok, split.images[:4], split.text.index(slice(0, 4)), 4), torch.randn(4, 8, 8,
            generator=torch.Generator().manual_seed(0)), split.text.index(slice(0, 4))
    sample = lambda lr, w: sr.tokens(lr, text, noise, steps=2, guidance=w, drop=('text', 'lr'))
    assert torch.equal(sample(lr, 0.), sample(lr.flip(0), 0.)) and not torch.allclose(sample(lr, 4.),
                                                                                      sample(lr.flip(0), 4.))


def test_over_seeds_is_students_interval():
    i = over_seeds([1., 2., 3., 4.])
    assert (i.mean, i.n) == (2.5, 4) and i.half == pytest.approx(3.182446 * 1.290994 / 2, rel=1e-5)
    with pytest.raises(ValueError, match='at least 2'): over_seeds([1.])


def test_the_recipe_is_spelled_out_and_has_no_dead_fields():
    from toksr.pipeline.params import declared
    names = {f.name for f in fields(SRVariantRecipe)}
    assert not names & {'perceptual', 'perceptual_net', 'perceptual_start', 'image', 'base'}
    assert names - {'seed'} <= set(declared(ROOT/'nbs/study/train_sr_arms.ipynb')) and {'drop_text', 'drop_lr',
            'conditioning', 'positions'} <= names


@pytest.mark.parametrize('profile', ['smoke', 'laptop', 'workstation', 'paper'])
def test_arms_of_a_comparison_differ_in_what_is_compared(profile):
    p = {k.removeprefix('train_sr_arms_'): v
         for k, v in yaml.safe_load((ROOT/f'profiles/{profile}.yaml').read_text()).items()
         if k.startswith('train_sr_arms_')}
    assert len(p) == 10, 'an arm is missing from the profile'
    allowed = {'conditioning', 'positions', 'drop_text', 'drop_lr', 'seeds'}
    for arm, v in p.items():
        take(SRVariantRecipe, v | dict(seed=v['seeds'][0])).train_config()
        assert {k for k in v if v[k] != p['shared'][k]} <= allowed, arm
    assert p['cross']['conditioning'] == 'cross' and p['cross_nodrop']['drop_lr'] == 0 and p['interpolated']['positions'] == 'interpolated'
