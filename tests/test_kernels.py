"""Kernels that are forks of a process with torch in it: the same bytes as from a process of their own, and no
kernel outlives its runner."""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from nbformat import v4

ENV = os.environ | dict(SHELL='/bin/sh', DVC_NO_ANALYTICS='1',
                        PATH=f'{Path(sys.executable).parent}{os.pathsep}{os.environ["PATH"]}')
SOURCE = '''import os, random, torch
from pathlib import Path
Path('parent').write_text(Path(f'/proc/{os.getppid()}/cmdline').read_text())
Path('pid').write_text(str(os.getpid()))
print(sorted({'b', 'a', 'c'}), hash('a') % 1000, torch.get_num_threads(), torch.randn(2, generator=torch.Generator().manual_seed(0)).tolist(), os.getcwd() == str(Path.cwd()))'''

FIGURES = {'b': "torch.ones(2)",
           'c': "import matplotlib.pyplot as plt\nfig, ax = plt.subplots(); ax.plot([1, 3, 2]); plt.show()",
           'd': "from toksr.core.plot import style\nstyle()\nfig, ax = plt.subplots(); ax.plot([1, 2]); fig",
           # tensors, figures and tables as studies show them
           'e': "import pandas as pd\npd.DataFrame({f'a column with a long name {i}': [1.5, 2] for i in range(30)})"}


@pytest.fixture
def toy(tmp_path):
    nb = v4.new_notebook(cells=[v4.new_code_cell('n: int = 3  # how many [1, 9]', id='p',
                                                 metadata=dict(tags=['parameters'])), v4.new_code_cell(SOURCE, id='a'),
                                                 *(v4.new_code_cell(s, id=i) for i, s in FIGURES.items())],
                         metadata=dict(kernelspec=dict(name='python3', display_name='python3', language='python')))
    (tmp_path/'toy.ipynb').write_text(json.dumps(nb))
    (tmp_path/'params.yaml').write_text('profile: smoke\npin_isa: true\nthreads: 1\njobs: 1\n')
    (tmp_path/'dvc.yaml').write_text('stages:\n  toy: {cmd: toksr-run toy.ipynb out.ipynb, deps: [toy.ipynb], outs: '
                                     '[out.ipynb: {cache: false}]}\n')
    subprocess.run([sys.executable, '-m', 'dvc', 'init', '-q', '--no-scm'], cwd=tmp_path, check=True, env=ENV)
    return tmp_path


def test_a_fork_gives_the_bytes_of_a_process_of_its_own(toy):
    subprocess.run(['toksr-repro'], cwd=toy, check=True, env=ENV, capture_output=True)
    forked = (toy/'out.ipynb').read_bytes()
    assert 'toksr.pipeline.kernels' in (toy/'parent').read_text(), 'the kernel is no fork'
    subprocess.run(['dvc', 'repro', '-q', '--force'], cwd=toy, check=True, env=ENV, capture_output=True)
    assert 'toksr.pipeline.kernels' not in (toy/'parent').read_text()
    assert (toy/'out.ipynb').read_bytes() == forked
    shown = [o['data'] for c in json.loads(forked)['cells'] for o in c.get('outputs', []) if 'data' in o]
    assert sum('image/png' in d for d in shown) == 2 and any('text/html' in d for d in shown)


def test_a_notebook_that_fails_fails_the_stage(toy):
    nb = json.loads((toy/'toy.ipynb').read_text())
    nb['cells'][1]['source'] += '\nraise OSError("disk is full")'
    (toy/'toy.ipynb').write_text(json.dumps(nb))
    p = subprocess.run(['toksr-repro'], cwd=toy, env=ENV, capture_output=True, text=True)
    assert p.returncode and 'disk is full' in p.stdout + p.stderr and not (toy/'out.ipynb').exists()


def test_a_kernel_that_dies_fails_the_stage_and_a_killed_runner_takes_its_kernel_along(toy):
    nb = json.loads((toy/'toy.ipynb').read_text())
    nb['cells'][1]['source'] += '\nos.kill(os.getpid(), 9)'
    (toy/'toy.ipynb').write_text(json.dumps(nb))
    p = subprocess.run(['toksr-repro'], cwd=toy, env=ENV, capture_output=True, text=True, timeout=120)
    assert p.returncode and not (toy/'out.ipynb').exists(), p.stdout + p.stderr
    nb['cells'][1]['source'] = nb['cells'][1]['source'].replace('os.kill(os.getpid(), 9)',
                                                                'import time; time.sleep(600)')
    (toy/'toy.ipynb').write_text(json.dumps(nb))
    (toy/'pid').unlink()
    run = subprocess.Popen(['toksr-repro'], cwd=toy, env=ENV, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                           start_new_session=True)
    until = time.monotonic() + 90
    while not ((toy/'pid').exists() and (toy/'pid').read_text()) and time.monotonic() < until: time.sleep(.2)
    pid = int((toy/'pid').read_text())
    run.send_signal(signal.SIGTERM)
    assert run.wait(60)
    until = time.monotonic() + 15
    while Path(f'/proc/{pid}').exists() and time.monotonic() < until: time.sleep(.2)
    assert not Path(f'/proc/{pid}').exists(), 'the kernel is still there'
