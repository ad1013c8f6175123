"""What training code does is seen by the probes, what it says is not: planted changes of behaviour are all found,
refactorings none."""
import ast
import json
import multiprocessing
import os
import re
import shutil
import sys
import traceback
from pathlib import Path

import numpy as np
import pytest

from toksr.pipeline.behaviour import apart, Behaviour, excess, noise_of
from toksr.pipeline.fingerprints import fingerprints
from toksr.pipeline.probes import read_probes

ROOT = Path(__file__).resolve().parents[1]
KNOWN = {p.stem: Behaviour.read(p) for p in sorted((ROOT/'build/probes').glob('*.json'))}


def copy_project(to):
    "The package and the training studies, without what probes do not need"
    shutil.copytree(ROOT/'toksr', to/'toksr', ignore=shutil.ignore_patterns('__pycache__'))
    (to/'nbs/study').mkdir(parents=True)
    for p in [*(ROOT/'nbs/study').glob('*.ipynb'), ROOT/'nbs/study/probes.yaml']: shutil.copy(p, to/'nbs/study')
    (to/'params.yaml').write_text('')
    return to


def change(root, old, new, times=1):
    "Replace a text that stands in exactly one module of the package"
    found = [p for p in sorted((root/'toksr').rglob('*.py')) if p.stem != '_modidx' and old in p.read_text()]
    assert len(found) == 1, f'{old!r} stands in {len(found)} modules: {found}'
    text = found[0].read_text()
    assert text.count(old) == times, f'{old!r} stands {text.count(old)} times in {found[0]}'
    found[0].write_text(text.replace(old, new))


def _child(root, study, run, out):
    try:
        sys.stdout = sys.stderr = open(os.devnull, 'w')
        for m in [m for m in sys.modules if m.split('.')[0] == 'toksr']: del sys.modules[m]
        sys.path.insert(0, str(root))
        from toksr.pipeline.behaviour import Probes
        import toksr
        assert Path(toksr.__file__).is_relative_to(root)
        left = Probes(Path(root), Path(root)/'run').run(study, run)
        Path(out).write_text(json.dumps(left))
    except BaseException: Path(out).write_text(json.dumps(traceback.format_exc()))
    os._exit(0)


def behaves(root, probe):
    """What differs from the committed behaviour, run with the package in `root` by a fork of this process (torch is
    imported already)"""
    import torch        # noqa: F401  once, before the fork
    study, run = probe.split('/')
    p = multiprocessing.get_context('fork').Process(target=_child, args=(root, study, run, root/'left.json'))
    p.start()
    p.join(900)
    assert p.exitcode == 0
    left = json.loads((root/'left.json').read_text())
    if isinstance(left, str): raise AssertionError(left)
    known = KNOWN[study].runs[run]
    return excess(known['left'], known['noise'], left)


# -- planted changes
# ----------------------------------------------------------------------------------------------------------------

