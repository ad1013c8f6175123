"""The token transformer against DiT's numbers, and the properties its wiring promises."""
import ast
import runpy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from einops import rearrange
from torch import nn

from toksr.encoders.text import Text
from toksr.layers.dit import attention_maps, DiTConfig, SIZES, TokenDiT
from toksr.layers.dit_blocks import Block, FinalLayer, TimeEmbedder

GOLDEN = Path(__file__).parent / 'golden'
TINY = DiTConfig(n_tokens=6, token_dim=4, width=32, depth=2, heads=4, text_dim=10)


def gen(seed=0): return torch.Generator().manual_seed(seed)
def randn(*shape, seed=0): return torch.randn(*shape, generator=gen(seed))


def loud(model, seed=0):
    "Every parameter random, so that no gate hides a mistake."
    g = gen(seed)
    with torch.no_grad():
        for p in model.parameters(): p.copy_(torch.randn(p.shape, generator=g) * .2)
    return model


def inputs(b=3, config=TINY, empty=True):
    n, d, c = config.n_tokens, config.token_dim, config.text_dim
    none = Text(randn(1, 5, c, seed=8), randn(1, c, seed=9),
                torch.tensor([[True, True, False, False, False]])) if empty else None
    text = Text(randn(b, 5, c, seed=1), randn(b, c, seed=2),
                torch.arange(5) < torch.tensor([5, 2, 3, 4, 1, 5])[:b, None], none)
    return dict(x=randn(b, n, d, seed=3), t=torch.tensor([0, 500, 999, 3, 77, 250])[:b], text=text,
                lr=randn(b, n, d, seed=4))


