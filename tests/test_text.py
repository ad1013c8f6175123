"Encoders against their references, hostile captions, and a cache that can be broken."
import json
import os
import warnings

import numpy as np
import pytest
import torch
import toksr.encoders.text

from toksr.encoders.clip import clip_ids, ClipText, ClipTextHF
from toksr.encoders.text import cat, clean_captions, load_minilm, MiniLM, Text
from toksr.encoders.text_cache import cached

CAPTIONS = ['A tiger next to a red mailbox on a green background.', 'A cup of tea.', '',
            'A tiger next to a red mailbox on a green background.', 'Two dogs']


@pytest.fixture(scope='module')
def minilm() -> MiniLM: return MiniLM()


@pytest.fixture(scope='module')
def tiny_clip(tmp_path_factory):
    """A small CLIP with random weights as a safetensors file for open_clip, and its text tower as a folder for
    transformers."""
    import open_clip
    from safetensors.torch import save_file
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection
    root, (w, layers, heads) = tmp_path_factory.mktemp('clip'), (64, 3, 4)
    config = dict(embed_dim=48, quick_gelu=True,
                  vision_cfg=dict(image_size=32, layers=1, width=32, patch_size=16, head_width=16),
        text_cfg=dict(context_length=77, vocab_size=49408, width=w, heads=heads, layers=layers))
    (root/'tiny-toksr.json').write_text(json.dumps(config))
    open_clip.add_model_config(root/'tiny-toksr.json')
    torch.manual_seed(0)
    model = open_clip.create_model('tiny-toksr')
    for p in model.parameters(): p.data += .05*torch.randn_like(p)
    save_file(model.state_dict(), root/'tiny.safetensors')
    hf = CLIPTextModelWithProjection(CLIPTextConfig(hidden_size=w, intermediate_size=4*w, num_hidden_layers=layers,
                                                    num_attention_heads=heads, projection_dim=48,
                                                    hidden_act='quick_gelu'))
    hf.load_state_dict(to_transformers(model.state_dict(), layers), strict=False)
    hf.save_pretrained(root/'hf')
    return root


def to_transformers(s: dict, layers: int) -> dict:
    t = 'text_model.'
    out = {t+'embeddings.token_embedding.weight': s['token_embedding.weight'],
           t+'embeddings.position_embedding.weight': s['positional_embedding'],
        t+'final_layer_norm.weight': s['ln_final.weight'], t+'final_layer_norm.bias': s['ln_final.bias'],
        'text_projection.weight': s['text_projection'].T.contiguous()}
    for i in range(layers):
        a, b = f'transformer.resblocks.{i}.', f'{t}encoder.layers.{i}.'
        for kind in ('weight', 'bias'):
            for x, v in zip('qkv', s[f'{a}attn.in_proj_{kind}'].chunk(3)):
                out[f'{b}self_attn.{x}_proj.{kind}'] = v.contiguous()
            for x, y in (('attn.out_proj', 'self_attn.out_proj'), ('ln_1', 'layer_norm1'), ('ln_2', 'layer_norm2'),
                         ('mlp.c_fc', 'mlp.fc1'), ('mlp.c_proj', 'mlp.fc2')):
                out[f'{b}{y}.{kind}'] = s[f'{a}{x}.{kind}']
    return out


# MiniLM

def test_minilm_equals_its_recipe(minilm):
    """Reference: the model on the tokenizer's own padding, mean over tokens, normalised (what
    sentence-transformers' modules.json says)."""
    model, tokenizer, _ = load_minilm()
    text = minilm.encode(CAPTIONS)
    for i, c in enumerate(CAPTIONS):
        ids = torch.tensor([tokenizer.encode(c).ids])
        with torch.no_grad(): h = model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state[0]
        n = len(h)
        torch.testing.assert_close(text.states[i, :n], h, atol=2e-5, rtol=0)
        assert (text.states[i, n:] == 0).all() and text.mask[i].tolist() == [True]*n+[False]*(24-n)
        torch.testing.assert_close(text.pooled[i], torch.nn.functional.normalize(h.mean(0), dim=0), atol=1e-5, rtol=0)


def test_minilm_golden(minilm):
    "Similarities of the hub's example sentences for this model, as published there."
    p = minilm.encode(['That is a happy person', 'That is a happy dog', 'That is a very happy person',
                       'Today is a sunny day']).pooled
    np.testing.assert_allclose((p[0]@p[1:].T).numpy(), [.6945773, .9429150, .2568759], atol=1e-4)


