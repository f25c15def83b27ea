"""Importing this module registers every decoder."""

from ptxsim import (
    alu,
    barriers,
    bulk,
    convert,
    floats,
    launch_ops,
    matrix_ops,
    memory_ops,
    tcgen05,
    tensormap_ops,
    warp_ops,
    wgmma,
)

__all__ = [
    "alu",
    "barriers",
    "bulk",
    "convert",
    "floats",
    "launch_ops",
    "matrix_ops",
    "memory_ops",
    "tcgen05",
    "tensormap_ops",
    "warp_ops",
    "wgmma",
]
