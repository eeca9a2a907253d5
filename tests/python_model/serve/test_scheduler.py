"""What the scheduler promises: decoding first, pieces of prompts, nobody starves, the budget follows the target."""

from __future__ import annotations

import random

import pytest

from python_model.serve.arena import Arena
from python_model.serve.scheduler import QueueFull, Scheduler, Sequence, Text, Work


def scheduler(rows: int = 1000, step: int = 64, **options: float) -> Scheduler:
    return Scheduler(Arena(1, 1, 8, rows, 64), max_step_tokens=step, **options)  # type: ignore[arg-type]


def prompt(length: int, first: int = 0, max_tokens: int = 10, arrival: float = 0.0) -> Sequence:
    return Sequence(list(range(first, first + length)), arrival=arrival, max_tokens=max_tokens)


def text(length: int, *, bulk: bool = False, arrival: float = 0.0) -> Text:
    return Text([0] * length, arrival=arrival, bulk=bulk)


def run(plan: list[tuple[Work, int]], scheduler: Scheduler) -> None:
    """What a step does to the scheduler's works."""
    for work, count in plan:
        if isinstance(work, Text):
            scheduler.remove(work)
        elif isinstance(work, Sequence):
            assert work.interval is not None
            work.done += count
            work.interval.filled = work.done
            if work.done == len(work.tokens):
                work.tokens.append(0)
                if len(work.tokens) - work.prompt == work.max_tokens:
                    scheduler.finish(work)


def test_decoding_goes_first_then_interactive_by_arrival_then_bulk() -> None:
    s = scheduler()
    decoding = prompt(5)
    s.add([decoding])
    run(s.plan(0.0), s)
    bulk, query, new = text(8, bulk=True, arrival=0.1), text(8, arrival=0.3), prompt(9, 100, arrival=0.2)
    s.add([bulk, query, new])
    assert s.plan(0.4) == [(decoding, 1), (new, 9), (query, 8), (bulk, 8)]


def test_a_long_prompt_is_cut_into_pieces_that_leave_room_for_decoding() -> None:
    s = scheduler(step=32)
    decoding, long = prompt(5), prompt(100, 200)
    s.add([decoding])
    run(s.plan(0.0), s)
    s.add([long])
    counts = []
    while long.done < 100:
        plan = s.plan(0.0)
        assert plan[0] == (decoding, 1) or decoding not in s.running
        counts += [count for work, count in plan if work is long]
        run(plan, s)
    assert counts == [31, 31, 31, 7]


def test_a_text_goes_in_whole_or_not_at_all() -> None:
    s = scheduler(step=32)
    s.add([text(20), text(20), text(12)])
    assert [count for _, count in s.plan(0.0)] == [20]


def test_bulk_texts_are_not_starved_by_interactive_ones() -> None:
    s = scheduler(step=32, ageing=5.0)
    old = text(30, bulk=True, arrival=0.0)
    s.add([old])
    now, served = 0.0, None
    for _ in range(100):
        now += 0.5
        s.add([text(30, arrival=now), text(30, arrival=now)])  # more than a step can take
        plan = s.plan(now)
        if any(work is old for work, _ in plan):
            served = now
            break
        run(plan, s)
    # two interactive texts arrive per step that serves one: those before ageing ends stand ahead
    assert served is not None and served <= 5.0 + 10 * 0.5 + 0.5


def served_at(s: Scheduler, steps: int, seconds: float) -> list[int]:
    """The steps that read a text."""
    found = []
    for step in range(1, steps):
        plan = s.plan(step * seconds)
        found += [step for work, _ in plan if isinstance(work, Text)]
        run(plan, s)
    return found


def test_a_long_bulk_text_beside_decoding_goes_in_when_unused_budget_covers_it() -> None:
    s = scheduler(step=64, ageing=5.0)
    s.add([prompt(5, max_tokens=500)])
    run(s.plan(0.0), s)
    s.budget = 20.0
    s.add([text(60, bulk=True), text(60, bulk=True), text(15, bulk=True)])
    # of 20 rows a step, one decodes: 19, 38, 57 and 76 - 60, then 35, 54 and 73 - 60, where the short one does not fit beside it
    assert served_at(s, 24, 0.05) == [4, 7, 8]
    assert s.unused == 0, "nobody waits"


