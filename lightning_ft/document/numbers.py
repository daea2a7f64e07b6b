"""Numbers as people write them: three digits, a prefix or a unit, and a word where there is no number."""

from __future__ import annotations

import math

_LARGE = ((1e24, "Y"), (1e21, "Z"), (1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
_TIMES = ((86400.0, "d"), (3600.0, "h"), (60.0, "min"))


def scaled(value: float, unit: str = "") -> str:
    """With a decimal prefix.

    Example:
        >>> scaled(2_360_000_000_000, "FLOP"), scaled(12, "FLOP"), scaled(float("inf"), "FLOP")
        ('2.36 TFLOP', '12 FLOP', 'never')
    """
    if not math.isfinite(value):
        return "never" if value > 0 else "unknown"
    size, prefix = next(((size, prefix) for size, prefix in _LARGE if abs(value) >= size), (1.0, ""))
    return f"{digits(value / size)} {prefix}{unit}".strip()


def duration(seconds: float) -> str:
    """A time in its largest unit.

    Example:
        >>> duration(5400), duration(12.34), duration(90000)
        ('1.5 h', '12.3 s', '1.04 d')
    """
    size, unit = next(((size, unit) for size, unit in _TIMES if seconds >= size), (1.0, "s"))
    return f"{digits(seconds / size)} {unit}"


def bytes_of(number: float) -> str:
    """Bytes with a binary prefix.

    Example:
        >>> bytes_of(3 * 2**30), bytes_of(1000)
        ('3 GiB', '1,000 B')
    """
    for power, unit in ((40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")):
        if number >= 2**power:
            return f"{digits(number / 2**power)} {unit}"
    return f"{number:,.0f} B"


def times(ratio: float) -> str:
    """A ratio.

    Example:
        >>> times(0.0123), times(1.5), times(float("inf"))
        ('0.0123 times', '1.5 times', 'never')
    """
    return f"{digits(ratio)} times" if math.isfinite(ratio) else "never"


def rounded(number: float) -> str:
    """A count to three digits, for where the rest is noise.

    Example:
        >>> rounded(668_528), rounded(12), rounded(float("inf"))
        ('669,000', '12', 'never')
    """
    return f"{float(f'{number:.3g}'):,.0f}" if math.isfinite(number) else "never"


def digits(value: float) -> str:
    """Three significant digits, without an exponent where it is readable.

    Example:
        >>> digits(1234.5), digits(0.01234), digits(2.0), digits(1.2e-9)
        ('1,234', '0.0123', '2', '1.2e-09')
    """
    if not math.isfinite(value):
        return "infinite" if value > 0 else "-infinite" if value < 0 else "unknown"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"
