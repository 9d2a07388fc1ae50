"""The model card of a student that was distilled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from . import config


def text(figures: dict[str, Any]) -> str:
    """The model card: what it was distilled from, what came of it, and every setting."""
    from huggingface_hub import ModelCardData

    chosen = figures["settings"]
    teachers = figures["teacher"].split(", ")
    bases = [name for name in (*teachers, chosen["student"]) if not Path(name).exists()]
    header = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["distillation", "fastkd"],
        base_model=bases or None,
    )
    crossed = chosen["cross_tokenizer"]
    measure = f"{crossed} distance to the teacher" if crossed else "KL to the teacher in nats"
    rows = "\n".join(
        f"| {when} | {found['validation_loss']:.4f} | {found['kl_to_teacher']:.4f} "
        f"| {found['agreement']:.1%} |"
        for when, found in ((when, figures[when]) for when in ("before", "after"))
    )
    spelt = "\n".join(config.line(*item) for item in chosen.items())
    versions = ", ".join(f"{name} {value}" for name, value in figures["machine"].items())
    return f"""---
{header.to_yaml()}
---

# {Path(chosen["student"]).name}, distilled from {" and ".join(Path(t).name for t in teachers)}

On held-out text, per token:

| student | loss in nats | {measure} | top-1 agreement |
|---|---|---|---|
{rows}

Distilled by `fastkd distill --config config.toml` ({versions}), where config.toml is

```toml
{spelt}
```
"""
