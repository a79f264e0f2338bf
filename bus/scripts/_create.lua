-- use: _event _node
-- A new job, for `submit` and `admit`. KEYS 1..13 and ARGV 1..22 are common to both.
local job_key, queue_key, wake_key, deadlines_key, queues_key, model_key, events_key, payload_key, out_key,
  set_key, quota_key, idem_key, text_key = unpack(KEYS, 1, 13)
local job_id, queue, model, route, policy, stream, seed, est_prompt, est_new, payload, prefix = unpack(ARGV, 1, 11)
local deadline_in, deadline_at, queue_max, node_ttl, job_keep, quota_max = tonumber(ARGV[12]), tonumber(ARGV[13]),
  tonumber(ARGV[14]), tonumber(ARGV[15]), tonumber(ARGV[16]), tonumber(ARGV[17])
local idem, redrive, attempt_floor, shown, gateway = ARGV[18], ARGV[19] == '1', ARGV[20], ARGV[21], ARGV[22]

-- The job of this id, if there is one.
local function existing()
  local h = call('HMGET', job_key, 'state', 'fence', 'spec', 'route')
  if not h[1] then
    return nil
  end
  local _, _, _, _, _, deadline = string.match(h[3], SPEC)
  return {'existing', h[1], h[2], deadline, h[4]}
end

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

local function no_server()
  if call('ZCOUNT', model_key .. ':parts', now - node_ttl, '+inf') > 0 then
    local missing, count = missing_layers()
    return {'refused', 'uncovered', node_ttl, missing, count}
  end
  local known = call('ZCARD', model_key)
  if known > 0 then
    return {'refused', 'no_node', node_ttl, '', known}
  end
  return {'refused', 'no_model', node_ttl, '', 0}
end

-- nil, or why the job cannot be taken. Reads, and forgets lapsed places of the quota.
local function refusal(waiting)
  if redrive then
    return nil
  end
  if call('ZCOUNT', model_key, now - node_ttl, '+inf') == 0 then
    return no_server()
  end
  if waiting >= queue_max then
    return {'refused', 'queue_full', wait_for(prefix, model, waiting * 0.1), '', waiting}
  end
  if quota_max > 0 then
    local held = call('ZCOUNT', quota_key, '(' .. now, '+inf')
    if held >= quota_max then
      return {'refused', 'quota_full', wait_for(prefix, model, 1), '', held}
    end
  end
  return nil
end

local function refuse(answer)
  if idem ~= '' and call('GET', idem_key) == idem then
    call('DEL', idem_key)
  end
  report(events_key, 'refused', job_id, answer[2], model)
  return answer
end

-- Answers the fence and the deadline.
local function create(waiting)
  local deadline = deadline_at > 0 and deadline_at or now + deadline_in
  local fence = attempt_floor .. (redrive and '.r' or '.0')
  local entry = call('XADD', queue_key, '*', 'job', job_id, 'fence', fence, 'out', out_of(route),
    'est_prompt', est_prompt, 'est_new', est_new, 'deadline', deadline, 'alone', '', 'avoided', '', 'resume', '')
  local big = #payload > 8192
  local flags = stream .. (idem ~= '' and 'i' or '') .. (big and 'b' or '')
  local spec = concat({model, flags == '' and '-' or flags, policy, seed, now, deadline, est_prompt, est_new}, ' ')
  call('HSET', job_key, 'state', 'queued', 'fence', fence, 'route', route, 'place', 'queue ' .. queue .. ' ' .. entry,
    'spec', spec, 'payload', big and '' or payload)
  call('PEXPIREAT', job_key, deadline + job_keep)
  if big then
    call('SET', payload_key, payload, 'PX', math.max(1, deadline + job_keep - now))
  end
  if shown ~= '' then
    call('SET', text_key, shown, 'PX', math.max(1, deadline + job_keep - now))
  end
  call('ZADD', deadlines_key, deadline, job_id)
  if waiting == 0 then
    call('SADD', queues_key, queue)
  end
  if gateway ~= '' then
    call('SADD', set_key, job_id)
    keep(set_key, math.max(60000, deadline - now + job_keep))
  end
  if quota_key ~= job_key then
    call('ZREMRANGEBYSCORE', quota_key, '-inf', now)
    call('ZADD', quota_key, deadline, job_id)
    keep(quota_key, math.max(60000, deadline - now + 120000))
  end
  -- The wake of a new job carries its queue entry, so that a dispatcher that knows the nodes need not look.
  call('XADD', wake_key, 'MAXLEN', '~', 1000, '*', 'queue', queue, 'job', job_id, 'entry', entry,
    'fence', fence, 'out', out_of(route), 'est_prompt', est_prompt, 'est_new', est_new,
    'deadline', deadline)
  return fence, deadline
end
