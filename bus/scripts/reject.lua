-- use: _event
-- An entry of `jobs` that is no job: dead letter and an answer, once.
-- KEYS jobs, dead, out, events. ARGV entry, job, code, message, fields, out_ttl, dead_keep, '1' if there is an out-stream.
if #call('XRANGE', KEYS[1], ARGV[1], ARGV[1]) == 0 then
  return 0
end
call('XACK', KEYS[1], 'dispatcher', ARGV[1])
call('XDEL', KEYS[1], ARGV[1])
bury(KEYS[2], tonumber(ARGV[7]), 'jobs', ARGV[1], ARGV[3] .. ': ' .. ARGV[4], ARGV[5])
report(KEYS[4], 'refused', ARGV[2], ARGV[3], ARGV[4])
if ARGV[8] == '1' then
  send(KEYS[3], tonumber(ARGV[6]), 'type', 'end', 'job', ARGV[2], 'fence', '0.0', 'state', 'failed', 'reason', 'error',
    'text_len', 0, 'prompt_tokens', 0, 'new_tokens', 0, 'node', '', 'error_code', ARGV[3], 'error_message', ARGV[4],
    'retry_after_ms', 0, 'text', '')
end
return 1
