"Recipes, the notebooks that spell them out, and the profiles that fill them in."
import re
from dataclasses import asdict, fields
from pathlib import Path

import pytest
import yaml

from toksr.pipeline.params import check, declared
from toksr.sr.srresnet import UpscalerRecipe
from toksr.sr.training import SRRecipe
from toksr.tokenizers.training import TokenizerRecipe
from toksr.training.recipes import perceptual_distance, take

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = dict(train_tokenizer=TokenizerRecipe, train_sr=SRRecipe, train_upscaler=UpscalerRecipe)
PROFILES = ['smoke', 'laptop', 'workstation', 'paper']


def sections(profile):
    "(notebook, section, values) of every training stage"
    p = yaml.safe_load((ROOT/f'profiles/{profile}.yaml').read_text())
    return [(nb, k, v) for k, v in p.items() for nb in NOTEBOOKS if re.fullmatch(rf'{nb}_(x\d+|textok_\w+)', k)]


@pytest.mark.parametrize('nb', NOTEBOOKS)
def test_notebook_spells_out_the_whole_recipe(nb):
    assert {f.name for f in fields(NOTEBOOKS[nb])} <= set(declared(ROOT/f'nbs/study/{nb}.ipynb'))


@pytest.mark.parametrize('profile', PROFILES)
def test_profiles_are_complete_and_in_range(profile):
    for nb, section, values in sections(profile):
        known = declared(ROOT/f'nbs/study/{nb}.ipynb')
        for k, v in values.items(): check(known[k], v)
        given = {k: p.default for k, p in known.items()} | values
        recipe = take(NOTEBOOKS[nb],
                      given | (dict(factor=8 if section.endswith('x8') else 4) if 'factor' in known else {}))
        recipe.train_config()
        missing = {f.name for f in fields(recipe)} - set(values)
        assert not missing, f'{profile}: {section} leaves {sorted(missing)} to the notebook'


def test_paper_profile_has_the_papers_values():
    p = {s: v for _, s, v in sections('paper')}
    tok, sr = p['train_tokenizer_textok_warm'], p['train_sr_x4']
    facts = yaml.safe_load((ROOT/'nbs/study/paper_numbers.yaml').read_text())['toksr']
    t, w = facts['tokenizer'], facts['tokenizer']['loss_weights']
    assert (tok['n_tokens'], tok['width'], tok['patch'], tok['steps']) == (t['latents']['tokens'],
            t['latents']['width'], t['patch_px'], t['iterations'])
    assert (tok['perceptual'], tok['kl'], tok['adv'], tok['adv_start']) == (w['perceptual'], w['kl'], w['adversarial'],
                                                                            t['adversarial_start_iteration'])
    assert (tok['linear_path'], tok['head_width'], tok['mask_text'], tok['init'], tok['optimizer'],
            tok['precision']) == (False, 0, False, 'upstream', 'adamw', t['precision'])
    assert (sr['batch'], sr['drop'], sr['prediction'], sr['noise'], sr['base'], sr['image'], sr['retouch'],
            sr['noise_scale']) == (facts['sr']['batch'], facts['sr']['cfg_dropout'], 'epsilon', 'linear',
                                   'none', 0., 0, 1.)


def test_paper_tokenizer_has_the_papers_size():
    import torch
    from toksr.tokenizers.titok import Tokenizer
    values = {s: v for _, s, v in sections('paper')}['train_tokenizer_textok_warm']
    recipe = take(TokenizerRecipe, values)
    with torch.device('meta'): tok = Tokenizer(recipe.config(256, 768, 77))
    decoder = sum(p.numel() for p in tok.decoder.parameters())
    assert (sum(p.numel() for p in tok.parameters()) - decoder, decoder) == (pytest.approx(86.57e6, rel=1e-3),
                                                                             pytest.approx(86.53e6, rel=1e-3))


def test_what_is_missing_is_named():
    values = asdict(SRRecipe())
    del values['factor']
    with pytest.raises(ValueError, match='gives no factor'): take(SRRecipe, values)
    with pytest.raises(ValueError, match='expected lite0 or lpips_convnext'): perceptual_distance('vgg')
