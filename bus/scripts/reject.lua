-- use: _event
-- An entry of `jobs` that is no job: dead letter and an answer, once. Where a job of its id exists, the answer is no end of
-- that job: it says `duplicate` with the job's state, as for a second entry that parses.
-- KEYS jobs, dead, out, events, job. ARGV entry, job, code, message, fields, out_ttl, dead_keep, '1' if there is an out-stream.
if #call('XRANGE', KEYS[1], ARGV[1], ARGV[1]) == 0 then
  return 0
end
-- Under pcall: what is refused may be just that the job's key is of another type.
local first = try('HGET', KEYS[5], 'state')
local state, reason, code, message = 'failed', 'error', ARGV[3], ARGV[4]
if type(first) == 'string' then
  state, reason, code = 'duplicate', first, 'duplicate'
  message = 'a job with this id exists; it is ' .. first .. '. This entry was no job: ' .. ARGV[4]
end
call('XACK', KEYS[1], 'dispatcher', ARGV[1])
call('XDEL', KEYS[1], ARGV[1])
bury(KEYS[2], tonumber(ARGV[7]), 'jobs', ARGV[1], ARGV[3] .. ': ' .. ARGV[4], ARGV[5])
report(KEYS[4], 'refused', ARGV[2], ARGV[3], ARGV[4])
if ARGV[8] == '1' then
  send(KEYS[3], tonumber(ARGV[6]), 'type', 'end', 'job', ARGV[2], 'fence', '0.0', 'state', state, 'reason', reason,
    'text_len', 0, 'prompt_tokens', 0, 'new_tokens', 0, 'node', '', 'error_code', code, 'error_message', message,
    'retry_after_ms', 0, 'text', '')
end
return 1
