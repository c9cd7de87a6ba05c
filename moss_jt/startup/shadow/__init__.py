"""Headers that stand before Jittor's or the toolkit's own; `tools.py` lays them out where compilers find them."""
