"Metrics against scikit-image, lpips and torch-fidelity, in autocast, in batches, and with nonsense."
import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from scipy.linalg import sqrtm
from torch import Tensor

from toksr.core.stats import bootstrap
from toksr.data.degradations import downscale
from toksr.encoders.lite0 import Lite0
from toksr.metrics.per_image import in_float32, per_image, psnr, ssim, summarise
from toksr.metrics.sets import features, fid, frechet, kid, kid_interval, real_floor, set_metrics


@pytest.fixture(scope='module')
def net() -> Lite0: return Lite0()


@pytest.fixture(scope='module')
def pair() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    x = F.interpolate(torch.rand(10, 3, 12, 12, generator=g), size=64, mode='bicubic').clamp(0, 1)
    return x, x+.08*torch.randn(x.shape, generator=g)


def hwc(x: Tensor) -> np.ndarray: return x.clamp(0, 1).permute(0, 2, 3, 1).numpy()


# per image

@pytest.mark.parametrize('uint8', [False, True])
def test_psnr_and_ssim_equal_scikit_image(pair, uint8):
    from skimage.metrics import peak_signal_noise_ratio, structural_similarity
    x, y = map(hwc, pair)
    if uint8: x, y = (np.round(v*255)/255 for v in (x, y))
    settings = dict(gaussian_weights=True, sigma=1.5, use_sample_covariance=False, channel_axis=-1, data_range=1)
    np.testing.assert_allclose(psnr(*pair, uint8=uint8),
                               [peak_signal_noise_ratio(a, b, data_range=1) for a, b in zip(x, y)], atol=1e-4)
    np.testing.assert_allclose(ssim(*pair, uint8=uint8),
                               [structural_similarity(a, b, **settings) for a, b in zip(x, y)], atol=1e-4)


@pytest.mark.parametrize('shape', [(11, 11), (11, 40), (33, 64)])
def test_ssim_at_odd_sizes(shape):
    from skimage.metrics import structural_similarity
    g = torch.Generator().manual_seed(1)
    x, y = torch.rand(2, 3, *shape, generator=g), torch.rand(2, 3, *shape, generator=g)
    want = [structural_similarity(a, b, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, channel_axis=-1,
                                  data_range=1) for a, b in zip(hwc(x), hwc(y))]
    np.testing.assert_allclose(ssim(x, y), want, atol=1e-4)


def test_uint8_rounding_matters_and_is_exact(pair):
    x, y = pair[0], pair[0]+.4/255
    y8 = (y.clamp(0, 1)*255).round()/255
    assert torch.equal(psnr(x, y, uint8=True),
                       psnr((x*255).round()/255, y8)) and (psnr(x, y, uint8=True) != psnr(x, y)).all()


def test_outputs_are_clamped(pair):
    x, y = pair
    assert torch.equal(psnr(x, y*3-1), psnr(x, (y*3-1).clamp(0, 1))) and torch.equal(ssim(x, y*3-1),
                                                                                     ssim(x, (y*3-1).clamp(0, 1)))


def test_autocast_changes_nothing(pair, net):
    "The prototype measured SSIM .05 for .50 inside bfloat16 autocast."
    x, y = pair
    lr = downscale(x, 4)
    outside, f = per_image(x, y, lr, [net]), features(net, x)
    with torch.autocast('cpu', torch.bfloat16): inside, g = per_image(x, y, lr, [net]), features(net, x)
    pd.testing.assert_frame_equal(inside, outside, check_exact=True)
    assert np.array_equal(f, g)
    pd.testing.assert_frame_equal(per_image(x.bfloat16().float(), y.bfloat16().float(), lr, [net]),
                                  per_image(x.bfloat16(), y.bfloat16(), lr, [net]), check_exact=True)


def test_in_float32_covers_keywords_and_gradients(pair):
    seen = {}
    @in_float32
    def f(a, b=None): seen.update(a=a.dtype, b=b.dtype, grad=torch.is_grad_enabled(), product=(a@b).dtype)
    with torch.autocast('cpu', torch.bfloat16):
        f(torch.ones(2, 2, dtype=torch.bfloat16), b=torch.ones(2, 2, dtype=torch.float64))
    assert seen == dict(a=torch.float32, b=torch.float32, grad=False, product=torch.float32)


@pytest.mark.parametrize('batch', [1, 3, 10])
def test_batches_change_nothing(pair, net, batch):
    x, y = pair
    lr = downscale(x, 4)
    pd.testing.assert_frame_equal(per_image(x, y, lr, [net], batch=batch), per_image(x, y, lr, [net], batch=64),
                                  atol=1e-5, rtol=1e-5)


