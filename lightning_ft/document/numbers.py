"""Formatting of numbers for readers: three significant digits with a prefix or unit, and words for infinity and NaN."""

from __future__ import annotations

import math
from collections.abc import Callable

_LARGE = ((1e24, "Y"), (1e21, "Z"), (1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
_TINY = 1e-4
_TIMES = ((86400.0, "d"), (3600.0, "h"), (60.0, "min"))


def format_si(value: float, unit: str = "") -> str:
    """Format a number with an SI prefix.

    Example:
        >>> format_si(2_360_000_000_000, "FLOP"), format_si(12, "FLOP"), format_si(float("inf"), "FLOP")
        ('2.36 TFLOP', '12 FLOP', 'never')
    """
    if not math.isfinite(value):
        return "never" if value > 0 else "unknown"
    size, prefix = next(((size, prefix) for size, prefix in _LARGE if abs(value) >= size), (1.0, ""))
    return f"{format_number(value / size)} {prefix}{unit}".strip()


def format_duration(seconds: float) -> str:
    """Format a duration in the largest unit that fits.

    Example:
        >>> format_duration(5400), format_duration(12.34), format_duration(90000)
        ('1.5 h', '12.3 s', '1.04 d')
    """
    size, unit = next(((size, unit) for size, unit in _TIMES if seconds >= size), (1.0, "s"))
    return f"{format_number(seconds / size)} {unit}"


def format_bytes(number: float) -> str:
    """Format a number of bytes with a binary prefix.

    Example:
        >>> format_bytes(3 * 2**30), format_bytes(1000)
        ('3 GiB', '1,000 B')
    """
    for power, unit in ((40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")):
        if number >= 2**power:
            return f"{format_number(number / 2**power)} {unit}"
    return f"{number:,.0f} B"


def format_ratio(ratio: float) -> str:
    """Format a ratio.

    Example:
        >>> format_ratio(0.0123), format_ratio(1.5), format_ratio(float("inf"))
        ('0.0123 times', '1.5 times', 'never')
    """
    return f"{format_number(ratio)} times" if math.isfinite(ratio) else "never"


def format_count(number: float) -> str:
    """Format a count, rounded to three significant digits.

    Example:
        >>> format_count(668_528), format_count(12), format_count(float("inf"))
        ('669,000', '12', 'never')
    """
    return f"{float(f'{number:.3g}'):,.0f}" if math.isfinite(number) else "never"


def format_number(value: float, digits: int = 3) -> str:
    """Format a number with a few significant digits, without an exponent.

    Args:
        value: The number.
        digits: Number of significant digits, at most 4.

    Example:
        >>> format_number(1234.5), format_number(0.01234), format_number(2.0), format_number(999.9)
        ('1,234', '0.0123', '2', '1,000')
        >>> format_number(1.2e-9), format_number(float("inf")), format_number(float("nan"))
        ('under 0.0001', 'infinite', 'unknown')
    """
    if not math.isfinite(value):
        return _not_finite(value)
    if 0 < abs(value) < _TINY:
        return f"under {_TINY:.4f}" if value > 0 else f"above -{_TINY:.4f}"
    if abs(float(f"{value:.{digits}g}")) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.{digits}g}"


def finite(form: str) -> Callable[[float], str]:
    """Return a function that formats numbers, with words for those that aren't finite.

    Args:
        form: Format string, such as ``"{:.3f}"``.

    Example:
        >>> [finite("{:+.1%}")(value) for value in (0.125, float("inf"), float("-inf"), float("nan"))]
        ['+12.5%', 'infinite', '-infinite', 'unknown']
    """
    return lambda value: form.format(value) if math.isfinite(value) else _not_finite(value)


def _not_finite(value: float) -> str:
    return "unknown" if math.isnan(value) else "infinite" if value > 0 else "-infinite"
