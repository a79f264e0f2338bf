-- use: _able
-- New jobs of one queue, for `submit` and `admit`.
-- KEYS 1..7 queue, wake, deadlines, queues, model, events, unable, then a job's job, out, gateway's set, quota, idem, text, payload;
-- where it has none of them, the job's own key.
-- ARGV 1..7 queue, model, prefix, queue_max, node_ttl, job_keep, jobs, then a job's id, route, policy, stream flag, seed,
-- est_prompt, est_new, payload, deadline_in, deadline_at, quota_max, idem record behind the
-- ms that it outlives the deadline by, redrive, attempt floor, shown text, gateway.
local queue_key, wake_key, deadlines_key, queues_key, model_key, events_key, unable_key = unpack(KEYS, 1, 7)
local queue, model, prefix = ARGV[1], ARGV[2], ARGV[3]
local job_keep = tonumber(ARGV[6])
local COMMON_KEYS, COMMON_ARGS, KEYS_EACH, ARGS_EACH = 7, 7, 7, 16

-- The k-th job as its caller describes it.
local function job_at(k)
  local at, from = COMMON_KEYS + (k - 1) * KEYS_EACH, COMMON_ARGS + (k - 1) * ARGS_EACH
  local j = {}
  j.key, j.out_key, j.set_key, j.quota_key, j.idem_key, j.text_key, j.payload_key = unpack(KEYS, at + 1, at + KEYS_EACH)
  j.id, j.route, j.policy, j.stream, j.seed, j.est_prompt, j.est_new, j.payload, j.deadline_in, j.deadline_at, j.quota_max,
    j.idem, j.redrive, j.floor, j.shown, j.gateway = unpack(ARGV, from + 1, from + ARGS_EACH)
  j.idem_extra, j.idem = string.match(j.idem, '^(%d+) (.+)$')
  j.needs = needs_of(j.stream)
  return j
end

-- The job of this id, if there is one.
local function existing(j)
  local h = call('HMGET', j.key, 'state', 'fence', 'spec', 'route')
  if not h[1] then
    return nil
  end
  local _, _, _, _, _, deadline = string.match(h[3], SPEC)
  return {'existing', h[1], h[2], deadline, h[4]}
end

-- The record under the job's idempotency key, if another job has it since.
local function other_record(j)
  local record = j.idem and call('GET', j.idem_key)
  return record and record ~= j.idem and record or nil
end

