-- use: _able
-- Reserve a node for each of up to 64 queued jobs. First all is read and decided, then written, deletions first.
-- KEYS leases, queue, then 4 a node (hash, running, load, jobs), then a pick's job and out, and, if it has been tried
-- before, the text and tokens of the old fence and of the new one, and its log probabilities of both.
-- ARGV prefix, model, unread_ms, alone_ms, out_ttl, load_ttl, nodes, node ids, picks, then a pick's entry, job, fence,
-- nonce, out, score, how many nodes, their indexes.
local leases_key, queue_key = KEYS[1], KEYS[2]
local prefix, model = ARGV[1], ARGV[2]
local unread_ms, alone_ms, out_ttl, load_ttl = tonumber(ARGV[3]), tonumber(ARGV[4]), tonumber(ARGV[5]), tonumber(ARGV[6])
local node_count = tonumber(ARGV[7])
local nodes = {}

-- Who has the node for himself: the job that waits for it to run empty, or runs alone on it. nil = nobody.
local function kept_for(key, id, running_key, alone, alone_until)
  if not filled(alone) then
    return nil
  end
  local j = call('HMGET', prefix .. 'job:' .. alone, 'state', 'place', 'fence')
  if j[1] == 'queued' and tonumber(alone_until or 0) > now then
    return alone
  end
  if j[1] == 'running' and string.match(j[2], ON_NODE) == id and call('ZSCORE', running_key, alone .. '/' .. j[3]) then
    return alone
  end
  return nil
end

local function load_node(index)
  local base = 2 + (index - 1) * 4
  local key = KEYS[base + 1]
  local h = call('HMGET', key, 'owner', 'state', 'models', 'capacity', 'resume', 'alone', 'alone_until', 'breaker_n',
    'breaker_until', 'breaker_probe', 'can', 'cannot')
  local id = ARGV[7 + index]
  local n = {id = id, key = key, running_key = KEYS[base + 2], load_key = KEYS[base + 3], jobs_key = KEYS[base + 4],
    owner = h[1], resume = h[5] or '', can = h[11], cannot = h[12], scores = {}, loads = {}}
  nodes[index] = n
  n.live = h[2] == 'up' and has_word(h[3], model) and is_live(prefix, key, h[1])
  if not n.live then
    return n
  end
  n.running = call('ZCARD', n.running_key)
  n.capacity = tonumber(h[4]) or 0
  n.alone = kept_for(key, id, n.running_key, h[6], h[7])
  if (tonumber(h[8]) or 0) > 0 then
    n.half_open = true
    n.shut = tonumber(h[9] or 0) > now or (filled(h[10]) and call('ZSCORE', n.running_key, h[10]))
  end
  return n
end

local function node_at(index)
  return nodes[index] or load_node(index)
end

local function may_take(n)
  return n.live and not n.shut and n.running < n.capacity
end

-- The node for a job that must run alone. Second answer: it waits for that node to run empty.
local function choose_alone(job_id, indexes, refused, needs)
  local mine, first
  for _, index in ipairs(indexes) do
    local n = node_at(index)
    if n.live and not n.shut and n.capacity > 0 and not has_word(refused, n.id) and is_able(n.can, n.cannot, needs) then
      if n.alone == job_id then
        mine = mine or n
      elseif not n.alone then
        if n.running == 0 and not mine then
          return n, false
        end
        if not first or n.running < first.running then
          first = n
        end
      end
    end
  end
  local n = mine or first
  if not n then
    return nil, false
  end
  return n, n.running > 0
end

-- Which nodes count for a job that outgrew a context, as dispatchers judge it, too; nil: all. An answer that has begun stays
-- with those that say theirs.
local function holds_for(outgrown, old_text)
  local tokens = outgrown_of(outgrown)
  return tokens and larger_than(tokens, not old_text or call('STRLEN', old_text) == 0)
end

-- refused: nodes that said they cannot; they are no choice even where there is no other. holds: of a context, whether it may
-- be large enough; a node to avoid is not passed over for one that is too small.
local function choose(avoid, indexes, refused, needs, holds)
  local passed_over = filled(avoid) and another_lives(prefix, model, avoid, needs, holds)
  for _, index in ipairs(indexes) do
    local n = node_at(index)
    if may_take(n) and not n.alone and not (passed_over and has_word(avoid, n.id)) and not has_word(refused, n.id)
      and is_able(n.can, n.cannot, needs) then
      return n
    end
  end
  return nil
end

local answers, chosen, dropped, marks = {}, {}, {}, {}
local key_at = 2 + node_count * 4
local arg_at = 8 + node_count
local pick_count = tonumber(ARGV[arg_at])
arg_at = arg_at + 1
local taken = {}

