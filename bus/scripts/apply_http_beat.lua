-- use: _apply
-- An HTTP node's beat carries only its id: it creates nothing. KEYS 6.. the zsets of its models. ARGV 6 key id.
local h = call('HMGET', node_key, 'beat_id', 'state', 'kind', 'key_id')
if not h[2] or h[2] == '' or h[3] ~= 'http' then
  return 'unknown'
elseif h[2] == 'bye' then
  return 'departed'
elseif (h[4] or '') ~= ARGV[6] then
  return 'not_owner'
elseif is_stale(h[1]) then
  return 'superseded'
elseif is_expired() then
  return 'expired'
end
call('HSET', node_key, 'beat_id', beat_id, 'beat_ms', beat_ms)
revive(6, #KEYS - 5, false)
return 'applied'
