"""Decides which rows of which requests the next step computes.

First come all decoding sequences (one row each), then interactive work (prompts and queries) in order of arrival, then bulk
texts, up to ``budget`` tokens. Prompts are causal and are read in chunks; a text is bidirectional and is read whole. The budget
follows a target time between tokens: it shrinks after a step that took longer and grows after a full step that was faster; while
nothing decodes it is the largest step.

A text that does not fit next to the decoding rows goes in once the budget that the steps since have left unused covers it: such
steps take longer than the target, but steps keep to it on average, and long texts are read as fast as short ones.

Nothing starves. Bulk work counts as if it had arrived ``ageing`` seconds later, so interactive work that arrives after that
queues behind it. A text that is first in line is admitted whatever the budget: an interactive one at once, a bulk one when
``ageing`` seconds have passed since it arrived and since the last one was forced in.

Memory is reserved before a sequence starts, for its prompt and its longest possible reply. The states of ended sequences are kept
until their rows are needed: a prompt that shares a prefix with one of them copies the states of the common tokens, and one that
shares a prefix with a prompt being read waits until that is done.

There are no tensors here except in the arena: this file decides, engine.py computes.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np

from python_model.serve.arena import Arena, Interval
from python_model.support.arguments import check_at_least

if TYPE_CHECKING:
    from python_model.generate.states import TextStates

LEAST_SHARED = 16
"""Minimum number of common tokens for which states are copied or waited for."""

LEAST_BUDGET = 32
"""Minimum budget: even if decoding alone misses the target, prompts make progress."""

LEAST_PIECE = 16
"""The prompt that is first in line gets at least this many tokens of a step, however much is decoding."""


@dataclass(eq=False)
class Work:
    """A unit of scheduling: a text or a sequence. ``arrival`` and ``deadline`` are in seconds of the same clock."""

    tokens: list[int]
    arrival: float = 0.0
    deadline: float = math.inf
    cancelled: bool = False


@dataclass(eq=False)
class Text(Work):
    """A text that is read whole in a single step, in scratch rows.

    ``causal``: see :class:`python_model.serve.step.Item`. ``instruction_len``: leading tokens excluded from pooling. ``labels``:
    per token the one that follows if its log-probability is wanted, otherwise IGNORE_INDEX; None for a text to embed.
    """

    causal: bool = False
    causal_prefix: int | None = None
    instruction_len: int = 0
    bulk: bool = False
    labels: list[int] | None = None


@dataclass(eq=False)
class Sequence(Work):
    """A prompt and its continuation; ``tokens`` grows. ``done``: leading tokens whose states are in ``interval``.

    ``states``: states of the first of ``tokens`` that were computed elsewhere; copied into the arena when it starts.
    ``shareable``: whether its states depend on its tokens alone, so that others may copy them. ``reused``: prompt tokens that
    were not computed.
    """

    max_tokens: int = 1
    prompt: int = 0
    done: int = 0
    interval: Interval | None = None
    states: TextStates | None = None
    shareable: bool = True
    reused: int = 0
    _array: np.ndarray | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        self.prompt = len(self.tokens)
        self.shareable = self.shareable and self.states is None

    @property
    def room(self) -> int:
        """Rows it may need; the last new token is never read."""
        return self.prompt + self.max_tokens - 1

    @property
    def decoding(self) -> bool:
        """Whether its next step is a single row, after a generated token."""
        return len(self.tokens) > self.prompt

    def array(self) -> np.ndarray:
        """The prompt, in the form used to compare prefixes."""
        if self._array is None:
            self._array = np.array(self.tokens[: self.prompt])
        return self._array


class QueueFull(Exception):
    """The queue is full; ``retry_after``: seconds until a retry is worthwhile."""

    def __init__(self, retry_after: float) -> None:
        super().__init__(f"the queue is full; try again in {retry_after:.0f} s")
        self.retry_after = retry_after


class Scheduler:
    """See the top of the file.

    Args:
        arena: the memory of the sequences; its scratch rows limit the texts of a step.
        max_step_tokens: the largest step; at most the scratch rows.
        target_seconds: target time between two tokens of a sequence.
        ageing: seconds after which bulk work is treated like interactive work.
        max_sequences: maximum number of concurrent sequences.
        max_queued_tokens: waiting tokens (of prompts and texts) above which new work is refused.
        reuse: whether prompts share the states of common prefixes.
    """

    def __init__(
        self,
        arena: Arena,
        *,
        max_step_tokens: int,
        target_seconds: float = 0.1,
        ageing: float = 5.0,
        max_sequences: int = 64,
        max_queued_tokens: int = 1 << 18,
        reuse: bool = True,
    ) -> None:
        check_at_least("max_step_tokens", max_step_tokens, LEAST_BUDGET)
        check_at_least("max_sequences", max_sequences, 1)
        if max_step_tokens > arena.scratch:
            raise ValueError(
                f"max_step_tokens: expected at most the arena's {arena.scratch} scratch rows, got {max_step_tokens}"
            )
        self.arena, self.max_step_tokens, self.target_seconds, self.ageing = (
            arena,
            max_step_tokens,
            target_seconds,
            ageing,
        )
        self.max_sequences, self.max_queued_tokens, self.reuse = max_sequences, max_queued_tokens, reuse
        self.budget = float(max_step_tokens)
        self.unused = 0.0  # budget that past steps left to the text that did not fit
        self.tokens_per_second = 0.0
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.queries: deque[Text] = deque()
        self.bulk: deque[Text] = deque()
        self.held: list[Sequence] = []  # ended, least recently used first
        self._last_forced = -math.inf
        self._tokens_in_line = 0  # of waiting, queries and bulk, which may be long
        self._cancelled = False  # whether a work was, since the last reap()
        self._first_deadline = math.inf  # not after that of any work

    @property
    def queued_tokens(self) -> int:
        """Tokens waiting to be read."""
        return self._tokens_in_line + sum(s.prompt - s.done for s in self.running if not s.decoding)

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not (self.waiting or self.running or self.queries or self.bulk)

    def add(self, works: list[Work]) -> None:
        """Accept all works of a request, or none.

        Raises:
            QueueFull: too much is waiting already.
            ValueError: a work that would never fit.
        """
        for work in works:
            if isinstance(work, Sequence) and work.room > self.arena.rows:
                raise ValueError(
                    f"max_tokens: expected prompt and reply within {self.arena.rows} tokens, "
                    f"got {work.prompt} + {work.max_tokens}"
                )
            if isinstance(work, Text) and len(work.tokens) > self.max_step_tokens:
                raise ValueError(f"text: expected at most {self.max_step_tokens} tokens, got {len(work.tokens)}")
        queued = self.queued_tokens
        if queued and queued + sum(len(work.tokens) for work in works) > self.max_queued_tokens:
            speed = self.tokens_per_second or 1000.0
            raise QueueFull(max(1.0, min(queued / speed, 60.0)))
        for work in works:
            if isinstance(work, Sequence):
                self.waiting.append(work)
            elif isinstance(work, Text):
                (self.bulk if work.bulk else self.queries).append(work)
            self._tokens_in_line += len(work.tokens)
            self._first_deadline = min(self._first_deadline, work.deadline)
            if work.cancelled:  # before it came here
                self._cancelled = True

    def cancel(self, works: Iterable[Work]) -> None:
        """Mark works that the next :meth:`reap` drops; any thread may call this at any time."""
        for work in works:
            work.cancelled = True
        self._cancelled = True

    def reap(self, now: float) -> list[Work]:
        """Drop cancelled and expired works and free their memory; returns the expired ones."""
        if not self._cancelled and now < self._first_deadline:
            return []  # without a walk through all that wait
        self._cancelled = False  # first: what is cancelled from here on may be missed below
        gone = [work for work in self._all() if work.cancelled or work.deadline <= now]
        if gone:
            chosen = set(map(id, gone))
            self.waiting = deque(s for s in self.waiting if id(s) not in chosen)
            self.queries = deque(t for t in self.queries if id(t) not in chosen)
            self.bulk = deque(t for t in self.bulk if id(t) not in chosen)
            for work in gone:
                if isinstance(work, Sequence) and work in self.running:
                    self.finish(work)
        self._first_deadline = min((work.deadline for work in self._all()), default=math.inf)
        self._tokens_in_line = sum(len(work.tokens) for work in chain(self.waiting, self.queries, self.bulk))
        return [work for work in gone if not work.cancelled]

    def finish(self, sequence: Sequence) -> None:
        """Mark a running sequence as ended: its states can be reused until their rows are needed."""
        self.running.remove(sequence)
        interval = sequence.interval
        assert interval is not None
        if self.reuse and sequence.shareable and sequence.done >= LEAST_SHARED:
            interval.rows = interval.filled = sequence.done
            sequence._array = np.array(sequence.tokens[: sequence.done])
            self.held.append(sequence)
        else:
            self.arena.free(interval)
            sequence.interval = None

    def remove(self, text: Text) -> None:
        """Mark a text as read (or failed)."""
        (self.bulk if text.bulk else self.queries).remove(text)
        self._tokens_in_line -= len(text.tokens)

    def plan(self, now: float) -> list[tuple[Work, int]]:
        """The works of the next step and how many tokens of each, decoding sequences first."""
        self._admit()
        chosen: list[tuple[Work, int]] = [(s, 1) for s in self.running if s.decoding]
        decoding = used = len(chosen)
        budget = int(self.budget) if decoding else self.max_step_tokens
        unused, self.unused = self.unused if decoding else 0.0, 0.0
        scratch = 0
        for work in self._in_line():
            first = len(chosen) == decoding
            if isinstance(work, Sequence):
                count = min(work.prompt - work.done, max(budget - used, LEAST_PIECE if first else 0))
                if count < 1:
                    break
            else:
                count = len(work.tokens)
                assert isinstance(work, Text)
                room = budget + unused - used
                if count > room and not (first and self._forced(work, now, decoding)):
                    self.unused = max(room, 0.0)
                    break
                if scratch + count > self.arena.scratch:
                    break
                scratch += count
            chosen.append((work, count))
            used += count
        return chosen

    def report(self, tokens: int, seconds: float, decoding: int) -> None:
        """Adapt the budget to the duration of a step of ``tokens``, of which ``decoding`` were decoding rows."""
        if seconds <= 0:
            return
        speed = tokens / seconds
        self.tokens_per_second = speed if not self.tokens_per_second else 0.9 * self.tokens_per_second + 0.1 * speed
        ratio = self.target_seconds / seconds
        if 0 < decoding < tokens and (ratio < 1 or tokens >= 0.8 * self.budget):
            # a long text may exceed the budget without being slow for its length
            kept = max(tokens, self.budget) * ratio
            budget = min(max(kept, 0.5 * self.budget), 1.2 * self.budget)
            self.budget = min(max(budget, LEAST_BUDGET), float(self.max_step_tokens))

    def _forced(self, text: Text, now: float, decoding: int) -> bool:
        """Whether a text that is first in line is admitted although it exceeds the remaining budget."""
        if not text.bulk or not decoding:
            return True
        if now - max(text.arrival, self._last_forced) < self.ageing:
            return False
        self._last_forced = now
        return True

    def _in_line(self) -> Iterator[Work]:
        """Prompts, queries and bulk texts in order of service."""
        prompts = [s for s in self.running if not s.decoding]
        queries, bulk = iter(self.queries), iter(self.bulk)
        heads: list[tuple[float, int, Work, Iterator[Work]]] = []

        def push(source: Iterator[Work], place: int, delay: float) -> None:
            work = next(source, None)
            if work is not None:
                heads.append((work.arrival + delay, place, work, source))

        delays = (0.0, 0.0, self.ageing)
        for place, source in enumerate((iter(prompts), queries, bulk)):
            push(source, place, delays[place])
        while heads:
            best = min(heads, key=lambda head: head[:2])
            heads.remove(best)
            yield best[2]
            push(best[3], best[1], delays[best[1]])

    def _admit(self) -> None:
        """Start waiting sequences in order while there is memory for them."""
        later: list[Sequence] = []
        while self.waiting and len(self.running) < self.max_sequences:
            sequence = self.waiting[0]
            source, common = self._shared(sequence)
            if source is not None and common > source.done:
                later.append(self.waiting.popleft())  # its prefix is being read
                continue
            interval = self._reserve(sequence.room, source)
            if interval is None and source in self.held:
                # the only room is where the common prefix lies: it is recomputed
                source, interval = None, self._reserve(sequence.room, None)
            if interval is None:
                break
            self.waiting.popleft()
            self._tokens_in_line -= sequence.prompt
            sequence.interval = interval
            if sequence.states is not None:
                self.arena.write(interval, sequence.states)
                sequence.done = sequence.reused = len(sequence.states)
                sequence.states = None
            elif source is not None:
                assert source.interval is not None
                self.arena.share(source.interval, interval, common)
                sequence.done = sequence.reused = common
                if source in self.held:
                    self.held.remove(source)
                    self.held.append(source)
            self.running.append(sequence)
        self.waiting.extendleft(reversed(later))

    def _reserve(self, rows: int, source: Sequence | None) -> Interval | None:
        """An interval, if necessary after releasing kept states other than those of ``source``; None if that is not enough."""
        free = self.arena.rows - self.arena.used
        spare = [s for s in self.held if s is not source]
        if free + sum(s.done for s in spare) < rows:
            return None
        while (interval := self.arena.allocate(rows)) is None:
            victim = spare.pop(0)
            self.held.remove(victim)
            assert victim.interval is not None
            self.arena.free(victim.interval)
        return interval

    def _shared(self, sequence: Sequence) -> tuple[Sequence | None, int]:
        """The sequence with the longest common prefix (at least LEAST_SHARED tokens, never the whole prompt), and its length."""
        best, longest = None, LEAST_SHARED - 1
        if not self.reuse or not sequence.shareable or sequence.prompt <= LEAST_SHARED:
            return best, 0
        prompt = sequence.array()[:-1]
        for other in chain(self.held, self.running):
            if not other.shareable:
                continue
            theirs = other.array()
            size = min(len(prompt), len(theirs))
            if size <= longest:
                continue
            different = np.flatnonzero(prompt[:size] != theirs[:size])
            common = int(different[0]) if len(different) else size
            if common > longest:
                best, longest = other, common
        return best, longest

    def _all(self) -> Iterator[Work]:
        return chain(self.waiting, self.running, self.queries, self.bulk)
