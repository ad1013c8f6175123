"Fingerprints change when the code does, and only then."
import json

import pytest

from toksr.pipeline.fingerprints import fingerprint


def nb(path, *cells):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(dict(cells=[dict(cell_type=k, metadata={}, source=s) for k, s in cells])))


@pytest.fixture
def house(tmp_path):
    (tmp_path/'toksr').mkdir()
    for name, text in dict(a='from .b import two\ndef one():\n    "Docs"\n    return two', b='two = 2', c='def f():\n    from toksr.a import one\n    return one()', d='x = 1').items():
        (tmp_path/f'toksr/{name}.py').write_text(text)
    (tmp_path/'toksr/__init__.py').write_text('__version__ = "1"')
    nb(tmp_path/'nbs/study/s.ipynb', ('markdown', '# S'), ('code', '%matplotlib inline\nfrom toksr.c import f\nf()'))
    return tmp_path


def test_closure_is_transitive_relative_and_lazy(house):
    files = [line.split()[1] for line in fingerprint('nbs/study/s.ipynb', house).splitlines()]
    assert files == ['nbs/study/s.ipynb', 'toksr/a.py', 'toksr/b.py', 'toksr/c.py']


@pytest.mark.parametrize('file,text,changes', [
    ('b', 'two = 2   # the second\n\n', False), ('b', '"""Module docs"""\ntwo = (2)', False), ('b', 'two = 3', True), ('d', 'x = 2', False),
    ('a', 'from .b import two\ndef one():\n    """Other docs"""\n    return two', False), ('a', 'from .b import two\ndef one(): return two', False),
    ('a', 'from .b import two\ndef one():\n    return two, "Docs"', True), ('c', 'def f(): pass', True), ('a', 'from .d import x as two\ndef one(): return two', True)])
def test_what_counts(house, file, text, changes):
    before = fingerprint('nbs/study/s.ipynb', house)
    (house/f'toksr/{file}.py').write_text(text)
    assert (fingerprint('nbs/study/s.ipynb', house) != before) == changes


@pytest.mark.parametrize('cells,changes', [
    ([('markdown', '# Another title'), ('code', '%matplotlib inline\nfrom toksr.c import f\nf()')], False),
    ([('code', '%matplotlib inline'), ('code', 'from toksr.c import f  # cut in two'), ('code', 'f()')], False),
    ([('code', '%matplotlib inline\nfrom toksr.c import f\nf(2)')], True),
    ([('code', '%matplotlib widget\nfrom toksr.c import f\nf()')], True)])
def test_what_counts_in_the_notebook(house, cells, changes):
    before = fingerprint('nbs/study/s.ipynb', house)
    nb(house/'nbs/study/s.ipynb', *cells)
    assert (fingerprint('nbs/study/s.ipynb', house) != before) == changes


def test_gone_studies_and_broken_cells(house):
    nb(house/'nbs/study/t.ipynb', ('code', 'x = 1'))
    write_fingerprints(house)
    assert sorted(p.name for p in (house/'build/code').iterdir()) == ['s.txt', 't.txt']
    (house/'nbs/study/t.ipynb').unlink()
    write_fingerprints(house)
    assert [p.name for p in (house/'build/code').iterdir()] == ['s.txt']
    nb(house/'nbs/study/t.ipynb', ('code', 'x = ('))
    with pytest.raises(ValueError, match='t.ipynb'): write_fingerprints(house)
