"""Each row of the table of docs/integrations.md, run as it is, against that loss in fp64."""

import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import fastkd
from fastkd.integrations import torchtune
from tests.closeness import assert_close, assert_zero

ROOT = Path(__file__).parents[1]
ROWS, COLUMNS, K = (3, 5), 13, 4
T, T_S, T_T = 2.0, 1.5, 3.0


def table():
    """From the first cell of a row to its last, the code."""
    text = (ROOT / "docs" / "integrations.md").read_text().partition("## Others")[2]
    return dict(re.findall(r"^\| ([^|]+?) \| [^|]+ \| `(.+)` \|$", text, re.MULTILINE))


def operands():
    """What the rows call by name; the student's tensors are to be trained."""
    generator = torch.Generator().manual_seed(7)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    hidden, head = draw(*ROWS, 6), draw(COLUMNS, 6)
    teacher = 2 * draw(*ROWS, COLUMNS)
    log_probs, ids = teacher.log_softmax(-1).topk(K)
    labels = torch.randint(COLUMNS, ROWS, generator=generator)
    labels[0, :2] = -100
    return {
        "student": 2 * draw(*ROWS, COLUMNS), "hidden": hidden, "head": head, "teacher": teacher,
        "ids": ids, "log_probs": log_probs, "labels": labels, "mask": (labels != -100).double(),
        "decay": 0.9 ** torch.arange(5, dtype=torch.float64).expand(ROWS), "items": 23,
        "T": T, "T_s": T_S, "T_t": T_T, "r": 0.3, "w": 0.4, "a": 0.9, "b": 0.2, "beta": 0.3,
    }  # fmt: skip


# --- the formulas, on fp64 operands o --------------------------------------------------------


def logs(o, student=1.0, teacher=1.0, made=None):
    z = o["student"] if made is None else made
    return (z / student).log_softmax(-1), (o["teacher"] / teacher).log_softmax(-1)


def kl(first, second):
    return (first.exp() * (first - second)).sum(-1)


def jsd(o, lq, lp):
    lm = torch.logaddexp(lp + math.log(o["beta"]), lq + math.log(1 - o["beta"]))
    return o["beta"] * kl(lp, lm) + (1 - o["beta"]) * kl(lq, lm)


def ce(o, z):
    return F.cross_entropy(z.flatten(0, 1), o["labels"].flatten(), reduction="sum")


def soft(lq, lp):
    """The soft cross-entropy: KL plus the entropy of the teacher."""
    return -(lp.exp() * lq).sum(-1)


def listed(o, norm, temperature=1.0):
    """Log-probabilities of both on the K entries; normed there, or over all."""
    lq, lp = (
        (o["student"] / temperature).log_softmax(-1).gather(-1, o["ids"]),
        o["log_probs"] / temperature,
    )
    return (lq.log_softmax(-1), lp.log_softmax(-1)) if norm else (lq, lp)


def ghost(o):
    lq, lp = listed(o, norm=False)
    rest = [torch.log1p(-x.exp().sum(-1, keepdim=True)) for x in (lq, lp)]
    return kl(torch.cat([lp, rest[1]], -1), torch.cat([lq, rest[0]], -1))


def axolotl(o):
    lq, lp = listed(o, norm=True, temperature=T)
    kd = T**2 * (o["mask"] * kl(lp, lq)).sum()
    return (o["a"] * kd + o["b"] * ce(o, o["student"])) / o["items"]


def mixed(o, forward):
    lq, lp = listed(o, norm=True)
    rows = forward * kl(lp, lq) + (1 - forward) * kl(lq, lp)
    return (o["mask"] * rows).sum() / o["items"]


def automodel(o, ratio):
    lq, lp = logs(o, T, T)
    kd = T**2 * (o["mask"] * kl(lp, lq)).sum() / o["items"]
    return ratio * kd + (1 - ratio) * ce(o, o["student"]) / o["items"]


def decayed(o, rows):
    return (o["mask"] * o["decay"] * rows).sum() / o["mask"].sum()


def symmetric(o):
    lq, lp = logs(o)
    rows = o["r"] * soft(lq, lp) + (1 - o["r"]) * kl(lq, lp)
    return (o["mask"] * rows).sum() / o["mask"].sum()


def unsloth(o):
    lq, lp = logs(o, T, T, made=o["hidden"] @ o["head"].t())
    return (o["mask"] * jsd(o, lq, lp)).sum() / o["items"]


def mean_entropy(o, divisor):
    _, lp = logs(o)
    return (o["mask"] * soft(lp, lp)).sum() / divisor


