"""A straight line through points, the older of which count less."""


class RecentLine:
    """y = intercept + slope * x by least squares. `keep`: factor on the weight of all earlier points when a new one
    arrives."""

    def __init__(self, keep: float) -> None:
        self._keep = keep
        self.weight = 0.0  # of all points together
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
        """Mean of x; needs at least one point."""
        return self._xx / self.weight - (self._x / self.weight) ** 2

    @property
    def slope(self) -> float:
        """Defined only if x varies."""
        return (self._xy / self.weight - self._x * self._y / self.weight**2) / self.variance

    @property
    def mean_ratio(self) -> float:
        """Slope of the line from the origin to the mean of the points; needs a point with x > 0."""
        return self._y / self._x

    def intercept(self, slope: float) -> float:
        """Intercept of the line with this slope through the mean of the points; needs at least one point."""
        return (self._y - slope * self._x) / self.weight
