"""The seam to transformers: the only place of this package that imports it."""
