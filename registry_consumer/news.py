"""Events of the `nodes` stream as the fold's news. Pure."""

from typing import assert_never

from bus.codec.events import HttpBeat, NodeBeat, NodeBye, NodeDrain, NodeEvent, NodeRegistered
from registry_consumer.fold import Kind, News, parse_entry_id


def kind_of(event: NodeEvent) -> Kind:
    match event:
        case NodeRegistered():
            return "register"
        case NodeBeat():
            return "beat"
        case HttpBeat():
            return "http_beat"
        case NodeDrain():
            return "drain"
        case NodeBye():
            return "bye"
        case _:
            assert_never(event)


def to_news(entry_id: str, event: NodeEvent) -> News:
    epoch = 0 if isinstance(event, HttpBeat) else event.epoch
    sender = event.key_id if isinstance(event, NodeRegistered | HttpBeat | NodeBye) else ""
    return News(epoch, parse_entry_id(entry_id), kind_of(event), event.node, sender)
