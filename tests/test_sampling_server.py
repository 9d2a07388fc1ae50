"""What a server writes in the student's place: a stub, and vLLM where it is installed."""

import copy
import importlib.util
import json
import os
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.request import Request, urlopen

import pytest
import torch

from fastkd import TopK
from fastkd.integrations.on_policy import OnPolicy
from fastkd.integrations.served import Server, ServerError
from fastkd.integrations.transformers import DistillationTrainer
from tests.test_distill_user_models import (
    TEXT,
    distil,
    losses,
    model,
    options,
    tokenizer,
    transformers,
)
from tests.test_distill_user_models import _one_thread as _one_thread
from tests.test_distill_user_models import home as home

END = 7
# A Python that has vLLM, which asks for versions of its own: this one, or that of another
# environment.
VLLM = os.environ.get("FASTKD_VLLM") or (importlib.util.find_spec("vllm") and sys.executable)


def choice(ids, reason="length"):
    return {"token_ids": ids, "finish_reason": reason}


@pytest.fixture
def stub(monkeypatch):
    """Answers with `stub.write(request)`, a choice for each prompt; keeps what it was asked."""
    monkeypatch.setenv("no_proxy", "*")

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self._answer({"data": [{"id": "the-student"}]})

        def do_POST(self):
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            server.asked.append((self.path, request))
            choices = [{**each, "index": i} for i, each in enumerate(server.write(request))]
            self._answer({"choices": choices[::-1]})

        def _answer(self, values):
            self.send_response(server.status)
            self.end_headers()
            self.wfile.write(json.dumps(values).encode())

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.asked, server.status = [], 200
    server.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="module")
def student():
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=32, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
            num_attention_heads=2,
        )
    )  # fmt: skip


def batch(*rows):
    ids = torch.tensor(rows)
    return {"input_ids": ids, "labels": ids.clone()}


def test_what_it_writes_is_learnt_to_its_end(stub, student):
    """An end that is not sent is added where the row stopped, and not where it was cut."""
    stub.write = lambda request: [
        choice([1, 2, END], "stop"), choice([3], "stop"), choice([4, 5], "length"),
        choice([END, 6, 6, 6], "length"),
    ]  # fmt: skip
    policy = OnPolicy(
        1.0, 0.7, 0.9, new_tokens=4, prompt_tokens=3, end=(END,), server=stub.url + "/"
    )
    rows = torch.arange(10, 26).tolist()
    with policy.random(0, 0, 0):
        found = policy.written(student, batch(rows, rows[::-1], rows, rows))
    new = found["labels"][:, 3:].tolist()
    assert new == [
        [1, 2, END, -100], [3, END, -100, -100], [4, 5, -100, -100], [END, -100, -100, -100]
    ]  # fmt: skip
    assert (found["labels"][:, :3] == -100).all()
    assert torch.equal(found["attention_mask"][:, 3:] == 1, found["labels"][:, 3:] != -100)
    assert found["input_ids"][1].tolist()[:5] == [*rows[::-1][:3], 3, END]
    ((path, asked),) = stub.asked
    assert path == "/v1/completions"
    assert asked.pop("seed") >= 0
    assert asked == {
        "model": "the-student", "prompt": [rows[:3], rows[::-1][:3], rows[:3], rows[:3]],
        "max_tokens": 4, "temperature": 0.7, "top_p": 0.9, "return_token_ids": True,
    }  # fmt: skip


def test_without_an_end_rows_end_where_they_do(stub, student, monkeypatch):
    stub.write = lambda request: [choice([1]), choice([2, 3])]
    policy = OnPolicy(1.0, new_tokens=2, prompt_tokens=2, server=stub.url)
    monkeypatch.setattr(student.generation_config, "eos_token_id", None)
    found = policy.written(student, batch([5] * 8, [6] * 8))
    assert found["labels"][:, 2:].tolist() == [[1, -100], [2, 3]]


def test_a_completion_ends_before_a_column_that_is_padding(stub, student):
    stub.write = lambda request: [choice([1, 30, 2]), choice([3, 4, 29])]
    policy = OnPolicy(1.0, new_tokens=3, prompt_tokens=2, end=(END,), server=stub.url)
    found = policy.written(student, batch([5] * 8, [6] * 8), vocab_size=30)
    assert found["labels"][:, 2:].tolist() == [[1, -100, -100], [3, 4, 29]]


def test_a_step_in_which_nothing_is_written_changes_nothing(stub, student, tmp_path):
    stub.write = lambda request: [choice([], "length")] * len(request["prompt"])
    before = {name: weight.clone() for name, weight in student.state_dict().items()}
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=2, logging_steps=1, use_cpu=True, report_to="none",
        save_strategy="no", disable_tqdm=True, weight_decay=0.0,
    )  # fmt: skip
    trainer = DistillationTrainer(
        model=student, teacher=copy.deepcopy(student), args=arguments,
        on_policy=OnPolicy(1.0, new_tokens=2, prompt_tokens=2, server=stub.url),
        train_dataset=[{name: row[0] for name, row in batch([5] * 8).items()}] * 4,
    )  # fmt: skip
    trainer.train()
    first, second, _ = trainer.state.log_history
    for row in (first, second):
        assert [row[name] for name in ("loss", "kd", "ce", "agreement", "grad_norm")] == [0.0] * 5
    for name, weight in student.state_dict().items():
        assert torch.equal(weight, before[name])


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ([{"text": "no tokens", "finish_reason": "stop"}], "answers without token_ids"),
        ([{"token_ids": None, "finish_reason": "stop"}], "answers without token_ids"),
        ([choice([1]), choice([2])], "answers 2 of 1 prompts"),
        ([choice([32])], "writes tokens beyond the 32 of the student"),
        ([choice([-1])], "writes tokens beyond the 32 of the student"),
    ],
)
def test_an_answer_that_does_not_fit_is_an_error(stub, student, choices, message):
    stub.write = lambda request: choices
    policy = OnPolicy(1.0, new_tokens=2, prompt_tokens=2, server=stub.url)
    with pytest.raises(ServerError, match=message):
        policy.written(student, batch([5] * 8))


