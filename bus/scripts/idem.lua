-- Fix the id of a job by its idempotency key, before the submit. KEYS record. ARGV "<job id> <digest>", the job's deadline
-- as ms from now and, if that is not 0, as a time, and how long after it the record stands.
-- Answers the record that holds.
local record = call('GET', KEYS[1])
if record then
  return record
end
local deadline = tonumber(ARGV[3])
if deadline == 0 then
  deadline = now + ARGV[2]
end
call('SET', KEYS[1], ARGV[1], 'PX', math.max(1, deadline + ARGV[4] - now))
return ARGV[1]
