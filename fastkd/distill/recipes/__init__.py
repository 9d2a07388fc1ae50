"""Recipes: one experiment on distillation each, with its expected and its measured outcome.

run("modes", Path("runs/modes"))  trains, prints, compares, and writes results.json and plot.png
"""

from __future__ import annotations

import importlib
import time
from pathlib import Path
from typing import TYPE_CHECKING

from fastkd import checks

if TYPE_CHECKING:
    from .report import Report

# Name to what it shows. The module of a recipe is its name with "_" for "-".
RECIPES = {
    "modes": "which parts of a bimodal teacher each divergence covers",
    "temperature": "T with and without T^2, adaptive temperatures, search, and what mistakes cost",
    "soft-labels": "soft cross-entropy plus or minus entropy, with softmax and with sigmoid heads",
    "two-stage": "a high temperature first, then a low one; samples chosen by what the rows say",
    "few-sample": "a student from few samples, temperature and weight chosen by cross-validation",
    "compress": "pruning and quantisation, and what distillation brings back",
    "federated": "one teacher made of clients with private, unequal data: mixed, weighted, routed",
    "multimodal": "a teacher that sees two views of what its student sees one; another modality",
    "sparse": "a teacher known by its best entries, by draws, or by all, out of a cache",
}


def run(name: str, out: Path, quick: bool = False) -> Report:
    """Run a recipe, write results.json and plot.png into `out`; print the Report it returns.

    Args:
        name: one of RECIPES.
        out: a folder that is new or empty.
        quick: two seeds and few steps: seconds, and outcomes that say nothing.

    Raises:
        ValueError: an unknown name.
        report.MissingPackage: scikit-learn, matplotlib or another package is not installed.
        errors.RunError: `out` cannot be written, or holds something.
    """
    checks.choice("recipe", name, tuple(RECIPES))
    from fastkd.distill import storage

    from .digits import one_thread
    from .report import need

    need("matplotlib", "matplotlib")  # before the training, not after
    recipe = importlib.import_module("." + name.replace("-", "_"), __name__)
    start = time.perf_counter()
    with storage.new_folder(str(out)) as folder, one_thread():
        report: Report = recipe.run(quick)
        seconds = round(time.perf_counter() - start, 1)
        report.save(folder, recipe=name, quick=quick, seconds=seconds)
    return report
