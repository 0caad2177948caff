"""The outer loop: how an initialisation and its rates are learned from many tasks, and how they are evaluated."""
