"Super-resolvers in other spaces: patches, flow matching, EDM, resolvers, files, and adapters for the published ones."
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from toksr.core.weights import WeightsError
from toksr.data.degradations import downscale, upscale
from toksr.diffusion.flow import denoise, edm_loss, euler_sample, flow_loss, heun_sample, karras_sigmas, SIGMA_MAX
from toksr.encoders.text import Text
from toksr.hub.super_resolution import InfDiTCommand, StableDiffusion3
from toksr.layers.dit import DiTConfig
from toksr.sr.latent import BaselineConfig, BaselineResolver, token_ridge
from toksr.sr.latent_training import (
    BaselineRecipe, BaselineTask, build_baseline, load_baseline, load_space, resolve, save_baseline,
)
from toksr.sr.pixels import InfDiT, Lite0Space, PixelPatches, small_patches, with_quality
from toksr.tokenizers.titok import PCATokenizer, save_tokenizer
from toksr.training.loop import step_generator
from toksr.training.splits import Split


@pytest.fixture(scope='module')
def world():
    g = torch.Generator().manual_seed(0)
    pixels = F.interpolate(torch.rand(80, 3, 7, 7, generator=g), size=32, mode='bicubic').clamp(0, 1)
    images = (255 * pixels).byte().permute(0, 2, 3, 1).numpy()
    text = Text(torch.randn(80, 5, 8, generator=g), torch.randn(80, 8, generator=g),
                torch.ones(80, 5, dtype=torch.bool),
                Text(torch.zeros(1, 5, 8), torch.zeros(1, 8), torch.ones(1, 5, dtype=torch.bool)))
    return images.astype(np.float32).transpose(0, 3, 1, 2) / 255, images, text


def resolver(world, tok, **changes):
    pixels, images, text = world
    pixels = torch.from_numpy(pixels)
    sr = BaselineResolver(tok, BaselineConfig(**dict(dit='d64x2', text_dim=8, quality_dim=8) | changes), 8)
    small = downscale(pixels, 4)
    hr, lr = tok.encode(pixels), sr.encode_lr(small)
    return sr.measure(hr, lr, small, text, text.index([0, 1])), hr, lr, small


ARMS = [dict(), dict(conditioning='concat'), dict(objective='flow', base='none'),
        dict(net='infdit', text_dim=0, objective='edm')]
SPACES = {'pixels': lambda images: PixelPatches(32, 4), '1d': lambda images: PCATokenizer.fit(images, 8, 8)}


