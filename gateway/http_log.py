"""What aiohttp's server logs about requests that are not HTTP: one line, and nothing of what they held.

Its own line for a malformed request carries a traceback that quotes the bad header, which may be the one with the key.
"""

import logging
from typing import Final

from aiohttp.http_exceptions import HttpProcessingError

NAME: Final = "gateway.http"


def http_log() -> logging.Logger:
    """The logger that the server is to use."""
    log = logging.getLogger(NAME)
    if not any(isinstance(one, MalformedRequests) for one in log.filters):
        log.addFilter(MalformedRequests())
    return log


class MalformedRequests(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, HttpProcessingError):
            record.client = record.args[0] if isinstance(record.args, tuple) and record.args else ""
            record.why = type(error).__name__
            record.msg, record.args = "malformed request", ()
            record.levelno, record.levelname = logging.WARNING, logging.getLevelName(logging.WARNING)
            record.exc_info, record.exc_text = None, None
        return True
