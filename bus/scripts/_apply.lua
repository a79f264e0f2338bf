-- use: _event
-- What all node events share. Order is (epoch, stream entry id); life counts from the entry's id, so a backlog revives nobody.
-- KEYS 1..5 node, alive, nodes:known, events, wake; ARGV 1..5 node, entry ms, entry sequence, node_ttl, node_keep.
local node_key, alive_key, known_key, events_key, wake_key = unpack(KEYS, 1, 5)
local node, node_ttl, node_keep = ARGV[1], tonumber(ARGV[4]), tonumber(ARGV[5])
local beat_ms, beat_seq = tonumber(ARGV[2]), tonumber(ARGV[3])
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

local function is_expired()
  return beat_ms + node_ttl <= now
end

-- It lives until a TTL after the entry was written, and is known a while longer; `models` are keys of zsets.
local function revive(models)
  local was_alive = call('EXISTS', alive_key) == 1
  call('SET', alive_key, '1', 'PX', math.max(1, beat_ms + node_ttl - now))
  call('ZADD', known_key, beat_ms, node)
  call('PEXPIRE', node_key, node_keep + 600000)
  for _, model in ipairs(models) do
    call('ZADD', model, beat_ms, node)
    call('ZREMRANGEBYSCORE', model, '-inf', now - node_keep)
    call('PEXPIRE', model, node_keep)
  end
  if not was_alive then
    report(events_key, 'node_up', node, 'beat', '')
    call('XADD', wake_key, 'MAXLEN', '~', 1000, '*', 'queue', '', 'job', '')
  end
end
