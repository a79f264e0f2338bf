-- use: _apply
-- A registration over HTTP. The epoch is the lock's fencing token. KEYS 6 leases, 7 the answer's out-stream, 8.. the zsets of its models,
-- then of those it does not serve. -- ARGV 6 epoch, 7 key id, 8 answer id or '', 9 detail, 10 out_ttl, 11 models, then fields and values of the hash.
local epoch = tonumber(ARGV[6])
local h = call('HMGET', node_key, 'epoch', 'beat_id', 'state', 'owner', 'kind', 'key_id')
local stored = tonumber(h[1]) or 0

local function decide()
  local here = h[3] and h[3] ~= 'bye'
  if here and (h[5] ~= 'http' or (h[6] or '') ~= ARGV[7]) then
    return 'not_owner'
  elseif epoch == stored and h[2] == beat_id then
    return 'again' -- delivered twice
  elseif epoch <= stored then
    return 'superseded'
  elseif is_expired() then
    return 'expired'
  end
  return 'applied'
end

local status = decide()
if status == 'applied' then
  call('HSET', node_key, 'epoch', epoch, 'state', 'up', 'beat_id', beat_id, 'beat_ms', beat_ms, 'kind', 'http', 'key_id', ARGV[7],
    'breaker_n', 0, 'breaker_until', 0, 'breaker_probe', '', 'failure', 0, 'drained_by', '', 'cannot', '', unpack(ARGV, 12))
  revive(8, tonumber(ARGV[11]), true)
end
if status == 'again' then
  status = 'applied'
end
if ARGV[8] ~= '' then
  send(KEYS[7], tonumber(ARGV[10]), 'type', 'reply', 'id', ARGV[8], 'status', status, 'detail', ARGV[9])
end
return status
