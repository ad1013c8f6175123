"Four profiles with the same keys; choosing one says what runs again."
import contextlib
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from toksr.pipeline import profiles as profile
from toksr.pipeline.params import read_profile

ROOT = Path(__file__).resolve().parents[1]


def test_profiles_have_the_same_keys_and_types():
    found = {n: yaml.safe_load((ROOT/f'profiles/{n}.yaml').read_text()) for n in profile.names(ROOT)}
    assert list(found) == ['smoke', 'laptop', 'workstation', 'paper']
    assert not profile.mismatches(found), '\n'.join(profile.mismatches(found))
    for n in found: assert read_profile(ROOT/f'profiles/{n}.yaml').profile == n
    assert read_profile(ROOT/'profiles/smoke.yaml').pin_isa and not read_profile(ROOT/'profiles/laptop.yaml').pin_isa


def test_committed_params_are_the_default_profile():
    assert (ROOT/'params.yaml').read_bytes() == (ROOT/'profiles/laptop.yaml').read_bytes(), 'commit params.yaml as `toksr-profile laptop` leaves it'


@pytest.fixture
def toy(tmp_path):
    (tmp_path/'profiles').mkdir()
    for n, steps in dict(smoke=3, laptop=200).items():
        (tmp_path/f'profiles/{n}.yaml').write_text(f'profile: {n}\ntrain: {{steps: {steps}}}\neval: {{n: 5}}\n')
    (tmp_path/'params.yaml').write_text((tmp_path/'profiles/laptop.yaml').read_text())
    (tmp_path/'dvc.yaml').write_text('''
stages:
  train: {cmd: "echo w > w.txt", params: [train], outs: [w.txt: {cache: false}]}
  eval: {cmd: "cat w.txt > e.txt", params: [eval], deps: [w.txt], outs: [e.txt: {cache: false}]}
  aside: {cmd: "echo a > a.txt", params: [eval], outs: [a.txt: {cache: false}]}
''')
    for words in ['init', '-q', '--no-scm'], ['repro', '-q']:
        subprocess.run([sys.executable, '-m', 'dvc', *words], cwd=tmp_path, check=True)
    return tmp_path


def _main(capsys, root, *words):
    with contextlib.chdir(root):
        try: profile.main(list(words))
        except SystemExit as e: return str(e)
    return capsys.readouterr().out


def test_what_runs_again(toy, capsys):
    assert 'would run nothing' in _main(capsys, toy)
    said = _main(capsys, toy, 'smoke')
    assert 'profile smoke' in said and 'would run 1 stages: train' in said and '1 more: eval' in said and 'aside' not in said
    (toy/'params.yaml').write_text('profile: smoke\ntrain: {steps: 4}\neval: {n: 5}\n')
    assert 'edited: train.steps: 4 (smoke: 3)' in _main(capsys, toy)


def test_wrong_names_change_nothing(toy, capsys):
    before = (toy/'params.yaml').read_bytes()
    for name in 'lptop', '', '../params', 'laptop.yaml':
        said = _main(capsys, toy, name) if name else 'there are: smoke, laptop'
        assert 'there are: smoke, laptop' in said
    (toy/'profiles/bad.yaml').write_text('profile: smoke\n')
    assert 'expected `profile: bad`' in _main(capsys, toy, 'bad')
    assert (toy/'params.yaml').read_bytes() == before
    (toy/'dvc.yaml').write_text('stages: [')
    assert 'toksr-profile: ' in _main(capsys, toy)
