"""Key-value states of documents on disk: a SQLite index over safetensors shards."""
