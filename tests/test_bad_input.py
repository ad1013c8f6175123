"""Bad input anywhere ends in one clear line and leaves nothing half written: one test per kind, at the door where a
user would bring it"""
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from toksr.core.paths import stamps_dir
from toksr.core.weights import from_checkpoint, load_into, load_weights, save_weights, seal, WeightsError
from toksr.data.images import BadImage, read_image
from toksr.encoders.text import MiniLM
from toksr.pipeline import profiles as profile, run
from toksr.tokenizers.titok import Tokenizer
from toksr.tokenizers.towers import TokenizerConfig
from toksr.training.checkpoints import Checkpoint
from toksr.training.optimizers import TrainConfig

ROOT = Path(__file__).parents[1]
TINY = dict(image=32, patch=8, n_tokens=4, width=4, encoder='d32x1', decoder='d32x1', text_width=8, text_length=4)


def one_line(e) -> str:
    text = str(getattr(e, 'value', e))
    assert text and '\n' not in text.strip() and len(text) < 700, text
    return text


def build(meta): return Tokenizer(TokenizerConfig(**meta['config']))


@pytest.fixture
def weights(tmp_path):
    return save_weights(tmp_path / 'tiny.safetensors', Tokenizer(TokenizerConfig(**TINY)), {'config': TINY})


# ---- weights
# -----------------------------------------------------------------------------------------------------------------

def test_good_weights_are_taken(weights):
    tok = from_checkpoint(weights, build)
    assert tok.n_tokens == 4 and not tok.training


def test_weights_of_another_shape(weights):
    other = Tokenizer(TokenizerConfig(**{**TINY, 'encoder': 'd64x1'}))
    before = {k: v.clone() for k, v in other.state_dict().items()}
    with pytest.raises(ValueError) as e: load_into(other, load_weights(weights)[0], weights)
    text = one_line(e)
    assert 'tiny.safetensors' in text and '(4, 32) in the file, the model wants (4, 64)' in text and 'from_checkpoint' in text
    assert all(torch.equal(before[k], v) for k, v in other.state_dict().items())


