-- use: _node
-- Extend a holder's lease and its reservations; a listed job has been read, so it counts as started.
-- KEYS leases, node, running, then the listed jobs. ARGV holder, epoch, lease_ms, node_keep, then job ids and fences in pairs.
-- Answers {'renewed', expiry, {member, why...} to stop, members to cancel, members not listed} or {'superseded', owner}.
local holder, lease_ms = ARGV[1], tonumber(ARGV[3])
local owner = other_owner(KEYS[2], holder, ARGV[2], tonumber(ARGV[4]))
if owner then
  return {'superseded', owner}
end
local expiry = now + lease_ms
local stop, cancel, others, extended, listed, begun = {}, {}, {}, {}, {}, {}
for i = 1, #KEYS - 3 do
  local job_id, fence = ARGV[3 + i * 2], ARGV[4 + i * 2]
  local member = job_id .. '/' .. fence
  listed[member] = true
  local h = call('HMGET', KEYS[3 + i], 'state', 'fence', 'cancel', 'started')
  local why
  if not h[1] then
    why = 'unknown'
  elseif h[1] ~= 'running' then
    why = h[1]
  elseif h[2] ~= fence then
    why = 'fence'
  elseif not call('ZSCORE', KEYS[3], member) then
    why = 'unknown'
  end
  if why then
    stop[#stop + 1] = member
    stop[#stop + 1] = why
  else
    extended[#extended + 1] = expiry
    extended[#extended + 1] = member
    if filled(h[3]) then
      cancel[#cancel + 1] = member
    end
    if not filled(h[4]) then
      begun[#begun + 1] = KEYS[3 + i]
    end
  end
end
for _, member in ipairs(call('ZRANGE', KEYS[3], 0, -1)) do
  if not listed[member] then
    others[#others + 1] = member
  end
end
relieve(KEYS[3])
call('ZADD', KEYS[1], expiry, holder)
for from = 1, #extended, 2000 do
  call('ZADD', KEYS[3], 'XX', unpack(extended, from, math.min(from + 1999, #extended)))
end
for _, job in ipairs(begun) do
  call('HSET', job, 'started', now)
end
return {'renewed', expiry, stop, cancel, others}
