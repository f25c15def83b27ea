"""Runs a probe in the simulator."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ptxsim import tensormap
from ptxsim.api import simulate
from ptxsim.findings import Report
from ptxsim.launch import Launch
from ptxsim.memory import Buffer

from .kit import INTERLEAVES, OOB_FILLS, PROMOTIONS, SWIZZLES, Case, TensorMap

ALIGNMENT = 1024


def as_simulated(tensor: TensorMap, address: int) -> tensormap.TensorMap:
    """Return the simulator's description of a map."""
    return tensormap.TensorMap(
        global_address=address,
        dtype=tensor.dtype,
        dims=tensor.dims,
        strides_bytes=tensor.strides,
        box=tensor.box,
        element_strides=tensor.steps(),
        swizzle=tensormap.Swizzle(SWIZZLES[tensor.swizzle]),
        interleave=tensormap.Interleave(INTERLEAVES[tensor.interleave]),
        oob_fill=tensormap.OobFill(OOB_FILLS[tensor.oob_fill]),
        l2_promotion=PROMOTIONS[tensor.promotion],
    )


def aligned_copy(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return a copy that starts at a multiple of ALIGNMENT, as on the GPU."""
    block = np.empty(array.nbytes + ALIGNMENT, dtype=np.uint8)
    start = -block.ctypes.data % ALIGNMENT
    view = block[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    view[...] = array
    return view


def simulated(
    case: Case, policy: str, seed: int = 0, maps: Sequence[bytes] = ()
) -> tuple[dict[str, np.ndarray[Any, Any]], Report]:
    """Run a probe; return its output buffers as bytes, and the report.

    `maps` are the tensor maps that the driver made on the GPU, if they are known; their addresses are replaced.
    """
    arrays = {name: aligned_copy(array) for name, array in case.buffers.items()}
    params = [array.ctypes.data.to_bytes(8, "little") for array in arrays.values()]
    for i, tensor in enumerate(case.maps):
        address = arrays[tensor.buffer].ctypes.data + tensor.offset
        if maps:
            params.append(address.to_bytes(8, "little") + maps[i][8:])
        else:
            params.append(tensormap.encode(as_simulated(tensor, address)))
    launch = Launch(
        ptx=case.ptx,
        entry="probe",
        grid=case.grid,
        block=(case.block, 1, 1),
        cluster=case.cluster,
        shared_bytes=case.shared_bytes,
        params=tuple(params),
        attributes={"programmatic_stream_serialization": 1} if case.programmatic else {},
    )
    memory = [Buffer.of(array, name=name) for name, array in arrays.items()]
    report = simulate(launch, memory, policy=policy, seed=seed)
    return {name: arrays[name].view(np.uint8).reshape(-1) for name in case.outputs}, report
