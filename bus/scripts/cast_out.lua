-- use: _event
-- A foreign member of a set or zset: to the dead letters, then away with it, so that nobody meets it again.
-- KEYS dead, source. ARGV member, reason, dead_keep, source's name.
local command = call('TYPE', KEYS[2]).ok == 'zset' and 'ZREM' or 'SREM'
if call(command, KEYS[2], ARGV[1]) == 0 then
  return 0
end
bury(KEYS[1], tonumber(ARGV[3]), ARGV[4], ARGV[1], ARGV[2], '')
return 1
