-- use: _change _able
-- A job waits, and of the nodes that serve its model none can do what it asks for: it ends. One that is known and away
-- counts: it may come back. Answers {'ended', state}, {'not', state}, {'moved'}, {'unknown'}.
local answer = elsewhere()
if answer then
  answer[3] = 'earlier'
  return answer
end
local needs = needs_of(flags)
if job.state ~= 'queued' or not needs or call('ZCARD', prefix .. 'model:' .. job.model) == 0
  or count_able(prefix, job.model, needs, '-inf', 1) > 0 then
  return {'not', job.state}
end
local ended = end_job('failed', 'error', 'unsupported', unsupported(concat(needs, ', '), job.model))
report(events_key, 'refused', job_id, 'unsupported', job.model)
return ended
