"""Shared by all packages: argument checks, atomic files, resumable results, optional packages."""
