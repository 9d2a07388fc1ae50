"""Loss, and gradient, with one read of each operand: programs hold a row between them.

A group of SPLITS programs shares its rows. Each keeps its BLOCK columns of a row in registers from
the statistics to the gradient, and the group hands on through a mailbox what the phases need of
each other. Three or four rows are under way at once, so that nobody waits for a word just sent.
`README.md` has the picture, and says why no word is lost and nobody waits for ever.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastkd.divergences import SLOPE_SUM
from fastkd.kernels import phases as P
from fastkd.kernels import rows as R

# Rows whose words a mailbox holds: a word is overwritten by that of the row this much later.
RING = tl.constexpr(8)
# Two entries of -inf in one word.
MASKED_BF16, MASKED_FP16 = tl.constexpr(-0x7F0080), tl.constexpr(-0x3FF0400)

# Which of the fields that the pieces of a row hand on travel: always, and by what is wanted.
ALWAYS = ("s_max", "t_max", "s_sum", "t_sum", "value")
NEEDED = {
    R.MIXTURE: ("mixture_max", "mixture"), R.GAP: ("gap",), R.ENTROPY: ("s_entropy",),
    R.TEACHER_ENTROPY: ("t_entropy", "agreement"), R.UNIT: ("unit",), R.MEAN: ("total",),
    R.LEVER: ("s_entropy", "lever", "entropy_lever"),
}  # fmt: skip
LABELLED = tl.constexpr(1 << P.LABEL.value)


def fields(want: int, labels: bool, constant: str) -> int:
    """A bit for each that travels, by its place in phases.HANDED_ON."""
    sent = {*ALWAYS, *["label_logit"] * labels, *["slope"] * (constant == SLOPE_SUM)}
    for flag, names in NEEDED.items():
        sent |= set(names) if want & flag.value else set()
    return sum(1 << P.HANDED_ON.index(name) for name in sent)


# --- the mailbox -----------------------------------------------------------------------------


@triton.jit
def box_of(mailbox, group, ordinal, SIZE: tl.constexpr):
    """Where the words of a group's row lie, [FIELDS, SIZE]: one of each member in each field."""
    return mailbox + (group * RING + ordinal % RING) * (P.FIELDS * SIZE)


@triton.jit
def post(box, x, ordinal):
    """A word is a number and the ordinal of its row: its own flag, so that no order is needed."""
    bits = tl.cast(x, tl.float32).to(tl.uint32, bitcast=True).to(tl.int64)
    tl.atomic_xchg(box, (ordinal.to(tl.int64) << 32) | bits, sem="relaxed")


@triton.jit
def peek(box, SPLITS: tl.constexpr, SIZE: tl.constexpr):
    """The words of all members in a field, whether they have arrived or not."""
    member = tl.arange(0, SIZE)
    return tl.load(box + member, mask=member < SPLITS, other=0, volatile=True)


@triton.jit
def post_statistics(box, stats, label_logit, ordinal, SENT: tl.constexpr, SIZE: tl.constexpr):
    for i in tl.static_range(P.LABEL):
        if SENT & (1 << i):
            post(box + i * SIZE, stats[i], ordinal)
    if LABELLED & SENT:
        post(box + P.LABEL * SIZE, label_logit, ordinal)


@triton.jit
def post_sums(box, sums, ordinal, SENT: tl.constexpr, SIZE: tl.constexpr):
    for i in tl.static_range(P.FIRST_SUM, P.FIELDS):
        if SENT & (1 << i):
            post(box + i * SIZE, sums[i - P.FIRST_SUM], ordinal)


@triton.jit
def peek_fields(box, FROM: tl.constexpr, TO: tl.constexpr, SENT: tl.constexpr,
                SPLITS: tl.constexpr, SIZE: tl.constexpr):  # fmt: skip
    words = ()
    for i in tl.static_range(FROM, TO):
        if SENT & (1 << i):
            words = words + (peek(box + i * SIZE, SPLITS, SIZE),)
        else:
            words = words + (tl.zeros([SIZE], tl.int64),)
    return words


