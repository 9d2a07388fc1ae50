"""Processes that are started together: forked of one that has imported all, again and again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
NURSERY = """if True:
    import importlib, json, os, signal, socket, sys, time
    import torch
    import datasets, matplotlib.pyplot, peft, transformers
    from pathlib import Path
    from fastkd import __main__
    from fastkd.distill import default_job, user_models, watch
    torch.set_num_threads(1)

    def begin(rank, world, port, command, said):
        child = os.fork()
        if child:
            return child
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world),
            LOCAL_WORLD_SIZE=str(world),
            MASTER_ADDR="localhost", MASTER_PORT=str(port),
        )
        out = os.open(f"{said}.{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1)
        os.dup2(out, 2)
        code = 1
        try:
            if command[0] == "distill":
                code = __main__.main(command)
            else:
                module, _, name = command[0].partition(":")
                code = getattr(importlib.import_module(module), name)(*command[1:]) or 0
        except BaseException:
            import traceback
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    for line in sys.stdin:
        command, said, event, ranks, number, world = json.loads(line)
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        children = [begin(rank, world, port, command, said) for rank in range(world)]
        codes, began = {}, time.monotonic()
        while len(codes) < world:
            if event and Path(event).exists():
                event = None
                for rank in ranks:
                    os.kill(children[rank], number)
            if time.monotonic() - began > 120:
                for rank in set(range(world)) - set(codes):
                    os.kill(children[rank], signal.SIGKILL)
            for rank in set(range(world)) - set(codes):
                ended, status = os.waitpid(children[rank], os.WNOHANG)
                if ended:
                    codes[rank] = os.waitstatus_to_exitcode(status)
            time.sleep(0.002)
        print(json.dumps([codes[rank] for rank in range(world)]), flush=True)
"""


class Nursery:
    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", NURSERY], cwd=ROOT, text=True, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        )  # fmt: skip

    def run(self, command, said, event="", ranks=(), number=0, world=2):
        """The exit codes of all: of `fastkd distill ...`, or of a function "module:name" with
        strings. What they say is in `said`.0, `said`.1; once there is a file `event` these
        ranks get a signal.
        """
        given = [[*map(str, command)], str(said), str(event), [*ranks], int(number), world]
        print(json.dumps(given), file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(60)
