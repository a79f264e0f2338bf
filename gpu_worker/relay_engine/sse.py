"""Server-sent events, as bytes arrive: a pure parser with bounds.

Follows the HTML standard's event stream format: lines end in CR LF, LF or CR, comments begin with a colon, several
`data` lines of one event are joined by a line feed, an empty line ends the event. Bytes are cut into lines before they
are decoded, so a character may be split over two reads. One deviation: what is left when the body ends is delivered,
because several servers leave out the last empty line.
"""

from gpu_worker.relay_engine.faults import NodeBroke

EVENT_BYTES_MAX = 1024 * 1024


class SseParser:
    """`feed` bytes, get the `data` of every event that is complete; `close` at the end of the body.

    Raises NodeBroke on an event above the bound or on invalid UTF-8.
    """

    def __init__(self, event_bytes_max: int = EVENT_BYTES_MAX) -> None:
        self._max = event_bytes_max
        self._line = bytearray()  # an unfinished line
        self._data: list[str] = []  # data lines of the unfinished event
        self._size = 0
        self._after_cr = False  # the last byte was a CR: an LF that follows belongs to it
        self._first = True

    def feed(self, chunk: bytes) -> list[str]:
        if self._after_cr and chunk[:1] == b"\n":
            chunk = chunk[1:]
            self._after_cr = False
        if chunk:
            self._after_cr = chunk[-1:] == b"\r"
        events: list[str] = []
        # splitlines on bytes cuts at LF, CR and CR LF only.
        for piece in chunk.splitlines(keepends=True):
            if piece[-1:] in (b"\n", b"\r"):
                self._line += piece.rstrip(b"\r\n")
                self._end_line(events)
            else:
                self._line += piece
            if len(self._line) + self._size > self._max:
                raise NodeBroke(f"the node sent an event of more than {self._max} bytes")
        return events

    def close(self) -> list[str]:
        events: list[str] = []
        if self._line:
            self._end_line(events)
        self._end_event(events)
        return events

    def _end_line(self, events: list[str]) -> None:
        try:
            line = self._line.decode()
        except UnicodeDecodeError as error:
            raise NodeBroke("the node sent invalid UTF-8") from error
        self._size += len(self._line)
        self._line.clear()
        if self._first:
            line = line.removeprefix("\ufeff")
            self._first = False
        if not line:
            self._end_event(events)
            return
        field, _, value = line.partition(":")
        if field == "data":
            self._data.append(value.removeprefix(" "))
        elif not self._data:
            self._size = 0  # comments and other fields may go on for ever

    def _end_event(self, events: list[str]) -> None:
        if self._data:
            events.append("\n".join(self._data))
        self._data.clear()
        self._size = 0
