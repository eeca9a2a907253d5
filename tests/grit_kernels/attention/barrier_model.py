"""Every order in which the recorded partitions of a Hopper kernel may run: deadlocks, overwrites, reads of the wrong block,
sums touched while a product still writes them.

A step is an operation of a partition, the arrival of a copy, or the end of a product. A copy writes its buffer at any time
between its issue and its arrival, a product reads at any time between its issue and its end, and products of a warpgroup end in
order. Products that read from the same two buffers or rings, or the one, write the same sums.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

from tests.grit_kernels.attention.hopper_paper import Operation, Record, base_name


class State(NamedTuple):
    """``barriers``: (phase, arrivals still missing, bytes still missing) of each. ``running``: the buffers that products of each
    partition still read."""

    places: tuple[int, ...]
    barriers: tuple[tuple[int, int, int], ...]
    contents: tuple[Any, ...]
    copies: frozenset[Operation]
    running: tuple[tuple[tuple[str, ...], ...], ...]
    turns: tuple[int, ...]


def _replaced(values: tuple[Any, ...], at: int, value: Any) -> tuple[Any, ...]:
    return (*values[:at], value, *values[at + 1 :])


class Model:
    """``expected``: of each consumer's products and loads in order, what the buffers they read hold. ``turns``: the consumers
    take turns with products that read two buffers."""

    def __init__(self, record: Record, expected: list[tuple[Any, ...]], turns: bool) -> None:
        self.partitions, self.counts, self.expected, self.turns = record.partitions, record.counts, expected, turns
        self.barriers = {name: i for i, name in enumerate(record.counts)}
        operations = [operation for partition in record.partitions for operation in partition]
        filled = {op[{"copy": 2, "store": 1}[op[0]]] for op in operations if op[0] in ("copy", "store")}
        self.buffers = {name: i for i, name in enumerate(sorted(filled))}

    def fault(self) -> str:
        """The first fault found, or an empty text if no order has one."""
        begin = State(
            (0,) * len(self.partitions), tuple((0, count, 0) for count in self.counts.values()),
            (None,) * len(self.buffers), frozenset(), ((),) * len(self.partitions), (0,) * len(self.partitions),
        )  # fmt: skip
        seen, stack = {begin}, [begin]
        self.states = seen
        while stack:
            state = stack.pop()
            moved = False
            for following in self._following(state):
                if isinstance(following, str):
                    return following
                moved = True
                if following not in seen:
                    seen.add(following)
                    stack.append(following)
            ended = all(place == len(ops) for place, ops in zip(state.places, self.partitions, strict=True))
            if not moved and (not ended or state.copies or any(state.running)):
                waiting = [ops[i] for i, ops in zip(state.places, self.partitions, strict=True) if i < len(ops)]
                return f"deadlock: {waiting}"
        return ""

    def _following(self, state: State) -> Any:
        # no other partition or copy has a part in these, and a fault that they show now they show later only if at all
        for who, place in enumerate(state.places):
            if place < len(self.partitions[who]) and self.partitions[who][place][0] in ("finish", "result"):
                found = self._run(state, who, self.partitions[who][place])
                if found is not None:
                    done = isinstance(found, State)
                    yield found._replace(places=_replaced(found.places, who, place + 1)) if done else found
                    return
        for operation in state.copies:
            _, barrier, buffer, content, size = operation
            found = self._signal(state, barrier, 0, -size)
            if isinstance(found, str):
                yield found
                continue
            contents = _replaced(found.contents, self.buffers[buffer], content)
            yield found._replace(copies=found.copies - {operation}, contents=contents)
        for who, running in enumerate(state.running):
            if running:
                yield state._replace(running=_replaced(state.running, who, running[1:]))
        for who, place in enumerate(state.places):
            if place < len(self.partitions[who]):
                found = self._run(state, who, self.partitions[who][place])
                if isinstance(found, State):
                    found = found._replace(places=_replaced(found.places, who, place + 1))
                if found is not None:
                    yield found

    def _signal(self, state: State, barrier: str, arrivals: int, size: int) -> State | str:
        at = self.barriers[barrier]
        phase, missing, left = state.barriers[at]
        missing, left = missing - arrivals, left + size
        if missing < 0 or left < 0:
            return f"too much arrives at {barrier}"
        if missing == left == 0:
            phase, missing = phase + 1, self.counts[barrier]
        return state._replace(barriers=_replaced(state.barriers, at, (phase, missing, left)))

    def _run(self, state: State, who: int, operation: Operation) -> State | str | None:
        """The state after it, a fault, or None where it waits."""
        kind, *rest = operation
        if kind == "wait":
            return state if state.barriers[self.barriers[rest[0]]][0] % 2 != rest[1] else None
        if kind == "finish":
            return state if len(state.running[who]) <= rest[0] else None
        writes = {tuple(map(base_name, product)) for product in state.running[who]}
        if kind == "result":
            return f"consumer {who} reads what a product still writes" if writes & set(rest[0]) else state
        if kind == "arrive":
            return self._signal(state, rest[0], 1, 0)
        if kind == "expect":
            return self._signal(state, rest[0], 1, rest[1])
        reading = {buffer for running in state.running for product in running for buffer in product}
        writing = {copy[2] for copy in state.copies}
        if kind == "copy":
            if rest[1] in reading or rest[1] in writing:
                return f"{rest[1]} is overwritten while in use"
            contents = _replaced(state.contents, self.buffers[rest[1]], None)
            return state._replace(copies=state.copies | {operation}, contents=contents)
        if kind in ("clean", "fence"):
            if kind == "clean" and rest[0] in reading | writing:
                return f"{rest[0]} is cleaned while in use"
            # what was cleaned is seen by products after a fence only
            change = {"clean": lambda name, x: (*x, "stored") if name == rest[0] and x else x}.get(
                kind, lambda name, x: (*x[:-1], "clean") if x and x[-1] == "stored" else x
            )
            return state._replace(
                contents=tuple(change(n, x) for n, x in zip(self.buffers, state.contents, strict=True))
            )
        if kind == "store":
            return state._replace(contents=_replaced(state.contents, self.buffers[rest[0]], rest[1]))
        assert kind in ("multiply", "load"), operation
        read = rest[0] if kind == "multiply" else (rest[0],)
        if writing & set(read):
            return f"{read} are read while they are written"
        turn = state.turns[who]
        holds = tuple(state.contents[self.buffers[buffer]] for buffer in read)
        if turn >= len(self.expected[who]) or holds != self.expected[who][turn]:
            return f"{read} hold {holds} at read {turn} of consumer {who}"
        state = state._replace(turns=_replaced(state.turns, who, turn + 1))
        if kind == "load":
            return state
        if tuple(map(base_name, read)) in writes:
            return f"consumer {who} begins a product where another still writes"
        if self.turns and len(read) == 2:
            issued = [sum(len(e) == 2 for e in self.expected[i][: state.turns[i]]) for i in range(2)]
            if issued[1 - who] + 1 != issued[who] + who:
                return f"consumer {who} is not in turn"
        return state._replace(running=_replaced(state.running, who, (*state.running[who], read)))


def changed(record: Record, who: int, place: int, operation: Operation | None) -> Record:
    """With another operation, or none, at a place of a partition."""
    partitions = [list(operations) for operations in record.partitions]
    partitions[who][place : place + 1] = [] if operation is None else [operation]
    return replace(record, partitions=partitions)


def phases(operations: list[Operation], kinds: tuple[str, ...]) -> list[int]:
    """For each operation, which phase of its barrier it waits for (-1: what a new barrier has behind it) or takes part in."""
    count: dict[str, int] = {}
    found = []
    for kind, *rest in operations:
        phase = -2
        if kind in kinds:
            first = -1 if kind == "wait" and rest[1] == 1 else 0
            phase = count[rest[0]] = count.get(rest[0], first - 1) + 1
        found.append(phase)
    return found


def operations(record: Record, *kinds: str) -> Iterator[tuple[int, int, Operation, int]]:
    """Partition, place, operation, phase."""
    for who, listed in enumerate(record.partitions):
        for place, (operation, phase) in enumerate(zip(listed, phases(listed, kinds), strict=True)):
            if operation[0] in kinds:
                yield who, place, operation, phase
