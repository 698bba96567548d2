"""A process that has imported the trainer once, and forks for each command, so that many can be killed in little time.

`Trainer` talks to it: a line of JSON with the command and the moment gives a line with the wait status of the child.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

ROOT = Path(__file__).parents[1]
MOMENTS = ("step", "optimizer", "validation", "log", "write", "rename", "renamed", "clock")


class Trainer:
    """The process, as a context."""

    def __enter__(self) -> Self:
        env = os.environ | {"PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, __file__]
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=env, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
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


def at(
    count: float,
    owner: Any,
    name: str,
    before: bool = True,
    among: Callable[..., bool] = lambda *_: True,
    last: Callable[..., Any] = lambda *_: None,
) -> None:
    """Have the process end before or after the count-th call of a method that `among` takes, before it after `last`."""
    method, calls = getattr(owner, name), 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        counts = among(*args)
        calls += counts
        if before and counts and calls == count:
            last(*args)
            end()
        result = method(*args, **kwargs)
        if not before and counts and calls == count:
            end()
        return result

    setattr(owner, name, counted)


def prepare(moment: str, count: float) -> None:
    import torch
    from lightning.pytorch.loggers import CSVLogger

    from train.language_model import LanguageModel

    def is_checkpoint(path: Path, *_: Any) -> bool:
        return ".ckpt" in path.name

    match moment:
        case "step":
            at(count, LanguageModel, "training_step")
        case "optimizer":
            at(count, torch.optim.AdamW, "step", before=False)
        case "validation":
            at(count, LanguageModel, "validation_step")
        case "log":
            at(count, CSVLogger, "save")
        case "rename":
            at(count, Path, "replace", among=is_checkpoint)
        case "renamed":
            at(count, Path, "replace", before=False, among=is_checkpoint)
        case "write":  # count - 1 checkpoints whole, then a part of one
            write = Path.write_bytes

            def write_part(path: Path, content: bytes) -> int:
                return write(path, content[: int(len(content) * (count % 1))])

            at(int(count), Path, "write_bytes", among=is_checkpoint, last=write_part)
        case "clock":
            signal.setitimer(signal.ITIMER_REAL, count)
            signal.signal(signal.SIGALRM, lambda *_: end())


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
