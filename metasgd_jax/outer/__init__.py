"""The outer loop: meta-learns an initialisation and learning rates on many tasks, and evaluates on unseen tasks."""
