-- use: _change _able
-- A job waits, and of the nodes that serve its model none can do what it asks for: it ends. One that is known and away,
-- or has left, counts: it may come back. One that outgrew its nodes goes back to them when none with a larger context is
-- left, and ends there. ARGV 11 node_ttl.
-- Answers {'ended', state}, {'ended', state, 'earlier'}, {'returned'}, {'not', state}, {'moved'}, {'unknown'}.
local function without_words(words, others)
  local left = {}
  for word in string.gmatch(words, '%S+') do
    if not has_word(others, word) then
      left[#left + 1] = word
    end
  end
  return concat(left, ' ')
end

local answer = elsewhere()
if answer then
  answer[3] = 'earlier'
  return answer
end
local needs, node_ttl = needs_of(flags), tonumber(ARGV[11])
local outgrown = outgrown_of(job.outgrown)
if job.state ~= 'queued' or may_come_to_know(node_ttl) then
  return {'not', job.state}
end

if needs and call('ZCARD', prefix .. 'model:' .. job.model) > 0
  and count_known(prefix, job.model, needs, 1, job.refused) == 0 and not outgrown then
  local ended = end_job('failed', 'error', 'unsupported', unsupported(concat(needs, ', '), job.model))
  report(events_key, 'refused', job_id, 'unsupported', job.model)
  return ended
end
if outgrown and not has_larger(outgrown, node_ttl, true) then
  -- Those that refused it may take it again. Where none of them is left either, it goes on as any job whose node is gone.
  job.outgrown = job.outgrown == ENDS_ANYWHERE and '' or ENDS_ANYWHERE
  job.avoid, job.refused = without_words(job.avoid, job.refused), ''
  leave()
  call('HSET', job_key, 'outgrown', job.outgrown, 'avoid', job.avoid, 'refused', '')
  enqueue(0)
  report(events_key, 'requeued', job_id, 'outgrown', 'no node with a larger context is left')
  return {'returned'}
end
return {'not', job.state}
