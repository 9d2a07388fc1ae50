"""Output heads in place of logits, and batches that the student writes, in DistillationTrainer."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from fastkd import LinearHead, chunks  # noqa: E402
from fastkd.distill.measure import peak_memory  # noqa: E402
from fastkd.integrations.on_policy import OnPolicy  # noqa: E402
from fastkd.integrations.transformers import DistillationTrainer  # noqa: E402
from tests.closeness import assert_close  # noqa: E402

CPU = torch.device("cpu")
SHAPE = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "initializer_range": 0.5, "pad_token_id": 0, "eos_token_id": 1,
}  # fmt: skip


def models(kind="Llama", vocabulary=48, **options):
    torch.manual_seed(0)
    shape = getattr(transformers, f"{kind}Config")(
        **{**SHAPE, "vocab_size": vocabulary, "tie_word_embeddings": False, **options}
    )
    make = getattr(transformers, f"{kind}ForCausalLM")
    return make(shape), make(shape)


def trainer(folder, student, teacher, arguments=None, **options):
    fixed = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no"}
    return DistillationTrainer(
        model=student,
        teacher=teacher,
        args=transformers.TrainingArguments(str(folder), **fixed, **(arguments or {})),
        **options,
    )


def batch(vocabulary=48, places=12):
    ids = torch.randint(2, vocabulary, (3, places), generator=torch.Generator().manual_seed(1))
    labels = ids.masked_fill(torch.arange(places) < torch.tensor([[0], [4], [7]]), -100)
    return {"input_ids": ids, "labels": labels}


# --- heads -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("Llama", {}),
        ("Llama", {"tie_word_embeddings": True}),
        ("Gemma2", {"final_logit_softcapping": 3.0, "head_dim": 8}),
        ("Granite", {"logits_scaling": 8.0}),
        ("Phi", {}),  # its head has a bias
        ("OPT", {"ffn_dim": 16}),  # which calls a part of its base model
    ],
)
def test_heads_change_neither_loss_nor_gradient(tmp_path, kind, options):
    student, teacher = models(kind, **options)
    truth = copy.deepcopy(student)
    loss = {"temperature": 2.0, "alpha": 0.7, "divergence": "reverse_kl"}
    found = trainer(tmp_path, student, teacher, loss=loss, vocab_size=40)
    wanted = trainer(
        tmp_path, truth.double(), copy.deepcopy(teacher).double(), loss=loss, vocab_size=40,
        heads=False,
    )  # fmt: skip
    for job, kind in ((found, LinearHead), (wanted, torch.Tensor)):
        assert isinstance(job.student_logits(job.model, batch(40)), kind)
        assert isinstance(job.teacher_logits(batch(40)), kind)
    values = [each.compute_loss(each.model.eval(), batch(40)) for each in (found, wanted)]
    assert_close(*values)
    for value in values:
        value.backward()
    for ours, theirs in zip(student.parameters(), truth.parameters(), strict=True):
        if theirs.grad.abs().max() > 1e-9:  # attention biases of keys have none
            assert_close(ours.grad, theirs.grad, "gradient")
    assert_close(found.step_figures[0], wanted.step_figures[0].double())


def test_logits_are_never_in_memory(tmp_path, monkeypatch):
    """Of the student's [B, T, V] and the teacher's; what is left are chunks and weights."""
    monkeypatch.setattr(chunks, "CPU_BYTES", 1 << 20)
    student, teacher = models(vocabulary=4000, initializer_range=0.02)
    ids = torch.randint(4000, (40, 20))
    inputs = {"input_ids": ids, "labels": ids}
    logits = 4 * ids.numel() * 4000  # bytes
    peaks = []
    for heads in (True, False):
        job = trainer(tmp_path, student, teacher, heads=heads)

        def step(job=job):
            job.compute_loss(student, inputs).backward()
            student.zero_grad()

        step()
        peaks.append(peak_memory(step, CPU))
    assert 2 * peaks[0] < 2 * logits < peaks[1]


@pytest.mark.parametrize("layer", ["lora on the head", "another class"])
def test_a_head_that_is_no_plain_layer_falls_back_to_logits(tmp_path, layer):
    student, teacher = models()
    if layer == "another class":
        student.lm_head = type("Mine", (torch.nn.Linear,), {})(16, 48, bias=False)
    else:
        peft = pytest.importorskip("peft")
        student = peft.get_peft_model(
            student, peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["lm_head"])
        )
    job = trainer(tmp_path, student, teacher)
    assert isinstance(job.student_logits(student, batch()), torch.Tensor)
    assert isinstance(job.teacher_logits(batch()), LinearHead)
    job.compute_loss(student, batch()).backward()


# --- on policy -------------------------------------------------------------------------------


def test_a_prompt_is_what_stands_before_the_last_completion():
    """Of one document of the sequence, its padding and the other documents left out."""
    ids = torch.arange(100, 116)[None]
    learnt = torch.tensor([[0, 0, 0, 1, 1, 0, 0, 1, 1, 0, 0, 0, 0, 1, 1, 0]]).bool()
    places = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7, 8, 0, 1, 2, 3, 4, 5, 0]])
    inputs = {
        "input_ids": ids, "labels": ids.masked_fill(~learnt, -100), "position_ids": places,
    }  # fmt: skip
    policy, found = OnPolicy(1.0, new_tokens=4, prompt_tokens=3), set()
    torch.manual_seed(0)
    for _ in range(20):
        found.add(tuple(policy._prompt(inputs, 0).tolist()))
    assert found == {tuple(range(100, 107)), tuple(range(109, 113))}
    text = {"input_ids": ids, "labels": ids}  # plain text is learnt from the first token on
    assert policy._prompt(text, 0).tolist() == [100, 101, 102]
    long = OnPolicy(1.0, new_tokens=14)._prompt(inputs, 0)
    assert long.tolist() in ([105, 106], [111, 112])


def test_what_is_written_is_the_students_up_to_its_end():
    student, _ = models(initializer_range=1.0)
    policy = OnPolicy(1.0, new_tokens=9, prompt_tokens=5, end=(7,))
    with policy.random(0, 3, 0):
        found = policy.written(student, batch(), vocab_size=8)
    with policy.random(0, 3, 0):
        again = policy.written(student, batch(), vocab_size=8)
    assert all(torch.equal(found[name], again[name]) for name in found)
    assert found["input_ids"].shape == found["labels"].shape == (3, 12)
    assert (found["labels"] != -100).sum(-1).min() < 9  # one came to its end
    prompts = [3, 3, 3]  # no more than leave room for what is written
    for row, size in enumerate(prompts):
        real = found["attention_mask"][row].bool()
        own = found["labels"][row] != -100
        ids = found["input_ids"][row]
        assert torch.equal(found["labels"][row][own], ids[own])
        assert int((real & ~own).sum()) == size
        assert ids[own].max() < 8
        ends = (ids[own] == 7).nonzero().flatten().tolist()
        assert ends == ([int(own.sum()) - 1] if own.sum() < 9 else ends[:1])
        assert found["position_ids"][row][real].tolist() == list(range(int(real.sum())))
        # One by one, without padding, the student gives its own tokens the same logits.
        alone = student(ids[real][None]).logits
        beside = student(**{n: v for n, v in found.items() if n != "labels"}).logits[row][real]
        torch.testing.assert_close(alone[0], beside, atol=1e-4, rtol=1e-4)


def test_half_the_steps_are_on_policy_and_count_what_was_written(tmp_path):
    """In them labels play no part; the count is of the tokens that were written."""
    student, teacher = models()
    rows = [{name: value[0] for name, value in batch().items()}] * 16
    job = trainer(
        tmp_path, student, teacher, {"max_steps": 8, "per_device_train_batch_size": 2,
        "learning_rate": 1e-3, "gradient_accumulation_steps": 2},
        loss={"alpha": 0.5}, train_dataset=rows, on_policy=OnPolicy(0.5, new_tokens=4),
    )  # fmt: skip
    seen, real = [], job.compute_loss

    def compute_loss(model, inputs, **others):
        before = {k: v.clone() for k, v in inputs.items()}
        value = real(model, inputs, **others)
        seen.append((job.own_words, before, others["num_items_in_batch"]))
        loss, kd = (figures := next(iter(job.step_figures.values())))[:2]
        assert torch.isclose(loss, kd, rtol=1e-5, atol=0) == job.own_words, figures
        return value

    job.compute_loss = compute_loss
    job.train()
    assert [own for own, *_ in seen[::2]] == [OnPolicy(0.5).at(step, 42) for step in range(8)]
    assert {own for own, *_ in seen} == {True, False}
    wrote = [inputs["input_ids"] for own, inputs, _ in seen if own]
    for some, other in itertools.combinations(wrote, 2):  # each step draws anew
        assert not torch.equal(some, other)
    for first, second in zip(seen[::2], seen[1::2], strict=True):
        counted = sum(int((each[1]["labels"][:, 1:] != -100).sum()) for each in (first, second))
        assert int(first[2]) == counted == int(second[2])
        assert ("attention_mask" in first[1]) == first[0]


def test_the_reverse_kl_on_its_own_samples_falls(tmp_path):
    student, teacher = models(vocabulary=24)
    rows = [{"input_ids": row, "labels": row} for row in torch.randint(2, 24, (64, 10))]
    policy = OnPolicy(1.0, new_tokens=8, prompt_tokens=2)
    job = trainer(
        tmp_path, student, teacher, {"max_steps": 40, "per_device_train_batch_size": 16,
        "learning_rate": 1e-2, "logging_steps": 1}, train_dataset=rows,
        loss={"divergence": "reverse_kl"}, on_policy=policy,
    )  # fmt: skip
    job.train()
    losses = [entry["loss"] for entry in job.state.log_history if "loss" in entry]
    assert sum(losses[-5:]) < 0.75 * sum(losses[:5])


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"share": 0.0}, "share must lie in"), ({"share": 0.5, "top_p": 1.5}, "top_p must lie in"),
        ({"share": 0.5, "temperature": 0.0}, "temperature must be positive"),
        ({"share": 0.5, "new_tokens": 0}, "new_tokens must be at least 1"),
    ],
)  # fmt: skip
def test_what_is_out_of_range_is_refused(wrong, said):
    with pytest.raises(ValueError, match=said):
        OnPolicy(**wrong)
