-- The registration lock of a node; its fencing token is the epoch of the registration.
-- KEYS lock, node. ARGV ttl ms. The value is the token, with a dash in front once it is free.
-- Answers {'taken', epoch} or {'busy', ms}.
local value = call('GET', KEYS[1])
if value and sub(value, 1, 1) ~= '-' then
  return {'busy', math.max(1, call('PTTL', KEYS[1]))}
end
local last = value and tonumber(sub(value, 2)) or 0
local stored = tonumber(call('HGET', KEYS[2], 'epoch') or 0) or 0
local epoch = math.max(stored + 1, last + 1, now)
call('DEL', KEYS[1]) -- so that the SET passes at maxmemory
call('SET', KEYS[1], epoch, 'PX', ARGV[1])
return {'taken', epoch}
