"""A cluster of three masters, and a sentinel set: master, replica and three sentinels; all on loopback."""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise

from redis.crc import key_slot

from tests.harness.servers import ValkeyServer, free_port

SLOTS = 16384


@dataclass
class Cluster:
    masters: list[ValkeyServer]

    @property
    def url(self) -> str:
        return "redis+cluster://" + ",".join(f"127.0.0.1:{one.port}" for one in self.masters)

    def owner(self, key: str) -> ValkeyServer:
        """The master that holds the key's slot, as that master itself says."""
        slot = key_slot(key.encode())
        for master in self.masters:
            if not master.call("GET", _key_in_slot(slot)).startswith(b"-"):
                return master
        raise AssertionError(f"nobody owns slot {slot}")

    def others(self, key: str) -> list[ValkeyServer]:
        owner = self.owner(key)
        return [one for one in self.masters if one is not owner]

    def start_moving(self, key: str, target: ValkeyServer) -> None:
        """From now on the owner answers ASK for keys of that slot that it does not hold."""
        slot, source = key_slot(key.encode()), self.owner(key)
        _ok(target.call("CLUSTER", "SETSLOT", slot, "IMPORTING", _node_id(source)))
        _ok(source.call("CLUSTER", "SETSLOT", slot, "MIGRATING", _node_id(target)))

    def finish_moving(self, key: str, source: ValkeyServer, target: ValkeyServer) -> None:
        """Carry the keys over and tell everybody: from now on the old owner answers MOVED."""
        slot = key_slot(key.encode())
        while keys := _bulk_strings(source.call("CLUSTER", "GETKEYSINSLOT", slot, 100)):
            _ok(source.call("MIGRATE", "127.0.0.1", target.port, "", 0, 5000, "KEYS", *keys))
        for one in (target, source, *self.masters):
            _ok(one.call("CLUSTER", "SETSLOT", slot, "NODE", _node_id(target)))

    def move(self, key: str, target: ValkeyServer) -> None:
        source = self.owner(key)
        self.start_moving(key, target)
        self.finish_moving(key, source, target)


@contextmanager
def running_cluster(size: int = 3) -> Iterator[Cluster]:
    with ExitStack() as stack:
        options = {"cluster-enabled": "yes", "cluster-node-timeout": "2000", "cluster-require-full-coverage": "no"}
        masters = [stack.enter_context(_cluster_node(options)) for _ in range(size)]
        for index, master in enumerate(masters):
            first, last = index * SLOTS // size, (index + 1) * SLOTS // size - 1
            _ok(master.call("CLUSTER", "ADDSLOTSRANGE", first, last))
            _ok(master.call("CLUSTER", "SET-CONFIG-EPOCH", index + 1))
        for other in masters[1:]:
            _ok(masters[0].call("CLUSTER", "MEET", "127.0.0.1", other.port, int(other.options["cluster-port"])))
        for master in masters:
            _wait(lambda master=master: _sees_whole_cluster(master, size), "the cluster to form")  # type: ignore[misc]
        yield Cluster(masters)


@dataclass
class SentinelSet:
    name: str
    servers: list[ValkeyServer]  # the first one starts as the master
    sentinels: list[ValkeyServer]

    @property
    def url(self) -> str:
        return "redis+sentinel://" + ",".join(f"127.0.0.1:{one.port}" for one in self.sentinels) + f"/{self.name}"

    def master(self) -> ValkeyServer:
        """As the first sentinel says."""
        words = _bulk_strings(self.sentinels[0].call("SENTINEL", "GET-MASTER-ADDR-BY-NAME", self.name))
        return next(one for one in self.servers if str(one.port).encode() == words[1])

    def fail_over(self) -> None:
        """Ordered hand-over: returns once the sentinels name the new master and it takes writes."""
        old = self.master()
        _wait(lambda: self.sentinels[0].call("SENTINEL", "FAILOVER", self.name) == b"+OK\r\n", "the failover to start")
        self.wait_for_new_master(old)

    def wait_for_new_master(self, old: ValkeyServer) -> ValkeyServer:
        _wait(lambda: self.master() is not old and b"role:master" in self.master().call("INFO"), "a new master", 30)
        return self.master()


@contextmanager
def running_sentinel(name: str = "mill", sentinels: int = 3) -> Iterator[SentinelSet]:
    with ExitStack() as stack:
        master = stack.enter_context(ValkeyServer())
        replica = stack.enter_context(ValkeyServer(options={"replicaof": f"127.0.0.1 {master.port}"}))
        _wait(lambda: b"master_link_status:up" in replica.call("INFO"), "the replica to follow")
        conf = (
            f"sentinel monitor {name} 127.0.0.1 {master.port} {sentinels // 2 + 1}\n"
            f"sentinel down-after-milliseconds {name} 1000\n"
            f"sentinel failover-timeout {name} 5000\n"
        )
        watchers = [stack.enter_context(ValkeyServer(sentinel_conf=conf)) for _ in range(sentinels)]
        whole = f"slaves=1,sentinels={sentinels}".encode()
        for watcher in watchers:
            _wait(lambda watcher=watcher: whole in watcher.call("INFO", "sentinel"), "the sentinels to meet", 20)  # type: ignore[misc]
        yield SentinelSet(name, [master, replica], watchers)


def _cluster_node(options: dict[str, str]) -> ValkeyServer:
    # The bus port is picked free too: the default, port + 10000, may be taken or above 65535.
    return ValkeyServer(options={**options, "cluster-port": str(free_port())})


def _sees_whole_cluster(node: ValkeyServer, size: int) -> bool:
    info = node.call("CLUSTER", "INFO")
    return b"cluster_state:ok" in info and b"cluster_slots_assigned:16384" in info and b"cluster_size:%d" % size in info


def _node_id(node: ValkeyServer) -> bytes:
    return _bulk_strings(node.call("CLUSTER", "MYID"))[0]


def _bulk_strings(reply: bytes) -> list[bytes]:
    """The strings of a bulk reply, or of a flat array of them."""
    parts = reply.split(b"\r\n")
    return [text for head, text in pairwise(parts) if head.startswith(b"$") and head != b"$-1"]


def _key_in_slot(slot: int) -> str:
    return next(key for key in (f"probe{number}" for number in range(10**7)) if key_slot(key.encode()) == slot)


def _ok(reply: bytes) -> None:
    assert reply.startswith(b"+"), reply


def _wait(condition: Callable[[], bool], what: str, timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout_s:g} s in vain for {what}"
        time.sleep(0.05)
