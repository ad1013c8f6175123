"""JupyterLab started by `make lab`: notebooks are saved clean, sources under nbs/ without outputs."""
from nbdev.clean import clean_jupyter


def pre_save(path, model, **kw):
    "nbdev's cleaning, then outputs and counts dropped: executed copies live in reports/notebooks"
    clean_jupyter(path=path, model=model, **kw)
    if model['type'] == 'notebook' and '/nbs/' in f'/{path}':
        for c in model['content']['cells']:
            if c['cell_type'] == 'code': c['outputs'], c['execution_count'] = [], None


c.FileContentsManager.pre_save_hook = pre_save
