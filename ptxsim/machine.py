"""The simulated GPU: clusters, CTAs, warps, divergence, scheduling, completion policies, deadlocks.

A warp is a set of paths: lanes that share a program counter. Lanes that a branch separates run apart until the branch's
immediate post-dominator, where they wait for each other and run on together: what the hardware's convergence barriers do for
structured code. Asynchronous operations (copies, tensor-core work) wait in the engine until the policy completes them:

* eager: at issue, as soon as what was issued before in the same in-order queue is done;
* random: at random moments, warps and operations picked by a seeded generator;
* lazy: only when no warp can run, or none has waited for long (a warp that polls can always run); newest load first, stores
  last.

Each order is one that hardware may take; they find different faults.
"""

import random
from collections import defaultdict, deque
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from ptxsim import findings as codes
from ptxsim import ptx
from ptxsim.barriers import check_exit as check_barriers_at_exit
from ptxsim.barriers import warp_exited
from ptxsim.codegen import BLOCKED, DIVERGED, EXITED, Program
from ptxsim.findings import Finding, Report, Stop, Unsupported
from ptxsim.launch import Launch
from ptxsim.memory import LOCAL_WINDOW, PARAM_WINDOW, Buffer, GlobalMemory, SharedMemory
from ptxsim.registry import BLOCK
from ptxsim.tmem import TensorMemory
from ptxsim.values import FULL, LANE_IDS, Value, lanes_of

Clock = npt.NDArray[np.uint32]
AGENTS = ("tma", "tensor", "copy", "store")
SHARED_BASE = 0x400
POLICIES = ("eager", "random", "lazy")
# Warp instructions after which a launch counts as one that never ends: some minutes.
MAX_INSTRUCTIONS = 50_000_000
QUANTUM = {"eager": 512, "random": 64, "lazy": 512}
# Turns of warps after which "lazy" completes an operation although warps can run: one that polls memory can always run.
PATIENCE = 256


class WaitQueue:
    """Paths that sleep until something happens."""

    def __init__(self, machine: "Machine") -> None:
        self._machine = machine
        self._paths: list[Path] = []

    def add(self, path: "Path") -> None:
        """Puts a path to sleep here."""
        self._paths.append(path)

    def wake(self) -> None:
        """Makes every sleeping path runnable; each runs its instruction again."""
        if not self._paths:
            return
        paths, self._paths = self._paths, []
        for path in paths:
            path.why = None
            self._machine.make_runnable(path.warp)


@dataclass(slots=True)
class Region:
    """Lanes that a branch separated: they meet again at segment `join`, inside region `parent`."""

    join: int
    mask: int
    parent: "Region | None"
    arrived: int = 0


@dataclass(slots=True, eq=False)
class Path:
    """Lanes of a warp that run together."""

    warp: "Warp"
    segment: int
    mask: int
    region: Region | None = None
    why: str | Callable[[], str] | None = None
    state: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Issue:
    """Who started an asynchronous operation, and what it may rely on: `clock` is also what its completion publishes."""

    warp: "Warp"
    ins: ptx.Instruction
    thread: int
    tick: int
    clock: Clock


@dataclass(slots=True, eq=False)
class AsyncOp:
    """An operation that completes when the policy says so; ops of one queue complete in order."""

    kind: str
    queue: Hashable | None
    run: Callable[[], None]
    what: str
    issue: Issue
    serial: int = 0