PLANTED = {
    'a loss weight': ('train_arms/textok_kl', 'perceptual=recipe.perceptual, kl=recipe.kl, adv',
                      'perceptual=recipe.perceptual, kl=1.1 * recipe.kl, adv'),
    'a sign in the adversarial loss': ('train_tokenizer/adversarial', 'return -fake.mean()', 'return fake.mean()'),
    'swapped arguments of the noise': ('train_sr/velocity', 'self.sr.schedule.add_noise(r, noise, t)',
                                       'self.sr.schedule.add_noise(noise, r, t)'),
    'a dropped text mask': ('train_arms/tatitok_kl', 'if self.has_text and self.mask_text else None',
                            'if False else None'),
    'another stream of random numbers': ('train_sr/paper', "f'task{k}'", "f'tasks{k}'"),
    'warm-up one step late': ('train_upscaler/x4', 'return (step + 1) / cfg.warmup', 'return step / cfg.warmup'),
    'decay that ends elsewhere': ('train_upscaler/x4', 'cfg.final_lr + (1 - cfg.final_lr) * down',
                                  'cfg.final_lr * (2 - cfg.final_lr) * down'),
    'perceptual term one step late': ('train_arms/textok_kl',
                                      "if c.perceptual and step >= c.perceptual_start: terms['perceptual'] = "
                                      "self.seen(recon, image)\n            terms |=",
                                      "if c.perceptual and step > c.perceptual_start: terms['perceptual'] = "
                                      "self.seen(recon, image)\n            terms |="),
    'adversarial start one step late': ('train_tokenizer/adversarial',
                                        'self.config.adv > 0 and step >= self.config.adv_start',
                                        'self.config.adv > 0 and step > self.config.adv_start'),
    'weight decay a hundred times larger': ('train_text_effect/text', 'weight_decay: float = 1e-4 ',
                                            'weight_decay: float = 1e-2 '),
    'another default of beta2': ('train_upscaler/x4', 'betas=(.9, cfg.beta2)', 'betas=(.8, cfg.beta2)'),
    'average of the weights without its beginning': ('train_upscaler/x4',
                                                     'min(decay, (1 + n.item()) / (10 + n.item()))', 'decay'),
    'gradients not clipped': ('train_arms/tatitok_kl', 'cfg.clip or math.inf', 'math.inf'),
    'another order of the data': ('train_text_effect/text', 'np.random.default_rng([seed, epoch])',
                                  'np.random.default_rng([seed + 1, epoch])'),
    'caption not dropped': ('train_sr/velocity', 'to_device(self.device, t, noise, draw_drops(len(r), generator, self.drop, self.drop))\n        x_t',
                            'to_device(self.device, t, noise, draw_drops(len(r), generator, 0., self.drop))\n        x_t'),
    'low-resolution tokens not dropped': ('train_sr_arms/cross', 'drop_lr=u[1] < lr)', 'drop_lr=u[1] < 0)'),
    'straight-through gradient removed': ('train_vq_arms/titok_vq',
                                          'z = x + (codes - x).detach()                                            # '
                                          'b n d\n            if self.training and self.revive',
                                          'z = codes.detach()\n            if self.training and self.revive'),
    'codebook not revived': ('train_vq_arms/textok_vq', "if self.training and self.revive != 'none': self.update(x.detach().flatten",
                             "if False: self.update(x.detach().flatten"),
    'commitment forgotten': ('train_vq_arms/textok_vq',
                             "{'vq': codebook + self.commitment * commit, 'commit': commit, 'codebook'",
                             "{'vq': codebook, 'commit': commit, 'codebook'"),
    "the discriminator's turn skipped": ('train_tokenizer/adversarial',
                                         'return self.criterion.discriminator(*self.last) if '
                                         'self.criterion.is_adversarial(step) else None', 'return None'),
    "LeCam's sign": ('train_tokenizer/adversarial', 'F.relu(real - self.fake).square() + F.relu(self.real - fake)',
                     'F.relu(self.fake - real).square() + F.relu(self.real - fake)'),
    'checkpoint without moments of the optimizer': ('train_upscaler/x4',
                                                    "set_moments(phase.opt, phase.params, part(f'opt{i}/'))", 'pass'),
    'divergence averaged instead of summed': ('train_arms/textok_kl',
                                              '(mean.square() + logvar.exp() - 1 - logvar).sum() / len(mean)',
                                              '(mean.square() + logvar.exp() - 1 - logvar).mean()'),
    'images not mirrored': ('train_codes/vqgan', 'if self.flip:\n            x = torch.where', 'if False:\n            x = torch.where'),
    'queries not tied to keys': ('train_sr_recipe/gates', '                k.copy_(q)\n',
                                 '                pass\n'),
    'back-projection dropped from the image loss': ('train_sr/regression',
                                                    'for _ in range(n): x = x + size(lr - size(x, lr.shape[-2:]), '
                                                    'x.shape[-2:])', 'for _ in range(0): pass'),
    'temperature that does not fall': ('train_grid/dalle',
                                       't = min(progress / self.tau_steps, 1.) if self.tau_steps else 1.', 't = 0.'),
    'wavelets that are not means': ('train_grid/cosmos_ci', 'a - b - c + d], 1) / 4', 'a - b - c + d], 1) / 2'),
    'FSQ without rounding': ('train_grid/cosmos_di', 'z = (x + (x.round() - x).detach()) / (self.levels // 2)',
                             'z = x / (self.levels // 2)'),
    'attention in windows without its bias': ('train_grid/omni', '@ key.float().transpose(-2, -1) + bias).softmax(-1)',
                                              '@ key.float().transpose(-2, -1)).softmax(-1)'),
    'entropy of codes at another temperature': ('train_codes/lfq', 'temperature: float = .01, # of the softmax',
                                                'temperature: float = .02, # of the softmax'),
    'smoothing of the contrastive loss': ('train_semantic/seed',
                                          'F.cross_entropy(s, own, label_smoothing=smoothing) for s',
                                          'F.cross_entropy(s, own) for s'),
    'contrastive loss of one direction': ('train_semantic/seed', 'for s in (logits, logits.T)]',
                                          'for s in (logits, logits)]'),
    'dynamic tokenizer without its rate': ('train_semantic/lavit', "self.recipe.rate_weight * parts['rate']",
                                           "0. * parts['rate']"),
    'velocity of flow matching turned round': ('train_rivals/grid', '(pred.float() - (noise - x0).float())',
                                               '(pred.float() - (x0 - noise).float())'),
    'EDM without its weight': ('train_rivals/infdit', 'return ((sigma**2 + 1) / sigma**2) * error',
                               'return 1. * error'),
    'features without noise': ('train_alignment/aligner', 'noise * seen.std(0), noise * read.std(0)',
                               '0. * seen.std(0), noise * read.std(0)'),
    'ridge without shrinkage': ('train_sr/regression', 'strength: float = 1e-4, # added',
                                'strength: float = 1e-1, # added'),
    'decoder left free where it is frozen': ('train_initialisation/frozen',
                                             "if start == 'frozen': tokenizer.decoder.requires_grad_(False)",
                                             "if start == 'frozen': pass"),
    'guide compared with the image': ('train_guide/guide',
                                      "y = self.tokenizer.target(x) if hasattr(self.tokenizer, 'target') else x",
                                      "y = self.tokenizer.target(x.flip(-1)) if hasattr(self.tokenizer, "
                                      "'target') else x"),
}


