-- A holder is gone: its lease lapses now. KEYS leases. ARGV holder. Answers 1 if there was one.
if call('ZREM', KEYS[1], ARGV[1]) == 0 then
  return 0
end
call('ZADD', KEYS[1], 1, ARGV[1])
return 1
