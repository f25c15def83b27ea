"""Routing on Hopper: the kernel of `route_sm100`, which uses nothing of Blackwell; its module says how it works."""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import ClassVar

import torch

from cutedsl import compile as compiler
from cutedsl.kernels import hopper, route_sm100
from cutedsl.kernels.hopper import ARCHS
from cutedsl.kernels.route_sm100 import Route, check, cluster_size, route_sizes

__all__ = ["ARCHS", "Config", "Route", "RouteSm90", "check", "choose_config", "compiled", "route", "route_sizes"]


@dataclass(frozen=True)
class Config(route_sm100.Config):
    """One compiled kernel; attributes as those of `route_sm100.Config`."""

    archs: ClassVar[Collection[str]] = ARCHS

    arch: str = "sm_90a"


def choose_config(num_tokens: int, top_k: int, id_bits: int, mapped: bool, arch: str = "sm_90a") -> Config:
    """One CTA for a small batch, the largest cluster for others; as `route_sm100.choose_config`.

    The choice follows from counting steps; it has not been measured on an H200.
    """
    return Config(top_k, id_bits, mapped, cluster_size(num_tokens * top_k), arch).validate()


class RouteSm90(route_sm100.RouteSm100):
    """The kernel of one Config.

    Args:
        config: validated here.
    """

    @property
    def use_pdl(self) -> bool:
        """Launches overlap: see `hopper`."""
        return hopper.USE_PDL


def route(topk_ids: torch.Tensor, expert_map: torch.Tensor | None, out: Route) -> None:
    """Sorts choices by expert, stably, and gives every slot its padded row.

    Args:
        topk_ids: (T, top_k) int32 or int64 - ids of experts, local ones or, with a map, global ones; T may be 0. -1, and
            any other id outside the experts (or the map), is a choice without an expert on this rank.
        expert_map: (num_global_experts,) int32 - local id of each global one, or -1; None: ids are local.
        out: written completely; its sizes are those of route_sizes, E is the size of `count`, at most 512.

    Raises:
        TypeError, ValueError: as `route_sm100.route`.

    Layout, Numerics: those of `route_sm100.route`.
    Graph-safe: yes, after one call with the same configuration; the launch is on torch's current stream, nothing is
    allocated and nothing read back.
    """
    check(topk_ids, expert_map, out)
    num_tokens, top_k = topk_ids.shape
    config = choose_config(num_tokens, top_k, topk_ids.element_size() * 8, expert_map is not None)
    compiled(config)(topk_ids, expert_map, *out)


def compiled(config: Config, line_info: bool | None = None) -> Callable[..., None]:
    """The compiled kernel: takes topk_ids, expert_map or None, and the tensors of a Route, unchecked.

    Args:
        config: which kernel.
        line_info: as cutedsl.compile takes it.
    """
    return compiler.compiled(RouteSm90, config, lambda: route_sm100.stand_ins(config), config.arch, line_info)
