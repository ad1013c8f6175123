"Where things are, from anywhere."
import contextlib

import pytest

from toksr.core.paths import CKPT, ROOT, stamps_dir, STAMPS_PACKAGE, WORK


def test_root_is_the_nearest_params_file(tmp_path):
    (tmp_path/'params.yaml').touch()
    (tmp_path/'nbs/study').mkdir(parents=True)
    for d in tmp_path, tmp_path/'nbs/study':
        with contextlib.chdir(d):
            assert ROOT() == tmp_path and WORK() == tmp_path/'.work' and CKPT() == tmp_path/'.ckpt'


def test_stamps_order_and_message(tmp_path, monkeypatch):
    (tmp_path/'params.yaml').touch()
    (tmp_path/'data/animals').mkdir(parents=True)
    (tmp_path/'data/animals/cat.png').touch()
    monkeypatch.delenv('TOKSR_STAMPS', raising=False)
    with contextlib.chdir(tmp_path):
        assert stamps_dir() == tmp_path/'data'
        monkeypatch.setenv('TOKSR_STAMPS', str(tmp_path/'elsewhere'))
        with pytest.raises(FileNotFoundError, match=f'elsewhere.*{STAMPS_PACKAGE}.*TOKSR_STAMPS'): stamps_dir()
        monkeypatch.setenv('TOKSR_STAMPS', str(tmp_path/'data/animals/cat.png'))    # a file, not a folder
        with pytest.raises(FileNotFoundError): stamps_dir()
