"""Diffusion: schedules, targets, guidance and samplers against closed forms and diffusers."""
import math

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from toksr.diffusion.guidance import draw_drops, guided
from toksr.diffusion.samplers import ddim_sample, ddpm_sample, step_times
from toksr.diffusion.schedules import (
    alpha_sigma, diffusion_loss, KINDS, make_schedule, picture_noise, PREDICTIONS, sample_times, target,
    to_eps, to_x0,
)

PAIRS = [(k, p) for k in KINDS for p in PREDICTIONS]


def gen(seed=0): return torch.Generator().manual_seed(seed)
def randn(*shape, seed=0): return torch.randn(*shape, generator=gen(seed))


def reference(kind, prediction, cls=DDPMScheduler, **kw):
    return cls(num_train_timesteps=1000, beta_start=1e-4, beta_end=.02, beta_schedule=KINDS[kind],
               prediction_type=PREDICTIONS[prediction],
               clip_sample=False, **kw)


def gaussian_oracle(schedule, std):
    "The exact answer, in the schedule's own prediction, when x0 ~ N(0, std^2)."
    def model(x, t, **cond):
        a, s = alpha_sigma(schedule, t, x)
        a, s, x = a.double(), s.double(), x.double()
        x0, eps = a * std**2 * x / (a**2 * std**2 + s**2), s * x / (a**2 * std**2 + s**2)
        return {'epsilon': eps, 'sample': x0, 'v_prediction': a * eps - s * x0}[schedule.config.prediction_type].float()
    return model


# --- schedules
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
# -----------------------------------------------------------------------------------------------------------------------------
def test_linear_alphas_are_the_closed_form():
    beta = torch.linspace(1e-4, .02, 1000, dtype=torch.float64)
    assert (make_schedule().alphas_cumprod.double() - (1 - beta).cumprod(0)).abs().max() < 1e-6


def test_cosine_alphas_are_the_closed_form():
    bar = lambda u: math.cos((u + .008) / 1.008 * math.pi / 2)**2
    beta = torch.tensor([min(1 - bar((i + 1) / 1000) / bar(i / 1000), .999) for i in range(1000)], dtype=torch.float64)
    assert (make_schedule('cosine').alphas_cumprod.double() - (1 - beta).cumprod(0)).abs().max() < 1e-6


@pytest.mark.parametrize('kind,prediction', PAIRS)
def test_never_clips(kind, prediction):
    s = make_schedule(kind, prediction)
    assert s.config.clip_sample is False and s.config.thresholding is False
    for cls in (DDIMScheduler, DDPMScheduler): assert step_times(s, 10, cls).config.clip_sample is False


def test_terminal_signal():
    assert make_schedule().alphas_cumprod[-1].sqrt().item() == pytest.approx(.00635, abs=1e-4)
    assert make_schedule('cosine').alphas_cumprod[-1].sqrt().item() == pytest.approx(4.93e-5, rel=.05)


@pytest.mark.parametrize('bad', [dict(kind='exp'), dict(prediction='x0'), dict(kind='squaredcos_cap_v2')])
def test_unknown_names_are_one_line_errors(bad):
    with pytest.raises(ValueError, match='use one of') as e: make_schedule(**bad)
    assert '\n' not in str(e.value)


# --- targets and conversions ---------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('kind', KINDS)
def test_add_noise_is_q_sample(kind):
    s, x0, eps, t = make_schedule(kind), randn(64, 8, 4), randn(64, 8, 4, seed=1), sample_times(64, make_schedule(kind), gen(2))
    abar = s.alphas_cumprod.double()[t][:, None, None]
    assert (s.add_noise(x0, eps, t).double() - (abar.sqrt() * x0 + (1 - abar).sqrt() * eps)).abs().max() < 1e-6


@pytest.mark.parametrize('kind', KINDS)
def test_v_target_equals_diffusers(kind):
    s, x0, eps, t = make_schedule(kind, 'v'), randn(64, 8, 4), randn(64, 8, 4, seed=1), sample_times(64, make_schedule(kind), gen(2))
    assert (target(x0, eps, t, s) - reference(kind, 'v').get_velocity(x0, eps, t)).abs().max() < 1e-6


