"""The whole pipeline, small (profile smoke): every stage from nothing, then nothing, then again with the same bytes,
then the edits that may rerun nothing.

The second making of everything is cut to the stages that fit in a budget, quickest first, so that this file takes
minutes on two cores."""
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
# of stage time when kernels are forked, for a second making without: three times that; TOKSR_TWICE_SECONDS=inf makes
# all of it
BUDGET = float(os.environ.get('TOKSR_TWICE_SECONDS', 60))
LEFT_OUT = 'reports/', 'models/', 'build/code'     # build/probes stays: what training does is no result of a run
pytestmark = pytest.mark.skipif(not (ROOT/'dvc.yaml').exists(), reason='no dvc.yaml')


def _sources():
    "Files that git tracks or would track, results left out"
    listed = subprocess.run(['git', 'ls-files', '-co', '--exclude-standard'], cwd=ROOT, capture_output=True, text=True,
                            check=True).stdout.splitlines()
    return [f for f in listed if not f.startswith(LEFT_OUT) and f != 'dvc.lock' and (ROOT/f).is_file()]


class Copy:
    "A copy of the sources in a repository of its own, at profile smoke, without any result"
    def __init__(self, d):
        self.d = d
        self.env = os.environ | dict(PATH=f'{Path(sys.executable).parent}{os.pathsep}{os.environ["PATH"]}',
                                     PYTHONPATH=str(d), GIT_CEILING_DIRECTORIES=str(d.parent),
                                     SHELL='/bin/sh', DVC_NO_ANALYTICS='1')
        for f in _sources():
            (d/f).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT/f, d/f)
        shutil.copy(d/'profiles/smoke.yaml', d/'params.yaml')
        self.run('git', 'init', '-q')
        if stamps := os.environ.get('TOKSR_STAMPS'):
            self.run('dvc', 'import-url', '-q', '--force', stamps, 'data')
            self.run('dvc', 'unfreeze', '-q', 'data.dvc')
            self.env.pop('TOKSR_STAMPS')

    def run(self, *command):
        p = subprocess.run(command, cwd=self.d, env=self.env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                           text=True, timeout=3000)
        assert p.returncode == 0, f'{" ".join(command)}:\n{p.stdout[-6000:]}'
        return p.stdout

    def lock(self): return (self.d/'dvc.lock').read_bytes()

    def ran(self, *words):
        "Bring everything up to date; the stages that DVC ran"
        return set(re.findall(r"Running stage '([^']+)'", self.run('toksr-repro', *words)))


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    "The copy, after its first run from nothing"
    copy = Copy(tmp_path_factory.mktemp('pipeline')/'repo')
    start = time.monotonic()
    copy.first, copy.seconds = copy.ran('--jobs', '2'), time.monotonic()-start
    shutil.rmtree(copy.d/'.ckpt', ignore_errors=True)       # finished runs keep theirs: about a gigabyte
    return copy


def test_every_stage_runs_from_nothing(made):
    assert made.first == set(yaml.safe_load(made.lock())['stages'])
    print(f'{len(made.first)} stages in {made.seconds:.0f} s')


def test_then_nothing_runs(made):
    assert made.ran() == set()
    assert 'up to date' in made.run('dvc', 'status')


def test_results_have_provenance_and_no_trace_of_this_machine(made):
    executed = sorted((made.d/'reports/notebooks').glob('*.ipynb'))
    assert executed
    for p in [*executed, *(made.d/'reports').rglob('*.csv'), *(made.d/'reports').rglob('*.md')]:
        text = p.read_text(encoding='utf-8')
        assert str(made.d) not in text and str(ROOT) not in text, f'{p.name} holds a path of this machine'
    for p in (made.d/'reports/metrics').rglob('*.json'):
        if not p.name.endswith(('.provenance.json', '.timing.json')):
            assert p.with_suffix('.provenance.json').exists(), f'{p.name} has no provenance'
    assert not list(made.d.rglob('.part-*')) and not list((made.d/'.work').glob('*.ipynb')), 'something half-written is left'


def test_made_again_the_bytes_are_the_same(made):
    before, times = made.lock(), json.loads((made.d/'.work/stage-seconds.json').read_text())
    chosen, total = [], 0.
    for name in sorted(made.first, key=lambda s: times.get(s, 1.)):
        total += times.get(name, 1.)
        if total > BUDGET and chosen: break
        chosen.append(name)
    shutil.rmtree(made.d/'.ckpt', ignore_errors=True)       # nothing to resume from
    for name in chosen: made.run('dvc', 'repro', '--force', '--no-run-cache', '--single-item', name)
    after = made.lock()
    differ = [s for s, v in yaml.safe_load(before)['stages'].items() if yaml.safe_load(after)['stages'][s] != v]
    print(f'{len(chosen)} of {len(made.first)} stages made twice')
    assert not differ and after == before, f'other bytes from the same inputs: {differ}'


def _append(path, kind, text):
    "Add a line to the last cell of a kind"
    nb = json.loads(path.read_text())
    cell = next(c for c in reversed(nb['cells']) if c['cell_type'] == kind)
    cell['source'] = ''.join(cell['source'])+f'\n\n{text}'
    path.write_text(json.dumps(nb))


def test_comments_docstrings_and_prose_train_nothing(made):
    "An edit that changes no syntax tree reruns the fingerprint stage alone; so does prose, for stages that train"
    for f in sorted((made.d/'toksr').rglob('[a-z]*.py')): f.write_text(f.read_text()+'\n# a comment\n')
    ran = made.ran()
    assert ran <= {'code', 'site'} and 'code' in ran
    trained = sorted((made.d/'nbs/study').glob('*train*.ipynb'))
    for nb in trained:
        _append(nb, 'markdown', 'A sentence more.')
    if trained: assert made.ran() == {'code'}


def test_a_changed_number_in_one_study_reruns_that_study(made):
    "The last line of a study is changed: the stages that run are its own, and those that read from it"
    from toksr.pipeline.schedule import read_plan
    plan = read_plan(made.d)
    study = next((p for p in sorted((made.d/'nbs/study').glob('*ablation*.ipynb'))),
                 sorted((made.d/'nbs/study').glob('*.ipynb'))[0])
    _append(study, 'code', 'print(1+1)')
    ran = made.ran()
    own = {name for name, s in yaml.safe_load(made.lock())['stages'].items() if f'nbs/study/{study.name} ' in s['cmd']}
    assert own and own <= ran and ran <= own | plan.below(own) | {'code'}, (own, ran)
