-- What has fallen due, for one sweeper at a time. It only names things; each is then handled by its own script, which checks again.
-- KEYS sweep, grace, leases, late, deadlines, nodes:known. ARGV prefix, holder, lease_ms, lock_ms, batch, node_keep.
-- Answers {0} or {1, grace until, expired {node, member...}, late jobs, jobs past their deadline, lapsed gateways, nodes to remove}.
local sweep_key, grace_key, leases_key, late_key, deadlines_key, known_key = unpack(KEYS, 1, 6)
local prefix, holder = ARGV[1], ARGV[2]
local lease_ms, lock_ms, batch, node_keep = tonumber(ARGV[3]), tonumber(ARGV[4]), tonumber(ARGV[5]), tonumber(ARGV[6])
local SUDDEN_MS = 2000
local FAR_LEASES = 10
local MASS_LEAST = 3

-- Asked here, not told by the caller: a call that waited for the server to come back would name the run before.
local run_id = string.match(call('INFO', 'server'), 'run_id:(%x+)') or ''

local sweeper = call('GET', sweep_key)
if sweeper and sweeper ~= holder then
  return {0}
end
relieve(leases_key)
call('SET', sweep_key, holder, 'PX', lock_ms)

local expired, old_nodes, owners = {}, {}, {}
local ids = call('ZRANGE', known_key, 0, -1, 'WITHSCORES')
for i = 1, #ids, 2 do
  local id, key = ids[i], prefix .. 'node:' .. ids[i]
  -- A foreign key of another type must not keep the sweep from everything else.
  local due = try('ZRANGEBYSCORE', key .. ':running', '-inf', now, 'LIMIT', 0, batch)
  -- No reservation lasts as long: a foreign one would hold its slot for ever. One whose job runs there is left alone.
  local far = try('ZRANGEBYSCORE', key .. ':running', '(' .. now + FAR_LEASES * lease_ms + 60000, '+inf', 'LIMIT', 0, batch)
  for _, members in ipairs({due, far}) do
    for _, member in ipairs(members) do
      expired[#expired + 1] = id
      expired[#expired + 1] = member
    end
  end
  local h = try('HMGET', key, 'owner', 'state')
  if filled(h[1]) then
    owners[h[1]] = true
  end
  if tonumber(ids[i + 1]) <= now - node_keep or h[2] == 'bye' then
    old_nodes[#old_nodes + 1] = id
  end
end

-- Grace: armed once per event. A new server has lost up to a second and nobody could renew while it was away;
-- and when most workers lapse at once it is the network or the server, not they.
local until_ms, armed_ms, seen_run = 0, 0, ''
local stored = call('GET', grace_key)
if stored then
  seen_run, until_ms, armed_ms = string.match(stored, '^(%S*) (%d+) (%d+)$')
  seen_run, until_ms, armed_ms = seen_run or '', tonumber(until_ms or 0), tonumber(armed_ms or 0)
end
local living, sudden = 0, 0
for owner in pairs(owners) do
  local lease = tonumber(call('ZSCORE', leases_key, owner) or 0)
  if lease > now then
    living = living + 1
  elseif lease > now - SUDDEN_MS then
    sudden = sudden + 1
  end
end
local mass = sudden >= MASS_LEAST and sudden > living and now >= armed_ms + lease_ms + SUDDEN_MS
if seen_run ~= run_id or mass then
  until_ms, armed_ms = now + lease_ms, now
end
call('SET', grace_key, run_id .. ' ' .. until_ms .. ' ' .. armed_ms, 'PX', 86400000)

local gateways = {}
if until_ms > now then
  expired = {}
else
  local lapsed = call('ZRANGEBYSCORE', leases_key, '-inf', now, 'WITHSCORES', 'LIMIT', 0, 1024)
  for i = 1, #lapsed, 2 do
    if call('EXISTS', prefix .. 'gateway:' .. lapsed[i] .. ':jobs') == 1 then
      gateways[#gateways + 1] = lapsed[i]
    elseif tonumber(lapsed[i + 1]) < now - 6 * lease_ms then
      call('ZREM', leases_key, lapsed[i])
    end
  end
end
local late = call('ZRANGEBYSCORE', late_key, '-inf', now, 'LIMIT', 0, batch)
local deadlines = call('ZRANGEBYSCORE', deadlines_key, '-inf', now, 'LIMIT', 0, batch)
return {1, until_ms, expired, late, deadlines, gateways, old_nodes}
