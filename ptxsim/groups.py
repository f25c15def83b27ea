"""Groups of asynchronous copies: commit_group and wait_group, per thread.

Every thread has its own queue of groups, but the threads of a warp nearly always run through the same sequence, so a group
is held once with the mask of the threads it belongs to. A wait for "all but N" means all but the N most recent groups.

Source: PTX ISA, async-group and bulk async-group mechanisms. Here a copy has read its source when it is complete, so
`wait_group.read` waits as long as `wait_group`; a kernel that relies on less is not found.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ptxsim.values import first_lane

if TYPE_CHECKING:
    from ptxsim.machine import Issue, Warp


class Operation:
    """A copy that some threads issued.

    Attributes:
        owners: those threads.
        lanes: those of them that have not committed it yet.
        issue: who issued it and what it publishes.
        line: PTX line, for reports.
        done: it has completed.
        tracked: an mbarrier reports it, so nobody need wait for its group.
        waited: some thread has waited for it.
        callbacks: called at completion.
    """

    __slots__ = ("callbacks", "done", "issue", "lanes", "line", "owners", "tracked", "waited")

    def __init__(self, lanes: int, issue: "Issue", line: int) -> None:
        self.owners = self.lanes = lanes
        self.issue, self.line = issue, line
        self.done = self.tracked = self.waited = False
        self.callbacks: list[Callable[[], None]] = []


class _Group:
    __slots__ = ("lanes", "operations")

    def __init__(self, lanes: int, operations: list[Operation]) -> None:
        self.lanes, self.operations = lanes, operations


class Groups:
    """The copies and groups of one warp's threads."""

    def __init__(self, w: "Warp", name: str) -> None:
        from ptxsim.machine import WaitQueue

        self.name = name
        self.open: list[Operation] = []
        self.running: list[Operation] = []
        self.groups: list[_Group] = []
        self._queue = WaitQueue(w.machine)

    def add(self, w: "Warp", lanes: int, issue: "Issue") -> Operation:
        """Records a copy issued by lanes of `w`."""
        operation = Operation(lanes, issue, w.instruction.line)
        self.open.append(operation)
        self.running.append(operation)
        return operation

    def finish(self, operation: Operation) -> None:
        """The copy is complete."""
        operation.done = True
        if operation.tracked:
            self._drop(operation)
        self.running.remove(operation)
        for callback in operation.callbacks:
            callback()
        self._queue.wake()

    def commit(self, mask: int) -> None:
        """The open copies of these threads form a group; it may be empty."""
        mine = [operation for operation in self.open if operation.lanes & mask]
        group = _Group(mask, mine)
        for operation in mine:
            operation.lanes &= ~mask
        if mine:
            self.open = [operation for operation in self.open if operation.lanes]
        self.groups.append(group)

    def wait(self, w: "Warp", mask: int, newest: int) -> Any:
        """All groups of these threads but the `newest` most recent are complete, or BLOCK.

        Waiting takes over what the copies published.
        """
        reached: list[tuple[_Group, int]] = []
        rest = mask
        while rest:
            bit, same = 1 << first_lane(rest), rest
            mine = []
            for group in self.groups:
                if group.lanes & bit:
                    mine.append(group)
                    same &= group.lanes
                else:
                    same &= ~group.lanes
            rest &= ~same
            for group in mine[: max(0, len(mine) - newest)]:
                if any(not operation.done and operation.owners & same for operation in group.operations):
                    return w.block(self._queue, lambda: self._why(newest))
                reached.append((group, same))
        for group, lanes in reached:
            group.lanes &= ~lanes
            for operation in group.operations:
                if operation.owners & lanes and not operation.waited:
                    operation.waited = True
                    w.acquire(operation.issue.clock)
        if reached:
            self.groups = [group for group in self.groups if group.lanes]
        return None

    def track(self, operations: list[Operation]) -> None:
        """An mbarrier reports these copies: those that are complete and in no group are forgotten."""
        for operation in operations:
            operation.tracked = True
            if operation.done:
                self._drop(operation)

    def _drop(self, operation: Operation) -> None:
        if operation in self.open:
            self.open.remove(operation)

    def after_all(self, lanes: int, call: Callable[[], None]) -> bool:
        """Calls back when every running copy of these threads is complete; False if none is running."""
        waiting = [operation for operation in self.running if self._concerns(operation, lanes)]
        left = len(waiting)
        if not left:
            return False

        def one_done() -> None:
            nonlocal left
            left -= 1
            if not left:
                call()

        for operation in waiting:
            operation.callbacks.append(one_done)
        return True

    def all_of(self, lanes: int) -> list[Operation]:
        """Copies of these threads that no thread has waited for, complete or not."""
        return [operation for operation in self.unwaited() if self._concerns(operation, lanes)]

    def unwaited(self) -> list[Operation]:
        """Copies that no thread has waited for."""
        found = {id(operation): operation for operation in self.open if not operation.waited}
        for group in self.groups:
            found.update((id(operation), operation) for operation in group.operations if not operation.waited)
        return list(found.values())

    def _concerns(self, operation: Operation, lanes: int) -> bool:
        return bool(operation.owners & lanes)

    def _why(self, newest: int) -> str:
        lines = sorted({operation.line for operation in self.running})
        return f"waits for all but {newest} {self.name} groups; copies of PTX lines {lines} are not complete"
