"""A teacher's outputs, written once and read in place of running it.

    kept = cache.write("kept/", cache.Best(k=64), tokens, teacher, vocab_size)
    teacher = cache.TeacherCache("kept/")[rows]

`fastkd cache` does the first for language models on text.
"""

from .format import CacheError, Manifest
from .layouts import Best, Draws, Full, Hidden, Layout
from .reader import TeacherCache
from .writer import write

__all__ = [
    "Best",
    "CacheError",
    "Draws",
    "Full",
    "Hidden",
    "Layout",
    "Manifest",
    "TeacherCache",
    "write",
]
