"""Pages that were made before are used again, and never for a notebook that has changed."""
import json

import pytest

import toksr.pipeline.site
from toksr.pipeline.site import build, notebook_page, notebook_pages


def notebook(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(dict(cells=[dict(cell_type='markdown', id='a', metadata={}, source=f'# {text}')],
                                    metadata={}, nbformat=4, nbformat_minor=5)))
    return path


@pytest.fixture
def rendered(monkeypatch):
    names = []
    def count(path):
        names.append(path.stem)
        return notebook_page(path)
    monkeypatch.setattr(toksr.pipeline.site, 'notebook_page', count)
    return names


def test_only_what_changed_is_rendered(tmp_path, rendered):
    a, b, cache = notebook(tmp_path/'a.ipynb', 'One'), notebook(tmp_path/'b.ipynb', 'Two'), tmp_path/'cache'
    fresh = [notebook_page(p) for p in (a, b)]
    assert notebook_pages([a, b], cache) == fresh and rendered == ['a', 'b']
    assert notebook_pages([a, b], cache) == fresh and rendered == ['a', 'b']
    notebook(b, 'Three')
    assert [p.title for p in notebook_pages([a, b], cache)] == ['One', 'Three'] and rendered == ['a', 'b', 'b']
    assert len(list(cache.glob('*.json'))) == 2                     # the old page of b is gone


def test_a_copy_under_another_name_is_another_page(tmp_path, rendered):
    a, c = notebook(tmp_path/'a.ipynb', 'One'), notebook(tmp_path/'c-small.ipynb', 'One')
    assert [p.title for p in notebook_pages([a, c], tmp_path/'cache')] == ['One', 'One · small']


@pytest.mark.parametrize('damage', ['', '{', '{"name": "a"}', '[]'])
def test_a_damaged_page_is_made_again(tmp_path, damage):
    a, cache = notebook(tmp_path/'a.ipynb', 'One'), tmp_path/'cache'
    whole = notebook_pages([a], cache)
    for f in cache.glob('*.json'): f.write_text(damage)
    assert notebook_pages([a], cache) == whole


def test_a_site_from_the_cache_has_the_same_bytes(tmp_path):
    for n in 'ab': notebook(tmp_path/f'reports/notebooks/{n}.ipynb', n)
    outs = [tmp_path/f'out{i}' for i in range(3)]
    for out, cache in zip(outs, (None, tmp_path/'cache', tmp_path/'cache')):
        build(tmp_path/'reports/notebooks', out, cache=cache)
    read = lambda out: {p.name: p.read_bytes() for p in out.iterdir()}
    assert read(outs[0]) == read(outs[1]) == read(outs[2])


def test_no_notebook_is_an_error(tmp_path):
    bad = tmp_path/'bad.ipynb'
    bad.write_text('{')
    with pytest.raises(ValueError, match='not a notebook'): notebook_pages([bad], tmp_path/'cache')
    assert not list((tmp_path/'cache').glob('*.json'))
