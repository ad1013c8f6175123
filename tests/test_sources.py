"""The stage `corpus` on pictures of one's own: the notebook itself, run as the pipeline runs it."""
import json
import subprocess
import sys

import nbformat
import numpy as np
import pytest
from PIL import Image

from toksr.core.paths import ROOT
from toksr.data.collections import longest, PHOTOGRAPHS, photographs
from toksr.data.scenes import make_corpus
from toksr.training.splits import load_split


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    root, scenes = tmp_path_factory.mktemp('own'), make_corpus('val', 36, 64, 2)
    for k, part in enumerate(('train', 'val', 'novel')):
        (root/part).mkdir()
        for i in range(12*k, 12*k+12):
            Image.fromarray(scenes.images[i]).save(root/f'{part}/{i:02d}.png')
            (root/f'{part}/{i:02d}.txt').write_text(scenes.captions[i])
    (root/'train/broken.png').write_bytes(b'no picture')
    (root/'train/broken.txt').write_text('A broken file.')
    return root


def corpus(tmp_path, *words):
    return subprocess.run([sys.executable, '-c', 'from toksr.pipeline.run import main; main()',
                           str(ROOT()/'nbs/study/corpus.ipynb'), str(tmp_path/'corpus.ipynb'), 'n_train=10', 'n_val=10',
                           'n_novel=10', 'n_complex=10',
                           f'corpus={tmp_path}/corpus', f'out={tmp_path}/reports', *words], cwd=ROOT(),
                           capture_output=True, text=True)


def test_the_stage_reads_a_folder(tmp_path, folder):
    r = corpus(tmp_path, 'source=folder', f'folder={folder}', 'encoder=clip:ViT-B-32:none')
    assert r.returncode == 0, r.stderr[-3000:]
    shown = '\n'.join(o.get('text', '') for c in nbformat.read(tmp_path/'corpus.ipynb', 4).cells
                      if c.cell_type == 'code' for o in c.outputs)
    assert 'train: 10 pictures' in shown and '40 pictures of 64 pixels' in shown
    split = load_split(tmp_path/'corpus', 'train')
    assert split.encoder == 'clip:ViT-B-32:none' and split.text.states.shape == (10, 77,
            512) and split.images.shape == (10, 64, 64, 3)
    assert np.array_equal(split.images[3], np.asarray(Image.open(folder/'train/03.png')))
    result = json.loads((tmp_path/'reports/metrics/corpus.json').read_text())
    assert result['params']['source'] == 'folder' and result['metrics']['photographs'] == 0


def test_a_wrong_place_says_what_was_expected(tmp_path, folder):
    r = corpus(tmp_path, 'source=paper', 'coco=nowhere')
    assert r.returncode and "coco: source 'paper' reads from a folder, expected its path, got 'nowhere'" in r.stderr+r.stdout
    assert not (tmp_path/'corpus.ipynb').exists()


def test_unreadable_files_are_named(tmp_path, folder):
    found = photographs('folder', tmp_path, 64, {}, folder=folder)
    assert [a.file for a in found['train'][1]] == ['broken.png'] and len(found['train'][0]) == 12 and set(found) == {'train', 'val', 'novel', 'complex'}


def test_complex_are_the_longest_captions():
    scenes = make_corpus('val', 20, 32, 2)
    some = longest(scenes, 5)
    assert min(len(c.split()) for c in some.captions) >= sorted(len(c.split()) for c in scenes.captions)[-5]
    assert [scenes.captions.index(c) for c in some.captions] == sorted(scenes.captions.index(c) for c in some.captions)
    with pytest.raises(ValueError, match='at most 20'): longest(scenes, 21)


@pytest.mark.parametrize('source', PHOTOGRAPHS)
def test_every_source_has_what_studies_read(source): assert {'train', 'val', 'novel'} <= set(PHOTOGRAPHS[source])
