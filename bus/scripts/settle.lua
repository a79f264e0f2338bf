-- Entries that have been dealt with: acked and deleted together, so that a connection lost in between leaves none behind.
-- KEYS stream. ARGV group, entries. Answers how many were there.
call('XACK', KEYS[1], unpack(ARGV))
return call('XDEL', KEYS[1], unpack(ARGV, 2))
