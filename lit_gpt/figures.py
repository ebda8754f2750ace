"""Numbers as a person reads them."""


def format_duration(seconds: float) -> str:
    """Return `33.1 ms`, `1.3 s`, `2.0 min`, `2.0 h` or `2.3 days`: a larger unit from two of that unit on."""
    for unit, unit_seconds in (("days", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * unit_seconds:
            return f"{seconds / unit_seconds:.1f} {unit}"
    return f"{seconds:.1f} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"


def format_bytes(count: float) -> str:
    """Return a number of bytes as `312.5 MB` or `1.5 GB`."""
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def format_count(count: float) -> str:
    """Return a number with about three digits: `812`, `9.75 k`, `1.95 M`, `1.3 B`."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= 0.9995 * size:
            return f"{count / size:.3g} {unit}" if count < 999.5 * size else f"{count / size:,.0f} {unit}"
    return f"{count:.0f}"
