"""Best-fit decreasing in plain Python: the peer of the Rust core's packing."""

from __future__ import annotations


class SegmentTree:
    """The least room of at least some size that a bin has left.

    Leaf r holds r if there is a bin with this room, else 0; a node holds the larger of its two.
    """

    def __init__(self, budget: int) -> None:
        self.size = 1 << budget.bit_length()
        self.tree = [0] * (2 * self.size)

    def set(self, room: int, value: int) -> None:
        """Marks a room as there or as gone."""
        tree, place = self.tree, self.size + room
        tree[place] = value
        while place > 1:
            place >>= 1
            left, right = tree[2 * place], tree[2 * place + 1]
            tree[place] = left if left >= right else right

    def at_least(self, size: int) -> int:
        """The least room of at least `size` >= 1; 0 if there is none.

        A room beside the path from the leaf of `size` to the root is larger; the lowest one is the
        tightest, and under it the leftmost.
        """
        tree, place = self.tree, self.size + size
        if tree[place] >= size:
            return tree[place]
        while place > 1:
            if place % 2 == 0 and tree[place + 1] >= size:
                place += 1
                break
            place >>= 1
        else:
            return 0
        while place < self.size:
            place *= 2
            if tree[place] < size:
                place += 1
        return tree[place]


def pack_in_python(sizes: list[int], token_budget: int) -> list[list[int]]:
    """Best-fit decreasing with lists; the indices of each bin."""
    tree = SegmentTree(token_budget)
    stacks: dict[int, list[int]] = {}  # bins by the room that is left
    bins: list[list[int]] = []
    for index in sorted(range(len(sizes)), key=sizes.__getitem__, reverse=True):
        size = sizes[index]
        room = tree.at_least(size)
        if room == 0:
            room, place = token_budget, len(bins)
            bins.append([index])
        else:
            stack = stacks[room]
            place = stack.pop()
            bins[place].append(index)
            if not stack:
                tree.set(room, 0)
        rest = room - size
        if rest > 0:
            stack = stacks.setdefault(rest, [])
            if not stack:
                tree.set(rest, rest)
            stack.append(place)
    return bins
