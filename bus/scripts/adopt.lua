-- use: _event
-- A relay takes an HTTP node under its own lease, which must live. KEYS node, leases, running, events, wake. ARGV node, holder.
-- Answers {'owned', epoch, holder, reservations left} or {'held', holder or '', expiry}.
-- `left` are an earlier owner's: who owns it already gets none.
local h = call('HMGET', KEYS[1], 'owner', 'epoch', 'kind', 'state', 'drained_by')
local mine = call('ZSCORE', KEYS[2], ARGV[2])
if h[3] ~= 'http' or h[4] == 'bye' or not mine or tonumber(mine) <= now then
  return {'held', '', 0}
end
if filled(h[1]) and h[1] ~= ARGV[2] then
  local lease = call('ZSCORE', KEYS[2], h[1])
  if lease and tonumber(lease) > now then
    return {'held', h[1], tonumber(lease)}
  end
end
relieve(KEYS[2])
-- A relay that left had drained it; an operator's drain stands.
local undrained = h[4] == 'draining' and filled(h[5])
if undrained then
  call('HSET', KEYS[1], 'state', 'up', 'drained_by', '')
end
if h[1] ~= ARGV[2] then
  call('HSET', KEYS[1], 'owner', ARGV[2])
  report(KEYS[4], 'owned', ARGV[1], 'relay', ARGV[2])
end
if undrained or h[1] ~= ARGV[2] then
  call('XADD', KEYS[5], 'MAXLEN', '~', 1000, '*', 'queue', '', 'job', '')
end
return {'owned', tonumber(h[2]) or 0, ARGV[2], h[1] == ARGV[2] and {} or call('ZRANGE', KEYS[3], 0, -1)}
