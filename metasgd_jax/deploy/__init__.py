"""Trained models: a few-shot classifier, the files that store models, and exported programs."""