def test_unused_budget_is_not_saved_for_texts_that_come_later() -> None:
    s = scheduler(step=64, ageing=5.0)
    s.add([prompt(5, max_tokens=500)])
    run(s.plan(0.0), s)
    s.budget = 20.0
    assert served_at(s, 10, 0.05) == []
    s.add([text(60, bulk=True)])
    assert served_at(s, 10, 0.05) == [4]


def test_a_bulk_text_for_which_decoding_leaves_no_budget_waits_for_its_age() -> None:
    s = scheduler(step=64, ageing=5.0)
    s.add([prompt(5, 10 * i, max_tokens=500) for i in range(4)])
    run(s.plan(0.0), s)
    s.budget = 4.0
    s.add([text(60, bulk=True), text(60, bulk=True)])
    assert served_at(s, 24, 0.5) == [10, 20]


def test_an_interactive_text_longer_than_the_budget_goes_in_at_once() -> None:
    s = scheduler(step=64)
    s.add([prompt(5, max_tokens=500)])
    run(s.plan(0.0), s)
    s.budget = 20.0
    query = text(60)
    s.add([query])
    assert any(work is query for work, _ in s.plan(0.1))


def test_the_budget_shrinks_after_slow_steps_and_grows_after_full_fast_ones() -> None:
    s = scheduler(step=64, target_seconds=0.1)
    s.report(64, 0.4, decoding=1)
    assert s.budget == 32
    s.report(5, 0.01, decoding=1)
    assert s.budget == 32, "a small step says nothing about larger ones"
    s.report(96, 0.3, decoding=1)
    assert s.budget == 32, "a step of three budgets may take three times as long"
    for _ in range(10):
        s.report(int(s.budget), 0.05, decoding=1)
    assert s.budget == 64
    s.report(64, 0.4, decoding=0)
    assert s.budget == 64
    s.report(9, 0.4, decoding=9)
    assert s.budget == 64, "rows that decode are not what the budget can leave out"


def test_the_budget_at_most_halves_or_grows_by_a_fifth_in_a_step_and_has_a_least() -> None:
    s = scheduler(step=64, target_seconds=0.1)
    for start, seconds, expected in (
        (60.0, 0.01, 64.0),
        (50.0, 0.01, 60.0),
        (50.0, 0.09, 50 / 0.9),
        (50.0, 0.11, 50 / 1.1),
    ):
        s.budget = start
        s.report(50, seconds, decoding=1)
        assert s.budget == pytest.approx(expected)
    s.budget = 40.0
    s.report(40, 9.0, decoding=1)
    assert s.budget == 32
    s.report(40, 0.0, decoding=1)
    assert s.budget == 32, "a clock that did not move says nothing"


def test_a_prompt_first_in_line_gets_a_piece_however_much_is_decoding() -> None:
    s = scheduler(step=64)
    s.add([prompt(20, 100 * i, max_tokens=50) for i in range(3)])
    run(s.plan(0.0), s)
    s.budget = 3.0
    first, second = prompt(40, 500), prompt(40, 700)
    s.add([first, second])
    for left in (16, 16, 8):
        plan = s.plan(0.0)
        assert [(work, count) for work, count in plan[3:]] == [(first, left)]
        run(plan, s)
    s.budget = 24.0
    assert s.plan(0.0)[4:] == [(second, 20)], "what four that decode leave of the budget"


