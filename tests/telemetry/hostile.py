"""Text as an agent may choose it, for property tests."""

from __future__ import annotations

from hypothesis import strategies as st

# What str.splitlines, terminals and log viewers take for the end of a line.
LINE_ENDS = "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"
# Lone surrogates are what os.fsdecode makes of undecodable bytes; the rest drives terminals or the grammar.
HOSTILE = LINE_ENDS + "\ud800\udc80\udcff\x00\x1b\x7f\x9b\u202e\u2066\t\xa0 []\\\"'?#@%é€\U0001f600"


def hostile_text(max_size: int = 60) -> st.SearchStrategy[str]:
    """Every code point there is, the dangerous ones often."""
    char = st.sampled_from(HOSTILE) | st.characters(exclude_categories=())
    # Not st.text(char): over a union it never draws a surrogate, as the test of this function would show.
    return st.lists(char, max_size=max_size).map("".join)
