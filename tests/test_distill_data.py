"""The user's data: which files, which rows, which tokens of them are learnt, in what sequences."""

import bz2
import gzip
import json
import lzma
import os
import random
import subprocess
import sys
from pathlib import Path
from pydoc_data.topics import topics
from unittest.mock import Mock

import pytest
import torch

from fastkd import __main__
from fastkd.distill import corpus, documents, files, sequences, settings
from fastkd.distill.errors import RunError

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported
transformers = pytest.importorskip("transformers")
pyarrow = pytest.importorskip("pyarrow")
pytest.importorskip("datasets")
pytest.importorskip("jinja2")

ROOT = Path(__file__).parents[1]
TEXT = topics["compound"][:5000]
CHATML = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# As of models that think: of past turns only what was said, of the last one a thought before it.
THINKING = (
    "{% for m in messages %}<|{{ m.role }}|>"
    "{% if m.role == 'assistant' and loop.last %}<think></think>{% endif %}"
    "{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    """With <s> before every text, by its own post-processor."""
    from tokenizers import ByteLevelBPETokenizer
    from tokenizers.processors import TemplateProcessing

    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator([TEXT], 400, special_tokens=["<s>", "</s>"], show_progress=False)
    bpe._tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, bos_token="<s>", eos_token="</s>", chat_template=CHATML
    )


@pytest.fixture
def reader(tokenizer):
    """reader(loss_on="last") is a Reader with these settings."""

    def build(template=CHATML, **chosen):
        tokenizer.chat_template = template
        values = {"teacher": "t", "student": "s", "data": ["d"], **chosen}
        return documents.Reader(tokenizer, settings.build(settings.UserModels, values))

    yield build
    tokenizer.chat_template = CHATML


def one(reader, **values):
    (document,) = reader.documents([files.Row(values, "here")])
    return document


def learnt(reader, document):
    """What is learnt, as text; a mark where something between is not."""
    parts, before = [], True
    for token, wanted in zip(document.ids, document.learnt, strict=True):
        if wanted and not before and parts:
            parts.append("|")
        before = wanted
        parts += [reader.tokenizer.decode([token])] if wanted else []
    return "".join(parts)


# --- files -----------------------------------------------------------------------------------


def test_names_are_files_folders_and_patterns_and_a_file_is_meant_as_it_is_spelt(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    for name in ("a[1].jsonl", "a1.jsonl", "more/x.txt", "more/deep/y.parquet", "more/z.bin"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
    assert files.find(["a[1].jsonl"]).files == ["a[1].jsonl"]
    assert files.find(["a[0-9].jsonl"]).files == ["a1.jsonl"]
    assert files.find(["more"]).files == ["more/deep/y.parquet", "more/x.txt"]
    assert files.find(["a*.jsonl", "a1.jsonl"]).files == ["a1.jsonl", "a[1].jsonl"]
    assert files.find(["more/z.bin", "**/x.txt"]).files == ["more/z.bin", "more/x.txt"]
    for missing in ("nope.txt", "no*.txt", "m[1].jsonl"):
        with pytest.raises(RunError, match="there is no such file"):
            files.find([missing])
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        RunError, match=r"that ends in \.jsonl, .*\.csv, .*\.md, compressed \(\.gz, "
    ):
        files.find(["empty"])


def test_what_stands_in_a_folder_is_read_or_named(tmp_path, monkeypatch):
    """Links lead on, once; a link to nothing, a pipe, a folder shut to us: none is passed over."""
    monkeypatch.chdir(tmp_path)
    for name in ("data/a.txt", "others/b.jsonl"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("")
    os.symlink("../others", "data/more")
    os.symlink("../data", "others/back")
    assert files.find(["data"]).files == ["data/a.txt", "data/more/b.jsonl"]
    os.symlink("nowhere", "data/c.txt")
    for names in (["data"], ["data/*.txt"]):
        with pytest.raises(RunError, match=r"^data/c\.txt: it links to nothing"):
            files.find(names)
    os.unlink("data/c.txt")
    os.mkfifo("data/pipe.txt")
    for names in (["data"], ["data/pipe.txt"], ["/dev/null"]):
        with pytest.raises(RunError, match="it is no file: write what it says to one"):
            files.find(names)
    os.unlink("data/pipe.txt")
    monkeypatch.setattr(os, "scandir", Mock(side_effect=PermissionError(13, "shut", "data")))
    with pytest.raises(RunError, match="cannot read data: shut"):
        files.find(["data"])


@pytest.mark.parametrize("name", ["x" * 5000, "y/" * 3000, "a\0b", "loop"])
def test_names_of_no_file_are_one_line(tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    os.symlink("loop", "loop")
    (tmp_path / "text.txt").write_text(TEXT)
    for more in (
        [f"--data={name}"], ["--teacher=a", "--student=a", "--data=text.txt", "--eval-data", name],
        [f"--teacher={name}", "--student=a", "--data=text.txt"],
        ["--teacher=a", f"--student={name}", "--data=text.txt"], [f"--resume={name}"],
        ["--teacher=.", "--student=.", "--data=text.txt", f"--chat-template={name}"],
    ):  # fmt: skip
        assert __main__.main(["distill", *more]) in (1, 2)
        assert capsys.readouterr().err.splitlines()[-1].startswith("fastkd distill: ")


def test_a_name_in_another_encoding_is_refused(tmp_path, capsys):
    path = os.fsdecode(os.fsencode(tmp_path) + b"/\xff.txt")
    Path(path).write_text(TEXT)
    assert __main__.main(["distill", f"--out={tmp_path / 'out'}", f"--data={path}"]) == 2
    assert "data must be text in UTF-8" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_rows_of_several_kinds_share_a_table(reader):
    """As in parquet, where each has all columns; none of them is lost."""
    found = reader()
    rows = [{"text": "x y z"}, {"messages": CHAT}, {"prompt": "a", "completion": "b"}]
    columns = dict.fromkeys(("messages", "prompt", "completion", "text"))
    made = list(found.documents(files.Row(columns | row, "here") for row in rows))
    assert len(made) == 3
    apart = [one(reader(), **row) for row in rows]
    assert [document.ids for document in made] == [document.ids for document in apart]
    assert list(found.documents([files.Row(columns, "here")])) == []
    assert found.counts.empty == 1


def test_rows_of_every_kind_are_the_same(tmp_path):
    rows = [{"text": "ein"}, {"text": "zwei\n\u2028drei"}, {"text": None}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    (tmp_path / "a.json").write_text(json.dumps(rows, indent=1))
    (tmp_path / "lines.json").write_text("\ufeff" + "\n".join(map(json.dumps, rows)))
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.json", "lines.json", "a.parquet"):
        assert [row.values for row in files.rows(str(tmp_path / name))] == rows, name
        for ending, compress in COMPRESSIONS.items():
            (tmp_path / (name + ending)).write_bytes(compress((tmp_path / name).read_bytes()))
            found = files.rows(str(tmp_path / (name + ending)))
            assert [row.values for row in found] == rows, name + ending


@pytest.mark.parametrize("separator", [",", "\t"])
def test_rows_of_a_table_are_those_of_its_columns(tmp_path, separator):
    """Quotes hold separators, lines and quotes; a blank line is no row, an empty cell no text."""
    long = "x y " * 50_000
    cells = ["text", "id"], ['"a, b\t""c""\r\nd"', "1"], ["", "2"], [], [long, "3"]
    path = tmp_path / ("a.csv" if separator == "," else "a.tsv.gz")
    content = "\ufeff" + "\r\n".join(map(separator.join, cells)) + "\r\n"
    path.write_bytes(gzip.compress(content.encode()) if path.suffix == ".gz" else content.encode())
    found = list(files.rows(str(path)))
    assert [row.values["text"] for row in found] == ['a, b\t"c"\r\nd', "", long]
    assert [row.where for row in found] == [f"{path}, line {line}" for line in (3, 4, 6)]


def test_a_folder_has_compressed_files_read_and_others_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    os.mkdir("data")
    for name in ("a.pdf", "a.jsonl.zst", "b.gz"):
        Path("data", name).write_text("")
    for ending, compress in COMPRESSIONS.items():
        Path(f"data/a.txt{ending}").write_bytes(compress(TEXT[:3000].encode()))
    assert files.find(["data"]).files == ["data/a.txt.bz2", "data/a.txt.gz", "data/a.txt.xz"]
    named = ["data/a.jsonl.zst", "data/a.pdf", "data/b.gz"]
    assert files.find(["data", "data/a.txt.gz"]).passed_over == named
    assert corpus.read(["data"]) == [TEXT[:3000]] * 3
    found = documents.Counts(passed_over=named)
    assert f"3 files in folders of data left out, of no known kind: {', '.join(named)}" in (
        found.remarks(16)
    )


@pytest.mark.parametrize(
    "text", ["", "x", "a b\n" * 50, "one\n\n  two three " * 9, "x" * 99, " " * 99]
)
@pytest.mark.parametrize("size", [1, 7, 32])
def test_plain_text_in_blocks_is_all_there(tmp_path, monkeypatch, text, size):
    monkeypatch.setattr(files, "BLOCK", size)
    (tmp_path / "a.txt").write_text(text)
    rows = list(files.rows(str(tmp_path / "a.txt")))
    assert "".join(row.values["text"] for row in rows) == text
    assert [row.continues for row in rows] == [i > 0 for i in range(len(rows))]
    assert [row.goes_on for row in rows] == [i < len(rows) - 1 for i in range(len(rows))]


def table(**columns):
    return parquet_of(pyarrow.table(columns))


def parquet_of(rows):
    from pyarrow import parquet

    content = pyarrow.BufferOutputStream()
    parquet.write_table(rows, content)
    return content.getvalue().to_pybytes()


def cut(content):
    return content[: len(content) // 2]


LONG = b'{"text": "x"}\n' * 999
COMPRESSIONS = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}
TWICE = pyarrow.table([["x"], ["y"]], names=["text", "text"])
NOT_UTF8 = pyarrow.StringArray.from_buffers(
    1, pyarrow.py_buffer(b"\0\0\0\0\2\0\0\0"), pyarrow.py_buffer(b"\xff\xfe")
)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": ', r"a\.jsonl, line 2: this is not JSON"),
        ("a.jsonl", b'{"text": "x"}\n\n[3]', r"a\.jsonl, line 3: expected an object with col"),
        ("a.jsonl", b'{"text": 3}', r"a\.jsonl, line 1: column 'text' holds 3, which is no text"),
        ("a.jsonl", b'{"text": {"a": 1}}', r"line 1: column 'text' holds {'a': 1}, which is no"),
        ("a.jsonl", b'{"text": "\\ud800"}', r"line 1: column 'text' holds half a character"),
        ("a.jsonl", b'{"text": "x"}\n{"txt": "x"}', r"line 2 has no column .* but txt: say which"),
        ("a.jsonl", b"[" * 100_000, r"line 1: JSON nested too deep|line 1: this is not JSON"),
        ("a.jsonl", b'{"messages": "hi"}{', r"line 1: this is not JSON"),
        ("a.jsonl", b'{"messages": ["hi"]}', r"line 1: expected messages with a role .* got 'hi'"),
        ("a.jsonl", b'{"messages": [{"role": 1}]}', r"line 1: expected messages with a role"),
        ("a.jsonl", b'{"messages": [{"role": "user", "content": "\\ud800"}]}', "template fails"),
        ("a.jsonl", b'{"prompt": "x"}', r"line 1 has no column 'completion', but prompt"),
        ("a.jsonl", b'{"prompt": "x", "completion": 3}', r"'completion' holds 3, which is no text"),
        ("a.jsonl", b'{"prompt": [], "completion": "x"}', r"'completion' holds 'x', which are no"),
        ("a.jsonl", b'\xff\xfe{"text"', r"a\.jsonl is not text in UTF-8: convert it"),
        ("a.jsonl", b'{"messages": "hi"}', r"column 'messages' holds 'hi', which are no messages"),
        ("a.json", b'{\n "text": "x"\n}', r"a\.json: expected a list .* got a first line of '{'"),
        ("a.csv", b'text,id\nx,1\n"y\nz"\n', r"a\.csv, line 4: 1 fields, where the first .* 2"),
        ("a.csv", b'text,id\nx,1,2\n', r"a\.csv, line 2: 3 fields, where the first line names 2"),
        ("a.csv", b'text\n"x', r"a\.csv, line 2: this is no row of a table: unexpected end"),
        ("a.csv", b"text,text\nx,y\n", r"a\.csv has the column 'text' twice"),
        ("a.csv", b"body\nx\n", r"a\.csv, line 2 has no column .* but body: say which"),
        ("a.csv", b"caf\xe9\n", r"a\.csv is not text in UTF-8: convert it"),
        ("a.json", b'[{"text": "x"}, 3]', r"a\.json, entry 2: expected an object"),
        ("a.json", b'[{"text": "x"}', r"a\.json: this is not JSON"),
        ("a.jsonl", b'{"text": "x", "text": "y"}', r"line 1: an object has the key 'text' twice"),
        ("a.json", b'[{"text": [{"a": 1, "a": 1}]}]', r"a\.json: an object has the key 'a' twice"),
        ("a.parquet", parquet_of(TWICE), r"a\.parquet has the column 'text' twice"),
        ("a.jsonl.gz", cut(gzip.compress(LONG)), r"cannot read .*a\.jsonl\.gz as \.gz"),
        ("a.jsonl.xz", cut(lzma.compress(LONG)), r"cannot read .*a\.jsonl\.xz as \.xz"),
        ("a.txt.bz2", cut(bz2.compress(LONG)), r"cannot read .*a\.txt\.bz2 as \.bz2"),
        ("a.txt.gz", b"hello", r"cannot read .*a\.txt\.gz: "),
        ("a.txt.xz", b"hello", r"cannot read .*a\.txt\.xz as \.xz: "),
        ("a.json.gz", gzip.compress(LONG)[:-9] + b"x" * 9, r"cannot read .*a\.json\.gz"),
        ("a.parquet", b"PAR1 not parquet PAR1", r"cannot read .*a\.parquet as parquet"),
        ("a.parquet", b"", r"cannot read .*a\.parquet as parquet"),
        ("a.parquet", table(t=pyarrow.array([2**62], pyarrow.duration("s"))), "as parquet"),
        ("a.parquet", table(t=pyarrow.array([2**61], pyarrow.timestamp("us"))), "as parquet"),
        ("a.parquet", table(text=NOT_UTF8), r"cannot read .*a\.parquet as parquet"),
        ("a.parquet", table(text=[b"bytes"]), "column 'text' holds b'bytes', which is no text"),
        ("a.jsonl", gzip.compress(b'{"text": "x"}'), r"a\.jsonl is not text .* ends: .*\.gz"),
        ("a.txt", "hello".encode("utf-16"), r"a\.txt is not text in UTF-8"),
        ("a.txt", b"\xff\xfe\x00", r"a\.txt is not text in UTF-8: convert it; .*\.jsonl, .*\.parq"),
    ],
    # gzip writes the second of the day, which two workers may not share, into its bytes.
    ids=lambda value: "bytes" if isinstance(value, bytes) else None,
)  # fmt: skip
def test_what_is_wrong_with_a_file_is_one_line_with_the_place(
    reader, tmp_path, name, content, message
):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(RunError, match=message) as raised:
        list(reader().documents(files.rows(str(tmp_path / name))))
    assert len(str(raised.value).splitlines()) == 1


# --- tokens ----------------------------------------------------------------------------------


def test_a_text_begins_and_ends_as_the_tokenizer_says(reader, tokenizer):
    begin, end = 0, 1
    plain = tokenizer("Find the cause", add_special_tokens=False)["input_ids"]
    assert one(reader(), text="Find the cause").ids == [begin, *plain, end]
    assert one(reader(end_of_text=False), text="Find the cause").ids == [begin, *plain]
    assert one(reader(special_tokens=False), text="Find the cause").ids == [*plain, end]


def test_special_tokens_spelt_in_a_text_are_text_unless_they_are_asked_for(reader):
    spelt = reader()
    ids = one(spelt, text="a </s> b </s>").ids
    assert ids.count(1) == 1
    assert spelt.tokenizer.decode(ids) == "<s>a </s> b </s></s>"
    assert spelt.counts.spelt == 2
    assert "2 special tokens spelt in the text" in " ".join(spelt.counts.remarks(16))
    parsed = reader(parse_special_tokens=True)
    assert one(parsed, text="a </s> b").ids.count(1) == 2
    assert parsed.counts.spelt == 0


def test_a_long_text_has_the_tokens_of_the_whole(reader, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "BLOCK", 256)
    (tmp_path / "a.txt").write_text(TEXT)
    found = list(reader().documents(files.rows(str(tmp_path / "a.txt"))))
    assert len(found) > 5
    ids = [token for document in found for token in document.ids]
    assert ids == [*tokenizer(TEXT)["input_ids"], 1]
    flags = [wanted for document in found for wanted in document.learnt]
    assert flags == [False] + [True] * (len(ids) - 1)


CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "one?"},
    {"role": "assistant", "content": "uno"},
    {"role": "user", "content": "two?"},
    {"role": "assistant", "content": "dos"},
]


@pytest.mark.parametrize("template", [CHATML, THINKING])
@pytest.mark.parametrize("column", ["", "messages"])
def test_of_a_conversation_the_completions_are_learnt(reader, template, column):
    last = "<think></think>dos</s>\n" if template == THINKING else "dos</s>\n"
    wanted = {"completions": f"uno</s>\n|{last}", "last": last}
    for which, text in wanted.items():
        found = reader(template, loss_on=which, text=column)
        document = one(found, messages=CHAT)
        # Header and prompts are not: what is learnt is what the model is to say, and its end.
        assert learnt(found, document) == text
        assert document.whole
    found = reader(template, loss_on="all", text=column)
    document = one(found, messages=CHAT)
    whole = found.tokenizer.apply_chat_template(CHAT, tokenize=False)
    assert found.tokenizer.decode(document.ids) == whole
    assert document.learnt == [False] + [True] * (len(document.ids) - 1)


def test_a_template_that_hides_where_a_turn_is_is_refused(reader):
    rewriting = "{% for m in messages %}{{ messages | length }}{{ m.content }}{% endfor %}"
    with pytest.raises(RunError, match="here: the chat template rewrites turn 3 once others"):
        one(reader(rewriting), messages=CHAT)
    with pytest.raises(RunError, match="here: the chat template fails: no"):
        one(reader("{{ raise_exception('no') }}"), messages=CHAT)
    with pytest.raises(RunError, match="the tokenizer has no chat template: name a file"):
        one(reader(None), messages=CHAT)


def test_of_a_prompt_with_its_completion_the_completion_is_learnt(reader):
    found = reader()
    assert learnt(found, one(found, prompt="Say one: ", completion="uno, un")) == "uno, un</s>"
    document = one(reader(loss_on="all"), prompt="Say one: ", completion="uno")
    assert learnt(found, document) == "Say one: uno</s>"
    chat = one(reader(), prompt=CHAT[:4], completion=CHAT[4:])
    assert learnt(found, chat) == "dos</s>\n"  # what was said in the prompt is given


def test_rows_that_teach_nothing_are_counted(reader):
    found = reader()
    rows = [{"text": ""}, {"text": None}, {"text": " \n"}, {"messages": []}, {"messages": CHAT[:2]},
            {"prompt": "x", "completion": ""}, {"text": "something"}]  # fmt: skip
    assert len(list(found.documents(files.Row(row, "here") for row in rows))) == 1
    assert (found.counts.documents, found.counts.empty, found.counts.untaught) == (1, 5, 1)
    said = "\n".join(found.counts.remarks(16))
    assert "5 rows without text left out" in said
    assert "1 rows with nothing to learn" in said


# --- sequences -------------------------------------------------------------------------------


def packed(some, length):
    counts = documents.Counts()
    return list(sequences.pack(some, length, 0, counts)), counts


@pytest.mark.parametrize("seed", range(20))
def test_packing_loses_nothing_and_keeps_conversations_whole(seed):
    draw = random.Random(seed)
    length, some, token = draw.randint(2, 12), [], 1
    for _ in range(draw.randint(1, 12)):
        size, whole = draw.randint(2, 20), draw.random() < 0.5
        ids = list(range(token, token + size))
        token += size
        some.append(documents.Document(ids, [False] + [True] * (size - 1), whole))
    rows, counts = packed(some, length)
    assert all(len(row[name]) == length for row in rows for name in row)
    kept = [id for each in some for id in (each.ids[:length] if each.whole else each.ids)]
    found = [id for row in rows for id in row["input_ids"] if id]
    # Of the last place nothing is left but, where it is alone in its sequence, one that none
    # predicts.
    assert found == [id for id in kept if id in set(found)]
    assert len(kept) - len(found) <= sum(1 for each in some if not each.whole)
    assert counts.truncated == sum(max(0, len(each.ids) - length) for each in some if each.whole)
    begins = {each.ids[0] for each in some}
    for row in rows:
        places = zip(row["input_ids"], row["learnt"], row["begins"], strict=True)
        for id, wanted, begin in places:
            assert begin == (id in begins or id == 0)
            assert wanted == (id not in begins and id != 0)
    for each in some:
        if each.whole:
            (row,) = [row for row in rows if each.ids[0] in row["input_ids"]]
            at = row["input_ids"].index(each.ids[0])
            part = each.ids[:length]
            assert row["input_ids"][at : at + len(part)] == part


def llama(seed=0):
    torch.manual_seed(seed)
    shape = transformers.LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=32,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(shape).eval()


def test_a_packed_document_is_to_the_model_as_it_is_alone():
    """Its logits, and so what the loss sees, and nothing is learnt across the border."""
    model, some = llama(), [list(range(3, 9)), list(range(20, 27)), list(range(40, 44))]
    texts = [documents.Document(ids, [False] + [True] * (len(ids) - 1), False) for ids in some]
    rows, _ = packed(texts, 24)
    batch = sequences.collate(rows, separate=True)
    labels = batch.pop("labels")
    with torch.no_grad():
        together = model(**batch, use_cache=False).logits[0]
        alone = torch.cat([model(input_ids=torch.tensor([ids])).logits[0] for ids in some])
    torch.testing.assert_close(together[: len(alone)], alone)
    assert (
        labels[0].tolist()
        == [id if i else -100 for ids in some for i, id in enumerate(ids)] + [-100] * 7
    )
    assert "position_ids" not in sequences.collate(rows, separate=False)


@pytest.mark.parametrize(
    ("name", "more", "ahead"),
    [
        ("GPT2", {}, False), ("Mamba", {}, False), ("Mixtral", {"num_local_experts": 2}, False),
        ("Bert", {"is_decoder": True}, False), ("Bert", {}, True), ("XLNet", {"d_head": 4}, True),
    ],
)  # fmt: skip
def test_whether_a_model_sees_what_follows_is_found_out(name, more, ahead):
    from fastkd.distill.models import sees_what_follows

    small = {
        "vocab_size": 40, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 1, "intermediate_size": 8, "d_inner": 8,
    }  # fmt: skip
    torch.manual_seed(0)
    shape = getattr(transformers, f"{name}Config")(**small, **more)
    model = transformers.AutoModelForCausalLM.from_config(shape)
    assert sees_what_follows(model) == ahead
    assert model.training
    assert all(weight.grad is None for weight in model.parameters())


def test_whether_a_model_keeps_documents_apart_is_found_out():
    from fastkd.distill.models import keeps_documents_apart

    torch.manual_seed(0)
    bloom = transformers.BloomForCausalLM(
        transformers.BloomConfig(vocab_size=64, hidden_size=16, n_layer=1, n_head=2)
    )
    gpt2 = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2, n_positions=32,
                                bos_token_id=0, eos_token_id=0)
    )  # fmt: skip
    assert keeps_documents_apart(llama())
    assert keeps_documents_apart(gpt2)
    assert not keeps_documents_apart(bloom)  # its positions are in the mask


# --- fuzzed files, large files ---------------------------------------------------------------


def seeds_of_files(folder):
    rows = [{"text": f"line {i} über {i}"} for i in range(4)]
    rows += [{"messages": CHAT}, {"prompt": "a", "completion": "b"}]
    from pyarrow import parquet

    lines = "\n".join(json.dumps(row) for row in rows).encode()
    yield "a.jsonl", lines
    yield from ((f"a.jsonl{end}", compress(lines)) for end, compress in COMPRESSIONS.items())
    yield "a.json", json.dumps(rows).encode()
    yield "a.txt", TEXT[:300].encode()
    parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "seed.parquet")
    yield "a.parquet", (folder / "seed.parquet").read_bytes()


def mutated(content, draw):
    content = bytearray(content)
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(len(content) + 1)
        what = draw.choice(["byte", "cut", "copy", "drop", "token"])
        if what == "byte" and at < len(content):
            content[at] = draw.randrange(256)
        elif what == "cut":
            del content[at:]
        elif what == "copy":
            content[at:at] = content[at : at + draw.randint(1, 40)]
        elif what == "drop":
            del content[at : at + draw.randint(1, 40)]
        elif what == "token":
            content[at:at] = draw.choice(
                [b"null", b"[]", b"{}", b'"\\ud83d"', b"\x00", b"\n", b"NaN", b"-1e999", b'"',
                 b'{"text": []}', b"\xef\xbb\xbf", b"\r", b"9" * 5000]
            )  # fmt: skip
    return bytes(content)


def test_fuzzed_files_give_rows_or_one_line(reader, tmp_path):
    """Whatever is in a file: no other exception, and every row is learnt from or counted."""
    read, refusals = 0, []
    for name, content in seeds_of_files(tmp_path):
        for seed in range(150):
            (tmp_path / name).write_bytes(mutated(content, random.Random(f"{name} {seed}")))
            found = reader()
            try:
                rows = list(files.rows(str(tmp_path / name)))
                made = list(found.documents(rows))
            except RunError as error:
                refusals.append((name, str(error)))
                continue
            read += 1
            counts = found.counts
            assert counts.documents + counts.empty + counts.untaught == len(rows)
            assert len(made) == counts.documents
    assert min(read, len(refusals)) > 100
    assert all(name in said and len(said.splitlines()) == 1 for name, said in refusals)


@pytest.mark.skipif(sys.platform != "linux", reason="asks the kernel for a process's own peak")
@pytest.mark.parametrize(
    ("size", "most"),
    [
        pytest.param(6, 80, marks=pytest.mark.slow),  # MiB, and was 1,000
        pytest.param(100, 200, marks=pytest.mark.full),
    ],
)
def test_a_large_text_takes_little_memory(tokenizer, tmp_path, size, most):
    """A copy in memory, or their tokens as Python's numbers, would be seen.

    The tokens on disk are mapped: what was read of them counts too, and can be dropped any time.
    The peak is asked of the kernel, since getrusage has that of the process which starts this one
    where it is larger.
    """
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "small.txt").write_text(TEXT)
    (tmp_path / "large.txt").write_text(TEXT * (size * 2**20 // len(TEXT)))
    code = """if True:
        import sys
        from pathlib import Path
        from transformers import AutoTokenizer
        import datasets, pyarrow
        from fastkd.distill import sequences, settings
        folder = Path(sys.argv[1])
        tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
        def peak():
            lines = Path("/proc/self/status").read_text().splitlines()
            return next(int(line.split()[1]) for line in lines if "VmHWM" in line) / 2**10
        def prepare(name):
            values = {"teacher": "t", "student": "s", "data": [str(folder / name)]}
            chosen = settings.build(settings.UserModels, values)
            tokens = folder / f"tokens of {name}"
            return sequences.prepare(chosen, tokenizer, tokens, lambda count: None)
        prepare("small.txt")
        before = peak()
        parts = prepare("large.txt")
        rows = sum(len(rows["input_ids"]) for rows in parts[0].iter(64))
        print(rows, peak() - before)
    """
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path], cwd=ROOT, capture_output=True, text=True,
        timeout=1500, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    rows, grown = map(float, done.stdout.split())
    assert rows > 400 * size
    assert grown < most
