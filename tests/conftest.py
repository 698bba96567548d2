"""What all tests share: hypothesis without chance, one thread, a fresh compiler, no GPU tests without a GPU."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

settings.register_profile(
    "repeatable", deadline=None, derandomize=True, max_examples=40, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("repeatable")

torch.set_num_threads(1)  # tensors are small: many threads would mostly wait for each other


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs CUDA"))


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs of two steps at L = 16: xpos/seed1, xpos/seed2, rotary/seed1. Not to be changed."""
    from tiny import changed_run, fit  # the trainer, which tests of the library do without

    folder = tmp_path_factory.mktemp("trained")
    for config in ("xpos", "rotary"):
        run = fit(folder, config, trainer__max_steps=2)

    def second(content: dict) -> None:
        content["datamodule_hyper_parameters"]["seed"] = 2
        content["state_dict"]["transformer.embedding.weight"] *= 3

    changed_run(run.parents[1] / "xpos" / "seed1", folder / "runs" / "xpos" / "seed2", second)
    return folder / "runs"


@pytest.fixture
def compiler_counts() -> Iterator[dict[str, Counter[str]]]:
    """The compiler's counters, all at zero, with nothing compiled before the test or left after it."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    yield counters
    torch._dynamo.reset()