class AsyncEngine:
    """Holds asynchronous operations and completes them."""

    def __init__(self, machine: "Machine") -> None:
        self._machine = machine
        self._free: list[AsyncOp] = []
        self._queues: dict[Hashable, deque[AsyncOp]] = {}
        self._serial = 0

    def submit(self, op: AsyncOp) -> None:
        """Takes an operation; under `eager` it may complete before this returns."""
        self._serial += 1
        op.serial = self._serial
        trace = self._machine.trace
        if trace is not None:
            trace.begin_async(op)
        if op.queue is None:
            if self._machine.policy == "eager":
                self._complete(op)
            else:
                self._free.append(op)
            return
        queue = self._queues.get(op.queue)
        if queue is None:
            queue = self._queues[op.queue] = deque()
        if self._machine.policy == "eager" and not queue:
            self._complete(op)
            return
        queue.append(op)
        if self._machine.policy == "eager":
            self.drain(op.queue)

    def drain(self, key: Hashable) -> None:
        """Completes everything in one queue."""
        queue = self._queues[key]
        while queue:
            self._complete(queue.popleft())

    def pending(self) -> list[AsyncOp]:
        """Operations that could complete next."""
        return self._free + [queue[0] for queue in self._queues.values() if queue]

    def all_pending(self) -> list[AsyncOp]:
        """Every operation that has not completed."""
        return self._free + [op for queue in self._queues.values() for op in queue]

    def step_random(self, rng: random.Random) -> bool:
        """Completes one operation picked at random."""
        ready = self.pending()
        if not ready:
            return False
        self._take(rng.choice(ready))
        return True

    def step_lazy(self) -> bool:
        """Completes the one that a program may rely on least: newest load first, stores last."""
        ready = self.pending()
        if not ready:
            return False
        rank = {"load": 0, "copy": 1, "tensor": 2, "store": 3}
        self._take(min(ready, key=lambda op: (rank[op.kind], -op.serial)))
        return True

    def _take(self, op: AsyncOp) -> None:
        if op.queue is None:
            self._free.remove(op)
        else:
            queue = self._queues[op.queue]
            queue.popleft()
            if not queue:
                del self._queues[op.queue]
        self._complete(op)

    def _complete(self, op: AsyncOp) -> None:
        machine = self._machine
        outer, machine.completing = machine.completing, op
        op.run()
        machine.completing = outer
        if machine.trace is not None:
            machine.trace.end_async(op)


