"""The dual tokenizer: inversion by the right rule and not the paper's, codes and streams, any size, Stable
Diffusion's classes, training and files."""
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMInverseScheduler, DDIMScheduler, PNDMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from toksr.core.weights import save_weights, WeightsError
from toksr.data.degradations import downscale
from toksr.diffusion.guidance import draw_drops
from toksr.diffusion.inversion import ddim_denoise, ddim_invert, GaussianOracle, mirrored
from toksr.diffusion.schedules import make_schedule
from toksr.dual.diffusion_branch import LatentConfig, LatentDiffusion
from toksr.dual.diffusion_training import LatentRecipe, LatentTask, load_latent, save_latent, train_latent
from toksr.dual.dual_tokenizer import begin_codes, Codes, decode_codes, DualTokenizer, encode_codes, take_codes
from toksr.encoders.text import Text
from toksr.hub.stable_diffusion import load_diffusion, StableDiffusion
from toksr.metrics.effects import effects, score
from toksr.tokenizers.grid import KLf8, KLf8Config
from toksr.training.splits import Split

G = lambda seed=0: torch.Generator().manual_seed(seed)
SD = DDIMScheduler(beta_start=.00085, beta_end=.012, beta_schedule='scaled_linear', clip_sample=False,
                   set_alpha_to_one=False, steps_offset=1)


def text(n, length=5, dim=8, seed=0):
    t = Text(torch.randn(n, length, dim, generator=G(seed)), torch.randn(n, dim, generator=G(seed+1)),
             torch.ones(n, length, dtype=torch.bool))
    t.empty = Text(torch.zeros(1, length, dim), torch.zeros(1, dim), torch.ones(1, length, dtype=torch.bool))
    return t


def latent(patch=2, **changes):
    torch.manual_seed(0)
    auto = KLf8(KLf8Config(image=32, width=4, channels=(8, 8, 8), blocks=1, groups=4, fold=2))
    model = LatentDiffusion(auto, LatentConfig(image=32, text_dim=8, text_length=5, patch=patch, **changes))
    model.measure(auto.encode(torch.rand(20, 3, 32, 32, generator=G())), text(1).empty)
    return model.eval()


@torch.no_grad()
def awake(model):
    "Weights that are not zero where DiT starts at zero, so that conditions show"
    g = G(3)
    for p in model.dit.parameters():
        if not p.any(): p.copy_(.02 * torch.randn(p.shape, generator=g))
    return model


