"""Tiny tasks for test_train.py, and runs of them in processes of their own that really die: `python train_cases.py
FOLDER`"""
import hashlib
import json
import os
import signal
import sys
import time
from pathlib import Path

import torch
from torch import nn

from toksr.training import checkpoints as checkpoint
from toksr.training.checkpoints import Checkpoint
from toksr.training.loop import fit, Log, seed_everything, StopOnNonFinite, Task
from toksr.training.optimizers import TrainConfig

N = 40


class Plain(Task):
    "A net with dropout (global generator), batch norm (buffers) and noise of its own."
    def __init__(self, n: int = N):
        torch.manual_seed(0)
        self.modules = {'net': nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(.1),
                                             nn.Linear(16, 16), nn.Linear(16, 4))}
        self.x = torch.randn(n, 4, generator=torch.Generator().manual_seed(1))

    def loss(self, step, indices, generator):
        x = self.x[indices]
        out = self.modules['net'](x + .1 * torch.randn(x.shape, generator=generator))
        mse = (out - x.flip(1)).square().mean()
        return mse, {'mse': mse.detach()}


class Gan(Plain):
    "The same with a discriminator that begins at step 5."
    def __init__(self, n: int = N):
        super().__init__(n)
        self.second_modules = {'disc': nn.Sequential(nn.Linear(4, 8), nn.LeakyReLU(.1), nn.Linear(8, 1))}

    def loss(self, step, indices, generator):
        x = self.x[indices]
        self.fake = self.modules['net'](x + .1 * torch.randn(x.shape, generator=generator))
        mse = (self.fake - x.flip(1)).square().mean()
        adv = -self.second_modules['disc'](self.fake).mean() * (step >= 5)
        return mse + .1 * adv, {'mse': mse.detach(), 'adv': adv.detach()}

    def second_loss(self, step, indices, generator):
        if step < 5: return None
        disc = self.second_modules['disc']
        real, fake = disc(self.x[indices].flip(1)), disc(self.fake.detach())
        return (1 - real).relu().mean() + (1 + fake).relu().mean(), {'real': real.mean().detach()}


CASES = {
    'plain': (Plain, TrainConfig(steps=30, batch=8, lr=1e-2, warmup=4, ema=.9, seed=3)),
    'gan_muon': (Gan, TrainConfig(steps=30, batch=8, lr=1e-2, muon_lr=.02, optimizer='muon', schedule='trapezoid',
                                  ema=.9, second_lr=1e-2, micro=2)),
}


def die(): os.kill(os.getpid(), signal.SIGKILL)


class MidStep:
    "Dies between the backward pass and the optimizer (of the second network if there is one)."
    def backward(self, loop):
        if loop.step == 17 and loop.phase is loop.phases[-1]: die()


class AfterSave:
    "Dies just after a checkpoint was written."
    def stepped(self, loop):
        if loop.step == 20: die()


def torn_save(tensors, path):
    "Writes half a file, and dies, at the second checkpoint."
    if (Path(path).parent.parent / 'step-000000010').exists():
        whole = checkpoint.torch_save(tensors)
        Path(path).write_bytes(whole[:len(whole) // 2])
        die()
    checkpoint.real_save(tensors, path)


def run(case: str, folder: Path, how: str, wait: float = 0.) -> None:
    "Train one case; write the hash of everything that came out."
    make, cfg = CASES[case]
    seed_everything(cfg.seed)
    first, last = [], []
    if how == 'mid_step': first = [MidStep()]
    if how == 'after_save': last = [AfterSave()]
    if how == 'mid_write':
        from safetensors.torch import save
        checkpoint.real_save, checkpoint.torch_save, checkpoint.save_file = checkpoint.save_file, save, torn_save
    if how == 'slow': first = [type('Slow', (), {'stepped': lambda self, loop: time.sleep(wait)})()]
    task = make()
    ckpt = [] if how == 'whole' else [Checkpoint(folder, every=10 if how != 'slow' else 3)]
    result = fit(task, cfg, N, callbacks=[StopOnNonFinite(), *first, *ckpt, *last])
    h = hashlib.sha256()
    nets = {**task.modules, **task.second_modules}
    for state in [result.ema_state['net'], *(m.state_dict() for m in nets.values())]:
        for k, t in sorted(state.items()): h.update(k.encode() + t.detach().contiguous().numpy().tobytes())
    h.update(json.dumps(result.log).encode())
    (folder.parent / f'{folder.name}-{how}.json').write_text(json.dumps(dict(hash=h.hexdigest(),
            resumed_at=result.resumed_at, rows=len(result.log))))


def in_child(*args, kill_after: float | None = None) -> int:
    "Run in a forked process; its wait status as a return code, -9 when it was killed."
    pid = os.fork()
    if not pid:
        try:
            run(*args)
            os._exit(0)
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def main(root: Path) -> None:
    "All cases and all deaths; prints one json line."
    import torch._dynamo  # noqa: F401  every optimizer imports it (1 s), better once before the forks
    codes = {}
    for case in CASES:
        folder = root / case
        codes[case, 'whole'] = in_child(case, folder, 'whole')
        codes[case, 'fresh'] = in_child(case, root / f'{case}-again', 'whole')
        for how in ('mid_step', 'mid_write', 'after_save'):
            where = root / f'{case}-{how}'
            codes[case, how] = in_child(case, where, how)
            codes[case, how + ' again'] = in_child(case, where, 'rest')
    where = root / 'plain-slow'
    for k in range(4): codes['plain', f'slow {k}'] = in_child('plain', where, 'slow', .05, kill_after=.4 + .15 * k)
    codes['plain', 'slow rest'] = in_child('plain', where, 'slow', 0.)
    print(json.dumps({' '.join(k): v for k, v in codes.items()}))


if __name__ == '__main__': main(Path(sys.argv[1]))