def test_order_duplicates_and_empty(minilm):
    text = minilm.encode(CAPTIONS)
    assert torch.equal(text.states[0], text.states[3])
    assert torch.equal(text.states[2], text.empty.states[0]) and len(text.empty) == 1 and text.empty.mask.sum() == 2
    back = minilm.encode(CAPTIONS[::-1])
    torch.testing.assert_close(back.states.flip(0), text.states, atol=1e-5, rtol=0)
    none = minilm.encode([])
    assert none.states.shape == (0, 24, 384) and len(none.empty) == 1


def test_autocast_outside_changes_nothing(minilm):
    with torch.autocast('cpu', torch.bfloat16): inside = minilm.encode(CAPTIONS)
    assert torch.equal(inside.states, minilm.encode(CAPTIONS).states) and inside.states.dtype == torch.float32


def test_bf16_is_close_and_named(minilm):
    fast = MiniLM(bf16=True)
    a, b = fast.encode(CAPTIONS).pooled, minilm.encode(CAPTIONS).pooled
    assert (a*b).sum(1).min() > .999 and fast.name != minilm.name


@pytest.mark.parametrize('caption',
                         ['x'*10_000, 'word '*2000, '\x00\x01\x1b[31m', '\ud800 lone surrogate', '‮RTL ‬', '🐯'*500,
                          '<script>{{ }}$(rm)', '../../etc', '\n\t "quotes" \'\''])
def test_hostile_captions_encode(minilm, caption):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        text = minilm.encode([caption])
    assert text.states.isfinite().all() and text.mask.any() and abs(text.pooled.norm()-1) < 1e-5
    assert not any(ord(c) < 32 or 0xd800 <= ord(c) < 0xe000 for c in clean_captions([caption])[0])


def test_long_caption_is_cut_aloud_and_keeps_its_end_mark(minilm):
    with pytest.warns(UserWarning,
                      match=r'minilm-24: 1 of 2 captions have more than 24 tokens.*captions\[1\], 2002 tokens'):
        text = minilm.encode(['a cat', 'word '*2000])
    assert text.mask[1].all()
    short = minilm.encode(['word '*22]).states[0]
    torch.testing.assert_close(text.states[1], short, atol=1e-5, rtol=0)


@pytest.mark.parametrize('bad, message',
                         [(['a', 3], r'captions\[1\]: expected a string, got int'),
                          ([b'a'], r'captions\[0\]: expected a string, got bytes'), ('a cat', 'got one string')])
def test_not_a_caption(minilm, bad, message):
    for f in (minilm.encode, clip_ids):
        with pytest.raises(TypeError, match=message): f(bad)


# Text

def text_of(n: int = 4, masked: bool = True) -> Text:
    g = torch.Generator().manual_seed(n)
    make = lambda k: Text(torch.randn(k, 5, 3, generator=g), torch.randn(k, 2, generator=g),
                          torch.rand(k, 5, generator=g) > .5 if masked else None)
    t = make(n)
    t.empty = make(1)
    return t


@pytest.mark.parametrize('masked', [True, False])
def test_drop_index_cat_to(masked):
    t = text_of(masked=masked)
    d = t.drop(torch.tensor([1, 0, 0, 1]))
    for name in ('states', 'pooled') + (('mask',) if masked else ()):
        x, y, e = getattr(t, name), getattr(d, name), getattr(t.empty, name)
        assert torch.equal(y[[0, 3]], x[[0, 3]]) and torch.equal(y[1], e[0]) and torch.equal(y[2], e[0])
        assert torch.equal(getattr(t.empty_like(), name), e.expand(4, *e.shape[1:]))
        assert torch.equal(getattr(cat([t, d]).index(slice(4, 8)), name), y)
        for i in ([2, 0], np.array([2, 0]), torch.tensor([2, 0]), [False, True, False, True]):
            assert len(getattr(t.index(i), name)) == 2
    half = t.to(torch.float16)
    assert half.states.dtype == half.empty.pooled.dtype == torch.float16 and (not masked
                                                                              or half.mask.dtype == torch.bool)
    assert d.empty is t.empty and d.drop(torch.zeros(4, dtype=torch.bool)).states.std(0).max() == 0


