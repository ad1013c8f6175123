"The published sizes: counted on the meta device, and one real optimizer step at full width on two pictures."
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from toksr.encoders.text import Text
from toksr.pipeline.costs import (
    adversarial_share, cost, count_parameters, disk, paper_networks, saved_bytes, sr_stages, tokenizer_stage,
)
from toksr.pipeline.params import section
from toksr.sr.training import SRRecipe
from toksr.tokenizers.titok import Tokenizer
from toksr.tokenizers.training import TokenizerRecipe
from toksr.training.losses import Discriminator, LossConfig, TokenizerLoss
from toksr.training.recipes import take

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope='module')
def recipes():
    "Profile `paper` as the pipeline reads it."
    file = ROOT/'profiles/paper.yaml'
    return take(TokenizerRecipe, section(file, 'train_tokenizer_textok_scratch')), take(SRRecipe,
                                                                                        section(file, 'train_sr_x4'))


@pytest.fixture(scope='module')
def nets(recipes): return paper_networks(*recipes)


def test_profile_paper_is_the_paper(recipes):
    "TokSR §5.3 to 5.6, with the gaps filled as by the public code: sizes, steps, weights, start of the opponent."
    t, s = recipes
    assert (t.steps, t.size, t.n_tokens, t.width, t.patch, t.text_in, t.bottleneck) == (300_000, 'base', 32, 16, 16,
                                                                                        'both', 'kl')
    assert (t.perceptual, t.perceptual_net, t.kl, t.adv, t.adv_start, t.precision, t.flip) == (1.1, 'lpips_convnext',
            1e-6, .1, 200_000, 'fp16', True)
    assert LossConfig().lecam == .001 and not (t.linear_path or t.head_width
                                               or t.mask_text) and t.init == 'upstream' and t.activation == 'gelu'
    assert (s.batch, s.drop, s.dit, s.prediction, s.noise, s.base, s.retouch, s.image) == (16, .15, 'B', 'epsilon',
                                                                                           'linear', 'none', 0, 0.)
    assert t.config(256, 768, 77).image == 256 and (256 // t.patch)**2 == 256  # not the 1024 patches of the text


def test_parameters_and_shapes(nets):
    "ViT-B on both sides (86.57 M and 86.53 M); the discriminator's 1.91 M; a transformer over 32 + 32 tokens."
    assert nets['tokenizer'].parameters == 86_569_760 and round(nets['detokenizer'].parameters / 1e6, 2) == 86.53
    assert round(nets['discriminator'].parameters / 1e6, 2) == 1.91 and nets['discriminator'].output == (1, 16, 16)
    assert nets['tokenizer'].output == (32, 1, 32) and nets['detokenizer'].output == (3, 256,
            256) and nets['token DiT'].output == (32, 16)
    assert nets['ConvNeXt-S'].output == (1000,) and nets['CLIP text'].output == (77, 768)


def test_operations(nets):
    """Known totals: VGG16 at 256 px 2 x 20.05 GMAC for two pictures, ConvNeXt-S 8.69 GMAC at 224 px; backward about
    twice forward where all is trained."""
    assert abs(nets['LPIPS (VGG16)'].forward / 80.2e9 - 1) < .01 and abs(nets['ConvNeXt-S'].forward / 17.37e9 - 1) < .01
    for k in ('tokenizer', 'detokenizer', 'token DiT', 'discriminator'):
        assert 1.9 < nets[k].backward / nets[k].forward < 2.05
    for k in ('ConvNeXt-S', 'LPIPS (VGG16)'): assert nets[k].backward <= nets[k].forward  # frozen: to the picture only
    assert nets['CLIP text'].backward == 0 and 60e9 < nets['tokenizer'].forward < 66e9


def test_stages_add_up(nets, recipes):
    t, s = recipes
    whole = tokenizer_stage(nets, t)
    assert whole.pictures == t.steps * t.batch and adversarial_share(t) == 1/3
    without = tokenizer_stage(nets, replace(t, adv=0.))
    judge = nets['discriminator']
    assert abs((whole.flops - without.flops) / (whole.pictures / 3 * (2 * judge.forward + 2 * judge.total)) - 1) < 1e-9
    tokens, train, answer = sr_stages(nets, s, 1000, held_out=10, steps=5, guided=False)
    assert train.flops == s.steps * s.batch * nets['token DiT'].total
    assert answer.flops == 10 * (nets['tokenizer'].forward + 5 * nets['token DiT'].forward
                                 + nets['detokenizer'].forward)
    assert whole.hours(100, .5) == 2 * whole.hours(200,
                                                   .5) and whole.memory(2) - whole.memory(1) == pytest.approx(whole.saved / 2e9)
    assert disk(nets, t)['tokens of COCO, sharp and low-resolution'] == pytest.approx(2 * 123_287 * 512 * 2 / 1e9)


def test_saved_bytes_are_counted_once():
    "A tensor that two operations keep is one tensor; weights are not counted."
    x = torch.ones(1, 100, requires_grad=True)
    class Twice(torch.nn.Module):
        def forward(self, x):
            h = x.exp()
            return h * h.sin()
    # exp keeps its result; sin keeps h (the same); the product keeps h and sin h
    assert saved_bytes(Twice(), x) == 2 * 400
    layer = torch.nn.Linear(100, 100)
    assert saved_bytes(layer, x) == 400
    with pytest.raises(ValueError, match='batch of 1'): cost('two', layer, torch.ones(2, 100))


def test_one_step_at_full_width(recipes):
    """One optimizer step of TexTok-VAE B/B at 256 px on two pictures, with the loss as published but for the
    perceptual networks (not at hand): reconstruction, KL, opponent and LeCam, from step 200 000 on.

    All twelve layers of both towers; about 0.75 TFLOP."""
    t = recipes[0]
    torch.manual_seed(0)
    tok, g = Tokenizer(t.config(256, 768, 77)), torch.Generator().manual_seed(0)
    loss = TokenizerLoss(LossConfig(perceptual=0., kl=t.kl, adv=t.adv, adv_start=t.adv_start), None, Discriminator())
    image, text = torch.rand(2, 3, 256, 256, generator=g), Text(torch.randn(2, 77, 768, generator=g),
                                                                torch.randn(2, 768, generator=g))
    optimizers = [torch.optim.AdamW(m.parameters(), t.lr, betas=(.9, t.beta2), weight_decay=1e-4)
                  for m in (tok, loss.judge)]
    before = {k: v.detach().sum().item() for k, v in tok.named_parameters()}
    recon, z, parts = tok(image, text, g)
    total, terms = loss(image, recon, parts, t.adv_start)
    total.backward()
    lost = [k for k, p in tok.named_parameters() if p.grad is None or not p.grad.isfinite().all() or not p.grad.any()]
    assert lost in ([], ['encoder.conv_out.bias']) and z.shape == (2, 32, 16) and recon.shape == image.shape
    norm = torch.nn.utils.clip_grad_norm_(tok.parameters(), t.clip)
    second, _ = loss.discriminator(image, recon)
    second.backward()
    for o in optimizers: o.step()
    assert total.isfinite() and second.isfinite() and norm > 0 and set(terms) == {'rec', 'kl', 'adv'}
    moved = [k for k, v in tok.named_parameters() if v.detach().sum().item() != before[k]]
    assert len(moved) > .9 * len(before) and count_parameters(tok) == 86_569_760 + sum(p.numel()
            for p in tok.decoder.parameters())
