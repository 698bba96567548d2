"""A process that has imported the trainer once, and forks for each command, so that many can be killed in little time.

`Trainer` talks to it: a line of JSON with the command and the moment gives a line with the wait status of the child.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from pydoc import locate
from typing import Any, Self

ROOT = Path(__file__).parents[1]
# A moment: of which class which method is called, and whether the process ends before or after it.
MOMENTS = {
    "step": ("train.language_model.LanguageModel", "training_step", True),
    "optimizer": ("torch.optim.AdamW", "step", False),
    "validation": ("train.language_model.LanguageModel", "validation_step", True),
    "log": ("lightning.pytorch.loggers.CSVLogger", "save", True),
    "write": ("pathlib.Path", "write_bytes", True),
    "rename": ("pathlib.Path", "replace", True),
    "renamed": ("pathlib.Path", "replace", False),
    "clock": None,
}


class Trainer:
    """The process, as a context."""

    def __enter__(self) -> Self:
        env = os.environ | {"PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, __file__]
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=env, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        return self

    def __exit__(self, *_: object) -> None:
        with self.process:  # closes both pipes: the server ends with its input
            pass

    def run(self, args: list[str], moment: str | None = None, count: float = 0) -> int:
        """Run `python -m train` with args; SIGKILL at the count-th moment of a kind. Gives its exit code or -signal."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(json.dumps([args, moment, count]), file=self.process.stdin, flush=True)
        return os.waitstatus_to_exitcode(int(self.process.stdout.readline()))


def end() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def prepare(moment: str, count: float) -> None:
    """End before or after the count-th call, of paths those of checkpoints; of a fraction, when so much is written."""
    place = MOMENTS[moment]
    if place is None:
        signal.setitimer(signal.ITIMER_REAL, count)
        signal.signal(signal.SIGALRM, lambda *_: end())
        return
    name, method_name, before = place
    owner = locate(name)
    method, calls = getattr(owner, method_name), 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        counts = not isinstance(args[0], Path) or ".ckpt" in args[0].name
        calls += counts
        last = counts and calls == int(count)
        if last and before:
            if moment == "write":
                method(args[0], args[1][: int(len(args[1]) * (count % 1))])
            end()
        result = method(*args, **kwargs)
        if last:
            end()
        return result

    setattr(owner, method_name, counted)


def serve() -> None:
    from train.__main__ import main

    replies = os.dup(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    for line in sys.stdin:
        args, moment, count = json.loads(line)
        child = os.fork()
        if child == 0:
            if moment:
                prepare(moment, count)
            try:
                main(args)
            except SystemExit as error:
                os._exit(int(error.code or 0))
            except BaseException as error:
                sys.excepthook(type(error), error, error.__traceback__)
                os._exit(70)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        os.write(replies, f"{status}\n".encode())


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    serve()
