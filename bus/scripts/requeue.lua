-- use: _change
-- Hand a running attempt back. The only rule that retries a job.
-- why: crash | node_error | unable | outgrown | drain | unread | relay_lost, or `expired` and `down`, which are resolved here.
-- lacks: what the node of an `unable` cannot do for any job, '' if only this one was refused.
-- context: of the node of an `outgrown`, in tokens, 0 if it does not say.
-- Answers {'requeued', why, due, alone}, {'ended', state}, {'ended', state, 'earlier'}, {'not', state}, {'moved'}, {'unknown'},
-- {'largest'}: it outgrew this node, and no other has a larger context; nothing was changed.
local why, detail = ARGV[11], ARGV[12]
local backoff_ms, node_errors_max, crashes_max, breaker_ms, breaker_max = tonumber(ARGV[13]), tonumber(ARGV[14]),
  tonumber(ARGV[15]), tonumber(ARGV[16]), tonumber(ARGV[17])
local lacks, context, node_ttl = ARGV[18], tonumber(ARGV[19]), tonumber(ARGV[20])

local function is_held()
  local score = call('ZSCORE', running_key, member)
  return score and tonumber(score) > now
end

-- Whether the worker had the entry. A poison job may kill it before a renewal or a flush has said `started`; counted as
-- unread, it would kill one worker after another for ever.
local function was_read()
  local pending = redis.pcall('XPENDING', jobs_key, 'workers', node_entry, node_entry, 1)
  return not pending.err and #pending > 0
end

local answer = elsewhere()
if answer then
  answer[3] = 'earlier'
  return answer
elseif job.state ~= 'running' or (why == 'expired' and is_held()) then
  return {'not', job.state}
end

local refuses = why == 'unable' or why == 'outgrown'
local avoid_node = why == 'node_error' or refuses
if why == 'expired' or why == 'down' then
  if job.started == '' and not (why == 'down' and was_read()) then
    -- A worker that lives but does not read must not get the same job again and again.
    avoid_node = why == 'expired'
    why = 'unread'
  else
    local kind, state = unpack(call('HMGET', node_key, 'kind', 'state'))
    if state == 'bye' then
      why = 'drain' -- it left on purpose: nobody's fault
    elseif kind == 'http' then
      why = 'relay_lost'
    else
      why = 'crash'
    end
  end
end
local counted = why
local losses = tonumber(job.relay_losses) or 0
if why == 'relay_lost' then
  losses = losses + 1
  counted = losses > 2 and 'crash' or why
end

if job.cancel ~= '' then
  return end_job('cancelled', 'cancelled', '', '')
elseif tonumber(job.deadline) <= now then
  return end_job('failed', 'error', 'deadline_exceeded', 'the deadline passed before the job could be run again')
end

if avoid_node then
  job.avoid = with_word(job.avoid, node)
end
if refuses then
  job.refused = with_word(job.refused, node)
end

if why == 'outgrown' then
  local tokens = math.max(context, tonumber(job.outgrown) or 0)
  if job.outgrown == ENDS_ANYWHERE or not has_larger(tokens, node_ttl, context > 0) then
    return {'largest'}
  end
  job.outgrown = tokens
end

-- The node is not asked for this again for a while: others of its kind go elsewhere, or are refused at once.
local function note_refusal()
  if lacks == '' or call('EXISTS', node_key) == 0 then
    return
  end
  local words = {lacks .. ':' .. now + breaker_max}
  for name, until_ms in string.gmatch(call('HGET', node_key, 'cannot') or '', '(%S+):(%d+)') do
    if name ~= lacks and tonumber(until_ms) > now then
      words[#words + 1] = name .. ':' .. until_ms
    end
  end
  call('HSET', node_key, 'cannot', concat(words, ' '))
end

-- The job is not sent back to who has refused it: when no other node is known that can do it, it ends. One that it only
-- avoids, for an error that may pass, counts, and one that is away or restarts is waited for.
local needs = needs_of(flags)
if why == 'unable' and not may_come_to_know(node_ttl) and count_known(prefix, job.model, needs, 1, job.refused) == 0 then
  local ended = end_job('failed', 'error', 'unsupported',
    unsupported(concat(needs or {}, ', '), job.model) .. ' (' .. node .. ': ' .. detail .. ')')
  note_refusal()
  account(node_key, 0, 0, 1, 0, 0)
  report(events_key, 'refused', job_id, 'unsupported', node .. ': ' .. detail)
  return ended
end

local crashes = (tonumber(job.crashes) or 0) + (counted == 'crash' and 1 or 0)
local errors = (tonumber(job.node_errors) or 0) + (counted == 'node_error' and 1 or 0)

-- A dead process fails once in its node's record, however many jobs it held.
local function account_failure()
  if counted == 'node_error' then
    account(node_key, 0, 1, 0, breaker_ms, breaker_max)
  elseif why == 'crash' and call('EXISTS', node_key) == 1 and call('HGET', node_key, 'crash_owner') ~= job.owner then
    call('HSET', node_key, 'crash_owner', job.owner)
    account(node_key, 0, 1, 0, 0, 0)
  end
end

if counted == 'crash' and crashes >= crashes_max then
  local ended = end_job('failed', 'error', 'crashed', 'the job was running each time its worker died: ' .. detail)
  account_failure()
  call('HSET', job_key, 'crashes', crashes)
  bury(dead_key, dead_keep, 'job', job_id, 'crash', detail)
  report(events_key, 'dead_letter', job_id, 'crash', node)
  return ended
elseif counted == 'node_error' and errors >= node_errors_max then
  local ended = end_job('failed', 'error', 'node_error', detail)
  account_failure()
  call('HSET', job_key, 'node_errors', errors)
  bury(dead_key, dead_keep, 'job', job_id, 'node_error', detail)
  report(events_key, 'dead_letter', job_id, 'node_error', node)
  return ended
end

leave()
local due = 0
if counted == 'node_error' then
  due = now + backoff_ms * 2 ^ (errors - 1)
end
if crashes >= 2 then
  job.alone = '1'
end
call('HSET', job_key, 'crashes', crashes, 'node_errors', errors, 'relay_losses', losses, 'avoid', job.avoid,
  'alone', job.alone)
if refuses then
  call('HSET', job_key, 'refused', job.refused, 'outgrown', job.outgrown)
end
enqueue(due)
account_failure()
note_refusal()
report(events_key, 'requeued', job_id, why, node .. ': ' .. detail)
return {'requeued', why, due, job.alone}
