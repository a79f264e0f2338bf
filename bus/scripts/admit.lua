-- use: _create
-- A plain producer's entry becomes a job, or gets its error: once, because the entry goes in the same script.
-- KEYS 14 jobs, 15 dead. ARGV 23 entry, 24 out_ttl, 25 dead_keep, 26 front_door_max.
-- Answers as submit, or {'gone'}.
local front_key, dead_key = KEYS[14], KEYS[15]
local entry_id, out_ttl, dead_keep, front_max = ARGV[23], tonumber(ARGV[24]), tonumber(ARGV[25]), tonumber(ARGV[26])
if #call('XRANGE', front_key, entry_id, entry_id) == 0 then
  return {'gone'}
end

local function take_away()
  call('XACK', front_key, 'dispatcher', entry_id)
  call('XDEL', front_key, entry_id)
end

local function say(state, reason, code, message, retry_after)
  send(out_key, out_ttl, 'type', 'end', 'job', job_id, 'fence', '0.0', 'state', state, 'reason', reason, 'text_len', 0,
    'prompt_tokens', 0, 'new_tokens', 0, 'node', '', 'error_code', code, 'error_message', message,
    'retry_after_ms', retry_after, 'text', '')
end

local found = existing()
if found then
  take_away()
  say('duplicate', found[2], 'duplicate', 'a job with this id exists; it is ' .. found[2], 0)
  return found
end
local waiting = call('XLEN', queue_key)
local kind = call('TYPE', out_key).ok
local answer
if kind ~= 'none' and kind ~= 'stream' then
  answer = {'refused', 'bad_reply', 0, kind, 0}
elseif call('XLEN', front_key) > front_max then
  answer = {'refused', 'full', wait_for(prefix, model, front_max * 0.1), '', front_max}
else
  answer = refusal(waiting)
end
if answer then
  take_away()
  refuse(answer)
  local code = answer[2] == 'queue_full' and 'full' or answer[2]
  say('failed', 'error', code, 'refused: ' .. code .. ' ' .. model .. ' ' .. answer[4], answer[3])
  bury(dead_key, dead_keep, 'jobs', entry_id, code, job_id)
  return answer
end
take_away()
local fence, deadline = create(waiting)
return {'new', 'queued', fence, deadline}
