"""Texts that hypothesis draws."""

from hypothesis import strategies as st

TEXTS = st.text(alphabet=st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), min_size=1, max_size=40).filter(
    lambda text: text.strip() != ""
)
"""Texts that are not white space alone, without control characters and lone surrogates."""
