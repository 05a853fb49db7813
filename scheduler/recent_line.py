"""A straight line through points of which older ones count less and less."""

__all__ = ["RecentLine"]


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
    def spread(self) -> float:
        """The variance of x, times the squared weight."""
        return self.weight * self._xx - self._x * self._x

    @property
    def slope(self) -> float:
        """Only where x is spread."""
        return (self.weight * self._xy - self._x * self._y) / self.spread

    def intercept(self, slope: float) -> float:
        """Of the line with this slope through the middle of the points; some must have been added."""
        return (self._y - slope * self._x) / self.weight
