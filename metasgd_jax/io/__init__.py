"""What is read and written: files, checkpoints, metrics, and which code and versions made a result."""
