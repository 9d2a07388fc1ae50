"""Programs of a grid at the same time, in Triton's interpreter, which runs one after another.

Programs that wait for each other need that. One runs at a time and hands over, to one drawn at
random, wherever it looks at or changes what others see: at volatile loads and at atomics. So a seed
is an order of events, and a grid that can wait for ever does so here and is caught.
"""

from __future__ import annotations

import inspect
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from typing import Any

from triton.runtime import interpreter

# So many looks in a row at words that nobody changes, for each program, are waiting for ever.
PATIENCE = 2000


class Deadlock(Exception):
    """All programs wait."""


class Crew:
    """The programs of a grid, each in a thread; the one that holds the baton runs."""

    def __init__(self, function: Any, arguments: dict[str, Any], grid: tuple[int, ...], seed: int):
        self.function, self.arguments = function, arguments
        self.places = list(product(*map(range, grid)))
        self.turns = [threading.Semaphore(0) for _ in self.places]
        self.running = set(range(len(self.places)))
        self.random, self.idle = random.Random(seed), 0
        self.error: BaseException | None = None
        self.done = threading.Event()

    def run(self) -> None:
        threads = [threading.Thread(target=self._program, args=(i,)) for i in sorted(self.running)]
        for thread in threads:
            thread.start()
        self._pass_on()
        self.done.wait()
        for thread in threads:
            thread.join()
        if self.error is not None:
            raise self.error

    def _program(self, me: int) -> None:
        self._wait(me)
        try:
            if self.error is None:
                self.function(**self.arguments)
        except BaseException as error:
            self.error = self.error or error
        self.running.discard(me)
        self.idle = 0
        self._pass_on()

    def _wait(self, me: int) -> None:
        self.turns[me].acquire()
        self.me = me
        interpreter.interpreter_builder.set_grid_idx(*self.places[me])

    def _pass_on(self) -> None:
        if self.running:
            self.turns[self.random.choice(sorted(self.running))].release()
        else:
            self.done.set()

    def hand_over(self, changed: bool) -> None:
        """Lets another program run; called by the one that runs."""
        self.idle = 0 if changed else self.idle + 1
        if self.error is None and self.idle > PATIENCE * len(self.running):
            self.error = Deadlock(f"{len(self.running)} of {len(self.places)} programs wait")
        if self.error is not None:
            raise self.error
        me = self.me
        self._pass_on()
        self._wait(me)


@contextmanager
def together(kernels: set[str], seed: int = 0) -> Iterator[None]:
    """Launches of these kernels run all their programs at once."""
    one_by_one, builder = interpreter.GridExecutor.__call__, interpreter.InterpreterBuilder
    load, change = builder.create_masked_load, builder.create_atomic_rmw
    crews: list[Crew] = []

    def launch(self: Any, *positional: Any, **named: Any) -> None:
        if self.fn.__name__ not in kernels:
            return one_by_one(self, *positional, **named)
        named = {k: v for k, v in named.items() if k in inspect.getfullargspec(self.fn).args}
        positional, named = self._init_args_hst(positional, named)
        scope = interpreter._patch_lang(self.fn)
        arguments = inspect.getcallargs(self.fn, *positional, **named)
        for name in set(arguments) - set(self.constexprs):
            arguments[name] = interpreter._implicit_cvt(arguments[name])
        grid = (*self.grid, 1, 1)[:3]
        interpreter.interpreter_builder.set_grid_dim(*grid)
        crews.append(Crew(self.fn, arguments, grid, seed))
        try:
            crews[-1].run()
        finally:
            crews.pop()
            scope.restore()
        return None

    def watched_load(self: Any, *arguments: Any) -> Any:
        if crews and arguments[-1]:  # volatile
            crews[-1].hand_over(changed=False)
        return load(self, *arguments)

    def watched_change(self: Any, *arguments: Any) -> Any:
        if crews:
            crews[-1].hand_over(changed=True)
        return change(self, *arguments)

    interpreter.GridExecutor.__call__ = launch
    builder.create_masked_load, builder.create_atomic_rmw = watched_load, watched_change
    try:
        yield
    finally:
        interpreter.GridExecutor.__call__ = one_by_one
        builder.create_masked_load, builder.create_atomic_rmw = load, change
