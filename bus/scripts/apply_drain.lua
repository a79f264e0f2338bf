-- use: _apply
-- It takes no more work. ARGV 6 epoch.
local h = call('HMGET', node_key, 'epoch', 'state')
local epoch = tonumber(ARGV[6])
if not h[2] then
  return 'unknown'
elseif h[2] == 'bye' then
  return 'departed'
elseif epoch ~= tonumber(h[1]) then
  return 'superseded'
end
call('HSET', node_key, 'state', 'draining', 'drained_by', '')
report(events_key, 'node_draining', node, 'drain', '')
return 'applied'
