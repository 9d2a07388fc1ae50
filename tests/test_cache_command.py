"""`fastkd cache`: a tiny model on disk, and what comes back of it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from fastkd import __main__, cache
from fastkd.integrations.models import head_of
from fastkd.operands import LinearHead, Sampled, TopK
from tests.closeness import assert_close

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported
transformers = pytest.importorskip("transformers")
for module in ("accelerate", "datasets", "rich", "safetensors", "tokenizers"):
    pytest.importorskip(module)

TEXT = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text()
V, T = 400, 16


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Two teachers with heads of 448 columns over one tokenizer of 400 tokens, and a text."""
    from tokenizers import ByteLevelBPETokenizer

    home = tmp_path_factory.mktemp("models")
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator([TEXT], V, special_tokens=["<end>"], show_progress=False)
    tokens = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, eos_token="<end>"
    )
    for seed, name in enumerate(("teacher", "other")):
        torch.manual_seed(seed)
        shape = transformers.LlamaConfig(
            vocab_size=448, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
            num_attention_heads=2, max_position_embeddings=64, initializer_range=0.3,
        )  # fmt: skip
        transformers.LlamaForCausalLM(shape).save_pretrained(home / name)
        tokens.save_pretrained(home / name)
    (home / "text.txt").write_text(TEXT[:1500])
    return home


def run(home, out, *options, teacher="teacher"):
    return __main__.main(
        ["cache", "--teacher", str(home / teacher), "--data", str(home / "text.txt"), "--out",
         str(out), "--sequence-length", str(T), "--device", "cpu", "--threads", "1", *options]
    )  # fmt: skip


def alone(kept):
    """The rows that hold one document: others begin to count positions again within."""
    tokens = kept.tokens(slice(None))
    rows = (tokens != 0).all(-1).nonzero().flatten()
    assert len(rows) >= len(kept) - 2
    return rows, tokens[rows]


def logits(home, tokens):
    model = transformers.AutoModelForCausalLM.from_pretrained(home / "teacher").eval()
    with torch.no_grad():
        return model(tokens).logits[..., :V]


def test_the_best_entries_of_the_teacher(home, tmp_path, capsys):
    assert run(home, tmp_path / "kept", "--top-k", "5") == 0
    kept = cache.TeacherCache(tmp_path / "kept")
    rows, tokens = alone(kept)
    teacher = kept[rows]
    assert isinstance(teacher, TopK)
    p, ids = logits(home, tokens).double().softmax(-1).topk(5)
    assert torch.equal(teacher.indices, ids)
    assert (teacher.log_probs.double() - p.log()).abs().max() < 4e-3
    said = capsys.readouterr().out
    assert f"{len(kept)} sequences of 16 tokens, the last 2 held out" in said
    assert "bytes per token, where logits in bf16 take 800" in said
    assert kept.manifest.about["held_out_rows"] == 2


def test_hidden_states_with_their_head_are_the_logits(home, tmp_path):
    assert run(home, tmp_path / "kept", "--hidden") == 0
    kept = cache.TeacherCache(tmp_path / "kept")
    rows, tokens = alone(kept)
    head = kept[rows]
    assert isinstance(head, LinearHead)
    assert head.weight.shape == (V, 32)
    assert_close(head.hidden @ head.weight.T, logits(home, tokens).double())


def test_draws_and_all_log_probabilities(home, tmp_path):
    assert run(home, tmp_path / "drawn", "--samples", "30") == 0
    assert run(home, tmp_path / "full", "--full") == 0
    drawn, full = cache.TeacherCache(tmp_path / "drawn")[:], cache.TeacherCache(tmp_path / "full")
    assert isinstance(drawn, Sampled)
    assert (drawn.counts.sum(-1) == 30).all()
    rows, tokens = alone(full)
    truth = logits(home, tokens).log_softmax(-1)
    assert (full[rows].float() - truth).abs().max() < 2e-2
    assert truth.abs().max() > 4


def test_the_same_command_goes_on_and_another_teacher_is_refused(home, tmp_path, capsys):
    options = ("--top-k", "5")
    assert run(home, tmp_path / "kept", *options) == 0
    shard = tmp_path / "kept" / "00000.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-5])
    assert run(home, tmp_path / "kept", *options) == 0
    assert shard.read_bytes() == whole
    capsys.readouterr()
    assert run(home, tmp_path / "kept", *options, teacher="other") == 1
    said = capsys.readouterr().err.splitlines()
    assert "the folder holds another cache, whose teacher is" in said[-1]
    assert "Traceback" not in said[0]
    assert run(home, tmp_path / "kept", "--top-k", "6") == 1
    assert shard.read_bytes() == whole


def test_wrong_options_are_one_line(home, tmp_path, capsys):
    for options, message in (
        (["--top-k", "0"], "the best k entries of 400 tokens must be 1 to 400, got k=0"),
        (["--top-k", "500"], "the best k entries of 400 tokens must be 1 to 400, got k=500"),
        (["--samples", "0"], "samples must be 1 to 1024, of which all may differ, got 0"),
        (["--samples", "5", "--log-prob-bits", "8"], "log_prob_bits are of --top-k"),
        (["--sequence-length", "65"], "is beyond the 64 positions of the teacher"),
    ):
        assert run(home, tmp_path / "kept", *options) == 2
        assert message in capsys.readouterr().err.splitlines()[-1]
    for options in (["--teacher", "x"], ["--data", "x"]):
        with pytest.raises(SystemExit):
            __main__.main(["cache", "--out", str(tmp_path / "kept"), *options])
        assert "fastkd cache: the following arguments are required: --" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run(home, tmp_path / "kept", "--full", "--hidden")
    assert not (tmp_path / "kept").exists()