@pytest.mark.parametrize('kind,prediction', PAIRS)
def test_conversion_to_x0_equals_diffusers(kind, prediction):
    s, x, pred = make_schedule(kind, prediction), randn(2, 8, 4), randn(2, 8, 4, seed=1)
    ref = reference(kind, prediction, DDIMScheduler)
    ref.set_timesteps(1000)
    for time in (0, 10, 250, 700, 900):
        ours = to_x0(pred, x, torch.full((2,), time), s)
        theirs = ref.step(pred, time, x).pred_original_sample
        assert (ours - theirs).abs().max() < 1e-6 * max(1, theirs.abs().max())


@pytest.mark.parametrize('kind,prediction', PAIRS)
def test_conversions_recover_noise_and_picture(kind, prediction):
    s, x0, eps, t = make_schedule(kind, prediction), randn(5, 8, 4), randn(5, 8, 4, seed=1), torch.tensor([50, 200, 400, 600, 700])
    x_t, answer = s.add_noise(x0, eps, t), target(x0, eps, t, s)
    assert (to_x0(answer, x_t, t, s) - x0).abs().max() < 1e-5 and (to_eps(answer, x_t, t, s) - eps).abs().max() < 1e-5


# --- loss and drops ------------------------------------------------------------------------------------------------------------------------
def test_loss_is_per_picture_float32_and_zero_for_the_right_answer():
    s, x0, eps, t = make_schedule('cosine', 'v'), randn(3, 8, 4), randn(3, 8, 4, seed=1), torch.tensor([1, 500, 998])
    right = lambda x, t, **cond: target(x0, eps, t, s).bfloat16()
    loss = diffusion_loss(right, x0, {}, t, eps, s)
    assert loss.shape == (3,) and loss.dtype == torch.float32 and loss.max() < 1e-4
    off = lambda x, t, **cond: target(x0, eps, t, s) + torch.tensor([0., 1., 2.])[:, None, None]
    assert torch.allclose(diffusion_loss(off, x0, {}, t, eps, s), torch.tensor([0., 1., 4.]), atol=1e-5)


def test_loss_passes_conditions_and_drops():
    seen = {}
    def model(x, t, **kw):
        seen.update(kw)
        return x
    s, lr = make_schedule(), randn(2, 8, 4, seed=3)
    drops = draw_drops(2, gen())
    diffusion_loss(model, randn(2, 8, 4), dict(text=None, lr=lr), torch.tensor([0, 1]), randn(2, 8, 4, seed=1), s, drops)
    assert seen['lr'] is lr and seen['drop_text'] is drops['drop_text'] and seen['drop_lr'] is drops['drop_lr']


def test_loss_refuses_another_shape():
    with pytest.raises(ValueError, match='answered'):
        diffusion_loss(lambda x, t: x[:, :1], randn(2, 8, 4), {}, torch.tensor([0, 1]), randn(2, 8, 4), make_schedule())


def test_drops_are_independent_and_reproducible():
    d = draw_drops(100_000, gen(4))
    a, b = d['drop_text'].double(), d['drop_lr'].double()
    assert abs(a.mean() - .15) < .005 and abs(b.mean() - .15) < .005 and abs(torch.corrcoef(torch.stack([a, b]))[0, 1]) < .01
    assert all(torch.equal(d[k], draw_drops(100_000, gen(4))[k]) for k in d)
    off = draw_drops(1000, gen(4), text=0., lr=1.)
    assert not off['drop_text'].any() and off['drop_lr'].all()
    one, two = gen(5), gen(5)
    draw_drops(7, one)
    draw_drops(7, two, .5, 0.)
    assert torch.equal(torch.rand(3, generator=one), torch.rand(3, generator=two))           # p does not change later draws
    with pytest.raises(ValueError, match='between 0 and 1'): draw_drops(2, gen(), lr=1.5)


