"The house: what may import what, what no module may do, and that every public name says what it is."
import ast
import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DESIGN = {                                       # the rooms that DESIGN §2 names, by floor
    0: {'paths', 'record', 'plot', 'stats'}, 1: {'data', 'degrade', 'text', 'vision'}, 2: {'bottleneck', 'blocks', 'losses', 'metrics'},
    3: {'tokenizer', 'grid', 'guide', 'semantic'}, 4: {'diffusion', 'dit'}, 5: {'sr', 'dual'}, 6: {'train', 'hub', 'baselines'}, 7: {'run', 'claims', 'cli'},
}
MODULES = sorted(p for p in (ROOT/'toksr').glob('*.py') if not p.stem.startswith('_'))
CHAPTERS = {re.search(r'nbs/lib/(\d\d)_\w+\.ipynb', p.read_text(encoding='utf-8'))[1]: p.stem for p in MODULES}
FLOOR = {m: min(int(number[0]), 7) for number, m in CHAPTERS.items()}     # chapter 24 is on floor 2; 90 to 99 are on the last one, 7
TREES = {p.stem: ast.parse(p.read_text(encoding='utf-8')) for p in MODULES}


def _imports(tree):
    "Modules of the package that a module of the package imports"
    for n in ast.walk(tree):
        if isinstance(n, ast.Import): yield from (a.name.split('.')[1] for a in n.names if a.name.startswith('toksr.'))
        elif isinstance(n, ast.ImportFrom):
            path = (['toksr'] if n.level else [])+(n.module or '').split('.')
            path = [p for p in path if p]
            if path and path[0] == 'toksr': yield from [path[1]] if len(path) > 1 else [a.name for a in n.names]


def test_rooms_are_on_their_floors():
    assert len(CHAPTERS) == len(MODULES), 'two chapters have one number'
    wrong = [f'{m}: chapter {n}, floor {i} in DESIGN' for n, m in CHAPTERS.items() for i, rooms in DESIGN.items() if m in rooms and FLOOR[m] != i]
    assert not wrong, wrong


@pytest.mark.parametrize('name', TREES)
def test_no_import_against_the_floors(name):
    up = {m for m in _imports(TREES[name]) if FLOOR.get(m, 99) > FLOOR[name]}
    assert not up, f'{name} (floor {FLOOR[name]}) imports from above: {up}'


def test_no_circles():
    seen = {}
    def visit(m, path):
        assert m not in path, f'circle: {" → ".join([*path, m])}'
        if m in seen or m not in TREES: return
        for k in _imports(TREES[m]): visit(k, [*path, m])
        seen[m] = True
    for m in TREES: visit(m, [])


def _name(n):
    "`torch.load` for the syntax tree of it"
    return f'{_name(n.value)}.{n.attr}' if isinstance(n, ast.Attribute) else n.id if isinstance(n, ast.Name) else '?'


FORBIDDEN = {'eval', 'exec', 'torch.load', 'torch.save', 'pickle.load', 'pickle.loads', 'joblib.load', 'yaml.load', 'yaml.unsafe_load', 'yaml.full_load', 'os.system',
             'torch.hub.load', 'torch.hub.load_state_dict_from_url', 'pd.read_pickle', '__import__', 'compile'}


def dangers(tree):
    "Star imports, unpickling, evaluation, shells: a line for each"
    for n in ast.walk(tree):
        if isinstance(n, ast.ImportFrom) and any(a.name == '*' for a in n.names): yield f'star import of {n.module}'
        if isinstance(n, (ast.Import, ast.ImportFrom)):
            names = [a.name for a in n.names] if isinstance(n, ast.Import) else [n.module or '']
            yield from (f'imports {m}' for m in names if m.split('.')[0] in ('pickle', 'dill', 'cloudpickle', 'joblib', 'marshal', 'shelve'))
        if isinstance(n, ast.Call):
            if (f := _name(n.func)) in FORBIDDEN: yield f'calls {f}'
            if f == 'torch.load' and 'weights_only' not in {k.arg for k in n.keywords}: yield 'torch.load without weights_only=True'
            for k in n.keywords:
                truth = not (isinstance(k.value, ast.Constant) and k.value.value is False)
                if k.arg in ('allow_pickle', 'shell', 'trust_remote_code') and truth: yield f'{f}({k.arg}=…)'
                if k.arg == 'weights_only' and not (isinstance(k.value, ast.Constant) and k.value.value is True): yield f'{f}(weights_only=…)'


ALLOWED = {('vision', 'calls torch.load')}      # EfficientNet-Lite0's package ships a .pth; read with weights_only=True, which the search below demands


@pytest.mark.parametrize('name', TREES)
def test_nothing_dangerous(name):
    assert not [d for d in dangers(TREES[name]) if (name, d) not in ALLOWED]


@pytest.mark.parametrize('source', ['from a import *', 'import pickle', 'torch.load("x")', 'eval("1")', 'np.load("x", allow_pickle=True)', 'subprocess.run("x", shell=True)',
                                    'from pickle import loads', 'yaml.load(x)', 'f(trust_remote_code=True)'])
def test_the_search_finds(source):
    assert list(dangers(ast.parse(source)))


def _public(tree):
    for n in tree.body:
        if isinstance(n, ast.Assign) and isinstance(n.targets[0], ast.Name) and n.targets[0].id == '__all__': return ast.literal_eval(n.value)
    return []


def _lacks_docstring(name):
    "Public functions, classes and public methods of public classes, without a docstring; constants need a comment instead"
    defs = {n.name: n for n in TREES[name].body if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
    for k in _public(TREES[name]):
        if k in defs and not ast.get_docstring(defs[k]): yield k


@pytest.mark.parametrize('name', TREES)
def test_public_names_have_docstrings(name):
    assert not list(_lacks_docstring(name))


@pytest.mark.parametrize('name', TREES)
def test_public_names_exist_and_module_says_what_it_is(name):
    module = importlib.import_module(f'toksr.{name}')
    assert module.__doc__ and not [k for k in _public(TREES[name]) if not hasattr(module, k)]


@pytest.mark.parametrize('name', TREES)
def test_rooms_are_small(name):
    "STYLE: about 250 lines a module, 40 code cells a chapter; a half more is where it has become two rooms"
    assert len((ROOT/f'toksr/{name}.py').read_text().splitlines()) <= 375


STUDIES = sorted((ROOT/'nbs/study').glob('*.ipynb'))


@pytest.mark.parametrize('path', STUDIES, ids=lambda p: p.stem)
def test_studies_hold_no_model_code(path):
    from toksr.code import notebook_tree
    tree = notebook_tree(path)
    assert not [n.name for n in ast.walk(tree) if isinstance(n, ast.ClassDef)], 'a new idea gets a chapter'
    assert not list(dangers(tree))
