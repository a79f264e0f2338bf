"""Serves nodes that other people run: any HTTP server with OpenAI's chat API, or with the simple `POST /chat`.

sse, wire, answer, faults   pure: bytes -> events -> text that may be published; whose fault it is
call                        one bounded HTTP call
engine                      `Engine` over one node
watch, service              which nodes this relay takes, and the process that serves them
"""
