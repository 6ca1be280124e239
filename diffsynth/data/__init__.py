"""Where DiffSynth-Studio 1.x had what reads and writes videos; it lives in `diffsynth.video`."""
