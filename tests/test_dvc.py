"""dvc.yaml says what the notebooks do, parameters arrive in them, and the committed results are those of the
committed sources."""
import ast
import hashlib
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import papermill as pm
import pytest
import yaml
from papermill.parameterize import parameterize_notebook

from toksr.pipeline import params
from toksr.pipeline.behaviour import Behaviour
from toksr.pipeline.fingerprints import fingerprints
from toksr.pipeline.probes import read_probes

ROOT = Path(__file__).resolve().parents[1]
STUDIES = sorted((ROOT/'nbs/study').glob('*.ipynb'))


def _stages(root):
    from dvc.repo import Repo
    if not (root/'dvc.yaml').is_file(): return []
    with Repo(str(root)) as repo: return [s for s in repo.index.stages if s.cmd]


STAGES = _stages(ROOT)
RUNS = [s for s in STAGES if s.cmd.startswith('toksr-run')]


def _call(stage):
    "What a `toksr-run` stage says: notebook, out, sections, key=value words"
    words = shlex.split(stage.cmd)[1:]
    sections = [words[i+1] for i, w in enumerate(words) if w == '--section']
    rest = [w for i, w in enumerate(words) if w != '--section' and (i == 0 or words[i-1] != '--section')]
    return rest[0], rest[1], sections, rest[2:]


# -- the sentinel: what is given to a notebook is what it runs with
# -------------------------------------------------------------------------


def _sentinel(p):
    "A value of the declared type and range that is not the default"
    if c := re.search(r'\{([^{}]*\|[^{}]*)\}\s*$', p.help):
        return next(v for s in c[1].split('|') if (v := params._typed(p.type, _number(s.strip(), p.type))) != p.default)
    if p.type.startswith('list['):
        one = params.Param(p.notebook, p.name, p.type[5:-1], None, p.help)
        found = [_sentinel(one)]
        return found if found != p.default else found*2
    tries = {'int': [7919, 3, 2, 1, 0, 5, 16, 64], 'float': [.123, .5, .9, 2.5, 1e-4, 42.5], 'bool': [not p.default],
             'str': ['sentinel-7919']}[p.type]
    if r := params._RANGE.search(p.help):
        lo, hi = float(r[2]), float(r[3])
        tries += [int(x) if p.type == 'int' else x for x in ((lo+hi)/2, lo, hi, (3*lo+hi)/4) if abs(x) < float('inf')]
    for x in tries:
        try: v = params.check(p, x)
        except ValueError: continue
        if v != p.default: return v
    raise AssertionError(f'{p.notebook}: no second value fits {p.name} ({p.expected}): then it is no parameter')


def _number(s, kind): return yaml.safe_load(s) if kind != 'str' else s


def sentinel_check(notebook):
    "Parameterize as the runner does, run the assignments of the cells up to the injected one in order, and compare"
    declared = params.declared(notebook)
    values = {k: _sentinel(p) for k, p in declared.items()}
    nb = parameterize_notebook(pm.iorw.load_notebook_node(str(notebook)), values)
    tags = [c.metadata.get('tags', []) for c in nb.cells]
    at, injected = ([i for i, t in enumerate(tags) if name in t] for name in ('parameters', 'injected-parameters'))
    assert len(at) == len(injected) == 1 and injected[0] == at[0]+1, f'{notebook}: values would not come right after the defaults'
    got = {}
    for i in (at[0], injected[0]):
        for n in ast.parse(nb.cells[i].source).body:
            got[(n.target if isinstance(n, ast.AnnAssign) else n.targets[0]).id] = ast.literal_eval(n.value)
    assert got == values
    later = [t.id for c in nb.cells[injected[0]+1:] if c.cell_type == 'code'
             for n in ast.parse(re.sub(r'(?m)^\s*[%!].*$', '', c.source)).body
             for t in (n.targets if isinstance(n, ast.Assign) else [n.target]
                       if isinstance(n, (ast.AnnAssign, ast.AugAssign)) else []) if isinstance(t, ast.Name)]
    assert not set(later) & set(values), f'{notebook}: a later cell overwrites {set(later) & set(values)}'
    used = {n.id for c in nb.cells[injected[0]+1:] if c.cell_type == 'code'
            for n in ast.walk(ast.parse(re.sub(r'(?m)^\s*[%!].*$', '', c.source))) if isinstance(n, ast.Name)}
    assert 'globals' in used or set(values) <= used, f'{notebook}: declared and never used: {set(values)-used}'


@pytest.mark.parametrize('notebook', STUDIES, ids=lambda p: p.stem)
def test_a_sentinel_passes_through(notebook):
    sentinel_check(notebook)


def _toy(path, tags=('parameters',), body='print(steps, text)', clean=()):
    cells = [dict(cell_type='code', id='p', metadata=dict(tags=list(tags)),
                  source="steps: int = 200  # [1, 9999]\ntext: str = 'both'  # {none|both}", outputs=[],
                  execution_count=None),
             dict(cell_type='code', id='q', metadata={}, source=body, outputs=[], execution_count=None)]
    path.write_text(json.dumps(dict(cells=cells,
                                    metadata=dict(kernelspec=dict(name='python3', display_name='python3',
                                                                  language='python')), nbformat=4, nbformat_minor=5)))
    return path


