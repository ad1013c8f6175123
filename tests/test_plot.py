"Figures are the same bytes in another process, whatever the user's own settings."
import hashlib
import subprocess
import sys

import numpy as np
import pytest

from toksr.core.plot import as_uint8, difference, image_grid

MAKE = '''
import sys, hashlib, numpy as np, matplotlib
matplotlib.use('agg')
import matplotlib.pyplot as plt
from toksr.core.plot import image_grid, save_fig, style
style()
fig, ax = plt.subplots(); ax.plot([1, 2], [3, 1], label='a'); ax.set_title('t'); ax.legend()
rng = np.random.default_rng(0)
grid = image_grid([[rng.random((3, 16, 16)) for _ in range(3)]]*2, ['a', 'b'], ['x', 'y', 'z'], 't')
for f, n in ((fig, 'line'), (grid, 'grid')):
    for p in save_fig(f, sys.argv[1]+'/'+n): print(p.name, hashlib.sha256(p.read_bytes()).hexdigest())
'''


def test_same_bytes_twice(tmp_path):
    def run(d, rc):
        (tmp_path/d).mkdir()
        (tmp_path/d/'matplotlibrc').write_text(rc)
        return subprocess.run([sys.executable, '-c', MAKE, str(tmp_path/d)], cwd=tmp_path/d, capture_output=True,
                              text=True, check=True).stdout
    first = run('a', '')
    assert first.count('\n') == 4 and first == run('b', 'lines.linewidth: 9\nsavefig.dpi: 20\naxes.facecolor: red\n')


def test_tensors_and_arrays_agree():
    torch = pytest.importorskip('torch')
    x = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0))
    for y in x.permute(1, 2, 0), x.numpy(), x.bfloat16().float(), (x*255).round().to(torch.uint8):
        assert np.abs(as_uint8(y).astype(int)-as_uint8(x)).max() <= 1
    assert as_uint8(torch.tensor([[0, 255]], dtype=torch.uint8).expand(2, 2)).max() == 255


def test_out_of_range_is_clipped_and_nan_is_black():
    x = np.full((2, 2, 3), [-1., 2., np.nan])
    assert as_uint8(x)[0, 0].tolist() == [0, 255, 0]
    assert difference(x, x).shape == (2, 2)


@pytest.mark.parametrize('shape', [(3,), (2, 3, 4, 4), (4, 4, 2), (5, 4, 4)])
def test_not_an_image(shape):
    with pytest.raises(ValueError): as_uint8(np.zeros(shape))


def test_rows_of_unequal_length_and_gaps():
    one = np.zeros((8, 8, 3))
    fig = image_grid([[one, None, one], [one]], cell=16, gap=2)
    assert fig.axes[0].images[0].get_array().shape == (34, 52, 3)
