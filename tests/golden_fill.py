"""Weights and inputs for the golden tests, the same on every machine.

A number depends only on the name of its tensor and its place in it: CRC-32 of the name and the index go through the
splitmix64
mixer, and the top 53 bits become a float in [0,1). No random generator of any library is involved, so no version can
change it.
"""
import zlib

import numpy as np
import torch

STEP, SALT, MIX = 0x9E3779B97F4A7C15, 0xD1B54A32D192ED03, ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))


def uniform(name: str, n: int) -> np.ndarray:
    "n float64 numbers in [0,1) that belong to a name."
    u64 = np.uint64
    with np.errstate(over='ignore'):
        x = np.arange(1, n + 1, dtype=u64) * u64(STEP) + u64(zlib.crc32(name.encode())) * u64(SALT)
        for shift, factor in MIX: x = (x ^ (x >> u64(shift))) * u64(factor)
        x = x ^ (x >> u64(31))
    return (x >> u64(11)) / 2.**53


def tensor(name: str, shape: tuple[int, ...], lo: float = -1., hi: float = 1.) -> torch.Tensor:
    "Named float32 tensor, uniform in [lo, hi)."
    values = lo + (hi - lo) * uniform(name, int(np.prod(shape)))
    return torch.from_numpy(values.astype(np.float32)).reshape(shape)


@torch.no_grad()
def fill_(module: torch.nn.Module, std: float = .05) -> torch.nn.Module:
    """Overwrite a module's state by key: norm gains near 1, everything else uniform with the given std; fixed
    kernels stay."""
    for name, value in module.state_dict().items():
        if not value.is_floating_point() or name.endswith('kernel'): continue
        is_gain = value.ndim == 1 and name.endswith('weight')
        value.copy_(1 + tensor(name, value.shape, -.1, .1) if is_gain
                    else tensor(name, value.shape, -std * 3**.5, std * 3**.5))
    return module
