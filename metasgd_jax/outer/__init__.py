"""The outer loop: meta-learning of an initialisation and its rates from many tasks, and evaluation on unseen tasks."""
