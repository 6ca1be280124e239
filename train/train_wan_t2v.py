"""Train Wan as with DiffSynth-Studio v1: the same flags, the same files.

    python train/train_wan_t2v.py --task data_process --dataset_path data/dogs ...
    python train/train_wan_t2v.py --task train --dataset_path data/dogs ...

docs/training.md goes through it; --help lists the flags. `diffsynth train` does the same and more from a YAML
file.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = str(Path(__file__).resolve().parents[1])
if ROOT not in sys.path:  # a checkout works from any folder without being installed
    sys.path.insert(0, ROOT)


def main(arguments: list[str]) -> int:
    """Run, and return the status of the process."""
    from diffsynth.cli.output import log_to_stderr
    from diffsynth.errors import DiffSynthError
    from diffsynth.training.v1_flags import run

    try:
        with log_to_stderr(is_quiet=False):
            report = run(arguments)
    except DiffSynthError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as error:
        print(f"Stopped. {str(error) or 'Nothing half-written was left behind.'}", file=sys.stderr)
        return getattr(error, "exit_code", 130)
    if report is None:
        return 0
    print(report)
    return report.exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