def test_text_errors():
    t = text_of()
    with pytest.raises(ValueError, match=r'keep must have shape \(4,\)'): t.drop(torch.ones(3))
    with pytest.raises(ValueError, match='Text.empty is None'): Text(t.states, t.pooled).drop(torch.ones(4))
    with pytest.raises(ValueError, match='one encoder'): cat([t, text_of(masked=False)])


# cache

class Counting:
    name, version, calls, size = 'counting', '1', 0, 1
    def encode(self, captions):
        self.calls += 1
        t = text_of(max(len(captions), 1))
        e = t.empty
        return Text(t.states[:len(captions)], t.pooled[:len(captions)], t.mask[:len(captions)], e)


def test_a_cache_written_in_chunks_is_that_of_one_piece(tmp_path, monkeypatch):
    minilm, captions = toksr.encoders.text_cache.caption_encoder(), [f'A photo of {n} cats.' for n in range(7)]
    whole = cached(minilm, captions, tmp_path/'a', torch.float16)
    monkeypatch.setattr(toksr.encoders.text_cache, 'CHUNK', 2*4*minilm.size)
    parts = cached(minilm, captions, tmp_path/'b', torch.float16)
    torch.testing.assert_close(parts.states, whole.states, atol=1e-3, rtol=1e-2)
    assert torch.equal(parts.mask, whole.mask) and torch.allclose(parts.empty.states, whole.empty.states, atol=1e-3)
    assert [f.stat().st_size for f in (tmp_path/'a').glob('*.npy')] == [f.stat().st_size
                                                                        for f in (tmp_path/'b').glob('*.npy')]

def test_taken_rows_are_float32():
    t = text_of(4).to(torch.float16)
    assert t.take([1, 3]).states.dtype == torch.float32 and t.take(slice(1,
            3)).mask.dtype == torch.bool and len(t.take(np.array([2]))) == 1

@pytest.mark.parametrize('dtype', [torch.float32, torch.float16])
def test_cache_hits_and_misses(tmp_path, dtype):
    e = Counting()
    a = cached(e, ['x', 'y'], tmp_path, dtype)
    b = cached(e, ['x', 'y'], tmp_path, dtype)
    assert e.calls == 1 and a.states.dtype == b.states.dtype == dtype
    for name in ('states', 'pooled', 'mask'):
        assert torch.equal(getattr(a, name), getattr(b, name)) and torch.equal(getattr(a.empty, name),
                                                                               getattr(b.empty, name))
    for other in (['x', 'z'], ['y', 'x'], ['x'], ['xy'], []): cached(e, other, tmp_path, dtype)
    assert e.calls == 6
    e.version = '2'
    cached(e, ['x', 'y'], tmp_path, dtype)
    assert e.calls == 7
    assert b.drop(torch.tensor([True, False])).states.shape == (2, 5, 3)


