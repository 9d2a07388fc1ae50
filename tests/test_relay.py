"""The relay's exchange: every order of events in a small model, many in the kernel itself."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="the kernels need triton")
import triton.language as tl

import fastkd
from fastkd.kernels import logits, relay
from fastkd.kernels.arithmetic import INTERPRETED
from fastkd.problem import Coefficients
from tests.test_kernels import masked_rows, problem_of
from tests.together import Deadlock, together

# One divergence of each lag: the gradient with the sums, and after them.
DIVERGENCES = [fastkd.ForwardKL(), fastkd.JSD(0.5)]

# --- the model -------------------------------------------------------------------------------


class Lost(Exception):
    """A word was overwritten before all had read it."""


def steps(member: int, members: int, rows: int, lag: int) -> list[tuple]:
    """What a program posts and waits for, one word at a time, as the kernel's rounds have it."""
    done: list[tuple] = []

    def wait(kind: str, row: int) -> None:
        done.extend(("wait", kind, row, other) for other in range(members))

    for tick in range(1, rows + lag + 1):
        if tick <= rows:
            done.append(("post", "statistics", tick))
        if lag == 3 and 1 <= tick - 2 <= rows:
            wait("sums", tick - 2)
        if 1 <= tick - 1 <= rows:
            wait("statistics", tick - 1)
            done.append(("post", "sums", tick - 1))
        if 1 <= tick - lag <= rows and tick % members == member:
            wait("statistics", tick - lag)
            wait("sums", tick - lag)
    return done


def explore(members: int, rows: int, lag: int, ring: int) -> int:
    """Runs every order of the members' steps; the number of states. Raises Deadlock or Lost."""
    programs = [steps(member, members, rows, lag) for member in range(members)]
    # What lies in the mailbox follows from how far its writer is: by writer, kind and step.
    posted = []
    for program in programs:
        now = {"statistics": 0, "sums": 0}
        posted.append([dict(now)])
        for step in program:
            if step[0] == "post":
                now[step[1]] = step[2]
            posted[-1].append(dict(now))

    def may(state: tuple[int, ...], member: int) -> bool:
        if state[member] == len(programs[member]):
            return False
        action, kind, row, *other = programs[member][state[member]]
        if action == "post":
            return True
        latest = posted[other[0]][state[other[0]]][kind]
        if latest >= row + ring:
            raise Lost(f"{kind} of row {row}, overwritten by row {row + ring}")
        return latest >= row

    start, end = (0,) * members, tuple(map(len, programs))
    seen, open_ = {start}, [start]
    while open_:
        state = open_.pop()
        able = [member for member in range(members) if may(state, member)]
        if not able and state != end:
            raise Deadlock(state)
        for member in able:
            after = (*state[:member], state[member] + 1, *state[member + 1 :])
            if after not in seen:
                seen.add(after)
                open_.append(after)
    assert end in seen
    return len(seen)


@pytest.mark.parametrize("lag", [2, 3])
@pytest.mark.parametrize(("members", "rows"), [(1, 12), (2, 20), (3, 7)])
def test_no_order_of_events_deadlocks_or_loses_a_word(members, rows, lag):
    assert explore(members, rows, lag, relay.RING.value) > rows


@pytest.mark.parametrize("lag", [2, 3])
def test_the_model_sees_what_a_smaller_mailbox_loses(lag):
    """The mailbox has room to spare: some smaller one would do, and one smaller yet would not."""
    needed = next(ring for ring in range(1, 9) if not _loses(ring, lag))
    assert 1 < needed <= relay.RING.value
    assert all(_loses(ring, lag) for ring in range(1, needed))


def _loses(ring: int, lag: int) -> bool:
    try:
        explore(2, 16, lag, ring)
    except Lost:
        return True
    return False


def test_the_model_sees_a_deadlock(monkeypatch):
    """Who waits for the statistics of a row before it posts its own waits for ever."""
    ordinary = steps

    def eager(member: int, *rest: int) -> list[tuple]:
        done = ordinary(member, *rest)
        waits = [step for step in done if step[:3] == ("wait", "statistics", 1)]
        return waits + done

    monkeypatch.setitem(globals(), "steps", eager)
    with pytest.raises(Deadlock):
        explore(2, 3, 2, 8)


# --- the kernel ------------------------------------------------------------------------------

INTERPRETER = pytest.mark.skipif(
    not INTERPRETED.value, reason="a GPU chooses the order of events itself"
)


def results(divergence, programs, force, device):
    force(("relay", 4, 8, 1, 1, programs))
    torch.manual_seed(1)
    rows = [masked_rows(device) for _ in range(2)]
    z, y, labels, counted = (torch.cat(parts) for parts in zip(*rows, strict=True))
    one = torch.ones(len(z), device=device)
    problem = problem_of(z, y, divergence, None, None, labels, counted)
    loss, _, gradient = logits.fused(problem, Coefficients(one, one, one), False, None)
    return loss, gradient


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
def test_the_number_of_groups_changes_no_bit(divergence, force, device):
    """A group of three for ten rows, of which two do not count; a group to each row.

    In the interpreter also with room for fewer programs than a row takes, which a GPU refuses.
    """
    first = results(divergence, 3, force, device)
    for programs in (7, 30, *([2] if device == "cpu" else [])):
        for ours, theirs in zip(results(divergence, programs, force, device), first, strict=True):
            assert torch.equal(ours, theirs)


@INTERPRETER
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
def test_the_order_of_events_changes_no_bit(divergence, force, device):
    first = results(divergence, 6, force, device)
    for seed in range(1, 6):
        with together({"relay"}, seed):
            other = results(divergence, 6, force, device)
        for ours, theirs in zip(other, first, strict=True):
            assert torch.equal(ours, theirs)


@INTERPRETER
def test_a_lost_word_is_seen_in_the_kernel_too(monkeypatch, force, device):
    """With a mailbox of one row, some order of events overwrites what another still waits for."""
    for module in (relay, logits):
        monkeypatch.setattr(module, "RING", tl.constexpr(1))
    with pytest.raises(Deadlock):
        results(fastkd.ForwardKL(), 3, force, device)