def test_a_full_queue_is_empty_again_after_the_time_that_its_tokens_take() -> None:
    s = scheduler(max_queued_tokens=100)
    s.add([text(64), text(36)])
    with pytest.raises(QueueFull) as refused:
        s.add([text(1)])
    assert refused.value.retry_after == 1.0, "the least"
    long = scheduler(max_queued_tokens=2560)
    long.add([text(64) for _ in range(40)])
    with pytest.raises(QueueFull) as refused:
        long.add([text(1)])
    assert refused.value.retry_after == pytest.approx(2.56), "at a supposed 1000 tokens a second"
    s.report(40, 1.0, decoding=0)
    s.report(20, 1.0, decoding=0)
    assert s.tokens_per_second == pytest.approx(0.9 * 40 + 0.1 * 20)
    for speed, wait in ((38.0, 100 / 38), (1e9, 1.0), (0.1, 60.0)):
        s.tokens_per_second = speed
        with pytest.raises(QueueFull) as refused:
            s.add([text(1)])
        assert refused.value.retry_after == pytest.approx(wait)
    run(s.plan(0.0), s)
    assert s.queued_tokens == 36
    s.add([text(64)])
    assert s.queued_tokens == 100
    empty = scheduler(max_queued_tokens=10)
    empty.add([text(64)])
    assert empty.queued_tokens == 64, "nothing waits before it"


def test_works_that_fill_the_memory_or_a_step_fit_and_larger_ones_do_not() -> None:
    s = scheduler(rows=100, step=64)
    s.add([prompt(60, max_tokens=41), text(64)])
    with pytest.raises(ValueError, match=r"^max_tokens: expected prompt and reply within 100 tokens, got 60 \+ 42"):
        s.add([prompt(60, max_tokens=42)])
    with pytest.raises(ValueError, match="^text: expected at most 64 tokens, got 65"):
        s.add([text(65)])
    scheduler(step=32)
    with pytest.raises(ValueError, match="max_step_tokens: expected .* 32, got 31"):
        scheduler(step=31)
    with pytest.raises(ValueError, match="max_step_tokens: expected at most the arena's 64 scratch rows, got 65"):
        scheduler(step=65)
    with pytest.raises(ValueError, match="max_sequences: expected .* 1, got 0"):
        scheduler(max_sequences=0)


def test_no_more_sequences_run_than_are_allowed() -> None:
    s = scheduler(max_sequences=2)
    works = [prompt(5, 10 * i, max_tokens=2 + i) for i in range(3)]
    s.add(list(works))
    s.plan(0.0)
    assert s.running == works[:2]
    run(s.plan(0.0), s)
    run(s.plan(0.0), s)
    s.plan(0.0)
    assert s.running == works[1:]


def ended(s: Scheduler, *prompts: Sequence) -> None:
    """Serve the prompts to their ends, one after the other."""
    for work in prompts:
        s.add([work])
        while not s.idle:
            run(s.plan(0.0), s)


@pytest.mark.parametrize(("common", "reused"), [(15, 0), (16, 16), (17, 17)])
def test_states_are_copied_from_sixteen_common_tokens_on(common: int, reused: int) -> None:
    s = scheduler()
    later = Sequence([*range(common), *range(500, 520)], max_tokens=1)
    ended(s, prompt(30, max_tokens=1), later)
    assert later.reused == reused


def test_a_prompt_of_sixteen_tokens_or_with_states_of_its_own_shares_none() -> None:
    s = scheduler()
    short, again = prompt(16, max_tokens=1), prompt(17, max_tokens=1)
    ended(s, prompt(30, max_tokens=1), short, again)
    assert (short.reused, again.reused) == (0, 16), "at least the last token is read"
    for number, own in enumerate((False, True)):
        apart = Sequence(list(range(600 + 100 * number, 630 + 100 * number)), max_tokens=1, shareable=own)
        same = Sequence(list(apart.tokens), max_tokens=1)
        ended(s, apart, same)
        assert same.reused == (29 if own else 0)


def test_the_longest_common_beginning_is_copied() -> None:
    s = scheduler()
    ended(s, *(Sequence([*range(n), *range(900 + n, 930)], max_tokens=1) for n in (20, 28, 24)))
    later = prompt(40, max_tokens=1)
    ended(s, later)
    assert later.reused == 28


