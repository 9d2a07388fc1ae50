"""Cross-tokenizer losses: the aligner on real tokenizers, losses against loops over floats."""

from __future__ import annotations

import math

import pytest
import torch

import fastkd
from fastkd.cross_tokenizer import align, merge, shared_token_loss, shared_tokens, uld_loss
from tests.closeness import assert_close

TEXT = "The quick brown fox, it's 1234.56 km!\n\tdef f(x):  return x**2  # naïve café 你好 🙂 end"


# --- align ------------------------------------------------------------------------------------


def bpe(text, size):
    tokenizers = pytest.importorskip("tokenizers")
    tokens = tokenizers.ByteLevelBPETokenizer()
    tokens.train_from_iterator([text], size, show_progress=False)
    return tokens


def common_ends(text, one, other):
    """Ends of bytes at which both sides end a token, the long way: by decoding prefixes."""
    ends = []
    for tokens in (one, other):
        pieces = [tokens.id_to_token(i) for i in tokens.encode(text).ids]
        ends.append({sum(map(len, pieces[: n + 1])) for n in range(len(pieces))})
    bytes_until = [len(text[:n].encode()) for n in range(len(text) + 1)]
    return ends[0] & ends[1] & set(bytes_until)


@pytest.mark.parametrize("sizes", [(257, 400), (400, 300), (300, 300)])
def test_spans_spell_the_same_text_are_as_short_as_can_be_and_cover_it(sizes):
    one, other = bpe(TEXT, sizes[0]), bpe(TEXT[::-1] + "The fox 你好", sizes[1])
    mine, theirs = one.encode(TEXT), other.encode(TEXT)
    spans = align(mine.offsets, theirs.offsets)

    def spelt(tokens, ids, places):
        return tokens.decode([ids[i] for i in places])

    texts = [spelt(one, mine.ids, span.student) for span in spans]
    assert texts == [spelt(other, theirs.ids, span.teacher) for span in spans]
    assert "".join(texts) == TEXT
    assert len(spans) == len(common_ends(TEXT, one, other))


def test_tokens_that_share_a_character_stay_together():
    assert align([(0, 1), (1, 2), (1, 2)], [(0, 1), (1, 2), (1, 2), (1, 2)]) == [
        (range(1), range(1)),
        (range(1, 3), range(1, 4)),
    ]


def test_trimmed_spaces_and_tokens_without_text_change_nothing():
    plain = [(0, 3), (3, 9), (9, 10)]
    trimmed = [(0, 0), (0, 3), (3, 3), (4, 9), (9, 10), (0, 0)]
    assert align(plain, trimmed) == [
        (range(1), range(1, 2)),
        (range(1, 2), range(2, 4)),
        (range(2, 3), range(4, 5)),
    ]


def test_what_one_side_lacks_at_the_ends_is_left_out():
    whole = [(0, 1), (1, 3), (3, 6), (6, 8), (8, 9)]
    part = [(1, 3), (3, 5), (5, 8)]
    assert align(part, whole) == [(range(1), range(1, 2)), (range(1, 3), range(2, 4))]
    assert align([], whole) == []
    assert align([(0, 2)], [(0, 1), (1, 3)]) == []


def test_offsets_that_go_backwards_are_refused():
    with pytest.raises(ValueError, match="the teacher's offsets must be in the order"):
        align([(0, 1), (1, 2)], [(1, 2), (0, 1)])


# --- merge ------------------------------------------------------------------------------------

SPANS = [range(2), range(2, 3), range(3, 6)]


@pytest.mark.parametrize("predicted", ["first", "last"])
def test_merge_multiplies_by_the_other_tokens_of_a_span(predicted):
    p = torch.randn(6, 5, dtype=torch.float64).softmax(-1)
    tokens = torch.tensor([1, 4, 0, 2, 2, 3])
    found = merge(p.log(), tokens, SPANS, predicted)
    for row, span in zip(found.exp(), SPANS, strict=True):
        left_open = min(span) if predicted == "first" else max(span)
        scale = math.prod(p[i, tokens[i]].item() for i in span if i != left_open)
        assert_close(row, p[left_open] * scale)


