-- What a job may ask of its node that not every node can do, and which nodes can. The flag of each in a job's spec
-- (`bus.codec.spec` says the same):
local CAPABILITIES = {l = 'logprobs'}

-- A fleet of more than MANY nodes is looked through once in SEEN_MS for all jobs with the same question, not once for each.
local SEEN_MS, MANY = 1000, 256

-- What the flags of a job ask for; nil if nothing.
local function needs_of(flags)
  local needs
  for flag, name in pairs(CAPABILITIES) do
    if find(flags, flag, 1, true) then
      needs = needs or {}
      needs[#needs + 1] = name
    end
  end
  return needs
end

-- Of a node's `cannot`, "name:ms" each, the names that still stand.
local function standing(cannot)
  local names = {}
  for name, until_ms in string.gmatch(cannot or '', '(%S+):(%d+)') do
    if tonumber(until_ms) > now then
      names[#names + 1] = name
    end
  end
  return concat(names, ' ')
end

-- can: what the node says it can do, '-' nothing; without it the node does not say, and is asked.
local function is_able(can, cannot, needs)
  if not needs then
    return true
  end
  cannot = standing(cannot)
  for _, name in ipairs(needs) do
    if (filled(can) and not has_word(can, name)) or has_word(cannot, name) then
      return false
    end
  end
  return true
end

-- `outgrown` of a job for which no larger context is left: the largest that is said and has room takes it, and it ends there.
local ENDS_ANYWHERE = '-'

-- Of a job's `outgrown`, what a context must be larger than; nil if it outgrew none.
local function outgrown_of(field)
  return field == ENDS_ANYWHERE and 0 or tonumber(field or '')
end

-- Which nodes count for a job that outgrew one: those that say a larger context than `tokens`, and, if `unsaid`, those
-- that do not say (HTTP nodes).
local function larger_than(tokens, unsaid)
  return function(context)
    context = tonumber(context) or 0
    return context > tokens or (context == 0 and unsaid)
  end
end

local function says_none(context)
  return (tonumber(context) or 0) == 0
end

-- A node that was ordered to drain stays and takes nothing; one that drains on its way out may come back.
local function stays_drained(state, owner, drained_by)
  return state == 'draining' and drained_by ~= owner
end

-- Known nodes of the model that can do it and are not avoided, up to `enough`; `since`: the last beat is no older.
-- holds: of a context, whether it is large enough; nil: any is. Who waits for a larger one waits for none that stays drained.
local function count_able(prefix, model, needs, since, enough, avoid, holds)
  local key, from, count = prefix .. 'model:' .. model, 0, 0
  repeat
    local ids = call('ZRANGEBYSCORE', key, since, '+inf', 'LIMIT', from, 64)
    for _, id in ipairs(ids) do
      local h = call('HMGET', prefix .. 'node:' .. id, 'state', 'can', 'cannot', 'context_length', 'owner', 'drained_by')
      if h[1] and h[1] ~= 'bye' and not has_word(avoid, id) and is_able(h[2], h[3], needs)
        and (not holds or (holds(h[4]) and not stays_drained(h[1], h[5], h[6]))) then
        count = count + 1
        if count >= enough then
          return count
        end
      end
    end
    from = from + 64
  until #ids < 64
  return count
end

-- The same of all that are known, away or not, and of those that have left and may come back; `since`: nil, or the last
-- beat and the bye are no older.
local function count_known(prefix, model, needs, enough, avoid, holds, since)
  since = since or '-inf'
  local count = count_able(prefix, model, needs, since, enough, avoid, holds)
  local ids = count < enough and call('ZRANGE', prefix .. 'left:' .. model, '+inf', since, 'BYSCORE', 'REV', 'LIMIT', 0,
    256) or {}
  for _, id in ipairs(ids) do
    local h = call('HMGET', prefix .. 'node:' .. id, 'models', 'can', 'cannot', 'context_length')
    if has_word(h[1], model) and not has_word(avoid, id) and is_able(h[2], h[3], needs) and (not holds or holds(h[4]))
      and not call('ZSCORE', prefix .. 'model:' .. model, id) then
      count = count + 1
      if count >= enough then
        break
      end
    end
  end
  return count
end

local function is_live(prefix, key, owner)
  if not filled(owner) or call('EXISTS', key .. ':alive') == 0 then
    return false
  end
  local lease = call('ZSCORE', prefix .. 'leases', owner)
  return lease and tonumber(lease) > now
end

-- Whether any live node of the model can do it and is not avoided, named by the caller or not; who beat last comes first.
local function another_lives(prefix, model, avoid, needs, holds)
  for _, id in ipairs(call('ZRANGE', prefix .. 'model:' .. model, 0, 255, 'REV')) do
    if not has_word(avoid, id) then
      local key = prefix .. 'node:' .. id
      local h = call('HMGET', key, 'owner', 'state', 'models', 'can', 'cannot', 'context_length')
      if h[2] == 'up' and has_word(h[3], model) and is_able(h[4], h[5], needs) and (not holds or holds(h[6]))
        and is_live(prefix, key, h[1]) then
        return true
      end
    end
  end
  return false
end

local function unsupported(asked, model)
  return asked .. ': no node that serves the model ' .. model .. ' can do it'
end
