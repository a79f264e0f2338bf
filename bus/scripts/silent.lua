-- use: _event
-- A node whose beats have stopped: said once in the events, for each time that it falls silent. One that still starts
-- has not beaten yet.
-- KEYS node, alive, nodes:known, events. ARGV node, its last beat as the caller knows it. Answers 1 if it was news.
local beat = call('ZSCORE', KEYS[3], ARGV[1])
local h = call('HMGET', KEYS[1], 'state', 'silent')
if not beat or beat ~= ARGV[2] or not h[1] or h[1] == 'bye' or h[1] == 'starting' or h[2] == beat or call('EXISTS', KEYS[2]) == 1 then
  return 0
end
relieve(KEYS[3])
call('HSET', KEYS[1], 'silent', beat)
report(KEYS[4], 'node_down', ARGV[1], 'silent', '')
return 1
