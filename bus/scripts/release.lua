-- use: _change
-- A held-back job is due: to the head of the queues.
-- Answers {'released'}, {'not', state}, {'ended', state}, {'moved'}, {'unknown'}.
local answer = elsewhere()
if answer then
  if answer[1] ~= 'moved' then
    call('ZREM', late_key, job_id)
  end
  return answer
end
local due = call('ZSCORE', late_key, job_id)
if job.state ~= 'queued' or queue_entry ~= '' then
  call('ZREM', late_key, job_id)
  return {'not', job.state}
elseif due and tonumber(due) > now then
  return {'not', job.state}
end
call('ZREM', late_key, job_id)
enqueue(0)
return {'released'}
