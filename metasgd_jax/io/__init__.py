"""Input and output: files, checkpoints, metrics, and the versions that produced a result."""
