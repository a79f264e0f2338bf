"""The way to the server: the only part of Millrace that imports redis.

Link      sends commands; one connection, shared by all of a process, pipelined by itself
Reader    blocking reads; one connection for one task
client    an ordinary redis.asyncio client, for work outside the hot path
"""

from bus.link.address import Endpoint, Kind, ServerAddress, Tls
from bus.link.check import check_server, find_warning
from bus.link.client import client
from bus.link.errors import AddressError, LinkBusy, LinkClosed, LinkDown, LinkError, ServerError, ServerUnfit
from bus.link.reader import Batch, Entry, Fields, Reader, to_batch, to_entry
from bus.link.script import Script
from bus.link.writer import Argument, Link

__all__ = [
    "AddressError",
    "Argument",
    "Batch",
    "Endpoint",
    "Entry",
    "Fields",
    "Kind",
    "Link",
    "LinkBusy",
    "LinkClosed",
    "LinkDown",
    "LinkError",
    "Reader",
    "Script",
    "ServerAddress",
    "ServerError",
    "ServerUnfit",
    "Tls",
    "check_server",
    "client",
    "find_warning",
    "to_batch",
    "to_entry",
]