def test_the_sentinel_finds_what_it_is_for(tmp_path):
    """The check passes a good notebook, also after nbdev-clean with this project's settings; and fails one whose
    tag was stripped, or that sets a parameter again"""
    (tmp_path/'pyproject.toml').write_text((ROOT/'pyproject.toml').read_text())
    good = _toy(tmp_path/'good.ipynb')
    sentinel_check(good)
    subprocess.run([Path(sys.executable).with_name('nbdev-clean'), '--fname', good.name], cwd=tmp_path, check=True)
    sentinel_check(good)
    with pytest.raises(ValueError, match='tagged'): sentinel_check(_toy(tmp_path/'a.ipynb', tags=()))
    with pytest.raises(AssertionError, match='overwrites'):
        sentinel_check(_toy(tmp_path/'b.ipynb', body='steps = 3\nprint(steps, text)'))
    with pytest.raises(AssertionError, match='never used'):
        sentinel_check(_toy(tmp_path/'c.ipynb', body='print(steps)'))
    bare = (tmp_path/'pyproject.toml').read_text()
    (tmp_path/'pyproject.toml').write_text(re.sub(r'(?m)^allowed_cell_metadata_keys.*$', '', bare))
    subprocess.run([Path(sys.executable).with_name('nbdev-clean'), '--fname', good.name], cwd=tmp_path, check=True)
    with pytest.raises(ValueError, match='tagged'): sentinel_check(good)      # so the setting is what protects us


# -- dvc.yaml against the notebooks
# ---------------------------------------------------------------------------------------------------------


def test_every_study_has_a_stage():
    assert {_call(s)[0] for s in RUNS} == {str(p.relative_to(ROOT)) for p in STUDIES}


def test_code_stage_writes_what_every_study_depends_on():
    assert {p.stem for p in (ROOT/'build/code').iterdir()} == {p.stem for p in STUDIES}
    assert {p.stem for p in (ROOT/'build/probes').iterdir()} == {p.stem for p in STUDIES if p.stem.startswith('train_')}


def test_lock_has_no_dead_stages():
    lock = ROOT/'dvc.lock'
    assert set(yaml.safe_load(lock.read_text())['stages'] if lock.exists() else []) == {s.name for s in STAGES}


@pytest.mark.parametrize('stage', RUNS, ids=lambda s: s.addressing)
def test_a_stage_declares_what_it_names(stage):
    notebook, out, sections, words = _call(stage)
    deps, outs = {d.def_path for d in stage.deps}, {o.def_path for o in stage.outs}
    assert f'build/code/{Path(notebook).stem}.txt' in deps and out in outs and (ROOT/notebook).is_file()
    for value in (w.split('=', 1)[1] for w in words):
        if '/' not in value or value.endswith('.timing.json'): continue  # timings are no results: they differ each time
        near = [k for k in deps | outs if k == value or k.startswith(value+'/') or value.startswith(k+'/')]
        assert near, f'{value} is neither a dependency nor an output of {stage.addressing}'
    assert all(not o.use_cache for o in stage.outs
               if o.def_path.startswith(('reports/', 'models/'))), 'reports and models are in git: cache: false'


@pytest.mark.parametrize('profile', ['smoke', 'laptop', 'workstation', 'paper'])
@pytest.mark.parametrize('stage', RUNS, ids=lambda s: s.addressing)
def test_parameters_are_declared_and_in_range(stage, profile):
    "The runner would accept every stage in every profile; `params:` of a stage are the sections it is given"
    notebook, _, sections, words = _call(stage)
    params.gather(ROOT/notebook, sections, words, ROOT/f'profiles/{profile}.yaml')
    assert set(sections) == {k for d in stage.deps for k in getattr(d, 'params', [])}


@pytest.mark.parametrize('notebook', STUDIES, ids=lambda p: p.stem)
def test_every_parameter_says_what_it_is(notebook):
    found = params.declared(notebook)
    assert found and not [k for k, p in found.items() if not p.help], 'a comment for each parameter'
    loose = [k for k, p in found.items() if p.type in ('int', 'float') and p.expected == p.type]
    assert not loose, f'{notebook.name}: a range at the end of the comment, as [0, 1], for {loose}'


# -- results
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
#
# ----------------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def prints(): return fingerprints(ROOT)


@pytest.fixture(scope='module')
def probes(): return read_probes(ROOT)


@pytest.mark.parametrize('notebook', STUDIES, ids=lambda p: p.stem)
def test_fingerprint_is_current(notebook, prints, probes):
    "Analyses: the code is the noted one. Training: the behaviour was looked at with this code, and is the noted one"
    study, noted = notebook.stem, (ROOT/'build/code'/f'{notebook.stem}.txt').read_text()
    if study not in probes: assert noted == prints[study], 'run `dvc repro`'
    else:
        known = Behaviour.read(ROOT/f'build/probes/{study}.json')
        assert known.code == hashlib.sha256(prints[study].encode()).hexdigest()[:16], 'run `dvc repro`'
        assert noted.split()[0] == known.name and {n: r['values'] for n, r in known.runs.items()} == {n: p.values for n, p in probes[study].items()}


def test_results_are_current():
    "No stage would run again, data aside"
    if not RUNS: pytest.skip('no stages yet')
    out = subprocess.run([sys.executable, '-m', 'dvc', 'repro', '--dry', '--allow-missing'], cwd=ROOT, capture_output=True, text=True)
    stale = re.findall(r"Running stage '([^']+)'", out.stdout)
    assert out.returncode == 0 and not stale, f'run `dvc repro`; stale: {stale}\n{out.stderr}'


def test_data_is_an_unfrozen_import():
    data = yaml.safe_load((ROOT/'data.dvc').read_text())
    assert not data.get('frozen') and data['deps'][0]['path'] == '/usr/share/tuxpaint/stamps' and data['outs'][0]['path'] == 'data'
    ignored = (ROOT/'.dvcignore').read_text().split()
    assert {'*.ogg', '*.wav', '*.dat'} <= set(ignored)
    assert data['outs'][0]['nfiles'] == 1996, 'the files of tuxpaint-stamps-default 2022.06.04-1 without sounds'
