"Notebooks are the source: the exported package and the notebooks' form are checked, nothing is changed."
import filecmp
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted(p for p in (ROOT/'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts)


def _bin(name): return str(Path(sys.executable).with_name(name))


@pytest.fixture(scope='module')
def fresh(tmp_path_factory):
    "A copy of the notebooks, exported from nothing and cleaned"
    d = tmp_path_factory.mktemp('sync')/'toksr'
    (d/'toksr').mkdir(parents=True)
    shutil.copy(ROOT/'pyproject.toml', d)
    shutil.copytree(ROOT/'nbs', d/'nbs', ignore=shutil.ignore_patterns('.ipynb_checkpoints'))
    (d/'toksr/__init__.py').write_text((ROOT/'toksr/__init__.py').read_text())
    # nobody's own nbdev settings
    env = {k: v for k, v in os.environ.items() if k != 'IN_TEST'} | {'XDG_CONFIG_HOME': str(d/'xdg')}
    for command in 'nbdev-export', 'nbdev-clean': subprocess.run([_bin(command)], cwd=d, env=env, check=True)
    return d


def _modules(d): return {str(p.relative_to(d)) for p in (d/'toksr').rglob('*.py')}


def test_package_is_exported(fresh):
    assert _modules(ROOT) == _modules(fresh), 'a module without a notebook, or a notebook not exported: run make sync'
    bad = [p for p in sorted(_modules(ROOT)) if not filecmp.cmp(ROOT/p, fresh/p, shallow=False)]
    assert not bad, f'run make sync: {bad}'


def test_notebooks_are_clean(fresh):
    bad = [str(p.relative_to(ROOT)) for p in NOTEBOOKS if p.read_bytes() != (fresh/p.relative_to(ROOT)).read_bytes()]
    assert not bad, f'run make sync: {bad}'


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)
def test_sources_have_no_outputs_and_proper_ends(path):
    nb = json.loads(path.read_text(encoding='utf-8'))
    assert not any(c.get('outputs') or c.get('execution_count')
                   for c in nb['cells']), f'{path}: outputs belong in reports/; run make sync'
    assert nb['cells'][0]['cell_type'] == 'markdown' and ''.join(nb['cells'][0]['source']).startswith('# '), f'{path}: the first cell is the title'
    assert all(''.join(c['source']).strip() for c in nb['cells']), f'{path}: an empty cell'


def test_the_index_lists_every_notebook():
    "Each chapter and each study once, under its own title"
    index = ROOT/'nbs/index.ipynb'
    text = '\n'.join(''.join(c['source']) for c in json.loads(index.read_text(encoding='utf-8'))['cells'])
    listed = re.findall(r'^\* \[(.+)\]\((\w+/\w+\.ipynb)\)', text, re.M)
    assert sorted(path for _, path in listed) == sorted(str(p.relative_to(ROOT/'nbs')) for p in NOTEBOOKS if p != index)
    for title, path in listed:
        own = ''.join(json.loads((ROOT/'nbs'/path).read_text(encoding='utf-8'))['cells'][0]['source']).splitlines()[0].removeprefix('# ')
        assert title == own, f'nbs/index.ipynb: {path} is called {own!r}'


def test_saving_in_jupyterlab_cleans(monkeypatch):
    "The hook that `make lab` installs gives back the committed bytes after a notebook was run and saved"
    monkeypatch.chdir(ROOT)
    code = compile((ROOT/'.jupyter/jupyter_server_config.py').read_text(), 'config', 'exec')
    class Manager: pass
    class c: FileContentsManager = Manager
    exec(code, dict(c=c))
    nb = json.loads(NOTEBOOKS[0].read_text())
    for cell in nb['cells']:
        cell['source'] = ''.join(cell['source'])
        cell['metadata'] |= dict(trusted=True, execution={'t': 1})
        if cell['cell_type'] == 'code':
            cell.update(execution_count=3, outputs=[dict(output_type='stream', name='stdout', text='x')])
    model = dict(type='notebook', content=nb)
    Manager.pre_save_hook(path=str(NOTEBOOKS[0].relative_to(ROOT)), model=model)
    want = json.loads(NOTEBOOKS[0].read_text())
    for cell in want['cells']: cell['source'] = ''.join(cell['source'])
    assert model['content']['cells'] == want['cells']
