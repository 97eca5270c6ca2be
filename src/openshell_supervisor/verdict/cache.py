"""A small least-recently-used map, bounded in entries and in the weight of each. It knows nothing of verdicts."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable


class Lru[Key: Hashable, Value]:
    """The `limit` most recently used values. Not for use by several threads at once."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._items: OrderedDict[Key, Value] = OrderedDict()

    def __len__(self) -> int:
        return len(self._items)

    def get(self, key: Key) -> Value | None:
        """The value, now the most recently used one, or None."""
        value = self._items.get(key)
        if value is not None:
            self._items.move_to_end(key)
        return value

    def put(self, key: Key, value: Value) -> None:
        """Remember a value; the least recently used one makes room."""
        self._items[key] = value
        self._items.move_to_end(key)
        if len(self._items) > self.limit:
            self._items.popitem(last=False)
