-- use: _event
-- What all node events share. Order is (epoch, stream entry id); life counts from the entry's id, so a backlog revives nobody.
-- KEYS 1..5 node, alive, nodes:known, events, wake; ARGV 1..5 node, entry ms, entry sequence, node_ttl, node_keep.
local node_key, alive_key, known_key, events_key, wake_key = unpack(KEYS, 1, 5)
local node, node_ttl, node_keep = ARGV[1], tonumber(ARGV[4]), tonumber(ARGV[5])
local beat_ms, beat_seq = tonumber(ARGV[2]), tonumber(ARGV[3])
relieve(known_key)
local beat_id = ARGV[2] .. '-' .. ARGV[3]

-- Whether this entry is not newer than the one the node's hash stands on.
local function is_stale(stored)
  local ms, seq = string.match(stored or '', '^(%d+)-(%d+)$')
  if not ms then
    return false
  end
  ms, seq = tonumber(ms), tonumber(seq)
  return beat_ms < ms or (beat_ms == ms and beat_seq <= seq)
end

-- The value of a field among ARGV `from`.., which are fields and values in pairs.
local function new_value(name, from)
  for i = from, #ARGV, 2 do
    if ARGV[i] == name then
      return ARGV[i + 1]
    end
  end
end

local function is_expired()
  return beat_ms + node_ttl <= now
end

-- It lives until a TTL after the entry was written, and is known a while longer. KEYS `from`.. are the zsets of `count`
-- models that it serves, then those of models that it does not serve or no longer. `roomier`: it takes more than before.
local function revive(from, count, roomier)
  local was_alive = call('EXISTS', alive_key) == 1
  call('SET', alive_key, '1', 'PX', math.max(1, beat_ms + node_ttl - now))
  call('ZADD', known_key, beat_ms, node)
  call('PEXPIRE', node_key, node_keep + 600000)
  for i = from, #KEYS do
    local model = KEYS[i]
    if i >= from + count then
      call('ZREM', model, node)
    else
      call('ZADD', model, beat_ms, node)
      call('ZREMRANGEBYSCORE', model, '-inf', now - node_keep)
      call('PEXPIRE', model, node_keep)
    end
  end
  if not was_alive then
    report(events_key, 'node_up', node, 'beat', '')
  end
  if roomier or not was_alive then
    call('XADD', wake_key, 'MAXLEN', '~', 1000, '*', 'queue', '', 'job', '')
  end
end
