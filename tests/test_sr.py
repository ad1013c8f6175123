"Super-resolvers, their task, and saving and loading them."
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from toksr.core.weights import WeightsError
from toksr.data.degradations import downscale
from toksr.encoders.text import Text
from toksr.sr.super_resolver import ridge, SRConfig, SuperResolver
from toksr.sr.training import load_sr, save_sr, SRTask, super_resolve
from toksr.tokenizers.titok import load_tokenizer, PCATokenizer, save_tokenizer, Tokenizer
from toksr.tokenizers.towers import TokenizerConfig
from toksr.training.loop import step_generator


@pytest.fixture(scope='module')
def world():
    g = torch.Generator().manual_seed(0)
    pixels = F.interpolate(torch.rand(120, 3, 7, 7, generator=g), size=32, mode='bicubic').clamp(0, 1)
    images = (255 * pixels).byte().permute(0, 2, 3, 1).numpy()
    text = Text(torch.randn(120, 5, 8, generator=g), torch.randn(120, 8, generator=g),
                torch.ones(120, 5, dtype=torch.bool))
    return pixels, images, text, PCATokenizer.fit(images, 8, 8)


def resolver(world, **changes):
    pixels, images, text, tok = world
    sr = SuperResolver(tok, SRConfig(text_dim=8, retouch=0, **changes))
    hr, lr = tok.encode(pixels), sr.encode_lr(downscale(pixels, 4))
    return sr.measure(hr, lr), hr, lr


@pytest.mark.parametrize('base', ['none', 'ridge'])
@pytest.mark.parametrize('whiten', [0., .5, 1.])
def test_residual_is_undone_and_has_unit_variance(world, base, whiten):
    sr, hr, lr = resolver(world, base=base, whiten=whiten)
    r = sr.residual(hr, lr)
    assert torch.allclose(sr.finish(r, lr), hr, atol=1e-4)
    assert abs(r.var(0).mean().item() - 1) < .1
    if whiten == 1: assert (r.var(0) - 1).abs().max() < .1


def test_ridge_predicts_better_than_the_mean(world):
    none, hr, lr = resolver(world, base='none')
    guess, _, _ = resolver(world, base='ridge')
    error = lambda sr: (sr.base(lr) - hr).square().mean()
    assert error(guess) < .5 * error(none)


def test_ridge_refuses_unequal_lengths():
    with pytest.raises(ValueError, match='equally many'): ridge(torch.randn(3, 2), torch.randn(4, 2))


@pytest.mark.parametrize('wrong',
                         [dict(factor=1), dict(base='linear'), dict(prediction='noise'), dict(schedule='sigmoid'),
                          dict(whiten=2.), dict(retouch=-1)])
def test_wrong_settings_are_named(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))): SRConfig(**wrong)


def test_a_picture_does_not_depend_on_its_neighbours(world):
    sr, *_ = resolver(world)
    torch.nn.init.normal_(sr.dit.final_layer.linear.weight, std=.1)
    small = downscale(world[0], 4)
    both = super_resolve(sr, small[:4], world[2].index(slice(0, 4)), steps=5)
    first = super_resolve(sr, small[:1], world[2].index(slice(0, 1)), steps=5)
    assert torch.allclose(both[:1], first, atol=1e-5)


def test_picture_loss_refuses_epsilon(world):
    sr, hr, lr = resolver(world, prediction='epsilon')
    with pytest.raises(ValueError, match="'sample' or 'v'"): SRTask(sr, world[1], hr, lr, world[2], image=1.)


def test_picture_loss_skips_those_that_were_told_nothing(world):
    sr, hr, lr = resolver(world)
    task = SRTask(sr, world[1], hr, lr, world[2], image=1., drop=0.)
    told = task.loss(0, np.arange(8), step_generator(0, 0))[1]
    assert {'latent', 'mse'} == set(told)
    half = SRTask(sr, world[1], hr, lr, world[2], image=1., drop=.5).loss(0, np.arange(8), step_generator(0, 0))[1]
    assert np.isfinite(float(half['mse'])) and float(half['mse']) != float(told['mse'])


def test_weights_of_another_kind_or_tokenizer_are_refused(tmp_path):
    config = TokenizerConfig(image=32, n_tokens=4, width=4, encoder='d64x2', decoder='d64x2', text_in='none',
                             text_width=8)
    one, two = (save_tokenizer(tmp_path/f'{i}.safetensors', Tokenizer(config, seed=i)) for i in (1, 2))
    file = save_sr(tmp_path/'sr.safetensors', SuperResolver(load_tokenizer(one), SRConfig(text_dim=8, retouch=8)), one)
    assert load_sr(file, one).config.retouch == 8
    with pytest.raises(WeightsError, match='another tokenizer'): load_sr(file, two)
    with pytest.raises(WeightsError, match='expected a tokenizer'): load_tokenizer(file)
    with pytest.raises(WeightsError, match='expected a sr'): load_sr(one, one)
