"""`toksr-run` and what stands before it: nothing unexpected reaches a kernel, equal runs give equal bytes, a crash
leaves no result."""
import json
import os
import signal
import subprocess
import sys
import time

import pytest
from nbformat import v4

from toksr.pipeline import params
from toksr.pipeline.run import stabilise

PARAMETERS = '''steps: int = 200        # optimisation steps [1, 1000]
lr: float = 0.1         # learning rate (0, 1]
text: str = 'both'      # where the caption goes {none|decoder|both}
name: str = 'a'
ema: bool = True
factors: list[int] = [4]  # of upscaling [2, 8]'''
HOSTILE = {                                         # twelve, each with a word that its refusal has to hold
    '__import__=os': '__import__', 'os.system=echo': 'key=value', 'steps;import os=1': 'key=value',
    'ѕteps=5': 'no parameter',
    '=5': 'key=value', 'class=1': 'no parameter',
    'steps=!!python/object/apply:os.system ["echo x"]': 'int in [1, 1000]',
    'steps=99999999999999999999': 'int in [1, 1000]', 'lr=.nan': 'float in (0, 1]', 'lr=.inf': 'float in (0, 1]',
    'name=a\nimport os': 'str', 'text=both; import os': 'one of none, decoder, both',
}
WRONG = ['steps=0', 'steps=1001', 'steps=2.5', 'steps=true', 'steps=', 'steps=[1]', 'steps={a: 1}', 'steps=many',
         'lr=0', 'lr=1.01', 'lr=x', 'ema=1',
         'ema=maybe', 'text=Both', 'factors=4', 'factors=[4, 9]', 'factors=[4, x]', 'name='+'x'*1001, 'name=\x00']


def listen():
    "A job in the background of a shell ignores Ctrl-C, and its children inherit that"
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def notebook(path, source='', parameters=PARAMETERS):
    tagged = v4.new_code_cell(parameters, id='p', metadata=dict(tags=['parameters']))
    nb = v4.new_notebook(cells=[tagged,
                                *(v4.new_code_cell(s, id=f'c{i}') for i, s in enumerate(source.split('\n---\n')))],
                         metadata=dict(kernelspec=dict(name='python3', display_name='python3', language='python')))
    path.write_text(json.dumps(nb))
    return path


def run(cwd, *words, **kw):
    return subprocess.run([sys.executable, '-c', 'from toksr.pipeline.run import main; main()', *words], cwd=cwd,
                          capture_output=True, text=True, **kw)


@pytest.fixture
def toy(tmp_path):
    (tmp_path/'params.yaml').write_text('profile: smoke\npin_isa: true\ntoy: {steps: 5, lr: 1e-3, small: {steps: '
                                        '2}}\nbad: {steps: five}\n')
    notebook(tmp_path/'toy.ipynb')
    return tmp_path


@pytest.mark.parametrize('word', HOSTILE)
def test_hostile_words_are_refused(toy, word):
    with pytest.raises(ValueError) as e: params.gather(toy/'toy.ipynb', [], [word])
    assert HOSTILE[word] in str(e.value) and '\n' not in str(e.value)


@pytest.mark.parametrize('word', WRONG)
def test_wrong_values_name_notebook_parameter_type_and_value(toy, word):
    name, value = word.split('=', 1)
    with pytest.raises(ValueError, match=r'toy\.ipynb: parameter '+name+' has to be .*, not ') as e:
        params.gather(toy/'toy.ipynb', [], [word])
    assert (repr(value)[:50] in str(e.value)) and len(str(e.value)) < 400


@pytest.mark.parametrize('word,value',
                         [('steps=1', 1), ('steps=1000', 1000), ('lr=1', 1.), ('lr=1e-3', .001), ('lr=.5', .5),
                          ('ema=false', False),
                                        ('name=1e3', '1e3'), ('name=true', 'true'), ('name=', ''), ('name=a=b', 'a=b'),
                                        ('factors=[2, 8]', [2, 8]), ('name=é{x}', 'é{x}')])
def test_right_values_pass(toy, word, value):
    got = params.gather(toy/'toy.ipynb', [], [word])[word.split('=')[0]]
    assert got == value and type(got) is type(value)


