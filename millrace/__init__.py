"""Millrace: chat serving on a fleet of GPU nodes over Redis Streams."""
