"""What a conformance case is: a public kernel, its inputs, what it must give, and how to run it."""

import os
import types
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import torch

import ptxsim
from ptxsim.findings import Report
from ptxsim.host.capture import as_device_tensor

POLICIES = ("eager", "random", "lazy")
# Persistent kernels get this many clusters, so that each does several tiles.
CLUSTERS = 2


@dataclass(frozen=True)
class Call:
    """One call of a compiled function.

    Attributes:
        compiled: what cute.compile returned.
        args: its arguments.
        check: raises AssertionError if the outputs are wrong.
        outputs: tensors that the kernel writes completely.
        memory: further tensors that it may access.
        constant: of all these the ones that it reads before griddepcontrol.wait: weights, and what belongs to them.
    """

    compiled: Any
    args: tuple[Any, ...]
    check: Callable[[], None]
    outputs: tuple[torch.Tensor, ...] = ()
    memory: tuple[torch.Tensor, ...] = ()
    constant: tuple[torch.Tensor, ...] = ()


@dataclass(frozen=True)
class Case:
    """A kernel in one configuration.

    Attributes:
        name: short and unique.
        package: whose kernel it is; a folder of the conformance packages.
        arch: what it is compiled for.
        prepare: (seed, nightly size?) -> the call.
        nightly_only: adds little to the other cases of its kernel.
        policies: under which it is right.
    """

    name: str
    package: str
    arch: str
    prepare: Callable[[int, bool], Call]
    nightly_only: bool = False
    policies: tuple[str, ...] = POLICIES

    def run(self, policy: str = "eager", seed: int = 0, nightly: bool = False) -> Report:
        """Simulate the kernel and compare.

        Args:
            policy: order of asynchronous completions.
            seed: of the inputs and of the policy.
            nightly: the larger size.

        Raises:
            AssertionError: a finding, or a wrong result.
        """
        call = self.prepare(seed, nightly)
        report = ptxsim.run(
            call.compiled,
            *call.args,
            outputs=call.outputs,
            memory=call.memory,
            constant=call.constant,
            policy=policy,
            seed=seed,
        )
        call.check()
        return report


def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """Memory as cudaMalloc gives it: aligned to 256 bytes; what is in it must not matter."""
    count = int(np.prod(shape)) * dtype.itemsize
    storage = torch.full((count + 256,), 0xFF, dtype=torch.uint8)
    start = -storage.data_ptr() % 256
    return storage[start : start + count].view(dtype).reshape(shape)


def device(values: Any, dtype: torch.dtype | None = None) -> torch.Tensor:
    """A copy of a NumPy array or tensor in such memory; uint8 arrays may be given another dtype of one byte."""
    source = torch.as_tensor(values)
    if dtype is not None:
        source = source.view(dtype) if source.dtype == torch.uint8 and dtype.itemsize == 1 else source.to(dtype)
    target = empty(*source.shape, dtype=source.dtype)
    target.view(torch.uint8).copy_(source.contiguous().view(torch.uint8))
    return target


def pointer(dtype: Any, target: torch.Tensor | None, align: int = 16) -> Any:
    """A CuTe pointer to a tensor; to nowhere in particular for compiling."""
    import cutlass.cute as cute
    from cutlass.cute.runtime import make_ptr

    address = 4096 if target is None else target.data_ptr()
    return make_ptr(dtype, address, cute.AddressSpace.gmem, assumed_align=align)


def stream() -> Any:
    """The null stream."""
    import cuda.bindings.driver as cuda

    return cuda.CUstream(0)


# Calls that host code made of compiled functions; its caches keep the stand-ins, so this outlives one `recorded`.
_calls: list[tuple[Any, tuple[Any, ...]]] = []


class _Recorder:
    """Stands in for a compiled function in a package's own host code: notes the call, so that it can be simulated."""

    def __init__(self, compiled: Any) -> None:
        self._compiled = compiled

    def __call__(self, *args: Any) -> None:
        _calls.append((self._compiled, args))


def recorded(host: Callable[[], object]) -> list[tuple[Any, tuple[Any, ...]]]:
    """Calls host code; returns (compiled function, arguments) of the calls it makes of compiled kernels, in place of them."""
    import cutlass.cute as cute

    compile_kernel = cute.compile
    _calls.clear()
    with stand_in_device(), mock.patch.object(cute, "compile", lambda *a, **k: _Recorder(compile_kernel(*a, **k))):
        host()
    return list(_calls)


def nested_tensors(value: Any, found: list[torch.Tensor]) -> Any:
    """`value` with every tensor in its tuples wrapped for the device, and those tensors appended to `found`."""
    if isinstance(value, torch.Tensor):
        found.append(value)
        return as_device_tensor(value)
    if isinstance(value, tuple):
        items = [nested_tensors(item, found) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    return value


LINE_INFO = os.environ.get("NVFP4_CONFORMANCE_LINES", "0") == "1"
MULTIPROCESSORS = 4
SHARED_BYTES = 232448


@contextmanager
def stand_in_device(shared_bytes: int = SHARED_BYTES) -> Iterator[None]:
    """Answers, inside, for the queries that choosing and compiling a kernel makes of a device.

    Args:
        shared_bytes: shared memory of a CTA; a small number makes some kernels spread a row over a cluster.
    """
    import cutlass.cute  # noqa: F401  (makes the DSL's instances)
    from cutlass.base_dsl.dsl import DSLSingletonMeta
    from cutlass.base_dsl.runtime import cuda
    from cutlass.utils import HardwareInfo

    capability = (int(os.environ["CUTE_DSL_ARCH"].strip("sm_a")) // 10, 0)
    properties = types.SimpleNamespace(
        name="stand-in",
        major=capability[0],
        minor=0,
        multi_processor_count=MULTIPROCESSORS,
        shared_memory_per_block_optin=shared_bytes,
        shared_memory_per_multiprocessor=SHARED_BYTES + 1024,
        max_threads_per_multi_processor=2048,
        L2_cache_size=1 << 20,
    )
    answers: list[tuple[Any, str, Any]] = [
        (torch.cuda, "current_device", lambda: 0),
        (torch.cuda, "get_device_properties", lambda *_: properties),
        (torch.cuda, "get_device_capability", lambda *_: capability),
        (HardwareInfo, "__init__", lambda *_, **__: None),
        (HardwareInfo, "get_max_active_clusters", lambda *_, **__: CLUSTERS),
        (HardwareInfo, "get_device_multiprocessor_count", lambda *_: MULTIPROCESSORS),
        # Of the attributes only the shared memory of a multiprocessor is asked for.
        (cuda, "get_device_attribute", lambda *_: SHARED_BYTES + 1024),
    ]
    # Line information triples the compile time of a long kernel; set $NVFP4_CONFORMANCE_LINES=1 to have it in findings.
    answers += [(dsl.envar, "lineinfo", LINE_INFO) for dsl in DSLSingletonMeta._instances.values()]
    with ExitStack() as stack:
        for owner, name, answer in answers:
            stack.enter_context(mock.patch.object(owner, name, answer))
        yield
