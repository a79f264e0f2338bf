-- A lease of a gateway, dispatcher or relay. KEYS leases. ARGV holder, lease_ms. Answers its expiry.
relieve(KEYS[1])
local expiry = now + ARGV[2]
call('ZADD', KEYS[1], expiry, ARGV[1])
return expiry
