"""How far down its queues a dispatcher looks: the first page, and on from there where nothing can move though a node
has room. Without that, one page of jobs that avoid the free node would hide every job behind them.

What a page has shown to be unplaceable stays so until the nodes change, so the next look goes on behind it: at the end
of the queue it waits for what comes. Room that appears, and each look at everything, begin at the front again, because
the oldest job goes first.
"""

from collections.abc import Mapping

from bus.codec.wire import QueueView
from bus.keys import QueueName


class Pages:
    def __init__(self, size: int) -> None:
        self._size = size
        self._after: dict[QueueName, str] = {}  # the last entry that was passed over

    @property
    def after(self) -> Mapping[QueueName, str]:
        """For each queue that is not read from its front, the entry to read on behind."""
        return self._after

    def restart(self) -> None:
        self._after = {}

    def turn(self, view: QueueView, settled: int, has_room: bool) -> bool:
        """Take note of a page of which `settled` jobs moved. True: the next page is worth a look now.

        has_room: whether a node of the model is open after that.
        """
        more = view.queue in self._after or view.length > len(view.heads)
        if settled or not has_room or not more or len(view.heads) < self._size:
            return False
        self._after[view.queue] = view.heads[-1].entry_id
        return True
