"""The budget of pixels in work, which bounds the memory of an API process."""

from collections.abc import Callable


class PixelBudget:
    """Megapixels of the pictures that all lines of this process decode or encode at a time.

    A picture beyond `limit` may be in work alone.
    """

    def __init__(self, limit: float) -> None:
        self.limit = limit
        self.used = 0.0
        self.on_release: list[Callable[[], None]] = []
        """Called when other work may begin."""

    def fits(self, megapixels: float) -> bool:
        """Whether work on so many more megapixels may begin."""
        return not self.used or self.used + megapixels <= self.limit

    def take(self, megapixels: float) -> None:
        """Count megapixels of work that begins."""
        self.used += megapixels

    def release(self, megapixels: float) -> None:
        """Count the megapixels of work that has ended no more."""
        self.used = max(self.used - megapixels, 0.0)
        for begin in self.on_release:
            begin()
