"""A straight line through points of which older ones count less and less."""


class RecentLine:
    """y = intercept + slope * x by least squares. `keep`: what every point counts of its former weight when the next
    one comes."""

    def __init__(self, keep: float) -> None:
        self._keep = keep
        self.weight = 0.0  # points, as they count now
        self._x = self._y = self._xx = self._xy = 0.0

    def add(self, x: float, y: float) -> None:
        keep = self._keep
        self.weight = keep * self.weight + 1.0
        self._x = keep * self._x + x
        self._y = keep * self._y + y
        self._xx = keep * self._xx + x * x
        self._xy = keep * self._xy + x * y

    @property
    def variance(self) -> float:
        """Of x; some points must have been added."""
        return self._xx / self.weight - (self._x / self.weight) ** 2

    @property
    def slope(self) -> float:
        """Only where x varies."""
        return (self._xy / self.weight - self._x * self._y / self.weight**2) / self.variance

    def intercept(self, slope: float) -> float:
        """Of the line with this slope through the middle of the points; some must have been added."""
        return (self._y - slope * self._x) / self.weight
