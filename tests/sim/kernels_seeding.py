"""The good kernel into which seeded_linear.py puts faults: the repository's NVFP4 linear on a small problem."""

import functools

import numpy as np
import torch
from seeding import Base, Prepared

from cutedsl.kernels import linear_sm100
from cutedsl.kernels.linear_sm100 import Config
from cutedsl.layout import swizzle_block_scale
from ptxsim.host.capture import capture, prepare_environment
from ptxsim.launch import Launch
from ptxsim.memory import Buffer

prepare_environment()

# Every pipeline is as short as it can be: each barrier wraps often. 3 tiles of 2 steps by one CTA; ragged m, n and k.
LINEAR = Config(tile_n=128, num_ab_stages=2, num_acc_stages=1, num_d_stages=1)
M, N, K = 72, 264, 320
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


@functools.cache
def _linear_inputs() -> tuple[tuple[torch.Tensor, ...], np.ndarray]:
    rng = np.random.default_rng(7)

    def operand(rows: int) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
        codes = rng.integers(0, 256, (rows, K // 2), dtype=np.uint8)
        scale = torch.from_numpy(rng.integers(0x28, 0x48, (rows, K // 16), dtype=np.uint8)).view(torch.float8_e4m3fn)
        values = np.empty((rows, K))
        values[:, 0::2], values[:, 1::2] = E2M1[codes & 15], E2M1[codes >> 4]
        return torch.from_numpy(codes), scale, values * np.repeat(scale.double().numpy(), 16, axis=1)

    (a, sfa, a_values), (b, sfb, b_values) = operand(M), operand(N)
    alpha = rng.random(N, dtype=np.float32) + 0.5
    expected = a_values @ b_values.T * alpha
    return (a, b, swizzle_block_scale(sfa), swizzle_block_scale(sfb), torch.from_numpy(alpha)), expected


@functools.cache
def _pristine() -> tuple[torch.Tensor, ...]:
    """Copies of the inputs: a fault may change them."""
    return tuple(tensor.clone() for tensor in _linear_inputs()[0])


@functools.cache
def _linear_capture() -> tuple[Launch, torch.Tensor]:
    d = torch.empty(M, N, dtype=torch.bfloat16)
    [launch] = capture(linear_sm100.compiled(LINEAR), *_linear_inputs()[0], d, 1)
    return launch, d


def _prepare_linear() -> Prepared:
    inputs, expected = _linear_inputs()
    launch, d = _linear_capture()
    d.fill_(float("nan"))
    for tensor, kept in zip(inputs, _pristine(), strict=True):
        tensor.view(torch.uint8).copy_(kept.view(torch.uint8))
    names = ("a", "b", "sfa", "sfb", "alpha")
    memory = [Buffer.of(tensor, name, readonly=True) for name, tensor in zip(names, inputs, strict=True)]
    memory.append(Buffer.of(d, "d", initialised=False, must_be_written=True))

    def is_right() -> bool:
        # BF16 has 8 bits: half an ulp, and a little for sums in another order.
        return bool(np.allclose(d.double().numpy(), expected, rtol=2**-8, atol=1e-3 * np.abs(expected).max()))

    return Prepared(launch, memory, is_right)


linear = Base("linear", _prepare_linear)
