"""The teacher cache: what comes back, what is refused, and that nothing is lost on the way."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("safetensors")

from fastkd import cache
from fastkd.cache.bits import pack, unpack, width
from fastkd.distill.errors import RunError
from fastkd.operands import LinearHead, Sampled, TopK

V = 300
IDS = torch.randint(V, (11, 7), generator=torch.Generator().manual_seed(0))
TABLE = 3 * torch.randn(V, V, generator=torch.Generator().manual_seed(1))
HIDDEN = torch.randn(V, 16, generator=torch.Generator().manual_seed(2)).bfloat16()
WEIGHT = torch.randn(V, 16, generator=torch.Generator().manual_seed(3)).bfloat16()


def teacher(ids, rows=None):
    """A bigram model."""
    return TABLE[ids]


def heads(ids, rows):
    return LinearHead(HIDDEN[ids], WEIGHT, logit_softcap=30.0)


LAYOUTS = {
    "top-k": (cache.Best(k=5), teacher),
    "top-k, 8 bits": (cache.Best(k=5, log_prob_bits=8), teacher),
    "samples": (cache.Draws(samples=50), teacher),
    "hidden": (cache.Hidden(), heads),
    "full": (cache.Full(), teacher),
}


def write(folder, kind="top-k", **options):
    layout, model = LAYOUTS[kind]
    options = {"batch_size": 2, "rows_per_shard": 4, **options}
    return cache.write(folder, layout, options.pop("tokens", IDS), model, V, **options)


def files(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


# --- bits -------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [1, 2, 7, 8, 9, 15, 16, 17, 18, 24, 31])
def test_numbers_come_back_from_any_place(bits):
    numbers = torch.randint(2**bits, (1001,))
    numbers[:2] = torch.tensor([2**bits - 1, 0])
    data = pack(numbers, bits)
    places = torch.randint(1001, (20, 30))
    assert torch.equal(unpack(data, places, bits), numbers[places])
    assert unpack(data, torch.tensor(1000), bits) == numbers[1000]
    assert len(data) <= 1001 * bits / 8 + 9


def test_long_lists_are_packed_in_parts():
    numbers = torch.randint(2**17, (200_003,))
    assert torch.equal(unpack(pack(numbers, 17), torch.arange(200_003), 17), numbers)


# --- what comes back --------------------------------------------------------------------------


def test_the_best_entries_come_back_to_half_precision(tmp_path):
    found = write(tmp_path)[range(11)]
    assert isinstance(found, TopK)
    p, ids = TABLE[IDS].double().softmax(-1).topk(5)
    assert torch.equal(found.indices, ids)
    for got, truth in ((found.log_probs, p.log()), (found.tail_log_prob, (1 - p.sum(-1)).log())):
        # A rounding to fp16 of itself, and of the other masses when all are made to sum to 1.
        error = (got.double() - truth).abs()
        assert (error <= truth.abs() * 2**-11 + 1e-3).all()
        assert truth.abs().max() > 1
    total = found.log_probs.double().exp().sum(-1) + found.tail_log_prob.double().exp()
    assert ((total - 1).abs() < 1e-6).all()


def test_eight_bits_are_finer_where_the_mass_is(tmp_path):
    found = write(tmp_path, "top-k, 8 bits")[range(11)]
    p, ids = TABLE[IDS].double().softmax(-1).topk(5)
    assert torch.equal(found.indices, ids)
    error = found.log_probs.double().exp() - p
    assert error.abs().max() < 0.006
    total = found.log_probs.double().exp().sum(-1) + found.tail_log_prob.double().exp()
    assert ((total - 1).abs() < 1e-6).all()


@pytest.mark.parametrize("bits", [8, 16])
def test_a_tail_of_1e_7_and_a_certain_row_survive(tmp_path, bits):
    table = torch.full((V, V), -7.0)
    table[:, :2] = torch.tensor([15.0, 14.0])
    table[0, 2:] = -torch.inf  # nothing is left for the tail
    table[1, 1:] = -torch.inf  # and one entry has all
    ids = torch.tensor([[0, 1, 2, 3]])
    layout = cache.Best(k=2, log_prob_bits=bits)
    found = cache.write(tmp_path, layout, ids, lambda ids, rows: table[ids], V)[0]
    truth = table[ids[0]].double().softmax(-1)
    assert torch.equal(found.indices[:, 0], torch.zeros(4).long())
    rest = found.tail_log_prob.double().exp()
    assert rest[:2].tolist() == [0, 0]
    exact = truth[2:, 2:].sum(-1)
    assert 1e-8 < exact[0] < 1e-6
    assert ((rest[2:] / exact - 1).abs() < 0.01).all()
    assert ((found.log_probs.double().exp() - truth[:, :2]).abs() < 2e-3).all()


def test_draws_come_back_as_they_were(tmp_path):
    found = write(tmp_path, "samples")[range(11)]
    assert isinstance(found, Sampled)
    for row in range(11):
        drawn = Sampled.from_logits(teacher(IDS[row]), 50, torch.Generator().manual_seed(row))
        k = drawn.shape[-1]
        assert torch.equal(found.indices[row, :, :k], drawn.indices)
        assert torch.equal(found.counts[row, :, :k], drawn.counts)
        assert (found.indices[row, :, k:] == -1).all()
        assert not found.counts[row, :, k:].any()
    assert (found.counts.sum(-1) == 50).all()


def test_hidden_states_come_back_with_their_head(tmp_path):
    found = write(tmp_path, "hidden")[range(11)]
    assert torch.equal(found.hidden, HIDDEN[IDS])
    assert torch.equal(found.weight, WEIGHT)
    assert found.bias is None
    assert found.logit_softcap == 30.0
    assert found.logit_scale is None


def test_all_log_probabilities_come_back_in_half_precision(tmp_path):
    found = write(tmp_path, "full")[range(11)]
    assert found.dtype == torch.float16
    assert torch.equal(found, TABLE[IDS].log_softmax(-1).half())


@pytest.mark.parametrize("kind", LAYOUTS)
def test_rows_in_any_order_from_any_shard(kind, tmp_path):
    kept = write(tmp_path, kind)
    assert len(kept) == 11
    assert len(kept.shards) == 3

    def tensors(operand):
        fields = {"x": operand} if isinstance(operand, torch.Tensor) else vars(operand)
        return {k: v for k, v in fields.items() if isinstance(v, torch.Tensor) and k != "weight"}

    whole = tensors(kept[:])
    order = [10, 0, 5, -1, 5, 3, 4]
    for rows in (order, torch.tensor(order)):
        assert torch.equal(kept.tokens(rows), IDS[order])
        for name, tensor in tensors(kept[rows]).items():
            k = tensor.size(-1)
            assert torch.equal(tensor, whole[name][order][..., :k])
    for name, tensor in tensors(kept[4]).items():
        assert torch.equal(tensor, whole[name][4][..., : tensor.size(-1)])
    assert torch.equal(kept.tokens(slice(2, 9, 3)), IDS[2:9:3])
    for wrong in (11, -12, [0, 11], []):
        with pytest.raises(IndexError, match="rows must be some of 0 to 10"):
            kept[wrong]


@pytest.mark.parametrize("kind", LAYOUTS)
def test_the_default_device_is_not_that_of_a_cache(kind, tmp_path):
    plain = write(tmp_path / "plain", kind)
    with torch.device("meta"):
        ours = write(tmp_path / "ours", kind)
        assert torch.equal(ours.tokens([3, 1]), IDS[[3, 1]])
        found = ours[3:5]
    assert files(tmp_path / "ours") == files(tmp_path / "plain")
    expected = plain[3:5]
    if not isinstance(found, torch.Tensor):
        found, expected = vars(found), vars(expected)
        assert all(
            torch.equal(found[name], tensor)
            for name, tensor in expected.items()
            if isinstance(tensor, torch.Tensor)
        )
    else:
        assert torch.equal(found, expected)


def test_padding_columns_are_not_looked_at(tmp_path):
    wide = torch.cat([TABLE, torch.full((V, 20), 99.0)], -1)
    kept = cache.write(tmp_path / "wide", cache.Best(5), IDS, lambda ids, rows: wide[ids], V)
    plain = cache.write(tmp_path / "plain", cache.Best(5), IDS, teacher, V)
    assert torch.equal(kept[:].log_probs, plain[:].log_probs)


def test_a_cache_goes_to_the_workers_of_a_loader(tmp_path):
    kept = pickle.loads(pickle.dumps(write(tmp_path)))
    assert torch.equal(kept.tokens(3), IDS[3])
    assert torch.equal(kept[3].indices, teacher(IDS[3]).topk(5).indices)


def test_a_cache_knows_its_corpus(tmp_path):
    kept = write(tmp_path)
    kept.check_corpus(IDS)
    kept.check_corpus(IDS.int())
    for other in (IDS.flip(0), IDS[:10], IDS[:, :6]):
        with pytest.raises(cache.CacheError, match="of another corpus, or of another tokenizer"):
            kept.check_corpus(other)


def test_the_tail_is_the_readers_to_choose(tmp_path):
    write(tmp_path)
    assert cache.TeacherCache(tmp_path, tail="renormalize")[0].tail == "renormalize"
    with pytest.raises(ValueError, match="did you mean 'bucket'"):
        cache.TeacherCache(tmp_path, tail="buckets")


def test_bytes_per_token(tmp_path):
    """At V = 128256 an id needs 17 bits, a token too; K = 64."""
    size, k, n = 128_256, 64, 128
    ids = torch.randint(size, (2, n // 2))

    def sparse(ids, rows):
        logits = torch.full((*ids.shape, size), -20.0)
        return logits.scatter_(-1, (ids[..., None] + torch.arange(k)) % size, 3.0)

    def off(layout, expected):
        kept = cache.write(tmp_path / layout.kind, layout, ids, sparse, size, batch_size=1)
        return (kept.bytes_per_token() - expected(kept)) * n

    shared = 17 / 8 + 2  # the token, and the tail in fp16
    assert 200 < off(cache.Best(k), lambda kept: 64 * (17 + 16) / 8 + shared) < 600
    shutil.rmtree(tmp_path / "top-k")
    assert 200 < off(cache.Best(k, 8), lambda kept: 64 * (17 + 8) / 8 + shared + 2) < 600

    def of_draws(kept):
        return (kept[:].counts > 0).sum() / n * width(size * 50) / 8 + 1 + 17 / 8

    assert 200 < off(cache.Draws(50), of_draws) < 600


# --- what is refused --------------------------------------------------------------------------


def test_a_folder_without_a_cache(tmp_path):
    with pytest.raises(cache.CacheError, match=r"holds no teacher cache: there is no cache\.json"):
        cache.TeacherCache(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"format": "fastkd', "cannot be read"),
        ("[]", "is none of a teacher cache"),
        ('{"format": "other"}', "is none of a teacher cache"),
        ('{"format": "fastkd teacher cache", "version": 9}', "of version 9, and this fastkd reads"),
        ('{"format": "fastkd teacher cache", "version": 1}', "is broken"),
    ],
)
def test_a_manifest_that_is_none(tmp_path, text, message):
    (tmp_path / "cache.json").write_text(text)
    with pytest.raises(cache.CacheError, match=message):
        cache.TeacherCache(tmp_path)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rows", 0), ("rows", "9"), ("rows_per_shard", 0), ("vocab_size", True), ("positions", -1),
        ("about", []), ("layout", {"kind": "top-k", "k": "5"}), ("layout", {"kind": "samples"}),
        ("layout", {"kind": "samples", "samples": 0}), ("layout", {"kind": "top-k", "k": 5000}),
    ],
)  # fmt: skip
def test_a_manifest_with_a_value_of_no_use(tmp_path, name, value):
    write(tmp_path)
    path = tmp_path / "cache.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
    with pytest.raises(cache.CacheError, match=r"cache\.json is broken"):
        cache.TeacherCache(tmp_path)


@pytest.mark.parametrize(
    ("layout", "tokens", "message"),
    [
        (cache.Best(V + 1), IDS, f"the best k entries of {V} tokens must be 1 to {V}, got k="),
        (cache.Best(0), IDS, "must be 1 to "),
        (cache.Best(5, log_prob_bits=4), IDS, "log_prob_bits must be 8 or 16, got 4"),
        (cache.Draws(0), IDS, "samples must be 1 to 1024, .*, got 0"),
        (cache.Best(5), torch.tensor([[0, V]]), rf"must lie in \[0, {V}\), got 0 to {V}"),
        (cache.Best(5), torch.tensor([[-1, 2]]), "got -1 to 2"),
        (cache.Best(5), torch.empty(3, 0), "N, T >= 1, got none"),
    ],
)
def test_what_no_cache_can_hold_is_refused_before_anything_is_written(
    layout, tokens, message, tmp_path
):
    with pytest.raises(ValueError, match=message):
        cache.write(tmp_path, layout, tokens, teacher, V)
    assert list(tmp_path.iterdir()) == []


def cut(path):
    path.write_bytes(path.read_bytes()[:-3])


def cut_to_nothing(path):
    path.write_bytes(b"")


def flip(path):
    data = bytearray(path.read_bytes())
    data[-20] ^= 1
    path.write_bytes(data)


def exchange(path):
    path.write_bytes(path.with_name("00001.safetensors").read_bytes())


@pytest.mark.parametrize("harm", [cut, cut_to_nothing, flip])
@pytest.mark.parametrize("kind", LAYOUTS)
def test_a_broken_shard_is_refused_when_it_is_read_and_mended_when_it_is_written(
    harm, kind, tmp_path
):
    kept = write(tmp_path, kind)
    before = files(tmp_path)
    harm(kept.shards[2])
    kept = cache.TeacherCache(tmp_path)
    kept[0]  # another shard's
    with pytest.raises(cache.CacheError, match=r"00002.safetensors is broken .* delete it"):
        kept[9]
    with pytest.raises(cache.CacheError, match="broken"):
        kept.verify()
    write(tmp_path, kind).verify()
    assert files(tmp_path) == before


def test_a_shard_of_another_place_or_cache_is_refused(tmp_path):
    kept = write(tmp_path / "one")
    exchange(kept.shards[0])
    with pytest.raises(cache.CacheError, match=r"00000.safetensors is a copy of another"):
        cache.TeacherCache(tmp_path / "one")[0]
    other = write(tmp_path / "other", about={"teacher": "other"})
    kept.shards[0].write_bytes(other.shards[0].read_bytes())
    with pytest.raises(cache.CacheError, match="belongs to another cache"):
        cache.TeacherCache(tmp_path / "one")[0]


def test_an_unfinished_cache_is_refused(tmp_path):
    kept = write(tmp_path)
    kept.shards[1].unlink()
    with pytest.raises(cache.CacheError, match="is unfinished: 1 of 3 shards are missing"):
        cache.TeacherCache(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": IDS.flip(0)}, "whose corpus is"),
        ({"tokens": IDS[:10]}, "another cache"),
        ({"kind": "full"}, "whose layout is .*top-k.* and not .*full"),
        ({"about": {"teacher": "b"}}, "whose teacher is 'a' and not 'b'"),
        ({"rows_per_shard": 5}, "whose rows_per_shard is 4 and not 5"),
    ],
)
def test_another_cache_is_not_written_over(change, message, tmp_path):
    write(tmp_path, about={"teacher": "a"})
    before = files(tmp_path)
    with pytest.raises(cache.CacheError, match=message):
        write(tmp_path, **{"about": {"teacher": "a"}, **change})
    assert files(tmp_path) == before


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(RunError, match="is not empty"):
        write(tmp_path)


def test_logits_of_another_shape_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"must give logits \(2, 7, 300\), or wider"):
        cache.write(
            tmp_path, cache.Best(5), IDS, lambda ids, rows: TABLE[ids][:, 1:], V, batch_size=2
        )
    with pytest.raises(TypeError, match="hidden states needs LinearHeads, got Tensor"):
        cache.write(tmp_path / "b", cache.Hidden(), IDS, teacher, V)


# --- nothing is lost --------------------------------------------------------------------------


def in_a_fork(work):
    """Runs it in a process of its own; its id."""
    process = os.fork()
    if process == 0:
        try:
            torch.set_num_threads(1)  # OpenMP's threads do not come along
            work()
        finally:
            os._exit(0)
    return process


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no kill -9")


@needs_fork
@pytest.mark.parametrize("kind", ["top-k", "samples", "hidden"])
@pytest.mark.parametrize("call", ["open", "fsync", "replace", "unlink"])
def test_a_writer_that_dies_at_any_call_goes_on_there(kind, call, tmp_path):
    write(tmp_path / "whole", kind)
    real, calls = getattr(os, call), 0

    def dying(*arguments, **options):
        nonlocal calls
        calls += 1
        if calls == last:
            os._exit(9)
        return real(*arguments, **options)

    def work():
        setattr(os, call, dying)
        write(folder, kind)

    deaths = 0
    for last in range(1, 9):
        folder = tmp_path / f"{last}"
        died = os.waitpid(in_a_fork(work), 0)[1] != 0
        deaths += died
        if died and call != "unlink":
            with pytest.raises(cache.CacheError):
                cache.TeacherCache(folder)[:]
        write(folder, kind)
        assert files(folder) == files(tmp_path / "whole")
    assert deaths >= 1


def test_what_is_whole_is_not_asked_of_the_teacher_again(tmp_path):
    kept = write(tmp_path)
    kept.shards[1].unlink()
    asked = []

    def counting(ids, rows):
        assert torch.equal(ids, IDS[rows.start : rows.stop])
        asked.append(ids)
        return teacher(ids)

    cache.write(tmp_path, cache.Best(5), IDS, counting, V, batch_size=2, rows_per_shard=4)
    assert torch.equal(torch.cat(asked), IDS[4:8])


@needs_fork
def test_kill_9(tmp_path):
    """Real ones, at any moment of a writer that writes half of the time."""
    ids = torch.arange(32 * 64).view(32, 64) % V

    def write_slowly(folder):
        def slowly(ids, rows):
            time.sleep(0.002)
            return TABLE[ids]

        cache.write(folder, cache.Full(), ids, slowly, V, batch_size=2, rows_per_shard=4)

    write_slowly(tmp_path / "whole")
    folder, draw, kills = tmp_path / "killed", random.Random(0), 0
    for _ in range(20):
        process = in_a_fork(lambda: write_slowly(folder))
        time.sleep(draw.uniform(0.001, 0.04))
        os.kill(process, signal.SIGKILL)
        kills += os.WIFSIGNALED(os.waitpid(process, 0)[1])
    assert kills >= 3
    write_slowly(folder)
    assert files(folder) == files(tmp_path / "whole")


def test_the_manifest_is_json_that_says_what_is_kept(tmp_path):
    write(tmp_path, about={"teacher": "a"})
    values = json.loads((tmp_path / "cache.json").read_text())
    assert values["layout"] == {"kind": "top-k", "k": 5, "log_prob_bits": 16}
    assert values["about"] == {"teacher": "a"}
    assert values["rows"] == 11