class Warp:
    """32 lanes of a CTA, their registers, paths and vector clock."""

    def __init__(self, cta: "CTA", index: int) -> None:
        self.cta, self.index = cta, index
        self.cluster: Cluster = cta.cluster
        self.machine: Machine = cta.machine
        self.first_tid = index * 32
        count = min(32, cta.num_threads - self.first_tid)
        self.active: int = (1 << count) - 1
        self.R: list[Any] = [None] * len(self.machine.program.kernel.registers)
        self.thread: int = cta.first_thread + index
        self.clock: Clock = np.zeros(self.cluster.num_clock_threads, np.uint32)
        self.clock[self.thread] = 1
        self.at = 0
        self.state: dict[str, Any] = {}
        self.path: Path = Path(self, 0, self.active)
        self.paths = [self.path]
        self.specials = self._specials()
        self.executed = 0
        self.queued = False

    def _specials(self) -> dict[str, Value]:
        cta, machine = self.cta, self.machine
        block, grid, cluster = machine.launch.block, machine.launch.grid, machine.launch.cluster
        linear = self.first_tid + LANE_IDS
        out: dict[str, Value] = {
            "%tid.x": linear % np.uint32(block[0]),
            "%tid.y": (linear // np.uint32(block[0])) % np.uint32(block[1]),
            "%tid.z": linear // np.uint32(block[0] * block[1]),
            "%laneid": LANE_IDS,
            "%warpid": self.index,
            "%nwarpid": len(cta.warps) or -(-cta.num_threads // 32),
            "%smid": cta.index,
            "%nsmid": max(1, machine.launch.grid[0] * machine.launch.grid[1] * machine.launch.grid[2]),
            "%gridid": 0,
            "%cluster_ctarank": cta.rank,
            "%cluster_nctarank": self.cluster.size,
            "%is_explicit_cluster": FULL if machine.explicit_cluster else 0,
            "%lanemask_eq": np.uint32(1) << LANE_IDS,
            "%lanemask_lt": (np.uint32(1) << LANE_IDS) - np.uint32(1),
            "%dynamic_smem_size": machine.launch.shared_bytes,
            "%total_smem_size": machine.shared_end - SHARED_BASE,
            "%aggr_smem_size": machine.shared_end,
            "WARP_SZ": 32,
        }
        out["%lanemask_le"] = out["%lanemask_lt"] | out["%lanemask_eq"]
        out["%lanemask_gt"] = ~out["%lanemask_le"]
        out["%lanemask_ge"] = ~out["%lanemask_lt"]
        for axis, letter in enumerate("xyz"):
            out[f"%ntid.{letter}"] = block[axis]
            out[f"%ctaid.{letter}"] = cta.ctaid[axis]
            out[f"%nctaid.{letter}"] = grid[axis]
            out[f"%clusterid.{letter}"] = cta.ctaid[axis] // cluster[axis]
            out[f"%nclusterid.{letter}"] = grid[axis] // cluster[axis]
            out[f"%cluster_ctaid.{letter}"] = cta.ctaid[axis] % cluster[axis]
            out[f"%cluster_nctaid.{letter}"] = cluster[axis]
        # One-dimensional blocks are the rule: a thread number that is constant in a warp need not be an array.
        for name in ("%tid.y", "%tid.z"):
            value = out[name]
            if not isinstance(value, int) and (value == value[0]).all():
                out[name] = int(value[0])
        return out

    @property
    def instruction(self) -> ptx.Instruction:
        """The instruction being executed."""
        return self.machine.kernel.instructions[self.at]

    def read_special(self, name: str) -> int:
        """Clocks: they advance with the number of instructions executed."""
        now = self.machine.now()
        if name in ("%clock64", "%globaltimer"):
            return now
        return (now >> 32) if name.endswith("_hi") else now & FULL

    def symbol(self, name: str) -> int:
        """The address of a variable or parameter."""
        return self.cta.symbol(name)

    def release(self) -> Clock:
        """The clock to publish with a releasing operation; what this warp does next is not covered by it."""
        clock = self.clock.copy()
        self.clock[self.thread] += 1
        return clock

    def acquire(self, clock: Clock) -> None:
        """Takes over what a published clock covers."""
        np.maximum(self.clock, clock, out=self.clock)

    def issue(self, agent: str) -> Issue:
        """A ticket for an asynchronous operation of this warp."""
        thread = self.cta.first_thread + self.cta.num_warps + AGENTS.index(agent)
        tick = self.cluster.next_tick(thread)
        clock = self.release()
        clock[thread] = tick
        return Issue(self, self.instruction, thread, tick, clock)

    def note_wait(self) -> None:
        """griddepcontrol.wait: earlier launches have ended for this warp, and for those that are ordered behind it."""
        self.state["waited"] = True
        tick = int(self.release()[self.thread])
        self.cluster.state.setdefault("waits", []).append((self.thread, tick))

    def has_waited(self) -> bool:
        """Whether a griddepcontrol.wait lies before this point, in this warp or in one that it is ordered behind."""
        if not self.state.get("waited"):
            waits = self.cluster.state.get("waits", ())
            self.state["waited"] = any(self.clock[thread] > tick for thread, tick in waits)
        return bool(self.state["waited"])

    def found(self, code: str, message: str, fatal: bool = False) -> None:
        """Records a finding at the current instruction."""
        self.machine.found(code, message, fatal=fatal)

    def block(self, queue: WaitQueue, why: str | Callable[[], str]) -> Any:
        """Puts the current path to sleep; returns BLOCK."""
        self.path.why = why
        queue.add(self.path)
        return BLOCK

    def diverged_here(self, mask: int) -> None:
        """An aligned instruction was reached by a part of the warp only."""
        self.found(
            codes.DIVERGENCE,
            f"{self.instruction.op} must be executed by the whole warp; lanes 0x{mask:08x} of 0x{self.active:08x} are here",
            fatal=True,
        )

    # Control flow, called by generated code.

    def diverge(self, taken: int, target: int, after: int, join: int) -> int:
        """Splits the current path at a branch."""
        self._split([(target, taken), (after, self.path.mask & ~taken)], join)
        return DIVERGED

    def diverge_table(self, index: Value, targets: Sequence[int], join: int, mask: int) -> int:
        """`brx.idx`: each lane goes where its index says."""
        if isinstance(index, int):
            if index >= len(targets):
                self.found(codes.OUT_OF_BOUNDS, f"brx index {index}, {len(targets)} targets", fatal=True)
            return targets[index]
        groups: dict[int, int] = defaultdict(int)
        for lane in lanes_of(mask):
            if int(index[lane]) >= len(targets):
                self.found(codes.OUT_OF_BOUNDS, f"brx index {int(index[lane])}, {len(targets)} targets", fatal=True)
            groups[targets[int(index[lane])]] |= 1 << lane
        if len(groups) == 1:
            return next(iter(groups))
        self._split(list(groups.items()), join)
        return DIVERGED

    def _split(self, parts: list[tuple[int, int]], join: int) -> None:
        path = self.path
        region = path.region
        if region is None or region.join != join:
            region = Region(join, path.mask, region)
        self.paths.remove(path)
        for segment, mask in parts:
            self._enter(Path(self, segment, mask, region))

    def _enter(self, path: Path) -> None:
        """Adds a path, which may already stand where its region's lanes meet."""
        region = path.region
        if region is not None and path.segment == region.join:
            self._arrive(path)
        else:
            self.paths.append(path)

    def _arrive(self, path: Path) -> None:
        region = path.region
        assert region is not None
        region.arrived |= path.mask
        self._close(region)

    def _close(self, region: Region) -> None:
        if region.mask and region.arrived == region.mask:
            self._enter(Path(self, region.join, region.mask, region.parent))

    def exit_some(self, lanes: int, after: int) -> int:
        """Lanes of the current path leave; the others go on at `after`."""
        path = self.path
        self._leave(path, lanes)
        path.mask &= ~lanes
        return after

    def _leave(self, path: Path, lanes: int) -> None:
        self.active &= ~lanes
        region = path.region
        while region is not None:
            region.mask &= ~lanes
            region.arrived &= ~lanes
            region = region.parent
        warp_exited(self)

    def _exit_path(self, path: Path) -> None:
        self._leave(path, path.mask)
        self.paths.remove(path)
        region = path.region
        while region is not None:
            if region.mask and region.arrived == region.mask:
                self._close(region)
                break
            region = region.parent

    def run(self, budget: int) -> bool:
        """Runs until the budget is spent or every path sleeps.

        Returns:
            True if some path can go on.
        """
        program, registers = self.machine.program, self.R
        counts, costs = self.machine.segment_counts, self.machine.segment_costs
        while budget > 0:
            path = self._pick()
            if path is None:
                return False
            self.path = path
            mask = path.mask
            functions = program.full if mask == FULL else program.partial
            join = path.region.join if path.region is not None else -9
            segment = path.segment
            while budget > 0:
                following = functions[segment](self, mask, registers)
                cost = costs[segment]
                if following == BLOCKED:
                    path.segment = segment
                    budget -= 1
                    break
                counts[segment] += 1
                budget -= cost
                self.executed += cost
                if following >= 0:
                    segment = following
                    if segment == join:
                        path.segment = segment
                        self.paths.remove(path)
                        self._arrive(path)
                        break
                    if path.mask != mask:
                        mask = path.mask
                        functions = program.partial
                elif following == DIVERGED:
                    break
                else:
                    assert following == EXITED
                    self._exit_path(path)
                    break
            else:
                path.segment = segment
        return self._pick() is not None

    def _pick(self) -> Path | None:
        paths = self.paths
        if len(paths) == 1:
            return paths[0] if paths[0].why is None else None
        ready = [path for path in paths if path.why is None]
        return min(ready, key=lambda path: path.segment) if ready else None

    @property
    def done(self) -> bool:
        """True when every lane has exited."""
        return not self.active


class CTA:
    """One thread block."""

    def __init__(self, cluster: "Cluster", rank: int, ctaid: tuple[int, int, int]) -> None:
        self.cluster, self.rank, self.ctaid = cluster, rank, ctaid
        self.machine: Machine = cluster.machine
        grid = self.machine.launch.grid
        self.index = ctaid[0] + grid[0] * (ctaid[1] + grid[1] * ctaid[2])
        self.num_threads = self.machine.num_threads
        self.num_warps = -(-self.num_threads // 32)
        self.first_thread = rank * (self.num_warps + len(AGENTS))
        self.state: dict[str, Any] = {}
        self.exited = False
        self.warps: list[Warp] = []
        self.smem = SharedMemory(self, self.machine.shared_end)
        self.tmem = TensorMemory(self)

    def start(self) -> None:
        """Makes the warps."""
        self.warps = [Warp(self, index) for index in range(self.num_warps)]

    def symbol(self, name: str) -> int:
        """The address of a variable or parameter as this CTA sees it."""
        machine = self.machine
        if name in machine.shared_symbols:
            return (self.rank << 24) | machine.shared_symbols[name]
        if name in machine.other_symbols:
            return machine.other_symbols[name]
        raise Unsupported(f"{machine.kernel.name}: symbol {name} is not a variable or parameter")

    def finish(self) -> None:
        """Checks what must not be left behind."""
        self.exited = True
        check_barriers_at_exit(self)
        self.smem.exit_check()
        self.tmem.exit_check()


class Cluster:
    """CTAs that are on the GPU together."""

    def __init__(self, machine: "Machine", index: int, origin: tuple[int, int, int]) -> None:
        self.machine, self.index = machine, index
        shape = machine.launch.cluster
        self.size = shape[0] * shape[1] * shape[2]
        self.state: dict[str, Any] = {}
        warps = -(-machine.num_threads // 32)
        self.num_clock_threads = self.size * (warps + len(AGENTS))
        self._ticks = [0] * self.num_clock_threads
        self.ctas: list[CTA] = []
        for rank in range(self.size):
            x, y, z = rank % shape[0], rank // shape[0] % shape[1], rank // (shape[0] * shape[1])
            self.ctas.append(CTA(self, rank, (origin[0] + x, origin[1] + y, origin[2] + z)))
        for cta in self.ctas:
            cta.start()

    def next_tick(self, thread: int) -> int:
        """Advances a pseudo thread's clock."""
        self._ticks[thread] += 1
        return self._ticks[thread]

    def locate(self, address: int) -> tuple[CTA, int]:
        """The CTA and the offset that a shared-memory address means."""
        rank, offset = address >> 24, address & 0xFFFFFF
        if rank >= self.size:
            self.machine.found(
                codes.OUT_OF_BOUNDS,
                f"shared address 0x{address:x} means CTA {rank} of a cluster of {self.size}",
                fatal=True,
            )
        return self.ctas[rank], offset


class Machine:
    """One launch."""

    def __init__(
        self,
        launch: Launch,
        module: ptx.Module,
        program: Program,
        memory: Iterable[Buffer],
        policy: str = "eager",
        seed: int = 0,
        trace: Any = None,
        resident_clusters: int | None = None,
        check_outputs: bool = True,
        max_instructions: int = MAX_INSTRUCTIONS,
    ) -> None:
        if policy not in POLICIES:
            raise ValueError(f"policy is {policy!r}, expected one of {', '.join(POLICIES)}")
        self.launch, self.module, self.program = launch, module, program
        self.kernel = program.kernel
        self.arch = module.target
        self.policy, self.trace = policy, trace
        self._wants_outputs = check_outputs
        self._budget = max_instructions
        self.rng = random.Random(seed)
        self.counters: dict[str, int] = defaultdict(int)
        self.report = Report(counters=self.counters)
        self._seen: dict[tuple[str, int | str], int] = {}
        self.completing: AsyncOp | None = None
        self.running: Warp | None = None
        self.num_threads = launch.block[0] * launch.block[1] * launch.block[2]
        self.explicit_cluster = launch.cluster != (1, 1, 1) or "reqnctapercluster" in self.kernel.directives
        self.segment_counts = [0] * len(program.segments)
        self.segment_costs = [segment.end - segment.start for segment in program.segments]
        self._executed = 0
        self.gmem = GlobalMemory(self, bool(launch.attributes.get("programmatic_stream_serialization")))
        for buffer in memory:
            self.gmem.register(buffer)
        self.params = self._params()
        self.shared_symbols: dict[str, int] = {}
        self.other_symbols: dict[str, int] = {}
        self.shared_end = self._place_symbols()
        self.engine = AsyncEngine(self)
        self.runnable: deque[Warp] = deque()
        self.pending_clusters = deque(self._origins())
        total = len(self.pending_clusters)
        self.resident = total if launch.attributes.get("cooperative") else min(total, resident_clusters or 8)
        self.clusters: list[Cluster] = []
        self._next_cluster = 0

    def _params(self) -> npt.NDArray[np.uint8]:
        expected = self.kernel.params
        if len(expected) != len(self.launch.params):
            raise ValueError(
                f"{self.kernel.name}: {len(self.launch.params)} parameters given, the entry has {len(expected)}"
            )
        size = max((param.offset + param.num_bytes for param in expected), default=0)
        block = np.zeros(size, np.uint8)
        for param, value in zip(expected, self.launch.params, strict=True):
            if len(value) != param.num_bytes:
                raise ValueError(f"{param.name}: {len(value)} bytes given, {param.num_bytes} expected")
            block[param.offset : param.offset + param.num_bytes] = np.frombuffer(value, np.uint8)
        return block

    def _place_symbols(self) -> int:
        for param in self.kernel.params:
            self.other_symbols[param.name] = PARAM_WINDOW | param.offset
        offset, local = SHARED_BASE, 0
        dynamic: list[ptx.Variable] = []
        self._constants: list[npt.NDArray[np.uint8]] = []
        for variable in [*self.module.variables.values(), *self.kernel.variables.values()]:
            if variable.space == "shared" and variable.num_bytes == 0:
                dynamic.append(variable)
            elif variable.space == "shared":
                offset = -(-offset // variable.align) * variable.align
                self.shared_symbols[variable.name] = offset
                offset += variable.num_bytes
            elif variable.space == "local":
                local = -(-local // variable.align) * variable.align
                self.other_symbols[variable.name] = LOCAL_WINDOW | local
                local += variable.num_bytes
            else:
                data = np.zeros(variable.num_bytes + variable.align, np.uint8)
                start = -data.ctypes.data % variable.align
                data[start : start + len(variable.init)] = np.frombuffer(variable.init, np.uint8)
                self._constants.append(data)
                address = data.ctypes.data + start
                self.other_symbols[variable.name] = address
                self.gmem.register(
                    Buffer(variable.name, address, variable.num_bytes, readonly=variable.space == "const")
                )
        self.local_bytes = local
        align = max((variable.align for variable in dynamic), default=16)
        offset = -(-offset // align) * align
        for variable in dynamic:
            self.shared_symbols[variable.name] = offset
        return offset + self.launch.shared_bytes

    def _origins(self) -> Iterable[tuple[int, int, int]]:
        grid, cluster = self.launch.grid, self.launch.cluster
        for z in range(0, grid[2], cluster[2]):
            for y in range(0, grid[1], cluster[1]):
                for x in range(0, grid[0], cluster[0]):
                    yield x, y, z

    def now(self) -> int:
        """A time that advances: instructions executed so far."""
        self._executed += 32
        return self._executed + (self.running.executed if self.running else 0)

    def make_runnable(self, warp: Warp) -> None:
        """Puts a warp in line."""
        if not warp.queued and warp.active:
            warp.queued = True
            self.runnable.append(warp)

    def found(self, code: str, message: str, fatal: bool = False) -> None:
        """Records a finding where the machine stands: at the running warp or at the operation that completes."""
        op = self.completing
        warp = op.issue.warp if op is not None else self.running
        ins = op.issue.ins if op is not None else (warp.instruction if warp is not None else None)
        line = ins.line if ins is not None else 0
        key = (code, line or message)
        self._seen[key] = self._seen.get(key, 0) + 1
        if self._seen[key] == 1:
            source = f"{ins.source[0]}:{ins.source[1]}" if ins is not None and ins.source else None
            text = message if ins is None else f"{ins.op}: {message}"
            if op is not None and ins is not None and ins is not getattr(warp, "instruction", None):
                text += " (when it completed)"
            self.report.findings.append(
                Finding(
                    code,
                    text,
                    self.kernel.name,
                    warp.cluster.index if warp is not None else -1,
                    warp.cta.index if warp is not None else -1,
                    warp.index if warp is not None else None,
                    line,
                    source,
                )
            )
        if fatal:
            raise Stop

    def cancel_cluster(self) -> tuple[int, int, int] | None:
        """Takes a cluster that has not started out of line: its first CTA's coordinates (clusterlaunchcontrol)."""
        return self.pending_clusters.popleft() if self.pending_clusters else None

    def _start_clusters(self) -> None:
        while self.pending_clusters and len(self.clusters) < self.resident:
            cluster = Cluster(self, self._next_cluster, self.pending_clusters.popleft())
            self._next_cluster += 1
            self.counters["ctas"] += cluster.size
            self.clusters.append(cluster)
            for cta in cluster.ctas:
                for warp in cta.warps:
                    self.make_runnable(warp)

    def run(self) -> Report:
        """Runs the launch to its end, or to the finding behind which nothing can be trusted."""
        try:
            self._start_clusters()
            # Infinities and NaNs are values like others here; a warning for each would cost more than the arithmetic.
            with np.errstate(all="ignore"):
                self._loop()
            if self._wants_outputs:
                self._check_outputs()
        except Stop:
            pass
        finally:
            self._count()
        return self.report

    def _loop(self) -> None:
        policy, rng, quantum = self.policy, self.rng, QUANTUM[self.policy]
        turns = 0
        while True:
            if self.runnable:
                turns += 1
                if policy == "lazy" and turns > PATIENCE:
                    turns = 0
                    self.engine.step_lazy()
                if policy == "random":
                    if rng.random() < 0.5:
                        self.engine.step_random(rng)
                    self.runnable.rotate(rng.randrange(len(self.runnable)))
                warp = self.runnable.popleft()
                warp.queued = False
                if warp.done:
                    # It woke one of its own paths, which the rest of that turn then finished.
                    continue
                self.running = warp
                self._budget -= quantum
                if self._budget < 0:
                    self._deadlock("the launch does not end: its budget of instructions is spent")
                    return
                if self._run_warp(warp, quantum):
                    self.make_runnable(warp)
                if warp.done:
                    self._warp_done(warp)
                self.running = None
                continue
            turns = 0
            if not (self.engine.step_random(rng) if policy == "random" else self.engine.step_lazy()):
                if self.clusters:
                    self._deadlock("no warp can run and nothing is under way")
                return

    def _run_warp(self, warp: Warp, quantum: int) -> bool:
        trace = self.trace
        if trace is None:
            return warp.run(quantum)
        before, start = warp.executed, trace.time
        more = warp.run(quantum)
        trace.time = max(trace.time, start + warp.executed - before)
        path = warp.path
        index = self.program.segments[min(path.segment, len(self.program.segments) - 1)].start
        ins = self.kernel.instructions[index]
        text = "exit" if warp.done else f"until {ins.op}" if path.why is not None else "run"
        trace.ran(warp.cta.index, warp.index, start, trace.time, text, ins.line, ins.source)
        return more

    def _warp_done(self, warp: Warp) -> None:
        cta = warp.cta
        self._executed += warp.executed
        if any(not other.done for other in cta.warps):
            return
        cta.finish()
        cluster = cta.cluster
        if all(other.exited for other in cluster.ctas):
            self.clusters.remove(cluster)
            self._start_clusters()

    def _deadlock(self, what: str) -> None:
        lines = []
        for cluster in self.clusters:
            for cta in cluster.ctas:
                for warp in cta.warps:
                    for path in warp.paths:
                        index = self.program.segments[path.segment].start
                        ins = self.kernel.instructions[index]
                        why = (path.why() if callable(path.why) else path.why) or "runs"
                        source = f" {ins.source[0]}:{ins.source[1]}" if ins.source else ""
                        lanes = "" if path.mask == FULL else f" lanes 0x{path.mask:08x}"
                        lines.append(
                            f"  CTA {cta.index} warp {warp.index}{lanes} at PTX line {ins.line}{source}: {why}"
                        )
        self.running = None
        self.found(codes.DEADLOCK, f"{what}:\n" + "\n".join(lines))

    def _check_outputs(self) -> None:
        self.running = None
        if any(finding.code == codes.DEADLOCK for finding in self.report.findings):
            return
        for buffer, count, first in self.gmem.unwritten():
            self.found(
                codes.OUTPUT_NOT_WRITTEN,
                f"{buffer.name}: {count} of {buffer.num_bytes} bytes were not written, the first at byte {first}",
            )

    def _count(self) -> None:
        for segment, times in zip(self.program.segments, self.segment_counts, strict=True):
            if times:
                self.counters["instructions"] += times * (segment.end - segment.start)
                for ins in self.kernel.instructions[segment.start : segment.end]:
                    self.counters[f"op:{ins.op}"] += times
