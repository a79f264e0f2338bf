-- use: _event
-- A foreign entry of any stream: to the dead letters, then away with it, so that nobody reads it again.
-- KEYS dead, source. ARGV entry, reason, fields, group or '', dead_keep, source's name.
if #call('XRANGE', KEYS[2], ARGV[1], ARGV[1]) == 0 then
  return 0
end
if ARGV[4] ~= '' then
  call('XACK', KEYS[2], ARGV[4], ARGV[1])
end
call('XDEL', KEYS[2], ARGV[1])
bury(KEYS[1], tonumber(ARGV[5]), ARGV[6], ARGV[1], ARGV[2], ARGV[3])
return 1
