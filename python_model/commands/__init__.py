"""One thin file per ``grit`` command."""
