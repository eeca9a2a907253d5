"""Where real text comes from: Python wheels and Debian packages, fetched by name (packages.py) and read into records.

One module per source; a record has a ``key`` that names its entity (a sense, an article, a function, a package), by which
training and test are kept apart.
"""
