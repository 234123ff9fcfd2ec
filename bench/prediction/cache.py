"""What of the tensors that launches read one after the other is still in the L2 cache."""

from dataclasses import dataclass

from bench.prediction import h200


@dataclass(frozen=True)
class Touch:
    """A launch's use of one tensor: distinct bytes, and whether its blocks go from its end to its beginning."""

    tensor: int
    distinct_bytes: float
    is_write: bool
    backward: bool


class L2Cache:
    """Keeps what was touched last.

    Of a tensor that did not fit, the part that was touched last is kept: its end, or its beginning if the launch went
    backward. A launch that comes from that side finds it; one that comes from the other side finds nothing, as what it
    brings in drives it out before it gets there.
    """

    def __init__(self, capacity: float = h200.L2_USABLE_BYTES):
        self.capacity = capacity
        self.kept: dict[int, tuple[float, bool, bool]] = {}  # bytes, whether all of it, direction; the oldest first

    def launch(self, touches: list[Touch]) -> float:
        """Bytes that the launch reads from the cache."""
        hits = 0.0
        for touch in touches:
            bytes_kept, is_whole, backward = self.kept.get(touch.tensor, (0.0, False, False))
            if not touch.is_write and (is_whole or backward != touch.backward):
                hits += min(touch.distinct_bytes, bytes_kept)
        total = sum(touch.distinct_bytes for touch in touches)
        share = min(1.0, self.capacity / total) if total else 1.0
        for touch in touches:
            self.kept.pop(touch.tensor, None)
        for touch in touches:
            self.kept[touch.tensor] = (share * touch.distinct_bytes, share == 1.0, touch.backward)
        self._drop_oldest()
        return hits

    def _drop_oldest(self) -> None:
        excess = sum(bytes_kept for bytes_kept, _, _ in self.kept.values()) - self.capacity
        for tensor in list(self.kept):
            if excess <= 0:
                return
            bytes_kept, _, backward = self.kept[tensor]
            left = bytes_kept - min(bytes_kept, excess)
            excess -= bytes_kept - left
            if left:
                self.kept[tensor] = (left, False, backward)
            else:
                del self.kept[tensor]