@triton.jit
def late(words, ordinal, FROM: tl.constexpr, TO: tl.constexpr, SENT: tl.constexpr,
         SPLITS: tl.constexpr, SIZE: tl.constexpr):  # fmt: skip
    """Whether a word has not arrived."""
    differ = tl.zeros([SIZE], tl.int32)
    for i in tl.static_range(FROM, TO):
        if SENT & (1 << i):
            differ |= (words[i - FROM] >> 32).to(tl.int32) ^ ordinal
    here = tl.arange(0, SIZE) < SPLITS
    return tl.max((here & (differ != 0)).to(tl.int32)) != 0


@triton.jit
def settle(words, box, ordinal, FROM: tl.constexpr, TO: tl.constexpr, SENT: tl.constexpr,
           SPLITS: tl.constexpr, SIZE: tl.constexpr):  # fmt: skip
    """The words, once all have arrived."""
    while late(words, ordinal, FROM, TO, SENT, SPLITS, SIZE):
        words = peek_fields(box, FROM, TO, SENT, SPLITS, SIZE)
    return words


@triton.jit
def number(word, other, SPLITS: tl.constexpr, SIZE: tl.constexpr):
    """Of each member, and `other` beyond the last one."""
    here = tl.arange(0, SIZE) < SPLITS
    return tl.where(here, word.to(tl.int32).to(tl.float32, bitcast=True), other)


@triton.jit
def settle_statistics(words, box, ordinal, temper, WANT: tl.constexpr, SENT: tl.constexpr,
                      SPLITS: tl.constexpr, SIZE: tl.constexpr):  # fmt: skip
    """The statistics of the row and its label's logit: scalars."""
    words = settle(words, box, ordinal, 0, P.FIRST_SUM, SENT, SPLITS, SIZE)
    neutral, stats, label_logit = R.empty(SIZE), (), 0.0
    for i in tl.static_range(P.LABEL):
        numbers = tl.reshape(neutral[i], [SIZE])
        if SENT & (1 << i):
            numbers = number(words[i], numbers, SPLITS, SIZE)
        stats = stats + (numbers,)
    if LABELLED & SENT:
        label_logit = tl.max(number(words[P.LABEL], -float("inf"), SPLITS, SIZE))
    return R.collapse(R.Statistics(*stats), temper, WANT), label_logit


@triton.jit
def settle_sums(box, ordinal, WANT: tl.constexpr, SENT: tl.constexpr, SPLITS: tl.constexpr,
                SIZE: tl.constexpr):  # fmt: skip
    words = peek_fields(box, P.FIRST_SUM, P.FIELDS, SENT, SPLITS, SIZE)
    words = settle(words, box, ordinal, P.FIRST_SUM, P.FIELDS, SENT, SPLITS, SIZE)
    sums = ()
    for i in tl.static_range(P.FIRST_SUM, P.FIELDS):
        numbers = tl.zeros([SIZE], tl.float32)
        if SENT & (1 << i):
            numbers = number(words[i - P.FIRST_SUM], 0.0, SPLITS, SIZE)
        sums = sums + (numbers,)
    return P.collapse_sums(R.Sums(*sums), WANT)


# --- the rows of a group ---------------------------------------------------------------------


