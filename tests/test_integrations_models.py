"""Models in the Trainer besides language models: decoders with encoders, those of one's own."""

import os

import pytest
import torch
import torch.nn.functional as F
from torch import nn

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported
transformers = pytest.importorskip("transformers")

import fastkd  # noqa: E402
import fastkd.integrations  # noqa: E402
from fastkd.integrations.transformers import (  # noqa: E402
    DistillationTrainer,
    distillation_loss_func,
)
from tests.closeness import assert_close  # noqa: E402

VOCABULARY = 48
VARIANTS = ["trainer", "function"]
if fastkd.integrations.numbers(transformers.__version__) < (5, 6):
    VARIANTS.remove("function")


def arguments(folder, **others):
    return transformers.TrainingArguments(
        str(folder), max_steps=1, use_cpu=True, report_to="none", disable_tqdm=True,
        save_strategy="no", logging_steps=1, optim="sgd", learning_rate=1.0, **others,
    )  # fmt: skip


def divergence(student, teacher, kept):
    """KL(p || q) over the places that count, in fp64."""
    lq, lp = (F.log_softmax(z.detach().double()[kept], -1) for z in (student, teacher))
    return (lp.exp() * (lp - lq)).sum(-1).mean()


# --- encoders with decoders ------------------------------------------------------------------


def bart(width):
    return transformers.BartForConditionalGeneration(
        transformers.BartConfig(
            vocab_size=VOCABULARY, d_model=width, encoder_layers=1, decoder_layers=1,
            encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=width,
            decoder_ffn_dim=width, max_position_embeddings=32, init_std=0.3,
        )
    )  # fmt: skip


def t5(width):
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=VOCABULARY, d_model=width, d_kv=8, d_ff=width, num_layers=1, num_heads=2,
            decoder_start_token_id=0, initializer_factor=2.0,
        )
    )  # fmt: skip


def whisper(width):
    """Without a method that makes the decoder's input of labels."""
    return transformers.WhisperForConditionalGeneration(
        transformers.WhisperConfig(
            vocab_size=VOCABULARY, d_model=width, num_mel_bins=8, encoder_layers=1,
            decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
            encoder_ffn_dim=width, decoder_ffn_dim=width, max_source_positions=6,
            max_target_positions=16, pad_token_id=0, bos_token_id=1, eos_token_id=2,
            decoder_start_token_id=1, init_std=0.3,
        )
    )  # fmt: skip


def translations(model):
    """Four of six tokens to five, of which the last do not all count."""
    torch.manual_seed(1)
    labels = torch.randint(3, VOCABULARY, (4, 5))
    labels[1, 3:] = -100
    if model is whisper:
        return {"input_features": torch.randn(4, 8, 12), "labels": labels}
    return {"input_ids": torch.randint(3, VOCABULARY, (4, 6)), "labels": labels}


@pytest.mark.parametrize("model", [bart, t5, whisper])
def test_a_decoder_reads_the_labels_as_under_its_own_loss(model, tmp_path):
    """BART's would go on with what its encoder reads, and say nothing."""
    torch.manual_seed(0)
    student, teacher = model(16).eval(), model(32).eval()
    batch = translations(model)
    trainer = DistillationTrainer(model=student, teacher=teacher, args=arguments(tmp_path))
    found = trainer.compute_loss(student, dict(batch))
    both = (each(**batch).logits for each in (student, teacher))
    assert_close(found, divergence(*both, batch["labels"] != -100))


@pytest.mark.skipif("function" not in VARIANTS, reason="before transformers 5.6")
def test_a_student_whose_decoder_did_not_read_the_labels_is_refused():
    """A Trainer with a loss of its own takes them out of the batch."""
    student = bart(16)
    loss = distillation_loss_func(student, bart(16))
    batch = translations(bart)
    outputs = student(input_ids=batch["input_ids"])
    with pytest.raises(ValueError, match=r"DataCollatorForSeq2Seq\(tokenizer, model=student\)"):
        loss(outputs, batch["labels"])


# --- an answer for each class, or a distribution ----------------------------------------------