-- Why no node can serve the model: {code, wait ms, detail, figure}. Cold, so its parts are only made here.
local function no_server(node_ttl)
  -- "0-3, 7": the layers that no living node of the model holds.
  local function missing_layers()
    local held, count = {}, 0
    for _, id in ipairs(call('ZRANGEBYSCORE', model_key .. ':parts', now - node_ttl, '+inf')) do
      local h = call('HMGET', prefix .. 'node:' .. id, 'layers', 'layer_count')
      for layer in string.gmatch(h[1] or '', '%d+') do
        held[tonumber(layer)] = true
        count = math.max(count, tonumber(layer) + 1)
      end
      count = math.max(count, tonumber(h[2] or 0) or 0)
    end
    local ranges, from = {}, nil
    for layer = 0, count do
      if layer < count and not held[layer] then
        from = from or layer
      elseif from then
        ranges[#ranges + 1] = from == layer - 1 and tostring(from) or (from .. '-' .. (layer - 1))
        from = nil
      end
    end
    return concat(ranges, ', '), count
  end

  if call('ZCOUNT', model_key .. ':parts', now - node_ttl, '+inf') > 0 then
    local missing, count = missing_layers()
    return {'uncovered', node_ttl, missing, count}
  end
  local known = call('ZCARD', model_key)
  return {known > 0 and 'no_node' or 'no_model', node_ttl, '', known}
end

-- nil, or the same where living nodes serve the model and none of them can do what the job asks for. A large fleet is
-- looked through once in SEEN_MS, however many such jobs are refused.
local function no_able(needs, node_ttl)
  local asked = concat(needs, ', ')
  local many = call('ZCARD', model_key) > MANY
  local seen = many and try('GET', unable_key)
  local known = type(seen) == 'string' and string.match(seen, '^(%d+) ' .. asked .. '$')
  if not known then
    if count_able(prefix, model, needs, now - node_ttl, 1) > 0 then
      return nil
    end
    known = count_known(prefix, model, needs, 1000)
    if many then
      try('SET', unable_key, known .. ' ' .. asked, 'PX', SEEN_MS)
    end
  end
  known = tonumber(known)
  if known > 0 then
    return {'no_node', node_ttl, ' with ' .. asked, known}
  end
  return {'unsupported', 0, asked, 0}
end

-- Jobs that the model's living nodes ended per second of the last half minute: 64 of them speak for all.
local rate
local function done_rate()
  local sum, living = 0, call('ZRANGEBYSCORE', model_key, now - ARGV[5], '+inf', 'LIMIT', 0, 64)
  for _, id in ipairs(living) do
    local h = call('HMGET', prefix .. 'node:' .. id, 'done_rate', 'done_ms')
    if filled(h[1]) and filled(h[2]) then
      sum = sum + tonumber(h[1]) * math.exp(-(now - tonumber(h[2])) / 30000)
    end
  end
  if #living == 64 then
    sum = sum * call('ZCOUNT', model_key, now - ARGV[5], '+inf') / 64
  end
  return sum
end

-- An honest wait: until `count` jobs have ended; 1 s .. 60 s, 5 s when nothing is known.
local function wait_for(count)
  rate = rate or done_rate()
  if rate < 0.001 then
    return 5000
  end
  return floor(math.max(1000, math.min(60000, count * 1000 / rate)))
end

-- nil, or why the job cannot be taken: {code, wait ms, detail, figure}. `waiting` counts this call's jobs in.
local served
local unable = {} -- looked for once in a call for all jobs that ask for the same: false, or why they are refused
local function refusal(j, waiting)
  if j.redrive == '1' then
    return nil
  end
  if served == nil then
    served = call('ZCOUNT', model_key, now - ARGV[5], '+inf') > 0
  end
  if not served then
    return no_server(tonumber(ARGV[5]))
  end
  if j.needs then
    local asked = concat(j.needs, ' ')
    if unable[asked] == nil then
      unable[asked] = no_able(j.needs, tonumber(ARGV[5])) or false
    end
    if unable[asked] then
      return unable[asked]
    end
  end
  if waiting >= tonumber(ARGV[4]) then
    return {'queue_full', wait_for(waiting * 0.1), '', waiting}
  end
  local quota_max = tonumber(j.quota_max)
  if quota_max > 0 then
    local held = call('ZCOUNT', j.quota_key, '(' .. now, '+inf')
    if held >= quota_max then
      return {'quota_full', wait_for(1), '', held}
    end
  end
  return nil
end

-- A refused submit takes its idempotency record with it.
local function refuse(j, why)
  if j.idem and call('GET', j.idem_key) == j.idem then
    call('DEL', j.idem_key)
  end
  try('XADD', events_key, 'MAXLEN', '~', 5000, '*', 'type', 'refused', 'subject', j.id, 'why', why[1], 'detail', model)
  return {'refused', why[1], why[2], why[3], why[4]}
end

-- Written once for all jobs of the call, after them.
local deadlines, sets = {}, {}

local function create(j)
  local deadline = tonumber(j.deadline_at)
  if deadline == 0 then
    deadline = now + j.deadline_in
  end
  j.fence = j.floor .. (j.redrive == '1' and '.r' or '.0')
  j.deadline = deadline
  j.asks = j.needs and {'needs', concat(j.needs, ' ')} or {}
  j.entry = call('XADD', queue_key, '*', 'job', j.id, 'fence', j.fence, 'out', out_of(j.route), 'est_prompt', j.est_prompt,
    'est_new', j.est_new, 'deadline', deadline, 'alone', '', 'avoided', '', 'resume', '', unpack(j.asks))
  local big = #j.payload > 8192
  local flags = j.stream .. (j.idem and 'i' or '') .. (big and 'b' or '') .. (j.redrive == '1' and 'r' or '')
  call('HSET', j.key, 'state', 'queued', 'fence', j.fence, 'route', j.route, 'place', 'queue ' .. queue .. ' ' .. j.entry,
    'spec', concat({model, flags == '' and '-' or flags, j.policy, j.seed, now, deadline, j.est_prompt, j.est_new}, ' '),
    'payload', big and '' or j.payload)
  call('PEXPIREAT', j.key, deadline + job_keep)
  if big then
    call('SET', j.payload_key, j.payload, 'PX', math.max(1, deadline + job_keep - now))
  end
  if j.idem then
    -- A twin that was refused has taken the record with it.
    call('SET', j.idem_key, j.idem, 'PX', math.max(1, deadline + j.idem_extra - now), 'NX')
  end
  if j.shown ~= '' then
    call('SET', j.text_key, j.shown, 'PX', math.max(1, deadline + job_keep - now))
  end
  if j.quota_key ~= j.key then
    try('ZREMRANGEBYSCORE', j.quota_key, '-inf', now)
    try('ZADD', j.quota_key, deadline, j.id)
    keep(j.quota_key, math.max(60000, deadline - now + 120000))
  end
  deadlines[#deadlines + 1] = deadline
  deadlines[#deadlines + 1] = j.id
  if j.gateway ~= '' then
    local set = sets[j.set_key]
    if not set then
      set = {ttl = 60000}
      sets[j.set_key] = set
    end
    set[#set + 1] = j.id
    set.ttl = math.max(set.ttl, deadline - now + job_keep)
  end
  return {'new', 'queued', j.fence, deadline}
end

-- The indexes of new jobs, and one wake for all; that of a lone job carries its queue entry, so that a dispatcher that knows
-- the nodes need not look.
local function announce(last)
  if #deadlines == 0 then
    return
  end
  call('ZADD', deadlines_key, unpack(deadlines))
  for key, set in pairs(sets) do
    try('SADD', key, unpack(set))
    keep(key, set.ttl)
  end
  -- Always: the queue may have had foreign entries only, and what is not listed is found by nobody once its wake is gone.
  call('SADD', queues_key, queue)
  if #deadlines == 2 then
    call('XADD', wake_key, 'MAXLEN', '~', 1000, '*', 'queue', queue, 'job', last.id, 'entry', last.entry, 'fence', last.fence,
      'out', out_of(last.route), 'est_prompt', last.est_prompt, 'est_new', last.est_new, 'deadline', last.deadline,
      unpack(last.asks))
  else
    call('XADD', wake_key, 'MAXLEN', '~', 1000, '*', 'queue', queue, 'job', last.id)
  end
end
