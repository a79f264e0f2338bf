-- use: _node
-- Store and send what the sequences of a worker produced.
-- KEYS node, running, then a piece's job, text, tokens, out; then the logprobs of each piece that has some.
-- ARGV holder, epoch, lease_ms, out_ttl, job_keep, node_keep, pieces, then a piece's job, fence, route, text offset, text, token offset, tokens;
-- then of each that has logprobs its number, their offset, the records.
-- Answers per piece {1, text_len, token_len} stored, {2, text_len, token_len, logprobs_len} gap, {3, why} stop, {4, route} moved.
local node_key, running_key = KEYS[1], KEYS[2]
local holder = ARGV[1]
local lease_ms, out_ttl, job_keep = tonumber(ARGV[3]), tonumber(ARGV[4]), tonumber(ARGV[5])

local owner = other_owner(node_key, holder, ARGV[2], tonumber(ARGV[6]))
if owner then
  return {'superseded', owner}
end
-- A first write that frees lets the rest pass at maxmemory, so that work drains.
call('ZREM', running_key, '')

local answers, extended = {}, {}

local pieces = tonumber(ARGV[7])
local scored = {}
for k = 1, #KEYS - 2 - pieces * 4 do
  local at = 7 + pieces * 7 + (k - 1) * 3
  scored[tonumber(ARGV[at + 1])] = {key = KEYS[2 + pieces * 4 + k], at = tonumber(ARGV[at + 2]), records = ARGV[at + 3]}
end

local function flush(i)
  local key_at, arg_at, log = 2 + (i - 1) * 4, 7 + (i - 1) * 7, scored[i]
  local job_key, text_key, tokens_key, out_key = unpack(KEYS, key_at + 1, key_at + 4)
  local job_id, fence, route, text_at, text, token_at, tokens = unpack(ARGV, arg_at + 1, arg_at + 7)
  local h = call('HMGET', job_key, 'state', 'fence', 'route', 'spec', 'resume', 'started')
  if not h[1] then
    return {3, 'unknown'}
  elseif h[1] ~= 'running' then
    return {3, h[1]}
  elseif h[2] ~= fence then
    return {3, 'fence'}
  elseif h[3] ~= route then
    return {4, h[3]}
  end
  local _, flags, _, _, _, deadline = string.match(h[4], SPEC)
  local text_len = call('STRLEN', text_key)
  -- Without a digest token ids are of no use to anybody, and after a loss of tokens there is nothing to append to.
  local keeps_tokens = filled(h[5])
  local token_len = keeps_tokens and floor(call('STRLEN', tokens_key) / 4) or 0
  text_at, token_at = tonumber(text_at), tonumber(token_at)
  local log_len = log and call('STRLEN', log.key) or 0
  if text_at > text_len or (keeps_tokens and token_at > token_len) or (log and log.at > log_len) then
    return {2, text_len, token_len, log_len}
  end
  local count = #tokens / 4
  if keeps_tokens then
    local new = sub(tokens, (token_len - token_at) * 4 + 1)
    count = #new / 4
    if count > 0 then
      call('APPEND', tokens_key, new)
      if token_len == 0 then
        call('PEXPIREAT', tokens_key, deadline + job_keep)
      end
      token_len = token_len + count
    end
  end
  local new = sub(text, text_len - text_at + 1)
  if new ~= '' then
    call('APPEND', text_key, new)
    if text_len == 0 then
      call('PEXPIREAT', text_key, deadline + job_keep)
    end
  end
  local streams = find(flags, 's', 1, true)
  if log then
    local fresh = sub(log.records, log_len - log.at + 1)
    if fresh ~= '' then
      call('APPEND', log.key, fresh)
      if log_len == 0 then
        call('PEXPIREAT', log.key, deadline + job_keep)
      end
    end
    if streams and (new ~= '' or fresh ~= '') then
      send(out_key, out_ttl, 'type', 'frame', 'job', job_id, 'fence', fence, 'offset', text_len, 'text', new, 'count', count,
        'logprobs_at', log_len, 'logprobs', fresh)
    end
  elseif streams and new ~= '' then
    send(out_key, out_ttl, 'type', 'frame', 'job', job_id, 'fence', fence, 'offset', text_len, 'text', new, 'count', count)
  end
  text_len = text_len + #new
  if not filled(h[6]) then
    call('HSET', job_key, 'started', now)
  end
  extended[#extended + 1] = now + lease_ms
  extended[#extended + 1] = job_id .. '/' .. fence
  return {1, text_len, token_len}
end

for i = 1, pieces do
  answers[i] = flush(i)
end
if #extended > 0 then
  call('ZADD', running_key, 'XX', unpack(extended))
end
return answers
