-- Remove the consumers of a group that are gone for good: nothing pending, and no read for ARGV[2] ms.
-- KEYS: stream. ARGV: group, idle_ms, only this consumer (optional). Answers how many were removed.
-- Check and removal are one script, because XGROUP DELCONSUMER drops pending work silently. A live consumer that is
-- removed between two reads is harmless: its next XREADGROUP makes it again.
local found = redis.pcall('XINFO', 'CONSUMERS', KEYS[1], ARGV[1])
if found.err then return 0 end
local removed = 0
for _, flat in ipairs(found) do
  local one = {}
  for i = 1, #flat, 2 do one[flat[i]] = flat[i + 1] end
  if one.pending == 0 and one.idle > tonumber(ARGV[2]) and (not ARGV[3] or ARGV[3] == one.name) then
    redis.call('XGROUP', 'DELCONSUMER', KEYS[1], ARGV[1], one.name)
    removed = removed + 1
  end
end
return removed
