"""Table 1: golden values, limits, bounds, and its two spellings against each other."""

from __future__ import annotations

import math

import pytest
import torch

import fastkd
from fastkd.divergences import Divergence
from tests.cases import BOUNDED, DIVERGENCES, logits
from tests.closeness import assert_close
from tests.running import FUSED, run

LN2, LN3 = math.log(2), math.log(3)
# Student, teacher: p = (1/3, 2/3), q = (2/3, 1/3).
SWAPPED = (
    torch.tensor([[LN2, 0.0]], dtype=torch.float64),
    torch.tensor([[0.0, LN2]], dtype=torch.float64),
)
GOLDEN = [
    (fastkd.ForwardKL(), LN2 / 3, 1 / 3),
    (fastkd.ReverseKL(), LN2 / 3, 4 * LN2 / 9),
    (fastkd.Jeffreys(), 2 * LN2 / 3, 1 / 3 + 4 * LN2 / 9),
    (fastkd.JSD(0.5), 5 / 3 * LN2 - LN3, LN2 / 9),
    (fastkd.TVD(), 1 / 3, 2 / 9),
    (fastkd.AlphaDivergence(0.5), 4 * (1 - 2 * math.sqrt(2) / 3), 2 * math.sqrt(2) / 9),
    (fastkd.Renyi(0.5), -2 * math.log(2 * math.sqrt(2) / 3), 1 / 6),
    (fastkd.Renyi(2.0), math.log(3 / 2), 5 / 9),
    (fastkd.SkewKL(0.1), 0.1846067051, None),
    (fastkd.SkewReverseKL(0.1), 0.1846067051, None),
]
# p = (1/2, 1/2), q = (1/4, 3/4).
UNEVEN = torch.tensor([[0.0, LN3]], dtype=torch.float64), torch.zeros(1, 2, dtype=torch.float64)
GOLDEN_UNEVEN = [
    (fastkd.ForwardKL(), 0.5 * math.log(4 / 3)),
    (fastkd.ReverseKL(), 0.75 * LN3 - LN2),
    (fastkd.AlphaDivergence(2.0), 1 / 6),
    (fastkd.Renyi(2.0), 2 * math.log(2 / math.sqrt(3))),
    (fastkd.TVD(), 1 / 4),
    (fastkd.JSD(0.5), 0.0338220756),
]
BACKENDS = ["reference", "torch"]


def _value(student, teacher, divergence, backend="reference", **settings):
    return fastkd.distillation_loss(
        student, teacher, divergence=divergence, backend=backend, **settings
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("divergence", "value", "slope"), GOLDEN, ids=str)
def test_golden_swapped(divergence, value, slope, backend):
    loss, gradient = run(*SWAPPED, divergence=divergence, backend=backend)
    assert loss.item() == pytest.approx(value, rel=1e-9)
    if slope is not None:
        assert gradient.tolist() == [pytest.approx([slope, -slope], rel=1e-9)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("divergence", "value"), GOLDEN_UNEVEN, ids=str)
