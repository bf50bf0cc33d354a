"""The KV cache: blocks of live sequences, and what is remembered of earlier ones. Pure.

How it works: a full block of a prompt has a name, the hash of everything up to its end. Sequences with the same prefix
hold the same named blocks, once. A named block that nobody holds is remembered until its place is needed, least
recently used first; of one sequence's blocks the last go first, because a prefix must outlive what extends it.
Unnamed blocks (the last part of a prompt, and the answer) are only counted.
"""

from collections import OrderedDict


class Holding:
    """What one sequence holds: `count` blocks in all, of which the first `named` can be shared."""

    __slots__ = ("count", "names")

    def __init__(self) -> None:
        self.count = 0
        self.names: list[int] = []


class Blocks:
    """A pool of `total` blocks. `used`: those that live sequences hold, a shared one counted once."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.used = 0
        self._holders: dict[int, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()

    @property
    def remembered(self) -> int:
        """Blocks that nobody holds and that would still be found."""
        return len(self._idle)

    def found(self, names: tuple[int, ...], most: int) -> int:
        """How many leading ones of these names are here, at most `most`."""
        count = 0
        for name in names[:most]:
            if name not in self._holders and name not in self._idle:
                break
            count += 1
        return count

    def begin(self, holding: Holding, blocks: int, found: tuple[int, ...]) -> bool:
        """So many blocks for a sequence that holds none, the found ones among them; False where they do not fit."""
        fresh = blocks - sum(name in self._holders for name in found)
        if self.used + fresh > self.total:
            return False
        self.used += fresh
        for name in found:
            self._idle.pop(name, None)
            self._holders[name] = self._holders.get(name, 0) + 1
        holding.count = blocks
        holding.names = list(found)
        self._forget()
        return True

    def grow(self, holding: Holding, blocks: int) -> bool:
        """As many blocks as that in all; False where they do not fit."""
        more = blocks - holding.count
        if more <= 0:
            return True
        if self.used + more > self.total:
            return False
        holding.count = blocks
        self.used += more
        self._forget()
        return True

    def name(self, holding: Holding, names: tuple[int, ...]) -> None:
        """These leading blocks are computed and can be found from now on."""
        # one that was computed twice at the same time stays unnamed in the second sequence, and so does what follows
        for name in names[len(holding.names) : holding.count]:
            if name in self._holders:
                return
            self._idle.pop(name, None)  # the newer copy is the one to be found
            self._holders[name] = 1
            holding.names.append(name)

    def release(self, holding: Holding) -> None:
        """The sequence holds nothing more; what has a name is remembered."""
        self.used -= holding.count - len(holding.names)
        for name in reversed(holding.names):
            self._holders[name] -= 1
            if not self._holders[name]:
                del self._holders[name]
                self._idle[name] = None
                self.used -= 1
        holding.count = 0
        holding.names = []
        self._forget()

    def _forget(self) -> None:
        while len(self._idle) > max(0, self.total - self.used):
            self._idle.popitem(last=False)
