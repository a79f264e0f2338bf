"""Every key of a cell, by name. Nothing else in the project builds a key of Redis.

The braces are a cluster hash tag: all keys of one cell live in one slot, so each transition is one script and every
read of several streams is legal. `docs/protocol.md` says what each key holds and how long; a test compares the two.
"""

from typing import NewType
from urllib.parse import quote

from bus.ids import Fence, GatewayId, JobId, ModelName, NodeId

QueueName = NewType("QueueName", str)  # "<model>:<priority>"; priority 0 = handed back, goes first; 1 = new

LAYOUT_KEY = "millrace:layout"
API_KEY_PREFIX = "millrace:key:"

PRIORITY_AGAIN = 0
PRIORITY_NEW = 1
PRIORITIES = (PRIORITY_AGAIN, PRIORITY_NEW)

DISPATCHER_GROUP = "dispatcher"  # on `jobs`
REGISTRY_GROUP = "registry_consumer"  # on `nodes`
WORKERS_GROUP = "workers"  # on `node:<id>:jobs`; the consumer's name is the holder


def queue_name(model: str, priority: int) -> QueueName:
    return QueueName(f"{model}:{priority}")


def queue_model(queue: QueueName) -> ModelName:
    return ModelName(queue.rpartition(":")[0])


def queue_priority(queue: QueueName) -> int:
    return int(queue.rpartition(":")[2])


def api_key_key(digest_hex: str) -> str:
    """Where an API key is kept: by the SHA-256 of its text, never by the text."""
    return API_KEY_PREFIX + digest_hex


class CellKeys:
    """The keys of cell `cell`. Ids are checked where they enter (bus.ids), addresses are quoted here."""

    def __init__(self, cell: int) -> None:
        self.cell = cell
        self.prefix = f"millrace:{{c{cell}}}:"
        prefix = self.prefix
        self.jobs = prefix + "jobs"
        self.queues = prefix + "queues"
        self.wake = prefix + "wake"
        self.late = prefix + "late"
        self.deadlines = prefix + "deadlines"
        self.nodes = prefix + "nodes"
        self.nodes_known = prefix + "nodes:known"
        self.leases = prefix + "leases"
        self.dead = prefix + "dead"
        self.events = prefix + "events"
        self.grace = prefix + "grace"
        self.sweep = prefix + "sweep"
        self._job = prefix + "job:"
        self._node = prefix + "node:"

    def queue(self, queue: QueueName) -> str:
        return f"{self.prefix}queue:{queue}"

    def job(self, job_id: JobId) -> str:
        return self._job + job_id

    def payload(self, job_id: JobId) -> str:
        return f"{self._job}{job_id}:payload"

    def text(self, job_id: JobId, fence: Fence) -> str:
        return f"{self._job}{job_id}:text:{fence}"

    def tokens(self, job_id: JobId, fence: Fence) -> str:
        return f"{self._job}{job_id}:tokens:{fence}"

    def logprobs(self, job_id: JobId, fence: Fence) -> str:
        """Records of `bus.codec.logprobs`; only of a job that asks for them."""
        return f"{self._job}{job_id}:logprobs:{fence}"

    def idem(self, tenant: str, key: str) -> str:
        return f"{self.prefix}idem:{quote(tenant, safe='')}:{quote(key, safe='')}"

    def model(self, model: str) -> str:
        """zset node -> ms of its last beat: the nodes that serve the whole model."""
        return f"{self.prefix}model:{model}"

    def model_parts(self, model: str) -> str:
        """The same for nodes that hold only some of its layers."""
        return f"{self.prefix}model:{model}:parts"

    def unable(self, model: str) -> str:
        """What no living node of a large fleet could do a moment ago: submits do not look through it one by one."""
        return f"{self.prefix}unable:{model}"

    def largest(self, model: str, recent: bool) -> str:
        """The largest context of a large fleet a moment ago: jobs that outgrow it do not look through it one by one."""
        return f"{self.prefix}largest:{'recent' if recent else 'known'}:{model}"

    def left(self, model: str) -> str:
        """zset node -> ms of its bye: nodes that served the model and may come back."""
        return f"{self.prefix}left:{model}"

    def node(self, node: NodeId) -> str:
        return self._node + node

    def node_alive(self, node: NodeId) -> str:
        return f"{self._node}{node}:alive"

    def node_jobs(self, node: NodeId) -> str:
        return f"{self._node}{node}:jobs"

    def node_running(self, node: NodeId) -> str:
        return f"{self._node}{node}:running"

    def node_load(self, node: NodeId) -> str:
        """hash job/fence -> promised tokens, written and removed together with the reservation."""
        return f"{self._node}{node}:load"

    def node_control(self, node: NodeId) -> str:
        return f"{self._node}{node}:control"

    def node_lock(self, node: NodeId) -> str:
        return f"{self.prefix}lock:node:{node}"

    def gateway(self, gateway: GatewayId) -> str:
        """The out-stream of one gateway or client process."""
        return f"{self.prefix}gateway:{gateway}"

    def gateway_jobs(self, gateway: GatewayId) -> str:
        return f"{self.prefix}gateway:{gateway}:jobs"

    def reply(self, name: str) -> str:
        """The out-stream of a plain producer."""
        return f"{self.prefix}reply:{name}"

    def out(self, out: str) -> str:
        """The key of an out-stream named as in a job's route: "gateway:<id>" or "reply:<name>"."""
        return self.prefix + out

    def usage(self, address: str) -> str:
        return f"{self.prefix}usage:{quote(address, safe='')}"

    def quota(self, key_id: str) -> str:
        return f"{self.prefix}quota:{quote(key_id, safe='')}"

    def rate(self, address: str) -> str:
        return f"{self.prefix}rate:{quote(address, safe='')}"