def test_a_server_that_is_not_there_or_fails(stub):
    stub.status = 503
    with pytest.raises(ServerError, match=r"/v1/models: .*503"):
        Server(stub.url).model()
    with pytest.raises(ServerError, match=r"/v1/models: "):
        Server("http://127.0.0.1:9").model()


def test_a_run_learns_from_what_a_server_writes(stub, home, tmp_path, capsys):
    """The same requests in a second run; a server that fails later ends it with one line."""
    stub.write = lambda request: [
        choice([sum(ids) % 390 for _ in range(4)]) for ids in request["prompt"]
    ]
    chosen = options(
        home, on_policy=1, completion_length=4, prompt_length=4, steps=3, sampling_server=stub.url
    )
    first, second = tmp_path / "first", tmp_path / "second"
    assert distil("--out", first, *chosen) == 0
    asked = [request for _, request in stub.asked]
    assert len(asked) == 3
    assert all([len(ids) for ids in request["prompt"]] == [4] * 4 for request in asked)
    assert len({request["seed"] for request in asked}) == 3
    assert distil("--out", second, *chosen) == 0
    assert [request for _, request in stub.asked[3:]] == asked
    assert losses(first) == losses(second)

    stub.write = lambda request: []
    assert distil("--out", tmp_path / "third", *chosen) == 1
    assert "answers 0 of 4 prompts" in capsys.readouterr().err.splitlines()[-1]
    stub.status = 500
    assert distil("--out", tmp_path / "fourth", *chosen) == 2
    assert "sampling_server: " in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "fourth").exists()


# --- vLLM ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A model of which vLLM has the weights, and its address; heads are as wide as vLLM asks."""
    folder = tmp_path_factory.mktemp("served")
    model(folder / "student", tokenizer(TEXT), width=64, vocabulary=416, seed=1)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        VLLM, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder / "student"),
        "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--enforce-eager",
        "--max-model-len", "64",
    ]  # fmt: skip
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1",
    }  # fmt: skip
    environment.pop("PYTHONPATH", None)
    url = f"http://127.0.0.1:{port}"
    with open(folder / "log", "w") as log:
        server = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT
        )
    try:
        until = time.monotonic() + 900
        while not _listens(url):
            assert server.poll() is None, (folder / "log").read_text()[-3000:]
            assert time.monotonic() < until, (folder / "log").read_text()[-3000:]
            time.sleep(1)
        yield folder, url
    finally:
        server.terminate()
        server.wait(60)


def _listens(url):
    try:
        return bool(Server(url, patience=5).model())
    except ServerError:
        return False


@pytest.mark.slow
@pytest.mark.skipif(not VLLM, reason="needs vllm, or FASTKD_VLLM: a Python that has it")
def test_vllm_writes_and_scores_what_the_model_does(served, home, tmp_path):
    """Its best tokens are those of generate, its log-probabilities the model's; a run learns."""
    folder, url = served
    here = transformers.AutoModelForCausalLM.from_pretrained(folder / "student")
    prompts = torch.arange(40, 56).view(2, 8)
    with torch.no_grad():
        wanted = here.generate(
            prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=6, do_sample=False
        )[:, 8:]
        truth = here(prompts[:1]).logits[0].log_softmax(-1)
    written = Server(url).complete(prompts.tolist(), [0], max_tokens=6, temperature=0, seed=0)
    assert written == [row[: [*row, 0].index(0) + 1] for row in wanted.tolist()]
    asked = {
        "model": Server(url).model(), "prompt": prompts[:1].tolist(), "max_tokens": 1,
        "prompt_logprobs": 5,
    }  # fmt: skip
    request = Request(
        url + "/v1/completions", json.dumps(asked).encode(), {"Content-Type": "application/json"}
    )
    with urlopen(request, timeout=60) as answer:
        (choice,) = json.load(answer)["choices"]
    teacher = TopK.from_server(choice["prompt_logprobs"])
    assert (teacher.indices[1:] >= 0).sum(-1).min() >= 5
    listed = teacher.indices[1:] >= 0
    true = truth[:-1].gather(-1, teacher.indices[1:].clamp(min=0))
    torch.testing.assert_close(teacher.log_probs[1:][listed], true[listed], rtol=1e-4, atol=1e-4)

    out = tmp_path / "out"
    chosen = options(
        home, student=folder / "student", on_policy=1, completion_length=4, prompt_length=4,
        steps=2, log_every=1, sampling_server=url,
    )  # fmt: skip
    assert distil("--out", out, *chosen) == 0
    assert len(losses(out)) == 2
    assert all(0 < each < 100 for each in losses(out))
