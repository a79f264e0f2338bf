-- use: _event _node _able
-- What requeue, cancel, expire and release share: the keys of one job, wherever it is, and its end.
-- The caller has read fence, route and place from the job; when they have changed since, `moved`: read again.
local job_key, out_key, set_key, usage_key, quota_key, payload_key, text_key, tokens_key, deadlines_key, late_key,
  queue_key, again_key, queues_key, wake_key, node_key, running_key, load_key, jobs_key, control_key, dead_key,
  events_key, logprobs_key = unpack(KEYS, 1, 22)
local job_id, fence, route, place, prefix = unpack(ARGV, 1, 5)
local out_ttl, result_ttl, text_max, dead_keep, node_keep = tonumber(ARGV[6]), tonumber(ARGV[7]), tonumber(ARGV[8]),
  tonumber(ARGV[9]), tonumber(ARGV[10])
local member = job_id .. '/' .. fence

local names = {'state', 'fence', 'route', 'place', 'spec', 'cancel', 'started', 'crashes', 'node_errors',
  'relay_losses', 'avoid', 'alone', 'resume', 'refused', 'outgrown'}
local values = call('HMGET', job_key, unpack(names))
local job = {}
for i, name in ipairs(names) do
  job[name] = values[i] or ''
end
local flags
job.model, flags, job.policy, job.seed, job.created, job.deadline, job.est_prompt, job.est_new = string.match(job.spec, SPEC)
local streams, remembered = find(flags or '', 's', 1, true), find(flags or '', 'i', 1, true)
local scored = find(flags or '', 'l', 1, true)
local node, node_entry, queue_entry = '', '', ''
node, job.owner, node_entry = string.match(job.place, ON_NODE)
node = node or ''
if node == '' then
  queue_entry = select(2, string.match(job.place, IN_QUEUE)) or ''
end

-- nil if the job is where the caller thinks and not ended, else the answer.
local function elsewhere()
  if job.state == '' then
    return {'unknown'}
  elseif job.state ~= 'queued' and job.state ~= 'running' then
    return {'ended', job.state}
  elseif job.fence ~= fence or job.route ~= route or job.place ~= place then
    return {'moved'}
  end
  return nil
end

-- The freeing commands, first of all writes: reservation and node entry, or place in the queue.
local function leave()
  if job.state == 'running' then
    call('ZREM', running_key, member)
    call('HDEL', load_key, member)
    call('XACK', jobs_key, 'workers', node_entry)
    call('XDEL', jobs_key, node_entry)
  else
    if queue_entry ~= '' then
      call('XDEL', queue_key, queue_entry)
    end
    call('ZREM', late_key, job_id)
  end
end

local function tell_worker()
  call('XADD', control_key, 'MAXLEN', '~', 1000, '*', 'type', 'cancel', 'job', job_id, 'fence', fence)
  keep(control_key, node_keep)
end

local function wake(queue_name, id)
  call('XADD', wake_key, 'MAXLEN', '~', 1000, '*', 'queue', queue_name, 'job', id)
end

-- Only text counts: tokens that have shown none yet are made again by whoever takes the job.
local function has_begun()
  return call('STRLEN', text_key) > 0
end

-- A job is driven again after the server lost everything: the nodes that live are known when each of them has beaten.
local function may_come_to_know(node_ttl)
  return find(flags or '', 'r', 1, true) and tonumber(job.created) + node_ttl > now
end

-- The largest context among the model's nodes whose last beat is no older than `since` (nil: among all that are known), and
-- whether one says none. At least that: nodes that a job has been refused by count, too, and a small fleet is not looked
-- through. What was seen of a large one stands while it has as many such nodes.
local function largest_of(since)
  local model_key = prefix .. 'model:' .. job.model
  if call('ZCARD', model_key) <= MANY then
    return math.huge, true
  end
  local count = call('ZCOUNT', model_key, since or '-inf', '+inf')
  local key = prefix .. (since and 'largest:recent:' or 'largest:known:') .. job.model
  local seen = try('GET', key)
  local largest, unsaid = string.match(type(seen) == 'string' and seen or '', '^(%d+) (%d) ' .. count .. '$')
  if not largest then
    largest, unsaid = 0, '0'
    count_known(prefix, job.model, nil, 1, '', function(context)
      largest = math.max(largest, tonumber(context) or 0)
      unsaid = says_none(context) and '1' or unsaid
    end, since)
    try('SET', key, concat({largest, unsaid, count}, ' '), 'PX', SEEN_MS)
  end
  return tonumber(largest), unsaid == '1'
