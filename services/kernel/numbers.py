"""Numbers as messages tell them."""

# Above it digits say less than an exponent.
DIGITS_BELOW = 1e15


def told(number: float) -> str:
    """Whole numbers with all of their digits."""
    return f"{number:.0f}" if float(number).is_integer() and abs(number) < DIGITS_BELOW else f"{number:g}"
