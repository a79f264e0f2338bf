-- A node event is appended to `nodes`, which is trimmed by time. KEYS nodes. ARGV keep ms, then fields and values.
-- Answers the entry's id. The trim comes first: beats must pass at maxmemory.
call('XTRIM', KEYS[1], 'MINID', '~', math.max(0, now - ARGV[1]))
return call('XADD', KEYS[1], '*', unpack(ARGV, 2))