# What today's probes do not see: open, and stated. Adam hardly notices a missing clip; a model that starts at zero answers
# alike with and without its condition, and to either sign of a velocity; smoothing is nothing among equal logits.
NOT_SEEN = ('gradients not clipped', 'low-resolution tokens not dropped', 'straight-through gradient removed',
            'entropy of codes at another temperature', 'smoothing of the contrastive loss',
            'velocity of flow matching turned round', 'caption not dropped', 'queries not tied to keys')
CASES = [pytest.param(c, marks=pytest.mark.xfail(reason='a blind spot of the probes')) if c in NOT_SEEN else c
         for c in PLANTED]


@pytest.mark.parametrize('case', CASES)
def test_a_changed_result_is_found(case, tmp_path):
    probe, old, new = PLANTED[case]
    change(copy_project(tmp_path), old, new)
    assert behaves(tmp_path, probe), f'{probe} does not see: {case}'


# -- refactorings
# -------------------------------------------------------------------------------------------------------------------


def _rename(root, old, new):
    for p in [*(root/'toksr').rglob('*.py'), *(root/'nbs/study').glob('*.ipynb')]:
        text = p.read_text()
        if re.search(rf'\b{old}\b', text): p.write_text(re.sub(rf'\b{old}\b', new, text))


def _move(root, name, source, target):
    "Move a definition from one module to another (dotted, in the package), which it imports back"
    a, b = (root/'toksr'/f'{m.replace(".", "/")}.py' for m in (source, target))
    text = a.read_text()
    node = next(n for n in ast.parse(text).body if getattr(n, 'name', None) == name)
    lines = text.splitlines(keepends=True)
    first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
    body = ''.join(lines[first-1:node.end_lineno])
    a.write_text(''.join(lines[:first-1]) + f'from toksr.{target} import {name}\n' + ''.join(lines[node.end_lineno:]))
    imports = [ast.unparse(n) for n in ast.parse(text).body if isinstance(n, (ast.Import, ast.ImportFrom))
               and not getattr(n, 'level', 0)]
    b.write_text(b.read_text() + '\n' + '\n'.join(imports) + f'\n{body}')


def _rename_module(root, old, new):
    a, b = (root/'toksr'/f'{m.replace(".", "/")}.py' for m in (old, new))
    a.rename(b)
    short, fresh = old.split('.')[-1], new.split('.')[-1]
    for p in [*(root/'toksr').rglob('*.py'), *(root/'nbs/study').glob('*.ipynb')]:
        text = p.read_text()
        text2 = re.sub(rf'(from [.\w]*\b){short}\b( import )', rf'\g<1>{fresh}\g<2>', text)
        if text2 != text: p.write_text(text2)


