"""Teachers stored in few bits, students trained for few bits, and where teachers come from."""

import json

import pytest
import torch

from fastkd.distill.quantised import TEACHERS
from tests.test_distill_students import figures, last_line
from tests.test_distill_user_models import (
    TEXT,
    distil,
    losses,
    options,
    tokenizer,
    transformers,
    weights,
)
from tests.test_distill_user_models import _one_thread as _one_thread
from tests.test_distill_user_models import home as home


@pytest.fixture(scope="module")
def sharp(tmp_path_factory):
    """A model whose weights are large enough that rounding them is seen."""
    folder = tmp_path_factory.mktemp("sharp") / "model"
    torch.manual_seed(0)
    shape = transformers.LlamaConfig(
        vocab_size=400, hidden_size=64, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=64, initializer_range=0.3,
    )  # fmt: skip
    transformers.LlamaForCausalLM(shape).save_pretrained(folder)
    tokenizer(TEXT).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("kind", "package"), TEACHERS.items())
def test_a_teacher_of_few_bits_takes_less_and_teaches_nearly_the_same(
    sharp, home, tmp_path, kind, package, monkeypatch
):
    pytest.importorskip(package)
    from fastkd.distill import job

    sizes, real = [], job.models.teacher

    def teacher(*arguments):
        found = real(*arguments)
        held = [layer.up_proj.weight for layer in found.modules() if hasattr(layer, "up_proj")]
        sizes.append(sum(_bytes(weight) for weight in held))
        return found

    monkeypatch.setattr(job.models, "teacher", teacher)
    others = {"teacher": sharp, "steps": 3, "temperature": 1, "alpha": 1.0, "log_every": 1}
    for name, more in (("whole", []), (kind, [f"--teacher-precision={kind}"])):
        assert distil("--out", tmp_path / name, *options(home, **others), *more) == 0
    assert sizes[1] < 0.5 * sizes[0]
    whole, few = losses(tmp_path / "whole"), losses(tmp_path / kind)
    assert few == pytest.approx(whole, rel=0.1)
    assert few != pytest.approx(whole, rel=1e-6)


def _bytes(weight):
    parts = getattr(weight, "tensor_data_names", None)
    tensors = [getattr(weight, name) for name in parts] if parts else [weight]
    return sum(each.numel() * each.element_size() for each in tensors)


@pytest.mark.parametrize("kind", ["int4", "int8"])
def test_what_is_trained_is_what_is_stored(sharp, kind):
    pytest.importorskip("torchao")
    from fastkd.distill.quantised import prepare, quantise

    ids = torch.arange(12)[None]
    trained, stored, plain = map(
        transformers.AutoModelForCausalLM.from_pretrained, (sharp, sharp, sharp)
    )
    prepare(trained, kind)
    quantise(stored, kind)
    logits = [each(ids).logits for each in (trained, stored, plain)]
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-5, atol=1e-5)
    assert (logits[0] - logits[2]).abs().max() > 1e-3
    assert trained.state_dict().keys() == plain.state_dict().keys()


def test_a_student_for_few_bits_learns_from_itself_and_is_what_is_left_when_rounded(
    sharp, home, tmp_path
):
    """It gains where it counts: once torchao has stored it in these bits."""
    pytest.importorskip("torchao")
    from fastkd.distill.quantised import quantise

    out, kind = tmp_path / "out", "int4"
    chosen = options(
        home, teacher=sharp, student=sharp, quantize=kind, steps=40, alpha=1.0, temperature=1,
        learning_rate=1e-3, evaluate_every=100, epochs=9,
    )  # fmt: skip
    assert distil("--out", out, *chosen) == 0
    found = figures(out)
    assert found["before"]["kl_to_teacher"] > 0
    assert found["after"]["kl_to_teacher"] < 0.8 * found["before"]["kl_to_teacher"]
    student = transformers.AutoModelForCausalLM.from_pretrained(out / "student")
    teacher = transformers.AutoModelForCausalLM.from_pretrained(sharp)
    ids = tokenizer(TEXT)(TEXT[:800], return_tensors="pt").input_ids[:, :60]

    @torch.no_grad()
    def kl(model):
        p, q = (each(ids).logits.log_softmax(-1) for each in (teacher, model))
        return (p.exp() * (p - q)).sum(-1).mean().item()

    rounded = transformers.AutoModelForCausalLM.from_pretrained(sharp)
    for each in (student, rounded):
        quantise(each, kind)
    assert 0 < kl(student) < 0.9 * kl(rounded)