@pytest.mark.parametrize('damage', ['truncate', 'flip', 'empty', 'note', 'note keys', 'garbage'])
def test_damaged_cache_is_rebuilt(tmp_path, damage):
    e = Counting()
    a = cached(e, ['x', 'y'], tmp_path)
    file, note = next(tmp_path.glob('*.npy')), next(tmp_path.glob('*.json'))
    raw = bytearray(file.read_bytes())
    if damage == 'truncate': file.write_bytes(raw[:len(raw)//2])
    if damage == 'flip':
        raw[-7] ^= 4
        file.write_bytes(raw)
    if damage == 'empty': file.write_bytes(b'')
    if damage == 'note': note.write_text('{')
    if damage == 'note keys': note.write_text('{"sha256": 3}')
    if damage == 'garbage': file.write_bytes(os.urandom(500))
    with pytest.warns(UserWarning, match='damaged caption cache'): b = cached(e, ['x', 'y'], tmp_path)
    assert e.calls == 2 and torch.equal(a.states, b.states)
    assert torch.equal(cached(e, ['x', 'y'], tmp_path).states, a.states) and e.calls == 2


def test_failed_encoding_leaves_nothing(tmp_path):
    e = Counting()
    e.encode = lambda c: (_ for _ in ()).throw(RuntimeError('out of memory'))
    with pytest.raises(RuntimeError): cached(e, ['x'], tmp_path/'cache')
    assert not list(tmp_path.rglob('*.*'))


# CLIP

def test_two_paths_to_clip_agree(tiny_clip):
    a = ClipText('tiny-toksr', str(tiny_clip/'tiny.safetensors')).encode(CAPTIONS)
    b = ClipTextHF(str(tiny_clip/'hf')).encode(CAPTIONS)
    assert a.states.shape == (5, 77, 64) and a.pooled.shape == (5, 48) and a.mask is None
    torch.testing.assert_close(a.states, b.states, atol=1e-5, rtol=0)
    torch.testing.assert_close(a.pooled, b.pooled, atol=1e-5, rtol=0)
    torch.testing.assert_close(a.empty.states, b.empty.states, atol=1e-5, rtol=0)
    assert torch.equal(a.empty.states[0], a.states[2]) and not torch.equal(a.pooled[0], a.pooled[1])


def test_clip_equals_open_clip(tiny_clip):
    import open_clip
    model = open_clip.create_model('tiny-toksr', pretrained=str(tiny_clip/'tiny.safetensors')).eval()
    ids = open_clip.get_tokenizer('ViT-L-14-336-quickgelu')(CAPTIONS)
    assert torch.equal(ids, clip_ids(CAPTIONS)) and ids.shape == (5, 77)
    with torch.no_grad(): want = model.encode_text(ids)
    torch.testing.assert_close(ClipText('tiny-toksr', str(tiny_clip/'tiny.safetensors')).encode(CAPTIONS).pooled, want,
                               atol=1e-6, rtol=0)


def test_clip_pads_with_zero():
    ids = clip_ids(['a tiger', ''])
    assert ids[0, :4].tolist() == [49406, 320, 6531, 49407] and (ids[0, 4:] == 0).all() and ids[1,
            :2].tolist() == [49406, 49407] and (ids[1, 2:] == 0).all()


def test_quick_gelu_is_the_default(tiny_clip):
    weights = str(tiny_clip/'tiny.safetensors')
    names = {type(b.mlp.gelu).__name__ for b in ClipText('tiny-toksr', weights).model.transformer.resblocks}
    assert names == {'QuickGELU'}
    import inspect, open_clip
    assert inspect.signature(ClipText).parameters['name'].default == 'ViT-L-14-336-quickgelu' and open_clip.get_model_config('ViT-L-14-336-quickgelu')['quick_gelu']
    (tiny_clip/'tiny-gelu.json').write_text((tiny_clip/'tiny-toksr.json').read_text().replace('true', 'false'))
    open_clip.add_model_config(tiny_clip/'tiny-gelu.json')
    a, b, c = (ClipText(n, weights, quick_gelu=q).encode(CAPTIONS).states
               for n, q in (('tiny-toksr', True), ('tiny-gelu', True), ('tiny-gelu', False)))
    assert torch.equal(a, b) and (a-c).abs().max() > 1e-3, 'the trap of ViT-L-14-336 with pretrained="openai"'


def test_hf_activation_is_checked(tiny_clip, tmp_path):
    import shutil
    shutil.copytree(tiny_clip/'hf', tmp_path/'hf')
    config = json.loads((tmp_path/'hf/config.json').read_text())
    config['hidden_act'] = 'gelu'
    (tmp_path/'hf/config.json').write_text(json.dumps(config))
    with pytest.warns(UserWarning, match='activation is gelu'): ClipTextHF(str(tmp_path/'hf'))


def test_long_clip_caption_is_cut_aloud(tiny_clip):
    with pytest.warns(UserWarning, match='more than 77 tokens'): ids = clip_ids(['a cat and '*1000])
    assert ids.shape == (1, 77) and ids[0, -1] == 49407


def test_missing_clip_weights(tmp_path):
    with pytest.raises(FileNotFoundError, match='tiny-toksr|ViT-B-32.*nowhere.safetensors.*pass the path'):
        ClipText('ViT-B-32', str(tmp_path/'nowhere.safetensors'))
    with pytest.raises(FileNotFoundError, match='nowhere.*model.safetensors'): ClipTextHF(str(tmp_path/'nowhere'))
    (tmp_path/'broken.safetensors').write_bytes(b'\x08\0\0\0\0\0\0\0{"a": 1}')
    with pytest.raises(FileNotFoundError, match='broken.safetensors') as e:
        ClipText('ViT-B-32', str(tmp_path/'broken.safetensors'))
    assert '\n' not in str(e.value)


def test_unreachable_hub_is_one_line(monkeypatch):
    import huggingface_hub
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_OFFLINE', True)
    with pytest.raises(FileNotFoundError,
                       match='^toksr/no-such-model: weights could not be loaded .*connect to the hub once') as e:
        ClipTextHF('toksr/no-such-model')
    assert '\n' not in str(e.value)
