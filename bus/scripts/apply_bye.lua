-- use: _apply
-- It has left on purpose: no longer counted, and a tombstone keeps late beats of its epoch from reviving it. It may be
-- coming back (a restart lets it leave), so what it can do is remembered as long as of one that fell silent.
-- It stays listed until the sweep has handed back what it held, at once, and removed its keys. KEYS 6 running, 7.. of each of its
-- models the zsets of whole nodes, of parts and of those that left. ARGV 6 epoch, 7 key id.
local h = call('HMGET', node_key, 'epoch', 'state', 'key_id')
local epoch = tonumber(ARGV[6])
if not h[2] or h[2] == 'bye' then
  -- A beat of this epoch may still come, delivered late: the tombstone stands before it.
  if epoch > (tonumber(h[1]) or 0) then
    call('HSET', node_key, 'state', 'bye', 'epoch', epoch, 'owner', '', 'beat_id', beat_id)
    call('PEXPIRE', node_key, node_keep)
  end
  return h[2] and 'departed' or 'unknown'
elseif epoch < (tonumber(h[1]) or 0) then
  return 'superseded'
elseif (h[3] or '') ~= ARGV[7] then
  return 'not_owner'
end
call('DEL', alive_key)
for i = 7, #KEYS, 3 do
  local whole, parts, left = unpack(KEYS, i, i + 2)
  if call('ZREM', whole, node) == 1 then
    call('ZADD', left, now, node)
    call('ZREMRANGEBYSCORE', left, '-inf', now - node_keep)
    call('PEXPIRE', left, node_keep)
  end
  call('ZREM', parts, node)
end
call('HSET', node_key, 'state', 'bye', 'epoch', epoch, 'owner', '', 'beat_id', beat_id)
call('PEXPIRE', node_key, node_keep)
for _, member in ipairs(call('ZRANGE', KEYS[6], 0, -1)) do
  call('ZADD', KEYS[6], now, member) -- due now: nobody may renew or finish them any more
end
report(events_key, 'node_down', node, 'bye', '')
return 'applied'
