-- use: _change _able
-- A job waits, and of the nodes that serve its model none can do what it asks for: it ends. One that is known and away,
-- or has left, counts: it may come back. ARGV 11 node_ttl. Answers {'ended', state}, {'not', state}, {'moved'}, {'unknown'}.
local answer = elsewhere()
if answer then
  answer[3] = 'earlier'
  return answer
end
local needs = needs_of(flags)
-- A job is driven again after the server lost everything: the nodes that live are known when each of them has beaten.
local since = sub(fence, -2) == '.r' and tonumber(string.match(queue_entry, '^%d+')) or 0
if since + tonumber(ARGV[11]) > now then
  return {'not', job.state}
end
if job.state ~= 'queued' or not needs or call('ZCARD', prefix .. 'model:' .. job.model) == 0
  or count_known(prefix, job.model, needs, 1, job.refused) > 0 then
  return {'not', job.state}
end
local ended = end_job('failed', 'error', 'unsupported', unsupported(concat(needs, ', '), job.model))
report(events_key, 'refused', job_id, 'unsupported', job.model)
return ended