class Grey:
    n_tokens, bits, guide_px, n_codes = 16, 48., 4, 8
    def indices(self, image): return (downscale(image, image.shape[-1] // 4).mean(1).flatten(1) * 7).round().long()
    def decode_codes(self, index): return (index.float() / 7).view(-1, 1, 4, 4).expand(-1, 3, -1, -1)


class Ragged:
    "As LaVIT: as many codes as the batch needs, -1 behind them"
    n_tokens, bits, table = 3, 6., text(4)
    def encode(self, image):
        n = (image.mean((1, 2, 3)) * 4).long().clamp(0, 2) + 1
        return torch.where(torch.arange(int(n.max())) < n[:, None], 1, -1)
    def embeddings(self, index): return self.table.index((index >= 0).sum(1))


IMAGES = torch.rand(7, 3, 32, 32, generator=G(5)) * torch.linspace(.2, 1, 7)[:, None, None, None]


# -- inversion
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
# -------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('steps, std, error', [(1000, .996, .0012), (50, 1.012, .025), (20, 1.025, .067)])
def test_inversion_of_an_exact_model(steps, std, error):
    "Golden: the reference rule with an exact Gaussian model under Stable Diffusion's schedule (data of deviation 0.6)"
    z = torch.tensor([.6, -.6, .3, 1.2]).view(4, 1)
    oracle = GaussianOracle(SD, .6)
    top = ddim_invert(oracle, z, {}, SD, steps)
    assert (top / z * .6).mean().item() == pytest.approx(std, abs=.004)
    assert ((ddim_denoise(oracle, top, {}, SD, steps) - z).norm() / z.norm()).item() == pytest.approx(error, rel=.06)


def test_one_step_is_the_formula():
    "The formula, and diffusers' own scheduler given the noise"
    z, model = torch.randn(2, 3, 4, generator=G()), lambda x, t: .3 * x
    abar = SD.alphas_cumprod
    up, _ = mirrored(SD, 50)
    t, p = 21, 1
    want = abar[t].sqrt() * (z - (1 - abar[p]).sqrt() * .3 * z) / abar[p].sqrt() + (1 - abar[t]).sqrt() * .3 * z
    assert torch.allclose(up.step(.3 * z, t, z, return_dict=False)[0], want, atol=1e-6)
    seen = []
    ddim_invert(model, z, {}, SD, 50, .04, callback=lambda i, t, x: seen.append((t, x)))
    assert [t for t, _ in seen] == [1, 21] and not DDIMInverseScheduler().config.clip_sample == up.config.clip_sample


def test_the_papers_equation_9_diverges():
    abar, z = SD.alphas_cumprod.double(), torch.tensor(.6, dtype=torch.float64)
    for cumulative, end in ((False, 2.3e4), (True, 8e4)):
        x = z.clone()
        for t in range(1, 1000, 20):
            a = abar[t] if cumulative else abar[t] / (abar[t-20] if t > 20 else abar[0])
            x = a.sqrt() * x + (1 - a).sqrt() * (1 - abar[t]).sqrt() * x / (abar[t] * .36 + 1 - abar[t])
        assert x.item() == pytest.approx(end, rel=.05)


@pytest.mark.parametrize('prediction', ['epsilon', 'v', 'sample'])
def test_the_answer_of_a_model_may_be_any(prediction):
    schedule = make_schedule('linear', prediction)
    z = torch.randn(20, 6, generator=G()) * .6
    oracle = GaussianOracle(schedule, .6)
    reference = make_schedule('linear', 'epsilon')
    assert torch.allclose(ddim_invert(oracle, z, {}, schedule, 50), ddim_invert(GaussianOracle(reference, .6), z, {}, reference, 50), atol=2e-3)


@pytest.mark.parametrize('call, name', [(lambda: mirrored(SD, 30), 'steps'), (lambda: ddim_invert(None, torch.zeros(1, 1), {}, SD, 50, 2.), 'strength'),
                                        (lambda: ddim_denoise(None, torch.zeros(1, 1), {}, SD, 50, eta=.5), 'eta'), (lambda: GaussianOracle(SD, 0.), 'std')])
def test_bad_settings_of_inversion(call, name):
    with pytest.raises(ValueError, match=name): call()


# -- the latent diffusion model ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('patch', [1, 2, 4])
def test_latents_fold_and_come_back(patch):
    model = latent(patch)
    z = model.encode(IMAGES)
    assert z.shape == (7, 16 // patch**2, 4 * patch**2) == (7, *model.latent_shape)
    assert torch.equal(model.unfold(model.fold(x := torch.randn(2, 16, 4, generator=G()))), x)
    assert torch.allclose(model.decode(z), model.tokenizer.decode(model.tokenizer.encode(IMAGES)), atol=1e-4)


def test_a_square_of_latents_is_one_token():
    model, z = latent(2), torch.zeros(1, 16, 4)
    z[0, [0, 1, 4, 5]] = 1.                                                # the upper left square of a 4 by 4 grid
    folded = model.fold(z)
    assert folded[0, 0].eq(1).all() and not folded[0, 1:].any()


def test_another_size_keeps_the_weights():
    model = awake(latent())
    large = model.at(64)
    assert large.latent_shape == (16, 16) and model.at(32) is model
    assert all(torch.equal(v, large.state_dict()[k]) for k, v in model.state_dict().items() if k != 'dit.pos_embed')
    mean = lambda p: p.mean(1)
    assert torch.allclose(mean(large.dit.pos_embed), mean(model.dit.pos_embed), atol=.05)
    assert large.decode(large.encode(torch.rand(1, 3, 64, 64, generator=G()))).shape == (1, 3, 64, 64)
    with pytest.raises(ValueError, match='size=50.*multiple of 16'): model.at(50)


@pytest.mark.parametrize('field, value', [('prediction', 'noise'), ('schedule', 'sigmoid'), ('units', 'two'), ('patch', 0), ('text_dim', 0)])
def test_bad_config(field, value):
    with pytest.raises(ValueError, match=field): LatentConfig(**{field: value})


def test_patch_must_divide_the_grid():
    with pytest.raises(ValueError, match='patch'): latent(3)


def test_a_dropped_caption_is_the_empty_caption():
    model, z, t = awake(latent()), torch.randn(3, 4, 16, generator=G()), torch.tensor([0, 500, 999])
    mixed = model(z, t, text(3), torch.tensor([True, False, True]))
    assert torch.equal(mixed[[0, 2]], model(z, t, model.blank(3))[[0, 2]]) and torch.allclose(mixed[1], model(z, t, text(3))[1], atol=1e-6)


# -- two streams --------------------------------------------------------------------------------------------------------------------------------


def test_streams_tokens_and_bits():
    model = latent()
    both, semantic, guide = DualTokenizer(model, Ragged(), Grey()), DualTokenizer(model, Ragged()), DualTokenizer(model, guide=Grey())
    assert (both.n_tokens, both.bits) == (19, 54.) and (semantic.n_tokens, guide.bits) == (3, 48.)
    codes = both.encode(IMAGES)
    assert codes.only('semantic').guide is None and codes.only('both') is codes and semantic.encode(IMAGES).guide is None
    with pytest.raises(ValueError, match='stream'): codes.only('all')


def test_ragged_codes_of_batches_join():
    dual = DualTokenizer(latent(), Ragged(), Grey())
    whole, parts = encode_codes(dual, IMAGES, 7), encode_codes(dual, IMAGES, 2)
    assert torch.equal(whole.semantic, parts.semantic) and torch.equal(whole.guide, parts.guide)
    assert take_codes(whole.only('guide'), slice(2, 4)).guide.shape == (2, 16)


def test_strength_zero_is_the_autoencoder_and_inversion_brings_the_guide_back():
    model = awake(latent())
    dual = DualTokenizer(model, Ragged(), Grey())
    codes = dual.encode(IMAGES)
    guide = model.decode(model.encode(dual.guide_picture(codes, 32))).clamp(0, 1)
    assert torch.equal(dual.decode(codes, strength=0.), guide)
    errors = [(dual.decode(codes.only('guide'), steps=n, guidance=1.) - guide).abs().mean() for n in (5, 50)]
    assert errors[1] < errors[0] and errors[1] < .02


def test_pictures_do_not_depend_on_their_batch():
    dual = DualTokenizer(awake(latent()), Ragged(), Grey())
    codes = dual.encode(IMAGES)
    for c in (codes, codes.only('semantic'), codes.only('guide')):
        assert torch.allclose(decode_codes(dual, c, size=7, steps=4, guidance=2.), decode_codes(dual, c, size=3, steps=4, guidance=2.), atol=1e-4)
    assert not torch.allclose(decode_codes(dual, codes.only('semantic'), seed=1, steps=4), decode_codes(dual, codes.only('semantic'), steps=4), atol=1e-3)


@pytest.mark.parametrize('how', [dict(steps=4), dict(steps=10, strength=.5)])
def test_one_inversion_serves_every_text(how):
    dual = DualTokenizer(awake(latent()), Ragged(), Grey())
    codes = dual.encode(IMAGES)
    begun = begin_codes(dual, codes, size=3, **how)
    for c, more in ((codes, dict(guidance=2.)), (codes.only('guide'), dict(guidance=1.)), (codes, dict(guidance=2., text=text(7)))):
        assert torch.equal(decode_codes(dual, c, size=3, **how, **more), decode_codes(dual, c, size=3, begun=begun, **how, **more))
    assert not torch.equal(decode_codes(dual, codes, begun=begun.flip(0), **how), decode_codes(dual, codes, **how))


def test_semantic_codes_count_only_where_they_are_read():
    dual = DualTokenizer(awake(latent()), Ragged(), Grey())
    codes = dual.encode(IMAGES)
    other = Codes(torch.full_like(codes.semantic, -1), codes.guide)
    assert not torch.equal(dual.decode(codes, steps=4), dual.decode(other, steps=4))
    assert torch.equal(dual.decode(codes, steps=4, text=text(7)), dual.decode(other, steps=4, text=text(7)))
    assert torch.equal(dual.decode(codes, steps=4, guidance=0.), dual.decode(other, steps=4, guidance=0.))


def test_noise_start_and_eta():
    dual = DualTokenizer(awake(latent()), Ragged(), Grey())
    codes = dual.encode(IMAGES)
    noise = torch.randn(7, 4, 16, generator=G())
    assert torch.equal(dual.decode(codes, strength=0., start='noise', noise=noise), dual.decode(codes, strength=0.))
    assert not torch.equal(dual.decode(codes, strength=.5, steps=4, start='noise', noise=noise), dual.decode(codes, strength=.5, steps=4))
    a, b = (dual.decode(codes, steps=4, eta=1., generator=G(1)) for _ in range(2))
    assert torch.equal(a, b) and not torch.equal(a, dual.decode(codes, steps=4))


@pytest.mark.parametrize('change, words', [(lambda d, c: d.decode(c.only('semantic')), 'noise'), (lambda d, c: d.decode(Codes()), 'codes'), (lambda d, c: d.decode(Codes(c.semantic[:2], c.guide)), '2 pictures'),
                                           (lambda d, c: d.decode(c, start='x'), 'start'), (lambda d, c: d.decode(c, size=50), 'size'), (lambda d, c: DualTokenizer(d.diffusion, guide=Grey()).decode(c), 'semantic'),
                                           (lambda d, c: DualTokenizer(d.diffusion), 'neither')])
def test_bad_calls(change, words):
    dual = DualTokenizer(latent(), Ragged(), Grey())
    with pytest.raises(ValueError, match=words): change(dual, dual.encode(IMAGES))


# -- Stable Diffusion's classes -----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def sd():
    torch.manual_seed(0)
    vae = AutoencoderKL(3, 3, ('DownEncoderBlock2D',) * 2, ('UpDecoderBlock2D',) * 2, (8, 8), latent_channels=4, norm_num_groups=4, sample_size=16)
    unet = UNet2DConditionModel(8, 4, 4, down_block_types=('CrossAttnDownBlock2D', 'DownBlock2D'), up_block_types=('UpBlock2D', 'CrossAttnUpBlock2D'),
                                block_out_channels=(8, 16), layers_per_block=1, cross_attention_dim=12, attention_head_dim=4, norm_num_groups=4)
    clip = CLIPTextModel(CLIPTextConfig(hidden_size=12, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2))
    return StableDiffusion(vae, unet, clip, PNDMScheduler(beta_start=.00085, beta_end=.012, beta_schedule='scaled_linear', skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1))


def test_stable_diffusion_answers_the_same_calls(sd):
    for name in ('size', 'at', 'latent_shape', 'schedule', 'encode', 'decode', 'blank'): assert hasattr(sd, name) and hasattr(latent(), name)
    dual = DualTokenizer(sd, guide=Grey())
    codes = dual.encode(IMAGES)
    assert dual.decode(codes, steps=5).shape == (7, 3, 16, 16) and dual.decode(codes, steps=2, size=32).shape == (7, 3, 32, 32)
    assert decode_codes(DualTokenizer(sd, guide=Grey()), codes, size=4, steps=2, text=sd.states(['a dog'] * 7)).shape == (7, 3, 16, 16)


def test_stable_diffusion_scales_its_latents(sd):
    x = torch.rand(2, 3, 16, 16, generator=G())
    assert torch.allclose(sd.encode(x), sd.vae.encode(2 * x - 1).latent_dist.mode() * .18215, atol=1e-6)
    assert torch.allclose(sd.decode(z := torch.randn(2, 4, 8, 8, generator=G())), (sd.vae.decode(z / .18215).sample + 1) / 2, atol=1e-6)


def test_stable_diffusion_inverts_by_its_own_schedule(sd):
    z, cond = sd.encode(torch.rand(2, 3, 16, 16, generator=G())), dict(text=sd.blank(2))
    way = lambda steps: (ddim_denoise(sd, ddim_invert(sd, z, cond, sd.schedule, steps, .1), cond, sd.schedule, steps, .1) - z).norm() / z.norm()
    assert way(200) < .5 * way(20)                                         # random weights are no denoiser, so only the trend can be asked for
    assert sd.schedule.config.steps_offset == 1 and not sd.schedule.config.clip_sample and not sd.schedule.config.set_alpha_to_one


def test_published_model_that_cannot_be_had():
    with pytest.raises(FileNotFoundError, match='/nowhere.*profile laptop'): load_diffusion('/nowhere')


# -- training, files, tables --------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def toy():
    images = (255 * torch.rand(40, 32, 32, 3, generator=G(2))).byte().numpy()
    return Split('toy', images, ['a blob'] * 40, [[]] * 40, [''] * 40, text(40))


def test_gradient_reaches_all_parameters(toy):
    model = awake(latent())
    task = LatentTask(model, model.encode(torch.rand(40, 3, 32, 32, generator=G())), toy.text, .5)
    task.loss(0, np.arange(16), G())[0].backward()
    assert not [n for n, p in model.dit.named_parameters() if p.grad is None or not p.grad.any()]
    assert not [n for n, p in model.tokenizer.named_parameters() if p.grad is not None]


def test_training_is_repeatable_and_files_return(toy, tmp_path):
    auto = latent().tokenizer
    recipe = LatentRecipe(steps=2, batch=4, warmup=1, precision='no')
    a, log = train_latent(recipe, toy, auto, tmp_path/'a')
    b, _ = train_latent(recipe, toy, auto, tmp_path/'b')
    assert all(torch.equal(v, w) for v, w in zip(a.state_dict().values(), b.state_dict().values())) and 'latent' in log.log[-1]
    file = save_weights(tmp_path/'auto.safetensors', auto, {'kind': 'grid'})
    back = load_latent(save_latent(tmp_path/'l.safetensors', a, file), file, auto)
    assert back.config == a.config and all((v - w).abs().max() <= 1e-3 * (1 + v.abs().max()) for v, w in zip(a.state_dict().values(), back.state_dict().values()))
    with pytest.raises(WeightsError, match='another autoencoder'): load_latent(tmp_path/'l.safetensors', save_weights(tmp_path/'o.safetensors', auto, {'kind': 'other'}), auto)
    with pytest.raises(WeightsError, match='expected a latent_diffusion'): load_latent(file, file, auto)


def test_task_wants_one_caption_for_each_latent(toy):
    model = latent()
    with pytest.raises(ValueError, match='40 captions'): LatentTask(model, torch.zeros(3, 4, 16), toy.text)
    bare = Text(toy.text.states, toy.text.pooled, toy.text.mask)
    with pytest.raises(ValueError, match='empty caption'): LatentTask(model, torch.zeros(40, 4, 16), bare)


def test_scores_are_at_the_targets_size_and_paired():
    import pandas as pd
    y = torch.rand(5, 3, 16, 16, generator=G())
    big = torch.nn.functional.interpolate(y, size=(32, 32), mode='nearest')
    rows = pd.concat([score(y, {'same': y, 'large': big, 'grey': torch.full_like(y, .5)}, [], split=s) for s in ('val', 'novel')])
    e = effects(rows, [('same', 'grey'), ('large', 'grey')], ('psnr',))
    assert len(rows) == 30 and (e.effect > 0).all() and (e.lo <= e.effect).all() and set(e.n) == {5}