@pytest.mark.parametrize('damage', ['cut', 'flip', 'empty', 'no seal', 'pickle', 'gone', 'folder'])
def test_damaged_weights(weights, damage):
    data, path = weights.read_bytes(), weights
    if damage == 'cut': path.write_bytes(data[:len(data) // 2])
    if damage == 'flip': path.write_bytes(data[:-9] + bytes([data[-9] ^ 4]) + data[-8:])
    if damage == 'empty': path.write_bytes(b'')
    if damage == 'no seal': Path(f'{path}.sha256').unlink()
    if damage == 'pickle':
        path = path.with_suffix('.pth')
        torch.save({'w': torch.ones(2)}, path)
        seal(path)
    if damage == 'gone': path.unlink()
    if damage == 'folder':
        path.unlink()
        path.mkdir()
    with pytest.raises((WeightsError, FileNotFoundError)) as e: from_checkpoint(path, build)
    assert path.name in one_line(e)


def test_metadata_of_another_model(weights):
    state, _ = load_weights(weights)
    for meta in ({}, {'config': {**TINY, 'n_tokenz': 4}}, {'config': {**TINY, 'text_in': 'everywhere'}},
                 {'config': {**TINY, 'n_tokens': 5}}):
        save_weights(weights, state, meta)
        with pytest.raises(ValueError) as e: from_checkpoint(weights, build)
        one_line(e)


# ---- settings
# ----------------------------------------------------------------------------------------------------------------

def test_wrong_profile_name(tmp_path, monkeypatch):
    shutil.copytree(ROOT / 'profiles', tmp_path / 'profiles')
    shutil.copy(ROOT / 'profiles/laptop.yaml', tmp_path / 'params.yaml')
    before = (tmp_path / 'params.yaml').read_bytes()
    monkeypatch.chdir(tmp_path)
    for name in ('labtop', '../laptop', 'laptop.yaml', 'x' * 300):
        with pytest.raises(SystemExit) as e: profile.main([name])
        text = one_line(e)
        assert 'no profile' in text and 'smoke, laptop, workstation, paper' in text
    assert (tmp_path / 'params.yaml').read_bytes() == before


@pytest.mark.parametrize('word',
                         ['warmup=0', 'warmup=1.5', 'warmup=many', 'warmup=10000000', 'wormup=5', 'sizes=[1', 'warmup',
                          'seconds=nan', 'batches=[0]'])
def test_parameter_out_of_range(tmp_path, word, monkeypatch, capsys):
    "Refused before a kernel starts (no kernel could start here: it would be the test that fails)"
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'params.yaml').write_text('profile: laptop\n')
    monkeypatch.setattr(run, 'execute', lambda *a, **k: pytest.fail('a kernel was started'))
    out = tmp_path / 'out.ipynb'
    with pytest.raises(SystemExit) as e: run.main([str(ROOT / 'nbs/study/benchmark.ipynb'), str(out), word])
    assert e.value.code not in (0, None)
    text = one_line(capsys.readouterr().err or e)
    assert word.split('=')[0] in text and any(w in text for w in ('has to be', 'no parameter', 'expected key=value'))
    assert not out.exists()


@pytest.mark.parametrize('make',
                         [lambda: TrainConfig(lr=-1), lambda: TrainConfig(steps=0),
                          lambda: TrainConfig(precision='fp8'),
                                  lambda: TokenizerConfig(image=30), lambda: TokenizerConfig(text_in='some'),
                                  lambda: Tokenizer(TokenizerConfig(encoder='tiny'))])
def test_settings_in_code(make):
    with pytest.raises(ValueError) as e: make()
    one_line(e)


# ---- pictures and captions
# ---------------------------------------------------------------------------------------------------

def test_an_image_that_is_not_one(tmp_path):
    real = tmp_path / 'real.png'
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(real)
    cases = {'text.png': b'hello', 'empty.jpg': b'', 'cut.png': real.read_bytes()[:-30],
             'zip.png': b'PK\x03\x04' + b'0' * 40}
    for name, data in cases.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(BadImage) as e: read_image(tmp_path / name)
        assert name in one_line(e)
    with pytest.raises(BadImage, match='no such file'): read_image(tmp_path / 'gone.png')
    with pytest.raises(BadImage): read_image(tmp_path)
    assert read_image(real).shape == (8, 8, 3)


@pytest.mark.parametrize('image',
                         [torch.zeros(1, 3, 31, 32), torch.zeros(3, 32, 32), torch.zeros(1, 1, 32, 32),
                          torch.zeros(1, 3, 32, 32, dtype=torch.uint8), torch.full((1, 3, 32, 32), 255.)])
def test_a_tensor_that_is_not_an_image(image):
    tok = Tokenizer(TokenizerConfig(**{**TINY, 'text_in': 'none'}))
    with pytest.raises(ValueError, match='image: expected') as e: tok.encode(image)
    one_line(e)


def test_a_caption_of_ten_thousand_characters(recwarn):
    encoder = MiniLM()
    hostile = ['tiger ' * 1667, 'x' * 10_000, '', '\0\n\r\t', '\u202eabc', '../../etc/passwd', '$(rm -rf /)', '{{ x }}',
               '<script>', '\ud800', '🐯' * 5000]
    text = encoder.encode(hostile)
    assert text.states.shape == (len(hostile), 24,
                                 384) and text.states.isfinite().all() and text.pooled.isfinite().all()
    assert any('lose their end' in str(w.message) for w in recwarn.list)
    assert torch.allclose(text.states[2], text.empty.states[0])
    for bad in ('one string', [None], [3]):
        with pytest.raises(TypeError, match='captions') as e: encoder.encode(bad)
        one_line(e)


def test_captions_that_do_not_belong():
    tok, image = Tokenizer(TokenizerConfig(**TINY)), torch.zeros(2, 3, 32, 32)
    for text in (None, torch.zeros(1, 4, 8), torch.zeros(2, 5, 8), torch.zeros(2, 4, 9)):
        with pytest.raises(ValueError, match='text: ') as e: tok.encode(image, text)
        one_line(e)


# ---- data and folders
# --------------------------------------------------------------------------------------------------------

def test_missing_data(tmp_path, monkeypatch):
    monkeypatch.setenv('TOKSR_STAMPS', str(tmp_path))
    with pytest.raises(FileNotFoundError, match='tuxpaint-stamps-default.*TOKSR_STAMPS') as e: stamps_dir()
    one_line(e)


def test_checkpoints_into_a_file(tmp_path):
    (tmp_path / 'taken').write_text('')
    with pytest.raises(OSError) as e: Checkpoint(tmp_path / 'taken').start(None)
    one_line(e)


@pytest.mark.parametrize('command',
                         [['toksr.pipeline.profiles', 'labtop'],
                          ['toksr.pipeline.run', 'nbs/study/gone.ipynb', 'out.ipynb'],
                          ['toksr.pipeline.run', 'README.md', 'out.ipynb']])
def test_command_lines_say_one_line(command):
    "Through the door itself: exit status 1 or 2, one line on stderr, no traceback"
    code = f'from {command[0]} import main; main({command[1:]!r})'
    p = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True,
                       env={**os.environ, 'OMP_NUM_THREADS': '1'})
    assert p.returncode and p.stderr.count('\n') == 1 and 'Traceback' not in p.stderr, p.stderr
    assert not (ROOT / 'out.ipynb').exists()
