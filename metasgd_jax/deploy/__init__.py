"""Trained models: a classifier, the files that models are kept in, and exported programs."""
