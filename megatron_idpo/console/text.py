"""Numbers and durations in lines that people read."""


def format_number(value: float) -> str:
    """A number in about four characters: `0.42`, `12.3`, `812`, `3.1k`, `1.2M`."""
    for limit, unit in ((1e6, "M"), (1e3, "k")):
        if value >= 0.9995 * limit:
            scaled = value / limit
            return f"{scaled:.1f}{unit}" if value < 99.95 * limit else f"{scaled:.0f}{unit}"
    if value < 9.995:
        return f"{value:.2f}"
    return f"{value:.1f}" if value < 99.95 else f"{value:.0f}"


def format_duration(seconds: float) -> str:
    """`3:12`, `1:02:05`, `2d 03:00`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d {hours:02}:{minutes:02}"
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def format_count(count: int, noun: str) -> str:
    """`1 pair`, `1,204 pairs`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
