"A result is written whole or not at all: killed at any byte, out of space, two writers at once."
import json
import multiprocessing as mp
import os
import resource
import signal

import numpy as np
import pandas as pd
import pytest

from toksr.core.record import (
    atomic, git_revision, provenance, save_result, save_timing, sha256_file, write_csv, write_json, write_text,
)

OLD, NEW = 'old '*50, 'new! '*2000      # 10,000 bytes, more than one write


def _child(fn):
    "Run `fn` in a child; give back its exit status"
    pid = os.fork()
    if pid == 0:
        try: fn()
        finally: os._exit(0)
    return os.waitpid(pid, 0)[1]


@pytest.mark.parametrize('offset', [0, 1, 100, 4095, 4096, 4097, 8192, 9999])
def test_killed_at_a_byte_the_old_file_stays(tmp_path, offset):
    f = tmp_path/'r.json'
    f.write_text(OLD)
    def write():
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)             # the kernel kills the process at this byte
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (offset, offset))
        write_text(f, NEW)
    assert os.WTERMSIG(_child(write)) == signal.SIGXFSZ
    assert f.read_text() == OLD
    write_text(f, NEW)
    assert f.read_text() == NEW and os.listdir(tmp_path) == ['r.json'], 'the dead writer left something'


@pytest.mark.parametrize('when', ['fsync', 'replace'])
def test_killed_before_the_rename_the_old_file_stays(tmp_path, when, monkeypatch):
    f = tmp_path/'r.csv'
    f.write_text(OLD)
    monkeypatch.setattr(os, when, lambda *a: os.kill(os.getpid(), signal.SIGKILL))
    assert os.WTERMSIG(_child(lambda: write_text(f, NEW))) == signal.SIGKILL
    assert f.read_text() == OLD


def test_disk_full_is_an_error_and_leaves_nothing(tmp_path):
    f = tmp_path/'r.json'
    f.write_text(OLD)
    def write():
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))     # Python ignores SIGXFSZ: the write fails instead
        try: write_text(f, NEW)
        except OSError: os._exit(7)
    assert os.WEXITSTATUS(_child(write)) == 7
    assert f.read_text() == OLD and os.listdir(tmp_path) == ['r.json']


def _write_many(f, letter):
    for _ in range(50): write_text(f, letter*5000)


def test_two_writers_never_mix(tmp_path):
    f = tmp_path/'cache.txt'
    ps = [mp.get_context('fork').Process(target=_write_many, args=(f, c)) for c in 'ab']
    for p in ps: p.start()
    while any(p.is_alive() for p in ps):
        if f.exists(): assert len(set(f.read_text())) == 1 and f.stat().st_size == 5000
    for p in ps:
        p.join()
        assert p.exitcode == 0
    assert os.listdir(tmp_path) == ['cache.txt']


def test_suffix_survives_for_numpy(tmp_path):
    with atomic(tmp_path/'z.npz') as part: np.savez(part, a=np.arange(3))
    assert os.listdir(tmp_path) == ['z.npz'] and np.load(tmp_path/'z.npz')['a'].tolist() == [0, 1, 2]


def test_a_block_that_writes_nothing_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        with atomic(tmp_path/'x'): pass
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize('bad', [float('nan'), float('inf'), np.float32('nan')])
def test_json_refuses_what_is_not_finite(tmp_path, bad):
    with pytest.raises(ValueError, match='r.json.*finite'): write_json(tmp_path/'r.json', dict(a=[1, bad]))
    assert not os.listdir(tmp_path)


def test_csv_is_rounded_and_keeps_integers(tmp_path):
    write_csv(tmp_path/'t.csv',
              pd.DataFrame(dict(i=[1, 2], x=[1.23456, np.nan], y=np.float32([1e-9, -1e-9]), s=['ä', 'b'])))
    assert (tmp_path/'t.csv').read_text() == 'i,x,y,s\n1,1.2346,0.0000,ä\n2,,0.0000,b\n'


def test_result_is_the_same_bytes_and_has_provenance(tmp_path):
    for d in 'ab':
        save_result(tmp_path/d/'m.json', dict(psnr=26.123456, per=dict(x=np.float64(1)/3)),
                    dict(steps=3, seed=1), images=4)
    assert (tmp_path/'a/m.json').read_bytes() == (tmp_path/'b/m.json').read_bytes()
    assert json.loads((tmp_path/'a/m.json').read_text()) == dict(metrics=dict(psnr=26.1235, per=dict(x=.3333)),
                                                                 params=dict(steps=3, seed=1))
    p = json.loads((tmp_path/'a/m.provenance.json').read_text())
    assert set(p) == {'params', 'seeds', 'revision', 'data', 'versions', 'machine',
                      'images'} and p['seeds'] == {'seed': 1}
    assert {'python', 'torch', 'numpy'} <= set(p['versions']) and 'flags' in p['machine']
    save_timing(tmp_path/'a/m.json', train=1.23456)
    assert json.loads((tmp_path/'a/m.timing.json').read_text()) == {'train': 1.235}


def test_failed_result_leaves_the_old_one(tmp_path):
    save_result(tmp_path/'m.json', dict(psnr=1.), {})
    before = sha256_file(tmp_path/'m.json')
    with pytest.raises(ValueError): save_result(tmp_path/'m.json', dict(psnr=float('nan')), {})
    assert sha256_file(tmp_path/'m.json') == before


def test_revision_marks_changed_sources(tmp_path):
    import subprocess
    git = lambda *a: subprocess.run(['git', '-C', str(tmp_path), '-c', 'user.name=a', '-c', 'user.email=a@b', *a],
                                    check=True, capture_output=True)
    git('init', '-q')
    assert git_revision(tmp_path) is None
    (tmp_path/'params.yaml').write_text('a: 1')
    git('add', '.')
    git('commit', '-qm', 'x')
    clean = git_revision(tmp_path)
    (tmp_path/'README.md').write_text('not a source')
    assert len(clean) == 40 and git_revision(tmp_path) == clean
    (tmp_path/'params.yaml').write_text('a: 2')
    assert git_revision(tmp_path) == clean+'+'


def test_provenance_without_git(monkeypatch):
    monkeypatch.setenv('PATH', '')
    assert provenance({})['revision'] is None
