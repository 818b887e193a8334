"""Names of number formats."""


class Recipe:
    pass


class DelayedScaling(Recipe):
    pass


class Format:
    E4M3 = "e4m3"
    HYBRID = "hybrid"
