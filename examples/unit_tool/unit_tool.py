"""A tool of one's own for moss-jt: converts lengths. Twenty lines, and an entry point in pyproject.toml."""

from moss_jt.tools import Tool, ToolError

METRES = {"m": 1.0, "km": 1000.0, "cm": 0.01, "mile": 1609.344, "foot": 0.3048, "inch": 0.0254, "li": 500.0}


def convert(amount: str, given: str, wanted: str) -> str:
    """Convert("3", "mile", "km") is "4.828032 km"."""
    if given not in METRES or wanted not in METRES:
        raise ToolError(f"units are {', '.join(METRES)}; found {given!r} and {wanted!r}.")
    return f"{float(amount) * METRES[given] / METRES[wanted]:.10g} {wanted}"


tool = Tool(
    name="units",
    title="Unit converter",
    api="Convert(amount, unit, wanted unit)",
    run=convert,
    quoted=True,
)