def test_golden_uneven(divergence, value, backend):
    assert _value(*UNEVEN, divergence, backend).item() == pytest.approx(value, rel=1e-8)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("temperature", "value", "slope"),
    [
        (1.0, 1.1504207652, 0.5752103826),
        (2.0, 0.3201566678, 0.6403133357),
        (4.0, 0.0824768695, 0.6598149561),
    ],
)
def test_golden_temperature(temperature, value, slope, backend):
    z, y = (torch.tensor([row], dtype=torch.float64) for row in ([2.0, 1, 0], [0.0, 1, 2]))
    loss, gradient = run(z, y, temperature=temperature, backend=backend)
    assert loss.item() == pytest.approx(value * temperature**2, rel=1e-8)
    assert gradient[0].tolist() == pytest.approx([slope, 0, -slope], rel=1e-8, abs=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_golden_masked_teacher(backend):
    z = torch.tensor([[0.0, 1.0, 2.0]], dtype=torch.float64)
    y = torch.tensor([[-math.inf, 1.0, 1.0]], dtype=torch.float64)
    loss, gradient = run(z, y, backend=backend)
    assert loss.item() == pytest.approx(0.2144587839, rel=1e-8)
    expected = [0.0900305732, -0.2552715289, 0.1652409558]
    assert gradient[0].tolist() == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize("backend", BACKENDS)
def test_golden_hard_labels_of_an_article(backend):
    """T = [.8, .2], student [.9, .1], label [.1, .9] as probabilities."""
    q, p = (torch.tensor([row], dtype=torch.float64).log() for row in ([0.9, 0.1], [0.8, 0.2]))
    assert _value(q, p, "forward_kl", backend).item() == pytest.approx(0.0444030076, rel=1e-8)


@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_golden_disjoint_supports(beta):
    z, y = torch.tensor([[0.0, -math.inf]]).double(), torch.tensor([[-math.inf, 0.0]]).double()
    entropy = -beta * math.log(beta) - (1 - beta) * math.log(1 - beta)
    for backend in BACKENDS:
        value = _value(z, y, fastkd.JSD(beta), backend)
        assert value.item() == pytest.approx(entropy, rel=1e-8)
        assert _value(z, y, "tvd", backend).item() == 1
        skew = _value(z, y, fastkd.SkewKL(beta), backend)
        assert skew.item() == pytest.approx(-math.log(beta), rel=1e-8)


@pytest.mark.parametrize("divergence", BOUNDED, ids=str)
def test_bounded_by_what_theory_says(divergence):
    student, teacher = logits(64, 11, noise=9)
    bound = 1.0 if divergence.name == "tvd" else LN2
    if hasattr(divergence, "alpha"):
        bound = -math.log(divergence.alpha)
    assert _value(student, teacher, divergence, "torch", reduction="none").max() <= bound


@pytest.mark.parametrize(
    ("near", "limit"),
    [
        (fastkd.SkewKL(0.0), fastkd.ForwardKL()),
        (fastkd.SkewReverseKL(0.0), fastkd.ReverseKL()),
        (fastkd.Jeffreys(1, 0), fastkd.ForwardKL()),
        (fastkd.Jeffreys(0, 1), fastkd.ReverseKL()),
    ],
    ids=str,
)
def test_equal_at_the_end_of_the_range(near, limit):
    student, teacher = logits(5, 9)
    for backend in BACKENDS:
        ours, others = (run(student, teacher, divergence=d, backend=backend) for d in (near, limit))
        assert_close(ours[0], others[0])
        assert_close(ours[1], others[1], "gradient")


@pytest.mark.parametrize(
    ("near", "limit", "factor"),
    [
        (fastkd.AlphaDivergence(1 - 1e-5), fastkd.ForwardKL(), 1),
        (fastkd.AlphaDivergence(1e-5), fastkd.ReverseKL(), 1),
        (fastkd.Renyi(1 - 1e-5), fastkd.ForwardKL(), 1),
        (fastkd.JSD(1e-5), fastkd.ForwardKL(), 1e-5),
        (fastkd.JSD(1 - 1e-5), fastkd.ReverseKL(), 1e-5),
    ],
    ids=str,
)
def test_limits(near, limit, factor):
    student, teacher = logits(5, 9)
    for backend in BACKENDS:
        ours = _value(student, teacher, near, backend).item()
        assert ours == pytest.approx(factor * _value(student, teacher, limit).item(), rel=1e-3)


def test_jsd_exchanges_roles_with_beta():
    student, teacher = logits(5, 9)
    one = _value(student, teacher, fastkd.JSD(0.3), "torch")
    assert_close(one, _value(teacher, student, fastkd.JSD(0.7)))


def test_pinsker():
    student, teacher = logits(50, 9)
    tvd = _value(student, teacher, "tvd", reduction="none")
    assert (tvd**2 <= _value(student, teacher, "forward_kl", reduction="none") / 2).all()


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
def test_coarse_graining_only_lowers_it(divergence):
    student, teacher = (x.log_softmax(-1) for x in logits(20, 8))
    coarse = [
        torch.cat([x[:, :3], x[:, 3:].logsumexp(-1, keepdim=True)], -1) for x in (student, teacher)
    ]
    fine = _value(student, teacher, divergence, reduction="none")
    assert (_value(*coarse, divergence, reduction="none") <= fine + 1e-12).all()


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
def test_dual_is_the_divergence_with_roles_exchanged(divergence):
    student, teacher = logits(5, 9)
    lq, lp = student.log_softmax(-1), teacher.log_softmax(-1)
    name, (a, b), factor = divergence.dual()
    dual = Divergence.of_name(name)
    value = factor * dual.outer(dual.value(lq, lp, a, b).sum(-1), a, b)
    assert_close(value, _value(student, teacher, divergence, reduction="none"))


def test_dual_of_a_divergence_without_one_is_made():
    class Lopsided(fastkd.Divergence):
        name = "lopsided"

        @staticmethod
        def value(lp, lq, a, b):
            return lp.exp() * (lp - lq) ** 2

    student, teacher = logits(3, 4)
    for leaf in (student, teacher):
        leaf.requires_grad_()
    gradients = [
        torch.autograd.grad(
            _value(student, teacher, Lopsided(), backend, teacher_grad=True), (student, teacher)
        )
        for backend in BACKENDS
    ]
    for ours, others in zip(*gradients, strict=True):
        assert_close(ours, others, "gradient")


@pytest.mark.parametrize(
    "kind", dict.fromkeys(map(type, DIVERGENCES)), ids=lambda kind: kind.__name__
)
def test_every_class_is_public_and_documented(kind):
    assert kind.__name__ in fastkd.__all__
    for part in ("Source:", "Example:"):
        assert part in kind.__doc__


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: fastkd.JSD(0.0), "forward_kl"),
        (lambda: fastkd.JSD(1.0), "reverse_kl"),
        (lambda: fastkd.JSD(math.nan), "beta"),
        (lambda: fastkd.SkewKL(1.0), r"\[0, 1\)"),
        (lambda: fastkd.SkewReverseKL(-0.1), r"\[0, 1\)"),
        (lambda: fastkd.AlphaDivergence(1), "limit at 1"),
        (lambda: fastkd.AlphaDivergence(math.inf), "finite"),
        (lambda: fastkd.Renyi(0), "positive"),
        (lambda: fastkd.Renyi(1), "limit at 1"),
        (lambda: fastkd.Jeffreys(-1, 0), "weight >= 0"),
        (lambda: fastkd.Jeffreys(0, 0), "both 0"),
    ],
)
def test_parameters_out_of_range_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_divergence_needs_a_name():
    with pytest.raises(TypeError, match="name"):

        class Nameless(fastkd.Divergence):
            pass


@pytest.mark.parametrize("backend", ["reference", *FUSED])
@pytest.mark.parametrize(("forward", "reverse"), [(0.0, 1.0), (1.0, 0.0)])
def test_a_term_of_weight_0_is_left_out_were_it_infinite(forward, reverse, backend):
    student, teacher = (x.float() for x in logits(3, 6))
    (student if reverse else teacher)[0, 1] = -math.inf
    name = "reverse_kl" if reverse else "forward_kl"
    found = [
        run(student, teacher, divergence=divergence, backend=backend)
        for divergence in (fastkd.Jeffreys(forward, reverse), name)
    ]
    assert_close(found[0][0], found[1][0].double())
    assert_close(found[0][1], found[1][1].double(), "gradient")
