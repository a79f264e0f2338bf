-- use: _change
-- queued: ended at once. running: flag and control entry; the slot is held until the worker's finish.
-- Answers {'ended', state}, {'cancelling'}, {'gateway', name}, {'kept'}, {'moved'}, {'unknown'}, {'ended', state, 'earlier'}.
local by, only_gateway, lapsed = ARGV[11], ARGV[12], ARGV[13] == '1'

local answer = elsewhere()
if answer then
  answer[3] = 'earlier'
  return answer
end
if only_gateway ~= '' and gateway_of(job.route) ~= only_gateway then
  return {'gateway', gateway_of(job.route)}
end
if lapsed then
  -- On behalf of a gateway that is gone: unless it came back meanwhile, and only if its job does not want to be kept.
  local lease = call('ZSCORE', prefix .. 'leases', only_gateway)
  if (lease and tonumber(lease) > now) or job.policy ~= 'cancel' then
    return {'kept'}
  end
end
if job.state == 'queued' then
  return end_job('cancelled', 'cancelled', '', '')
end
relieve(late_key)
call('HSET', job_key, 'cancel', by)
tell_worker()
return {'cancelling'}