def test_the_gradient_of_merge():
    x = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    tokens = torch.tensor([1, 4, 0, 2, 2, 3])
    for predicted in ("first", "last"):
        assert torch.autograd.gradcheck(
            lambda x, p=predicted: merge(x.log_softmax(-1), tokens, SPANS, p).exp(), (x,)
        )


def test_a_token_of_probability_0_makes_its_span_0_and_nothing_nan():
    p = torch.tensor([[0.5, 0.5], [1.0, 0.0], [0.5, 0.5]])
    found = merge(p.log(), torch.tensor([0, 1, 0]), [range(2), range(2, 3)]).exp()
    assert found.tolist() == [[0.0, 0.0], [0.5, 0.5]]


def test_merge_refuses_spans_that_do_not_fit():
    log_probs, tokens = torch.randn(3, 4), torch.zeros(3, dtype=torch.long)
    with pytest.raises(ValueError, match="positions below 3, at least one each"):
        merge(log_probs, tokens, [range(2, 4)])
    with pytest.raises(ValueError, match="positions below 3, at least one each"):
        merge(log_probs, tokens, [range(1, 1)])
    with pytest.raises(ValueError, match=r"log_probs must be \[T, V\]"):
        merge(log_probs[None], tokens, [range(1)])
    with pytest.raises(ValueError, match="did you mean 'first'"):
        merge(log_probs, tokens, [range(1)], "firsts")


# --- shared tokens ----------------------------------------------------------------------------


def test_shared_tokens_pairs_each_id_once():
    student = {"a": 3, "Ġb": 0, "▁b": 5, "c": 1}
    teacher = {"c": 2, "▁b": 7, "d": 4, "a": 0}
    assert shared_tokens(student, teacher).tolist() == [[0, 7], [1, 2], [3, 0]]
    assert shared_tokens({"a": 0}, {"b": 0}).shape == (0, 2)


# --- losses -----------------------------------------------------------------------------------


def sorted_distance(q, p):
    """Of two lists of floats."""
    width = max(len(p), len(q))
    p, q = (sorted(side, reverse=True) + [0.0] * (width - len(side)) for side in (p, q))
    return sum(abs(x - y) for x, y in zip(p, q, strict=True))


@pytest.mark.parametrize("widths", [(7, 7), (5, 9), (9, 5)])
def test_uld_is_the_distance_of_sorted_probabilities(widths):
    q, p = (torch.randn(2, 3, width, dtype=torch.float64).softmax(-1) for width in widths)
    truth = [
        [sorted_distance(q[i, j].tolist(), p[i, j].tolist()) for j in range(3)] for i in range(2)
    ]
    assert_close(uld_loss(q.log(), p.log(), reduction="none"), torch.tensor(truth).double())


def test_the_gradient_of_uld_is_the_closed_form():
    z = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    p = torch.randn(4, 8, dtype=torch.float64).softmax(-1)
    uld_loss(z.log_softmax(-1), p.log(), reduction="sum").backward()
    q = z.detach().softmax(-1)
    order = q.argsort(-1, descending=True)
    ranked = torch.zeros_like(q).scatter_(-1, order, p.sort(-1, descending=True).values[:, :6])
    sign = (q - ranked).sign()
    assert_close(z.grad, q * (sign - (q * sign).sum(-1, keepdim=True)), "gradient")


def jsd_terms(p, q, beta):
    total = 0.0
    for x, y in zip(p, q, strict=True):
        m = beta * x + (1 - beta) * y
        total += beta * (x * math.log(x / m) if x else 0.0)
        total += (1 - beta) * (y * math.log(y / m) if y else 0.0)
    return total


