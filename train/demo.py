"""`make demo`: train xPos and RoPE from their configurations, then measure both far beyond the trained length."""

from train.__main__ import main as run
from train.errors import told_in_one_line
from train.extrapolate import extrapolate

MODES = ("dense", "tail", "BCA", "recompute")  # and 10 windows: what minutes allow; `train.study` has all


def demo() -> None:
    """Started again, it goes on where it was: a finished run is not trained again, a finished cell not measured."""
    for config in ("configs/xpos.yaml", "configs/rotary.yaml"):
        run(["fit", "--config", config, "--trainer.devices", "1"])
    with told_in_one_line():
        extrapolate(["runs/xpos", "runs/rotary"], modes=list(MODES), windows=10)


if __name__ == "__main__":
    demo()
