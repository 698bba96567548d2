"""What all tests share: hypothesis without chance, one thread, a fresh compiler, no GPU tests without a GPU."""

from collections import Counter
from collections.abc import Iterator

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


@pytest.fixture
def few_replicates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rough bootstrap intervals, for speed: test_report.py tests fine ones."""
    import train.measured  # the trainer, which tests of the library do without

    monkeypatch.setattr(train.measured, "REPLICATES", 20)


@pytest.fixture
def compiler_counts() -> Iterator[dict[str, Counter[str]]]:
    """The compiler's counters, all at zero, with nothing compiled before the test or left after it."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    yield counters
    torch._dynamo.reset()
