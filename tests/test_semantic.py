"""Causality to the last bit, losses against their formulas, dynamic length, adapters with tiny weights, errors that
name what is wrong."""
import math
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from toksr.core.weights import save_weights, WeightsError
from toksr.dual.lavit import LavitConfig, LavitTokenizer, PolicyAttention, Selector
from toksr.dual.qformer import causal_bias, QFormer, QFormerConfig
from toksr.dual.semantic import cosine_loss, Match, Reverse, SemanticConfig, SemanticTokenizer
from toksr.dual.semantic_training import build_semantic, Feed, SemanticRecipe
from toksr.encoders.lite0 import Frozen
from toksr.encoders.text import Text
from toksr.encoders.vision import image_encoder, Lite0Tokens
from toksr.hub.semantic import LavitCommand, PublishedSeed, rename_seed, seed_sizes
from toksr.layers.bottlenecks import CosineVQ
from toksr.metrics.alignment import chance, ranks


def gen(seed: int = 0) -> torch.Generator: return torch.Generator().manual_seed(seed)


class Eye(Frozen):
    "A stand-in for the frozen encoder: 9 tokens of 12 numbers"
    def forward(self, image): return F.adaptive_avg_pool2d(image, 3).flatten(2).transpose(1, 2).repeat(1, 1, 4)


TINY = dict(vision_width=12, size='d32x2', mlp_ratio=2, codes=16, code_width=4, reverse_layers=2, reverse_tokens=6,
            text_width=10, pooled_width=10, has_mask=True, unit_pooled=True)


@pytest.fixture(scope='module')
def sem():
    return SemanticTokenizer(SemanticConfig(queries=5, dropout=0., project=8, decoder_layers=2, image_layers=1, **TINY),
                             seed=3, vision=Eye()).eval()


@pytest.fixture(scope='module')
def lavit(): return LavitTokenizer(LavitConfig(patches=9, decoder_layers=2, **TINY), seed=3, vision=Eye()).eval()


def captions(n: int) -> Text:
    t = Text(torch.randn(n, 6, 10, generator=gen(1)), F.normalize(torch.randn(n, 10, generator=gen(2)), dim=1),
             torch.arange(6).expand(n, -1) < 4)
    t.empty = Text(t.states[:1] * 0 + .25, t.pooled[:1], t.mask[:1])
    return t


IMAGES = torch.rand(6, 3, 32, 32, generator=gen())

# ---- queries


@pytest.mark.parametrize('layers', [1, 4])
def test_queries_are_causal_to_the_last_bit(layers):
    q = QFormer(QFormerConfig(queries=6, size=f'd32x{layers}', key_width=12)).eval()
    keys = Eye()(IMAGES)
    with torch.no_grad():
        before = q(keys)
        for j in range(6):
            other = q.query_tokens.clone()
            other[:, j] = torch.randn(32, generator=gen(j))
            after = q(keys, queries=other)
            assert torch.equal(after[:, :j], before[:, :j])
            assert all(not torch.equal(after[:, k], before[:, k]) for k in range(j, 6 if layers > 1 else j + 1))


def test_bias_hides_exactly_the_later_ones():
    b = causal_bias(4)
    assert b.shape == (1, 1, 4, 4) and b.is_floating_point() and torch.equal(b[0, 0] == 0,
                                                                             torch.ones(4, 4).tril().bool())


def test_lite0_tokens_are_local_and_frozen():
    eye = image_encoder('lite0', 64)
    x = torch.rand(1, 3, 64, 64, generator=gen())
    y = x.clone()
    y[..., :8, :8] = 0
    a, b = eye(x), eye(y)
    assert a.shape == (1, 16, 472) == (1, eye.n_patches,
                                       eye.width) and (a[0, 0] - b[0, 0]).abs().mean() > (a[0, -1]
                                                                                          - b[0, -1]).abs().mean()
    assert not eye.train().training and all(not p.requires_grad for p in eye.parameters())


def test_bad_settings_are_named():
    for what, call in dict(px=lambda: Lite0Tokens(50), vision=lambda: image_encoder('clip', 64),
                           heads=lambda: QFormerConfig(size='d33x2h2'), codes=lambda: SemanticConfig(codes=0),
                           revive=lambda: SemanticConfig(revive='x'),
                           rate=lambda: LavitConfig(rate=1.), patches=lambda: LavitConfig(patches=0),
                           kind=lambda: SemanticRecipe(kind='x')).items():
        with pytest.raises(ValueError, match=what): call()


# ---- SEED


