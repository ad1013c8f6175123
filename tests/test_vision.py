"Frozen image networks against the libraries they come from, and files that are not what they say."
import ast
import shutil
import urllib.error
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor

from toksr.encoders import vision
from toksr.encoders.lite0 import _read_packaged_pth, Lite0, lite0_distance, lite0_file, LITE0_SHA256, read_weights, unit
from toksr.encoders.vision import ConvNextS, DinoV2, Inception, LpipsVGG

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope='module')
def net() -> Lite0: return Lite0()


def rand(*shape: int, seed: int = 0) -> Tensor: return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def picture(n: int = 2, px: int = 64) -> Tensor:
    "Smooth coloured waves, the same on every machine."
    y, x = torch.meshgrid(torch.arange(px)/px, torch.arange(px)/px, indexing='ij')
    return torch.stack([torch.stack([.5+.5*torch.sin(6.2832*((c+1)*x*(i+1)+(2-c)*y+i/3)) for c in range(3)])
                        for i in range(n)])


# Lite0

@pytest.mark.parametrize('h, w', [(64, 64), (32, 48), (61, 97), (224, 224)])
def test_lite0_equals_timm(net, h, w):
    "Folded norms and padded kernels change nothing, at even and odd sizes."
    import timm
    state = list(_read_packaged_pth(lite0_file(), LITE0_SHA256).values())
    whole, parts = (timm.create_model('tf_efficientnet_lite0', features_only=f).eval() for f in (False, True))
    for m in (whole, parts): m.load_state_dict(dict(zip(m.state_dict(), state)))
    x = rand(2, 3, h, w)
    with torch.no_grad():
        for ours, theirs in zip(net.stages(x), parts(x*2-1), strict=True):
            torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=0)
        torch.testing.assert_close(net.logits(x), whole(x*2-1), atol=2e-4, rtol=0)
        torch.testing.assert_close(net.pooled(x), whole.forward_head(whole.forward_features(x*2-1), pre_logits=True),
                                   atol=1e-4, rtol=0)


