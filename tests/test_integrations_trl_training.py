"""Each of TRL's trainers for distillation trains with fastkd under it, to the same losses."""

import os
import warnings
from pathlib import Path

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported
os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
transformers = pytest.importorskip("transformers")
trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

import fastkd  # noqa: E402
import fastkd.integrations.trl as integration  # noqa: E402
from fastkd.integrations import numbers  # noqa: E402

pytestmark = pytest.mark.slow
TEXT = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text()
TEMPLATE = (
    "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] + '<end>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
PROMPTS = [f"What is rule {i}?" for i in range(8)]


@pytest.fixture(scope="module")
def tokens():
    from tokenizers import ByteLevelBPETokenizer

    special = ["<end>", "<pad>", "<user>", "<assistant>", "<system>"]
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator([TEXT], 320, special_tokens=special, show_progress=False)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, eos_token="<end>", pad_token="<pad>",
        chat_template=TEMPLATE,
    )  # fmt: skip


def model(tokens, width, seed):
    torch.manual_seed(seed)
    shape = transformers.LlamaConfig(
        vocab_size=len(tokens), hidden_size=width, intermediate_size=2 * width,
        num_hidden_layers=1, num_attention_heads=2, initializer_range=0.2,
        eos_token_id=tokens.eos_token_id, pad_token_id=tokens.pad_token_id,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(shape)


def messages(prompt):
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": prompt[::-1]}]


CHATS = {"messages": [messages(prompt) for prompt in PROMPTS]}
QUESTIONS = {"prompt": [[m[0]] for m in map(messages, PROMPTS)]}
LENGTH = {"max_completion_length": 8}
# Class and settings, data, and whether it takes a teacher.
TRAINERS = {
    "gkd": ("trl.experimental.gkd.GKD", {"max_new_tokens": 8, "beta": 0.3}, CHATS, True),
    "gold": (
        "trl.experimental.gold.GOLD", {**LENGTH, "lmbda": 0.5, "beta": 0.0}, CHATS, True
    ),
    "iw_opd": (
        "trl.experimental.iw_opd.IWOPD",
        {**LENGTH, "lmbda": 0.5, "beta": 0.5, "distillation_objective": "jsd", "loss_top_k": 0},
        CHATS, True,
    ),
    "distillation": ("trl.Distillation", {**LENGTH, "beta": 1.0}, QUESTIONS, True),
    "sdft": (
        "trl.experimental.sdft.SDFT",
        {**LENGTH, "distillation_mode": "full_logits", "num_generations": 2},
        {**QUESTIONS, "privileged_context": PROMPTS}, False,
    ),
    "sdpo": (
        "trl.experimental.sdpo.SDPO",
        {**LENGTH, "distillation_mode": "topk_logits", "distillation_topk": 5, "num_generations": 2,
         "success_reward_threshold": 0.0}, QUESTIONS, False,
    ),
}  # fmt: skip


def trained(trainer, tokens, folder):
    """The losses of three steps, and the student's weights."""
    path, settings, data, taught = TRAINERS[trainer]
    module, _, name = path.rpartition(".")
    module = integration._imported(module)
    arguments = getattr(module, f"{name}Config")(
        str(folder / "runs"), max_steps=3, per_device_train_batch_size=4, learning_rate=1e-2,
        logging_steps=1, report_to="none", use_cpu=True, bf16=False, disable_tqdm=True,
        save_strategy="no", seed=3,
        adam_epsilon=1e-4,  # steps of Adam would else be as large for gradients that are only noise
        **settings,
    )  # fmt: skip
    sides = {"student": model(tokens, 16, 0), "teacher": model(tokens, 32, 1)}
    for side, made in sides.items():  # some trainers load from where a model came from
        made.save_pretrained(folder / side)
        tokens.save_pretrained(folder / side)
    student, teacher = (
        transformers.AutoModelForCausalLM.from_pretrained(folder / side) for side in sides
    )
    options = {"teacher_model": teacher} if taught else {}
    if trainer == "sdpo":
        options["reward_funcs"] = lambda completions, **_: [1.0 for _ in completions]
    transformers.set_seed(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = getattr(module, f"{name}Trainer")(
            student, args=arguments, train_dataset=datasets.Dataset.from_dict(data),
            processing_class=tokens, **options,
        )  # fmt: skip
        made.train()
    losses = [row["loss"] for row in made.state.log_history if "loss" in row]
    return losses, [weight.detach().clone() for weight in student.parameters()]


@pytest.mark.parametrize("trainer", TRAINERS)
def test_it_trains_to_the_same_losses(trainer, tokens, tmp_path, monkeypatch):
    if trainer == "distillation" and numbers(trl.__version__) < (1, 15):
        pytest.skip("before trl 1.15 it has no function of its own that could be replaced")
    theirs, their_weights = trained(trainer, tokens, tmp_path / "theirs")
    calls, real = [], integration.distillation_loss

    def counted(*arguments, **options):
        calls.append(arguments[0].shape)
        return real(*arguments, **options)

    monkeypatch.setattr(integration, "distillation_loss", counted)
    with integration.patched(trainer):
        ours, our_weights = trained(trainer, tokens, tmp_path / "ours")
    assert len(calls) >= 3
    assert len(ours) == 3
    assert any(abs(loss) > 1e-3 for loss in theirs)
    assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-5)
    start = model(tokens, 16, 0).parameters()
    for mine, wanted, before in zip(our_weights, their_weights, start, strict=True):
        torch.testing.assert_close(mine, wanted, rtol=0, atol=1e-3)
        assert (mine - before).abs().max() > 5e-3


def test_gkd_and_distillation_trainer_take_the_same_steps(tokens, tmp_path):
    """Off-policy, on the same chats: one curve, and one student."""
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    from fastkd.integrations.transformers import DistillationTrainer

    common = {
        "max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "seed": 3,
        "logging_steps": 1, "report_to": "none", "use_cpu": True, "disable_tqdm": True,
        "save_strategy": "no", "gradient_accumulation_steps": 2,
    }  # fmt: skip
    chats = datasets.Dataset.from_dict(CHATS)
    gkd = GKDTrainer(
        model(tokens, 16, 0), model(tokens, 32, 1), processing_class=tokens, train_dataset=chats,
        args=GKDConfig(str(tmp_path / "gkd"), lmbda=0.0, beta=0.3, bf16=False, **common),
    )  # fmt: skip

    def collate(rows):
        batch = gkd.data_collator(rows)
        return {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}

    ours = DistillationTrainer(
        model=model(tokens, 16, 0), teacher=model(tokens, 32, 1), train_dataset=chats,
        loss={"divergence": fastkd.JSD(0.3)}, data_collator=collate,
        args=transformers.TrainingArguments(
            str(tmp_path / "ours"), remove_unused_columns=False, **common
        ),
    )  # fmt: skip
    curves = []
    for trainer in (gkd, ours):
        trainer.train()
        curves.append([row["loss"] for row in trainer.state.log_history if "loss" in row])
    assert curves[1] == pytest.approx(curves[0], rel=1e-3)
    assert curves[0][-1] < 0.9 * curves[0][0]
    for mine, wanted in zip(ours.model.parameters(), gkd.model.parameters(), strict=True):
        torch.testing.assert_close(mine, wanted, rtol=0, atol=1e-3)
