"""Text arms: codes, starts, an interval that counts seeds, captions with known faults, where objects are; and
corrupted pictures."""
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from toksr.core.weights import WeightsError
from toksr.data.degradations import blur, corrupt, LEVELS, missing, noise
from toksr.encoders.text import Text
from toksr.metrics.effects import caption_variants, object_masks, region_psnr, seed_effect, split_masks, verdict
from toksr.pipeline.params import check, declared
from toksr.tokenizers.titok import load_tokenizer, save_tokenizer
from toksr.tokenizers.towers import TokenizerConfig
from toksr.tokenizers.variants import (
    build_variant, code_use, load_variant, start_from, StartRecipe, train_variant, train_vq, VariantRecipe,
    VariantTokenizer, VQRecipe,
)
from toksr.training.recipes import take
from toksr.training.splits import Split

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = dict(train_arms=VariantRecipe, train_vq_arms=VQRecipe, train_text_effect=VariantRecipe,
                 train_initialisation=StartRecipe)


def _text(n, width=8, length=5):
    g = torch.Generator().manual_seed(0)
    blank = Text(torch.zeros(1, length, width), torch.zeros(1, width), torch.ones(1, length, dtype=torch.bool))
    return Text(torch.randn(n, length, width, generator=g), torch.randn(n, width, generator=g),
                torch.ones(n, length, dtype=torch.bool), blank)


def _split(n=12):
    return Split('train', np.random.default_rng(0).integers(0, 256, (n, 32, 32, 3), np.uint8), ['A dot.'] * n, [],
                 [], _text(n))


TINY = dict(steps=3, batch=4, patch=8, n_tokens=4, width=4, size='d32x1', perceptual=0., precision='no',
            warmup=1, codes=8)


@pytest.mark.parametrize('text_in', ['none', 'decoder', 'both'])
@pytest.mark.parametrize('bottleneck', ['kl', 'vq'])
def test_every_arm_trains_saves_and_loads(tmp_path, text_in, bottleneck):
    split, recipe = _split(), VariantRecipe(text_in=text_in, bottleneck=bottleneck, **TINY)
    tok, result = train_variant(recipe, split, root=tmp_path/'ckpt')
    assert result.log[-1]['step'] == 3 and np.isfinite(result.log[-1]['loss'])
    first = build_variant(recipe, split).state_dict()
    assert not any(torch.equal(v, first[k]) for k, v in tok.state_dict().items() if 'c_fc.weight' in k)
    path = save_tokenizer(tmp_path/'a.safetensors', tok, arm='x')
    x, back = torch.rand(2, 3, 32, 32), load_variant(path)
    z = back.encode(x, split.text.index(slice(2)))
    assert z.shape == (2, 4, 4) and torch.equal(back.decode(z, split.text.index(slice(2))),
                                                load_variant(path).decode(z, split.text.index(slice(2))))
    assert torch.allclose(load_tokenizer(path).decode(z, split.text.index(slice(2))),
                          back.decode(z, split.text.index(slice(2))), atol=1e-5)
    assert back.bits == (4 * 4 * 16 if bottleneck == 'kl' else 4 * 3)


def test_the_weight_of_the_codebook_loss_decides_the_training_and_nothing_else(tmp_path):
    """At weight 1 it is the arm of `train_variant`, bit for bit; at another it learns something else; the file is
    an arm's"""
    split = _split()
    plain, _ = train_variant(VariantRecipe(bottleneck='vq', **TINY), split, root=tmp_path/'a')
    one, _ = train_vq(VQRecipe(bottleneck='vq', vq=1., **TINY), split, tmp_path/'b')
    less, _ = train_vq(VQRecipe(bottleneck='vq', vq=.03, **TINY), split, tmp_path/'c')
    assert all(torch.equal(v, w) for v, w in zip(plain.state_dict().values(), one.state_dict().values()))
    assert not all(torch.equal(v, w) for v, w in zip(one.state_dict().values(), less.state_dict().values()))
    assert load_variant(save_tokenizer(tmp_path/'x.safetensors', less)).bits == less.bits
    with pytest.raises(ValueError, match='bottleneck'): train_vq(VQRecipe(bottleneck='kl', **TINY), split)