SMALL = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 2, "initializer_range": 0.5,
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("Llama", {}),
        ("Gemma2", {"final_logit_softcapping": 3.0, "head_dim": 16}),
        ("Granite", {"logits_scaling": 8.0}),
        ("Cohere", {"logit_scale": 0.25}),
    ],
)
def test_heads_that_scale_or_cap_their_logits(kind, options):
    shape = getattr(transformers, f"{kind}Config")(**SMALL, **options)
    model = getattr(transformers, f"{kind}ForCausalLM")(shape).eval()
    ids = torch.randint(64, (2, 8))
    head = head_of(model)
    with torch.no_grad():
        assert_close(head(model, {"input_ids": ids}).logits(), model(ids).logits, "value")


@pytest.mark.parametrize("name", ["logit_scale", "final_logit_softcapping"])
def test_a_model_that_makes_logits_in_another_way_has_no_head(name):
    shape = transformers.LlamaConfig(**SMALL, **{name: 2.0})  # Llama does not look at it
    assert head_of(transformers.LlamaForCausalLM(shape)) is None


# --- fastkd distill --teacher-cache -------------------------------------------------------------


def distil(home, out, *options, command="distill"):
    return __main__.main(
        [command, "--student", str(home / "other"), "--data", str(home / "text.txt"), "--out",
         str(out), "--sequence-length", str(T), "--device", "cpu", "--threads", "1",
         "--precision", "fp32", "--batch-size", "4", "--steps", "4", "--log-every", "1",
         "--temperature", "1", *options]
    )  # fmt: skip


def losses(out):
    import csv

    rows = list(csv.DictReader((out / "metrics.csv").open()))
    return torch.tensor([float(row["loss"]) for row in rows if row["loss"]]).double()


def kl(out):
    """Of the held-out rows, before training and after."""
    figures = json.loads((out / "metrics.json").read_text())
    return [figures[when]["kl_to_teacher"] for when in ("before", "after")]


@pytest.mark.slow
def test_a_cache_trains_as_its_teacher_does(home, tmp_path):
    pytest.importorskip("matplotlib")
    online = tmp_path / "online"
    assert distil(home, online, "--teacher", str(home / "teacher")) == 0
    truth = losses(online)
    assert len(truth) == 4
    for kind, error in ((("--hidden",), 1e-5), (("--full",), 2e-3), (("--top-k", "400"), 2e-3)):
        kept, out = tmp_path / f"kept{kind[0]}", tmp_path / f"out{kind[0]}"
        assert run(home, kept, *kind) == 0
        assert distil(home, out, "--teacher-cache", str(kept)) == 0
        assert (losses(out) - truth).abs().max() < error * truth.max()
        assert kl(out) == pytest.approx(kl(online), rel=10 * error)
    few, out = tmp_path / "few", tmp_path / "out-few"
    assert run(home, few, "--top-k", "8") == 0
    assert distil(home, out, "--teacher-cache", str(few)) == 0
    assert (losses(out) < truth).all()  # fewer events, a smaller divergence
    assert "distilled from teacher" in (out / "student" / "README.md").read_text()


@pytest.mark.slow
def test_a_cache_that_does_not_fit_is_one_line(home, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    kept, out = tmp_path / "kept", tmp_path / "out"
    assert run(home, kept, "--top-k", "8") == 0
    of_cache = ("--teacher-cache", str(kept))

    def refused(message, *options):
        capsys.readouterr()
        assert distil(home, out, *of_cache, *options) in (1, 2)
        assert message in capsys.readouterr().err.splitlines()[-1]
        assert not (out / "student").exists()

    refused("is of another corpus, or of another tokenizer", "--sequence-length", "8")
    refused("is of another corpus, or of another tokenizer", "--seed", "7")
    refused("knows its teacher at T = 1 alone: --teacher-temperature 1", "--temperature", "2")
    refused("knows its teacher at T = 1 alone", "--temperature", "cosine:1,2")
    refused("standardize=True needs the teacher's logits, and a TopK has", "--standardize")
    refused("DIST needs the teacher's logits, and a TopK has none", "--divergence", "dist")
    refused("reverse_kl is infinite where", "--teacher-tail=label", "--divergence=reverse_kl")
    refused("the cache has 400 tokens: say --vocab-size 400", "--vocab-size", "410")
    refused("leave one of them out", "--teacher", str(home / "teacher"))
    (kept / "tokenizer").rename(tmp_path / "tokenizer")
    refused("has no tokenizer: it is not finished, or not by fastkd cache")
    (tmp_path / "tokenizer").rename(kept / "tokenizer")
    refused("did you mean 'renormalize'", "--teacher-tail", "renormalise")
    pytest.importorskip("optuna")
    assert distil(home, tmp_path / "tuned", *of_cache, command="tune") == 2
    assert "knows its teacher at T = 1 alone" in capsys.readouterr().err.splitlines()[-1]
    (kept / "00000.safetensors").write_bytes(b"x")
    refused("00000.safetensors is broken")
