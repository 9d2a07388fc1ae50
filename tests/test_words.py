"""The exchange of words (kernels/words.py): a model that goes through every order of events.

The programs of a group work off the same rows. For each exchange of a row that counts, a program
posts its word; then it looks at the words of all, one by one, and again until every flag is right.
"""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path

import pytest

WORDS = Path(__file__).parents[1] / "kernels" / "words.py"
RING = int(re.search(r"^RING = tl\.constexpr\((\d+)\)", WORDS.read_text(), re.MULTILINE)[1])
# Who takes the words of each exchange: of the statistics, then of the sums, which the first program
# alone wants where the gradient's sweep makes them.
BEFORE, LATE, RARE = ("all", "all"), ("all", "first"), ("all", "all", "first")
COUNT = (True, False, True, True)  # of a group's rows, which count


def outcome(programs, exchanges, slot=lambda row, turn: turn % RING, flag=lambda turn: turn,
            enough=all):  # fmt: skip
    """What may go wrong: "stale", a number of another row is taken; "stuck", no way to the end.

    slot, flag: of a row's words, by its number and by its turn among those that count; enough: of
    the flags that are right.
    """
    counted = [row for row, counts in enumerate(COUNT) if counts]
    plans = [
        [
            (what, exchange, turn, slot(row, turn))
            for turn, row in enumerate(counted, 1)
            for exchange, takers in enumerate(exchanges)
            for what in ("post", "take")
            if what == "post" or takers == "all" or program == 0
        ]
        for program in range(programs)
    ]
    # A state: for each program its step and what it has seen in this round, and the mailbox, which
    # holds the turn whose number a word is.
    start = (((0, ()),) * programs, ())
    begun, todo, stale = defaultdict(set), [start], False
    begun[start].add(None)
    while todo:
        state = todo.pop()
        places, box = state
        for program, (at, looked) in enumerate(places):
            if at == len(plans[program]):
                continue
            what, exchange, turn, place = plans[program][at]
            words, now = dict(box), (at + 1, ())
            if what == "post":
                words[exchange, place, program] = turn
            else:
                found = words.get((exchange, place, len(looked)), 0)
                right = found != 0 and flag(found) == flag(turn)
                looked = (*looked, (right, found == turn))
                now = (at, looked)
                if len(looked) == programs:
                    arrived = enough(right for right, _ in looked)
                    stale |= arrived and not all(own for _, own in looked)
                    now = (at + 1 if arrived else at, ())
            after = ((*places[:program], now, *places[program + 1 :]), tuple(sorted(words.items())))
            if after not in begun:
                todo.append(after)
            begun[after].add(state)
    ends = [
        s for s in begun if all(at == len(plan) for (at, _), plan in zip(s[0], plans, strict=True))
    ]
    led, todo = set(ends), ends
    while todo:
        for before in begun[todo.pop()] - led - {None}:
            led.add(before)
            todo.append(before)
    return {*["stale"] * stale, *["stuck"] * (len(led) < len(begun))}


@pytest.mark.parametrize("exchanges", [BEFORE, LATE, RARE], ids=["before", "late", "rare"])
def test_no_order_loses_a_word_or_waits_for_ever(exchanges):
    assert outcome(2, exchanges) == set()


def test_three_programs():
    assert outcome(3, LATE) == set()


@pytest.mark.parametrize(
    ("without", "seen"),
    [
        ({"slot": lambda row, turn: 0}, "stuck"),
        ({"slot": lambda row, turn: row % RING}, "stuck"),
        ({"flag": lambda turn: 1}, "stale"),
        ({"flag": lambda turn: turn % RING}, "stale"),
        ({"enough": any}, "stale"),
    ],
    ids=[
        "one slot",
        "slots by rows",
        "flags that say no more",
        "flags that come again",
        "one flag",
    ],
)
def test_what_the_protocol_needs(without, seen):
    """Taken away, one by one."""
    assert outcome(2, LATE, **without) == {seen}