def test_states_that_were_not_used_for_longest_give_way_first() -> None:
    s = scheduler(rows=130)
    ended(s, prompt(30, 0, max_tokens=1), prompt(30, 100, max_tokens=1), prompt(30, 200, max_tokens=1))
    # of 90 rows kept the first 30 are used again and 31 taken: 9 are free
    ended(s, prompt(31, 0, max_tokens=1), prompt(30, 300, max_tokens=1))
    starts = sorted(held.tokens[0] for held in s.held)
    assert starts == [0, 0, 200, 300]


def test_nothing_starts_before_there_is_room_for_prompt_and_reply() -> None:
    s = scheduler(rows=100)
    first, second = prompt(40, max_tokens=21), prompt(40, 200, max_tokens=2)
    s.add([first, second])
    while first in s.running or s.waiting:
        plan = s.plan(0.0)
        assert second not in s.running or first not in s.running
        run(plan, s)
    assert second in s.running


def test_a_prompt_waits_for_the_one_that_reads_the_same_beginning_and_lets_others_pass() -> None:
    s = scheduler(rows=1000, step=32)
    first, same, other = prompt(100), prompt(100), prompt(20, 500)
    s.add([first, same, other])
    s.plan(0.0)
    assert s.running == [first, other] and list(s.waiting) == [same]
    for _ in range(6):
        run(s.plan(0.0), s)
    assert same.reused == 99


def test_cancelling_the_sequence_that_others_wait_for_lets_them_start() -> None:
    s = scheduler(rows=1000, step=32)
    first, same = prompt(100), prompt(100)
    s.add([first, same])
    run(s.plan(0.0), s)
    s.cancel([first])
    assert s.reap(0.0) == []
    s.plan(0.0)
    assert s.running == [same] and same.reused == 32


@pytest.mark.parametrize("rows", [150, 300])
def test_a_backlog_ends_and_leaves_no_memory_behind(rows: int) -> None:
    s = scheduler(rows=rows, step=32)
    s.add([prompt(20 + 7 * i, 50 * (i % 3), max_tokens=5 + i) for i in range(12)])
    for _ in range(1000):
        run(s.plan(0.0), s)
    assert s.idle and s.arena.used == sum(h.done for h in s.held)


@pytest.mark.parametrize("seed", range(4))
def test_the_tokens_of_the_queue_are_counted_through_all_that_happens(seed: int) -> None:
    source = random.Random(seed)
    s = scheduler(rows=300, step=32, max_sequences=3)
    works: list[Work] = []
    now = 0.0
    for _ in range(300):
        now += 1.0
        length = source.randrange(1, 30)
        new = source.choice(
            [prompt(length + 20, source.choice([0, 100])), text(length), text(length, bulk=True, arrival=now)]
        )
        new.deadline = now + source.choice([3.0, 20.0, 1000.0])
        if source.random() < 0.6:
            s.add([new])
            works.append(new)
        if source.random() < 0.2 and works:
            s.cancel([source.choice(works)])
        gone = s.reap(now)
        assert all(work.deadline <= now and not work.cancelled for work in gone)
        left = list(s._all())
        assert not any(work.cancelled or work.deadline <= now for work in left)
        run(s.plan(now), s)
        unread = [w.prompt - w.done if isinstance(w, Sequence) else len(w.tokens) for w in s._all()]
        assert s.queued_tokens == sum(max(tokens, 0) for tokens in unread)


def test_nobody_walks_through_the_queue_unless_something_in_it_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    s = scheduler()
    works = [text(8, bulk=True) for _ in range(4)]
    for work in works:
        work.deadline = 10.0
    s.add(list(works))
    monkeypatch.setattr(s, "_all", None)
    for now in (0.0, 5.0, 9.9):
        assert s.reap(now) == [] and s.queued_tokens == 32
    monkeypatch.undo()
    late = text(8)
    late.cancelled = True  # its client left while it was on its way
    s.add([late])
    assert s.reap(9.9) == [] and s.queued_tokens == 32
    assert s.reap(10.0) == works and s.idle and s.queued_tokens == 0
