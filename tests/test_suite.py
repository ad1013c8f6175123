"The list of tokenizers, the cells of T Table 2, randomization, and drawings."
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml

from toksr.encoders.text import Text
from toksr.metrics.randomization import decline, effects, progressive, replacement
from toksr.metrics.sets import inception_score
from toksr.pipeline.diagrams import draw_sr, draw_tokenizer
from toksr.pipeline.drawing import Sketch, watch
from toksr.pipeline.registry import describe, ENTRIES, load_entry, text_aware, ZOO
from toksr.sr.super_resolver import SRConfig, SuperResolver
from toksr.tokenizers.grid_training import build_grid, GridRecipe, save_grid
from toksr.tokenizers.titok import save_tokenizer
from toksr.tokenizers.towers import TokenizerConfig
from toksr.tokenizers.variants import VariantTokenizer

ROOT = Path(__file__).resolve().parents[1]
PAPER = yaml.safe_load((ROOT/'nbs/study/paper_numbers.yaml').read_text())['toksr']
TINY = TokenizerConfig(image=32, patch=8, n_tokens=6, width=4, encoder='d64x1', decoder='d64x1', text_width=20,
                       text_length=7, bottleneck='vq', codes=64)


def images(n=6, side=32):
    return torch.randint(0, 256, (n, side, side, 3), generator=torch.Generator().manual_seed(1),
                         dtype=torch.uint8).numpy()


def words(n=6):
    return Text(torch.randn(n, 7, 20, generator=torch.Generator().manual_seed(2)),
                torch.randn(n, 20, generator=torch.Generator().manual_seed(3)))


# ---- T Table 2

TRAINED = dict(titok_kl='none', tatitok_kl='decoder', textok_kl='both')      # as train_arms says


def test_cells_of_table_2():
    """Our three rows stand for the paper's three: who reads the caption is asked of a model of that kind, and every
    printed number is one of the paper's."""
    named = {'none': '-', 'detokenizer': 'Detokenizer Only', 'both': 'Tokenizer + Detokenizer'}
    rows = PAPER['table2_imagenet_val']
    assert [ENTRIES[k].paper for k in TRAINED] == [*rows]
    for key, text_in in TRAINED.items():
        assert text_aware(VariantTokenizer(replace(TINY,
                                                   text_in=text_in))) == named[rows[ENTRIES[key].paper]['text_aware']]
    assert {k: (v['rfid'], v['is']) for k, v in rows.items()} == {'TiTok': (2.56, 171.7), 'TA-TiTok': (1.61, 197.5),
                                                                  'TexTok-VAE': (2.73, 174.14)}
    # the paper's TA-TiTok is the zoo's TiTok
    assert ZOO['tatitok_kl'][1:] == (1.53, 222.0) and ZOO['titok_kl'][1] == rows['TA-TiTok']['rfid']


def test_the_table_that_is_there():
    """T-tab2.csv, if it has been made: the paper's and the zoo's numbers stand in the right rows, and ours carry an
    interval."""
    file = ROOT/'reports/exhibits/T-tab2.csv'
    if not file.is_file(): pytest.skip('not made yet: dvc repro tokenizer_tables')
    t = pd.read_csv(file).query("split == 'val'").set_index('method')
    for key, text_in in TRAINED.items():
        row, printed = t.loc[ENTRIES[key].label], PAPER['table2_imagenet_val'][ENTRIES[key].paper]
        assert (float(row.paper_rfid), float(row.paper_is)) == (printed['rfid'], printed['is'])
        assert {'none': '-', 'detokenizer': 'Detokenizer Only',
                'both': 'Tokenizer + Detokenizer'}[printed['text_aware']] == row.text_aware
        score = next(c for c in t if c.startswith('is_'))
        value, lo, hi = (float(x.strip('[],')) for x in row[score].split())
        assert lo <= value <= hi


def test_papers_rows_exist():
    assert {e.paper for e in ENTRIES.values()} - {''} <= {*PAPER['table3_coco_test'],
                                                          *PAPER['table2_imagenet_val']} and set(ZOO) <= set(ENTRIES)
    assert {e.paper for e in ENTRIES.values()} >= set(PAPER['table3_coco_test']) == set(PAPER['table5_progressive_randomization'])


# ---- loading

def test_entries_load_by_name(tmp_path):
    tok = VariantTokenizer(TINY)
    save_tokenizer(tmp_path/'tokenizer-titok_vq.safetensors', tok)
    grid = build_grid(GridRecipe(family='cosmos', levels=(4, 4), width=2, stem=16, inner=16, channels=(16, 16),
                                 attention=8), 32)
    save_grid(tmp_path/'grid-cosmos_di.safetensors', grid)
    a, b = load_entry('titok_vq', tmp_path), load_entry('cosmos_di', tmp_path)
    assert describe(a) == describe(tok) and describe(b)['bits'] == grid.n_tokens * 4 and describe(b)['text_aware'] == '-'
    with pytest.raises(FileNotFoundError): load_entry('kl_f8', tmp_path)
    with pytest.raises(ValueError, match='tokenizer: expected one of'): load_entry('vqvae', tmp_path)
    for bad in (torch.zeros(3), torch.zeros(1, 5), torch.full((3, 5), float('nan'))):
        with pytest.raises(ValueError, match='logits'): inception_score(bad)


# ---- randomization over the protocol