def test_times_cover_the_chain():
    t = sample_times(100_000, make_schedule(), gen())
    assert t.min() == 0 and t.max() == 999 and abs(t.float().mean() - 499.5) < 5


# --- guidance ------------------------------------------------------------------------------------------------------------------------------
class Told:
    "A model that adds up what it is told; keeps the sizes of its calls."
    def __init__(self): self.sizes = []
    def __call__(self, x, t, text=None, lr=None, drop_text=None, drop_lr=None):
        self.sizes.append(len(x))
        keep = lambda d: 1. if d is None else (~d).float()[:, None, None]
        return .1 * x + keep(drop_text) * text + keep(drop_lr) * lr


@pytest.mark.parametrize('w', [0, .5, 1, 2, 7.5])
@pytest.mark.parametrize('drop', [('text', 'lr'), ('text',), ('lr',)])
def test_guidance_arithmetic(w, drop):
    x, text, lr, t, m = randn(3, 8, 4), randn(3, 8, 4, seed=1), randn(3, 8, 4, seed=2), torch.tensor([1, 5, 9]), Told()
    uncond = .1 * x + (0 if 'text' in drop else text) + (0 if 'lr' in drop else lr)
    cond = .1 * x + text + lr
    assert torch.allclose(guided(m, x, t, dict(text=text, lr=lr), w, drop), uncond + w * (cond - uncond), atol=1e-5)
    assert m.sizes == ([3] if w in (0, 1) else [6])


@pytest.mark.parametrize('prediction', ['v', 'sample'])
def test_guidance_means_the_same_in_every_prediction(prediction):
    "uncond + w (cond - uncond) commutes with the conversion to noise, because that is affine in the prediction."
    s, x, t = make_schedule('linear', prediction), randn(2, 8, 4), torch.tensor([300, 300])
    cond, uncond = randn(2, 8, 4, seed=1), randn(2, 8, 4, seed=2)
    mix = lambda c, u: u + 3 * (c - u)
    assert torch.allclose(to_eps(mix(cond, uncond), x, t, s), mix(to_eps(cond, x, t, s), to_eps(uncond, x, t, s)), atol=1e-4)