REFACTORED = {
    'docstrings and comments': ('train_upscaler/x4',
                                lambda r: change(r, '    "Share of the peak learning rate at a 0-based step: warm-up, '
                                                    'then the schedule down to `final_lr`"\n',
                                                    '    "Another docstring"\n    # and a comment\n')),
    'a function renamed': ('train_upscaler/x4', lambda r: _rename(r, 'lr_factor', 'learning_rate_share')),
    'a class renamed': ('train_arms/textok_kl', lambda r: _rename(r, 'ConvHead', 'PixelHead')),
    'a module renamed': ('train_arms/textok_kl', lambda r: _rename_module(r, 'layers.bottlenecks', 'layers.latents')),
    'a function moved': ('train_arms/tatitok_kl',
                         lambda r: _move(r, 'hinge_generator', 'training.losses', 'training.optimizers')),
    'a class moved': ('train_tokenizer/adversarial',
                      lambda r: _move(r, 'LeCam', 'training.losses', 'training.optimizers')),
    'functions reordered': ('train_alignment/aligner',
                            lambda r: change(r, 'def image_features(net: Lite0',
                                             'def unused(): pass\n\n@torch.no_grad()\ndef image_features(net: Lite0')),
    'a helper inlined': ('train_arms/textok_kl',
                         lambda r: change(r, "terms['adv'] = hinge_generator(self.judge(recon))\n                "
                                             "self.judge.requires_grad_(True)\n            total = sum",
                                             "terms['adv'] = -self.judge(recon).mean()\n                "
                                             "self.judge.requires_grad_(True)\n            total = sum")),
    'a helper taken out': ('train_upscaler/x4',
                           lambda r: change(r, "    down = (1 + math.cos(math.pi * t)) / 2 if cfg.schedule == "
                                               "'cosine' else 1 - t\n", "    down = _down(t, cfg)\n")
                                               or change(r, 'def lr_factor(',
                                                         "def _down(t, cfg): return (1 + math.cos(math.pi * t)) / 2 "
                                                         "if cfg.schedule == 'cosine' else 1 - t\n\ndef lr_factor(")),
    'independent statements reordered': ('train_sr/paper',
                                         lambda r: change(r, "{'latent': loss.detach()}, self.weights['latent'] * loss",
                                                          "{'latent': loss.detach()}, loss * self.weights['latent']")),
    'faster but equal: square': ('train_upscaler/x4',
                                 lambda r: change(r, "parts = {'mse': (sr.float() - hr).square().mean()}",
                                                  "parts = {'mse': F.mse_loss(sr.float(), hr)}")),
    'faster but equal: matrix product': ('train_semantic/seed',
                                         lambda r: change(r, 'self.image(h) @ self.text(pooled).T / ',
                                                          "torch.einsum('ac,bc->ab', self.image(h), "
                                                          "self.text(pooled)) / ")),
    'faster but equal: einsum of wavelets': ('train_grid/cosmos_ci',
                                             lambda r: change(r, '[a + b + c + d, a + b - c - d,',
                                                              '[(a + b) + (c + d), (a + b) - (c + d),')),
    'faster but equal: addcmul': ('train_arms/textok_kl',
                                  lambda r: change(r, 'z = mean + (.5 * logvar).exp() * noise ',
                                                   'z = torch.addcmul(mean, (.5 * logvar).exp(), noise) ')),
    'keywords for places': ('train_upscaler/x8',
                            lambda r: change(r, 'SRResNetConfig(recipe.factor, recipe.channels, recipe.blocks)',
                                             'SRResNetConfig(factor=recipe.factor, width=recipe.channels, '
                                             'blocks=recipe.blocks)')),
    'type annotations': ('train_alignment/aligner',
                         lambda r: change(r, 'def image_features(net: Lite0, images: np.ndarray) -> Tensor:\n  '
                                             '  "Lite0', 'def image_features(net, images):\n    "Lite0')),
    'comprehension for a loop': ('train_upscaler/x4',
                                 lambda r: change(r, 'for phase in loop.phases: phase.freeze(False)\n',
                                                  '[phase.freeze(False) for phase in loop.phases]\n')),
    'format for f-string': ('train_sr/paper',
                            lambda r: change(r, "f'{seed}/{step}/{stream}'.encode()",
                                             "'{}/{}/{}'.format(seed, step, stream).encode()")),
    'a loss in another order': ('train_vq_arms/textok_vq',
                                lambda r: change(r, "{'vq': codebook + self.commitment * commit, 'commit': commit, 'codebook'",
                                                 "{'vq': self.commitment * commit + codebook, 'commit': commit, 'codebook'")),
    'an early return': ('train_tokenizer/adversarial',
                        lambda r: change(r, 'return self.criterion.discriminator(*self.last) if '
                                            'self.criterion.is_adversarial(step) else None',
                                            'if not self.criterion.is_adversarial(step): return None\n        return '
                                            'self.criterion.discriminator(*self.last)')),
    'a constant named': ('train_grid/dalle',
                         lambda r: change(r, 't = min(progress / self.tau_steps, 1.) if self.tau_steps else 1.',
                                          'end = 1.\n        t = min(progress / self.tau_steps, end) if '
                                          'self.tau_steps else end')),
    'an uncalled function in the statistics': ('train_upscaler/x4',
                                               lambda r: change(r, 'def bootstrap(',
                                                                'def nobody_calls_this(): return 1\n\ndef bootstrap(')),
    'a metric changed': ('train_upscaler/x4',
                         lambda r: change(r, 'def frechet(', 'def nobody_calls_this(): return 1\n\ndef frechet(')),
    'a property of tokens written out': ('train_guide/guide',
                                         lambda r: change(r, "y = self.tokenizer.target(x) if hasattr(self.tokenizer, "
                                                             "'target') else x", "has = hasattr(self.tokenizer, "
                                                                                 "'target')\n        y = "
                                                                                 "self.tokenizer.target(x) if has else x")),
}


