"""Every example runs as it is, and its student comes nearer to its teacher."""

import os
import runpy
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported
os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
FOLDER = Path(__file__).parents[1] / "examples"
EXAMPLES = sorted(FOLDER.glob("*.py"))
NEEDS = {
    "lightning_module": ["lightning"],
    "lora_self_distillation": ["transformers", "peft"],
    "on_policy": ["transformers"],
    "sentence_embeddings": ["sentence_transformers"],
    "torchtitan_loss": ["torchtitan.components.loss"],
    "transformers_trainer": ["transformers"],
    "trl_gkd": ["trl"],
}


@pytest.mark.slow
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_the_student_comes_nearer(path):
    for module in NEEDS.get(path.stem, []):
        pytest.importorskip(module, exc_type=ImportError)
    before, after = runpy.run_path(str(path))["main"]()
    assert after < 0.8 * before


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_it_is_short_and_says_how_to_run_it(path):
    text = path.read_text()
    assert text.count("\n") < 80
    assert f"python examples/{path.name}" in text


def test_none_was_forgotten():
    assert {*NEEDS} <= {path.stem for path in EXAMPLES}