def test_gradients_reach_every_parameter():
    tok, text = VariantTokenizer(VariantRecipe(bottleneck='vq', **TINY).config(32, 8, 5)), _text(3)
    recon, _, losses = tok(torch.rand(3, 3, 32, 32), text)
    (recon.square().mean() + losses['vq']).backward()
    assert not [n for n, p in tok.named_parameters() if p.grad is None or not p.grad.any()]


def test_snapping_is_exact_idempotent_and_straight_through():
    tok = VariantTokenizer(VariantRecipe(bottleneck='vq', text_in='none', **TINY).config(32, 8, 5)).eval()
    z = (torch.randn(2, 4, 4, generator=torch.Generator().manual_seed(1)) * .1).requires_grad_()
    near = tok.snap(z)
    codes = tok.quantize.embedding.weight
    assert torch.cdist(near.detach().flatten(0, 1), codes).min(1).values.max() < 1e-6 and torch.allclose(tok.snap(near),
            near, atol=1e-7)
    best = torch.cdist(z.detach().flatten(0, 1), codes).min(1).values.view(2, 4)
    assert torch.allclose((near - z).detach().norm(dim=-1), best, atol=1e-5)
    tok.decode(z).sum().backward()
    assert z.grad.abs().sum() > 0
    vae = VariantTokenizer(replace(tok.config, bottleneck='kl'))
    assert vae.snap(z) is z
    with pytest.raises(ValueError, match='codebook'): vae.indices(torch.rand(1, 3, 32, 32))


def test_code_use_counts():
    split = _split()
    tok = VariantTokenizer(VariantRecipe(bottleneck='vq', **TINY).config(32, 8, 5)).eval()
    with torch.no_grad():
        tok.encoder.conv_out.weight.zero_()
        tok.encoder.conv_out.bias.zero_()
        tok.quantize.embedding.weight[3] = 0
    use = code_use(tok, split)
    assert (use['used'], use['bits'], use['bits_entropy']) == (1 / 8, 12., 0.) and use['perplexity'] == pytest.approx(1)


def test_starts_take_what_they_say_and_differ_only_there(tmp_path):
    split, both = _split(), StartRecipe(**TINY)
    ta = VariantTokenizer(replace(both, text_in='decoder', seed=5).config(32, 8, 5), 5)
    taken = {}
    for start in ('random', 'encoder', 'both', 'frozen'):
        tok = start_from(build_variant(both, split), ta.state_dict(), start)
        taken[start] = {k for k, v in tok.state_dict().items() if k in ta.state_dict()
                        and torch.equal(v, ta.state_dict()[k]) and v.any() and not (v == 1).all()}
    assert not {k for k in taken['encoder'] if k.startswith('decoder.transformer')} and {k for k in taken['encoder']
            if k.startswith('encoder.transformer')}
    assert taken['both'] == taken['frozen'] > taken['encoder'] and not any(k.endswith('c_fc.weight')
                                                                           for k in taken['random'])
    own = build_variant(both, split).state_dict()
    words = [k for k in own if k.startswith('encoder.text_guidance')]
    assert len(words) == 3 and all(torch.equal(start_from(build_variant(both, split), ta.state_dict(),
                                                          'both').state_dict()[k], own[k]) for k in words)
    a, _ = train_variant(replace(both, start='encoder'), split, ta.state_dict(), tmp_path)
    other = VariantTokenizer(ta.config, 6)
    # the same recipe from other weights does not find the first run
    b, _ = train_variant(replace(both, start='encoder'), split, other.state_dict(), tmp_path)
    assert not torch.equal(a.latent_tokens, b.latent_tokens)
    f, _ = train_variant(replace(both, start='frozen'), split, ta.state_dict(), tmp_path)
    assert all(torch.equal(v, ta.state_dict()[k]) for k, v in f.state_dict().items()
               if k.startswith('decoder.')) and not torch.equal(f.latent_tokens, ta.latent_tokens)


def test_starts_refuse_what_does_not_fit():
    tok = VariantTokenizer(StartRecipe(**TINY).config(32, 8, 5))
    with pytest.raises(ValueError, match='start: expected one of'): start_from(tok, {}, 'half')
    with pytest.raises(WeightsError, match='has nothing'): start_from(tok, {}, 'encoder')
    with pytest.raises(WeightsError, match=r'needs \(4, 32\)'):
        start_from(tok, tok.state_dict() | {'latent_tokens': torch.zeros(4, 64)}, 'encoder')
    with pytest.raises(ValueError, match='source'): train_variant(StartRecipe(start='encoder', **TINY), _split())