# -- patches
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
# ---------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('patch', [1, 4, 8, 32])
def test_patches_give_the_picture_back(patch):
    x, tok = torch.rand(2, 3, 32, 32), PixelPatches(32, patch)
    z = tok.encode(x)
    assert z.shape == (2, tok.n_tokens, tok.width) == (2, (32 // patch)**2, 3 * patch**2) and torch.allclose(tok.decode(z), x, atol=1e-6)
    assert tok.bits == 32 * 32 * 3 * 8 and z.min() >= -1


def test_a_patch_is_where_it_should_be():
    x = torch.zeros(1, 3, 16, 16)
    x[0, 1, 4:8, 8:12] = 1                       # second row, third column of 4-pixel patches
    z = PixelPatches(16, 4).encode(x)
    assert (z[0].amax(1) > 0).nonzero().flatten().tolist() == [1 * 4 + 2]


@pytest.mark.parametrize('call, name', [(lambda: PixelPatches(30, 4), 'patch'), (lambda: PixelPatches(32).encode(torch.rand(1, 3, 16, 16)), 'image'), (lambda: PixelPatches(32).decode(torch.rand(1, 3, 48)), 'z'),
                                        (lambda: small_patches(torch.rand(1, 3, 7, 8)), 'patch'), (lambda: load_space('4d', ''), 'space'), (lambda: BaselineRecipe(net='unet').config(), 'net'),
                                        (lambda: token_ridge(torch.rand(3, 2, 2), torch.rand(4, 2, 2)), 'token_ridge'), (lambda: BaselineConfig(net='infdit'), 'text_dim'), (lambda: BaselineConfig(dit='Z'), 'dit'),
                                        (lambda: BaselineTask(None, None, None, drop=2.), 'drop'), (lambda: karras_sigmas(0), 'steps')])
def test_bad_input_is_named(call, name):
    with pytest.raises(ValueError, match=name): call()


# -- objectives ------------------------------------------------------------------------------------------------------------------------------


def test_flow_target_is_the_velocity():
    g = torch.Generator().manual_seed(1)
    x0, noise, t = torch.randn(6, 3, 2, generator=g), torch.randn(6, 3, 2, generator=g), torch.rand(6, generator=g)
    seen = []
    def model(x, time):
        seen.append(x)
        return noise - x0
    assert flow_loss(model, x0, {}, t, noise).max() == 0
    assert torch.allclose(seen[0], (1 - t)[:, None, None] * x0 + t[:, None, None] * noise, atol=1e-6)


def test_euler_is_exact_for_a_constant_velocity_and_heun_beats_one_step():
    noise = torch.randn(3, 2, 2)
    assert torch.allclose(euler_sample(lambda x, t: torch.ones_like(x), noise, {}, 9, shift=3.), noise - 1, atol=1e-6)
    target, x0 = torch.full((3, 2, 2), .7), None
    F_star = lambda x, t: _network_for_point(x, t, target)
    assert torch.allclose(heun_sample(F_star, noise, {}, 12), target, atol=1e-3)


def _network_for_point(x, time, target):
    "What EDM's network answers if all data are `target`: (D - c_skip x) / c_out, from the scaled input"
    s = ((time - 500) / 100).exp()[:, None, None]
    size = (s**2 + 1).sqrt()
    return (target - x / size) * size / s


def test_edm_mixes_as_published():
    "EDM table 1 with sigma_data 1; and a perfect network has no loss"
    x, s = torch.randn(5, 2, 2), torch.tensor([.01, .1, 1., 10., SIGMA_MAX])
    ones = lambda x, t: torch.ones_like(x)
    want = x / (s**2 + 1)[:, None, None] + (s / (s**2 + 1).sqrt())[:, None, None]
    assert torch.allclose(denoise(ones, x, s, {}), want, atol=1e-6)
    target = torch.full((5, 2, 2), .7)
    assert edm_loss(lambda x, t: _network_for_point(x, t, target), target, {}, s, torch.randn(5, 2, 2)).max() < 1e-4
    assert len(karras_sigmas(7)) == 8 and karras_sigmas(7)[-1] == 0 and (karras_sigmas(7).diff() < 0).all()


# -- the resolvers ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('space', SPACES)
@pytest.mark.parametrize('arm', ARMS, ids=lambda a: ' '.join(map(str, a.values())) or 'plain')
def test_residual_is_undone_answers_do_not_depend_on_neighbours_and_all_is_trained(world, space, arm):
    if space == '1d' and arm.get('net'): pytest.skip('Inf-DiT is for pixels')
    sr, hr, lr, small = resolver(world, SPACES[space](world[1]), **arm)
    r, text = sr.residual(hr, lr), world[2]
    assert torch.allclose(sr.finish(r, lr), hr, atol=1e-4) and abs(r.square().mean() - 1) < 1e-3
    for p in sr.dit.parameters(): torch.nn.init.normal_(p, std=.05)
    noise = torch.randn(3, *r.shape[1:], generator=torch.Generator().manual_seed(1))
    out = sr.upscale(small[:3], text.index([0, 1, 2]), noise, 0, steps=2)
    assert out.shape == (3, 3, 32, 32) and torch.allclose(sr.upscale(small[1:2], text.index([1]), noise[1:2], 0, steps=2), out[1:2], atol=1e-4)
    task = BaselineTask(sr, world[1], text, .25, 0.)
    loss, _ = task.loss(0, np.arange(6), step_generator(0, 0))
    loss.backward()
    dead = [n for n, p in sr.dit.named_parameters() if p.grad is None or not p.grad.any()]
    assert not dead, dead


def test_token_ridge_predicts_better_than_bicubic_in_pixels(world):
    sr, hr, lr, _ = resolver(world, PixelPatches(32, 4))
    assert (sr.base(lr) - hr).square().mean() < .9 * (lr - hr).square().mean()


def test_infdit_attends_to_the_small_picture_in_its_first_layer_only_and_hears_the_global_vector(world):
    sr, _, lr, small = resolver(world, PixelPatches(32, 4), net='infdit', text_dim=0)
    assert [b.cross is not None for b in sr.dit.blocks] == [True, False]
    for p in sr.dit.parameters(): torch.nn.init.normal_(p, std=.05)
    cond, x, t = sr.conditions(lr[:2], small[:2], None), torch.randn(2, 64, 48), torch.tensor([10, 500])
    out = sr.dit(x, t, **cond)
    for name in cond:
        changed = sr.dit(x, t, **cond | {name: cond[name].flip(0)})
        assert not torch.allclose(changed, out), name
    with pytest.raises(ValueError, match='small'): sr.dit(x, t, **cond | dict(small=cond['small'][:, :3]))
    with pytest.raises(ValueError, match='base_dim'): InfDiT(DiTConfig(4, 3, 16, 1, 1, text_dim=0, conditioning='none'), 4, 12)
    with pytest.raises(ValueError, match='guidance'): sr.tokens(lr[:2], None, x, guidance=2., image=small[:2])


def test_quality_text_turns_the_vector_and_zero_leaves_it(world):
    images, text = torch.from_numpy(world[0]), world[2]
    space = Lite0Space(8).fit(images, text)
    e, d = space.pictures(images[:4]), space.direction(text.index([0, 1]))
    assert with_quality(e, d, 0.) is e
    pushed = with_quality(e, d, 2.)
    assert torch.allclose(pushed.norm(dim=-1), torch.ones(4), atol=1e-5) and ((pushed - e) @ d > 0).all()
    assert torch.allclose(with_quality(e, -d, 2.), with_quality(e, space.direction(text.index([1, 0])), 2.), atol=1e-5)


def test_tables_and_tokens_made_on_the_way_are_the_same(world):
    sr, hr, lr, _ = resolver(world, PixelPatches(32, 4))
    tasks = BaselineTask(sr, world[1], world[2]), BaselineTask(sr, world[1], world[2], tables=(hr, lr))
    a, b = (t.pair(np.arange(5)) for t in tasks)
    assert all(torch.allclose(x, y, atol=1e-6) for x, y in zip(a[:3], b[:3]))


def test_files_come_back_and_know_their_tokenizer(world, tmp_path):
    from toksr.tokenizers.titok import Tokenizer
    from toksr.tokenizers.towers import TokenizerConfig
    pixels, images, text = world
    split = Split('train', images, [''] * 80, [[]] * 80, [''] * 80, text)
    shape = dict(image=32, patch=16, n_tokens=4, width=4, encoder='d32x1', decoder='d32x1', text_in='none', text_width=8, text_length=5)
    file = tmp_path/'tok.safetensors'
    save_tokenizer(file, Tokenizer(TokenizerConfig(**shape)))
    for space, f in (('pixels', ''), ('1d', file)):
        sr = build_baseline(BaselineRecipe(dit='d64x2', fit_on=60, precision='no'), split, load_space(space, f, 32, 8)).eval()
        again = load_baseline(save_baseline(tmp_path/f'{space}.safetensors', sr, space, f), f)
        small = downscale(torch.from_numpy(pixels[:2]), 4)
        assert torch.allclose(resolve(again, small, text.index([0, 1]), steps=1), resolve(sr, small, text.index([0, 1]), steps=1), atol=.02)
    save_tokenizer(tmp_path/'other.safetensors', Tokenizer(TokenizerConfig(**shape), 1))
    with pytest.raises(WeightsError, match='trained on tok.safetensors'): load_baseline(tmp_path/'1d.safetensors', tmp_path/'other.safetensors')
    with pytest.raises(WeightsError, match='expected a rival'): load_baseline(file)


# -- published -------------------------------------------------------------------------------------------------------------------------------

FAKE = '''
import pathlib, sys
from PIL import Image
what, paths, out, k = sys.argv[1:]
if what == "fail": sys.exit("CUDA is not available")
for f in pathlib.Path(paths).read_text().split()[what == "lose":]:
    i = Image.open(f); k_ = 1 if what == "small" else int(k)
    i.resize((i.width * k_, i.height * k_), Image.NEAREST).save(pathlib.Path(out)/(pathlib.Path(f).stem + "_0.png"))
'''


def test_infdit_command_with_a_stand_in():
    adapter = lambda what: InfDiTCommand([sys.executable, '-c', FAKE, what, '{list}', '{output}', '{factor}'])
    x = (torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 255).round() / 255
    assert torch.allclose(adapter('work')(x, 4), x.repeat_interleave(4, -1).repeat_interleave(4, -2))
    for what, message in (('fail', 'CUDA is not available'), ('lose', 'picture00000'), ('small', 'check the factor')):
        with pytest.raises(RuntimeError, match=message): adapter(what)(x, 2)
    with pytest.raises(FileNotFoundError, match='THUDM/Inf-DiT'): InfDiTCommand(['/no/such', '{output}'])(x, 4)
    with pytest.raises(ValueError, match='multiples of 32'): adapter('work')(x[..., :16], 4)
    with pytest.raises(ValueError, match='2 or 4'): adapter('work')(x, 8)
    with pytest.raises(ValueError, match='output'): InfDiTCommand(['python'])


def test_stable_diffusion_3_with_a_tiny_pipeline_of_the_same_classes():
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3ControlNetModel, SD3Transformer2DModel, StableDiffusion3ControlNetPipeline
    torch.manual_seed(0)
    shape = dict(sample_size=8, patch_size=1, in_channels=4, num_layers=1, attention_head_dim=8, num_attention_heads=2, joint_attention_dim=16, caption_projection_dim=16, pooled_projection_dim=8, out_channels=4)
    net = SD3Transformer2DModel(**shape)
    vae = AutoencoderKL(block_out_channels=(8, 8), down_block_types=('DownEncoderBlock2D',) * 2, up_block_types=('UpDecoderBlock2D',) * 2, latent_channels=4, norm_num_groups=4, sample_size=16,
                        use_quant_conv=False, use_post_quant_conv=False, shift_factor=.06, scaling_factor=1.5)
    pipe = StableDiffusion3ControlNetPipeline(transformer=net, scheduler=FlowMatchEulerDiscreteScheduler(), vae=vae, text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None,
                                              text_encoder_3=None, tokenizer_3=None, controlnet=SD3ControlNetModel(**shape))
    pipe.set_progress_bar_config(disable=True)
    words = lambda captions: {f'{n}{k}': torch.full(s, len(captions[0]) / 10. if not n else 0.) for n in ('', 'negative_') for k, s in (('prompt_embeds', (1, 3, 16)), ('pooled_prompt_embeds', (1, 8)))}
    sd = StableDiffusion3(pipe, side=16, prompt=words)
    sd.published = type(sd.published)('', '', '', 2, 4.)
    x = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    sd.captions = ['a tiger', 'a dog']
    out = sd(x, 4)
    assert out.shape == (2, 3, 32, 32) and out.min() >= 0 and out.max() <= 1
    sd.captions = ['a tiger', 'a very long dog']
    again = sd(x, 4)
    assert torch.equal(again[0], out[0]) and not torch.equal(again[1], out[1]), 'the caption counts, and the noise does not depend on the neighbours'
    with pytest.raises(ValueError, match='captions'): sd(x[:1], 4)


@pytest.mark.parametrize('config, millions', [(dict(net='infdit', dit='inf-dit', text_dim=0, objective='edm', base='none'), 28 * 18 * 1280**2 / 1e6), (dict(dit='sd3-medium', text_dim=768, objective='flow', base='none'), 24 * 22 * 1536**2 / 1e6)],
                         ids=['inf-dit', 'sd3-medium'])
def test_published_sizes_on_the_meta_device(config, millions):
    "256 pixels in 4-pixel patches; a block holds 18 width² numbers (12 and adaLN's 6), 22 with attention to the caption"
    with torch.device('meta'):
        sr = BaselineResolver(PixelPatches(256, 4), BaselineConfig(**config), 64)
        z, t, small = torch.empty(1, 4096, 48), torch.empty(1, dtype=torch.long), torch.empty(1, 3, 64, 64)
        cond = dict(base=z, small=small_patches(small), embedding=torch.empty(1, 1280)) if config.get('net') else dict(base=z, text=Text(torch.empty(1, 77, 768), torch.empty(1, 768)))
        assert sr.dit(z, t, **cond).shape == z.shape
    count = sum(p.numel() for p in sr.dit.parameters()) / 1e6
    assert millions < count < 1.05 * millions, count
