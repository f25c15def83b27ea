"""What users call: simulate one launch, or run a compiled CuTe DSL function."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import ptxsim.semantics  # noqa: F401 - registers the decoders
from ptxsim import ptx
from ptxsim.codegen import Program, compile_kernel
from ptxsim.findings import LAUNCH, Finding, Report, Unsupported
from ptxsim.launch import Launch, check_launch
from ptxsim.machine import MAX_INSTRUCTIONS, Machine
from ptxsim.memory import Buffer
from ptxsim.trace import Trace

_programs: dict[tuple[str, str], tuple[ptx.Module, Program]] = {}
_collecting: list[list[Trace]] = []


def load(text: str, entry: str) -> tuple[ptx.Module, Program]:
    """The parsed module and the compiled entry; both are kept, keyed by the text.

    Raises:
        Unsupported: something in the entry is not known.
        ValueError: no such entry.
    """
    key = (text, entry)
    if key not in _programs:
        module = ptx.parse(text)
        if entry not in module.kernels:
            raise ValueError(f"entry {entry!r} is not in the PTX text; it has {', '.join(module.kernels) or 'none'}")
        _programs[key] = module, compile_kernel(module.kernels[entry])
    return _programs[key]


@contextmanager
def traced() -> Iterator[list[Trace]]:
    """Collects a trace of every launch simulated inside."""
    traces: list[Trace] = []
    _collecting.append(traces)
    try:
        yield traces
    finally:
        _collecting.pop()


def simulate(
    launch: Launch,
    memory: Sequence[Buffer],
    *,
    policy: str = "eager",
    seed: int = 0,
    trace: bool = False,
    resident_clusters: int | None = None,
    check_outputs: bool = True,
    max_instructions: int = MAX_INSTRUCTIONS,
) -> Report:
    """Runs one launch on host memory.

    Args:
        launch: kernel, grid, parameters.
        memory: all that it may access; a buffer remembers over launches which of its bytes were written.
        policy: when asynchronous operations complete: "eager", "random" or "lazy".
        seed: of the random policy.
        trace: keep a timeline.
        resident_clusters: how many clusters are on the GPU at a time (default 8; a cooperative launch: all).
        check_outputs: buffers that must be written are checked at the end of this launch.
        max_instructions: budget of warp instructions; a launch that does not end within it is reported as a deadlock. What
            a warp may run at a time counts, run or not.

    Returns:
        Findings, counters and the timeline. Findings do not raise: call `check()`.

    Raises:
        Unsupported: something in the kernel is not known.
        ValueError: bad arguments.
    """
    faults = check_launch(launch)
    if faults:
        return Report([Finding(LAUNCH, message, launch.entry) for _, message in faults])
    module, program = load(launch.ptx, launch.entry)
    timeline = Trace() if trace or _collecting else None
    machine = Machine(
        launch, module, program, memory, policy, seed, timeline, resident_clusters, check_outputs, max_instructions
    )
    report = machine.run()
    report.trace = timeline
    if _collecting and timeline is not None:
        _collecting[-1].append(timeline)
    return report


def run(
    compiled: Any,
    *args: Any,
    outputs: Sequence[Any] = (),
    memory: Sequence[Any] = (),
    constant: Sequence[Any] = (),
    policy: str = "eager",
    seed: int = 0,
    check: bool = True,
    trace: bool = False,
    ptx: str | None = None,
    resident_clusters: int | None = None,
    max_instructions: int = MAX_INSTRUCTIONS,
) -> Report:
    """Calls a compiled CuTe DSL function with a simulated GPU behind it; results land in the tensors.

    Args:
        compiled: JIT, TVM-FFI or AOT function.
        *args: what it takes: CPU tensors, pointers, scalars.
        outputs: tensors that count as uninitialised before the launch and must be written completely.
        memory: further tensors that pointers and CuTe tensors among the arguments refer to.
        constant: of all these the ones that no launch still running may write: with programmatic_stream_serialization a
            kernel may read them before griddepcontrol.wait.
        policy, seed, trace, resident_clusters, max_instructions: as simulate.
        check: raise if there is a finding.
        ptx: the kernels' text, for an AOT object that has none beside it.

    Returns:
        One report for all launches of the call; its trace is the last launch's.

    Raises:
        FindingsError: there are findings, and `check` is set.
        Unsupported: something in a kernel is not known.
    """
    from ptxsim.host.capture import capture

    launches = capture(compiled, *args, ptx=ptx)
    buffers = _buffers(args, outputs, memory, constant)
    total = Report()
    for i, launch in enumerate(launches):
        report = simulate(
            launch,
            buffers,
            policy=policy,
            seed=seed,
            trace=trace,
            resident_clusters=resident_clusters,
            check_outputs=i == len(launches) - 1,
            max_instructions=max_instructions,
        )
        total.merge([report])
        total.trace = report.trace
        if report.findings:
            break
    return total.check() if check else total


def _buffers(
    args: Sequence[Any], outputs: Sequence[Any], memory: Sequence[Any], constant: Sequence[Any]
) -> list[Buffer]:
    """One buffer for every distinct tensor; outputs start uninitialised."""
    buffers: dict[int, Buffer] = {}
    constants = {Buffer.of(tensor).address for tensor in constant}
    for i, tensor in enumerate(outputs):
        buffer = Buffer.of(tensor, name=f"output {i}", initialised=False, must_be_written=True)
        buffers[buffer.address] = buffer
    for i, item in enumerate([*args, *memory]):
        if isinstance(item, Buffer):
            buffers.setdefault(item.address, item)
            continue
        inner = getattr(item, "tensor", item)
        is_torch = hasattr(inner, "data_ptr") and hasattr(inner, "element_size")
        if not is_torch and not hasattr(inner, "__array_interface__"):
            # Scalars, streams, pointers and CuTe tensors: what the last two point to comes in `memory`.
            continue
        buffer = Buffer.of(inner, name=f"tensor {i}")
        if buffer.address in constants:
            buffer = replace(buffer, constant=True)
        buffers.setdefault(buffer.address, buffer)
    return [buffer for buffer in buffers.values() if buffer.num_bytes]


__all__ = ["Unsupported", "load", "run", "simulate", "traced"]
