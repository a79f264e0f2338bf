-- A lapsed lease has been dealt with. KEYS leases, the gateway's set of jobs. ARGV holder. Nothing if it lives again.
local lease = call('ZSCORE', KEYS[1], ARGV[1])
if lease and tonumber(lease) > now then
  return 0
end
call('ZREM', KEYS[1], ARGV[1])
call('DEL', KEYS[2])
return 1
