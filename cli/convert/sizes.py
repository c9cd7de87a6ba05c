"""Bytes in words."""


def in_words(count: int) -> str:
    """A number of bytes with the unit that suits it."""
    if count >= 10**9:
        return f"{count / 1e9:.2f} GB"
    return f"{count / 1e6:.2f} MB"
