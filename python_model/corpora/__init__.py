"""Builds data and models for training: sources, tasks, splits, the bundled sample, the small model."""
