"""The unified model: weights with pooling, text formats, packs of samples and losses."""