def test_replacement_draws_codes_that_exist():
    """A 1D codebook, a grid codebook and scalars rounded to levels: drawn tokens are what `lookup` gives for codes,
    and all codes come."""
    grid = build_grid(GridRecipe(family='cosmos', levels=(4, 3), width=2, stem=16, inner=16, channels=(16, 16),
                                 attention=8), 32)
    for tok, codes in ((VariantTokenizer(TINY), 64), (grid, 12)):
        z = torch.randn(5, tok.n_tokens, tok.width, generator=torch.Generator().manual_seed(0))
        source = replacement(tok, z)
        drawn = source.draw(200, torch.Generator().manual_seed(0)).flatten(0, 1).unique(dim=0)
        assert source.codes == codes and len(drawn) == codes
    kl = VariantTokenizer(replace(TINY, bottleneck='kl'))
    source = replacement(kl, 3 + 2 * torch.randn(400, 6, 4, generator=torch.Generator().manual_seed(0)))
    drawn = source.draw(2000, torch.Generator().manual_seed(1))
    assert source.codes == 0 and abs(drawn.mean() - 3) < .2 and abs(drawn.std() - 2) < .1
    with pytest.raises(ValueError, match='2 pictures'): replacement(kl, torch.zeros(1, 6, 4))


def test_progressive_is_repeatable_and_nested():
    tok, x, t = VariantTokenizer(TINY).eval(), images(), words()
    a, b, c = (progressive(tok, x, t, (0., .5, 1.), 2, seed) for seed in (0, 0, 1))
    assert a.equals(b) and not a.equals(c) and [*a.lost.unique()] == [0, 3, 6]
    assert (a.query('fraction == 0').mse_sd == 0).all()
    d = decline(a).set_index('fraction')
    assert d.way[0.] == 0 and d.way[1.] == 1 and d.decline_pct[0.] == 0 and (d.mse_lo <= d.mse).all() and (d.mse <= d.mse_hi).all()
    with pytest.raises(ValueError, match='fractions 0 and 1'): decline(a.query('fraction > 0'))


def test_effects_of_a_tokenizer_that_ignores_a_token():
    tok = VariantTokenizer(replace(TINY, bottleneck='kl')).eval()
    class Deaf(torch.nn.Module):
        n_tokens, width, bits = tok.n_tokens, tok.width, tok.bits
        def encode(self, x, text=None): return tok.encode(x, text)
        def decode(self, z, text=None): return tok.decode(z * torch.tensor([1., 1, 0, 1, 1, 1])[:, None], text)
    e = effects(Deaf(), images(), words(), block=8)
    assert e.table.change[2] == 0 and (e.table.change.drop(2) > 0).all() and e.maps.shape == (6, 32, 32)
    with pytest.raises(ValueError, match='block'): effects(Deaf(), images(), words(), block=7)


# ---- drawings

def test_a_drawing_follows_the_model():
    "Another depth, another number of tokens, no captions: the boxes say so without a change of the drawing code."
    image, text = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)), words(1)
    for n, layers, text_in in ((6, 1, 'both'), (9, 2, 'none')):
        tok = VariantTokenizer(replace(TINY, n_tokens=n, encoder=f'd64x{layers}', text_in=text_in,
                                       bottleneck='kl')).eval()
        s = draw_tokenizer(tok, image, text)
        said = s.boxes['encoder'].text
        assert f'{layers} blocks' in said and f'{n} latents' in said and ('7 words' in said) == (text_in == 'both') and f'{1 + 16 + n + (7 if text_in == "both" else 0)} tokens' in said
        sr = SuperResolver(tok, SRConfig(text_dim=20, base='none', retouch=0)).eval()
        r = draw_sr(sr, image[..., ::4, ::4], text, consistency=0)
        assert f'{2 * n} tokens' in r.boxes['dit'].text and not {'base', 'retouch', 'project'} & set(r.boxes)
    with pytest.raises(ValueError, match='was not called'):
        watch(lambda: tok.encode(image, text), {'decoder': tok.decoder})
    with pytest.raises(ValueError, match='kind'): Sketch().box('a', 0, 0, '', 'cloud')


def test_the_dual_drawing_says_what_passes():
    "Tokens and bits of both branches, and the shapes between, for another guide without a change of the drawing code."
    from toksr.pipeline.diagrams import draw_dual
    from toksr.dual.diffusion_branch import LatentConfig, LatentDiffusion
    from toksr.dual.dual_tokenizer import DualTokenizer
    from toksr.dual.guide import GuideRecipe
    from toksr.tokenizers.code_training import build_codes
    from toksr.dual.semantic_training import build_semantic, SemanticRecipe
    g = torch.Generator().manual_seed(0)
    text = Text(torch.randn(1, 7, 20, generator=g), torch.randn(1, 20, generator=g))
    text.empty = Text(text.states, text.pooled)
    semantic = build_semantic(SemanticRecipe(size='d32x1h1', queries=5, codes=16, project=8, decoder_layers=1,
                                             reverse_layers=1), text)
    tok = VariantTokenizer(replace(TINY, text_in='none', bottleneck='kl')).eval()
    diffusion = LatentDiffusion(tok, LatentConfig(image=32, text_dim=20, text_length=7)).eval()
    image = torch.rand(1, 3, 32, 32, generator=g)
    for factor, tokens in ((8, 16), (16, 4)):
        guide = build_codes(GuideRecipe(factor=factor, base=32, latent=4, width=4, codes=32), 32).eval()
        dual = DualTokenizer(diffusion, semantic.eval(), guide)
        s = draw_dual(dual, image, image)
        assert f'{tokens} tokens' in s.boxes['gcodes'].text and f'{tokens * 5:.0f} bits' in s.boxes['gcodes'].text and '5 queries' == s.boxes['queries'].text
        assert s.boxes['out'].text == f'{tokens + 5} tokens, {tokens * 5 + 5 * 4} bits' and '6 × 4' in s.boxes['latent'].text and '7 × 20' in s.boxes['words'].text
