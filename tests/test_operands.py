"""LinearHead, TopK, Sampled, Ensemble: what they hold, what servers answer, what they refuse."""

from __future__ import annotations

import json
import math

import pytest
import torch

from fastkd.operands import Ensemble, LinearHead, Sampled, TopK
from tests.closeness import assert_close


def textbook_tail(logits, listed):
    """log of the mass outside a set of ids, one row in fp64."""
    p = logits.double().softmax(-1)
    return p[[i for i in range(len(p)) if i not in listed]].sum().log()


# --- TopK -------------------------------------------------------------------------------------


def test_from_logits_lists_the_best_with_their_log_probabilities_and_the_rests_mass():
    logits = torch.randn(2, 3, 50)
    teacher = TopK.from_logits(logits, 5)
    p, ids = logits.double().softmax(-1).topk(5)
    assert torch.equal(teacher.indices, ids)
    assert_close(teacher.log_probs, p.log())
    assert_close(teacher.tail_log_prob, (1 - p.sum(-1)).log())


def test_a_tail_of_1e_7_has_its_digits():
    logits = torch.full((1, 1000), -6.0)
    logits[0, :3] = torch.tensor([17.0, 16.0, 15.0])
    teacher = TopK.from_logits(logits, 3)
    truth = textbook_tail(logits[0], {0, 1, 2})
    assert -17 < truth < -15
    assert_close(teacher.tail_log_prob, truth[None])


def test_at_takes_any_ids_with_duplicates_and_padding():
    logits = torch.randn(3, 20)
    ids = torch.tensor([[3, 7, 3], [0, -1, 19], [-1, -1, -1]])
    teacher = TopK.at(logits, ids)
    p = logits.double().log_softmax(-1)
    for row, listed in enumerate(ids.tolist()):
        for place, i in enumerate(listed):
            expected = p[row, i].item() if i >= 0 else -math.inf
            assert teacher.log_probs[row, place].item() == pytest.approx(expected, rel=1e-5)
        truth = textbook_tail(logits[row], set(listed))
        assert teacher.tail_log_prob[row].item() == pytest.approx(truth.item(), rel=1e-5, abs=1e-6)


def test_all_listed_leaves_no_tail():
    assert TopK.from_logits(torch.randn(2, 6), 6).tail_log_prob.tolist() == [-math.inf] * 2


def test_from_student_lists_the_students_best_and_says_what_the_teacher_thinks():
    student, teacher = torch.randn(4, 30), torch.randn(4, 30)
    found = TopK.from_student(student, teacher, 6)
    assert torch.equal(found.indices, student.topk(6).indices)
    assert_close(found.log_probs, teacher.double().log_softmax(-1).gather(-1, found.indices))


def test_padding_a_batch_adds_rows_and_entries_that_list_nothing():
    parts = [TopK.from_logits(torch.randn(rows, 9), k) for rows, k in ((2, 3), (4, 2))]
    batch = TopK.pad(parts)
    assert batch.shape == (2, 4, 3)
    assert torch.equal(batch.indices[0, :2], parts[0].indices)
    assert torch.equal(batch.log_probs[1, :, :2], parts[1].log_probs)
    assert torch.equal(batch.tail_log_prob[1], parts[1].tail_log_prob)
    assert (batch.indices[0, 2:] == -1).all()
    assert (batch.indices[1, :, 2] == -1).all()
    assert (batch.log_probs[batch.indices == -1] == -math.inf).all()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"indices": torch.zeros(2, 3)}, TypeError, "int32 or int64, got torch.float32"),
        ({"indices": [[1]]}, TypeError, "must be a tensor in int32 or int64, got list"),
        ({"indices": torch.zeros(2, 0, dtype=torch.long)}, ValueError, "K from 1 to 1024"),
        ({"indices": torch.full((2, 3), -2)}, ValueError, "or -1 where nothing is listed, got -2"),
        ({"log_probs": torch.zeros(2, 4)}, ValueError, "must have one shape"),
        ({"log_probs": torch.zeros(2, 3, dtype=torch.int8)}, TypeError, "must be in float16"),
        ({"log_probs": torch.full((2, 3), 0.5)}, ValueError, "of probabilities pass the logarithm"),
        ({"tail": "buckets"}, ValueError, "did you mean 'bucket'"),
        ({"tail_log_prob": torch.zeros(3)}, ValueError, r"must be \(2,\), one for each row"),
        ({"tail_log_prob": torch.ones(2)}, ValueError, "tail_log_prob must be logarithms"),
        ({"log_probs": torch.zeros(2, 3, device="meta")}, ValueError, "must be on one device"),
    ],
)
def test_top_k_refuses(change, error, message):
    right = {
        "indices": torch.tensor([[0, 1, 2], [3, 4, -1]]),
        "log_probs": torch.full((2, 3), -2.0),
    }
    TopK(**right)
    with pytest.raises(error, match=message):
        TopK(**{**right, **change})