def test_protocol(sem):
    codes = sem.encode(IMAGES)
    assert codes.shape == (6, 5) and codes.dtype == torch.int64 and sem.n_tokens == 5 and sem.bits == 20
    sem.set_empty(captions(2))
    text = sem.embeddings(codes)
    assert text.states.shape == (6, 6, 10) and text.pooled.shape == (6,
            10) and text.mask.dtype == torch.bool and (text.states[~text.mask] == 0).all()
    assert (text.empty_like().states == .25).all() and text.drop(torch.tensor([1, 0, 1, 1, 1,
                                                                               1]).bool()).states[1].eq(.25).all()
    assert torch.equal(sem.encode(IMAGES[2:4]), codes[2:4]), 'codes do not depend on the batch'


def test_codes_are_causal(sem):
    codes = sem.encode(IMAGES)
    with torch.no_grad():
        kept = sem.causal.query_tokens.clone()
        sem.causal.query_tokens[:, 3] *= -1
        assert torch.equal(sem.encode(IMAGES)[:, :3], codes[:, :3])
        sem.causal.query_tokens.copy_(kept)


@pytest.mark.parametrize('bad',
                         [torch.zeros(2, 4).long(), torch.full((2, 5), 16), torch.full((2, 5), -1), torch.zeros(2, 5)])
def test_wrong_codes_are_named(sem, bad):
    with pytest.raises(ValueError, match='indices'): sem.embeddings(bad)


def test_contrastive_loss_is_the_symmetric_one():
    m = Match(SemanticConfig(project=8, **TINY))
    h, pooled = torch.randn(4, 5, 32, generator=gen()), torch.randn(4, 10, generator=gen(1))
    s = F.normalize(m.image_proj(h[:, -1]), dim=1) @ F.normalize(m.text_proj(pooled), dim=1).T / .07
    soft = torch.full((4, 4), .1 / 4) + .9 * torch.eye(4)
    want = -((soft * s.log_softmax(1)).sum(1).mean() + (soft * s.log_softmax(0)).sum(0).mean()) / 2
    torch.testing.assert_close(m.loss(h, pooled)[0], want)
    far = h.clone()
    far[:, :-1] = 9
    torch.testing.assert_close(m.loss(far, pooled)[0], want)                         # only the last answer counts


def test_reverse_loss_counts_words_only():
    r = Reverse(SemanticConfig(queries=5, dropout=0., image_layers=0, **TINY), 0).eval()
    up, text = torch.randn(3, 5, 32, generator=gen()), captions(3)
    states, pooled, _ = r(up)
    _, parts = r.loss(up, text)
    torch.testing.assert_close(parts['states'], (states - text.states)[text.mask].square().mean())
    torch.testing.assert_close(parts['pooled'], 2 - 2 * (pooled * text.pooled).sum(1).mean())
    other = captions(3)
    other.states[~other.mask] = 77.
    assert r.loss(up, other)[1]['states'] == parts['states']


def test_one_embedding_head():
    c = SemanticRecipe(one_embedding=True, size='d32x2', vision_px=64, queries=4).config(captions(2))
    m = SemanticTokenizer(c, vision=Eye())
    text = m.reverse.text(torch.randn(2, 4, 32, generator=gen()))
    assert c.reverse_tokens == 1 and text.states.shape == (2, 1,
                                                           10) and text.mask is None and m.reverse.loss(torch.zeros(2,
                                                                   4, 32), captions(2))[0].isfinite()


