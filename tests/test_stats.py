"Intervals hold the truth as often as they say, and do not depend on how the drawing is blocked."
import numpy as np
import pytest

from toksr.core import stats
from toksr.core.stats import bootstrap, Interval, paired_bootstrap


@pytest.mark.parametrize('n,noise', [(30, 'normal'), (200, 'normal'), (200, 'skewed')])
def test_coverage_of_paired_intervals(n, noise):
    "500 pretended comparisons of two systems on n images, true difference 0.1: 93 to 97 of 100 intervals hold it"
    rng, hits = np.random.default_rng(7), 0
    for s in range(500):
        hard = rng.normal(26, 3, n)                                     # how hard each image is, for both
        e = rng.normal(0, .4, n) if noise == 'normal' else rng.exponential(.4, n)-.4
        i = paired_bootstrap(hard+.1+e, hard, n=1000, seed=s)
        hits += i.lo <= .1 <= i.hi
    assert .93 <= hits/500 <= .97, hits/500


def test_equal_to_a_plain_loop():
    x = np.random.default_rng(0).normal(size=50)
    rng = np.random.default_rng(3)
    loop = [x[i].mean() for i in rng.integers(0, 50, (400, 50))]
    np.testing.assert_allclose(stats._resampled_means(x, 400, 3), loop, rtol=1e-12)


def test_pairing_is_by_image_and_signed():
    a, b = np.arange(100.), np.arange(100.)-1
    assert paired_bootstrap(a, b) == Interval(1., 1., 1., 100) and paired_bootstrap(b, a).mean == -1


@pytest.mark.parametrize('bad', [[], [1.], [1., np.nan], [[1., 2.]], [1., np.inf]])
def test_bad_values_are_refused(bad):
    with pytest.raises(ValueError): bootstrap(bad)


def test_lengths_must_agree():
    with pytest.raises(ValueError, match='2 and 3'): paired_bootstrap([1., 2.], [1., 2., 3.])


def test_wider_level_is_wider():
    x = np.random.default_rng(0).normal(size=100)
    assert bootstrap(x, level=.99).half > bootstrap(x).half > bootstrap(x, level=.5).half
