"""``python -m python_model.generate``: see :mod:`python_model.generate.text`."""

from python_model.generate.text import main

main()