def test_gradients_reach_everything(sem):
    text = captions(6)
    h = sem.causal(sem.features(IMAGES))
    up, losses = sem.codes(h)
    (sem.match.loss(h, text.pooled)[0] + losses['vq'] + cosine_loss(sem.codes.answers(up), h)
     + sem.reverse.loss(up, text)[0]).backward()
    assert not [n for n, p in sem.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    sem.zero_grad(set_to_none=True)


# ---- LaVIT


def test_hidden_keys_have_no_influence_but_their_decision_has_a_gradient():
    a = PolicyAttention(8, 2)
    x, y = torch.randn(2, 3, 8, generator=gen()), torch.randn(2, 5, 8, generator=gen(1))
    p = torch.tensor([[1., 0, 1, 1, 0]] * 2, requires_grad=True)
    z = y.clone()
    z[:, 1] *= -1
    assert torch.allclose(a(x, y, p), a(x, z, p), atol=1e-6) and torch.allclose(a(x, y, p),
                                                                                a(x, y[:, [0, 2, 3]]), atol=1e-6)
    a(x, y, p).square().sum().backward()
    assert (p.grad != 0).all()
    assert torch.allclose(a(x, y, torch.zeros(2, 5)), a.proj.bias.expand(2, 3, -1), atol=1e-6)   # nobody to see


def test_selector_is_hard_and_keeps_something():
    torch.manual_seed(0)  # first weights: with others a picture may have none above the threshold and keep one more
    s = Selector(16)
    with torch.no_grad(): s.out[-1].bias.copy_(torch.tensor([-20., 20.]))                # would drop everything
    x = torch.randn(3, 7, 16, generator=gen())
    policy, keep = s(x, gen())
    assert (policy.detach() > .5).sum(1).tolist() == [1, 1, 1] and keep.max() < .01
    assert torch.allclose(policy, policy.round(), atol=1e-6)
    kept = (s.calibrate(x, 1 / 3)(x)[0] > .5).sum().item()
    assert kept == 7 and s(x, gen())[1].max() < .01  # a threshold instead of certainty


def test_cosine_codes_ignore_length():
    vq = CosineVQ(16, 4).eval()
    t = torch.randn(2, 4, 1, 3, generator=gen())
    assert torch.equal(vq.indices(t), vq.indices(50 * t))
    flat = F.normalize(t[:, :, 0].transpose(1, 2), dim=-1) @ F.normalize(vq.embedding.weight, dim=1).T
    assert torch.equal(vq.indices(t), flat.argmax(-1))


@pytest.mark.parametrize('seed', [None, *range(1, 13)])
def test_a_short_row_says_what_training_saw(lavit, seed):
    seen = lavit.features(IMAGES)
    with torch.no_grad(): painted, losses = lavit(seen, seed and gen(seed))
    codes = lavit.encode(IMAGES, seed and gen(seed))
    assert torch.allclose(lavit.decode_features(codes), painted, atol=1e-5)
    n = lavit.count(codes)
    assert abs(n.double().mean() / 9 - losses['kept']) < 1e-6 and n.min() >= 1 and n.max() == codes.shape[1]
    torch.testing.assert_close(lavit.bits_of(codes).double(), 4. * n.double() + math.log2(9), atol=1e-4, rtol=1e-5)


def test_padding_of_a_row_changes_nothing(lavit):
    codes = lavit.encode(IMAGES, gen(1))[:, :9]
    wide = F.pad(codes, (0, 9 - codes.shape[1]), value=-1)
    a, b = lavit.embeddings(codes), lavit.embeddings(wide)
    assert torch.allclose(a.states, b.states, atol=1e-5) and torch.allclose(a.pooled, b.pooled, atol=1e-5)
    for bad in (codes - 2, codes + 16, codes.float(), F.pad(wide, (0, 1))):
        with pytest.raises(ValueError, match='indices'): lavit.embeddings(bad)


def test_lavit_gradients(lavit):
    lavit.train()
    _, parts = lavit(lavit.features(IMAGES), gen(1))
    (parts['cosine'] + parts['vq'] + 2 * parts['rate']).backward()
    assert not [n for n, p in lavit.named_parameters() if not n.startswith('reverse')
                and (p.grad is None or not p.grad.isfinite().all())]
    assert lavit.selector.out[-1].weight.grad.abs().sum() > 0
    lavit.zero_grad(set_to_none=True)
    lavit.eval()


# ---- recipes, retrieval, adapters


def test_paper_sizes_on_meta():
    "The published Q-Former is BERT-base with cross-attention in every second layer: 105 million parameters, 416 bits"
    text = Text(torch.zeros(1, 77, 768), torch.full((1, 768), 3.))
    r = SemanticRecipe(vision='blip2', vision_px=224, size='base', mlp_ratio=4, dropout=.1, project=256, codes=8192,
                       image_layers=4)
    with torch.device('meta'): m = build_semantic(r, Text(text.states, text.pooled, empty=None))
    c = m.config
    assert (c.queries, c.vision_width, c.reverse_tokens, c.has_mask, c.unit_pooled) == (32, 1408, 77, False, False)
    per = 4 * (768 * 768 + 768) + 2 * 768 + (2 * 768 * 3072 + 3072 + 768 + 2 * 768)
    cross = 2 * (768 * 768 + 768) + 2 * (1408 * 768 + 768) + 2 * 768
    assert sum(p.numel() for p in m.causal.parameters()) == 12 * per + 6 * cross + 2 * 768 + 32 * 768
    assert c.codes == 8192 and 32 * math.log2(8192) == 416


def test_feed_keeps_what_it_computes():
    calls = []
    f = lambda i: (calls.append(len(i)), torch.from_numpy(i).float()[:, None] + .5)[1]
    kept, fresh = Feed(f, 450, True), Feed(f, 450, False)
    assert calls == [200, 200, 50] and torch.equal(kept[np.array([3, 449])],
                                                   fresh[np.array([3, 449])]) and len(calls) == 4


def test_ranks_and_chance():
    s = torch.tensor([[1., 0], [.9, .1]])
    t = torch.tensor([[1., 0], [0, 1.]])
    assert ranks(s, t, ['a', 'b']).tolist() == [0, 1]  # the second is nearer to the first's partner
    assert chance(['a', 'b', 'c', 'd'], 1) == .25 and chance(['a', 'a', 'b', 'b'],
                                                             1) == .5 and chance(['a', 'b'], 5) == 1
    with pytest.raises(ValueError, match='ranks'): ranks(s, t, ['a'])


SIZES = dict(queries=8, width=24, heads=3, layers=3, key_width=12, mlp_ratio=4, codes=32, code_width=8,
             decoder_layers=2, image_layers=2, out=10)


@pytest.mark.parametrize('reverse',
                         [dict(reverse_tokens=0, reverse_layers=0), dict(reverse_tokens=7, reverse_layers=2)])
def test_published_seed_loads_strictly(tmp_path, reverse):
    model = PublishedSeed(SIZES | reverse, Eye())
    for p in model.parameters(): p.normal_(0, .1, generator=gen())
    names = {'causal.query_tokens': 'query_tokens', 'causal.bert.layernorm': 'Qformer.bert.embeddings.LayerNorm',
             'causal.bert': 'Qformer.bert', 'reverse.query_tokens': 'reverse_tokens',
             'reverse.bert.layernorm': 'Reverse_Qformer.bert.embeddings.LayerNorm',
             'reverse.bert': 'Reverse_Qformer.bert', 'codes.': '', 'attention.attention': 'attention.self',
             '.ln_1.': '.norm1.', '.ln_2.': '.norm2.',
             'in_proj_weight': 'qkv.weight', 'in_proj_bias': 'qkv.bias', 'out_proj': 'proj', 'c_fc': 'fc1',
             'c_proj': 'fc2'}
    theirs = {}
    for k, v in model.state_dict().items():
        for ours, name in names.items(): k = k.replace(ours, name)
        theirs[k] = v
    assert 'Qformer.bert.encoder.layer.0.crossattention.self.key.weight' in theirs and 'blocks.0.attn.qkv.weight' in theirs
    path = save_weights(tmp_path / 'seed.safetensors', theirs | {'ln_vision.weight': torch.zeros(3)}, {})
    loaded = PublishedSeed.load(path, Eye(), head_width=8)
    codes = loaded.encode(IMAGES)
    assert torch.equal(codes, model.encode(IMAGES)) and loaded.bits == 40 and torch.equal(loaded.embeddings(codes).states, model.embeddings(codes).states)
    assert loaded.embeddings(codes).states.shape == (6, reverse['reverse_tokens'] or 1, 10)
    bad = rename_seed(theirs)
    del bad['causal.query_tokens']
    with pytest.raises(WeightsError, match='causal.query_tokens'): seed_sizes(bad)
    with pytest.raises(WeightsError, match='pickle'):
        (tmp_path / 'seed.pt').write_bytes(b'PK')
        PublishedSeed.load(tmp_path / 'seed.pt')


def test_lavit_command(tmp_path):
    code = "import json, pathlib, sys; json.dump({p.name: [5] * (i + 1) for i, p in enumerate(sorted(pathlib.Path(sys.argv[1]).iterdir()))}, open(sys.argv[2], 'w'))"
    assert LavitCommand([sys.executable, '-c', code, '{images}', '{out}']).encode(IMAGES[:2]).tolist() == [[5,
                                                                                                            -1], [5, 5]]
    with pytest.raises(ValueError, match='command'): LavitCommand(['python', '{images}'])
    with pytest.raises(FileNotFoundError, match='llama2'):
        LavitCommand(['/nowhere', '{images}', '{out}']).encode(IMAGES[:1])
    with pytest.raises(WeightsError, match='no GPU'):
        LavitCommand([sys.executable, '-c', 'import sys; sys.exit("no GPU")', '{images}', '{out}']).encode(IMAGES[:1])
    for wrong in ({}, {'000000.png': []}, {'000000.png': [99999]}, {'000000.png': [.5]}):
        with pytest.raises(WeightsError, match='image 0'): LavitCommand(['x', '{images}', '{out}']).read(wrong, 1)
