"""How the bits of a packed key or value are dealt to its channels."""

Grades = tuple[tuple[int, int], ...]
"""Channels of a key or value and the bits that they are coded in, one pair after another."""


GRADED = 8
"""Bits of a key below which its channels are graded."""


def gradable(head_dim: int) -> bool:
    """Whether the channels of a key can be coded in two halves, and named in two hexadecimal digits.

    Halves that are rotated in blocks of fewer than 16 channels lose more than grading gains (8, at 112 channels: twice
    the error of plain codes).
    """
    return head_dim % 32 == 0 and head_dim <= 256


def grades(head_dim: int, bits: int, graded: bool) -> Grades:
    """How the bits of a packed entry are dealt to its channels, the most important ones first.

    The better half gets one more, the other one less, where that fills whole bytes and nothing takes more than 8.
    """
    half = head_dim // 2
    if graded and bits < GRADED and gradable(head_dim):
        return ((half, bits + 1), (half, bits - 1))
    return ((head_dim, bits),)
