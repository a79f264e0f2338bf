-- use: _event
-- Forget a node that is long silent, or one that has left: all its keys at once, but for the tombstone of one that left,
-- and the lock under which it may be coming back.
-- KEYS node, alive, running, load, jobs, control, lock, nodes:known, events, then the zsets of its models. ARGV node, node_keep.
local node_key, running_key, known_key = KEYS[1], KEYS[3], KEYS[8]
local beat = call('ZSCORE', known_key, ARGV[1])
local state = call('HGET', node_key, 'state')
if not beat and not state then
  return 'unknown'
end
if call('ZCARD', running_key) > 0 or (state ~= 'bye' and beat and tonumber(beat) > now - ARGV[2]) then
  return 'held'
end
call('DEL', KEYS[2], KEYS[3], KEYS[4], KEYS[5], KEYS[6])
call('ZREM', known_key, ARGV[1])
for i = 10, #KEYS do
  call('ZREM', KEYS[i], ARGV[1])
end
if state == 'bye' then
  return 'departed'
end
call('DEL', node_key, KEYS[7])
report(KEYS[9], 'node_removed', ARGV[1], 'silent', '')
return 'applied'