def test_what_padding_holds_is_not_looked_at():
    TopK(torch.tensor([[4, -1]]), torch.tensor([[-0.5, 7.0]]))


@pytest.mark.parametrize("make", [TopK.from_logits, Sampled.from_logits])
def test_a_count_that_is_none_is_refused(make):
    with pytest.raises(ValueError, match="must be at least 1, got 0"):
        make(torch.randn(2, 9), 0)
    with pytest.raises(TypeError, match="must be a whole number, got float"):
        make(torch.randn(2, 9), 2.0)


def test_more_entries_than_columns_are_refused():
    with pytest.raises(ValueError, match="k must be at most 9, got 10"):
        TopK.from_logits(torch.randn(2, 9), 10)
    with pytest.raises(ValueError, match="indices must lie below 9"):
        TopK.at(torch.randn(1, 9), torch.tensor([[9]]))


# --- servers ----------------------------------------------------------------------------------

VLLM = """[null,
 {"791": {"logprob": -0.25, "rank": 1, "decoded_token": "The"},
  "5": {"logprob": -2.5, "rank": 2, "decoded_token": "A"}},
 {"11": {"logprob": -0.125, "rank": 1, "decoded_token": " cat"},
  "12": {"logprob": -3.0, "rank": 2, "decoded_token": " dog"},
  "77": {"logprob": -9999.0, "rank": 90000, "decoded_token": " zyx"}}]"""

SGLANG = """[null,
 [[-0.25, 791, "The"], [-2.5, 5, null]],
 [[-0.125, 11, null], [-3.0, 12, null], [-9999.0, 77, null]]]"""

SGLANG_OF_THE_TOKENS = '[[[null, 3, "<s>"]], [[-0.25, 791, null], [-2.5, 5, null]]]'

CHAT = """[
 {"token": "The", "logprob": -0.25, "bytes": [84, 104, 101], "top_logprobs": [
   {"token": "The", "logprob": -0.25, "bytes": [84, 104, 101]},
   {"token": "A", "logprob": -2.5, "bytes": [65]}]},
 {"token": " zyx", "logprob": -9999.0, "bytes": null, "top_logprobs": [
   {"token": " cat", "logprob": -0.125, "bytes": null},
   {"token": " dog", "logprob": -3.0, "bytes": null}]}]"""

LEGACY = '[null, {"The": -0.25, "A": -2.5}, {" cat": -0.125, " dog": -3.0, " zyx": -9999.0}]'

IDS = {"The": 791, "A": 5, " cat": 11, " dog": 12, " zyx": 77}
FULL = {0: [], 1: [(791, -0.25), (5, -2.5)], 2: [(11, -0.125), (12, -3.0), (77, -9999.0)]}


def listed(teacher):
    """Each row's entries, as they are not padding."""
    return [
        [(i, p) for i, p in zip(ids, values, strict=True) if i >= 0]
        for ids, values in zip(teacher.indices.tolist(), teacher.log_probs.tolist(), strict=True)
    ]