def test_a_teacher_on_a_device_of_its_own(home, tmp_path, capsys):
    chosen = options(home, steps=1)
    assert distil("--out", tmp_path / "out", *chosen, "--teacher-device=cpu") == 0
    assert distil("--out", tmp_path / "no", *chosen, "--teacher-device=nowhere") == 2
    assert "there are cpu, cuda, cuda:1, and auto" in last_line(capsys)


def test_data_sets_of_the_hub_are_streamed(home, tmp_path, monkeypatch, capsys):
    """The rows that a file has, asked of `datasets` by name, revision and split."""
    import datasets

    from fastkd.distill import hub

    asked, lines = [], TEXT.split("\n\n")

    def load_dataset(name, **options):
        asked.append((name, options))
        return iter({"text": line} for line in lines)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(hub, "commit", lambda name: commit)
    (tmp_path / "same.jsonl").write_text("\n".join(json.dumps({"text": each}) for each in lines))
    commit, name = "one", "hf:owner/name@v1:test"
    for out, data in (("hub", name), ("file", tmp_path / "same.jsonl")):
        assert distil("--out", tmp_path / out, *options(home, data=data, steps=2)) == 0
    assert asked == [("owner/name", {"revision": "v1", "split": "test", "streaming": True})]
    assert losses(tmp_path / "hub") == losses(tmp_path / "file")

    cut = tmp_path / "cut"
    with monkeypatch.context() as patched:
        patched.setattr("fastkd.distill.user_models._train", _stopped)
        assert distil("--out", cut, *options(home, data=name)) == 130
    commit = "another"
    assert distil("--resume", cut) == 1
    assert "the data or its tokenizer is another than when this run began" in last_line(capsys)


def _stopped(*arguments):
    raise KeyboardInterrupt


def test_a_data_set_that_the_hub_does_not_give_is_one_line(home, tmp_path, capsys):
    assert distil("--out", tmp_path / "out", *options(home, data="hf:no-one/nothing")) == 1
    assert "hf:no-one/nothing: the hub does not know it" in last_line(capsys)


def test_names_of_the_hub_have_revisions(home, tmp_path, monkeypatch, capsys):
    """Of a hub that is this machine's cache: two commits of one name, one by a tag."""
    import shutil

    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    place = tmp_path / "hub" / "models--owner--name"
    (place / "refs").mkdir(parents=True)
    for tag, commit, model in (("main", "a" * 40, "teacher"), ("v1", "b" * 40, "student")):
        (place / "refs" / tag).write_text(commit)
        shutil.copytree(home / model, place / "snapshots" / commit)
    chosen = options(home, steps=2, temperature=1, alpha=1.0, log_every=1)
    for name in ("owner/name", "owner/name@v1"):
        out = tmp_path / name.replace("/", "_")
        assert distil("--out", out, *chosen, f"--student={name}") == 0
        assert json.loads((out / "metrics.json").read_text())["settings"]["student"] == name
    # The student of main is the teacher itself.
    assert losses(tmp_path / "owner_name")[0] == pytest.approx(0, abs=1e-6)
    assert losses(tmp_path / "owner_name@v1")[0] > 1e-3
    assert weights(tmp_path / "owner_name@v1")["lm_head.weight"].shape[0] == 416
    assert distil("--out", tmp_path / "no", *chosen, "--student=owner/name@v2") == 1
    assert "owner/name@v2 is neither a folder here nor" in last_line(capsys)