# Their loss, and what of it is no part of fastkd's: a constant of the student.
THEIRS = {
    "torchtune 0.6 `ForwardKLLoss`": (
        lambda o: (o["mask"] * soft(*logs(o))).sum() / o["mask"].sum(),
        lambda o: mean_entropy(o, o["mask"].sum()),
    ),
    "torchtune 0.6 `SymmetricKLLoss`": (
        symmetric, lambda o: o["r"] * mean_entropy(o, o["mask"].sum())
    ),
    "sentence-transformers 6.2 `DistillKLDivLoss`": (
        lambda o: T_S**2 * kl(*logs(o, T_S, T_T)[::-1]).sum() / ROWS[0], None
    ),
    "torchtitan 0.3 `BaseLoss`": (
        lambda o: (o["mask"] * kl(*logs(o)[::-1])).sum() / o["items"], None
    ),
    "Automodel 0.7 `KDLoss`": (lambda o: automodel(o, 1), None),
    "Automodel 0.7 recipe": (lambda o: automodel(o, o["r"]), None),
    "ModelOpt 0.47 `LogitsKLLoss`": (lambda o: kl(*logs(o, T, T)[::-1]), None),
    "ModelOpt 0.47 `LogitsKLLoss(reverse=True)`": (lambda o: kl(*logs(o, T, T)), None),
    "Megatron-core 0.19 `topk_kl_div` with a ghost token": (ghost, None),
    "NeMo-RL `DistillationLossFn`, forward": (lambda o: mixed(o, 1), None),
    "NeMo-RL `DistillationLossFn`, mixed": (lambda o: mixed(o, o["w"]), None),
    "verl 0.9 `compute_topk_loss`": (lambda o: kl(*listed(o, norm=False)[::-1]), None),
    "axolotl 0.21, `normalize_topk`": (axolotl, None),
    "ms-swift 4.6 `gkd_loss`": (lambda o: (o["mask"] * jsd(o, *logs(o, T, T))).sum(), None),
    "speculators 0.9 `loss_function`, kl": (lambda o: decayed(o, kl(*logs(o)[::-1])), None),
    "speculators 0.9 `loss_function`, tv": (
        lambda o: decayed(o, 0.5 * (logs(o)[0].exp() - logs(o)[1].exp()).abs().sum(-1)), None
    ),
    "SpecForge 0.2 `LogSoftmaxLoss`": (
        lambda o: (o["mask"] * soft(*logs(o))).sum() / o["mask"].numel(),
        lambda o: mean_entropy(o, o["mask"].numel()),
    ),
    "unsloth-zoo `fused_linear_jsd`": (unsloth, None),
}  # fmt: skip


def run(function, dtype):
    """Value and gradients to the student's tensors, at one upstream gradient."""
    o = {
        name: x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        for name, x in operands().items()
    }
    leaves = [o[name].requires_grad_() for name in ("student", "hidden", "head")]
    loss = function(o)
    upstream = torch.linspace(0.5, 2, loss.numel()).view(loss.shape).to(loss)
    loss.backward(upstream)
    return loss.detach(), [leaf.grad for leaf in leaves if leaf.grad is not None]


@pytest.mark.parametrize("row", THEIRS)
def test_the_call_of_the_table(row):
    names = {name: getattr(fastkd, name) for name in fastkd.__all__}
    code = compile(table()[row], row, "eval")
    theirs, constant = THEIRS[row]
    value, gradients = run(theirs, torch.float64)
    if constant is not None:
        value = value - constant(operands())
    found, ours = run(lambda o: eval(code, {**names, **o}), torch.float32)
    assert_close(found, value)
    for got, wanted in zip(ours, gradients, strict=True):
        assert_close(got, wanted, "gradient")


def test_every_row_has_its_formula():
    assert table().keys() == THEIRS.keys()


# --- torchtune's classes ---------------------------------------------------------------------

KINDS = {
    "ForwardKL": lambda lq, lp: kl(lp, lq),
    "ReverseKL": kl,
    "SymmetricKL": lambda lq, lp: 0.5 * (kl(lp, lq) + kl(lq, lp)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_torchtune(kind):
    o = operands()
    rows = o["mask"] * KINDS[kind](*logs(o))
    student, teacher = o["student"].float(), o["teacher"].float()
    loss = getattr(torchtune, f"{kind}Loss")()
    flat = student.flatten(0, 1), teacher.flatten(0, 1), o["labels"].flatten()
    assert_close(loss(*flat), rows.sum() / o["mask"].sum())
    assert_close(loss(*flat, normalize=False), rows.sum())
    chunked = getattr(torchtune, f"{kind}WithChunkedOutputLoss")(num_output_chunks=3)
    parts = student.chunk(3, dim=1), teacher.chunk(3, dim=1), o["labels"]
    assert_close(chunked(*parts), rows.sum() / o["mask"].sum())
    parts[0][0].requires_grad_()
    nothing = chunked(*parts[:2], torch.full_like(o["labels"], -100))
    nothing.backward()
    assert_zero(nothing)


def test_torchtune_has_the_same_names_arguments_and_gradients():
    theirs = pytest.importorskip("torchtune.modules.loss", exc_type=ImportError)
    o = operands()
    for kind in KINDS:
        for name in (f"{kind}Loss", f"{kind}WithChunkedOutputLoss"):
            found = []
            for module in (theirs, torchtune):
                student = o["student"].float().requires_grad_()
                loss = getattr(module, name)()
                if "Chunked" in name:
                    loss = getattr(module, name)(num_output_chunks=5)
                    loss(
                        student.chunk(5, 1), o["teacher"].float().chunk(5, 1), o["labels"]
                    ).backward()
                else:
                    flat = student.flatten(0, 1), o["teacher"].float().flatten(0, 1)
                    loss(*flat, o["labels"].flatten()).backward()
                found.append(student.grad)
            assert_close(found[1], found[0].double(), "gradient")


# --- what is not installed -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("package", "code"),
    [
        ("transformers", "import fastkd.integrations.transformers"),
        ("trl", "import fastkd.integrations.trl as t; t.patch()"),
    ],
)
def test_without_a_package_one_line_says_what_to_install(package, code):
    hidden = f"""if True:
        import sys, importlib.metadata as metadata
        real = metadata.version
        def version(name):
            if name == {package!r}:
                raise metadata.PackageNotFoundError(name)
            return real(name)
        metadata.version = version
        sys.modules[{package!r}] = None
        import fastkd
        {code}
    """
    done = subprocess.run([sys.executable, "-c", hidden], cwd=ROOT, capture_output=True, text=True)
    last = done.stderr.strip().splitlines()[-1]
    assert f'needs {package}, which is not installed: pip install "fastkd[' in last
