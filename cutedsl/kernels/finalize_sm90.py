"""Last step of the routed experts on Hopper: the kernel of `finalize_sm100`, whose module says how it works.

Hopper has no packed sums; the scalar ones give the same bits, as products are rounded before in both.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import ClassVar

import torch

from cutedsl import compile as compiler
from cutedsl.kernels import finalize_sm100, hopper
from cutedsl.kernels.finalize_sm100 import check
from cutedsl.kernels.hopper import ARCHS

__all__ = ["ARCHS", "Config", "FinalizeSm90", "check", "choose_config", "compiled", "finalize"]


@dataclass(frozen=True)
class Config(finalize_sm100.Config):
    """One compiled kernel; attributes as those of `finalize_sm100.Config`."""

    archs: ClassVar[Collection[str]] = ARCHS
    packed: ClassVar[bool] = False

    arch: str = "sm_90a"


def choose_config(top_k: int, y_fp32: bool, shared: bool, arch: str = "sm_90a") -> Config:
    """128 threads, 1024 columns, as `finalize_sm100.choose_config`; not measured on an H200."""
    return Config(top_k, y_fp32, shared, arch=arch).validate()


class FinalizeSm90(finalize_sm100.FinalizeSm100):
    """The kernel of one Config.

    Args:
        config: validated here.
    """

    @property
    def use_pdl(self) -> bool:
        """Launches overlap: see `hopper`."""
        return hopper.USE_PDL


def finalize(
    mY: torch.Tensor,
    choice_row: torch.Tensor,
    topk_weights: torch.Tensor,
    shared: torch.Tensor | None,
    mOut: torch.Tensor,
) -> None:
    """mOut[t] = bf16(sum over j of topk_weights[t, j] * mY[choice_row[t, j]] + shared[t]).

    Args:
        mY: (P, H) bf16 or fp32 - expert outputs at padded rows; rows that no choice names may hold anything.
        choice_row: (T * top_k,) int32 - row of choice (t, j) at t * top_k + j, as route_sm90 gives it: -1 is skipped.
        topk_weights: (T, top_k) fp32.
        shared: (T, H) bf16 - the shared expert's output, or None.
        mOut: (T, H) bf16 - written completely; T may be 0.

    Raises:
        TypeError, ValueError: as `finalize_sm100.finalize`.

    Layout, Numerics: those of `finalize_sm100.finalize`: bit-identical to `cutedsl.routing.reduce_slots`.
    Graph-safe: yes, after one call with the same configuration; the launch is on torch's current stream. Not verified on
    hardware.
    """
    check(mY, choice_row, topk_weights, shared, mOut)
    if mOut.shape[0] == 0:
        return
    config = choose_config(topk_weights.shape[1], mY.dtype == torch.float32, shared is not None)
    compiled(config)(mY, choice_row, topk_weights, shared, mOut)


def compiled(config: Config, line_info: bool | None = None) -> Callable[..., None]:
    """The compiled kernel: takes finalize's tensors, unchecked and T > 0.

    Args:
        config: which kernel.
        line_info: as cutedsl.compile takes it.
    """
    return compiler.compiled(FinalizeSm90, config, lambda: finalize_sm100.stand_ins(config), config.arch, line_info)