# --- parity with DiT
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
# -----------------------------------------------------------------------------------------------------------------------
class DiT2D(nn.Module):
    "The class-conditional image DiT, built around our blocks."
    def __init__(self, size, patch, channels, width, depth, heads, classes, out):
        super().__init__()
        self.patch, self.out = patch, out
        self.x_embedder = nn.ModuleDict(dict(proj=nn.Conv2d(channels, width, patch, patch)))
        self.t_embedder = TimeEmbedder(width)
        self.y_embedder = nn.ModuleDict(dict(embedding_table=nn.Embedding(classes + 1, width)))
        self.pos_embed = nn.Parameter(grid_positions(size // patch, width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.final_layer = FinalLayer(width, patch**2 * out)

    def forward(self, x, t, y):
        side = x.shape[-1] // self.patch
        h = rearrange(self.x_embedder['proj'](x), 'b c h w -> b (h w) c') + self.pos_embed
        c = self.t_embedder(t) + self.y_embedder['embedding_table'](y)
        for block in self.blocks: h = block(h, c)
        return rearrange(self.final_layer(h, c), 'b (h w) (p q c) -> b c (h p) (w q)', h=side, p=self.patch, q=self.patch)


def grid_positions(side, width):
    "MAE's fixed 2-D sin-cos table, column index first."
    freq = 1 / 10000**(np.arange(width // 4, dtype=np.float64) / (width / 4))
    rows, cols = np.meshgrid(np.arange(side), np.arange(side), indexing='ij')
    half = lambda p: np.concatenate([np.sin(p.reshape(-1, 1) * freq), np.cos(p.reshape(-1, 1) * freq)], 1)
    return torch.from_numpy(np.concatenate([half(cols), half(rows)], 1)).float()[None]


@pytest.mark.parametrize('how', ['sdpa', 'math'])
def test_equals_reference_dit(how):
    fill = runpy.run_path(str(GOLDEN / 'fill.py'))
    model = DiT2D(16, 2, 4, 96, 3, 6, 10, 8)
    fixed = model.pos_embed.detach().clone()
    fill['fill_'](model, .05)
    with torch.no_grad(): model.pos_embed.copy_(fixed)
    for block in model.blocks: block.attn.how = how
    with torch.no_grad(): out = model(fill['tensor']('input.latent', (2, 4, 16, 16), -1.7, 1.7), torch.tensor([3, 871]), torch.tensor([1, 7]))
    golden = torch.from_numpy(np.load(GOLDEN / 'dit_tiny.npz')['out'])
    assert (out - golden).abs().max() < 1e-5


def test_has_reference_key_list():
    with torch.device('meta'): model = DiT2D(32, 2, 4, 768, 12, 12, 1000, 8)
    ours = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    lines = (GOLDEN / 'dit_b2_keys.txt').read_text().split('\n')
    theirs = {k: ast.literal_eval(shape) for k, shape in (line.split('\t') for line in lines if line)}
    assert ours == theirs
    model.load_state_dict({k: torch.empty(s, device='meta') for k, s in theirs.items()}, strict=True, assign=True)


def test_token_dit_keeps_reference_names():
    with torch.device('meta'): keys = set(TokenDiT(DiTConfig.named('B', text_dim=0)).state_dict())
    lines = (GOLDEN / 'dit_b2_keys.txt').read_text().split('\n')
    theirs = {line.split('\t')[0] for line in lines if line and not line.startswith(('y_embedder', 'x_embedder'))}
    assert keys == theirs | {'x_embedder.weight', 'x_embedder.bias'}


# --- start ---------------------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('changes', [{}, dict(cross_attention=False), dict(text_dim=0), dict(positions='separate', type_embedding=True),
                                     dict(conditioning='none'), dict(attention='math'), dict(gate=1., tie_qk=True)])
def test_output_is_zero_at_init(changes):
    config = replace(TINY, **changes)
    kw = inputs()
    if config.text_dim == 0: kw.pop('text')
    if config.conditioning == 'none': kw.pop('lr')
    out = TokenDiT(config)(**kw)
    assert out.shape == (3, 6, 4) and out.eq(0).all()


def test_every_parameter_learns():
    "After one step away from zero every parameter receives a gradient: nothing is wired to nowhere."
    model = loud(TokenDiT(replace(TINY, positions='separate', type_embedding=True, base_dim=4)))
    model(**inputs(), base=randn(3, 6, 4, seed=5)).square().sum().backward()
    dead = [k for k, p in model.named_parameters() if p.grad is None or p.grad.abs().max() == 0]
    assert dead == []


def test_new_cross_attention_changes_nothing():
    plain = loud(TokenDiT(replace(TINY, cross_attention=False)))
    model = TokenDiT(TINY)
    missing = model.load_state_dict(plain.state_dict(), strict=False)
    assert not missing.unexpected_keys and all('cross' in k or 'states_embedder' in k for k in missing.missing_keys)
    assert torch.allclose(model(**inputs()), plain(**inputs()), atol=1e-6)


def test_init_table():
    model = TokenDiT(DiTConfig.named('d192x6'))
    for b in model.blocks:
        assert b.adaLN_modulation[1].weight.eq(0).all() and b.cross.proj.weight.eq(0).all()
        bound = (6 / (192 + 4 * 192))**.5
        assert b.mlp.fc1.weight.abs().max() <= bound and b.mlp.fc1.weight.std().item() == pytest.approx(bound / 3**.5, rel=.02) and b.mlp.fc1.bias.eq(0).all()
    assert model.t_embedder.mlp[0].weight.std().item() == pytest.approx(.02, rel=.03) and model.final_layer.linear.weight.eq(0).all()
    assert model.pos_embed.std() > .5


def test_departures_of_the_start_are_named_and_off_by_default():
    torch.manual_seed(0)
    paper = TokenDiT(TINY)
    torch.manual_seed(0)
    quick = TokenDiT(replace(TINY, gate=1., tie_qk=True))
    q, k, _ = quick.blocks[0].attn.qkv.weight.chunk(3)
    shift, scale, gate, *_ = quick.blocks[0].adaLN_modulation[1].bias.chunk(6)
    assert torch.equal(q, k) and gate.eq(1).all() and shift.eq(0).all() and scale.eq(0).all()
    kw = inputs()
    own = lambda m: attention_maps(m, **kw | dict(lr=kw['x']))[0][:, :, :6, :6].diagonal(dim1=-2, dim2=-1).mean()
    assert own(quick) > 1.5 * own(paper)                                                     # looks at its own position first


# --- wiring --------------------------------------------------------------------------------------------------------------------------------
def test_conditions_matter_and_drops_remove_them():
    model, kw = loud(TokenDiT(replace(TINY, base_dim=4))), inputs() | dict(base=randn(3, 6, 4, seed=5))
    y, yes, no = model(**kw), torch.ones(3, dtype=torch.bool), torch.zeros(3, dtype=torch.bool)
    moved = lambda **new: (model(**kw | new) - y).abs().amax((1, 2)).min().item()
    assert moved(lr=kw['lr'].flip(0) + 1) > 1e-3 and moved(base=kw['base'] + 1) > 1e-3 and moved(t=kw['t'].flip(0) + 1) > 1e-3
    other = replace(kw['text'], states=kw['text'].states + 1, pooled=kw['text'].pooled + 1)
    assert moved(text=other) > 1e-3
    assert torch.equal(model(**kw, drop_text=no, drop_lr=no), y)
    assert torch.equal(model(**kw, drop_text=yes), model(**kw | dict(text=other), drop_text=yes))
    assert torch.equal(model(**kw, drop_text=yes), model(**kw | dict(text=kw['text'].empty_like())))
    blank = torch.zeros(3, 6, 4)
    assert torch.equal(model(**kw, drop_lr=yes), model(**kw | dict(lr=blank, base=blank)))


def test_drop_is_per_picture():
    model, kw = loud(TokenDiT(TINY)), inputs()
    mixed = model(**kw, drop_lr=torch.tensor([True, False, True]), drop_text=torch.tensor([False, False, True]))
    one = lambda i, dt, dl: model(kw['x'][[i]], kw['t'][[i]], kw['text'].index([i]), kw['lr'][[i]], drop_text=torch.tensor([dt]), drop_lr=torch.tensor([dl]))
    for i, dt, dl in ((0, False, True), (1, False, False), (2, True, True)): assert torch.allclose(mixed[[i]], one(i, dt, dl), atol=1e-5)


def test_text_without_empty_caption_drops_to_zeros():
    model, kw = loud(TokenDiT(TINY)), inputs(empty=False)
    zeros = replace(kw['text'], states=torch.zeros(3, 5, 10), pooled=torch.zeros(3, 10))
    assert torch.equal(model(**kw, drop_text=torch.ones(3, dtype=torch.bool)), model(**kw | dict(text=zeros)))


@pytest.mark.parametrize('how', ['sdpa', 'math'])
def test_padding_is_invisible(how):
    model, kw = loud(TokenDiT(replace(TINY, attention=how))), inputs()
    text = kw['text']
    assert torch.allclose(model(**kw), model(**kw | dict(text=replace(text, states=text.states + 50. * ~text.mask[..., None]))), atol=1e-5)
    cut = replace(text.index([1]), states=text.states[[1], :2], mask=None)                   # two words, no padding at all
    short = dict(x=kw['x'][[1]], t=kw['t'][[1]], lr=kw['lr'][[1]])
    assert torch.allclose(model(**short, text=cut), model(**kw)[[1]], atol=1e-5)


def test_caption_without_any_token_is_finite():
    model, kw = loud(TokenDiT(TINY)), inputs()
    assert model(**kw | dict(text=replace(kw['text'], mask=torch.zeros(3, 5, dtype=torch.bool)))).isfinite().all()


def test_base_equals_channel_concatenation():
    model, kw, base = loud(TokenDiT(replace(TINY, base_dim=4))), inputs(), randn(3, 6, 4, seed=5)
    joined = torch.cat([kw['x'], base], -1) @ torch.cat([model.x_embedder.weight, model.base_embedder.weight], 1).T + model.x_embedder.bias + model.pos_embed
    assert torch.allclose(model.rows(kw['x'], kw['lr'], base, None)[:, :6], joined, atol=1e-5)


def test_positions_and_types():
    kw = inputs()
    h = loud(TokenDiT(TINY)).rows(kw['x'], kw['x'], None, None)
    assert h.shape == (3, 12, 32) and torch.equal(h[:, :6], h[:, 6:])                        # shared: same address
    for changes in (dict(positions='separate'), dict(type_embedding=True)):
        h = loud(TokenDiT(replace(TINY, **changes))).rows(kw['x'], kw['x'], None, None)
        assert (h[:, :6] - h[:, 6:]).abs().max() > .1
    with torch.device('meta'): count = lambda **c: sum(p.numel() for p in TokenDiT(replace(TINY, **c)).parameters())
    with torch.device('meta'): assert count(positions='separate') - count() == 6 * 32 and count(type_embedding=True) - count() == 2 * 32


def test_attention_choices_agree_and_maps_do_not_disturb():
    a, b = loud(TokenDiT(TINY)), loud(TokenDiT(replace(TINY, attention='math')))
    kw = inputs()
    y = a(**kw)
    assert torch.allclose(y, b(**kw), atol=1e-5)
    maps, words = attention_maps(a, **kw), attention_maps(a, kind='cross', **kw)
    assert len(maps) == len(words) == 2 and maps[0].shape == (3, 4, 12, 12) and words[0].shape == (3, 4, 12, 5)
    assert all(torch.allclose(m.sum(-1), torch.ones(m.shape[:-1]), atol=1e-5) for m in maps + words)
    assert words[0].masked_select(~kw['text'].mask[:, None, None]).eq(0).all()
    assert torch.equal(a(**kw), y) and all(block.attn.record is None for block in a.blocks)
    with pytest.raises(ValueError): attention_maps(a, **kw | dict(x=kw['x'][:, :2]))
    assert all(block.attn.record is None for block in a.blocks)                              # switched off after an error too
    with pytest.raises(ValueError, match='cross_attention=True'): attention_maps(TokenDiT(replace(TINY, cross_attention=False)), kind='cross', **kw)


def test_first_map_is_the_softmax_of_q_and_k():
    model, kw = loud(TokenDiT(TINY)), inputs()
    h = model.rows(kw['x'], kw['lr'], None, None)
    c, _, _ = model.condition(kw['t'], kw['text'], None)
    block = model.blocks[0]
    shift, scale = block.adaLN_modulation(c).chunk(6, -1)[:2]
    ln = nn.LayerNorm(32, elementwise_affine=False, eps=1e-6)(h) * (1 + scale[:, None]) + shift[:, None]
    q, k, _ = block.attn.qkv(ln).chunk(3, -1)
    head = lambda z: z.view(3, 12, 4, 8).transpose(1, 2)
    assert torch.allclose(attention_maps(model, **kw)[0], (head(q) @ head(k).transpose(-1, -2) / 8**.5).softmax(-1), atol=1e-6)


def test_batch_size_does_not_matter():
    model, kw = loud(TokenDiT(TINY)), inputs(6)
    part = lambda i: model(kw['x'][i], kw['t'][i], kw['text'].index(i), kw['lr'][i])
    assert torch.allclose(model(**kw), torch.cat([part(slice(0, 1)), part(slice(1, 4)), part(slice(4, 6))]), atol=1e-5)


def test_bf16_autocast_runs_and_stays_close():
    model, kw = loud(TokenDiT(TINY)), inputs()
    with torch.no_grad():
        y = model(**kw)
        with torch.autocast('cpu', torch.bfloat16): z = model(**kw)
    assert z.isfinite().all() and ((z - y).norm() / y.norm()) < .05


# --- errors --------------------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('new,word', [
    (dict(x=randn(3, 5, 4)), 'x must have shape'), (dict(x=randn(3, 6, 5)), 'x must have shape'), (dict(x=randn(6, 4)), 'x must have shape'),
    (dict(t=torch.tensor([1])), 't must have shape'), (dict(lr=None), 'lr is missing'), (dict(lr=randn(3, 12, 4)), 'lr must have shape'),
    (dict(text=None), 'text is missing'), (dict(base=randn(3, 6, 4)), 'base was given'),
    (dict(text=Text(randn(3, 5, 11), randn(3, 11))), 'text must have shape'), (dict(text=Text(randn(2, 5, 10), randn(2, 10))), 'text must have shape'),
    (dict(text=Text(randn(3, 5, 11), randn(3, 10))), 'text.states must have shape')])
def test_wrong_inputs_are_named(new, word):
    with pytest.raises(ValueError, match=word) as e: TokenDiT(TINY)(**inputs() | new)
    assert '\n' not in str(e.value)


@pytest.mark.parametrize('bad', [dict(width=30), dict(conditioning='cross?'), dict(positions='rope'), dict(attention='flash')])
def test_wrong_configs_are_named(bad):
    with pytest.raises(ValueError): replace(TINY, **bad)


def test_sizes():
    with torch.device('meta'):
        for name, (width, depth, heads) in SIZES.items():
            m = TokenDiT(DiTConfig.named(name))
            assert len(m.blocks) == depth and m.blocks[0].attn.heads == heads and m.config.width == width
    with pytest.raises(ValueError, match='use one of'): DiTConfig.named('huge')
