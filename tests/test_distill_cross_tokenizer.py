"""`fastkd distill --cross-tokenizer`: a teacher and a student of different tokenizers."""

import itertools
import json

import pytest
import torch

from tests.test_distill_user_models import _one_thread as _one_thread
from tests.test_distill_user_models import (
    distil,
    losses,
    model,
    options,
    stopped_after,
    tokenizer,
    transformers,
    weights,
)
from tests.test_distill_user_models import home as home

from fastkd.distill import aligned, documents, settings  # isort: skip


@pytest.fixture(scope="module")
def pair(home, tmp_path_factory):
    """A teacher that was trained, and a student whose tokenizer is coarser."""
    folder = tmp_path_factory.mktemp("pair")
    text = (home / "text.txt").read_text()
    model(folder / "student", tokenizer(text, 330), width=16, vocabulary=352, seed=1)
    chosen = options(
        home, alpha=0, steps=60, learning_rate=3e-2, student=home / "teacher", evaluate_every=60
    )
    assert distil("--out", folder / "run", *chosen) == 0
    return folder


def chosen(pair, home, **others):
    return options(
        home, **{
            "teacher": pair / "run" / "student", "student": pair / "student", "alpha": 1.0,
            "temperature": 1, "steps": 20, "learning_rate": 3e-2, "evaluate_every": 10, **others,
        },
    )  # fmt: skip


def figures(folder):
    return json.loads((folder / "metrics.json").read_text())


@pytest.mark.parametrize("kind", ["uld", "gold"])
def test_it_learns_and_goes_on_as_if_it_had_not_stopped(pair, home, tmp_path, kind):
    """From the teacher alone, no label; its words are known where tokens are shared."""
    asked = chosen(pair, home, cross_tokenizer=kind)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert distil("--out", whole, *asked) == 0
    before, after = figures(whole)["before"], figures(whole)["after"]
    assert after["kl_to_teacher"] < 0.9 * before["kl_to_teacher"]
    if kind == "gold":
        assert after["validation_loss"] < before["validation_loss"] - 0.5
        assert after["agreement"] > before["agreement"]
    assert losses(whole)[-1] < 0.9 * losses(whole)[0]
    tokens = transformers.AutoTokenizer.from_pretrained(whole / "student")
    assert len(tokens) == 330

    with stopped_after(7):
        assert distil("--out", cut, *asked) == 130
    assert distil("--resume", cut) == 0
    mine, theirs = weights(cut), weights(whole)
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def test_accumulation_changes_nothing(pair, home, tmp_path):
    both = {"cross_tokenizer": "gold", "alpha": 0.5, "temperature": 2, "steps": 3}
    whole = chosen(pair, home, **both)
    assert distil("--out", tmp_path / "whole", *whole) == 0
    halves = chosen(pair, home, **both, batch_size=2, accumulation=2)
    assert distil("--out", tmp_path / "halves", *halves) == 0
    mine, theirs = weights(tmp_path / "halves"), weights(tmp_path / "whole")
    for name in theirs:
        torch.testing.assert_close(mine[name], theirs[name], rtol=0, atol=2e-4)


def test_the_loss_is_that_of_each_span(home, pair, tmp_path):
    """By loops over the probabilities of each model alone, one sequence at a time."""
    from fastkd.distill.cross import CrossTokenizerTrainer

    load = transformers.AutoModelForCausalLM.from_pretrained
    teacher, student = load(home / "teacher"), load(pair / "student")
    wanted = settings.UserModels(alpha=0.75, temperature="2", teacher_temperature="1.5")
    trainer = CrossTokenizerTrainer(
        shared=torch.tensor([[0, 0]]), teacher_vocab_size=400, distance="uld", teacher=[teacher],
        loss=wanted.loss, vocab_size=330, model=student,
        args=transformers.TrainingArguments(str(tmp_path), use_cpu=True, report_to="none"),
    )  # fmt: skip
    torch.manual_seed(0)
    spans = [[[1, 3, 2, 3], [3, 4, 3, 6], [4, 5, 6, 7]], [[2, 4, 1, 2], [4, 5, 2, 3]]]
    rows = [
        {
            "input_ids": torch.randint(330, (size,)).tolist(),
            "learnt": [False] * 2 + [True] * (size - 2),
            "teacher_ids": torch.randint(400, (size + 1,)).tolist(),
            "spans": some,
        }
        for size, some in zip((7, 5), spans, strict=True)
    ]
    student.eval()
    found = trainer.compute_loss(student, aligned.collate(rows)).item()
    total, items = 0.0, 0
    for row in rows:
        mine, theirs = torch.tensor([row["input_ids"]]), torch.tensor([row["teacher_ids"]])
        with torch.no_grad():
            z = student(mine).logits[0, :, :330].double()
            q = (z / 2).softmax(-1)
            p = (teacher(theirs).logits[0, :, :400].double() / 1.5).softmax(-1)
        for a, b, c, d in row["spans"]:
            of_student, of_teacher = q[a - 1].clone(), p[c - 1].clone()
            for i in range(a + 1, b):
                of_student *= q[i - 1, mine[0, i]]
            for i in range(c + 1, d):
                of_teacher *= p[i - 1, theirs[0, i]]
            ranked = sorted(of_student.tolist(), reverse=True) + [0.0] * 70
            other = sorted(of_teacher.tolist(), reverse=True)
            apart = sum(abs(x - y) for x, y in zip(ranked, other, strict=True))
            total += 0.75 * 3 * (b - a) * apart
        for i in range(2, mine.size(1)):
            total -= 0.25 * z[i - 1].log_softmax(-1)[mine[0, i]].item()
            items += 1
    assert found == pytest.approx(total / items, rel=1e-5)