def test_lite0_knows_animals(net):
    "The weights arrived in the right places: a stamp photograph of an animal gets its name."
    from PIL import Image
    from toksr.core.paths import stamps_dir
    def scores(name: str) -> Tensor:
        im = Image.open(next(stamps_dir().rglob(name))).convert('RGBA')
        im = im.crop(im.getchannel('A').getbbox())
        im.thumbnail((200, 200))
        bg = Image.new('RGB', (224, 224), (190, 190, 190))
        bg.paste(im, ((224-im.width)//2, (224-im.height)//2), im)
        return net.logits(torch.from_numpy(np.array(bg)).permute(2, 0, 1)[None]/255)[0].softmax(-1)
    assert scores('gorilla.png')[366] > .5


def test_lite0_is_frozen(net):
    assert not net.train().training and not any(m.training for m in net.modules()) and not any(p.requires_grad
            for p in net.parameters())
    assert [m.shape[1:] for m in net.stages(rand(1, 3, 64, 64), last=8)] == [(16, 32, 32), (24, 16, 16), (40, 8, 8)]


def test_distance_golden(net):
    "Computed once from timm's own tf_efficientnet_lite0 features in float64, on the waves and their 4x4 block means."
    a = picture()
    b = torch.nn.functional.interpolate(torch.nn.functional.avg_pool2d(a, 4), scale_factor=4)
    np.testing.assert_allclose(lite0_distance(a, b, net), [.4737, .4730], atol=1e-4)


def test_distance_is_what_it_says(net):
    a, b = rand(3, 3, 64, 64), rand(3, 3, 64, 64, seed=1)
    want = 0
    for s, x, y in zip(net.strides[:4], net.stages(a), net.stages(b)):
        x, y = (v/v.pow(2).sum(1, keepdim=True).sqrt() for v in (x, y))
        want = want+(x-y).pow(2).sum((1, 2, 3))/(64//s)**2/4
    torch.testing.assert_close(lite0_distance(a, b, net), want, atol=1e-5, rtol=0)
    assert (lite0_distance(a, a, net) == 0).all() and torch.equal(net.distance(a, b), lite0_distance(a, b, net))
    torch.testing.assert_close(lite0_distance(b, a, net), want, atol=1e-5, rtol=0)
    torch.testing.assert_close(lite0_distance(a[1:2], b[1:2], net), want[1:2], atol=1e-5, rtol=0)


@pytest.mark.parametrize('amp', [False, True])
def test_distance_has_a_gradient(net, amp):
    a, b = rand(2, 3, 64, 64).requires_grad_(), rand(2, 3, 64, 64, seed=1)
    with torch.autocast('cpu', torch.bfloat16, enabled=amp): d = lite0_distance(a, b, net)
    assert d.dtype == torch.float32
    g, = torch.autograd.grad(d.sum(), a)
    assert g.isfinite().all() and g.abs().sum() > 0
    step = 1e-2*g/g.flatten(1).norm(dim=1)[:, None, None, None]*8
    assert (lite0_distance(a-step, b, net) < lite0_distance(a, b, net)).all()


def test_flat_images_have_finite_gradients(net):
    a = torch.zeros(1, 3, 64, 64, requires_grad=True)
    g, = torch.autograd.grad(lite0_distance(a, rand(1, 3, 64, 64), net).sum(), a)
    assert g.isfinite().all() and unit(torch.zeros(1, 4, 2, 2)).eq(0).all()


def test_distance_shapes(net):
    with pytest.raises(ValueError, match=r'one shape, got \(1, 3, 64, 64\) and \(1, 3, 32, 32\)'):
        lite0_distance(rand(1, 3, 64, 64), rand(1, 3, 32, 32), net)


# files

UNPICKLING = {'torch.load', 'pickle.load', 'pickle.loads', 'joblib.load', 'torch.hub.load_state_dict_from_url',
              'hub.load_state_dict_from_url', 'torch.jit.load'}

def unpicklers(source: str) -> list[str]:
    return [ast.unparse(n) for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Attribute)
            and ast.unparse(n) in UNPICKLING]


def test_one_function_unpickles():
    """torch.load appears once in the package: in encoders.lite0._read_packaged_pth, with the restricted reader; of
    its relatives, TorchScript in the adapter of Cosmos."""
    import inspect
    assert unpicklers('import torch\nx = torch.load(1)') == ['torch.load']
    found = {f.parent.name+"."+f.stem: unpicklers(f.read_text()) for f in sorted((ROOT/'toksr').rglob('*.py'))}
    # Cosmos is published as TorchScript programs: run only when a user names the files
    assert {k: v for k, v in found.items() if v} == {"encoders.lite0": ["torch.load"], "hub.grids": ['torch.jit.load']}
    body = inspect.getsource(_read_packaged_pth)
    assert unpicklers(body) == ['torch.load'] and 'weights_only=True' in body and body.index('sha256') < body.index('torch.load')


@pytest.mark.parametrize('damage', ['flip', 'truncate', 'empty', 'append'])
def test_damaged_weights_are_refused(tmp_path, damage):
    file, raw = tmp_path/'w.pth', bytearray(lite0_file().read_bytes())
    if damage == 'flip': raw[len(raw)//2] ^= 1
    file.write_bytes({'flip': raw, 'truncate': raw[:-1], 'empty': b'', 'append': raw+b'x'}[damage])
    with pytest.raises(ValueError, match=r'w\.pth: sha256 is .* expected 579344248a93'):
        _read_packaged_pth(file, LITE0_SHA256)


def test_a_pickle_is_not_run(tmp_path):
    import pickle
    class Bad:
        def __reduce__(self): return (Path.touch, (tmp_path/'ran',))
    (tmp_path/'vgg16-397923af.pth').write_bytes(pickle.dumps(Bad()))
    with pytest.raises(ValueError, match='expected 397923af'):
        read_weights(tmp_path/'vgg16-397923af.pth', 'https://x/vgg16-397923af.pth')
    assert not (tmp_path/'ran').exists()


def test_missing_and_unreachable_weights(tmp_path, monkeypatch):
    for cls in (LpipsVGG, ConvNextS, Inception):
        with pytest.raises(FileNotFoundError, match='nowhere.pth: weights are missing'): cls(tmp_path/'nowhere.pth')
        with pytest.raises(FileNotFoundError, match='nowhere.safetensors: weights could not be loaded'):
            cls(tmp_path/'nowhere.safetensors')
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path/'hub'))
    def refuse(*_, **__): raise urllib.error.URLError('no route')
    monkeypatch.setattr(torch.hub, 'download_url_to_file', refuse)
    with pytest.raises(FileNotFoundError,
                       match='^vgg16-397923af.pth: weights could not be loaded .*no route.*pass the path of '
                             'vgg16-397923af.pth') as e:
        LpipsVGG()
    assert '\n' not in str(e.value)
    with pytest.raises(FileNotFoundError, match='DINOv2 .*nowhere'): DinoV2(tmp_path/'nowhere')


def test_download_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path))
    calls = []
    def copy(url, dst, hash_prefix, progress):
        calls.append(url)
        shutil.copy(lite0_file(), dst)
    monkeypatch.setattr(torch.hub, 'download_url_to_file', copy)
    url = 'https://x/lite0-57934424.pth'
    a, b = read_weights(None, url), read_weights(None, url)
    assert len(calls) == 1 and torch.equal(a['_fc.bias'], b['_fc.bias'])


# the networks of the papers, with random weights