def test_sections(toy):
    f = toy/'params.yaml'
    assert params.gather(toy/'toy.ipynb', ['toy'], [], f) == {'steps': 5, 'lr': .001}
    assert params.gather(toy/'toy.ipynb', ['toy', 'toy.small'], ['lr=1'], f) == {'steps': 2, 'lr': 1.}
    for bad, said in ('toyy', 'no section'), ('profile', 'no section'), ('bad', "not 'five'"), ('toy.x', 'no section'):
        with pytest.raises(ValueError, match=said): params.gather(toy/'toy.ipynb', [bad], [], f)


@pytest.mark.parametrize('text', ['a: [', '- 1\n- 2', 'x: !!python/name:os.system', '\x00'])
def test_broken_params_files(toy, text):
    (toy/'params.yaml').write_text(text)
    with pytest.raises(ValueError, match='params.yaml'): params.gather(toy/'toy.ipynb', ['toy'], [], toy/'params.yaml')


@pytest.mark.parametrize('source',
                         ['steps = 1', 'steps: int', 'steps: int = 1+1', 'def f(): pass', 'steps: int = "a"',
                          'steps: dict = {}', 'steps: int = 5  # [7, 9]', 'x: int = (', ''])
def test_malformed_declarations(tmp_path, source):
    nb = notebook(tmp_path/'n.ipynb', parameters=source)
    if not source: assert params.declared(nb) == {}
    else:
        with pytest.raises(ValueError, match='n.ipynb'): params.declared(nb)


@pytest.mark.parametrize('text', ['', '{}', '[]', '{"cells": [', 'not json', '\x00\x01'])
def test_not_a_notebook(tmp_path, text):
    (tmp_path/'n.ipynb').write_text(text)
    with pytest.raises(ValueError, match='n.ipynb'): params.declared(tmp_path/'n.ipynb')


def test_refused_before_a_kernel_starts(toy):
    start = time.monotonic()
    r = run(toy, 'toy.ipynb', 'out.ipynb', 'steps=0')
    assert r.returncode == 2 and r.stderr.count('\n') == 1 and 'int in [1, 1000]' in r.stderr and not r.stdout
    assert not (toy/'.work').exists() and not (toy/'out.ipynb').exists() and time.monotonic()-start < 30
    for words in (['nope.ipynb', 'o.ipynb'], ['toy.ipynb', 'o.txt'], ['toy.ipynb', 'o.ipynb', '--section', 'nope'],
                  ['toy.ipynb', 'o.ipynb', 'x=1']):
        r = run(toy, *words)
        assert r.returncode == 2 and r.stderr.count('\n') == 1 and 'Traceback' not in r.stderr, words


def test_two_runs_same_bytes_whatever_the_user_has(toy, tmp_path):
    """Environment, start-up files and time differ; the executed notebook does not. Progress is in the terminal and
    not in the notebook"""
    notebook(toy/'toy.ipynb', 'import sys, os, random\nprint(steps, text); sys.stdout.flush(); '
                              'print(hash("a"))\nprint("step 1", file=sys.stderr)\n---\nobject()\n---\n'
             'import matplotlib.pyplot as plt\n_ = plt.plot([1, 2])\n---\nos.environ["OMP_NUM_THREADS"], '
             'os.environ["ATEN_CPU_CAPABILITY"], os.environ["MKL_CBWR"]')
    home = tmp_path/'home'
    (home/'.ipython/profile_default/startup').mkdir(parents=True)
    (home/'.ipython/profile_default/startup/00.py').write_text('print("I am everywhere"); steps = 9')
    (home/'.config/matplotlib').mkdir(parents=True)
    (home/'.config/matplotlib/matplotlibrc').write_text('lines.linewidth: 30\n')
    a = run(toy, 'toy.ipynb', 'r/a.ipynb', '--section', 'toy')
    b = run(toy, 'toy.ipynb', 'r/b.ipynb', '--section', 'toy',
            env=os.environ | dict(HOME=str(home), OMP_NUM_THREADS='2', TZ='Asia/Tokyo', PYTHONHASHSEED='7'))
    assert a.returncode == b.returncode == 0, a.stderr+b.stderr
    assert (toy/'r/a.ipynb').read_bytes() == (toy/'r/b.ipynb').read_bytes()
    outputs = [o for c in json.loads((toy/'r/a.ipynb').read_text())['cells'] for o in c.get('outputs', [])]
    plain = json.dumps([o.get('text') or o['data']['text/plain'] for o in outputs])
    assert 'step 1' in a.stderr and 'step 1' not in plain and 'at 0x' not in plain and any('image/png' in o.get('data',
            {}) for o in outputs)
    assert str(toy) not in (toy/'r/a.ipynb').read_text() and "('1', 'avx2', 'COMPATIBLE')" in plain and not (toy/'.work/a.ipynb').exists()


