"""A timeline of one run: what every warp executed and waited for, and how long every asynchronous operation was under way.

Time is counted in instructions executed by the simulator, not in cycles: the order is real, the lengths are not.
"""

import json
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ptxsim.machine import AsyncOp


@dataclass(frozen=True, slots=True)
class Span:
    """Something with a beginning and an end."""

    cta: int
    lane: str
    name: str
    start: int
    end: int
    args: dict[str, Any]


class Trace:
    """Collects spans while a machine runs."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.time = 0
        self._open: dict[int, int] = {}

    def begin_async(self, op: "AsyncOp") -> None:
        """An asynchronous operation was issued."""
        self._open[id(op)] = self.time

    def end_async(self, op: "AsyncOp") -> None:
        """An asynchronous operation completed."""
        self.time += 1
        ins = op.issue.ins
        start = self._open.pop(id(op), self.time)
        args = {"ptx_line": ins.line, "what": op.what, "warp": op.issue.warp.index, "source": _source(ins.source)}
        self.spans.append(Span(op.issue.warp.cta.index, f"async {op.kind}", ins.op, start, self.time, args))

    def ran(
        self, cta: int, warp: int, start: int, end: int, text: str, line: int, source: tuple[str, int] | None
    ) -> None:
        """A warp ran from `start` to `end` and stopped at the instruction described."""
        args = {"ptx_line": line, "source": _source(source)}
        self.spans.append(Span(cta, f"warp {warp}", text, start, end, args))

    def to_json(self) -> dict[str, Any]:
        """The timeline in the Trace Event Format of Perfetto and chrome://tracing; one instruction is one microsecond."""
        lanes = sorted({(span.cta, span.lane) for span in self.spans}, key=_lane_order)
        numbers = {lane: i + 1 for i, lane in enumerate(lanes)}
        events: list[dict[str, Any]] = []
        for cta, lane in lanes:
            common = {"ph": "M", "pid": cta, "tid": numbers[cta, lane]}
            events.append({**common, "name": "thread_name", "args": {"name": lane}})
            events.append({**common, "name": "thread_sort_index", "args": {"sort_index": numbers[cta, lane]}})
        for cta in sorted({cta for cta, _ in lanes}):
            events.append({"ph": "M", "pid": cta, "name": "process_name", "args": {"name": f"CTA {cta}"}})
        serial = 0
        for span in self.spans:
            common = {
                "pid": span.cta,
                "tid": numbers[span.cta, span.lane],
                "name": span.name,
                "cat": "ptx",
                "args": span.args,
            }
            if span.lane.startswith("async"):
                # Asynchronous operations overlap in one lane: nestable async events, not complete ones.
                serial += 1
                events.append({**common, "ph": "b", "id": serial, "ts": span.start})
                events.append({**common, "ph": "e", "id": serial, "ts": span.end})
            else:
                events.append({**common, "ph": "X", "ts": span.start, "dur": max(1, span.end - span.start)})
        return {"traceEvents": events, "displayTimeUnit": "ms"}

    def write_json(self, path: FilePath) -> None:
        """Writes the timeline as JSON."""
        path.write_text(json.dumps(self.to_json()))

    def to_text(self, width: int = 100) -> str:
        """One block a CTA, one row a warp or kind of operation: `#` where it ran or was under way, and the list of spans."""
        end = max((span.end for span in self.spans), default=1) or 1
        lines = [f"time 0 .. {end} (instructions executed, not cycles)"]
        for cta, lane in sorted({(span.cta, span.lane) for span in self.spans}, key=_lane_order):
            row = [" "] * width
            for span in self.spans:
                if (span.cta, span.lane) == (cta, lane):
                    first, last = span.start * width // (end + 1), span.end * width // (end + 1)
                    for i in range(first, min(width, last + 1)):
                        row[i] = "#"
            lines.append(f"CTA {cta:3d} {lane:12s} |{''.join(row)}|")
        for span in sorted(self.spans, key=lambda span: (span.start, span.cta, span.lane)):
            where = span.args.get("source") or f"PTX line {span.args.get('ptx_line')}"
            lines.append(f"{span.start:8d} {span.end:8d}  CTA {span.cta:3d} {span.lane:12s} {span.name}  [{where}]")
        return "\n".join(lines)


def _source(source: tuple[str, int] | None) -> str | None:
    return f"{source[0].rsplit('/', 1)[-1]}:{source[1]}" if source else None


def _lane_order(lane: tuple[int, str]) -> tuple[int, int, int, str]:
    cta, name = lane
    kind, _, number = name.partition(" ")
    return cta, kind == "async", int(number) if number.isdigit() else 0, name
