"""A machine whose instructions a test executes one by one, with operand values of its choice."""

from dataclasses import replace

import numpy as np

from ptxsim import barriers, ptx, tcgen05, wgmma
from ptxsim.codegen import Program
from ptxsim.launch import Launch
from ptxsim.machine import Cluster, Machine
from ptxsim.memory import SHARED_BASE
from ptxsim.registry import decode
from ptxsim.values import FULL

# Imported for their decoders.
_DECODERS = (barriers, tcgen05, wgmma)
BULK = ptx.Instruction("cp.async.bulk", ("cp", "async", "bulk"), (), None, False, 0, None, "")
TEMPLATE = """.version 8.8
.target {arch}
.address_size 64
.extern .shared .align 1024 .b8 smem[];
.visible .entry bench()
{{
.reg .b32 %r<300>;
.reg .b16 %h<4>;
.reg .b64 %d<8>;
.reg .pred %p<4>;
{body}
ret;
}}
"""


class Bench:
    """Warps of one cluster; `do` runs the instruction with a given text."""

    def __init__(self, *texts, warps=4, cluster=1, policy="eager", arch="sm_100a", shared=0x11000):
        body = "\n".join(text + ";" for text in texts)
        module = ptx.parse(TEMPLATE.format(arch=arch, body=body))
        kernel = module.kernels["bench"]
        self.effects = [decode(ins) for ins in kernel.instructions[:-1]]
        program = Program(kernel, [], [])
        launch = Launch("", "bench", (cluster, 1, 1), (32 * warps, 1, 1), (cluster, 1, 1), shared)
        self.machine = Machine(launch, module, program, [], policy)
        self.cluster = Cluster(self.machine, 0, (0, 0, 0))
        self.machine.clusters.append(self.cluster)
        self.kernel = kernel

    @property
    def ctas(self):
        return self.cluster.ctas

    def warp(self, index, cta=0):
        return self.ctas[cta].warps[index]

    def do(self, w, number, *values, mask=FULL):
        """Executes instruction `number` by warp `w`."""
        w.at = number
        outer, self.machine.running = self.machine.running, w
        result = self.effects[number].run(w, mask, *values)
        self.machine.running = outer
        return result

    def one(self, w, number, *values):
        """The same by lane 0 alone."""
        return self.do(w, number, *values, mask=1)

    def codes(self):
        return [finding.code for finding in self.machine.report.findings]

    def messages(self):
        return [finding.message for finding in self.machine.report.findings]

    def drain(self):
        """Completes every asynchronous operation."""
        while self.machine.engine.step_lazy():
            pass

    def order(self, first, *others):
        """Everything `first` did happens before what the others do next."""
        clock = first.release()
        for w in others:
            w.acquire(clock)

    def fill(self, offset, data, cta=0):
        """Shared memory as if a bulk copy that everybody waited for had written it."""
        smem = self.ctas[cta].smem
        raw = np.frombuffer(np.ascontiguousarray(data).tobytes(), np.uint8)
        w = self.ctas[cta].warps[0]
        self.machine.running = w
        issue = replace(w.issue("tma"), ins=BULK)
        smem.begin_async_write(issue, offset, len(raw))
        smem.data[offset : offset + len(raw)] = raw
        smem.end_async_write(issue, offset, len(raw))
        for other in self.ctas[cta].warps:
            other.acquire(issue.clock)
        self.machine.running = None
        assert offset >= SHARED_BASE


def vector(first, count):
    """`{%r1, %r2, ...}`."""
    return "{" + ", ".join(f"%r{first + i}" for i in range(count)) + "}"
