"""Millrace: chat serving on a fleet of GPU nodes over Redis Streams.

`Client` is for programs that produce chats; the `millrace` command is for operators.
"""

from bus.client import Answer, ChatError, Client, Piece

__all__ = ["Answer", "ChatError", "Client", "Piece"]
