-- What a node's hash says of its past: failure EWMA, counters, drain rate (`_create.lua` reads it), circuit breaker.
local FAILURE_WEIGHT = 0.1
local DRAIN_MS = 30000

-- Account `ok` good ends, `bad` failures of the node and `client` errors that are nobody's.
-- breaker_ms = first opening, breaker_max = longest; both 0 when the failure must not open it.
local function account(node, ok, bad, client, breaker_ms, breaker_max)
  local h = call('HMGET', node, 'failure', 'done_rate', 'done_ms', 'ok', 'failed', 'client_errors',
    'breaker_n', 'breaker_until', 'epoch')
  if not h[9] then
    return -- removed meanwhile: a hash made here would have no TTL
  end
  local set = {}
  if ok + bad > 0 then
    local failure = (tonumber(h[1]) or 0) * (1 - FAILURE_WEIGHT) ^ ok
    if bad > 0 then
      local left = (1 - FAILURE_WEIGHT) ^ bad
      failure = failure * left + 1 - left
    end
    set[#set + 1] = 'failure'
    set[#set + 1] = string.format('%.5f', failure)
  end
  local ended = ok + client
  if ended > 0 then
    local age = now - (tonumber(h[3]) or now)
    local rate = (tonumber(h[2]) or 0) * math.exp(-age / DRAIN_MS) + ended * 1000 / DRAIN_MS
    set[#set + 1] = 'done_rate'
    set[#set + 1] = string.format('%.4f', rate)
    set[#set + 1] = 'done_ms'
    set[#set + 1] = now
  end
  if ok > 0 then
    set[#set + 1] = 'ok'
    set[#set + 1] = (tonumber(h[4]) or 0) + ok
    if (tonumber(h[7]) or 0) > 0 then
      set[#set + 1] = 'breaker_n'
      set[#set + 1] = 0
    end
  end
  if bad > 0 then
    set[#set + 1] = 'failed'
    set[#set + 1] = (tonumber(h[5]) or 0) + bad
    -- Jobs that were running when it opened do not open it further.
    if breaker_ms > 0 and (tonumber(h[8]) or 0) <= now then
      local n = (tonumber(h[7]) or 0) + 1
      set[#set + 1] = 'breaker_n'
      set[#set + 1] = n
      set[#set + 1] = 'breaker_until'
      set[#set + 1] = now + math.min(breaker_max, breaker_ms * 2 ^ math.min(n - 1, 30))
    end
  end
  if client > 0 then
    set[#set + 1] = 'client_errors'
    set[#set + 1] = (tonumber(h[6]) or 0) + client
  end
  if #set > 0 then
    call('HSET', node, unpack(set))
  end
end

-- Whether `holder` may act for the node. No owner known (a FLUSHALL took the hash): the caller becomes owner.
-- Returns nil and the node's models if it may, else the owner's name ('' = the node has left).
local function other_owner(node, holder, epoch, keep_ms)
  local h = call('HMGET', node, 'owner', 'state', 'models')
  if h[1] == holder then
    return nil, h[3]
  end
  if filled(h[1]) or h[2] == 'bye' then
    return h[1] or ''
  end
  -- HTTP nodes come back by registration only: a relay recreates none.
  if string.sub(holder, 1, 6) == 'relay:' then
    return ''
  end
  call('HDEL', node, '') -- frees nothing: what follows must pass at maxmemory
  call('HSET', node, 'owner', holder, 'epoch', epoch)
  call('PEXPIRE', node, keep_ms)
  return nil
end
