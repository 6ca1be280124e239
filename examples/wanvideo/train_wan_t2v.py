"""Training by the flags of DiffSynth-Studio v1; the script itself is train/train_wan_t2v.py."""

import runpy
from pathlib import Path

runpy.run_path(str(Path(__file__).resolve().parents[2] / "train" / "train_wan_t2v.py"), run_name="__main__")
