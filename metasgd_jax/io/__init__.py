"""Input and output: files, checkpoints, metrics, progress, and the versions that produced a result."""