@pytest.mark.parametrize(
    ("answer", "rows"),
    [
        (VLLM, [0, 1, 2]),
        (SGLANG, [0, 1, 2]),
        (SGLANG_OF_THE_TOKENS, [0, 1]),
        (CHAT, [1, 2]),
        (LEGACY, [0, 1, 2]),
    ],
    ids=["vllm", "sglang", "sglang-tokens", "chat", "legacy"],
)
def test_answers_of_servers(answer, rows):
    teacher = TopK.from_server(json.loads(answer), token_id=IDS.get)
    assert listed(teacher) == [FULL[row] for row in rows]
    assert teacher.tail == "bucket"
    assert teacher.tail_log_prob is None


def test_a_token_that_the_student_does_not_know_is_in_the_tail():
    known = {"The": 0, " cat": 1, "A": 2}
    teacher = TopK.from_server(json.loads(LEGACY), token_id=known.get)
    assert listed(teacher) == [[], [(0, -0.25), (2, -2.5)], [(1, -0.125)]]


def test_tokens_spelt_as_ids_need_no_function():
    answer = json.loads(CHAT.replace('"The"', '"token_id:791"').replace('"A"', '"token_id:5"'))
    assert listed(TopK.from_server(answer[:1])) == [FULL[1]]
    with pytest.raises(TypeError, match=r"as text, such as ' cat': pass token_id"):
        TopK.from_server(answer)


def test_a_chosen_token_among_the_best_is_listed_once():
    assert TopK.from_server(json.loads(CHAT)[:1], token_id=IDS.get).shape == (1, 2)


@pytest.mark.parametrize("answer", ["no list", [3], [{"x": {"p": 1}}], [[[0.5]]]])
def test_an_answer_of_no_known_format_names_the_position(answer):
    with pytest.raises(ValueError, match="as vLLM, SGLang or OpenAI answer them, got at 0"):
        TopK.from_server(answer)


def test_an_empty_answer_has_no_rows():
    assert TopK.from_server([]).shape == (0, 1)


# --- Sampled ----------------------------------------------------------------------------------


def test_draws_come_as_often_as_the_teacher_says():
    logits = torch.tensor([[2.0, 0.0, 1.0, -math.inf], [0.0, 0.0, 0.0, 3.0]])
    teacher = Sampled.from_logits(logits, 20_000)
    p = logits.double().softmax(-1)
    shares = torch.zeros(2, 4, dtype=torch.float64)
    kept = teacher.indices >= 0
    shares.scatter_add_(-1, teacher.indices.clamp(min=0), (teacher.counts * kept).double() / 20_000)
    assert (shares - p).abs().max() < 4 * (p * (1 - p) / 20_000).max().sqrt()
    assert shares[0, 3] == 0


def test_draws_are_merged_and_padded():
    logits = torch.tensor([[0.0, -math.inf, -math.inf], [0.0, 0.0, 0.0]])
    teacher = Sampled.from_logits(logits, 64, torch.Generator().manual_seed(0))
    assert teacher.shape == (2, 3)
    assert teacher.indices.tolist() == [[0, -1, -1], [0, 1, 2]]
    assert teacher.counts[0].tolist() == [64, 0, 0]
    assert teacher.counts.sum(-1).tolist() == [64, 64]


def test_sampled_refuses_negative_counts_and_other_shapes():
    ids = torch.tensor([[1, 2]])
    with pytest.raises(ValueError, match="counts must be >= 0, got -1"):
        Sampled(ids, torch.tensor([[3, -1]]))
    with pytest.raises(ValueError, match="must have one shape"):
        Sampled(ids, torch.ones(2))
    with pytest.raises(TypeError, match="counts must be numbers"):
        Sampled(ids, torch.ones(1, 2, dtype=torch.bool))


