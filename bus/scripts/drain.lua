-- The owner takes no more jobs. KEYS node. ARGV holder. Answers 1, or 0 if somebody else owns the node.
if call('HGET', KEYS[1], 'owner') ~= ARGV[1] then
  return 0
end
call('HDEL', KEYS[1], '') -- frees nothing: what follows must pass at maxmemory
-- Its own decision, not an operator's: a relay that takes the node next may put it up again.
call('HSET', KEYS[1], 'state', 'draining', 'drained_by', ARGV[1])
return 1
