-- use: _node
-- End attempts. First all is read and decided, then written, deletions first, so that work drains at maxmemory.
-- KEYS node, running, load, node jobs, deadlines, wake, then a piece's job, text, tokens, payload, out, gateway's set,
-- usage, quota (the job's own key where it has none); then the logprobs of each piece that has some.
-- ARGV holder, epoch, prefix, out_ttl, result_ttl, node_keep, text_max, pieces, node id, then a piece's job, fence, route, text offset, text,
-- reason, prompt tokens, new tokens, error code, error message, fault;
-- then of each that has logprobs its number, their offset, the records.
-- Answers per piece {1, state} finished, {2, text_len, token_len, logprobs_len} gap, {3, why} stop, {4, route} moved.
local node_key, running_key, load_key, jobs_key, deadlines_key, wake_key = unpack(KEYS, 1, 6)
local prefix = ARGV[3]
local out_ttl, result_ttl, text_max = tonumber(ARGV[4]), tonumber(ARGV[5]), tonumber(ARGV[7])
local KEYS_EACH, ARGS_EACH = 8, 11

local owner, served = other_owner(node_key, ARGV[1], ARGV[2], tonumber(ARGV[6]))
if owner then
  return {'superseded', owner}
end

local answers, ending, members, entries, ids, sets, models = {}, {}, {}, {}, {}, {}, {}
local seen = {}
local pieces = tonumber(ARGV[8])
local scored = {}
for k = 1, #KEYS - 6 - pieces * KEYS_EACH do
  local at = 9 + pieces * ARGS_EACH + (k - 1) * 3
  scored[tonumber(ARGV[at + 1])] = {key = KEYS[6 + pieces * KEYS_EACH + k], at = tonumber(ARGV[at + 2]), records = ARGV[at + 3]}
end

local function decide(i)
  local k, a = 6 + (i - 1) * KEYS_EACH, 9 + (i - 1) * ARGS_EACH
  local p = {}
  p.job, p.text_key, p.tokens_key, p.payload_key, p.out, p.set, p.usage, p.quota = unpack(KEYS, k + 1, k + KEYS_EACH)
  p.job_id, p.fence, p.route, p.text_at, p.text, p.reason, p.prompt_tokens, p.new_tokens, p.code, p.message, p.fault =
    unpack(ARGV, a + 1, a + ARGS_EACH)
  local h = call('HMGET', p.job, 'state', 'fence', 'route', 'place', 'spec', 'cancel', 'started')
  if not h[1] then
    return {3, 'unknown'}
  elseif h[2] ~= p.fence then
    return {3, 'fence'}
  elseif h[1] == 'queued' then
    return {3, 'queued'}
  elseif h[1] ~= 'running' or seen[p.job_id] then
    return {1, seen[p.job_id] or h[1]}
  elseif h[3] ~= p.route then
    return {4, h[3]}
  end
  p.text_len = call('STRLEN', p.text_key)
  local text_at = tonumber(p.text_at)
  p.log = scored[i]
  p.log_len = p.log and call('STRLEN', p.log.key) or 0
  if text_at > p.text_len or (p.log and p.log.at > p.log_len) then
    return {2, p.text_len, floor(call('STRLEN', p.tokens_key) / 4), p.log_len}
  end
  p.new = sub(p.text, p.text_len - text_at + 1)
  local model, flags = string.match(h[5], SPEC)
  p.stream, p.idem = find(flags, 's', 1, true), find(flags, 'i', 1, true)
  -- A first attempt that never flushed has no tokens to delete; `b` says that the payload has a key of its own.
  p.clean = not filled(h[7]) and sub(p.fence, 1, 2) == '1.' and not find(flags, 'b', 1, true)
  if filled(h[6]) then
    p.state, p.reason, p.code, p.message = 'cancelled', 'cancelled', '', ''
  elseif p.reason == 'cancelled' then
    p.state = 'cancelled'
  elseif p.reason == 'error' then
    p.state = 'failed'
  else
    p.state = 'done'
  end
  seen[p.job_id] = p.state
  ending[#ending + 1] = p
  members[#members + 1] = p.job_id .. '/' .. p.fence
  ids[#ids + 1] = p.job_id
  entries[#entries + 1] = select(3, string.match(h[4], ON_NODE))
  models[model] = true
  if p.set ~= p.job then
    sets[p.set] = sets[p.set] or {}
    local set = sets[p.set]
    set[#set + 1] = p.job_id
  end
  return {1, p.state}
end

for i = 1, pieces do
  answers[i] = decide(i)
end
if #ending == 0 then
  return answers
end

call('ZREM', running_key, unpack(members))
call('HDEL', load_key, unpack(members))
call('XACK', jobs_key, 'workers', unpack(entries))
call('XDEL', jobs_key, unpack(entries))
call('ZREM', deadlines_key, unpack(ids))
for set, jobs in pairs(sets) do
  try('SREM', set, unpack(jobs))
end

-- The result is the stored text; answers the whole of it if the terminal carries it.
local function store_text(p)
  local whole = ''
  local total = p.text_len + #p.new
  if p.text_len == 0 then
    if p.new ~= '' then
      call('SET', p.text_key, p.new, 'PX', p.ttl)
    end
    whole = p.new
  else
    if p.new ~= '' then
      call('APPEND', p.text_key, p.new)
    end
    call('PEXPIRE', p.text_key, p.ttl)
    if not p.stream and total <= text_max then
      whole = call('GET', p.text_key)
    end
  end
  return total, (not p.stream and total <= text_max) and whole or ''
end

-- The same for its log probabilities. Answers what is new, how much is stored, the whole.
local function store_logprobs(p)
  local fresh = sub(p.log.records, p.log_len - p.log.at + 1)
  if fresh ~= '' then
    call('APPEND', p.log.key, fresh)
  end
  call('PEXPIRE', p.log.key, p.ttl)
  local total = p.log_len + #fresh
  return fresh, total, (not p.stream and total <= text_max and total > 0) and call('GET', p.log.key) or ''
end

local ok, bad, client = 0, 0, 0
for _, p in ipairs(ending) do
  if p.quota ~= p.job then
    try('ZREM', p.quota, p.job_id)
  end
  if not p.clean then
    call('DEL', p.tokens_key, p.payload_key)
  end
  -- An idempotency record must not outlive its job, so such a job keeps the expiry of its submit.
  p.ttl = p.idem and math.max(result_ttl, call('PTTL', p.job)) or result_ttl
  local before = p.text_len
  local total, whole = store_text(p)
  call('HSET', p.job, 'state', p.state, 'payload', '',
    'result', concat({p.reason, p.prompt_tokens, p.new_tokens, now, ARGV[9]}, ' '))
  if p.code ~= '' then
    call('HSET', p.job, 'error_code', p.code, 'error_message', p.message)
  end
  call('PEXPIRE', p.job, p.ttl)
  if p.usage ~= p.job then
    -- A key of another type, or a full count, must not keep a job from its end.
    try('HINCRBY', p.usage, 'jobs', 1)
    try('HINCRBY', p.usage, 'prompt_tokens', p.prompt_tokens)
    try('HINCRBY', p.usage, 'new_tokens', p.new_tokens)
  end
  local frame_more, end_more = {}, {}
  if p.log then
    local fresh, log_total, all = store_logprobs(p)
    frame_more = {'logprobs_at', p.log_len, 'logprobs', fresh}
    end_more = {'logprobs_len', log_total, 'logprobs', all}
  end
  if p.stream and (p.new ~= '' or (frame_more[4] or '') ~= '') then
    send(p.out, out_ttl, 'type', 'frame', 'job', p.job_id, 'fence', p.fence, 'offset', before, 'text', p.new, 'count', 0,
      unpack(frame_more))
  end
  send(p.out, out_ttl, 'type', 'end', 'job', p.job_id, 'fence', p.fence, 'state', p.state, 'reason', p.reason,
    'text_len', total, 'prompt_tokens', p.prompt_tokens, 'new_tokens', p.new_tokens, 'node', ARGV[9],
    'error_code', p.code, 'error_message', p.message, 'retry_after_ms', 0, 'text', whole, unpack(end_more))
  if p.state == 'done' then
    ok = ok + 1
  elseif p.fault == 'client' then
    client = client + 1
  elseif p.fault == 'node' then
    bad = bad + 1
  end
end
account(node_key, ok, bad, client, 0, 0)
-- The room is for all models of the node.
for model in string.gmatch(served or '', '%S+') do
  models[model] = true
end
for model in pairs(models) do
  local queue = prefix .. 'queue:' .. model
  if call('XLEN', queue .. ':1') > 0 or call('XLEN', queue .. ':0') > 0 then
    call('XADD', wake_key, 'MAXLEN', '~', 1000, '*', 'queue', '', 'job', '')
    break
  end
end
return answers
