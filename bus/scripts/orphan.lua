-- Free a reservation whose job is gone or elsewhere: a slot that nobody else would give back.
-- So is one whose job's key is foreign, of another type. KEYS running, load, job. ARGV member, fence. Answers 1 if it was freed.
local h = try('HMGET', KEYS[3], 'state', 'fence')
if h[1] == 'running' and h[2] == ARGV[2] then
  return 0
end
call('HDEL', KEYS[2], ARGV[1])
return call('ZREM', KEYS[1], ARGV[1])