@pytest.mark.parametrize('case', REFACTORED)
def test_a_refactoring_changes_nothing(case, tmp_path):
    probe, refactor = REFACTORED[case]
    refactor(copy_project(tmp_path))
    assert not (found := behaves(tmp_path, probe)), f'{probe} is alarmed by {case}: {found}'


QUIET = {       # changes that make no analysis stale
    'comments and docstrings': lambda r: change(r,
                                                '    "Encode and decode all images (the mode of the latents): n '
                                                '3 h w."\n', '    # in batches\n    "Encode and decode: n 3 h w."\n'),
    'a definition moved': lambda r: _move(r, 'hinge_generator', 'training.losses', 'training.optimizers'),
    'a module renamed': lambda r: _rename_module(r, 'layers.bottlenecks', 'layers.latents'),
    **{f'an uncalled function in {m}': (lambda r,
                                        m=m: (p := r/f'toksr/{m}.py').write_text(p.read_text()
                                                + '\n\ndef nobody_calls_this(): return 1\n'))
       for m in ('core/stats', 'core/plot', 'metrics/per_image', 'dual/guide', 'dual/dual_tokenizer', 'training/loop')},
}


@pytest.mark.parametrize('case', QUIET)
def test_what_changes_no_analysis(case, tmp_path, prints):
    QUIET[case](copy_project(tmp_path))
    now = fingerprints(tmp_path)
    assert not [s for s in prints if now[s] != prints[s]]


@pytest.fixture(scope='module')
def prints(): return fingerprints(ROOT)


def test_a_changed_metric_changes_the_analyses_that_read_it(tmp_path, prints):
    copy_project(tmp_path)
    text = tmp_path/'toksr/metrics/per_image.py'
    assert 'log10()' in text.read_text()
    text.write_text(text.read_text().replace('log10()', 'log10() * 1.'))
    now = fingerprints(tmp_path)
    changed = {s for s in prints if now[s] != prints[s]}
    assert 'sr_comparison' in changed and not changed & {'corpus', 'architecture', 'claims', 'report', 'paper_costs'}


# -- the book-keeping
# ---------------------------------------------------------------------------------------------------------------


def test_every_training_study_has_probes():
    assert {p.stem for p in (ROOT/'nbs/study').glob('train_*.ipynb')} == set(read_probes(ROOT)) == set(KNOWN)
    assert all(any(p.stop for p in runs.values())
               for runs in read_probes(ROOT).values()), 'one run of each goes on from a checkpoint'


@pytest.mark.parametrize('text,named',
                         [('train_gone:\n  a: {}', 'train_gone: there is no such notebook'),
                          ('train_arms:\n  a: {sizes: 3}', 'train_arms/a: the notebook has no parameter sizes')])
def test_probes_name_what_is_not_there(tmp_path, text, named):
    copy_project(tmp_path)
    (tmp_path/'nbs/study/probes.yaml').write_text(text)
    with pytest.raises(ValueError, match=named): read_probes(tmp_path)


def test_a_damaged_behaviour_is_named(tmp_path):
    (tmp_path/'train_x.json').write_text('{"code": ')
    with pytest.raises(ValueError, match='train_x.json: damaged'): Behaviour.read(tmp_path/'train_x.json')
    assert Behaviour.read(tmp_path/'none.json') == Behaviour()


def test_what_counts_as_apart():
    nan = float('nan')
    np.testing.assert_allclose(apart([1., None, 2.], [1., None, 2.002]), [0, 0, .001])
    assert np.isinf(apart([1., None], [1., 1.])[1]) and np.isinf(apart([1.], [nan])).all() and np.isinf(apart([1., 2.],
            [1.])).all()
    assert noise_of({'step/a': [1., 1., 1.], 'w': [2.]}, {'step/a': [1., 1.01, 1.], 'w': [2.]}) == [0., .01, .01, 0.]
    assert excess({'step/a': [1.]}, [0., 0.], {'step/b': [1.]}) == {'step/a': float('inf'), 'step/b': float('inf')}
    assert excess({'step/a': [1., 1.]}, [0., .01, 0.], {'step/a': [1., 1.19]}) == {}
