"""Which positions of the gold document are tried at each k."""


def spaced(possible: list[int], at_most: int) -> list[int]:
    """Up to `at_most` of the positions, evenly spaced, both ends included; 0 takes all."""
    n = len(possible)
    if at_most < 0:
        raise ValueError(f"positions must be 0 (all) or at least 1, got {at_most}")
    if at_most == 0 or n <= at_most:
        return possible
    if at_most == 1:
        return [possible[0]]
    return [possible[round(i * (n - 1) / (at_most - 1))] for i in range(at_most)]