# --- text ------------------------------------------------------------------------------------


def sequences(home, coarse, text, prompt="", length=16, most=1000):
    """Of one text, by the row's own reader; and the two tokenizers."""
    mine = tokenizer((home / "text.txt").read_text(), coarse)
    theirs = transformers.AutoTokenizer.from_pretrained(home / "teacher")
    wanted = settings.UserModels(
        teacher=("t",), student="s", data=("d",), cross_tokenizer="uld", sequence_length=length
    )
    values = {"prompt": prompt, "completion": text} if prompt else {"text": text}
    row = documents.Row(values, "here")
    reader = documents.Reader(mine, wanted)
    rows = aligned.pack(
        reader.documents([row]), documents.Reader(theirs, wanted), length, most, reader.counts
    )
    return list(rows), mine, theirs


def spelt(tokens, ids):
    return tokens.decode(ids, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize(
    "text", ["It's naïve: 你好 🙂🙂 finds the cause of it.", "a  b\n\n\tc " * 9 + "end"]
)
@pytest.mark.parametrize("length", [5, 6, 7, 16])
def test_spans_spell_the_same(home, text, length):
    rows, mine, theirs = sequences(home, 300, text, length=length)
    assert len(rows) > 1
    if length == 16:  # so short that one has no span, a sequence is left out
        assert "".join(spelt(mine, row["input_ids"]) for row in rows) == text + "<end>"
    for row in rows:
        said = spelt(mine, row["input_ids"])
        assert said == spelt(theirs, row["teacher_ids"])
        assert "\ufffd" not in said
        assert len(row["input_ids"]) <= length
        for a, b, c, d in row["spans"]:
            assert min(a, c) > 0
            assert spelt(mine, row["input_ids"][a:b]) == spelt(theirs, row["teacher_ids"][c:d])
        found = [span[:2] for span in row["spans"]]
        assert all(b == a for (_, b), (a, _) in itertools.pairwise(found))
        assert found[-1][1] == len(row["input_ids"])


def test_a_prompt_is_in_no_span(home):
    rows, mine, _ = sequences(home, 300, " finds the cause", prompt="Who is it that", length=60)
    (row,) = rows
    learnt = [i for a, b, _, _ in row["spans"] for i in range(a, b)]
    assert spelt(mine, [row["input_ids"][i] for i in learnt]) == " finds the cause<end>"
    batch = aligned.collate([row, {name: value[:5] for name, value in row.items()}])
    assert (batch["labels"][0] != -100).nonzero().flatten().tolist() == learnt
    assert (batch["labels"][1, 5:] == -100).all()
    assert (batch["spans"][1, 5:] == 0).all()


def test_the_teacher_reads_no_more_than_it_can(home):
    rows, _, _ = sequences(home, 300, "finds the cause of it all " * 3, length=60, most=9)
    assert len(rows[0]["teacher_ids"]) == 9
    assert max(stop for *_, stop in rows[0]["spans"]) <= 9


# --- what does not go together ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"cross_tokenizer": "x"}, "cross_tokenizer 'x'"),
        ({"teacher_cache": "HOME"}, "teacher_cache: with cross_tokenizer it has no meaning"),
        ({"on_policy": 0.5, "completion_length": 4}, "on_policy: with cross_tokenizer it has no"),
        ({"entropy_weight": 0.1}, "entropy_weight: with cross_tokenizer it has no meaning"),
        (
            {"chunk_mib": 8},
            "chunk_mib: with cross_tokenizer it has no meaning, logits are made whole",
        ),
        ({"chat_template": "x"}, "chat_template: with cross_tokenizer it has no meaning"),
        ({"standardize": True}, "standardize: with cross_tokenizer it has no meaning"),
        ({"teacher": ("HOME", "OTHER")}, "cross_tokenizer takes one teacher, got 2"),
        ({"teacher": ("s",), "lora": "4", "alpha": 0.5}, "teacher and student are one model"),
        *(
            (
                {"divergence": name},
                f"cross_tokenizer: divergence must be a sum over tokens, {which}",
            )
            for name, which in (("dkd", "which DKD"), ("dist", "which DIST"), ("akl", "which AKL"))
        ),
        ({"cross_tokenizer": "uld", "divergence": "tvd"}, "divergence: uld has its own distance"),
    ],
)
def test_what_has_no_meaning_is_refused(more, said):
    from fastkd.distill.errors import Usage

    values = {"teacher": ("t",), "student": "s", "data": ("d",), "cross_tokenizer": "gold"}
    with pytest.raises(Usage) as caught:
        settings.build(settings.UserModels, values | more)
    assert said in str(caught.value)


def test_what_models_and_data_cannot_is_refused(home, tmp_path, capsys):
    def said(*more, **others):
        asked = options(home, **others)
        assert distil("--out", tmp_path / "out", *asked, *more) != 0
        return capsys.readouterr().err.splitlines()[-1]

    assert "or say --cross-tokenizer gold" in said(student=home / "stranger")
    config = home / "student" / "config.json"
    assert "a config.json comes without" in said("--cross-tokenizer=uld", student=config)
    chat = tmp_path / "chat.jsonl"
    chat.write_text(json.dumps({"messages": [{"role": "user", "content": "Who?"}]}))
    asked = {"student": home / "stranger", "data": chat}
    assert "is a conversation, which each tokenizer" in said("--cross-tokenizer=gold", **asked)
