"""A number of things, in words."""


def counted(number: int, thing: str) -> str:
    """`1 prompt`, `1,234 prompts`."""
    return f"{number:,} {thing}" if number == 1 else f"{number:,} {thing}s"
