"""Search over temperature, alpha and divergence with Optuna, on the digits job, over all seeds.

Every trial trains one student per seed on 100 labelled images; its value is the mean accuracy on
100 other labelled images. What the search found is then compared with T = 4, alpha = 0.9, forward
KL on the test images, which no trial has seen, as paired differences with their standard errors.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

import fastkd
from fastkd import checks

from . import SAMPLERS
from .digits import Digits, cross_entropy, kd, one_thread
from .report import Report, Table, bars, need

DIVERGENCES: dict[str, Any] = {
    "forward_kl": "forward_kl",
    "reverse_kl": "reverse_kl",
    "jeffreys": "jeffreys",
    "jsd": fastkd.JSD(0.5),
    "skew_kl": fastkd.SkewKL(0.1),
}
GRID = {
    "temperature": [1.0, 2.0, 4.0, 8.0, 16.0],
    "alpha": [0.5, 0.9],
    "divergence": ["forward_kl", "reverse_kl", "jsd"],
}
CE, FIXED = "hard labels", "T=4, alpha=0.9, forward_kl"


def tune(
    out: Path, sampler: str = "tpe", trials: int = 30, seed: int = 0, quick: bool = False
) -> Report:
    """Search, compare on the test images; study.db, results.json and plot.png go into `out`.

    Args:
        out: a folder. Trials of an earlier call with this sampler are kept, and added to.
        sampler: "grid", over GRID; "random"; or "tpe", Optuna's default.
        trials: how many to add. A grid ends when it is complete.
        seed: of the sampler.
        quick: two seeds and few steps.
    """
    checks.choice("sampler", sampler, SAMPLERS)
    optuna = need("optuna", "optuna")
    need("matplotlib", "matplotlib")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    samplers = {
        "grid": lambda: optuna.samplers.GridSampler(GRID, seed=seed),
        "random": lambda: optuna.samplers.RandomSampler(seed=seed),
        "tpe": lambda: optuna.samplers.TPESampler(seed=seed),
    }
    out.mkdir(parents=True, exist_ok=True)
    study = optuna.create_study(
        direction="maximize", sampler=samplers[sampler](), study_name=sampler,
        storage=f"sqlite:///{(out / 'study.db').resolve()}", load_if_exists=True,
    )  # fmt: skip
    with one_thread():
        digits = Digits(quick)
        validation = digits.x[:, 100:200], digits.y[:, 100:200]

        def objective(trial: Any) -> float:
            networks = digits.students(kd(**settings(suggest(trial, sampler))))
            scores = digits.accuracy(networks, *validation)[0]
            trial.set_user_attr("test", digits.accuracy(networks)[0].tolist())
            return scores.mean().item()

        study.optimize(objective, n_trials=trials)
        best = study.best_trial
        found = "found: " + ", ".join(
            f"{name}={value if isinstance(value, str) else format(value, '.3g')}"
            for name, value in best.params.items()
        )
        scores = {
            FIXED: digits.score(kd(temperature=4.0, alpha=0.9)),
            CE: digits.score(cross_entropy()),
            found: torch.tensor(best.user_attrs["test"], dtype=torch.float64),
        }
    table = Table("On the test images", scores, FIXED)
    mean, error = table.difference(found)
    verdict = "is" if mean > 2 * error else "is not"
    report = Report(
        f"Tune: {len(study.trials)} trials by {sampler}, {digits.seeds} seeds each",
        [table],
        notes={"best": best.params, "validation": best.value},
        text=f"What was found {verdict} better than {FIXED} by over two standard errors.",
        draw=lambda figure: draw(figure, study, table),
    )
    report.save(out, sampler=sampler, quick=quick)
    return report


def suggest(trial: Any, sampler: str) -> dict[str, Any]:
    if sampler == "grid":
        return {name: trial.suggest_categorical(name, values) for name, values in GRID.items()}
    return {
        "temperature": trial.suggest_float("temperature", 0.5, 32.0, log=True),
        "alpha": trial.suggest_float("alpha", 0.3, 1.0),
        "divergence": trial.suggest_categorical("divergence", list(DIVERGENCES)),
    }


def settings(parameters: dict[str, Any]) -> dict[str, Any]:
    return {**parameters, "divergence": DIVERGENCES[parameters["divergence"]]}


def draw(figure: Any, study: Any, table: Table) -> None:
    figure.set_size_inches(11, 4)
    left, right = figure.subplots(1, 2)
    for name in DIVERGENCES:
        trials = [t for t in study.trials if t.value and t.params["divergence"] == name]
        if trials:
            left.scatter(
                [t.params["temperature"] for t in trials], [t.value for t in trials],
                s=[60 * t.params["alpha"] for t in trials], label=name, alpha=0.7,
            )  # fmt: skip
    left.set_xscale("log", base=2)
    left.set(xlabel="T (size: alpha)", ylabel="validation accuracy", title="Trials")
    left.legend()
    bars(right, table)