def test_per_image_columns(pair, net):
    x, y = pair
    lr = downscale(x, 4)
    df = per_image(x, y, lr, [net], ids=[f'scene-{i}' for i in range(10)])
    assert list(df) == ['image', 'psnr', 'ssim', 'lite0',
                        'lr_psnr'] and df.image[3] == 'scene-3' and df.dtypes.psnr == np.float64
    from toksr.metrics.per_image import lr_consistency
    np.testing.assert_allclose(df.lr_psnr, lr_consistency(y.clamp(0, 1), lr), atol=1e-4)
    np.testing.assert_allclose(df.lite0, net.distance(x, y.clamp(0, 1)), atol=1e-5)
    assert list(per_image(x, y)) == ['image', 'psnr', 'ssim']
    same = per_image(x, x, downscale(x, 4), [net])
    assert (same.psnr == 100).all() and (same.lite0 == 0).all() and (same.lr_psnr == 100).all() and (same.ssim > .99999).all()


def test_nonsense_is_refused(pair):
    x, y = pair
    with pytest.raises(ValueError, match='one shape'): psnr(x, y[:3])
    with pytest.raises(ValueError, match='one shape'): psnr(x[0], y[0])
    for bad in (float('nan'), float('inf')):
        z = y.clone()
        z[4, 0, 0, 0] = bad
        for f in (psnr, ssim, per_image):
            with pytest.raises(ValueError, match='output: 1 of 10 images have values that are not finite'): f(x, z)
    with pytest.raises(ValueError, match='at least 11 px'): ssim(x[..., :10, :10], y[..., :10, :10])
    with pytest.raises(ValueError, match='10 targets, but 3'): per_image(x, y, downscale(x, 4)[:3])


def test_golden():
    """Waves against their 4x4 block means: PSNR and SSIM by scikit-image 0.26.0, Lite0 from timm's features, all
    once in float64."""
    h, w = torch.meshgrid(torch.arange(64)/64, torch.arange(64)/64, indexing='ij')
    x = torch.stack([.5+.5*torch.sin(6.2832*((c+1)*w+(2-c)*h)) for c in range(3)])[None]
    y = F.interpolate(F.avg_pool2d(x, 4), scale_factor=4)
    row = per_image(x, y, nets=[Lite0()]).iloc[0]
    np.testing.assert_allclose([row.psnr, row.ssim, row.lite0], [20.34965, .74609, .4737], atol=1e-4)


# summaries

def test_summarise_equals_bootstrap(pair, net):
    x, y = pair
    df = pd.concat([per_image(x, y).assign(method='a', split='val'),
                    per_image(x, (x+y)/2).assign(method='b', split='val')])
    out = summarise(df, by=['method', 'split'])
    assert list(out) == ['method', 'split', 'metric', 'mean', 'lo', 'hi', 'n'] and len(out) == 4
    row, want = out[(out.method == 'b') & (out.metric == 'psnr')].iloc[0], bootstrap(df[df.method == 'b'].psnr)
    assert (row['mean'], row.lo, row.hi, row.n) == (want.mean, want.lo, want.hi, 10)
    assert summarise(df, by='method').equals(out.drop(columns='split')) and len(summarise(df, by=[])) == 2
    with pytest.raises(ValueError, match="no column 'model'; there are image, psnr"): summarise(df, by='model')


def test_summarise_leaves_out_what_was_not_measured(pair):
    df = per_image(*pair).assign(method='a', lr_psnr=np.nan)
    assert set(summarise(df).metric) == {'psnr', 'ssim'}


# sets

def gaussians(n: int, d: int, seed: int, shift: float = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, d))@np.random.default_rng(d).normal(size=(d, d))/np.sqrt(d)+shift


@pytest.mark.parametrize('d', [2, 17, 64])
def test_frechet_closed_form(d):
    "Commuting covariances have a closed form; others are compared with scipy's matrix root, all in float64."
    rng = np.random.default_rng(d)
    q, _ = np.linalg.qr(rng.normal(size=(d, d)))
    a, b, m1, m2 = rng.uniform(.1, 3, d), rng.uniform(.1, 3, d), rng.normal(size=d), rng.normal(size=d)
    want = np.square(m1-m2).sum()+np.square(np.sqrt(a)-np.sqrt(b)).sum()
    assert abs(frechet(m1, (q*a)@q.T, m2, (q*b)@q.T)/want-1) < 1e-6
    c1, c2 = (np.cov(rng.normal(size=(3*d, d)), rowvar=False) for _ in 'ab')
    want = np.square(m1-m2).sum()+np.trace(c1+c2-2*sqrtm(c1@c2).real)
    assert abs(frechet(m1, c1, m2, c2)/want-1) < 1e-6 and abs(frechet(m1, c1, m1, c1)) < 1e-9
    assert abs(frechet(m1, c1, m2, c2)/frechet(m2, c2, m1, c1)-1) < 1e-9


@pytest.mark.parametrize('d, n, m', [(16, 200, 200), (64, 300, 300), (128, 400, 500)])
def test_fid_equals_torch_fidelity(d, n, m):
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric
    a, b = gaussians(n, d, 1), gaussians(m, d, 2, .2)
    want = fid_statistics_to_metric(*(fid_features_to_statistics(torch.from_numpy(x)) for x in (a, b)),
                                    verbose=False)[KEY_METRIC_FID]
    assert abs(fid(a, b)/want-1) < 1e-3


