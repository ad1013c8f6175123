"Fingerprints of analyses change when the code that they reach does, and only then."
import json

import pytest

from toksr.pipeline.fingerprints import fingerprint, fingerprints, write_if_new

A, B = 'from .b import two\ndef one():\n    "Docs"\n    return two\n', 'two = 2\nunused = 5\n'
C, D = 'def f():\n    from toksr.a import one\n    return one()\n', 'x = 1\ndef one(): return 7\n'


def nb(path, *cells):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(dict(cells=[dict(cell_type=k, metadata={}, source=s) for k, s in cells])))


@pytest.fixture
def house(tmp_path):
    (tmp_path/'toksr/sub').mkdir(parents=True)
    for name, text in dict(a=A, b=B, c=C, d=D).items(): (tmp_path/f'toksr/{name}.py').write_text(text)
    (tmp_path/'toksr/__init__.py').write_text('__version__ = "1"')
    (tmp_path/'toksr/sub/__init__.py').write_text('')
    nb(tmp_path/'nbs/study/s.ipynb', ('markdown', '# S'), ('code', '%matplotlib inline\nfrom toksr.c import f\nf()'))
    return tmp_path


def now(house): return fingerprint('nbs/study/s.ipynb', house)


def test_what_is_reached_is_transitive_relative_and_lazy(house):
    assert [line.split()[1] for line in now(house).splitlines()] == ['s.ipynb', 'f', 'one', 'two']


@pytest.mark.parametrize('file,text,changes', [
    ('b', 'two = 2   # the second\n\n', False), ('b', '"""Module docs"""\ntwo = (2)', False), ('b', 'two = 3', True),
    ('b', 'unused = 6\ntwo = 2', False), ('d', 'x = 2', False),
    ('a', 'from .b import two\ndef one():\n    """Other docs"""\n    return two', False),
    ('a', 'from .b import two\ndef one(): return two', False),
    ('a', 'from .b import two\ndef one():\n    return two, "Docs"', True), ('c', 'def f(): pass', True),
    ('a', 'from .d import x as two\ndef one(): return two', True),
    ('c', 'def f():\n    from toksr.d import one\n    return one()', True), ('c', f'{C}\ndef g(): return 1', False),
    ('a', 'two = 2\ndef one(): return two', False),
    ('a', 'import math\nfrom .b import two\ndef one(): return two', False),
    ('a', f'{A}\nimport torch\ntorch.set_num_threads(1)', True)])
def test_what_counts(house, file, text, changes):
    before = now(house)
    (house/f'toksr/{file}.py').write_text(text)
    assert (now(house) != before) == changes


def test_modules_may_be_renamed_and_definitions_moved(house):
    before = now(house)
    (house/'toksr/b.py').rename(house/'toksr/sub/second.py')
    (house/'toksr/a.py').write_text(A.replace('.b', '.sub.second'))
    assert now(house) == before
    (house/'toksr/d.py').write_text(A.replace('.b', '.sub.second'))
    (house/'toksr/a.py').write_text('from .d import one')
    assert now(house) == before


def test_two_functions_of_one_name_exchanged(house):
    (house/'toksr/c.py').write_text('from .a import one\nfrom .d import one as other\ndef f(): return one() + 2 '
                                    '* other()')
    before = now(house)
    (house/'toksr/c.py').write_text('from .d import one\nfrom .a import one as other\ndef f(): return one() + 2 '
                                    '* other()')
    assert now(house) != before


def test_what_comes_from_other_packages_counts(house):
    (house/'toksr/b.py').write_text('from math import pi as half\ntwo = half')
    before = now(house)
    (house/'toksr/b.py').write_text('from math import tau as half\ntwo = half')
    assert now(house) != before


def test_a_module_imported_as_a_whole_and_subclasses_that_are_noted(house):
    (house/'toksr/b.py').write_text('class Base:\n    kinds = {}\n    def __init_subclass__(cls): '
                                    'Base.kinds[cls.__name__] = cls\ntwo = Base.kinds')
    (house/'toksr/d.py').write_text('from .b import Base\nclass One(Base): pass\nother = 3')
    before = now(house)
    (house/'toksr/c.py').write_text('import toksr.d\n' + C)
    whole = now(house)
    assert 'One' in whole and 'other' in whole and 'One' not in before
    (house/'toksr/c.py').write_text('from .d import other\n' + C)
    part = now(house)
    assert 'One' in part and 'other' not in part


@pytest.mark.parametrize('cells,changes', [
    ([('markdown', '# Another title'), ('code', '%matplotlib inline\nfrom toksr.c import f\nf()')], False),
    ([('code', '%matplotlib inline'), ('code', 'from toksr.c import f  # cut in two'), ('code', 'f()')], False),
    ([('code', '%matplotlib inline\nfrom toksr.c import f\nf(2)')], True),
    ([('code', '%matplotlib widget\nfrom toksr.c import f\nf()')], True)])
def test_what_counts_in_the_notebook(house, cells, changes):
    before = now(house)
    nb(house/'nbs/study/s.ipynb', *cells)
    assert (now(house) != before) == changes


def test_all_studies_and_broken_cells(house):
    nb(house/'nbs/study/t.ipynb', ('code', 'x = 1'))
    assert sorted(fingerprints(house)) == ['s', 't']
    nb(house/'nbs/study/t.ipynb', ('code', 'x = ('))
    with pytest.raises(ValueError, match='t.ipynb'): fingerprints(house)


def test_a_file_that_is_current_is_left_alone(tmp_path):
    write_if_new(tmp_path/'a.txt', 'text')
    first = (tmp_path/'a.txt').stat().st_mtime_ns
    write_if_new(tmp_path/'a.txt', 'text')
    assert (tmp_path/'a.txt').stat().st_mtime_ns == first
    write_if_new(tmp_path/'a.txt', 'other')
    assert (tmp_path/'a.txt').read_text() == 'other'
