"""``python -m diffsynth`` is the command ``diffsynth``."""

from diffsynth.cli.app import main

main()
