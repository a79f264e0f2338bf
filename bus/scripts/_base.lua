-- First in every script: the clock, appends to out-streams, and the names of the fields that entries have.
local call = redis.call
local try = redis.pcall
local concat = table.concat
local find = string.find
local sub = string.sub
local floor = math.floor

-- Only the server's clock decides anything.
local at = call('TIME')
local now = at[1] * 1000 + floor(at[2] / 1000)

-- Renew an expiry, but write only when a tenth of it is used up: most calls cost one read.
local function keep(key, ttl)
  if call('PTTL', key) < ttl * 0.9 then
    call('PEXPIRE', key, ttl)
  end
end

-- At maxmemory the server refuses what may grow until a script has made a write that frees. This one frees nothing, and
-- opens the way for what must go on there: work drains only while leases, beats and cancels come through.
local function relieve(zset)
  call('ZREM', zset, '')
end

-- Out-streams written in this call, so that each has its expiry renewed once.
local sent = {}

-- Append to an out-stream: trimmed by time; a plain producer's key may be of another type, so nothing is raised.
local function send(out, ttl, ...)
  local id = try('XADD', out, 'MINID', '~', now - ttl, '*', ...)
  if type(id) == 'string' and not sent[out] then
    sent[out] = true
    if call('PTTL', out) < ttl * 0.9 then
      call('PEXPIRE', out, ttl)
    end
  end
end

-- A field that is missing reads as false, one that is empty means the same.
local function filled(value)
  return value and value ~= ''
end

local function has_word(words, word)
  return words and find(' ' .. words .. ' ', ' ' .. word .. ' ', 1, true) ~= nil
end

local function with_word(words, word)
  if has_word(words, word) then
    return words
  end
  return filled(words) and words .. ' ' .. word or word
end

-- What is fixed at submit, packed in one field because each field of a hash costs: model, flags (s = streams,
-- l = asks for log probabilities, i = an idempotency record names it, b = its payload has a key of its own, r = it was
-- driven again, - = none), policy, seed, created, deadline, estimated prompt and new tokens.
local SPEC = '^(%S+) (%S+) (%S+) (%S+) (%S+) (%S+) (%S+) (%S+)$'

-- Where a job is, in one field: "queue <name> <entry>", "queue <name>" while held back, "node <id> <owner> <entry>".
local ON_NODE = '^node (%S+) (%S+) (%S+)$'
local IN_QUEUE = '^queue (%S+) ?(%S*)$'

-- The out-stream's name: the first word of a route.
local function out_of(route)
  local space = find(route, ' ', 1, true)
  return space and sub(route, 1, space - 1) or route
end

-- The gateway in a route: its second word.
local function gateway_of(route)
  return string.match(route, '^%S+ (%S*)') or ''
end
