"Weights on disk: what is saved comes back, and no wrong file is ever loaded."
import hashlib
import json
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from toksr.core import weights as hub
from toksr.core.weights import (
    fetch_pretrained, from_checkpoint, load_into, load_weights, save_weights, seal, seal_path, WeightsError,
)


def net(width=8):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, width), nn.BatchNorm1d(width), nn.Linear(width, 4))


@pytest.fixture
def path(tmp_path):
    return save_weights(tmp_path / 'w.safetensors', net(),
                        {'width': 8, 'scores': [1.5, None], 'nested': {'text_in': 'both'}})


def test_round_trip(path):
    state, meta = load_weights(path)
    assert meta == {'width': 8, 'scores': [1.5, None], 'nested': {'text_in': 'both'}}
    want = net().state_dict()
    assert list(sorted(state)) == sorted(want) and all(torch.equal(state[k], v) and state[k].dtype == v.dtype
                                                       for k, v in want.items())


@pytest.mark.parametrize('dtype,error', [(torch.float16, 5e-4), (torch.bfloat16, 4e-3)])
def test_half_size(tmp_path, dtype, error):
    big = {'a': torch.randn(1000), 'n': torch.arange(5), 'h': torch.randn(3).half(), 'd': torch.randn(3).double()}
    path = save_weights(tmp_path / 'h.safetensors', big, {}, dtype=dtype)
    state, _ = load_weights(path)
    assert [state[k].dtype for k in 'anhd'] == [torch.float32, torch.int64, torch.float16, torch.float64]
    assert (state['a'] - big['a']).abs().max() < error * big['a'].abs().max() and torch.equal(state['d'], big['d'])
    assert path.stat().st_size < 2600
    again = save_weights(tmp_path / 'h2.safetensors', state, {}, dtype=dtype)     # storing twice loses nothing more
    assert torch.equal(load_weights(again)[0]['a'], state['a'])


def test_too_large_for_half(tmp_path):
    with pytest.raises(WeightsError, match='w holds values beyond 65504'):
        save_weights(tmp_path / 'x.safetensors', {'w': torch.tensor([1e5])}, {}, dtype=torch.float16)
    assert not list(tmp_path.iterdir())


def test_same_bytes_everywhere(path, tmp_path):
    "Another process, another hash seed, other order of the metadata: the same file"
    code = f'''
import sys; sys.path.insert(0, {str(os.path.dirname(__file__))!r})
from test_hub import net
from toksr.core.weights import save_weights
save_weights({str(tmp_path / "other.safetensors")!r}, net(), {{'nested': {{'text_in': 'both'}}, 'scores': [1.5, None], 'width': 8}})'''
    subprocess.run([sys.executable, '-c', code], check=True,
                   env={**os.environ, 'PYTHONHASHSEED': '77', 'OMP_NUM_THREADS': '1'})
    assert (tmp_path / 'other.safetensors').read_bytes() == path.read_bytes()


def test_sha256sum_reads_our_seal(path):
    line = seal_path(path).read_text()
    assert line == f'{hashlib.sha256(path.read_bytes()).hexdigest()}  w.safetensors\n'


def test_cut_at_fifty_places(path):
    data = path.read_bytes()
    for at in np.linspace(0, len(data) - 1, 50).astype(int):
        path.write_bytes(data[:at])
        with pytest.raises(WeightsError, match='w.safetensors: truncated or altered') as e: load_weights(path)
        assert '\n' not in str(e.value)


def test_fifty_flipped_bits(path):
    data, rng = path.read_bytes(), np.random.default_rng(0)
    refused = 0
    for at in rng.choice(len(data), 50, replace=False):
        path.write_bytes(data[:at] + bytes([data[at] ^ 1 << rng.integers(8)]) + data[at + 1:])
        with pytest.raises(WeightsError, match='w.safetensors') as e: load_weights(path)
        refused += '\n' not in str(e.value)
    assert refused == 50


def test_flipped_bits_in_the_seal(path):
    text = seal_path(path).read_bytes()
    for at in range(0, 64, 7):
        seal_path(path).write_bytes(text[:at] + bytes([text[at] ^ 1]) + text[at + 1:])
        with pytest.raises(WeightsError, match='truncated or altered'): load_weights(path)
    for other in (b'', b'\xff\xfe', b'nonsense'):
        seal_path(path).write_bytes(other)
        with pytest.raises(WeightsError, match='truncated or altered'): load_weights(path)


