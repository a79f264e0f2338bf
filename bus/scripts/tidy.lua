-- Consumers of a group that are gone: no lease, silent for a minute, and nothing pending (DELCONSUMER would drop it).
-- KEYS stream, leases. ARGV group, idle ms. Answers how many.
local consumers = try('XINFO', 'CONSUMERS', KEYS[1], ARGV[1])
if consumers.err then
  return 0
end
local count = 0
for _, one in ipairs(consumers) do
  local c = {}
  for i = 1, #one, 2 do
    c[one[i]] = one[i + 1]
  end
  local lease = tonumber(call('ZSCORE', KEYS[2], c.name) or 0)
  if c.pending == 0 and c.idle > tonumber(ARGV[2]) and lease <= now then
    call('XGROUP', 'DELCONSUMER', KEYS[1], ARGV[1], c.name)
    count = count + 1
  end
end
return count