# --- LinearHead -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"hidden": torch.randn(3, 5)}, ValueError, r"hidden must be \[..., 4\]"),
        ({"hidden": torch.ones(3, 4, dtype=torch.long)}, TypeError, "hidden must be in float16"),
        ({"weight": torch.randn(28)}, NotImplementedError, "summon_full_params"),
        ({"weight": torch.randn(7, 2, 2)}, ValueError, r"must be \[V, H\]"),
        ({"weight": torch.ones(7, 4, dtype=torch.int8)}, NotImplementedError, "is quantised"),
        ({"weight": [1]}, TypeError, "weight must be a tensor, got list"),
        ({"bias": torch.randn(4)}, ValueError, r"bias must be \[7\], got \(4,\)"),
        ({"weight": torch.randn(7, 4, device="meta")}, ValueError, "on one device"),
        ({"logit_softcap": 0.0}, ValueError, "logit_softcap must be > 0"),
        ({"logit_scale": math.nan}, ValueError, "logit_scale must be finite"),
        ({"logit_scale": "2"}, TypeError, "logit_scale must be a number"),
    ],
)
def test_a_linear_head_refuses(change, error, message):
    right = {"hidden": torch.randn(3, 4), "weight": torch.randn(7, 4)}
    assert LinearHead(**right, logit_scale=0.5, logit_softcap=30).shape == (3, 7)
    with pytest.raises(error, match=message):
        LinearHead(**{**right, **change})


def test_a_wrapped_weight_is_refused_with_its_name():
    from torch.testing._internal.two_tensor import TwoTensor

    weight = TwoTensor(torch.randn(7, 4), torch.randn(7, 4))
    with pytest.raises(NotImplementedError, match=r"quantised \(TwoTensor\)"):
        LinearHead(torch.randn(3, 4), weight)


# --- Ensemble ---------------------------------------------------------------------------------


def test_an_ensemble_takes_teachers_of_any_kind():
    logits = torch.randn(2, 3, 11)
    head = LinearHead(torch.randn(2, 3, 4), torch.randn(11, 4))
    kinds = [logits, head, TopK.from_logits(logits, 2), Sampled.from_logits(logits, 9)]
    assert Ensemble(kinds, weights=[1, 0.5, torch.rand(2, 3), torch.tensor(2.0)]).rows == (2, 3)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"teachers": []}, TypeError, "a list of one or more"),
        ({"teachers": torch.randn(2, 3, 5)}, TypeError, "a list of one or more"),
        ({"teachers": [torch.randn(3, 5), torch.randn(4, 5)]}, ValueError, "equal leading shapes"),
        ({"teachers": [torch.randn(3, 5), "x"]}, TypeError, "got str"),
        ({"combine": "prob"}, ValueError, "did you mean 'probs'"),
        ({"weights": [1.0]}, ValueError, "one for each of 2 teachers, got 1"),
        ({"weights": [1.0, -1.0]}, ValueError, "finite and >= 0"),
        ({"weights": [0, 0]}, ValueError, "must not all be 0"),
        ({"weights": [torch.tensor([1.0, 0.0, 1.0]), 0]}, ValueError, "not all be 0, in any row"),
        ({"weights": [torch.ones(2), 1.0]}, ValueError, r"one for each row, \(3,\), got \(2,\)"),
        ({"weights": [torch.tensor([1.0, math.nan, 1.0]), 1]}, ValueError, "finite and >= 0"),
    ],
)
def test_an_ensemble_refuses(change, error, message):
    right = {"teachers": [torch.randn(3, 5), torch.randn(3, 5)]}
    Ensemble(**right)
    with pytest.raises(error, match=message):
        Ensemble(**{**right, **change})


def test_logits_of_a_listed_teacher_are_unknown():
    logits = torch.randn(3, 9)
    with pytest.raises(ValueError, match="a TopK has none: pass combine='probs'"):
        Ensemble([logits, TopK.from_logits(logits, 2)], combine="logits")
