"""How pictures look, in one place."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

GRAY, BLUE, ORANGE = "#8a8f98", "#2f6db5", "#f08a24"
STYLE: Any = {
    "axes.edgecolor": "#b0b4ba",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlepad": 10,
    "axes.labelcolor": "#555a61",
    "font.size": 9.5,
    "grid.color": "#eceef0",
    "legend.frameon": False,
    "lines.linewidth": 2,
    "xtick.color": "#555a61",
    "ytick.color": "#555a61",
    "xtick.major.size": 0,
    "ytick.major.size": 0,
}


def png(draw: Callable[[Any], None]) -> bytes:
    """What `draw` draws on a matplotlib figure."""
    import matplotlib
    from matplotlib.figure import Figure

    data = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        figure = Figure(layout="constrained")
        draw(figure)
        figure.savefig(data, format="png", dpi=120)
    return data.getvalue()