@triton.jit
def following(index, groups, rows, counted, gradient, outer, inner_stride, inner, begin, end,
              ALIGN: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """The group's next row that counts; those before it get a gradient of 0."""
    index += groups
    if counted is not None:
        while tl.load(counted + index, mask=index < rows, other=1) == 0:
            if gradient is not None:
                at = P.row_at(index, outer, inner_stride, inner, ALIGN)
                P.fill_zero(gradient + at, begin, end, BLOCK)
            index += groups
    return index


@triton.jit
def blank(pointer, LANES: tl.constexpr, VECTOR: tl.constexpr, PAIR: tl.constexpr):
    if PAIR:
        return tl.zeros([LANES, VECTOR // 2], tl.int32)
    else:
        return tl.zeros([LANES, VECTOR], pointer.dtype.element_ty)


@triton.jit
def piece(pointer, index, rows, outer, inner_stride, inner, begin, end, ALIGN: tl.constexpr,
          LANES: tl.constexpr, VECTOR: tl.constexpr, PAIR: tl.constexpr):  # fmt: skip
    """This program's columns of a row, as they lie in memory; of any row where there is none."""
    pointer += P.row_at(tl.minimum(index, rows - 1), outer, inner_stride, inner, ALIGN)
    masked = -float("inf")
    if PAIR:
        masked = MASKED_BF16 if pointer.dtype.element_ty == tl.bfloat16 else MASKED_FP16
        pointer = pointer.to(tl.pointer_type(tl.int32), bitcast=True)
        begin, end = begin // 2, end // 2
    WIDTH: tl.constexpr = VECTOR // 2 if PAIR else VECTOR
    at = begin + tl.arange(0, LANES)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    if end - begin == LANES * WIDTH:
        x = tl.load(pointer + at)
    else:
        x = tl.load(pointer + at, mask=at < end, other=masked)
    return x


@triton.jit
def entries(x, pointer, LANES: tl.constexpr, VECTOR: tl.constexpr, PAIR: tl.constexpr):
    """A piece in fp32."""
    if not PAIR:
        return x.to(tl.float32)
    elif pointer.dtype.element_ty == tl.bfloat16:
        low, high = (
            (x << 16).to(tl.float32, bitcast=True),
            (x & -65536).to(tl.float32, bitcast=True),
        )
    else:
        low = x.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        high = (x >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return tl.reshape(tl.join(low, high), [LANES, VECTOR])


@triton.jit
def no_row(rows):
    return tl.zeros([], tl.int64) + rows


@triton.jit
def label_at(labels, index, columns):
    if labels is None:
        return -1
    else:
        return P.label_of(tl.load(labels + index), columns)


@triton.jit
def factors_of(factors, index):
    return (
        P.factor(factors[0], factors[1], index, None),
        P.factor(factors[2], factors[3], index, None),
        P.factor(factors[4], factors[5], index, None),
    )


@triton.jit
def write_gradient(
    z, y, at, begin, end, stop, index, row, temper, labels, columns, smoothing, factors, a, b,
    gradient, outer, inner_stride, inner,
    WANT: tl.constexpr, DIVERGENCE: tl.constexpr, SAME: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Writes this program's columns of the gradient, and 0 from there to `stop`; the terms."""
    kd, ce, entropy = factors_of(factors, index)
    label = label_at(labels, index, columns)
    g, _, value, slope = P.gradient_tile(
        z, y, at, row, temper, label, columns, smoothing, kd, ce, entropy, a, b, WANT,
        factors[2] is not None, factors[4] is not None, DIVERGENCE, SAME,
    )  # fmt: skip
    gradient += P.row_at(index, outer, inner_stride, inner, ALIGN)
    if end - begin == z.shape[0] * z.shape[1]:
        tl.store(gradient + at, g.to(gradient.dtype.element_ty))
    else:
        tl.store(gradient + at, g.to(gradient.dtype.element_ty), mask=at < end)
    P.fill_zero(gradient, end, stop, z.shape[0] * z.shape[1])
    return value, slope


@triton.jit(do_not_specialize=P.VARYING)
def relay(
    student, teacher, student_outer, student_inner, teacher_outer, teacher_inner, inner,
    s_temperature, s_temperature_stride, t_temperature, t_temperature_stride, moments,
    labels, counted, smoothing, a, b, kd, kd_stride, ce, ce_stride, entropy, entropy_stride,
    state, values, loss, gradient, gradient_outer, gradient_inner, width,
    rows, columns, mailbox,
    WANT: tl.constexpr, SENT: tl.constexpr, DIVERGENCE: tl.constexpr, OUTER: tl.constexpr,
    CONSTANT: tl.constexpr, ALIGN: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
    SPLITS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """In every round each row under way takes a step: load, statistics, sums, gradient, values.

    Where the gradient needs no sum, it is written with the sums. SIZE: a power of 2 >= SPLITS.
    """
    SAME: tl.constexpr = t_temperature is None
    BLOCK: tl.constexpr = LANES * VECTOR
    SUMS_FIRST: tl.constexpr = gradient is not None and (
        CONSTANT == "slope_sum" or R.LEVER & WANT != 0
    )
    # Rounds from a row's statistics to its values.
    LAG: tl.constexpr = 3 if SUMS_FIRST else 2
    # Entries of 16 bits are carried from round to round two to a register.
    S_PAIR: tl.constexpr = student.dtype.element_ty.primitive_bitwidth == 16 and ALIGN % 2 == 0
    T_PAIR: tl.constexpr = teacher.dtype.element_ty.primitive_bitwidth == 16 and ALIGN % 2 == 0
    a, b, smoothing = P.singles(a, b, smoothing)
    group, member = tl.program_id(0) // SPLITS, tl.program_id(0) % SPLITS
    groups = tl.num_programs(0) // SPLITS
    columns, width = P.aligned(columns, ALIGN), P.aligned(width, ALIGN)
    begin = member * BLOCK
    end = tl.minimum(begin + BLOCK, columns)
    stop = tl.where(member == SPLITS - 1, width, end)  # the last one also blanks the padding
    at = begin + tl.arange(0, LANES)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]

    # The rows under way, by the step that they take in a round; none: `rows` or more. Each begins
    # with a value of its own: two names of one value would not both be carried round the loop.
    count = following(group.to(tl.int64) - groups, groups, rows, counted, gradient, gradient_outer,
                      gradient_inner, inner, begin, stop, ALIGN, BLOCK)  # fmt: skip
    add, descend, close = no_row(rows), no_row(rows), no_row(rows)
    z1 = piece(student, count, rows, student_outer, student_inner, inner, begin, end,
               ALIGN, LANES, VECTOR, S_PAIR)  # fmt: skip
    y1 = piece(teacher, count, rows, teacher_outer, teacher_inner, inner, begin, end,
               ALIGN, LANES, VECTOR, T_PAIR)  # fmt: skip
    z2, y2 = blank(student, LANES, VECTOR, S_PAIR), blank(teacher, LANES, VECTOR, T_PAIR)
    z3, y3 = blank(student, LANES, VECTOR, S_PAIR), blank(teacher, LANES, VECTOR, T_PAIR)
    heat = (s_temperature, s_temperature_stride, t_temperature, t_temperature_stride, moments)
    factors = (kd, kd_stride, ce, ce_stride, entropy, entropy_stride)
    zero = tl.zeros([], tl.float32)
    row = R.row_of(zero, zero, zero, zero, zero, zero, zero)
    tick, left = tl.zeros([], tl.int32), LAG + 1
    while left > 0:
        tick += 1
        box = box_of(mailbox, group, tick - 1, SIZE)
        words = peek_fields(box, 0, P.FIRST_SUM, SENT, SPLITS, SIZE)

        if count < rows:
            temper = P.temper_of(*heat, count, rows, None, a)
            z = entries(z1, student, LANES, VECTOR, S_PAIR)
            y = entries(y1, teacher, LANES, VECTOR, T_PAIR)
            stats = R.whole(z, y, at < end, temper, WANT)
            label_logit = zero
            if labels is not None:
                label = label_at(labels, count, columns)
                here = student + P.row_at(count, student_outer, student_inner, inner, ALIGN)
                label_logit = tl.load(here + label, mask=label >= 0, other=0.0).to(tl.float32)
            post_statistics(box_of(mailbox, group, tick, SIZE) + member, stats, label_logit,
                            tick, SENT, SIZE)  # fmt: skip

        if SUMS_FIRST:
            if descend < rows:
                temper = P.temper_of(*heat, descend, rows, None, a)
                sums = settle_sums(box_of(mailbox, group, tick - 2, SIZE), tick - 2, WANT, SENT,
                                   SPLITS, SIZE)  # fmt: skip
                write_gradient(
                    entries(z3, student, LANES, VECTOR, S_PAIR),
                    entries(y3, teacher, LANES, VECTOR, T_PAIR),
                    at, begin, end, stop, descend, P.with_sums(row, sums, CONSTANT, WANT), temper,
                    labels, columns, smoothing, factors, a, b, gradient, gradient_outer,
                    gradient_inner, inner, WANT, DIVERGENCE, SAME, ALIGN,
                )  # fmt: skip

        if add < rows:
            temper = P.temper_of(*heat, add, rows, None, a)
            stats, _ = settle_statistics(words, box, tick - 1, temper, WANT, SENT, SPLITS, SIZE)
            now = R.summarize(stats, temper, CONSTANT, WANT)
            z = entries(z2, student, LANES, VECTOR, S_PAIR)
            y = entries(y2, teacher, LANES, VECTOR, T_PAIR)
            if SUMS_FIRST or gradient is None:
                lp, lq, p, q, d, d2 = R.elements(z, y, now, temper, SAME)
                value, slope = DIVERGENCE(lp, lq, p, q, d, d2, now.c, a, b)
                sums = P.add_levers(P.no_sums(LANES), slope, q, lq, now, WANT)
            else:
                value, slope = write_gradient(
                    z, y, at, begin, end, stop, add, now, temper,
                    labels, columns, smoothing, factors, a, b, gradient, gradient_outer,
                    gradient_inner, inner, WANT, DIVERGENCE, SAME, ALIGN,
                )  # fmt: skip
                sums = P.no_sums(LANES)
            if SUMS_FIRST:
                row = now
            sums = P.add_sums(sums, z, y, value, slope, now, WANT)
            post_sums(box + member, P.collapse_sums(sums, WANT), tick - 1, SENT, SIZE)

        if (close < rows) & (tick % SPLITS == member):
            box = box_of(mailbox, group, tick - LAG, SIZE)
            temper = P.temper_of(*heat, close, rows, None, a)
            stats, label_logit = settle_statistics(
                peek_fields(box, 0, P.FIRST_SUM, SENT, SPLITS, SIZE), box, tick - LAG, temper,
                WANT, SENT, SPLITS, SIZE,
            )  # fmt: skip
            final = R.summarize(stats, temper, CONSTANT, WANT)
            label = label_at(labels, close, columns)
            hard = P.cross_entropy(stats, final, label, label_logit, columns, smoothing, WANT)
            sums = settle_sums(box, tick - LAG, WANT, SENT, SPLITS, SIZE)
            final = P.with_sums(final, sums, CONSTANT, WANT)
            P.write_row(
                close, rows, None, stats, final, sums, hard, *factors_of(factors, close), a, b,
                values, state, loss, WANT, OUTER,
            )  # fmt: skip

        if SUMS_FIRST:
            close, descend = descend, add
            z3, y3 = z2, y2
        else:
            close = add
        add, z2, y2 = count, z1, y1
        # Only now, so that no third piece is held: it arrives while other programs compute.
        count = following(count, groups, rows, counted, gradient, gradient_outer, gradient_inner,
                          inner, begin, stop, ALIGN, BLOCK)  # fmt: skip
        z1 = piece(student, count, rows, student_outer, student_inner, inner, begin, end,
                   ALIGN, LANES, VECTOR, S_PAIR)  # fmt: skip
        y1 = piece(teacher, count, rows, teacher_outer, teacher_inner, inner, begin, end,
                   ALIGN, LANES, VECTOR, T_PAIR)  # fmt: skip
        if count >= rows:
            left -= 1