def test_released_ta_titok_fits_the_encoder():
    "The published key list has all that a start takes, at the published sizes"
    golden = [line.split() for line in (ROOT/'tests/golden/tatitok_bl32_keys.txt').read_text().splitlines()
              if line.strip() and not line.startswith('#')] if (ROOT/'tests/golden/tatitok_bl32_keys.txt').exists() else []
    if not golden: pytest.skip('no golden key list')
    with torch.device('meta'):
        tok = VariantTokenizer(replace(StartRecipe(size='base', decoder_size='large', start='both').config(256, 768,
                77), activation='gelu'))
    published = {g[0] for g in golden}
    missing_keys = set(tok.state_dict()) - published
    assert missing_keys == {k for k in tok.state_dict()
                            if k.startswith('encoder.text_guidance')} and not published - set(tok.state_dict())


def test_seed_effect():
    rng = np.random.default_rng(0)
    base = rng.normal(25, 2, (3, 80))
    e = seed_effect(base + .3, base)
    assert (e.mean, e.n, e.seeds) == (pytest.approx(.3), 80,
                                      3) and e.by_seed == pytest.approx((.3,
                                              ) * 3) and e.excludes_zero and verdict(e) == 'helps' and verdict(seed_effect(base, base + .3)) == 'hurts'
    # the seeds disagree: with 3 of them nothing can be said
    wide = seed_effect(base + np.array([[.5], [-.4], [.1]]), base)
    assert not wide.excludes_zero and wide.half > 1 and verdict(wide) == 'no measurable effect'
    one = seed_effect(base[:1] + rng.normal(0, .1, (1, 80)), base[:1])
    assert one.seeds == 1 and one.half < .05
    with pytest.raises(ValueError, match='one shape'): seed_effect(base, base[:2])
    with pytest.raises(ValueError, match='finite'): seed_effect(base * np.nan, base)


@pytest.fixture(scope='module')
def maker():
    from toksr.data.scenes import SceneMaker
    from toksr.data.stamps import load_stamps
    return SceneMaker(load_stamps(px=48), px=32, split='complex')


def test_masks_are_the_objects(maker):
    for i in range(12):
        image, masks = object_masks(maker, i)
        scene = maker.scene(i)
        # the last one lies on top
        assert np.array_equal(image, scene.image) and len(masks) == len(scene.objects) and masks[-1].any()
        assert not any((a & b).sum() > .2 * min(a.sum(), b.sum()) for k, a in enumerate(masks) for b in masks[:k]
                       if min(a.sum(), b.sum()) > 20)
    split = Split('complex', np.stack([maker.scene(i).image for i in range(3)]), [''] * 3,
                  [maker.scene(i).objects for i in range(3)], [''] * 3, _text(3))
    assert [len(m) for m in split_masks(maker, split)] == [len(o) for o in split.objects]
    split.images[1] = 0
    with pytest.raises(ValueError, match=r'1 of 3 scenes .*first: 1'): split_masks(maker, split)


def test_region_psnr_looks_only_inside():
    a, b = torch.zeros(2, 3, 16, 16), torch.zeros(2, 3, 16, 16)
    b[:, :, :8] = .1
    top = np.zeros((16, 16), bool)
    top[:8] = True
    assert region_psnr(a, b, [top, ~top]) == pytest.approx([20, 100],
                                                           abs=1e-3) and np.isnan(region_psnr(a, b,
                                                                   [None, np.eye(16, dtype=bool)])).all()


def test_caption_variants(maker):
    scenes = [maker.scene(i) for i in range(20)]
    split = Split('complex', np.stack([s.image for s in scenes]), [s.caption for s in scenes],
                  [s.objects for s in scenes], [s.background for s in scenes], _text(20, 384, 24))
    v = caption_variants(split, 1)
    assert list(v) == ['complete', 'object missing', 'background missing', 'empty',
                       'wrong'] and {t.states.shape for t in v.values()} == {(20, 24, 384)}
    assert torch.equal(v['empty'].states, split.text.empty_like().states)
    bare = replace(split, objects=[], backgrounds=[])
    w = caption_variants(bare, 1)
    assert list(w) == ['complete', 'empty',
                       'wrong'] and not (w['wrong'].states == split.text.states).flatten(1).all(1).any()


