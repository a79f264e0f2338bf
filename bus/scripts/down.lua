-- use: _event
-- A node's holder is dead: its lease goes first. KEYS leases, node, running, events. ARGV node, holder.
-- Answers the reservations to hand back; none if another holder owns the node by now.
if call('ZREM', KEYS[1], ARGV[2]) == 1 then
  call('ZADD', KEYS[1], 1, ARGV[2])
end
if call('HGET', KEYS[2], 'owner') ~= ARGV[2] then
  return {}
end
report(KEYS[4], 'node_down', ARGV[1], 'died', ARGV[2])
return call('ZRANGE', KEYS[3], 0, -1)
