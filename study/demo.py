"""`make demo`: train xPos and RoPE from their configurations, then measure both far beyond the trained length.

Started again, it goes on where it was: a finished run is not trained again, a finished cell not measured.
"""

from study.thresholds import verdicts
from train.__main__ import main as train
from train.errors import command
from train.extrapolate import extrapolate


def demo() -> None:
    """Four modes and 10 windows: what minutes allow; `python -m study` has all."""
    for config in ("configs/xpos.yaml", "configs/rotary.yaml"):
        train(["fit", "--config", config, "--trainer.devices", "1"])
    results = extrapolate(["runs/xpos", "runs/rotary"], windows=10, modes=["dense", "tail", "BCA", "recompute"])
    print("\n".join(verdicts(results)))


if __name__ == "__main__":
    command(demo)
