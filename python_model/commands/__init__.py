"""One thin module per ``grit`` command."""
