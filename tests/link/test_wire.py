"""What the link takes from redis-py, pinned: an update that changes it fails here and not in production."""

import asyncio

import hiredis
import redis

from bus.link import ServerAddress
from bus.link.dial import connection_to, dial, open_connection
from bus.link.wire import Wire, pack


async def test_redis_py_still_has_the_stream_writer_that_the_wire_takes_over(address: ServerAddress) -> None:
    """Wire uses one private attribute: Connection._writer, an asyncio.StreamWriter whose transport takes a protocol."""
    connection = connection_to(address, address.endpoints[0], name="pin", timeout_s=2)
    await open_connection(connection)

    assert isinstance(connection._writer, asyncio.StreamWriter), f"redis-py {redis.__version__}"
    assert isinstance(connection._writer.transport, asyncio.Transport)
    assert not await connection.can_read(), "nothing may be left in redis-py's own buffer"
    await Wire(connection).release()
    assert not connection.is_connected


async def test_redis_py_is_asked_for_no_retry_no_health_check_no_notifications(address: ServerAddress) -> None:
    """Its defaults retry writes blindly: one xadd made two entries here (design 3.7)."""
    connection = connection_to(address, address.endpoints[0], name="pin", timeout_s=2)

    assert connection.retry.get_retries() == 0
    assert connection.health_check_interval == 0
    assert connection.protocol == 2
    assert connection.maint_notifications_config is None
    assert connection.socket_timeout == 2


async def test_replies_are_parsed_however_the_network_cuts_them(address: ServerAddress) -> None:
    wire, _ = await dial(address, name="cut", cell_key="", timeout_s=2)
    replies: list[object] = []
    wire.start(replies.append, lambda reason: None, lambda: None)
    raw = b"+OK\r\n:12\r\n$-1\r\n*2\r\n$3\r\nabc\r\n*1\r\n$0\r\n\r\n-WRONGTYPE no\r\n"

    for at in range(len(raw)):
        wire.data_received(raw[at : at + 1])
    wire.data_received(raw)

    assert [repr(reply) for reply in replies[:5]] == [repr(reply) for reply in replies[5:]]
    assert replies[:4] == [b"OK", 12, None, [b"abc", [b""]]]
    assert isinstance(replies[4], hiredis.ReplyError)
    await wire.release()


async def test_bytes_that_are_no_protocol_end_the_connection(address: ServerAddress) -> None:
    wire, _ = await dial(address, name="noise", cell_key="", timeout_s=2)
    reasons: list[str] = []
    wire.start(lambda reply: None, reasons.append, lambda: None)

    wire.data_received(b"HTTP/1.1 400 Bad Request\r\n")

    assert len(reasons) == 1
    assert "not the Redis protocol" in reasons[0]
    assert not wire.open
    await wire.release()


def test_commands_are_packed_byte_for_byte() -> None:
    assert pack(("SET", "ключ", b"\x00\r\n", 12, 1.5)) == (
        b"*5\r\n$3\r\nSET\r\n$8\r\n\xd0\xba\xd0\xbb\xd1\x8e\xd1\x87\r\n$3\r\n\x00\r\n\r\n$2\r\n12\r\n$3\r\n1.5\r\n"
    )
