"""Millrace: chat serving on a fleet of GPU nodes over Redis Streams. `from millrace import Client` is for producers."""

from bus.calls.client import Answer, ChatError, Client, Piece

__all__ = ["Answer", "ChatError", "Client", "Piece"]
