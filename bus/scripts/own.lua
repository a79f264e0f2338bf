-- use: _event
-- A worker at boot takes its node: a new epoch, owner and lease, unless another holder lives.
-- KEYS node, leases, running, alive, events, nodes:known. ARGV node, worker, lease_ms, node_keep.
-- Answers {'owned', epoch, holder, reservations left} or {'held', holder, expiry}.
local h = call('HMGET', KEYS[1], 'owner', 'epoch', 'kind', 'state', 'key_id')
if filled(h[1]) then
  local lease = call('ZSCORE', KEYS[2], h[1])
  if lease and tonumber(lease) > now then
    return {'held', h[1], tonumber(lease)}
  end
end
if h[3] == 'http' and h[4] ~= 'bye' then
  return {'held', 'the HTTP registration of key ' .. (h[5] or ''), 0}
end
local epoch = math.max((tonumber(h[2]) or 0) + 1, now)
local holder = ARGV[2] .. '.' .. epoch
if filled(h[1]) then
  call('ZREM', KEYS[2], h[1])
end
-- Not alive before its first beat says that it can serve.
call('DEL', KEYS[4])
call('HSET', KEYS[1], 'owner', holder, 'epoch', epoch, 'state', 'starting', 'breaker_n', 0, 'breaker_until', 0,
  'breaker_probe', '', 'alone', '', 'cannot', '', 'beat_id', '')
call('PEXPIRE', KEYS[1], ARGV[4])
call('ZADD', KEYS[2], now + ARGV[3], holder)
-- Listed from here on, so that the keys of one that never beats are removed in the end.
call('ZADD', KEYS[6], now, ARGV[1])
report(KEYS[5], 'owned', ARGV[1], 'boot', holder)
return {'owned', epoch, holder, call('ZRANGE', KEYS[3], 0, -1)}