def test_missing_seal_says_how_to_make_one(path):
    seal_path(path).unlink()
    with pytest.raises(WeightsError, match=r'toksr\.core\.weights\.seal\('): load_weights(path)
    seal(path)
    assert load_weights(path)[1]['width'] == 8
    with pytest.raises(FileNotFoundError, match='no such file to seal'): seal(path.with_name('gone.safetensors'))


def test_sealed_rubbish(tmp_path):
    for k, data in enumerate((b'', b'{}', b'x' * 100, (2**63 - 1).to_bytes(8, 'little') + b'{' * 50,
                              (2).to_bytes(8, 'little') + b'[]', b'\x89HDF\r\n\x1a\n' + b'0' * 40)):
        p = tmp_path / f'{k}.safetensors'
        p.write_bytes(data)
        seal(p)
        with pytest.raises(WeightsError, match=f'{k}.safetensors: sealed, but not safetensors') as e: load_weights(p)
        assert '\n' not in str(e.value)


class Boom:
    ran = False
    def __reduce__(self): return (setattr, (Boom, 'ran', True))


@pytest.mark.parametrize('name', ['w.pth', 'w.bin', 'w.pt', 'w.ckpt', 'w.safetensors'])
def test_pickles_are_refused_unread(tmp_path, name):
    path = tmp_path / name
    for write in (lambda: path.write_bytes(pickle.dumps(Boom())), lambda: torch.save({'a': Boom()}, path)):
        write()
        seal(path)
        with pytest.raises(WeightsError, match='got a pickle.*can run code'): load_weights(path)
        assert not Boom.ran
    (tmp_path / 'w.npz').write_bytes(b'rubbish')
    seal(tmp_path / 'w.npz')
    with pytest.raises(WeightsError, match='expected a .safetensors file'): load_weights(tmp_path / 'w.npz')


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match='make repro'): load_weights(tmp_path / 'gone.safetensors')


def test_files_of_others(tmp_path):
    """Without our metadata, with foreign ones, with ones that are not what we write: tensors come, metadata are
    plain or empty"""
    for k, meta in enumerate((None, {'format': 'pt'}, {'toksr': '{"meta": {"_target_": "os.system", "a": 1}}'})):
        p = tmp_path / f'{k}.safetensors'
        save_file({'w': torch.ones(2)}, p, meta)
        seal(p)
        state, m = load_weights(p)
        assert torch.equal(state['w'], torch.ones(2)) and m == ({'_target_': 'os.system', 'a': 1} if k == 2 else {})
    for k, meta in enumerate(('not json', '[]', '{"meta": 3}')):
        p = tmp_path / f'bad{k}.safetensors'
        save_file({'w': torch.ones(2)}, p, {'toksr': meta})
        seal(p)
        with pytest.raises(WeightsError, match='sealed, but not safetensors'): load_weights(p)


def test_metadata_must_be_plain(tmp_path):
    for bad in ({'a': object()}, {'a': float('nan')}):
        with pytest.raises((TypeError, ValueError)): save_weights(tmp_path / 'x.safetensors', net(), bad)
    with pytest.raises(WeightsError, match='saved as .safetensors'): save_weights(tmp_path / 'x.pth', net(), {})
    with pytest.raises(WeightsError, match='dtype is None'):
        save_weights(tmp_path / 'x.safetensors', net(), {}, dtype=torch.int8)
    assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_no_half(path, monkeypatch):
    "Disk full in the middle of overwriting: the old weights are whole, but unsealed, so nothing is loaded in silence"
    old = path.read_bytes()
    class Full:
        def __init__(self, p): pass
        def __enter__(self): raise OSError(28, 'No space left on device')
        def __exit__(self, *a): return False
    monkeypatch.setattr(hub, 'atomic', Full)
    with pytest.raises(OSError, match='No space left'): save_weights(path, net(9), {})
    assert path.read_bytes() == old and len(list(path.parent.iterdir())) == 1
    with pytest.raises(WeightsError, match='checksum .* is missing'): load_weights(path)


def test_views_and_tied_weights(tmp_path):
    w = torch.randn(6, 4)
    state = {'a': w.t(), 'b': w[::2], 'c': w, 'd': w,
             'e': torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)}
    got, _ = load_weights(save_weights(tmp_path / 'v.safetensors', state, {}))
    assert all(torch.equal(got[k], v) for k, v in state.items())