@pytest.fixture(scope='module')
def vgg_file(tmp_path_factory) -> Path:
    from safetensors.torch import save_file
    from torchvision.models.vgg import cfgs, make_layers
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp('vgg')/'vgg16.safetensors'
    save_file({f'features.{k}': v.contiguous() for k, v in make_layers(cfgs['D'], False).state_dict().items()}, file)
    return file


def test_lpips_equals_the_package(vgg_file):
    import lpips
    from safetensors.torch import load_file
    from torchvision.models.vgg import cfgs, make_layers
    ours, features = LpipsVGG(vgg_file), make_layers(cfgs['D'], False)
    features.load_state_dict({k.removeprefix('features.'): v for k, v in load_file(vgg_file).items()})
    with pytest.warns(UserWarning): reference = lpips.LPIPS(net='vgg', pnet_rand=True, verbose=False)
    for piece in (reference.net.slice1, reference.net.slice2, reference.net.slice3, reference.net.slice4,
                  reference.net.slice5):
        for name, m in piece.named_children(): m.load_state_dict(features[int(name)].state_dict())
    a, b = rand(3, 3, 64, 64), rand(3, 3, 64, 64, seed=1)
    with torch.no_grad(): want = reference(a, b, normalize=True).flatten()
    torch.testing.assert_close(ours.distance(a, b), want, atol=1e-5, rtol=0)
    assert ours.distance(a, b).shape == (3,) and want.min() > .01 and (ours.distance(a, a) == 0).all()
    g, = torch.autograd.grad(ours.distance(x := a.clone().requires_grad_(), b).sum(), x)
    assert g.abs().sum() > 0


def test_wrong_keys_are_named(tmp_path, vgg_file):
    from safetensors.torch import save_file
    save_file({'features.0.weight': torch.zeros(1)}, tmp_path/'other.safetensors')
    with pytest.raises(FileNotFoundError, match='expected the keys and shapes of torchvision vgg16'):
        LpipsVGG(tmp_path/'other.safetensors')


def test_convnext_equals_torchvision(monkeypatch):
    from torchvision.models import ConvNeXt_Small_Weights, convnext_small
    torch.manual_seed(0)
    reference = convnext_small().eval()
    monkeypatch.setattr(vision, 'read_weights', lambda path, url: reference.state_dict())
    ours, a, b = ConvNextS(), picture(2), picture(4)[2:]
    x = torch.nn.functional.interpolate(a, size=(224, 224), mode='bilinear', antialias=True)
    t = ConvNeXt_Small_Weights.IMAGENET1K_V1.transforms()
    x = (x-torch.tensor(t.mean)[:, None, None])/torch.tensor(t.std)[:, None, None]
    with torch.no_grad():
        torch.testing.assert_close(ours.logits(a), reference(x), atol=1e-5, rtol=0)
        torch.testing.assert_close(ours.distance(a, b).mean(),
                                   torch.nn.functional.mse_loss(ours.logits(a), ours.logits(b)), atol=1e-6, rtol=0)


def test_inception_equals_torch_fidelity(monkeypatch):
    from torch_fidelity import feature_extractor_inceptionv3 as module
    torch.manual_seed(0)
    with mock.patch.object(module, 'load_state_dict_from_url', lambda *_,
                           **__: {}), mock.patch.object(module.FeatureExtractorInceptionV3, 'load_state_dict',
                                                        lambda *_: None):
        reference = module.FeatureExtractorInceptionV3('inception', ['2048'])
    monkeypatch.setattr(vision, 'read_weights', lambda path, url: reference.state_dict())
    ours, a = Inception(), picture(2)
    with torch.no_grad(): want = reference((a*255).round().byte())[0]
    assert ours.pooled(a).shape == (2, 2048) and torch.equal(ours.pooled(a), want.float())
    assert torch.equal(ours.pooled(a+1e-3),
                       ours.pooled(((a+1e-3).clamp(0, 1)*255).round()/255)), 'images are rounded to 8 bits'


def test_dinov2_equals_transformers(tmp_path):
    from transformers import Dinov2Config, Dinov2Model
    torch.manual_seed(0)
    reference = Dinov2Model(Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=56,
                                         patch_size=14)).eval()
    reference.save_pretrained(tmp_path)
    ours, a = DinoV2(tmp_path, size=56), picture(2)
    x = torch.nn.functional.interpolate(a, size=(56, 56), mode='bicubic', antialias=True)
    x = (x-torch.tensor([.485, .456, .406])[:, None, None])/torch.tensor([.229, .224, .225])[:, None, None]
    with torch.no_grad(): h, (cls, mean) = reference(x).last_hidden_state, ours.cls_and_mean(a)
    assert h.shape == (2, 17, 32)
    torch.testing.assert_close(cls, h[:, 0], atol=1e-5, rtol=0)
    torch.testing.assert_close(mean, h[:, 1:].mean(1), atol=1e-5, rtol=0)
