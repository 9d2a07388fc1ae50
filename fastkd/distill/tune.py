"""Search over temperature, alpha and divergence with Optuna: the default job, or the user's models.

Each trial trains a student per seed; its value is the mean of their losses on held-out text. The
best is then trained again on seeds that the search has not seen, beside the settings as given and
hard labels only: the paired differences on those seeds, with their intervals of confidence, are the
result. What one seed alone prefers is noise.
"""

from __future__ import annotations

import contextlib
import shlex
import sqlite3
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch

from . import cached, config, corpus, default_job, devices, report, user_models
from .errors import Interrupted, RunError, Usage, hush_torchao, needs
from .job import Job
from .methods import FASTKD
from .recipes.report import Report, Table, bars, mean_and_error
from .settings import Common, DefaultJob, Search, UserModels
from .train import Training

if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import BaseTrial

# A job's students by their settings: figures on held-out text, as metrics.csv has them.
Train = Callable[[Any], dict[str, float]]

GRID: dict[str, Any] = {
    "temperature": ["1", "2", "4", "8"],
    "alpha": [0.5, 0.9, 1.0],
    "divergence": ["forward_kl", "reverse_kl", "jsd:0.5"],
}
TEMPERATURES, ALPHAS = (0.5, 16.0), (0.3, 1.0)
DIVERGENCES = ["forward_kl", "reverse_kl", "jeffreys", "jsd:0.5", "skew_kl:0.1"]
GIVEN, HARD, FOUND = "as given", "hard labels", "found"
LOSS, KL = "validation_loss", "kl_to_teacher"


def run(chosen: DefaultJob | UserModels, search: Search, folder: Path) -> Report:
    """Searches, compares, prints; study.db, results.json and plot.png are then in `folder`.

    Trials of an earlier search there, with the same settings, are kept and added to.
    """
    needs("optuna", extra="recipes")
    needs("rich", "matplotlib")
    study = _study(chosen, search, folder)
    repeats = (
        default_job.repeatable(chosen.threads) if isinstance(chosen, DefaultJob) else nullcontext()
    )
    with TemporaryDirectory() as tokens, repeats, report.bars() as bar:
        train = (
            _default_job(chosen)
            if isinstance(chosen, DefaultJob)
            else _user_models(chosen, folder, Path(tokens))
        )
        task = bar.add_task("students", total=search.seeds * (search.trials + 3), text="")

        def students(changed: Common, first: int) -> list[dict[str, float]]:
            """One for each of the seeds from `first` on."""
            found = []
            for seed in range(first, first + search.seeds):
                found.append(train(replace(changed, seed=chosen.seed + seed)))
                bar.update(task, advance=1, text=f"loss {found[-1][LOSS]:.4f}")
            return found

        def objective(trial: BaseTrial) -> float:
            found = students(replace(chosen, **suggest(trial, search.sampler)), 0)
            return sum(figures[LOSS] for figures in found) / len(found)

        try:
            # A trial that fails, by a loss that is not finite, say, is a bad trial.
            study.optimize(objective, n_trials=search.trials, catch=(RunError,))
        except KeyboardInterrupt:
            raise Interrupted(f"stopped; the same command adds to the trials in {folder}") from None
        best = _best(study, search.sampler)
        rivals = {
            GIVEN: chosen,
            HARD: replace(chosen, alpha=0.0),
            FOUND: replace(chosen, **best),
        }
        found = {name: students(changed, search.seeds) for name, changed in rivals.items()}
    result = _result(study, search, spelt(best), found)
    result.save(folder, sampler=search.sampler, settings=asdict(chosen), found=best)
    return result


def suggest(trial: BaseTrial, sampler: str) -> dict[str, Any]:
    """Settings of `fastkd distill` for a trial."""
    if sampler == "grid":
        return {name: trial.suggest_categorical(name, values) for name, values in GRID.items()}
    return {
        "temperature": f"{trial.suggest_float('temperature', *TEMPERATURES, log=True):.3g}",
        "alpha": round(trial.suggest_float("alpha", *ALPHAS), 3),
        "divergence": trial.suggest_categorical("divergence", DIVERGENCES),
    }


def spelt(settings: dict[str, Any]) -> str:
    """The settings as options of `fastkd distill`."""
    return shlex.join(f"--{name}={value}" for name, value in settings.items())


# --- the jobs --------------------------------------------------------------------------------


def _default_job(chosen: DefaultJob) -> Train:
    """The default job: one teacher, trained now."""
    needs("tokenizers")
    device = devices.pick(chosen.device)
    text = corpus.prepare(
        chosen.data, chosen.vocabulary, chosen.sequence_length, chosen.student_share
    )
    first = Training(chosen, text, device, names=())
    while first.teacher_step < chosen.teacher_steps:
        first.train_teacher()

    def train(changed: DefaultJob) -> dict[str, float]:
        training = Training(
            replace(changed, evaluate_every=changed.steps), text, device, names=(FASTKD,)
        )
        training.teacher = first.teacher
        while training.step < changed.steps:
            training.train_students()
        return training.rows[-1]

    return train