# --- sampling ------------------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('steps', [1, 5, 10, 25])
@pytest.mark.parametrize('kind', KINDS)
def test_starts_at_the_end_and_ends_at_x0(steps, kind):
    s, seen = make_schedule(kind, 'v'), []
    x0 = randn(2, 8, 4, seed=9)
    def exact(x, t, **cond):                                   # knows x0: whatever the noise, v = (a x_t - x0) / s
        a, sig = alpha_sigma(s, t, x)
        return (a * x - x0) / sig
    out = ddim_sample(exact, randn(2, 8, 4), {}, s, steps, callback=lambda i, t, x, guess: seen.append((i, t, guess)))
    assert [t for _, t, _ in seen] == [999 - i * 1000 // steps for i in range(steps)]
    assert torch.equal(seen[-1][2], out) and (out - x0).abs().max() < 1e-5


def test_one_step_is_the_prediction_itself():
    s, noise, pred = make_schedule('linear', 'sample'), randn(2, 8, 4), randn(2, 8, 4, seed=1)
    assert torch.equal(ddim_sample(lambda x, t: pred, noise, {}, s, 1), pred)


@pytest.mark.parametrize('kind,prediction', PAIRS)
def test_ddim_loop_equals_diffusers(kind, prediction):
    s, w = make_schedule(kind, prediction), randn(4, 4, seed=3) * .3
    model = lambda x, t, **cond: x @ w + t[:, None, None] / 1000
    ref = reference(kind, prediction, DDIMScheduler, timestep_spacing='trailing', set_alpha_to_one=True)
    ref.set_timesteps(10)
    x = noise = randn(3, 8, 4)
    for time in ref.timesteps:
        x = ref.step(model(x, time.expand(3)), time, x, eta=0.).prev_sample
    ours = ddim_sample(model, noise, {}, s, 10)
    assert (ours - x).abs().max() <= 1e-5 * max(1, x.abs().max())


def test_ddim_step_equals_the_closed_form():
    s, x, eps = make_schedule(), randn(2, 8, 4), randn(2, 8, 4, seed=1)
    d = step_times(s, 25)
    a = s.alphas_cumprod.double()
    for i, t in enumerate(d.timesteps[:-1].tolist()):
        prev = d.timesteps[i + 1]
        x0 = (x - (1 - a[t]).sqrt() * eps) / a[t].sqrt()
        hand = a[prev].sqrt() * x0 + (1 - a[prev]).sqrt() * eps
        assert (d.step(eps, t, x).prev_sample - hand).abs().max() < 1e-5 * max(1, hand.abs().max())


@pytest.mark.parametrize('prediction', PREDICTIONS)
@pytest.mark.parametrize('std', [.5, 1., 2.])
def test_oracle_gaussian_has_the_right_spread(prediction, std):
    s, noise = make_schedule('linear', prediction), randn(20_000, 1, 1)
    for steps, tolerance in ((50, .12), (1000, .02)):
        assert ddim_sample(gaussian_oracle(s, std), noise, {}, s, steps).std().item() == pytest.approx(std, rel=tolerance)
    assert ddpm_sample(gaussian_oracle(s, std), noise, {}, s, gen(7), 250).std().item() == pytest.approx(std, rel=.05)


def test_noise_scale_multiplies_the_start():
    s, noise = make_schedule('cosine', 'v'), randn(2, 8, 4)
    seen = []
    model = lambda x, t, **cond: (seen.append(x), torch.zeros_like(x))[1]
    ddim_sample(model, noise, {}, s, 1, noise_scale=.6)
    assert torch.allclose(seen[0], .6 * noise)


@pytest.mark.parametrize('steps', [0, -1, 3, 7, 600, 1001])
def test_steps_that_do_not_divide_are_refused(steps):
    with pytest.raises(ValueError, match='must divide'): ddim_sample(lambda x, t: x, randn(1, 2, 2), {}, make_schedule(), steps)


def test_batch_size_does_not_matter():
    s, w = make_schedule('cosine', 'v'), randn(4, 4, seed=3) * .3
    model = lambda x, t, lr=None, drop_lr=None: x @ w + (lr if drop_lr is None else lr * ~drop_lr[:, None, None])
    noise, lr = picture_noise(range(6), (8, 4), seed=1), randn(6, 8, 4, seed=2)
    run = lambda i: ddim_sample(model, noise[i], dict(lr=lr[i]), s, 10, guidance=2., drop=('lr',))
    whole, parts = run(slice(0, 6)), torch.cat([run(slice(0, 2)), run(slice(2, 5)), run(slice(5, 6))])
    assert (whole - parts).abs().max() < 1e-5
    many = lambda ids: ddpm_sample(model, noise[ids], dict(lr=lr[ids]), s, [gen(i) for i in ids], 20)
    assert (many(list(range(6)))[3:5] - many([3, 4])).abs().max() < 1e-5


def test_picture_noise_is_standard_and_tied_to_the_picture():
    z = picture_noise(range(200), (32, 16), seed=3)
    assert abs(z.mean()) < .01 and abs(z.std() - 1) < .01 and torch.equal(picture_noise([17], (32, 16), 3)[0], z[17])
    assert not torch.equal(picture_noise([17], (32, 16), 4)[0], z[17])
    flat = z.flatten(1)
    c = torch.corrcoef(flat) - torch.eye(200)
    assert c.abs().max() < .25                                 # neighbouring seeds are unrelated: |r| < 5.6 sigma of 1/sqrt(512)


def test_samplers_do_not_touch_the_global_generator():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    s = make_schedule()
    ddim_sample(lambda x, t: x, picture_noise([0], (4, 2)), {}, s, 5)
    ddpm_sample(lambda x, t: x, picture_noise([0], (4, 2)), {}, s, gen(), 5)
    draw_drops(5, gen())
    sample_times(5, s, gen())
    assert torch.equal(torch.get_rng_state(), before)
