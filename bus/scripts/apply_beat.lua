-- use: _apply
-- A worker's beat: full state, so it recreates its node. KEYS 6.. the zsets of its models, then of those it does not serve.
-- ARGV 6 epoch, 7 holder, 8 draining, 9 models, then fields and values of the hash.
local epoch = tonumber(ARGV[6])
local h = call('HMGET', node_key, 'epoch', 'beat_id', 'state', 'owner', 'kind', 'capacity', 'models', 'can')
local stored = tonumber(h[1]) or 0
if h[5] == 'http' and h[3] ~= 'bye' then
  return 'not_owner'
elseif h[3] == 'bye' and epoch <= stored then
  return 'departed'
elseif epoch < stored or (epoch == stored and is_stale(h[2])) then
  return 'superseded'
elseif is_expired() then
  return 'expired'
end
local state = ARGV[8] == '1' and 'draining' or 'up'
local owner = h[4]
if epoch > stored or not filled(owner) then
  owner = ARGV[7]
elseif h[3] == 'draining' then
  state = 'draining' -- a worker that drains never takes work again in this epoch
end
call('HSET', node_key, 'epoch', epoch, 'owner', owner, 'state', state, 'beat_id', beat_id, 'beat_ms', beat_ms, 'key_id', '',
  unpack(ARGV, 10))
local capacity = tonumber(new_value('capacity', 10)) or 0
local other = new_value('models', 10) ~= h[7] or new_value('can', 10) ~= (h[8] or '')
revive(6, tonumber(ARGV[9]), state == 'up' and (capacity > (tonumber(h[6]) or 0) or other))
return 'applied'