for i = 1, pick_count do
  local entry, job_id, fence, nonce, out, score, count = unpack(ARGV, arg_at, arg_at + 6)
  local indexes = {}
  for k = 1, tonumber(count) do
    indexes[k] = tonumber(ARGV[arg_at + 6 + k])
  end
  arg_at = arg_at + 7 + #indexes
  local p = {job_id = job_id, job = KEYS[key_at + 1], out = KEYS[key_at + 2], score = score, at = i, entry = entry}
  key_at = key_at + 2
  if fence ~= '0.0' then
    p.old_text, p.old_tokens, p.text, p.tokens, p.old_logprobs, p.logprobs = unpack(KEYS, key_at + 1, key_at + 6)
    key_at = key_at + 6
  end
  local h = call('HMGET', p.job, 'state', 'fence', 'route', 'place', 'spec', 'payload', 'alone', 'avoid', 'resume',
    'refused', 'outgrown')
  p.h = h
  if not h[1] then
    answers[i] = {'gone'}
    dropped[#dropped + 1] = entry
  elseif h[1] ~= 'queued' or select(2, string.match(h[4], IN_QUEUE)) ~= entry or taken[job_id] then
    answers[i] = {'not_queued'}
    dropped[#dropped + 1] = entry
  elseif h[2] ~= fence then
    answers[i] = {'changed'}
  elseif out_of(h[3]) ~= out then
    answers[i] = {'out', out_of(h[3])}
  else
    local n, waits, late
    local _, flags, _, _, _, deadline, est_prompt, est_new = string.match(h[5], SPEC)
    local needs = needs_of(flags)
    p.streams, p.scored = find(flags, 's', 1, true), find(flags, 'l', 1, true)
    if tonumber(deadline) <= now then
      late = true
    elseif filled(h[7]) then
      n, waits = choose_alone(job_id, indexes, h[10], needs)
      if n then
        n.alone = job_id
        marks[#marks + 1] = {n.key, job_id}
      end
    else
      n = choose(h[8], indexes, h[10], needs, holds_for(h[11], p.old_text))
    end
    if late then
      answers[i] = {'deadline'}
    elseif not n then
      answers[i] = needs and {'no_room', concat(needs, ' ')} or {'no_room'}
    elseif waits then
      answers[i] = {'alone'}
    else
      p.fence, p.node = string.match(fence, '^(%d+)') + 1 .. '.' .. nonce, n
      local member = job_id .. '/' .. p.fence
      n.running = n.running + 1
      if n.half_open then
        n.shut = true
        n.probe = member
      end
      n.scores[#n.scores + 1] = now + unread_ms
      n.scores[#n.scores + 1] = member
      n.loads[#n.loads + 1] = member
      n.loads[#n.loads + 1] = math.min(tonumber(est_prompt), 9999999) * 10000000 + math.min(tonumber(est_new), 9999999)
      taken[job_id] = true
      dropped[#dropped + 1] = entry
      chosen[#chosen + 1] = p
      answers[i] = {'assigned', p.fence, n.id}
    end
  end
end

if #dropped > 0 then
  call('XDEL', queue_key, unpack(dropped))
elseif #marks > 0 then
  relieve(leases_key)
end
for _, n in pairs(nodes) do
  if #n.scores > 0 then
    call('ZADD', n.running_key, unpack(n.scores))
    call('HSET', n.load_key, unpack(n.loads))
    keep(n.load_key, load_ttl)
    if n.probe then
      call('HSET', n.key, 'breaker_probe', n.probe)
    end
  end
end
for _, mark in ipairs(marks) do
  call('HSET', mark[1], 'alone', mark[2], 'alone_until', now + alone_ms)
end

-- Copy the progress to the new fence, so that a zombie of the old one could only write into a dead key.
-- Token ids go on only to a node of the same digest; elsewhere they are dropped for good.
local function copy_progress(p, resume)
  local text_len = call('STRLEN', p.old_text)
  local token_len = floor(call('STRLEN', p.old_tokens) / 4)
  if text_len > 0 then
    call('COPY', p.old_text, p.text, 'REPLACE')
    call('PEXPIRE', p.old_text, 60000)
  end
  if p.scored then
    -- Without text the attempt begins anew, and so do its log probabilities.
    if text_len > 0 then
      call('COPY', p.old_logprobs, p.logprobs, 'REPLACE')
    end
    call('PEXPIRE', p.old_logprobs, 60000)
  end
  if token_len > 0 then
    if filled(resume) and resume == p.node.resume then
      call('COPY', p.old_tokens, p.tokens, 'REPLACE')
      call('PEXPIRE', p.old_tokens, 60000)
      return text_len, token_len, resume
    end
    call('DEL', p.old_tokens)
  end
  return text_len, 0, text_len == 0 and p.node.resume or ''
end

for _, p in ipairs(chosen) do
  local h, n = p.h, p.node
  local text_len, token_len, resume = 0, 0, n.resume
  if p.old_text then
    text_len, token_len, resume = copy_progress(p, h[9])
  end
  local node_entry = call('XADD', n.jobs_key, '*', 'job', p.job_id, 'fence', p.fence, 'owner', n.owner, 'route', h[3],
    'spec', h[5], 'text_len', text_len, 'token_len', token_len, 'payload', h[6])
  call('HSET', p.job, 'state', 'running', 'fence', p.fence, 'place', concat({'node', n.id, n.owner, node_entry}, ' '),
    'score', p.score, 'resume', resume)
  -- Only frames are judged by the current fence; a job that does not stream has none, and its end names its own.
  if p.streams then
    send(p.out, out_ttl, 'type', 'marker', 'job', p.job_id, 'fence', p.fence, 'node', n.id, 'text_len', text_len,
      'token_len', token_len)
  end
end
return answers