@pytest.mark.parametrize("weights", [None, (1.0, 0.0), (0.6, 2.0)])
@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_the_shared_token_split_is_a_divergence_and_a_distance(weights, beta):
    q = torch.randn(3, 5, dtype=torch.float64).softmax(-1) * 0.7  # as after merge
    p = torch.randn(3, 8, dtype=torch.float64).softmax(-1) * 0.9
    shared = torch.tensor([[4, 0], [1, 7], [0, 3]])
    w = weights or (3 / 8, 5 / 8)
    truth = []
    for mine, theirs in zip(q.tolist(), p.tolist(), strict=True):
        pairs = [(theirs[j], mine[i]) for i, j in shared.tolist()]
        value = jsd_terms(*zip(*pairs, strict=True), beta)
        rest = sorted_distance([mine[i] for i in (2, 3)], [theirs[j] for j in (1, 2, 4, 5, 6)])
        truth.append(w[0] * value + w[1] * rest)
    found = shared_token_loss(
        q.log(), p.log(), shared, divergence=fastkd.JSD(beta), weights=weights, reduction="none"
    )
    assert_close(found, torch.tensor(truth).double())


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "tvd", fastkd.JSD(0.3)])
def test_the_gradient_of_the_shared_token_split(divergence):
    z = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    y = torch.randn(3, 8, dtype=torch.float64).log_softmax(-1)
    shared = torch.tensor([[4, 0], [1, 7], [0, 3]])

    def loss(z):
        return shared_token_loss(z.log_softmax(-1), y, shared, divergence=divergence)

    assert torch.autograd.gradcheck(loss, (z,))


def test_one_vocabulary_is_plain_distillation():
    z, y = torch.randn(4, 9, dtype=torch.float64), torch.randn(4, 9, dtype=torch.float64)
    found = shared_token_loss(
        z.log_softmax(-1), y.log_softmax(-1), torch.arange(9).repeat(2, 1).T.contiguous()
    )
    assert_close(found, fastkd.distillation_loss(z, y, divergence=fastkd.JSD(0.5)))


def test_equal_sides_cost_nothing_and_renamed_tokens_are_the_same_to_uld():
    z = torch.randn(4, 9).log_softmax(-1)
    shared = torch.tensor([[0, 0], [1, 1]])
    assert abs(shared_token_loss(z, z, shared)) < 1e-7
    assert uld_loss(z, z[:, torch.randperm(9)]).item() == 0


def test_weights_of_rows_and_reductions():
    q, p = torch.randn(3, 5).log_softmax(-1), torch.randn(3, 7).log_softmax(-1)
    rows = uld_loss(q, p, reduction="none").double()
    weight = torch.tensor([2.0, 0.0, 1.0])
    q[1] = math.nan
    q.requires_grad_()
    found = uld_loss(q, p, weight=weight)
    assert_close(found, (2 * rows[0] + rows[2]) / 3)
    assert_close(uld_loss(q, p, weight=weight, reduction="sum"), 2 * rows[0] + rows[2])
    assert_close(uld_loss(q, p, weight=weight > 0), (rows[0] + rows[2]) / 2)
    assert uld_loss(q, p, weight=torch.zeros(3)).item() == 0


def test_half_precision_is_computed_in_single():
    q, p = torch.randn(4, 300).log_softmax(-1), torch.randn(4, 400).log_softmax(-1)
    found = uld_loss(q.bfloat16(), p.bfloat16())
    assert found.dtype == torch.float32
    assert_close(found, uld_loss(q.bfloat16().double(), p.bfloat16().double()))


def test_refusals():
    q, p = torch.randn(3, 5), torch.randn(4, 7)
    shared = torch.tensor([[0, 0]])
    with pytest.raises(ValueError, match="equal leading shapes"):
        uld_loss(q, p)
    with pytest.raises(ValueError, match="did you mean 'mean'"):
        uld_loss(q, q, reduction="meen")
    with pytest.raises(ValueError, match="shape of the rows"):
        uld_loss(q, q, weight=torch.ones(4))
    with pytest.raises(ValueError, match=r"int64 \[M, 2\]"):
        shared_token_loss(q, q, torch.zeros(2, 3, dtype=torch.long))
    with pytest.raises(ValueError, match=r"got Bernoulli\(\)"):
        shared_token_loss(q, q, shared, divergence=fastkd.Bernoulli())