end

-- Whether a job that outgrew contexts of `tokens` may go on at a node that has not refused it. A prompt waits for every
-- node that is known to hold more. An answer that has begun waits only for one that was there a moment ago, else it ends as
-- `length`; so does a prompt of which no size is known (0), because a node that is away may hold far less. unsaid: a prompt
-- may also be tried where no context is said.
local function has_larger(tokens, node_ttl, unsaid)
  if may_come_to_know(node_ttl) then
    return true
  end
  local began, needs, recent = has_begun(), needs_of(flags), now - node_ttl
  local since = (began or tokens == 0) and recent or nil
  if largest_of(since) > tokens and count_known(prefix, job.model, needs, 1, job.refused, larger_than(tokens), since) > 0 then
    return true
  end
  return unsaid and not began and select(2, largest_of(recent))
    and count_able(prefix, job.model, needs, recent, 1, job.refused, says_none) > 0
end

-- The one terminal. Whatever was stored of the text stays as the result. Accounts are written under pcall: a key of
-- another type, or a full count, must not keep a job from its end.
local function end_job(state, reason, code, message)
  leave()
  call('ZREM', deadlines_key, job_id)
  if set_key ~= job_key then
    try('SREM', set_key, job_id)
  end
  if quota_key ~= job_key then
    try('ZREM', quota_key, job_id)
  end
  -- Nobody reports what an attempt made that does not finish: as many as are stored.
  local new_tokens = floor(call('STRLEN', tokens_key) / 4)
  call('DEL', tokens_key, payload_key)
  local ttl = remembered and math.max(result_ttl, call('PTTL', job_key)) or result_ttl
  local text_len = call('STRLEN', text_key)
  if text_len > 0 then
    call('PEXPIRE', text_key, ttl)
  end
  if scored then
    call('PEXPIRE', logprobs_key, ttl)
  end
  call('HSET', job_key, 'state', state, 'payload', '', 'result', concat({reason, 0, new_tokens, now, node}, ' '),
    'error_code', code, 'error_message', message)
  call('PEXPIRE', job_key, ttl)
  if usage_key ~= job_key then
    try('HINCRBY', usage_key, 'jobs', 1)
    if new_tokens > 0 then
      try('HINCRBY', usage_key, 'new_tokens', new_tokens)
    end
  end
  local whole = ''
  if not streams and text_len > 0 and text_len <= text_max then
    whole = call('GET', text_key)
  end
  send(out_key, out_ttl, 'type', 'end', 'job', job_id, 'fence', fence, 'state', state, 'reason', reason,
    'text_len', text_len, 'prompt_tokens', 0, 'new_tokens', new_tokens, 'node', node, 'error_code', code,
    'error_message', message, 'retry_after_ms', 0, 'text', whole)
  if node ~= '' then
    wake('', '')
  end
  return {'ended', state}
end

-- Back to the head queue, or held back until `due`.
local function enqueue(due)
  local name = job.model .. ':0'
  local entry = ''
  if due > 0 then
    call('ZADD', late_key, due, job_id)
  else
    local resume = job.resume ~= '' and call('STRLEN', tokens_key) > 0 and job.resume or ''
    local needs = needs_of(flags)
    local asks = needs and {'needs', concat(needs, ' ')} or {}
    local outgrown, begun = outgrown_of(job.outgrown) or '', has_begun() and 1 or ''
    for _, said in ipairs({{'refused', job.refused}, {'outgrown', outgrown}, {'begun', begun}}) do
      if said[2] ~= '' then
        asks[#asks + 1] = said[1]
        asks[#asks + 1] = said[2]
      end
    end
    entry = call('XADD', again_key, '*', 'job', job_id, 'fence', fence, 'out', out_of(route), 'est_prompt',
      job.est_prompt, 'est_new', job.est_new, 'deadline', job.deadline, 'alone', job.alone, 'avoided', job.avoid,
      'resume', resume, unpack(asks))
    call('SADD', queues_key, name)
  end
  call('HSET', job_key, 'state', 'queued', 'place', entry == '' and 'queue ' .. name or 'queue ' .. name .. ' ' .. entry,
    'started', '')
  wake(due > 0 and '' or name, due > 0 and '' or job_id)
end
