-- use: _change
-- The deadline has passed: ended, queued or running; a worker is told to stop.
-- Answers {'ended', state}, {'not', state}, {'moved'}, {'unknown'}.
local answer = elsewhere()
if answer then
  if answer[1] ~= 'moved' then
    call('ZREM', deadlines_key, job_id)
    call('ZREM', late_key, job_id)
    answer[3] = 'earlier'
  end
  return answer
end
if tonumber(job.deadline) > now then
  return {'not', job.state}
end
local running = job.state == 'running'
local ended
if job.cancel ~= '' then
  ended = end_job('cancelled', 'cancelled', '', '')
else
  local message = running and 'the deadline passed while the job was running'
    or 'the deadline passed before a node had room'
  ended = end_job('failed', 'error', 'deadline_exceeded', message)
end
if running then
  tell_worker()
end
return ended