def test_runners_side_by_side_do_not_meet(toy):
    notebook(toy/'toy.ipynb', 'print(steps)')
    command = [sys.executable, '-c', 'from toksr.pipeline.run import main; main()', 'toy.ipynb']
    ps = [subprocess.Popen([*command, f'o{i}.ipynb', f'steps={i+1}'], cwd=toy, stdout=subprocess.DEVNULL,
                           stderr=subprocess.PIPE, text=True) for i in range(4)]
    errors = [p.communicate(timeout=300)[1] for p in ps]
    assert [p.returncode for p in ps] == [0]*4, errors
    for i in range(4):
        assert json.loads((toy/f'o{i}.ipynb').read_text())['cells'][-1]['outputs'][0]['text'] == [f'{i+1}\n']
    assert not list(toy.glob('kernel-ipc*'))


def test_failure_leaves_no_result_and_keeps_the_old(toy):
    notebook(toy/'toy.ipynb', 'print("before")\n---\nassert steps < 100, "too many"\n---\nprint("after")')
    (toy/'out.ipynb').write_text('old')
    r = run(toy, 'toy.ipynb', 'out.ipynb')
    assert r.returncode == 1 and 'too many' in r.stderr and '.work/out.ipynb' in r.stderr
    assert (toy/'out.ipynb').read_text() == 'old' and 'too many' in (toy/'.work/out.ipynb').read_text()


@pytest.mark.parametrize('sig', [signal.SIGINT, signal.SIGKILL])
def test_killed_runner_leaves_no_result_and_no_kernel(toy, sig):
    notebook(toy/'toy.ipynb', 'import os, time\nopen("pid", "w").write(str(os.getpid()))\ntime.sleep(120)')
    p = subprocess.Popen([sys.executable, '-c', 'from toksr.pipeline.run import main; main()', 'toy.ipynb',
                          'out.ipynb'], cwd=toy, preexec_fn=listen, stdout=subprocess.PIPE,
                         stderr=subprocess.PIPE, text=True)
    for _ in range(600):
        if (toy/'pid').exists() and (toy/'pid').read_text(): break
        time.sleep(.1)
    kernel = int((toy/'pid').read_text())
    p.send_signal(sig)
    err = p.communicate(timeout=60)[1]
    assert p.returncode != 0 and not (toy/'out.ipynb').exists(), err
    for _ in range(150):
        if not _alive(kernel): break
        time.sleep(.1)
    assert not _alive(kernel), 'the kernel goes on'


def _alive(pid):
    try: return open(f'/proc/{pid}/stat').read().rsplit(')', 1)[1].split()[0] != 'Z'
    except OSError: return False


def test_stabilise_is_idempotent_and_drops_widgets():
    out = [v4.new_output('display_data',
                         data={'application/vnd.jupyter.widget-view+json': {'model_id': 'x1'}, 'text/plain': 'w'}),
           v4.new_output('display_data', data={'text/html': '<a at 0x7f>'}, metadata={'isolated': True})]
    nb = v4.new_notebook(cells=[v4.new_code_cell('x', id='a', outputs=out,
                                                 metadata=dict(tags=['t'], papermill=dict(duration=1.)))])
    once = json.dumps(stabilise(nb))
    assert json.dumps(stabilise(nb)) == once and 'model_id' not in once and '0x7f' not in once and 'duration' not in once
