"""What makes data and models to train on: sources, tasks, splits, the bundled sample, the small model."""
