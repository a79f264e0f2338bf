-- Fix the id of a job by its idempotency key, before the submit. KEYS record. ARGV "<job id> <digest>", ttl ms.
-- Answers the record that holds.
local record = call('GET', KEYS[1])
if record then
  return record
end
call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return ARGV[1]
