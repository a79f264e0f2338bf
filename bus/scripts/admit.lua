-- use: _create _event
-- A plain producer's entry becomes a job, or gets its error: once, because the entry goes in the same script.
-- KEYS 15 jobs, 16 dead. ARGV 24 entry, 25 out_ttl, 26 dead_keep, 27 front_door_max, then codes of refusals, each with
-- its sentence, in which {model}, {detail} and {figure} stand for what is known here.
-- Answers as submit for one job, or {'gone'}.
local front_key, dead_key = KEYS[15], KEYS[16]
local entry_id, out_ttl, dead_keep, front_max = ARGV[24], tonumber(ARGV[25]), tonumber(ARGV[26]), tonumber(ARGV[27])
local j = job_at(1)
if #call('XRANGE', front_key, entry_id, entry_id) == 0 then
  return {'gone'}
end

local function sentence(why)
  for i = 28, #ARGV, 2 do
    if ARGV[i] == why[1] then
      return (string.gsub(ARGV[i + 1], '{(%a+)}', {model = model, detail = why[3], figure = why[4]}))
    end
  end
  return why[1]
end

local function take_away()
  call('XACK', front_key, 'dispatcher', entry_id)
  call('XDEL', front_key, entry_id)
end

local function say(state, reason, code, message, retry_after)
  send(j.out_key, out_ttl, 'type', 'end', 'job', j.id, 'fence', '0.0', 'state', state, 'reason', reason, 'text_len', 0,
    'prompt_tokens', 0, 'new_tokens', 0, 'node', '', 'error_code', code, 'error_message', message,
    'retry_after_ms', retry_after, 'text', '')
end

local found = existing(j)
if found then
  take_away()
  say('duplicate', found[2], 'duplicate', 'a job with this id exists; it is ' .. found[2], 0)
  return found
end
local length = call('XLEN', queue_key)
local kind = call('TYPE', j.out_key).ok
local why
if kind ~= 'none' and kind ~= 'stream' then
  why = {'bad_reply', 0, kind, 0}
elseif call('XLEN', front_key) > front_max then
  why = {'full', wait_for(front_max * 0.1), '', front_max}
else
  why = refusal(j, length)
end
if why then
  take_away()
  local code = why[1] == 'queue_full' and 'full' or why[1]
  local message = sentence(why)
  say('failed', 'error', code, message, why[2])
  bury(dead_key, dead_keep, 'jobs', entry_id, code .. ': ' .. message, j.id)
  return refuse(j, why)
end
take_away()
local answer = create(j)
announce(j)
return answer