@pytest.mark.parametrize('d, n', [(16, 200), (128, 300)])
def test_kid_equals_torch_fidelity(d, n):
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, kid_features_to_metric
    a, b = gaussians(n, d, 1), gaussians(n, d, 2, .2)
    want = kid_features_to_metric(torch.from_numpy(a), torch.from_numpy(b), kid_subsets=1, kid_subset_size=n,
                                  verbose=False)[KEY_METRIC_KID_MEAN]
    assert abs(kid(a, b)/want-1) < 1e-3


def test_lite0_features_equal_torch_fidelity_too(net):
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, kid_features_to_metric
    x = F.interpolate(torch.rand(60, 3, 6, 6, generator=torch.Generator().manual_seed(0)), size=32)
    a, b = features(net, x[:30]), features(net, x[30:].flip(1)*.5)
    want = kid_features_to_metric(torch.from_numpy(a), torch.from_numpy(b), kid_subsets=1, kid_subset_size=30,
                                  verbose=False)[KEY_METRIC_KID_MEAN]
    assert abs(kid(a, b)/want-1) < 1e-3 and want > .001


def test_kid_is_unbiased_and_fid_is_not():
    kids = [kid(gaussians(50, 16, 2*i), gaussians(50, 16, 2*i+1)) for i in range(200)]
    assert abs(np.mean(kids)) < 4*np.std(kids)/np.sqrt(200) and min(kids) < 0
    fids = [fid(gaussians(n, 16, 1), gaussians(n, 16, 2)) for n in (20, 50, 200, 2000)]
    assert fids == sorted(fids, reverse=True) and fids[0] > 10*fids[-1] > 0, 'few images make FID large'


def test_batch_size_of_set_metrics(net):
    x = F.interpolate(torch.rand(40, 3, 6, 6, generator=torch.Generator().manual_seed(0)), size=32)
    a, b = (features(net, x, batch=k) for k in (64, 7))
    one, other = set_metrics(a[:20], a[20:], net), set_metrics(b[:20], b[20:], net)
    assert one.keys() == other.keys()
    np.testing.assert_allclose(list(one.values()), list(other.values()), rtol=1e-5, atol=1e-5)


def test_too_few_images_for_fid(net):
    a, b = gaussians(50, 64, 1), gaussians(500, 64, 2)
    with pytest.raises(ValueError, match='fid: 50 images for 64 features; use more than 64 images, or kid'): fid(a, b)
    assert fid(a, b, rank_deficient=True) > 0
    class Named: name, feature_name = 'toy', 'toy64'
    assert list(set_metrics(a, b, Named))[:2] == ['kid_toy', 'fid_toy64_at_n50']
    assert list(set_metrics(gaussians(65, 64, 1), b, Named))[:2] == ['kid_toy', 'fid_toy64']


def test_bad_features():
    a = gaussians(20, 4, 0)
    for b in (gaussians(20, 5, 0), a[:1], a[:, 0], np.full((20, 4), np.nan)):
        for f in (fid, kid):
            with pytest.raises(ValueError): f(a, b)


def test_both_ways_to_fid_agree():
    "The short way for few images is the long way with singular covariances."
    a, b = gaussians(40, 64, 1), gaussians(50, 64, 2, .2)
    long = frechet(a.mean(0), np.cov(a, rowvar=False), b.mean(0), np.cov(b, rowvar=False))
    assert abs(fid(a, b, rank_deficient=True)/long-1) < 1e-6


def test_kid_interval_covers():
    """Over 300 pairs of sets the 95 % interval holds the true distance in 92-98 % of cases; the truth is the mean
    over all of them."""
    runs = [kid_interval(gaussians(60, 8, 2*i), gaussians(80, 8, 2*i+1, .4)) for i in range(300)]
    truth = np.mean([r.mean for r in runs])
    covered = np.mean([r.lo <= truth <= r.hi for r in runs])
    assert .92 <= covered <= .98 and truth > 0, covered
    a, b = gaussians(60, 8, 0), gaussians(80, 8, 1, .4)
    assert runs[0].mean == kid(a, b) and runs[0].n == 60
    left = np.array([kid(np.delete(a, i, 0), b) for i in range(60)]), np.array([kid(a, np.delete(b, i, 0))
                                                                                for i in range(80)])
    assert abs(1.959964*np.sqrt(59*left[0].var()+79*left[1].var())/runs[0].half-1) < 1e-6
    with pytest.raises(ValueError, match='at least 3'): kid_interval(a[:2], b)


def test_real_floor():
    a = gaussians(400, 32, 0)
    floor = real_floor(a, seed=0)
    assert floor == real_floor(a, seed=0) and floor != real_floor(a, seed=1)
    assert floor['n'] == 200 and not floor['rank_deficient'] and real_floor(gaussians(50, 32, 0), 0)['rank_deficient']
    assert abs(floor['kid']) < floor['kid_hi'] and floor['fid'] > 0
    assert kid(a[:200], a[200:]+.3) > floor['kid_hi'] and fid(a[:200], a[200:]+.3) > floor['fid']