def _user_models(chosen: UserModels, folder: Path, tokens: Path) -> Train:
    """The user's models: a student as it was, for each training."""
    hush_torchao()
    needs("transformers", "datasets", "accelerate")
    if chosen.teacher_cache:  # which may know its teacher at one temperature alone
        cached.opened(replace(chosen, temperature=GRID["temperature"][-1]))
    job = Job(chosen, tokens)

    def train(changed: UserModels) -> dict[str, float]:
        trainer = job.trainer(changed, folder, save_strategy="no", eval_strategy="no")
        trainer.train()
        found = user_models.plain(trainer.evaluate())
        trainer.accelerator.free_memory()
        return found

    return train


# --- the study -------------------------------------------------------------------------------


def _study(chosen: DefaultJob | UserModels, search: Search, folder: Path) -> Study:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    samplers = {
        "grid": lambda: optuna.samplers.GridSampler(GRID, seed=chosen.seed),
        "random": lambda: optuna.samplers.RandomSampler(seed=chosen.seed),
        "tpe": lambda: optuna.samplers.TPESampler(seed=chosen.seed),
    }
    if (folder / "study.db").exists():
        _check_ours(folder / "study.db")
    study = optuna.create_study(
        sampler=samplers[search.sampler](),
        study_name=search.sampler,
        storage=f"sqlite:///{(folder / 'study.db').resolve()}",
        load_if_exists=True,
    )
    settings = f"seeds = {search.seeds}\n{config.text(chosen)}"
    if _finished(study) and study.user_attrs.get("settings", settings) != settings:
        raise Usage(f"{folder} holds a search with other settings: choose another --out")
    study.set_user_attr("settings", settings)
    return study


def _check_ours(path: Path) -> None:
    """Refuses a data base of somebody else's, to which Optuna would add its tables."""
    try:
        uri = f"{path.resolve().as_uri()}?mode=ro"
        with contextlib.closing(sqlite3.connect(uri, uri=True)) as file:
            strangers = file.execute(
                "select study_name from studies where study_id not in "
                "(select study_id from study_user_attributes where key = 'settings')"
            ).fetchall()
    except sqlite3.Error as error:
        raise Usage(f"{path} is no search of fastkd tune ({error}): choose another --out") from None
    if strangers:
        raise Usage(f"{path} holds a study that fastkd tune did not make: choose another --out")


def _best(study: Study, sampler: str) -> dict[str, Any]:
    from optuna.trial import FixedTrial

    if not _finished(study):
        raise RunError("every trial failed: lower --learning-rate")
    return suggest(FixedTrial(study.best_trial.params), sampler)


def _finished(study: Study) -> list[Any]:
    from optuna.trial import TrialState

    return study.get_trials(states=(TrialState.COMPLETE,))


# --- what came of it -------------------------------------------------------------------------


def _result(
    study: Study, search: Search, best: str, found: dict[str, list[dict[str, float]]]
) -> Report:
    loss, kl = (
        Table(title, _scores(found, figure), GIVEN, decimals=4, unit="nats")
        for title, figure in (
            ("Loss on held-out text, nats per token", LOSS),
            ("KL to the teacher on held-out text, nats per token", KL),
        )
    )
    scores = loss.scores
    verdicts = [_verdict(scores[FOUND] - scores[rival], rival) for rival in (GIVEN, HARD)]
    return Report(
        f"Tune: {len(_finished(study))} trials by {search.sampler}, {search.seeds} seeds each, "
        f"then {search.seeds} others",
        [loss, kl],
        text="\n".join([f"Found: {best}", "On new seeds its loss", *verdicts]),
        draw=lambda figure: draw(figure, study, loss),
    )


def _verdict(differences: torch.Tensor, rival: str) -> str:
    """What the seeds show of a difference, by its interval of confidence.

    Student's t has the factor: of two seeds the interval is 12.7 standard errors to each side, not
    two.
    """
    from scipy.stats import t

    mean, error = mean_and_error(differences)
    reach = t.ppf(0.975, len(differences) - 1) * error
    shown = "is lower" if mean + reach < 0 else "is HIGHER" if mean - reach > 0 else "is NOT lower"
    interval = f"{mean - reach:+.4f} to {mean + reach:+.4f}"
    return f"  {shown} than that of {rival}: {mean:+.4f} (95 %: {interval})"


def _scores(found: dict[str, list[dict[str, float]]], figure: str) -> dict[str, torch.Tensor]:
    return {
        name: torch.tensor([each[figure] for each in figures], dtype=torch.float64)
        for name, figures in found.items()
    }


def draw(figure: Any, study: Study, table: Table) -> None:
    figure.set_size_inches(12, 4)
    left, right = figure.subplots(1, 2)
    trials = _finished(study)
    for name in sorted({trial.params["divergence"] for trial in trials}):
        some = [trial for trial in trials if trial.params["divergence"] == name]
        left.scatter(
            [float(trial.params["temperature"]) for trial in some],
            [trial.value for trial in some],
            s=[80 * trial.params["alpha"] for trial in some],
            label=name,
            alpha=0.7,
        )
    left.set_xscale("log", base=2)
    left.xaxis.set_major_formatter("{x:g}")
    left.set(xlabel="T (size: alpha)", ylabel="loss on held-out text", title="Trials")
    left.legend()
    bars(right, table)