def test_load_into_names_the_first_that_does_not_fit(path):
    state, _ = load_weights(path)
    cases = {r"0\.weight is \(8, 4\) in the file, the model wants \(16, 4\) \(and 6 more\)": (net(16), state),
             r'2\.bias is missing, the model wants \(4,\)': (net(), {k: v for k, v in state.items() if k != '2.bias'}),
             r'extra \(1,\) has no place in the model': (net(), {**state, 'extra': torch.ones(1)})}
    for message, (module, s) in cases.items():
        before = [p.clone() for p in module.parameters()]
        with pytest.raises(WeightsError, match=f'w.safetensors: does not fit Sequential: {message}; expected') as e:
            load_into(module, s, path)
        assert '\n' not in str(e.value) and all(torch.equal(a, b) for a, b in zip(before, module.parameters()))


def test_from_checkpoint(path):
    module = from_checkpoint(path, lambda meta: net(meta['width']))
    x = torch.randn(3, 4)
    assert not module.training and torch.equal(module(x), net().eval()(x))
    with pytest.raises(WeightsError, match='do not describe this kind of model.*heads'):
        from_checkpoint(path, lambda meta: net(meta['heads']))


def test_fetch_offline_is_one_line(tmp_path):
    code = '''
from toksr.core.weights import fetch_pretrained, WeightsError
try: fetch_pretrained('turkeyju/tokenizer_tatitok_bl32_vae')
except WeightsError as e: print(e)'''
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True,
                         env={**os.environ, 'HF_HUB_OFFLINE': '1', 'HF_HOME': str(tmp_path)})
    assert out.stdout.count('\n') == 1 and 'could not be fetched' in out.stdout and 'HF_HOME' in out.stdout, out.stderr


def test_fetch_verifies_and_seals(tmp_path, monkeypatch):
    "A cache as the hub's client makes it: blobs named by sha256, a link with the file's name"
    import huggingface_hub
    src = tmp_path / 'x.safetensors'
    save_file({'w': torch.ones(2)}, src)
    blob = tmp_path / hashlib.sha256(src.read_bytes()).hexdigest()
    src.rename(blob)
    link = tmp_path / 'model.safetensors'
    link.symlink_to(blob)
    monkeypatch.setattr(huggingface_hub, 'hf_hub_download', lambda repo, file, **k: str(link))
    path = fetch_pretrained('turkeyju/tokenizer_tatitok_bl32_vae')
    assert torch.equal(load_weights(path)[0]['w'], torch.ones(2))
    blob.write_bytes(blob.read_bytes()[:-1] + b'x')
    seal_path(link).unlink()
    with pytest.raises(WeightsError, match='truncated or altered'):
        fetch_pretrained('turkeyju/tokenizer_tatitok_bl32_vae')
    assert not seal_path(link).exists()
    with pytest.raises(WeightsError, match='not in the table'): fetch_pretrained('a/b')
    with pytest.raises(WeightsError, match='expected one of config.json, model.safetensors'):
        fetch_pretrained('turkeyju/tokenizer_tatitok_bl32_vae', 'pytorch_model.bin')


def test_no_code_runs_from_files():
    "No unpickling anywhere in the package, but for one hash-checked file"
    import ast
    import toksr
    from pathlib import Path
    found = []
    for f in sorted(Path(toksr.__file__).parent.rglob('*.py')):
        for node in ast.walk(ast.parse(f.read_text())):
            text = ast.unparse(node) if isinstance(node, (ast.Call, ast.Import, ast.ImportFrom)) else ''
            if isinstance(node, (ast.Import, ast.ImportFrom)) and any(w in text.replace(',', ' ').split()
                    for w in ('pickle', 'joblib', 'dill', 'cloudpickle')):
                found.append((f.name, text))
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ('torch.load', 'eval', 'exec', 'yaml.load',
                    'yaml.unsafe_load', 'pickle.load', 'pickle.loads'):
                found.append((f.name, text))
            if isinstance(node, ast.Call) and any(k.arg == 'allow_pickle' and ast.unparse(k.value) != 'False'
                                                  for k in node.keywords):
                found.append((f.name, text))
    # one packaged file has no other format: hash-checked first, then read without running anything
    assert [f for f, text in found if not (f == 'lite0.py' and 'weights_only=True' in text)] == [] and len(found) <= 1
