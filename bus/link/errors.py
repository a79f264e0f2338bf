"""What can go wrong between us and the server, and whether the command may have run."""


class LinkError(Exception):
    """Base of everything the link raises."""


class LinkDown(LinkError):
    """No connection, or it broke.

    maybe_sent: False = the command was certainly not executed, sending it again is safe. True = its outcome is
    unknown: it was written and no reply came. The link never sends such a command again by itself.
    """

    def __init__(self, reason: str, *, maybe_sent: bool) -> None:
        super().__init__(reason)
        self.reason = reason
        self.maybe_sent = maybe_sent


class LinkBusy(LinkError):
    """Back-pressure: too much is waiting on this link already. Nothing was queued; try later or shed load."""


class LinkClosed(LinkError):
    """The link was closed by its owner."""


MAY_PASS = frozenset(
    {"OOM", "READONLY", "LOADING", "BUSY", "MASTERDOWN", "NOREPLICAS", "MISCONF", "NOPERM", "CLUSTERDOWN", "TRYAGAIN"}
)


class ServerError(LinkError):
    """The server answered with an error: `code` is its first word (WRONGTYPE, OOM, NOPERM ...), `message` the rest.

    may_pass: it is the server's state, and a later attempt may succeed; else it is what was asked for.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(f"{code} {message}")
        self.code = code
        self.message = message
        self.may_pass = code in MAY_PASS


class AddressError(LinkError, ValueError):
    """REDIS_URL cannot be understood; the text is one line that says what to write instead."""


class ServerUnfit(LinkError):
    """The server cannot carry Millrace; the text is one line that says what to do."""


def to_server_error(text: str) -> ServerError:
    code, _, message = text.partition(" ")
    return ServerError(code, message)
