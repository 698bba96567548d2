"""What all tests share: hypothesis without chance, one thread, a fresh compiler, no GPU tests without a GPU."""

import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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
    """The folder of a run of `tiny.fit`, uninterrupted; to be read, not changed."""
    from tiny import fit  # the trainer, which tests of the library do without

    return fit(tmp_path_factory.mktemp("trained"))


@pytest.fixture
def copy_of_trained(trained: Path, tmp_path: Path) -> Path:
    """What `tiny.options` was given for that run, with the run, the text and the cache in it, to be changed."""
    home = trained.parents[2]
    shutil.copytree(home, tmp_path / "copy")
    config = tmp_path / "copy" / "runs" / "xpos" / "seed1" / "config.yaml"
    config.write_text(config.read_text().replace(str(home), str(tmp_path / "copy")))
    return tmp_path / "copy"


@pytest.fixture(scope="session")
def runs(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs at L = 16, made from that one: xpos/seed1, xpos/seed2, rotary/seed1; not to be changed."""
    from tiny import changed_run

    def second_seed(content: dict[str, Any]) -> None:
        content["datamodule_hyper_parameters"]["seed"] = 2
        content["state_dict"]["transformer.embedding.weight"] *= 3

    def rotary(content: dict[str, Any]) -> None:
        content["hyper_parameters"]["positions"] = {"class_path": "xpos_zoo.RotaryEmbedding"}
        content["state_dict"].pop("transformer.layers.0.attention.positions.scale")

    folder = tmp_path_factory.mktemp("runs")
    changed_run(trained, folder / "xpos" / "seed1", lambda content: None)
    changed_run(trained, folder / "xpos" / "seed2", second_seed)
    changed_run(trained, folder / "rotary" / "seed1", rotary)
    return folder


@pytest.fixture
def compiler_counts() -> Iterator[dict[str, Counter[str]]]:
    """The compiler's counters, all at zero, with nothing compiled before the test or left after it."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    yield counters
    torch._dynamo.reset()