# -- corruptions
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
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


@pytest.mark.parametrize('kind', LEVELS)
def test_corruption_is_a_function_of_picture_number_and_seed(kind):
    x = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    whole = corrupt(x, kind, 2, seed=3)
    assert torch.allclose(whole[2:], corrupt(x[2:], kind, 2, seed=3, first=2), atol=1e-6) and torch.equal(whole, corrupt(x, kind, 2, seed=3)) and not torch.equal(whole, x)
    assert torch.equal(whole, corrupt(x, kind, 2, seed=4)) == (kind in ('blur', 'low_resolution'))
    assert whole.shape == x.shape and 0 <= whole.min() and whole.max() <= 1


def test_corruption_refuses():
    x = torch.rand(1, 3, 16, 16)
    for f, match in ((lambda: corrupt(x, 'fog'), 'kind'), (lambda: corrupt(x, 'blur', 0), 'severity'), (lambda: missing(x, 1.), 'share'), (lambda: blur(x, 9.), 'sigma')):
        with pytest.raises(ValueError, match=match): f()
    assert noise(x, 0.).equal(x)


# -- the notebooks and profiles that spell the recipes out -----------------------------------------------------------------------------------


@pytest.mark.parametrize('nb', NOTEBOOKS)
def test_notebook_spells_out_the_whole_recipe(nb):
    own = set(declared(ROOT/f'nbs/study/{nb}.ipynb'))
    assert {f.name for f in fields(NOTEBOOKS[nb])} - {'seed'} <= own and own & {'seed', 'seeds'}


@pytest.mark.parametrize('profile', ['smoke', 'laptop', 'workstation', 'paper'])
def test_profiles_give_every_field(profile):
    p = yaml.safe_load((ROOT/f'profiles/{profile}.yaml').read_text())
    arms = {nb: [k for k in p if k.startswith(f'{nb}_')] for nb in NOTEBOOKS}
    if not any(arms.values()): pytest.skip('these stages are not in the profiles yet')
    for nb, sections in arms.items():
        known = declared(ROOT/f'nbs/study/{nb}.ipynb')
        for s in sections:
            values = {k: check(known[k], v) for k, v in (p[nb] | p[s]).items()}
            named = values | {'seed': 0} | ({'start': s.removeprefix(f'{nb}_')} if nb == 'train_initialisation' else {})
            recipe = take(NOTEBOOKS[nb], named)
            recipe.train_config()
            if profile == 'paper': assert (recipe.steps, recipe.perceptual, recipe.kl, recipe.adv, recipe.init, recipe.mask_text, recipe.linear_path) == (300000, 1.1, 1e-6, .1, 'upstream', False, False)


def test_arms_of_a_comparison_are_trained_alike():
    p = yaml.safe_load((ROOT/'profiles/laptop.yaml').read_text())
    budget = {'linear_path', 'logvar_start', 'steps', 'kl'}      # how the models of one size of train_text_effect start
    differ = {k for nb in NOTEBOOKS for s in p if s.startswith(f'{nb}_') for k in set(p[s]) - (budget if nb == 'train_text_effect' else set())}
    assert differ <= {'text_in', 'bottleneck', 'width', 'n_tokens', 'decoder_size', 'revive'}
    for size in ('32x16', '8x4'):                                # captions are all that the two arms of a size differ in
        told, not_told = (p[f'train_text_effect_{k}_{size}'] for k in ('text', 'none'))
        assert set(told) == set(not_told) and {k for k in told if told[k] != not_told[k]} == {'text_in'}
    assert all(p[s]['bottleneck'] == 'vq' for nb in NOTEBOOKS for s in p if s.startswith(f'{nb}_') and 'revive' in p[s])      # a codebook's setting: VAEs have none


@pytest.mark.parametrize('profile', ['laptop', 'workstation'])
def test_tokenizers_on_a_line_and_on_a_grid_get_equal_steps(profile):
    p = yaml.safe_load((ROOT/f'profiles/{profile}.yaml').read_text())
    grids = [v for s, v in p.items() if s.startswith('train_grid_')]
    assert len(grids) == 5 and len({(v['steps'], v['batch'], v['n_train'], v['seed']) for v in [p['train_arms'], p['train_vq_arms'], *grids]}) == 1
