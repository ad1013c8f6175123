"""The training of grid tokenizers: the notebook and the profiles spell the recipe out, and the published sizes are
those of the published models."""
import os
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import yaml

from toksr.core.weights import save_weights, WeightsError
from toksr.pipeline.params import check, declared
from toksr.tokenizers.grid import build
from toksr.tokenizers.grid_training import GridRecipe, GridTask, load_grid, save_grid
from toksr.training.losses import LossConfig, TokenizerLoss
from toksr.training.recipes import take

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT/'nbs/study/train_grid.ipynb'
ARMS = ['dalle', 'omni', 'cosmos_di', 'cosmos_ci', 'kl_f8']
FOLDER = Path(os.environ.get('TOKSR_PROFILES', ROOT/'profiles'))


def recipes(profile):
    "Recipes by arm"
    sections, known = yaml.safe_load((FOLDER/f'{profile}.yaml').read_text()), declared(NOTEBOOK)
    values = {a: {k: check(known[k], v) for k, v in sections[f'train_grid_{a}'].items()} for a in ARMS}
    return {a: take(GridRecipe, v) for a, v in values.items()}


def test_notebook_spells_out_the_whole_recipe():
    assert {f.name for f in fields(GridRecipe)} <= set(declared(NOTEBOOK))


@pytest.mark.parametrize('profile', ['smoke', 'laptop', 'workstation', 'paper'])
def test_profiles_build_five_models_of_the_right_kind(profile):
    px = {'paper': 256}.get(profile, 64)
    made = {}
    for a, r in recipes(profile).items():
        r.train_config()
        with torch.device('meta'): made[a] = build(r.family, r.config(px))
    assert {a: t.is_discrete for a, t in made.items()} == dict(dalle=True, omni=True, cosmos_di=True, cosmos_ci=False,
                                                               kl_f8=False)
    if profile == 'paper':
        assert {a: t.n_tokens for a, t in made.items()} == dict(dalle=1024, omni=1024, cosmos_di=256,
                                                                cosmos_ci=1024, kl_f8=1024)
        assert made['kl_f8'].width == 4 and sum(p.numel() for p in made['kl_f8'].parameters()) == 83_653_863
    else: assert {t.n_tokens for t in made.values()} == {64}


def test_comparison_is_at_equal_steps_order_and_seed():
    for profile in ('smoke', 'laptop', 'workstation'):
        assert len({(r.steps, r.batch, r.seed, r.perceptual_start, r.perceptual_share)
                    for r in recipes(profile).values()}) == 1


def test_a_models_own_loss_counts_and_it_is_told_the_time(tmp_path):
    tok = build('dalle', dict(image=32, width=8, codes=16, channels=(8, 8, 8, 16), blocks=1, tau_steps=1.))
    images = (torch.rand(8, 32, 32, 3, generator=torch.Generator().manual_seed(0)) * 255).byte().numpy()
    task = GridTask(tok, images, TokenizerLoss(LossConfig(rec=0., perceptual=0.)), steps=10)
    total, parts = task.loss(5, [0, 1, 2, 3], torch.Generator().manual_seed(0))
    assert torch.isclose(total, parts['own']) and abs(tok.quantize.tau - (1 + 1 / 16) / 2) < 1e-6


def test_files_come_back_and_others_are_refused(tmp_path):
    tok = build('cosmos', dict(image=32, factor=8, channels=(8, 16), stem=8, inner=8, blocks=1, attention=4, groups=4,
                               levels=(8, 5)), seed=5)
    save_grid(tmp_path/'a.safetensors', tok, arm='toy')
    back = load_grid(tmp_path/'a.safetensors')
    assert back.config == tok.config and all(torch.allclose(p, q, atol=1e-3)
                                             for p, q in zip(back.parameters(), tok.parameters()))
    save_weights(tmp_path/'b.safetensors', tok, {'kind': 'tokenizer'})
    with pytest.raises(WeightsError, match='holds a tokenizer, expected a grid'): load_grid(tmp_path/'b.safetensors')
    save_weights(tmp_path/'c.safetensors', tok, {'kind': 'grid', 'grid': 'jpeg', 'config': {}})
    with pytest.raises(WeightsError, match='import the module'): load_grid(tmp_path/'c.safetensors')
