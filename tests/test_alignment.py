"""The judges of picture and caption: the small one trained here, and the published ones' arithmetic on tiny random
models."""
import numpy as np
import pytest
import torch

from toksr.core.weights import save_weights, WeightsError
from toksr.encoders.lite0 import Lite0
from toksr.encoders.text import Text
from toksr.metrics.alignment import (
    AlignerRecipe, alignment, caption_rank, load_aligner, make_aligner, save_aligner, train_aligner,
)
from toksr.metrics.rewards import HPSv2, ImageReward, Missing, PickScore
from toksr.training.splits import Split


@pytest.fixture(scope='module')
def net(): return Lite0()


def _split(n=64):
    "Pictures of one colour, captions whose pooled states are that colour"
    g = np.random.default_rng(0)
    colour = g.integers(0, 255, (n, 3), dtype=np.uint8)
    pooled = torch.zeros(n, 384)
    pooled[:, :3] = torch.from_numpy(colour).float() / 255
    return Split('train', np.broadcast_to(colour[:, None, None], (n, 64, 64, 3)).copy(), ['c'] * n, [()] * n, [''] * n,
                 Text(torch.zeros(n, 2, 384), pooled))


def test_training_aligns_and_weights_come_back(net, tmp_path):
    split = _split()
    model, result = train_aligner(AlignerRecipe(steps=40, batch=32, optimizer='adamw', lr=3e-3, warmup=2, ema=.5,
                                                precision='no', perceptual=0., noise=0., embed=16, hidden=32), split,
                                                root=tmp_path)
    x = torch.from_numpy(split.images).permute(0, 3, 1, 2) / 255
    right, wrong = alignment(model, x, split.text), alignment(model, x, split.text.index(torch.arange(63, -1, -1)))
    assert right.mean() > wrong.mean() + 5 and right.max() <= 100.001
    assert caption_rank(model, x, split.text).float().mean() < 20                     # chance: 31.5
    again = load_aligner(save_aligner(tmp_path/'a.safetensors', model))
    assert torch.allclose(alignment(again, x, split.text), right, atol=.2)
    save_weights(tmp_path/'b.safetensors', {'x': torch.zeros(1)}, {'kind': 'other'})
    with pytest.raises(WeightsError, match='expected an aligner'): load_aligner(tmp_path/'b.safetensors')


def test_frozen_towers_stay_out_of_the_weights_and_the_gradient(net):
    model = make_aligner(8, 8, net=net)
    model.encode_image(torch.rand(2, 3, 64, 64)).sum().backward()
    assert all(p.grad is None for p in net.parameters()) and all(p.grad is not None for p in model.visual.parameters())
    assert sum(p.numel() for p in model.parameters()) < 50_000


def test_one_caption_per_picture(net):
    with pytest.raises(ValueError, match='3 pictures and 2 captions'):
        alignment(make_aligner(8, 8, net=net), torch.rand(3, 3, 64, 64),
                  Text(torch.zeros(2, 1, 384), torch.zeros(2, 384)))


def _tiny_clip():
    from transformers import CLIPConfig, CLIPModel
    torch.manual_seed(0)
    small = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    return CLIPModel(CLIPConfig(text_config=small
                                | dict(vocab_size=100, max_position_embeddings=77, bos_token_id=0, eos_token_id=1),
                                vision_config=small | dict(image_size=32, patch_size=16), projection_dim=16))


def test_pickscore_is_scale_times_cosine():
    model = _tiny_clip()
    def processor(images, text, **_):
        return dict(pixel_values=torch.stack([torch.from_numpy(np.asarray(i.resize((32, 32)))).permute(2, 0, 1) / 255.
                                              for i in images]),
                                                  input_ids=torch.tensor([[0, 5 + len(t), 1] for t in text]),
                                                  attention_mask=torch.ones(len(text), 3, dtype=torch.long))
    x = torch.rand(3, 3, 40, 40, generator=torch.Generator().manual_seed(0))
    got = PickScore(model, processor).score(x, ['a', 'bb', 'ccc'])
    assert got.shape == (3,) and (got.abs() <= model.logit_scale.exp() + 1e-4).all() and len(set(got.tolist())) == 3
    with torch.no_grad():
        want = model(**processor([__import__('PIL.Image').Image.fromarray((x[0].permute(1, 2,
                0).numpy() * 255).round().astype('uint8'))], ['a'])).logits_per_image[0, 0]
    assert got[0] == pytest.approx(want.item(), abs=1e-3)


def test_hpsv2_is_a_cosine():
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
    torch.manual_seed(0)
    model = CLIP(16, CLIPVisionCfg(layers=1, width=64, image_size=32, patch_size=16),
                 CLIPTextCfg(layers=1, width=64, heads=1, vocab_size=50, context_length=4))
    judge = HPSv2(model, lambda p: torch.from_numpy(np.asarray(p.resize((32, 32)))).permute(2, 0, 1) / 255.,
                  lambda ts: torch.tensor([[1, len(t), 2, 49] for t in ts]))
    got = judge.score(torch.rand(2, 3, 32, 32), ['a', 'bb'])
    assert got.shape == (2,) and (got.abs() <= 1).all()


def test_what_is_missing_is_named(monkeypatch):
    import transformers
    with pytest.raises(Missing, match='HPS_v2.1'): HPSv2()
    with pytest.raises(Missing, match='pip install image-reward'): ImageReward()
    def offline(*a, **k): raise OSError('no network')
    monkeypatch.setattr(transformers.AutoModel, 'from_pretrained', offline)
    with pytest.raises(Missing, match='HF_HOME'): PickScore()
    with pytest.raises(ValueError, match='expected 2'): ImageReward(object()).score(torch.rand(2, 3, 8, 8), ['one'])
