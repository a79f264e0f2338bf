-- use: _change _able
-- A job waits, and of the nodes that serve its model none can do what it asks for: it ends. One that is known and away,
-- or has left, counts: it may come back. One that outgrew its nodes goes back to any of them when none with a larger
-- context is left, and ends there. ARGV 11 node_ttl.
-- Answers {'ended', state}, {'ended', state, 'earlier'}, {'returned'}, {'not', state}, {'moved'}, {'unknown'}.
local answer = elsewhere()
if answer then
  answer[3] = 'earlier'
  return answer
end
local needs, node_ttl = needs_of(flags), tonumber(ARGV[11])
local outgrown = tonumber(job.outgrown)
-- A job is driven again after the server lost everything: the nodes that live are known when each of them has beaten.
local since = sub(fence, -2) == '.r' and tonumber(string.match(queue_entry, '^%d+')) or 0
if job.state ~= 'queued' or since + node_ttl > now then
  return {'not', job.state}
end

if needs and call('ZCARD', prefix .. 'model:' .. job.model) > 0
  and count_known(prefix, job.model, needs, 1, job.refused) == 0 and not outgrown then
  local ended = end_job('failed', 'error', 'unsupported', unsupported(concat(needs, ', '), job.model))
  report(events_key, 'refused', job_id, 'unsupported', job.model)
  return ended
end
if outgrown and not has_larger(outgrown, node_ttl, true) then
  job.outgrown, job.refused = ENDS_ANYWHERE, ''
  leave()
  call('HSET', job_key, 'outgrown', job.outgrown, 'refused', '')
  enqueue(0)
  report(events_key, 'requeued', job_id, 'outgrown', 'no node with a larger context is left')
  return {'returned'}
end
return {'not', job.state}
