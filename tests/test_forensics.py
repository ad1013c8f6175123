"""The mistakes of a set metric: the right way among them is the metric itself, pictures do not depend on batches,
and the interval of a difference covers."""
import numpy as np
import pytest
import torch

from toksr.encoders.lite0 import Lite0
from toksr.metrics.forensics import distances, kid_difference, views, WAYS
from toksr.metrics.sets import features, fid, set_metrics


@pytest.fixture(scope='module')
def net() -> Lite0: return Lite0()


def noisy(n: int, seed: int, amount: float) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return (torch.linspace(0, 1, 64).expand(n, 3, 64, 64)+amount*torch.randn(n, 3, 64, 64, generator=g)).clamp(0, 1)


def test_the_right_way_is_the_metric(net):
    a, b = noisy(12, 0, .1), noisy(12, 1, .3)
    va, vb = views(net, a), views(net, b)
    assert np.allclose(va['pooled'], features(net, a), rtol=1e-4, atol=1e-4)
    found, metric = distances(va, vb), set_metrics(features(net, a), features(net, b), net)
    assert np.isclose(found['right'], metric['fid_lite0_1280_at_n12'], rtol=1e-3) and np.isclose(found['right'],
            fid(va['pooled'], vb['pooled'], rank_deficient=True))
    assert set(found) == set(WAYS) and all(w.of in va for w in WAYS.values())
    assert found == pytest.approx(distances(vb, va), rel=1e-6), 'a distance has no direction'


@pytest.mark.parametrize('batch', (1, 5, 64))
def test_views_do_not_depend_on_batches(net, batch):
    x = noisy(6, 2, .2)
    whole, parts = views(net, x), views(net, x, batch)
    for k in whole: assert np.allclose(whole[k], parts[k], rtol=1e-4, atol=1e-5), k


def test_views_outside_of_the_range_are_cut(net):
    x = noisy(3, 3, .2)
    assert np.array_equal(views(net, x)['pooled'], views(net, torch.where(x == 1, torch.tensor(7.), x))['pooled'])


def test_difference_of_kids_covers():
    """Real pictures and two systems' answers to them; over 200 draws the interval holds the true difference (the
    mean over all) in 90 to 99 %"""
    def draw(seed):
        rng = np.random.default_rng(seed)
        r = rng.normal(size=(90, 6))
        return kid_difference(r, r+.5+.3*rng.normal(size=r.shape), r+.2+.3*rng.normal(size=r.shape), blocks=15)
    runs = [draw(s) for s in range(200)]
    truth = np.mean([i.mean for i in runs])
    covered = np.mean([i.lo <= truth <= i.hi for i in runs])
    assert truth > 0 and .90 <= covered <= .99, (truth, covered)


@pytest.mark.parametrize('shapes',
                         [((90, 4), (90, 4), (80, 4)), ((90, 4), (90, 5), (90, 4)), ((59, 4), (59, 4), (59, 4))])
def test_difference_refuses_what_does_not_fit(shapes):
    with pytest.raises(ValueError, match='three tables of one shape with at least 60 rows'):
        kid_difference(*(np.zeros(s) for s in shapes))