class Linear(nn.Module):
    """A classifier of five classes."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 5)

    def forward(self, x, labels=None):
        return {"logits": self.layer(x)}


def bernoulli(z, y, labels):
    """The KL divergences of sigmoids at T = 2, and the cross-entropies: sums over classes."""
    q, p = torch.sigmoid(z / 2), torch.sigmoid(y / 2)
    kl = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
    q = torch.sigmoid(z)
    return kl.sum(-1), -(labels * q.log() + (1 - labels) * (1 - q).log()).sum(-1)


def softmax(z, y, labels):
    lq, lp = F.log_softmax(z / 2, -1), F.log_softmax(y / 2, -1)
    return (lp.exp() * (lp - lq)).sum(-1), -(labels * F.log_softmax(z, -1)).sum(-1)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("batches", [1, 4])
@pytest.mark.parametrize("terms", [bernoulli, softmax])
def test_rows_are_counted_where_labels_have_a_number_for_each_class(
    terms, batches, variant, tmp_path
):
    torch.manual_seed(0)
    student, teacher, x = Linear(), Linear(), torch.randn(8, 6)
    labels = (torch.rand(8, 5) > 0.5).float() if terms is bernoulli else torch.rand(8, 5).softmax(1)
    data = [{"x": one, "labels": label} for one, label in zip(x, labels, strict=True)]
    z, y = (each.double()(x.double())["logits"] for each in (student, teacher))
    kd, ce = (term.mean() for term in terms(z, y.detach(), labels.double()))
    (wanted,) = torch.autograd.grad(0.7 * 4 * kd + 0.3 * ce, [student.layer.weight])
    before = student.float().layer.weight.detach().clone()
    loss = {"temperature": 2.0, "alpha": 0.7}
    loss |= {"divergence": fastkd.Bernoulli()} if terms is bernoulli else {}
    common = {
        "args": arguments(
            tmp_path, per_device_train_batch_size=8 // batches, max_grad_norm=0.0,
            gradient_accumulation_steps=batches, lr_scheduler_type="constant",
        ),
        "train_dataset": data,
    }  # fmt: skip
    if variant == "function":
        function = distillation_loss_func(student, teacher.float(), **loss)
        transformers.Trainer(student, compute_loss_func=function, **common).train()
    else:
        trainer = DistillationTrainer(
            model=student, teacher=teacher.float(), loss=loss, eval_dataset=data, **common
        )
        ours = trainer.evaluate()
        assert ours["eval_validation_loss"] == pytest.approx(ce.item(), rel=1e-4)
        kl, _ = terms(2 * z, 2 * y, labels.double())  # at T = 1
        assert ours["eval_kl_to_teacher"] == pytest.approx(kl.mean().item(), rel=1e-4)
        same = (z > 0) == (y > 0) if terms is bernoulli else z.argmax(-1) == y.argmax(-1)
        assert ours["eval_agreement"] == pytest.approx(same.double().mean().item())
        trainer.train()
        (row,) = (row for row in trainer.state.log_history if "kd" in row)
        assert row["kd"] == pytest.approx(kd.item(), rel=1e-4)
    assert_close(before - student.layer.weight.detach(), wanted, "gradient")


def test_distributions_of_a_language_model_have_no_place_that_counts_nowhere(tmp_path):
    ids, labels = torch.zeros(1, 3, dtype=torch.long), torch.ones(1, 3, VOCABULARY)
    trainer = DistillationTrainer(
        model=Bigram(), teacher=Bigram(), args=arguments(tmp_path), shift=True
    )
    with pytest.raises(ValueError, match="give them as shift_labels"):
        trainer.compute_loss(trainer.model, {"input_ids": ids, "labels": labels})


# --- models of one's own ---------------------------------------------------------------------


class Bigram(nn.Module):
    """Knows nothing of labels."""

    def __init__(self, returns=lambda logits: {"logits": logits}):
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, VOCABULARY)
        self.returns = returns

    def forward(self, input_ids):
        return self.returns(self.table(input_ids))


def rows():
    ids = torch.randint(VOCABULARY, (8, 10), generator=torch.Generator().manual_seed(2))
    return [{"input_ids": row, "labels": row, "row": i} for i, row in enumerate(ids)]


def test_labels_and_rows_stay_in_the_batch_of_a_model_that_does_not_name_them(tmp_path):
    student, teacher = Bigram(), Bigram()
    trainer = DistillationTrainer(
        model=student, teacher=teacher, args=arguments(tmp_path), train_dataset=rows(),
        eval_dataset=rows(), shift=True,
    )  # fmt: skip
    (batch,) = trainer.get_train_dataloader()
    assert sorted(batch["row"].tolist()) == list(range(8))
    ids = torch.stack([row["input_ids"] for row in rows()])[:, :-1]
    wanted = divergence(student.table(ids), teacher.table(ids), slice(None))
    assert trainer.evaluate()["eval_kl_to_teacher"] == pytest.approx(wanted.item(), rel=1e-4)
    trainer.train()


@pytest.mark.parametrize("returns", [lambda logits: (logits,), lambda logits: logits])
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_models_whose_logits_have_no_name_are_refused(returns, side, tmp_path):
    models = {"student": Bigram(), "teacher": Bigram(), side: Bigram(returns)}
    trainer = DistillationTrainer(
        model=models["student"], teacher=models["teacher"], args=arguments(tmp_path)
    )
    ids = torch.zeros(1, 3, dtype=torch.long)
    with pytest.raises(TypeError, match="must return their logits as `logits`"):
        trainer.compute_loss(models["student"], {"input_ids": ids, "labels": ids})


def test_a_student_made_anew_for_each_run_has_a_head_of_its_own(tmp_path):
    """By model_init, as a search over settings asks for."""
    shape = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2,
    )  # fmt: skip
    found = []
    for heads in (True, False):
        torch.manual_seed(0)
        trainer = DistillationTrainer(
            model_init=lambda: transformers.LlamaForCausalLM(shape), heads=heads,
            teacher=transformers.LlamaForCausalLM(shape), args=arguments(tmp_path),
            train_dataset=rows(),
        )  # fmt: skip
        found.append(trainer.train().training_loss)
    assert found[0] == pytest.approx(found[1], rel=1e-4)
    assert found[0] > 0
