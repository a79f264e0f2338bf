-- use: _able
-- One node as the dispatcher and the status see it. The short list comes first in the full one; its last are what the
-- node has refused to do, and the probe.
local SHORT = {'owner', 'state', 'kind', 'models', 'capacity', 'prefill_rate', 'decode_rate', 'failure', 'breaker_n',
  'breaker_until', 'alone', 'alone_until', 'beat_ms', 'resume', 'context_length', 'can', 'cannot', 'breaker_probe'}
local FULL = {'epoch', 'layers', 'layer_count', 'whole', 'ok', 'failed', 'client_errors', 'api_url',
  'api', 'key_id', 'gpu_memory_gb', 'version', 'waiting', 'free_blocks', 'total_blocks', 'drafted', 'accepted',
  'loop_lag_ms', 'loop_lag_max_ms'}
local EVERYTHING = {}
for _, name in ipairs(SHORT) do
  EVERYTHING[#EVERYTHING + 1] = name
end
for _, name in ipairs(FULL) do
  EVERYTHING[#EVERYTHING + 1] = name
end

-- {id, alive, leased, running, promised prompt tokens, promised new tokens, fields...}; nil if there is no such node.
local function view(prefix, id, names)
  local key = prefix .. 'node:' .. id
  local fields = call('HMGET', key, unpack(names))
  if not (fields[1] or fields[2]) then
    return nil
  end
  local lease = filled(fields[1]) and call('ZSCORE', prefix .. 'leases', fields[1])
  local promised, running = 0, call('ZCARD', key .. ':running')
  if running > 0 then
    for _, packed in ipairs(call('HVALS', key .. ':load')) do
      promised = promised + packed
    end
  end
  -- A probe that has left the node, however it ended, is none any more: the next job may be one.
  if filled(fields[#SHORT]) and not call('ZSCORE', key .. ':running', fields[#SHORT]) then
    fields[#SHORT] = ''
  end
  fields[#SHORT - 1] = standing(fields[#SHORT - 1])
  local prompt = floor(promised / 10000000)
  local out = {id, call('EXISTS', key .. ':alive'), (lease and tonumber(lease) > now) and 1 or 0, running, prompt,
    promised - prompt * 10000000}
  for i = 1, #names do
    out[6 + i] = fields[i] or ''
  end
  return out
end
